"""The published methods as ready configurations.

Written by scripts/stubs.py from the registry; not to be edited.
"""

from typing import Any, Literal

from peft import PeftType, TaskType

from .config import BioConfig, Composition

Targets = list[str] | set[str] | str | None

def FlyLoraConfig(
    r: int = 32,
    k: int = 8,
    target_modules: Targets = "all-linear",
    *,
    alpha: float | None = None,
    rho: float | None = None,
    score: Literal["magnitude", "signed"] = "magnitude",
    projection: Literal["gaussian", "rademacher"] = "gaussian",
    rate: float = 0.001,
    per_forward: bool = False,
    dropout: float = 0.0,
    detach_input: bool = False,
    save_projection: bool = False,
    blocks: int = 1,
    zero_scale: float = 1.0,
    task_type: str | TaskType | None = None,
    peft_type: str | PeftType | None = None,
    auto_mapping: dict[str, Any] | None = None,
    peft_version: str | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    inference_mode: bool = False,
    feedforward_modules: list[str] | set[str] | str | None = None,
    exclude_modules: list[str] | set[str] | str | None = None,
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: list[str] | str | None = None,
    modules_to_save: list[str] | None = None,
    rank: int | None = None,
    composition: Composition = "staged",
    init_weights: bool = True,
    causal: bool | None = None,
    batch_first: bool | None = None,
    seed: int = 0,
    trained_over: dict[str, Any] | None = None,
    fingerprint: str | None = None,
    settings_fingerprint: str | None = None,
    bioadapt_version: str | None = None,
) -> BioConfig:
    """FlyLoRA: a frozen sparse random projection, of whose ``r`` ranks the ``k`` strongest work for each token.

    Source: Zou et al. 2025, FlyLoRA: Boosting task decoupling and parameter efficiency via implicit rank-wise
        mixture
    of experts, NeurIPS. All of the ``r`` columns are trained, ``k`` of them are active for a token.

    Args:
        r: ranks, each an expert.
        k: experts per token, at most ``r``.
        target_modules: as in PEFT; the method is meant for all linear layers.
        more: settings of ``fly_lora`` (``alpha``, ``rho``, ``score``, ``rate``, ...) and fields of `BioConfig`.

    Raises:
        ValueError: a setting out of range.
        TypeError: a name that is neither a setting nor a field.
    """

def NeuroAdaConfig(
    k: int = 8,
    target_modules: Targets = "all-linear",
    *,
    selection: Literal["magnitude", "gradient", "random", "reverse"] = "magnitude",
    row_fraction: float = 1.0,
    zero_scale: float = 1.0,
    task_type: str | TaskType | None = None,
    peft_type: str | PeftType | None = None,
    auto_mapping: dict[str, Any] | None = None,
    peft_version: str | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    inference_mode: bool = False,
    feedforward_modules: list[str] | set[str] | str | None = None,
    exclude_modules: list[str] | set[str] | str | None = None,
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: list[str] | str | None = None,
    modules_to_save: list[str] | None = None,
    rank: int | None = None,
    composition: Composition = "staged",
    init_weights: bool = True,
    causal: bool | None = None,
    batch_first: bool | None = None,
    seed: int = 0,
    trained_over: dict[str, Any] | None = None,
    fingerprint: str | None = None,
    settings_fingerprint: str | None = None,
    bioadapt_version: str | None = None,
) -> BioConfig:
    """NeuroAda: every output neuron trains a change of ``k`` of its input weights.

    Source: Zhang et al. 2025, NeuroAda: Activating each neuron's potential for parameter-efficient fine-tuning,
        EMNLP.
    The authors' recipes have ``k`` = 1 and 20.

    Args:
        k: weights per neuron.
        target_modules: as in PEFT; the method is meant for all linear layers.
        more: settings of ``neuro_ada`` (``selection``, ``row_fraction``) and fields of `BioConfig`.

    Raises:
        ValueError: a setting out of range.
        TypeError: a name that is neither a setting nor a field.
    """

