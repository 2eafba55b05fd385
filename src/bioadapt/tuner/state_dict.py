"""An adapter's part of a model's state dict: taken out for a file, put back from one, hidden from the method below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..checkpoint import CONTAINER, ROOT, bare, check_keys
from .circuit import AdapterCircuit
from .placement import asked_for
from .tree import named_bio_layers

# What wrappers of torch put into the names of modules. State dicts leave the first two out, the compiler's they keep.
_LEFT_OUT = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_COMPILED = "_orig_mod."


def circuit_tensors(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of an adapter's circuits under the model's names, from ``state_dict`` where that has them.

    PEFT drops every key from it that contains another adapter's name, be it that of a module.
    """
    found = {}
    for name, circuit in _circuits(model, adapter_name):
        prefix = f"{name}.{CONTAINER}.{adapter_name}." if name else f"{CONTAINER}.{adapter_name}."
        for rest, tensor in circuit.state_dict().items():
            found[(prefix + rest).replace(_COMPILED, "")] = state_dict.get(prefix + rest, tensor)
    return found


def placed(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names that they have in the model.

    Besides the adapter's own they may be its copies of modules to save, which PEFT has already renamed, and the
    embeddings of the base, which PEFT saves where they were resized or adapted.

    Raises:
        ValueError: the checkpoint lacks part of the adapter, or holds what has no place in it.
    """
    places, expected = {}, {}
    for name, circuit in _circuits(model, adapter_name):
        for rest, tensor in circuit.state_dict().items():
            key = f"{name}.{CONTAINER}.{rest}".replace(_COMPILED, "").removeprefix(ROOT)
            places[key], expected[key] = f"{name}.{CONTAINER}.{adapter_name}.{rest}", tensor
    for name, wrapper in model.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            tensors = wrapper.state_dict()
            for inner in wrapper.adapter_state_dict_load_map(adapter_name).values():
                key = f"{name}.{inner}".removeprefix(ROOT)
                places[key], expected[key] = f"{name}.{inner}", tensors[inner]
    given = bare(state_dict)
    for name, parameter in _embeddings(model):
        key = name.removeprefix(ROOT)
        if key in given:
            places[key], expected[key] = name, parameter
    check_keys(given, expected, adapter_name)
    for name, circuit in _circuits(model, adapter_name):
        start = f"{name}.{CONTAINER}.".replace(_COMPILED, "").removeprefix(ROOT)
        circuit.check_loaded({key.removeprefix(start): v for key, v in given.items() if key.startswith(start)})
    return {places[key]: tensor for key, tensor in given.items()}


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


def _circuits(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, AdapterCircuit]]:
    """The adapter's circuits, with the name that state dicts have for the layer of each."""
    for name, layer in named_bio_layers(model):
        if adapter_name in layer.circuits:
            for part in _LEFT_OUT:
                name = name.replace(part, "")
            yield name, layer.circuits[adapter_name]  # type: ignore[misc]


def _embeddings(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the base's input and output embeddings, by their names in the model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = set()
    for method in ("get_input_embeddings", "get_output_embeddings"):
        layer = asked_for(base, method)
        found |= {id(parameter) for parameter in layer.parameters()} if layer is not None else set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in found and f".{CONTAINER}." not in f".{name}":
            yield name, parameter
