"""What a bio adapter was trained over, recorded on saving and checked on loading."""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .bridge import CONTAINER
from .checkpoint import fingerprint, signature

_TOLERANCE = 0.02


def record(model: nn.Module, under: PeftModel | None, layers: dict[str, nn.Module]) -> dict[str, Any]:
    """Name and fingerprint of the base and of every active adapter of another method below.

    Args:
        model: the plain model that carries the layers.
        under: the PeftModel that the bio adapter is stacked over, if any.
        layers: the plain adapted layers by their path.
    """
    adapters = []
    for name, config in _other_configs(model, under).items():
        tensors = get_peft_model_state_dict(under or model, adapter_name=name, save_embedding_layers=False)
        bare = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
        adapters.append({"name": name, "peft_type": str(config.peft_type.value), "fingerprint": fingerprint(bare)})
    base = model.__dict__.get("name_or_path") or getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return {"base": base, "signature": signature(layers), "adapters": adapters}


def warn_if_changed(trained: dict[str, Any] | None, found: dict[str, Any], adapter_name: str) -> None:
    """Warn, with both names, when an adapter is loaded over something else than it was trained over."""
    if not trained:
        return
    was, now = _named(trained), _named(found)
    if _fingerprints(trained) != _fingerprints(found):
        hint = ""
        if trained["adapters"] and not found["adapters"]:
            hint = " If what it was trained over has been merged into the base, this is as it should be."
        warnings.warn(
            f"bio adapter {adapter_name!r} was trained over {was}, but is loaded over {now}.{hint}", stacklevel=3
        )
    elif _differs(trained.get("signature", {}), found["signature"]):
        warnings.warn(
            f"bio adapter {adapter_name!r} was trained over {was}, but is loaded over {now}, whose weights differ.",
            stacklevel=3,
        )


def _other_configs(model: nn.Module, under: PeftModel | None) -> dict[str, Any]:
    configs = under.peft_config if under is not None else getattr(model, "peft_config", {})
    others = (m for m in model.modules() if isinstance(m, BaseTunerLayer) and not hasattr(m, CONTAINER))
    active = {name for layer in others for name in layer.active_adapters}
    return {name: config for name, config in configs.items() if config.peft_type != "BIO" and name in active}


def _fingerprints(record: dict[str, Any]) -> list[str]:
    return sorted(adapter["fingerprint"] for adapter in record["adapters"])


def _named(record: dict[str, Any]) -> str:
    base = f"the base {record['base']!r}" if record.get("base") else "a base without a name"
    below = [
        f"{adapter['peft_type']} adapter {adapter['name']!r} ({adapter['fingerprint'][:8]})"
        for adapter in record["adapters"]
    ]
    return " with ".join([base, " and ".join(below)]) if below else base


def _differs(trained: dict[str, float], found: dict[str, float]) -> bool:
    common = trained.keys() & found.keys()
    return any(abs(trained[key] - found[key]) > _TOLERANCE * max(abs(trained[key]), 1e-12) for key in common)
