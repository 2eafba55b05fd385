"""Cached decoding equals the full forward, and eval leaves no trace: contract, point 3."""

from __future__ import annotations

import torch
from torch import Tensor

from ...primitives._state import Memory
from ...primitives.base import Context, Primitive
from ..compare import assert_equal_tensors, assert_identical, assert_same, random
from .subject import BOTH_WIDTHS, TOKENS, Bare, Subject, buffers

PROMPT = 60


class Decoding(Bare):
    """Whatever is carried from token to token lives in the `Memory` of the cache, and nowhere else."""

    @BOTH_WIDTHS
    def test_prefill_and_steps_equal_the_full_forward(self, subject: Subject) -> None:
        primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
        memory, expected = Memory(), primitive(x, Context(x_in=x_in))
        found = [
            continued(primitive, memory, x[:, :PROMPT], x_in[:, :PROMPT]),
            *steps(primitive, memory, x, x_in, PROMPT),
        ]
        assert_same(torch.cat(found, 1), expected, f"{subject.name}: prefill and steps")

    def test_left_padded_prompts_decode_as_alone(self, subject: Subject) -> None:
        primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
        mask = torch.arange(TOKENS) >= torch.tensor([0, PROMPT - 1, 17])[:, None]
        expected = primitive(x, Context(x_in=x_in, mask=mask))
        memory = Memory()
        found = [continued(primitive, memory, x[:, :PROMPT], x_in[:, :PROMPT], mask=mask[:, :PROMPT])]
        found += steps(primitive, memory, x, x_in, PROMPT)
        assert_same(torch.cat(found, 1)[mask], expected[mask], f"{subject.name}: left-padded prompts")

    def test_cropping_back_and_going_on_equals_going_straight(self, subject: Subject) -> None:
        primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
        straight = primitive(x, Context(x_in=x_in))[:, PROMPT:]
        memory, rejected = Memory(), 5
        continued(primitive, memory, x[:, :PROMPT], x_in[:, :PROMPT])
        draft = random(x.shape[0], rejected, x.shape[-1], seed=44)
        continued(primitive, memory, draft, random(x.shape[0], rejected, x_in.shape[-1], seed=45))
        memory.crop(rejected)
        found = torch.cat(steps(primitive, memory, x, x_in, PROMPT), 1)
        assert_same(found, straight, f"{subject.name}: after {rejected} rejected tokens")

    def test_carried_state_follows_reordered_samples(self, subject: Subject) -> None:
        primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
        beams = torch.tensor([2, 0, 0])
        x[:, PROMPT:], x_in[:, PROMPT:] = x[:1, PROMPT:], x_in[:1, PROMPT:]
        expected = primitive(x[beams], Context(x_in=x_in[beams]))[:, PROMPT:]
        memory = Memory()
        continued(primitive, memory, x[:, :PROMPT], x_in[:, :PROMPT])
        memory.map(lambda series: series.index_select(0, beams))
        found = torch.cat(steps(primitive, memory, x, x_in, PROMPT), 1)
        assert_same(found, expected, f"{subject.name}: reordered")

    def test_eval_is_deterministic_and_leaves_no_trace(self, subject: Subject) -> None:
        primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
        before, attributes = buffers(primitive), set(vars(primitive))
        first = primitive(x, Context(x_in=x_in))
        primitive(-2 * x, Context(x_in=x_in, bidirectional=True))
        continued(primitive, Memory(), x, x_in)
        assert_identical(primitive(x, Context(x_in=x_in)), first, f"{subject.name}: the same input again")
        assert_equal_tensors(buffers(primitive), before, f"{subject.name}: buffers after eval")
        assert set(vars(primitive)) == attributes, f"{subject.name}: a forward left something on the module"


def continued(primitive: Primitive, memory: Memory, x: Tensor, x_in: Tensor, mask: Tensor | None = None) -> Tensor:
    """One forward that goes on where ``memory`` stopped."""
    return primitive(x, Context(x_in=x_in, mask=mask, state=memory.part("layer")))


def steps(primitive: Primitive, memory: Memory, x: Tensor, x_in: Tensor, start: int) -> list[Tensor]:
    """Token by token from ``start`` to the end."""
    return [continued(primitive, memory, x[:, t : t + 1], x_in[:, t : t + 1]) for t in range(start, x.shape[1])]
