"""An adapter's part of a model's state dict: taken out for a file, put back from one, hidden from the method below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config import BioConfig
from .bridge import CONTAINER
from .checkpoint import ROOT, check_fingerprint, check_keys, fingerprint, own_tensors, without_adapter_name
from .circuit import Circuit
from .tree import named_bio_layers


def circuit_tensors(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of an adapter's circuits under the model's names, from ``state_dict`` where that has them.

    PEFT drops every key from it that contains another adapter's name, be it that of a module.
    """
    found = {}
    for name, circuit in _circuits(model, adapter_name):
        prefix = f"{name}.{CONTAINER}.{adapter_name}." if name else f"{CONTAINER}.{adapter_name}."
        for rest, tensor in circuit.state_dict().items():
            found[prefix + rest] = state_dict.get(prefix + rest, tensor)
    return found


def adapter_fingerprint(
    model: nn.Module, config: BioConfig, adapter_name: str, state_dict: Mapping[str, Tensor], tensors: dict[str, Tensor]
) -> str:
    """Of what the adapter's file will hold: its circuits' ``tensors``, and the copies of its modules to save."""
    saved = {without_adapter_name(key, adapter_name): tensor for key, tensor in tensors.items()}
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and adapter_name in wrapper._adapters:
            inside = {k.removeprefix(f"{name}."): v for k, v in state_dict.items() if k.startswith(f"{name}.")}
            saved.update({f"{name}.{k}": v for k, v in wrapper.adapter_state_dict(adapter_name, inside).items()})
    return fingerprint(own_tensors(saved, config.modules_to_save))


def placed(
    model: nn.Module, config: BioConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a file under the names that they have in the model.

    Raises:
        ValueError: the file lacks part of the adapter, holds what has no place, or is not the one that was saved.
    """
    places, expected = {}, {}
    for name, circuit in _circuits(model, adapter_name):
        for rest, tensor in circuit.state_dict().items():
            bare = f"{name.removeprefix(ROOT)}.{CONTAINER}.{rest}"
            places[bare] = f"{name}.{CONTAINER}.{adapter_name}.{rest}"
            expected[bare] = tensor
    given = own_tensors(state_dict)
    foreign = {key: value for key, value in state_dict.items() if key.removeprefix(ROOT) not in given}
    here = model.state_dict()
    lost = {key: v for key, v in foreign.items() if key not in here and key.removeprefix(ROOT) not in here}
    check_keys({**given, **lost}, expected, adapter_name)
    saved = {key.replace(f".modules_to_save.{adapter_name}.", "."): value for key, value in state_dict.items()}
    check_fingerprint(own_tensors(saved, config.modules_to_save), config.fingerprint, "the checkpoint")
    for name, circuit in _circuits(model, adapter_name):
        start = f"{name.removeprefix(ROOT)}.{CONTAINER}."
        circuit.check_loaded({key.removeprefix(start): v for key, v in given.items() if key.startswith(start)})
    return {**{places[key]: value for key, value in given.items()}, **foreign}


def hide_adapters(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """The state dict of the PeftModel below, asked for by itself, holds what it held without a bio adapter on top."""
    if prefix:
        return
    layers = dict(named_bio_layers(module))
    ours = tuple(f"{name}.{CONTAINER}." for name in layers)
    wrapped = tuple(f"{name}.base_layer." for name, layer in layers.items() if layer.below is None)
    for key in list(state_dict):
        if key.startswith(ours):
            del state_dict[key]
        elif key.startswith(wrapped):
            path, _, rest = key.rpartition(".base_layer.")
            state_dict[f"{path}.{rest}"] = state_dict.pop(key)


def _circuits(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Circuit]]:
    """The adapter's circuits, with the name of the layer of each."""
    for name, layer in named_bio_layers(model):
        if adapter_name in layer.circuits:
            yield name, layer.circuits[adapter_name]  # type: ignore[misc]
