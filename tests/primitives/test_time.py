"""Recurrences without token loops, against the loop they replace."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bioadapt.primitives import time
from bioadapt.primitives._state import Memory
from bioadapt.primitives.alignment import front_aligned
from bioadapt.primitives.base import Context
from bioadapt.primitives.deviations import deviations
from bioadapt.primitives.time import (
    CHUNK,
    decay_of,
    held,
    linear_scan,
    past_trace,
    previous,
    readings,
    recurrence,
    token_positions,
    trace,
)

LENGTHS = (1, 2, 7, 64, 65)
JUNK = 1e6


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def looped(
    decay: Tensor,
    drive: Tensor,
    initial: Tensor | float = 0.0,
    mask: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t and h_{t-1} of the recurrence, one sequence and one token at a time."""
    shape = torch.broadcast_shapes(decay.shape, drive.shape)
    decay, drive = decay.expand(shape), drive.expand(shape)
    start = torch.as_tensor(initial).expand(shape[0], *shape[2:])
    after, before = [], []
    for b in range(shape[0]):
        h = start[b]
        for t in range(shape[1]):
            if resets is not None and resets[b, t]:
                h = start[b]
            before.append(h)
            if mask is None or mask[b, t]:
                h = decay[b, t] * h + drive[b, t]
            after.append(h)
    return torch.stack(after).reshape(shape), torch.stack(before).reshape(shape)


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def masks(steps: int) -> dict[str, Tensor]:
    """Four sequences each: padded on the left, on the right, and with gaps."""
    place, count = torch.arange(steps), torch.tensor([[0], [1], [steps // 3], [steps - 1]])
    return {"left": place >= count, "right": place < steps - count, "gaps": torch.rand(4, steps) > 0.5}


def resets(steps: int) -> Tensor:
    starts = torch.rand(4, steps) > 0.7
    starts[:, 0] = True
    return starts


class TestLinearScan:
    @pytest.mark.parametrize("steps", LENGTHS)
    @pytest.mark.parametrize("shape", [(4, None, 3), (1, None, 1), (4, 1, 3), (1, 1, 3), (3,), ()])
    def test_is_the_loop(self, steps, shape):
        decay = torch.rand([steps if size is None else size for size in shape])
        drive, initial = torch.randn(4, steps, 3), torch.randn(4, 3)
        same(linear_scan(decay, drive), looped(decay, drive)[0])
        same(linear_scan(decay, drive, initial), looped(decay, drive, initial)[0])

    @pytest.mark.parametrize("steps", [1, 2, 5, 9])
    @pytest.mark.parametrize("shape", [(2, None, 3), (1, None, 1), (2, 1, 3), (3,)])
    def test_gradient(self, steps, shape):
        decay = torch.rand([steps if size is None else size for size in shape], requires_grad=True)
        drive = torch.randn(2, steps, 3, requires_grad=True)
        initial = torch.randn(2, 3, requires_grad=True)
        assert torch.autograd.gradcheck(linear_scan, (decay, drive))
        assert torch.autograd.gradcheck(linear_scan, (decay, drive, initial))

    def test_gradient_is_that_of_the_loop(self):
        found, expected = [], []
        for solve, results in ((linear_scan, found), (lambda *args: looped(*args)[0], expected)):
            torch.manual_seed(1)
            inputs = [torch.rand(2, 65, 3), torch.randn(2, 65, 3), torch.randn(2, 3)]
            inputs = [tensor.requires_grad_() for tensor in inputs]
            (solve(*inputs) * torch.randn(2, 65, 3)).sum().backward()
            results.extend(tensor.grad for tensor in inputs)
        for one, other in zip(found, expected, strict=True):
            same(one, other)

    def test_survives_a_decay_that_products_of_decays_do_not(self):
        decay, drive = torch.tensor(0.5, dtype=torch.float32), torch.ones(1, 1000, 1, dtype=torch.float32)
        same(linear_scan(decay, drive)[0, -1], torch.full((1,), 2.0, dtype=torch.float32), 1e-6)


class TestRecurrence:
    @pytest.mark.parametrize("steps", LENGTHS)
    @pytest.mark.parametrize("padding", ["left", "right", "gaps"])
    def test_padding_is_invisible(self, steps, padding):
        mask = masks(steps)[padding]
        decay, drive = torch.rand(4, steps, 3), torch.randn(4, steps, 3)
        junk = torch.where(mask[..., None], drive, JUNK).requires_grad_()
        h = recurrence("h", decay, junk, Context(mask=mask), initial=0.7)
        before = previous("before", h, Context(mask=mask), initial=0.7)
        expected = looped(decay, drive, 0.7, mask)
        same(h, expected[0])
        same(before, expected[1])
        for b in range(4):  # and equal to the sequence without its padding
            real = mask[b]
            if real.any():
                alone = linear_scan(decay[b, real][None], drive[b, real][None], torch.full((1, 3), 0.7))
                same(h[b, real], alone[0])
        h.sum().backward()
        assert torch.count_nonzero(junk.grad[~mask]) == 0

    @pytest.mark.parametrize("steps", LENGTHS)
    def test_packed_documents_are_separate_documents(self, steps):
        starts, start = resets(steps), torch.randn(4, 3)
        decay, drive = torch.rand(4, steps, 3), torch.randn(4, steps, 3)
        h = recurrence("h", decay, drive, Context(resets=starts), initial=start)
        before = previous("before", h, Context(resets=starts), initial=start)
        for b in range(4):
            borders = [*starts[b].nonzero()[:, 0].tolist(), steps]
            for first, last in pairwise(borders):
                piece = slice(first, last)
                alone = recurrence("h", decay[b : b + 1, piece], drive[b : b + 1, piece], Context(), start[b : b + 1])
                same(h[b : b + 1, piece], alone)
                same(before[b : b + 1, piece], previous("before", alone, Context(), start[b : b + 1]))

    def test_padding_and_documents_together(self):
        mask, starts = masks(30)["gaps"], resets(30)
        decay, drive = torch.rand(3), torch.randn(4, 30, 3)
        context = Context(mask=mask, resets=starts)
        h = recurrence("h", decay, drive, context, initial=-0.4)
        expected = looped(decay, drive, -0.4, mask, starts)
        same(h, expected[0])
        same(previous("before", h, context, initial=-0.4), expected[1])

    @pytest.mark.parametrize("pieces", [(1, 1, 1, 1), (5, 1, 1), (4, 3, 2)])
    def test_prefill_and_steps_are_the_full_forward(self, pieces):
        steps = sum(pieces)
        decay, drive = torch.rand(4, steps, 3), torch.randn(4, steps, 3)
        mask = torch.arange(steps) >= torch.tensor([[0], [1], [0], [pieces[0] - 1]])
        full = recurrence("h", decay, drive, Context(mask=mask), initial=0.3)
        full_before = previous("before", full, Context(mask=mask), initial=0.3)
        state, found, found_before, first = Memory().part("p"), [], [], 0
        for count in pieces:
            piece = slice(first, first + count)
            context = Context(mask=mask[:, piece], state=state)
            found.append(recurrence("h", decay[:, piece], drive[:, piece], context, initial=0.3))
            found_before.append(previous("before", found[-1], context, initial=0.3))
            first += count
        same(torch.cat(found, 1), full)
        same(torch.cat(found_before, 1), full_before)

    def test_goes_on_after_a_crop(self):
        decay, drive = torch.rand(3), torch.randn(4, 12, 3)
        full = recurrence("h", decay, drive, Context())
        memory = Memory()
        context = Context(state=memory.part("p"))
        rejected = torch.cat([drive[:, :7], torch.full((4, 3, 3), JUNK)], 1)
        previous("before", recurrence("h", decay, rejected, context), context)
        memory.crop(3)
        h = recurrence("h", decay, drive[:, 7:], context)
        same(h, full[:, 7:])
        same(previous("before", h, context), full[:, 6:-1])


class TestHeld:
    series = torch.arange(12.0).reshape(2, 6, 1)

    def test_is_the_series_without_padding(self):
        assert held("s", self.series, Context()) is self.series

    def test_keeps_the_last_real_value_over_padding_and_into_decoding(self):
        mask = torch.tensor([[False, True, False, False, True, True], [True, True, False, True, False, False]])
        expected = torch.tensor([[0.0, 1, 1, 1, 4, 5], [6, 7, 7, 9, 9, 9]])[..., None]
        series = torch.where(mask[..., None], self.series.double(), JUNK)
        same(held("s", series, Context(mask=mask)), expected)
        state = Memory().part("p")
        steps = [
            held("s", series[:, piece], Context(mask=mask[:, piece], state=state))
            for piece in (slice(0, 3), slice(3, 4), slice(4, 6))
        ]
        same(torch.cat(steps, 1), expected)


class TestTraces:
    @pytest.mark.parametrize("steps", LENGTHS)
    def test_are_the_loop(self, steps):
        z, decay, context = (
            torch.randn(4, steps, 3),
            torch.tensor([0.3, 0.9, 0.999]),
            Context(mask=masks(steps)["gaps"]),
        )
        after, before = looped(decay, (1 - decay) * z, 1.0, context.mask)
        same(trace("z", z, decay, context, initial=1.0), after)
        same(past_trace("z", z, decay, context, initial=1.0), before)

    def test_decay_stays_between_one_and_the_slowest_token_count(self):
        tau = torch.tensor([1.0, 1.0, torch.e**2, 4096.0])
        same(decay_of(torch.tensor([-30.0, 0.0, 2.0, 30.0])), torch.exp(-1 / tau))


class TestDeviations:
    @pytest.mark.parametrize("steps", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 150])
    def test_are_the_loop_in_both_readings(self, steps):
        z, decay = torch.randn(2, steps, 3, 4), torch.tensor([0.4, 0.9, 0.999])
        wide = decay[:, None]
        onwards = z - looped(wide, (1 - wide) * z)[1]
        backwards = z - looped(wide, (1 - wide) * z.flip(1))[1].flip(1)
        same(deviations(z, decay)[0], onwards)
        for found, expected in zip(deviations(z, decay, bidirectional=True), (onwards, backwards), strict=True):
            same(found, expected)

    @pytest.mark.parametrize("steps", [3, CHUNK + 2])
    def test_gradient_is_that_of_the_scan(self, steps):
        z = torch.randn(2, steps, 3, 2, requires_grad=True)
        log_tau = torch.tensor([0.1, 1.0, 3.0], requires_grad=True)
        weight = torch.randn(2, 2, steps, 3, 2)

        def by_scan(series: Tensor) -> Tensor:
            return series - past_trace("z", series, decay_of(log_tau)[:, None], Context())

        found = torch.autograd.grad((torch.stack(deviations(z, decay_of(log_tau), True)) * weight).sum(), (z, log_tau))
        both = torch.stack([by_scan(z), by_scan(z.flip(1)).flip(1)])
        for one, other in zip(found, torch.autograd.grad((both * weight).sum(), (z, log_tau)), strict=True):
            same(one, other)


class TestReadings:
    @staticmethod
    def read(series: Tensor, context: Context) -> Tensor:
        return past_trace("z", series, torch.tensor([0.5, 0.9]), context, initial=1.0)

    def test_one_where_time_has_a_direction(self):
        series = torch.randn(4, 9, 2)
        same(readings(self.read, series, Context()), self.read(series, Context())[None])

    @pytest.mark.parametrize("other", [False, True])
    def test_two_where_it_has_none(self, other):
        series, context = torch.randn(4, 9, 2), Context(mask=masks(9)["gaps"], resets=resets(9), bidirectional=True)
        second = torch.randn(4, 9, 2) if other else series
        found = readings(self.read, series, context, backwards=second if other else None)
        same(found[0], self.read(series, context))
        same(found[1], self.read(second.flip(1), context.reversed()).flip(1))


class TestFrontAligned:
    @pytest.mark.parametrize("padding", ["left", "right", "gaps"])
    def test_computes_on_real_tokens_in_order(self, padding):
        mask, x, seen = masks(9)[padding], torch.randn(4, 9, 3), []

        def compute(moved: Tensor, context: Context) -> Tensor:
            seen.append((moved, context))
            return 2 * moved

        y = front_aligned(compute, x, Context(mask=mask, bidirectional=True))
        same(y[mask], 2 * x[mask])
        moved, context = seen[0]
        assert context.bidirectional
        for b in range(4):
            count = int(mask[b].sum())
            same(moved[b, :count], x[b, mask[b]])
            assert torch.count_nonzero(moved[b, count:]) == 0
            assert context.mask[b].tolist() == [True] * count + [False] * (9 - count)

    def test_changes_nothing_without_padding(self):
        x = torch.randn(2, 5, 3)
        assert front_aligned(lambda moved, context: moved, x, Context()) is x


class TestTokenPositions:
    x = torch.zeros(2, 5, 3)

    def test_the_context_has_the_first_word(self):
        given = torch.tensor([[7, 8, 9, 0, 1], [3, 3, 3, 3, 3]], dtype=torch.int32)
        assert torch.equal(token_positions("n", self.x, Context(positions=given)), given.long())

    def test_otherwise_real_tokens_of_a_document_are_counted(self):
        assert token_positions("n", self.x, Context()).tolist() == [[0, 1, 2, 3, 4]]
        mask = torch.tensor([[False, True, True, False, True], [True, True, True, True, True]])
        starts = torch.tensor([[False, False, False, False, False], [True, False, True, False, False]])
        found = token_positions("n", self.x, Context(mask=mask, resets=starts))
        assert found[0, mask[0]].tolist() == [0, 1, 2]
        assert found[1].tolist() == [0, 1, 0, 1, 2]

    def test_decoding_counts_on(self):
        state = Memory().part("p")
        counts = [token_positions("n", self.x[:, :n], Context(state=state)) for n in (3, 1, 1)]
        assert torch.cat(counts, 1).tolist() == [[0, 1, 2, 3, 4]] * 2


# -- lengths that are left open --


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 9, 70])
@pytest.mark.parametrize("constant", [True, False])
def test_doubling_solves_what_the_scan_solves(constant, steps, backwards):
    decay = torch.rand(1, 1 if constant else steps, 4)
    if not constant and steps > 2:
        decay[:, 1] = 0.0  # a reset
    drive = torch.randn(3, steps, 4)
    for initial in (None,) if backwards else (None, torch.randn(3, 4)):
        found = time._doubled(decay, drive, initial, backwards)
        torch.testing.assert_close(found, time._scan(decay, drive, initial, backwards), atol=1e-5, rtol=1e-5)