def NeuroLoraConfig(
    r: int = 32,
    k: int = 8,
    target_modules: Targets = "all-linear",
    *,
    alpha: float | None = None,
    rho: float | None = None,
    score: Literal["magnitude", "signed"] = "magnitude",
    projection: Literal["gaussian", "rademacher"] = "gaussian",
    rate: float = 0.001,
    per_forward: bool = False,
    dropout: float = 0.0,
    detach_input: bool = False,
    save_projection: bool = False,
    blocks: int = 1,
    gate_width: int = 8,
    gate_input: Literal["token", "projection"] = "token",
    orthogonality: float = 0.1,
    orth_space: Literal["columns", "delta"] = "columns",
    zero_scale: float = 1.0,
    task_type: str | TaskType | None = None,
    peft_type: str | PeftType | None = None,
    auto_mapping: dict[str, Any] | None = None,
    peft_version: str | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    inference_mode: bool = False,
    feedforward_modules: list[str] | set[str] | str | None = None,
    exclude_modules: list[str] | set[str] | str | None = None,
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: list[str] | str | None = None,
    modules_to_save: list[str] | None = None,
    rank: int | None = None,
    composition: Composition = "staged",
    init_weights: bool = True,
    causal: bool | None = None,
    batch_first: bool | None = None,
    seed: int = 0,
    trained_over: dict[str, Any] | None = None,
    fingerprint: str | None = None,
    settings_fingerprint: str | None = None,
    bioadapt_version: str | None = None,
) -> BioConfig:
    """NeuroLoRA: FlyLoRA with a gate that rescales the projection by context before experts are selected.

    Source: Yang et al. 2026, NeuroLoRA: Context-aware neuromodulation for parameter-efficient multi-task
        adaptation,
    arXiv 2603.12378. Its abstract alone was at hand: gate, loss and their sizes are this library's reading of it.

    Args:
        r: ranks, each an expert.
        k: experts per token, at most ``r``.
        target_modules: as in PEFT; the method is meant for all linear layers.
        more: settings of ``neuro_lora`` and fields of `BioConfig`.

    Raises:
        ValueError: a setting out of range.
        TypeError: a name that is neither a setting nor a field.
    """

def SanConfig(
    target_modules: Targets = "all-linear",
    *,
    beta: bool = False,
    mode: Literal["both", "nt", "sp"] = "both",
    propagate_detached: bool = False,
    wiring: Literal["residual", "official_vit"] | dict[str, str] = "residual",
    patch_gain: bool = True,
    zero_scale: float = 8.0,
    task_type: str | TaskType | None = None,
    peft_type: str | PeftType | None = None,
    auto_mapping: dict[str, Any] | None = None,
    peft_version: str | None = None,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
    inference_mode: bool = False,
    feedforward_modules: list[str] | set[str] | str | None = None,
    exclude_modules: list[str] | set[str] | str | None = None,
    layers_to_transform: list[int] | int | None = None,
    layers_pattern: list[str] | str | None = None,
    modules_to_save: list[str] | None = None,
    rank: int | None = None,
    composition: Composition = "staged",
    init_weights: bool = True,
    causal: bool | None = None,
    batch_first: bool | None = None,
    seed: int = 0,
    trained_over: dict[str, Any] | None = None,
    fingerprint: str | None = None,
    settings_fingerprint: str | None = None,
    bioadapt_version: str | None = None,
) -> BioConfig:
    """SAN: a trained scale per output channel, which also reaches the weights of the layer that reads the channel.

    Source: Dai et al. 2025, SAN: Hypothesizing long-term synaptic development and neural engram mechanism in
        scalable
    model's parameter-efficient fine-tuning, ICML. For language models the wiring between layers is this library's
    reading.

    Args:
        target_modules: as in PEFT; the method is meant for all linear layers.
        more: settings of ``san_scaling`` (``wiring``, ``beta``, ...) and fields of `BioConfig`.

    Raises:
        ValueError: a setting out of range.
        TypeError: a name that is neither a setting nor a field.
    """
