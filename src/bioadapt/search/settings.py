"""What a search is asked for, and whether that makes sense."""

from __future__ import annotations

from pathlib import Path

from ..settings import AUTO as AUTO
from ..settings import NO_LORA as NO_LORA
from ..settings import SLOTS as SLOTS
from ..settings import SearchSettings as SearchSettings

# What may differ when a search goes on, or another machine joins: who works, where and how long.
FREE = ("output", "storage", "study", "workers", "timeout", "trials", "data_dir", "device")


def budget(wanted: str | int, parameters: int, name: str = "budget of parameters") -> int:
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
        raise ValueError(f"{name} {wanted!r}: a whole number or a share such as 1% is needed, above zero")
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
    if settings.lora_params is not None:
        budget(settings.lora_params, 10**12, "lora_params")
        if settings.lora != AUTO:
            raise ValueError(
                f"lora_params {settings.lora_params!r}: only a LoRA that is tuned has a bound, with lora={AUTO!r}"
            )
    if settings.lora not in (AUTO, NO_LORA) and not Path(settings.lora, "adapter_config.json").is_file():
        raise ValueError(
            f"lora {settings.lora!r}: no adapter_config.json is there; accepted: auto, none, a LoRA's folder"
        )
