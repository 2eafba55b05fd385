"""Trials, adapters and numbers of a study in words and in code, for its report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from ... import BioConfig, list_primitives, primitive_info
from ..study.optuna_private import ENQUEUED
from .recorded import of_trial

# Fields of a recorded `BioConfig` that a user would not write.
_RECORDED = {
    *("primitives", "peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping"),
    *("inference_mode", "trained_over", "fingerprint", "bioadapt_version"),
}


def in_words(trial: FrozenTrial) -> str:
    """A trial's configuration on one line; its parameters, where it is none of our space."""
    configuration = of_trial(trial).get("configuration")
    if configuration is None:
        chosen = trial.params or trial.system_attrs.get(ENQUEUED, {})
        return ", ".join(f"{name}={as_text(value)}" for name, value in chosen.items())
    slots = [
        f"{slot['primitive']} @ {slot['layers']} {slot['modules']}"
        + (f" (strength {slot['strength']:g})" if slot.get("strength", 1) != 1 else "")
        for slot in configuration["slots"]
    ]
    if not slots:
        return "no primitives"
    joined = (" → " if configuration.get("composition") == "serial" else " + ").join(slots)
    rank, rate = configuration.get("rank"), configuration.get("learning_rate")
    extras = [f"rank {rank}" if rank else "full width"]
    if len(slots) > 1:
        extras.append(str(configuration.get("composition")))
    if rate is not None:
        extras.append(f"learning rate {rate:g}")
    return f"{joined}; {', '.join(extras)}"


def as_code(
    configs: Sequence[Mapping[str, Any]],
    learning_rate: float | None = None,
    strengths: Mapping[str, float] | None = None,
) -> str:
    """Python that puts the adapters of `BioConfig` records into a model; what is a default is left out.

    Args:
        configs: records, as ``BioConfig.to_dict`` gives them.
        learning_rate: what they were trained with.
        strengths: factors on it, by primitive.
    """
    if not configs:
        return ""
    calls = [config_call(config) for config in configs]
    known = set(list_primitives())
    absent = sorted({entry["name"] for config in configs for entry in config["primitives"]} - known)
    lines = [f"# needs the package that registers {name!r}, which is not installed here" for name in absent]
    lines += [
        "from peft import get_peft_model",
        "from bioadapt import BioConfig",
        "",
        "# model: the base, or the LoRA over it",
    ]
    lines.append(f'model = get_peft_model(model, {calls[0]}, adapter_name="bio")')
    names = ["bio"] + [f"bio_{number}" for number in range(2, len(calls) + 1)]
    lines += [f'model.add_adapter("{name}", {call})' for name, call in zip(names[1:], calls[1:], strict=True)]
    if len(calls) > 1:
        lines.append(f"model.base_model.set_adapter({json.dumps(names)})")
    if learning_rate is not None:
        lines.append(f"# trained with learning rate {learning_rate:g}")
        lines += [
            f"# {name}: the tensor that starts at zero with {learning_rate * strength:g}"
            for name, strength in (strengths or {}).items()
        ]
    return "\n".join(lines) + "\n"


def config_call(config: Mapping[str, Any], **more: str) -> str:
    """Python that makes a recorded `BioConfig`, with further arguments as code."""
    default = BioConfig(primitives=list_primitives()[:1]).to_dict()
    chosen = {
        name: value
        for name, value in config.items()
        if name in default and name not in _RECORDED and value != default[name]
    }
    primitives = [_entry(entry, config.get("rank") is not None) for entry in config["primitives"]]
    parts = [f"primitives=[{', '.join(primitives)}]", *(f"{name}={value!r}" for name, value in chosen.items())]
    parts += [f"{name}={code}" for name, code in more.items()]
    return "BioConfig(\n    " + ",\n    ".join(parts) + ",\n)"


def _entry(entry: Mapping[str, Any], under_rank: bool) -> str:
    """A primitive in a list: its name alone where its settings are the defaults."""
    defaults: dict[str, Any] = {}
    if entry["name"] in list_primitives():
        info = primitive_info(entry["name"])
        defaults = {name: setting.default for name, setting in info.settings.items()}
        defaults["zero_scale"] = 1.0 if under_rank else info.fresh_zero_scale
    # Studies recorded before zero_scale existed have trained with a factor of 1.
    chosen = {
        key: value
        for key, value in {**entry, "zero_scale": entry.get("zero_scale", 1.0)}.items()
        if key == "name" or key not in defaults or value != defaults[key]
    }
    return json.dumps(entry["name"]) if len(chosen) == 1 else repr(chosen)


def as_lines(key: str, value: Any) -> list[tuple[str, str]]:
    """A setting as lines; what is nested gets one for each part."""
    if isinstance(value, Mapping):
        return [line for part, inner in value.items() for line in as_lines(f"{key}: {part}", inner)]
    return [(key.replace("_", " "), as_text(value))]


def as_text(value: Any) -> str:
    """A setting on one line."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(as_text, value))
    return "none" if value is None else str(value)


def number(value: float | None) -> str:
    """Two decimals where that says something, else four significant digits; integers in full."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if 1 <= abs(value) < 1e6 else f"{value:.4g}"


def signed(value: float) -> str:
    """A difference: two decimals, or four significant digits where these would be very many."""
    return f"{value:+.2f}" if abs(value) < 1e6 else f"{value:+.4g}"


def short(value: float | None) -> str:
    """Two significant digits, or all before the point."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if 100 <= abs(value) < 1e15 else f"{value:.2g}"


def count(amount: int, word: str) -> str:
    """So many of something."""
    return f"{amount:,} {word}" if amount == 1 else f"{amount:,} {word}s"
