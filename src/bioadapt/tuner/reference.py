"""Reference adapters: copies that others make by the parameters alone.

TRL adds an adapter of the policy's configuration and copies the policy's parameters into it. What a local rule has
learned stands in buffers, which must follow, or the reference would start elsewhere than the policy.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .circuit import AdapterCircuit
from .layer import BioLayer


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
