"""The published methods as ready configurations, in the shape that PEFT's users know.

Each function returns a plain `BioConfig` with one primitive, saves as such and loads as such. It takes every setting of
the primitive and every other field of `BioConfig` by keyword. For editors and type checkers they stand in
``ready.pyi``, which ``make stubs`` writes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from ._words import suggest
from .catalogue import settings_of
from .config import BioConfig

__all__ = ["FlyLoraConfig", "NeuroAdaConfig", "NeuroLoraConfig", "SanConfig"]

F = TypeVar("F", bound=Callable[..., BioConfig])
Targets = list[str] | set[str] | str | None


def _with_settings_of(name: str) -> Callable[[F], F]:
    """Show in a function's signature what ``more`` stands for: a primitive's settings and the fields of `BioConfig`."""

    def decorate(function: F) -> F:
        own = list(inspect.signature(function).parameters.values())[:-1]
        fields = list(inspect.signature(BioConfig).parameters.values())[1:]
        taken = {parameter.name for parameter in own}
        more = [parameter for parameter in (*settings_of(name), *fields) if parameter.name not in taken]
        function.__signature__ = inspect.Signature([*own, *more], return_annotation="BioConfig")  # type: ignore[attr-defined]
        return function

    return decorate


@_with_settings_of("fly_lora")
def FlyLoraConfig(r: int = 32, k: int = 8, target_modules: Targets = "all-linear", **more: Any) -> BioConfig:
    """FlyLoRA: a frozen sparse random projection, of whose ``r`` ranks the ``k`` strongest work for each token.

    Source: Zou et al. 2025, FlyLoRA: Boosting task decoupling and parameter efficiency via implicit rank-wise mixture
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
    return _ready("fly_lora", {"r": r, "k": k}, target_modules, more)


@_with_settings_of("neuro_lora")
def NeuroLoraConfig(r: int = 32, k: int = 8, target_modules: Targets = "all-linear", **more: Any) -> BioConfig:
    """NeuroLoRA: FlyLoRA with a gate that rescales the projection by context before experts are selected.

    Source: Yang et al. 2026, NeuroLoRA: Context-aware neuromodulation for parameter-efficient multi-task adaptation,
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
    return _ready("neuro_lora", {"r": r, "k": k}, target_modules, more)


@_with_settings_of("neuro_ada")
def NeuroAdaConfig(k: int = 8, target_modules: Targets = "all-linear", **more: Any) -> BioConfig:
    """NeuroAda: every output neuron trains a change of ``k`` of its input weights.

    Source: Zhang et al. 2025, NeuroAda: Activating each neuron's potential for parameter-efficient fine-tuning, EMNLP.
    The authors' recipes have ``k`` = 1 and 20.

    Args:
        k: weights per neuron.
        target_modules: as in PEFT; the method is meant for all linear layers.
        more: settings of ``neuro_ada`` (``selection``, ``row_fraction``) and fields of `BioConfig`.

    Raises:
        ValueError: a setting out of range.
        TypeError: a name that is neither a setting nor a field.
    """
    return _ready("neuro_ada", {"k": k}, target_modules, more)


@_with_settings_of("san_scaling")
def SanConfig(target_modules: Targets = "all-linear", **more: Any) -> BioConfig:
    """SAN: a trained scale per output channel, which also reaches the weights of the layer that reads the channel.

    Source: Dai et al. 2025, SAN: Hypothesizing long-term synaptic development and neural engram mechanism in scalable
    model's parameter-efficient fine-tuning, ICML. For language models the wiring between layers is this library's
    reading.

    Args:
        target_modules: as in PEFT; the method is meant for all linear layers.
        more: settings of ``san_scaling`` (``wiring``, ``beta``, ...) and fields of `BioConfig`.

    Raises:
        ValueError: a setting out of range.
        TypeError: a name that is neither a setting nor a field.
    """
    return _ready("san_scaling", {}, target_modules, more)


def _ready(name: str, settings: dict[str, Any], target_modules: Targets, more: dict[str, Any]) -> BioConfig:
    known_settings = {parameter.name for parameter in settings_of(name)}
    known_fields = set(inspect.signature(BioConfig).parameters) - {"primitives"}
    for word in more:
        if word not in known_settings | known_fields:
            hint = suggest(word, [*known_settings, *known_fields])
            raise TypeError(f"{word!r} is no setting of {name} and no field of BioConfig; {hint}")
    settings |= {word: value for word, value in more.items() if word in known_settings}
    rest = {word: value for word, value in more.items() if word not in known_settings}
    return BioConfig([{"name": name, **settings}], target_modules=target_modules, **rest)
