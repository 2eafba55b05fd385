"""The bare primitive under test, and the features it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from ...primitives.base import Context, Host, LocalRule, Primitive
from ...registry import PrimitiveInfo, build_primitive, primitive_info
from ..compare import copied, random, seeded

BATCH = 3
TOKENS = 70  # more than one chunk of a scan that works in chunks of 64
EVEN, ODD = (24, 32), (29, 37)  # features of the layer's input and output; odd ones fit no grouping
AS_WIDTHS = "{0[0]}-{0[1]}".format

# For what depends on shapes. Whom a token reaches, and what is finite, does not: there odd widths alone are tried.
BOTH_WIDTHS = pytest.mark.parametrize("widths", [EVEN, ODD], indirect=True, ids=AS_WIDTHS)


@dataclass(frozen=True)
class Subject:
    """One primitive with its settings, on a layer from ``d_in`` to ``d_out`` features."""

    info: PrimitiveInfo
    settings: Mapping[str, Any]
    d_in: int
    d_out: int

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def weight(self) -> Tensor:
        """The frozen weight of the layer that the primitive is born on, (d_out, d_in)."""
        return random(self.d_out, self.d_in, seed=11) / self.d_in**0.5

    def fresh(self) -> Primitive:
        """As it is born."""
        with seeded(1):
            return build_primitive(self.name, self.d_in, self.d_out, host=Host(self.weight, seed=1), **self.settings)

    def woken(self) -> Primitive:
        """Away from the identity, with some local learning behind it, in eval mode."""
        primitive = self.fresh()
        with seeded(2):
            primitive.wake()
            for step in range(3 if self.info.learns else 0):
                learn(primitive, self.features(seed=20 + step), self.inputs(seed=30 + step))
        return primitive.eval()

    def features(self, batch: int = BATCH, tokens: int = TOKENS, seed: int = 3) -> Tensor:
        """x (batch, tokens, d_out)."""
        return random(batch, tokens, self.d_out, seed=seed)

    def inputs(self, batch: int = BATCH, tokens: int = TOKENS, seed: int = 4) -> Tensor:
        """The layer's input (batch, tokens, d_in)."""
        return random(batch, tokens, self.d_in, seed=seed)


class Bare:
    """Base of every group of tests on the bare module.

    Attributes:
        saved_at_most: bytes that one forward may keep for backward, in multiples of the bytes of x. Parameters,
            buffers, x and the layer's input count nothing.
        saved_more: the same for single primitives that need more, by name.
        parameters_at_most: what one primitive with its defaults may add to a small encoder, as a part of it.
        parameters_more: the same for single primitives that need more, by name.
        compile_backend: what `torch.compile` is tried with. "aot_eager" finds graph breaks in a fraction of the time
            that "inductor" takes.
    """

    saved_at_most: float = 6.0
    saved_more: Mapping[str, float] = {}
    parameters_at_most: float = 0.01
    parameters_more: Mapping[str, float] = {}
    compile_backend: str = "aot_eager"

    @pytest.fixture
    def primitive(self) -> str | dict[str, Any]:
        """Override: the name of a registered primitive, or a dict of its name and settings."""
        raise NotImplementedError("override the fixture 'primitive': return a registered name, or a dict with a 'name'")

    @pytest.fixture(params=[ODD], ids=AS_WIDTHS)
    def widths(self, request: pytest.FixtureRequest) -> tuple[int, int]:
        """Features of the layer's input and output."""
        return request.param

    @pytest.fixture
    def subject(self, primitive: str | dict[str, Any], widths: tuple[int, int]) -> Subject:
        return subject_of(primitive, *widths)


def subject_of(primitive: str | dict[str, Any], d_in: int, d_out: int) -> Subject:
    """A subject from what the fixture ``primitive`` returns."""
    settings = {"name": primitive} if isinstance(primitive, str) else dict(primitive)
    return Subject(primitive_info(settings.pop("name")), settings, d_in, d_out)


def learn(primitive: Primitive, x: Tensor, x_in: Tensor, **context: Any) -> Tensor:
    """One training forward and the commit that follows it."""
    primitive.train()
    delta = primitive(x, Context(x_in=x_in, **context))
    commit(primitive)
    return delta


def commit(primitive: Primitive) -> None:
    """What the tuner does after a step of the optimiser."""
    if isinstance(primitive, LocalRule):
        primitive.commit()


def buffers(primitive: Primitive) -> dict[str, Tensor]:
    """A snapshot of all buffers, saved or not."""
    return copied(primitive.named_buffers())


def learned(primitive: Primitive) -> dict[str, Tensor]:
    """A snapshot of the buffers that are saved."""
    persistent = primitive.state_dict().keys()
    return {name: buffer for name, buffer in buffers(primitive).items() if name in persistent}


def mixes_tokens(subject: Subject) -> bool:
    """Whether a token may change what happens at other tokens."""
    return subject.info.kind in ("causal", "global")


def replaced(x: Tensor, token: int, seed: int = 40) -> Tensor:
    """x with another vector at one token of every sample."""
    changed = x.clone()
    changed[:, token] = 3 * random(x.shape[0], x.shape[-1], seed=seed)
    return changed
