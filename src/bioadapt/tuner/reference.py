"""Reference adapters: copies that others make by the parameters alone.

TRL adds an adapter called "ref" of the configuration of "default", and copies every parameter whose name holds the one
into that whose name holds the other. What a local rule has learned stands in buffers, which must follow, or the
reference would start elsewhere than the policy. A method below has no part in the copy: it is the same for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .circuit import AdapterCircuit
from .layer import BioLayer

POLICY, REFERENCE = "default", "ref"


def check_reference(model: nn.Module, configs: Mapping[str, PeftConfig], adapter_name: str) -> None:
    """Refuse a reference adapter over a method that TRL's copy would miss.

    Raises:
        ValueError: an adapter below has the policy's name, or is trained, so that the reference would move with it.
    """
    if adapter_name != REFERENCE or configs[REFERENCE] is not configs.get(POLICY):
        return
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, BioLayer):
            continue
        below = [name for name, _ in layer.named_parameters() if not name.startswith("base_layer.")]
        if any(f".{POLICY}." in name for name in below):
            raise ValueError(
                f"adapter_name={REFERENCE!r}: a copy of {POLICY!r} by name would also ask for one of the adapter below "
                f"(at {path}), which is called {POLICY!r} too. Give that one another name, for instance "
                'PeftModel.from_pretrained(base, path, adapter_name="below") or get_peft_model(base, config, "below"); '
                "or pass ref_model to the trainer"
            )
        if any(layer.get_parameter(name).requires_grad for name in below):
            raise ValueError(
                f"adapter_name={REFERENCE!r}: the adapter below is trained as well (at {path}) and is the same for "
                f"{POLICY!r} and {REFERENCE!r}, so that the reference would move with it. Freeze it (requires_grad_), "
                "merge it before the bio adapter is put over it, or pass ref_model to the trainer"
            )


@torch.no_grad()
def complete_copy(layers: Iterable[BioLayer], name: str) -> None:
    """If an adapter has the settings and, to the last bit, the parameters of another one, give it the buffers too."""
    sites = [layer.circuits for layer in layers if name in layer.circuits]
    for other in sites[0] if sites else ():
        pairs = [(site[name], site[other]) for site in sites if other in site]
        if other == name or len(pairs) < len(sites) or not all(_same_parameters(*pair) for pair in pairs):
            continue
        for copy, source in pairs:
            for buffer, learned in zip(copy.buffers(), source.buffers(), strict=True):
                buffer.copy_(learned)
        return


def _same_parameters(copy: AdapterCircuit, source: AdapterCircuit) -> bool:
    settings = [{key: primitive.settings() for key, primitive in circuit.items()} for circuit in (copy, source)]
    if settings[0] != settings[1]:
        return False
    own, others = dict(copy.named_parameters()), dict(source.named_parameters())
    return own.keys() == others.keys() and all(torch.equal(own[key], others[key]) for key in own)
