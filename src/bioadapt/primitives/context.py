"""What a primitive knows of the world: the layer it is born on, and what surrounds a forward call."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._state import Recollection
from .local_rule import Observation

Found = TypeVar("Found")


def in_full(tensor: Tensor) -> Tensor:
    """A tensor in fp32, or in fp64 if it is."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


class Host:
    """What a primitive may read of the layer it is born on.

    Args:
        weight: the frozen base weight as (d_out, d_in) in fp32 at least, or a function that returns it (quantised
            weights are expanded only if somebody asks); None where there is none.
        seed: fixes every frozen random matrix.
    """

    def __init__(self, weight: Tensor | Callable[[], Tensor | None] | None = None, seed: int = 0) -> None:
        self._weight, self.seed = weight, seed

    @cached_property
    def weight(self) -> Tensor | None:
        """(d_out, d_in) in fp32 at least, or None."""
        weight = self._weight() if callable(self._weight) else self._weight
        return None if weight is None else in_full(weight.detach())

    @cached_property
    def level(self) -> float:
        """Root mean square of the layer's output for inputs of unit variance, estimated without data."""
        if self.weight is None or self.weight.is_meta:
            return 1.0
        return max(self.weight.square().sum(1).mean().sqrt().item(), 1e-6)

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator that depends on the host's seed and the purpose alone, not on device or order."""
        return torch.Generator(device="cpu").manual_seed(zlib.crc32(f"{self.seed}/{purpose}".encode()))

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """A frozen standard normal matrix, the same on every device and for every order of construction."""
        return torch.randn(*shape, generator=self.generator(purpose), device="cpu")


class Context(NamedTuple):
    """What surrounds a forward call. Every field has a neutral default, so a bare primitive needs none of them.

    ``x_in`` (B, T, d_in): the layer's input. ``bias`` (d_out,): the layer's bias, told to what acts on its weight.
    ``mask`` (B, T) bool: True at real tokens, None if all are. ``positions`` (B, T) int: place in the document.
    ``resets`` (B, T) bool: True at the first token of each packed document. ``state``: what earlier decoding steps left
    behind, None outside decoding. ``bidirectional``: time may be read both ways. ``observing``: running statistics may
    be taken, and put among the ``observations`` of the forward, or straight into the rule if that is None. ``grid``:
    the spatial shape behind the token axis. ``losses``: where auxiliary terms are put, None if nobody asks for them.
    ``derived``: what `once` has computed in the decoding of this sequence, None outside it. ``targets`` (B, T) int: in
    training, at a model's head, the unit that is to fire at each token, -1 where nobody says; None elsewhere.
    """

    x_in: Tensor = None  # type: ignore[assignment]  # what declares needs_input is never run without it
    bias: Tensor | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None
    resets: Tensor | None = None
    state: Recollection | None = None
    bidirectional: bool = False
    observing: bool = True
    observations: list[Observation] | None = None
    grid: tuple[int, ...] | None = None
    losses: list[Tensor] | None = None
    derived: dict[Hashable, Any] | None = None
    targets: Tensor | None = None

    def replace(self, **changes: Any) -> Context:
        return self._replace(**changes)

    def once(self, compute: Callable[..., Found], *args: Any) -> Found:
        """``compute(*args)`` of parameters and buffers alone, computed once for each sequence that is decoded.

        The cache of a sequence belongs to the parameters that filled it, and so does what is computed here.
        """
        if self.derived is None:
            return compute(*args)
        key = compute, *map(id, args)
        held = self.derived.get(key)
        if held is None:
            held = self.derived[key] = args, compute(*args)  # what is held has its identity to itself
        return held[1]

    def reversed(self) -> Context:
        """The same surroundings with time running backwards; a document's last token becomes its first."""

        def flip(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.flip(1)

        resets = self.resets
        if resets is not None:
            starts = torch.cat([resets[:, 1:], torch.ones_like(resets[:, :1])], dim=1)
            resets = starts.flip(1)
        return self.replace(
            x_in=flip(self.x_in), mask=flip(self.mask), positions=flip(self.positions), resets=resets, observing=False
        )
