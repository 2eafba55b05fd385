"""What a search is asked for, and whether that makes sense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..evaluation.tasks import DEFAULT_TASK
from ..evaluation.training import DEFAULT_MODEL

AUTO, NO_LORA = "auto", "none"
# The most primitives of a configuration.
SLOTS = 6
# What may differ when a search goes on, or another machine joins: who works, where and how long.
FREE = ("output", "storage", "study", "workers", "timeout", "trials", "data_dir", "device")


@dataclass(frozen=True)
class SearchSettings:
    """What to search, and for how long.

    Attributes:
        task: as for `load_task`.
        data_dir: as for `load_task`.
        model: as for `load_encoder`.
        lora: ``auto``: tuned with as many trials as the bio adapters get; ``none``; or the folder of a trained one.
        trials: how many configurations are tried.
        budget_params: the most trainable numbers of a bio adapter: an integer, or a share of the model as ``1%``.
        output: where adapters, results and report go.
        storage: as for `open_storage`; a journal file in ``output`` if None.
        study: its name.
        workers: processes that train at the same time.
        seed: of the search.
        epochs: of the LoRA and of the bio adapter each; the LoRA of the same size gets both.
        batch_size: rows per training step.
        rungs: how often a trial is validated, the end included.
        limit: about so many rows per split.
        primitives: names to choose from; all if None.
        slots: the most primitives of a configuration.
        confirm: how many of the best are trained again.
        confirm_seeds: on how many fresh seeds.
        test_seeds: on how many further ones the winner and its rivals are trained and tested.
        timeout: seconds that a trial may take.
        max_step_time: seconds that a training step may take.
        device: as for `load_encoder`.
    """

    task: str = DEFAULT_TASK
    data_dir: str | None = None
    model: str = DEFAULT_MODEL
    lora: str = AUTO
    trials: int = 40
    budget_params: str | int = "1%"
    output: str = "search_output"
    storage: str | None = None
    study: str | None = None
    workers: int = 1
    seed: int = 0
    epochs: float = 1.0
    batch_size: int = 64
    rungs: int = 2
    limit: int | None = None
    primitives: tuple[str, ...] | None = None
    slots: int = SLOTS
    confirm: int = 3
    confirm_seeds: int = 2
    test_seeds: int = 3
    timeout: float | None = 3600.0
    max_step_time: float | None = None
    device: str | None = None


def budget(wanted: str | int, parameters: int) -> int:
    """A budget in numbers: an integer, or a share of ``parameters`` in percent.

    Raises:
        ValueError: neither.
    """
    text = str(wanted).strip().replace("_", "").replace(",", "")
    try:
        count = int(float(text[:-1]) / 100 * parameters) if text.endswith("%") else int(text)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise ValueError(f"budget of parameters {wanted!r}: a whole number or a share such as 1% is needed, above zero")
    return count


def check(settings: SearchSettings) -> None:
    """Refuse what no search can be made with, by `ValueError`."""
    for name in ("trials", "workers", "slots", "confirm", "confirm_seeds", "test_seeds", "rungs"):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} {value!r}: a whole number above zero is needed")
    for name in ("epochs", "batch_size", "timeout", "max_step_time"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} {value!r}: a number above zero is needed")
    budget(settings.budget_params, 10**12)
    if settings.lora not in (AUTO, NO_LORA) and not Path(settings.lora, "adapter_config.json").is_file():
        raise ValueError(
            f"lora {settings.lora!r}: no adapter_config.json is there; accepted: auto, none, a LoRA's folder"
        )
