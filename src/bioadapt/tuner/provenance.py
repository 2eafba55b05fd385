"""What a bio adapter was trained over, recorded on saving and checked on loading."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..checkpoint import CONTAINER, bare, fingerprint
from .tree import bio_layers, stacked_over

_TOLERANCE = 0.02


def record(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Name and fingerprint of the base and of every active adapter of another method below.

    Args:
        model: a PeftModel of bio adapters, or a plain model that carries them.
        state_dict: where the tensors of the adapters below are taken from; the model itself if None.
    """
    plain, under = stacked_over(model)
    adapters = []
    for name, config in adapters_below(model).items():
        tensors = tensors_below(under or plain, name, state_dict)
        method = str(config.peft_type.value)
        adapters.append({"name": name, "peft_type": method, "fingerprint": fingerprint(bare(tensors))})
    base = plain.__dict__.get("name_or_path") or getattr(getattr(plain, "config", None), "_name_or_path", None) or None
    return {"base": base, "signature": _signature(plain), "adapters": adapters}


def adapters_below(model: nn.Module) -> dict[str, PeftConfig]:
    """The active adapters of other methods under or beside the bio adapters, by name."""
    plain, under = stacked_over(model)
    configs = under.peft_config if under is not None else getattr(plain, "peft_config", {})
    others = (m for m in plain.modules() if isinstance(m, BaseTunerLayer) and not hasattr(m, CONTAINER))
    active = {name for layer in others for name in layer.active_adapters}
    return {name: config for name, config in configs.items() if config.peft_type != "BIO" and name in active}


def tensors_below(
    owner: PeftModel | nn.Module, name: str, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What PEFT would save of an adapter of another method."""
    given = None if state_dict is None else without_ours(state_dict)
    return get_peft_model_state_dict(owner, given, adapter_name=name, save_embedding_layers=False)


def without_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the tensors of bio adapters, whose names could pass for another method's."""
    return {key: tensor for key, tensor in state_dict.items() if f".{CONTAINER}." not in f".{key}"}


def trained_along(model: nn.Module) -> list[str]:
    """Those of the adapters below that are trainable."""
    trainable = {
        f".{key}."
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and f".{CONTAINER}." not in f".{key}"
    }
    return [name for name in adapters_below(model) if any(f".{name}." in key for key in trainable)]


def warn_if_changed(trained: dict[str, Any] | None, found: dict[str, Any], adapter_name: str, hint: str = "") -> None:
    """Warn, with both names and a ``hint``, when an adapter is loaded over something else than it was trained over."""
    if not trained:
        return
    was, now = _named(trained), _named(found)
    if _fingerprints(trained) != _fingerprints(found):
        if trained["adapters"] and not found["adapters"]:
            hint += " If what it was trained over has been merged into the base, this is as it should be."
        warnings.warn(
            f"bio adapter {adapter_name!r} was trained over {was}, but is loaded over {now}.{hint}", stacklevel=4
        )
    elif _differs(trained.get("signature", {}), found["signature"]):
        warnings.warn(
            f"bio adapter {adapter_name!r} was trained over {was}, but is loaded over {now}, whose weights differ.",
            stacklevel=4,
        )


def _signature(plain: nn.Module) -> dict[str, float]:
    """Root mean square of each adapted layer's frozen weight: tells one base model from another, whatever the dtype."""
    found = {}
    for layer in bio_layers(plain):
        weight = getattr(layer.get_base_layer(), "weight", None)
        ordinary = isinstance(weight, Tensor) and type(weight.data) is Tensor  # neither sharded nor quantised
        if ordinary and not weight.is_meta and weight.is_floating_point():
            found[layer.path] = float(f"{weight.detach().float().square().mean().sqrt().item():.4g}")
    return found


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
