"""Who may influence whom: contract, point 2."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ...primitives.base import Context
from ..compare import assert_identical, assert_same, random
from .subject import BATCH, TOKENS, Bare, Subject, mixes_tokens, replaced

JUNK = 1e3
PLACES = (1, 31, 64, TOKENS - 1)
LENGTHS = (TOKENS, 41, 1)  # real tokens of each sample
DOCUMENTS = (23, 1, 46)


class Time(Bare):
    """No sample reaches another, no token an earlier one, padding nobody."""

    def test_no_sample_reaches_another(self, subject: Subject) -> None:
        primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
        expected = primitive(x, Context(x_in=x_in))
        x[1], x_in[1] = 30 * random(*x[1].shape, seed=41), 30 * random(*x_in[1].shape, seed=42)
        found = primitive(x, Context(x_in=x_in))
        assert_identical(found[[0, 2]], expected[[0, 2]], f"{subject.name}: another sample changed")

    def test_no_token_reaches_an_earlier_one(self, subject: Subject) -> None:
        if subject.info.kind == "global":
            pytest.skip("a global primitive reads later tokens, and is refused on causal models")
        for place, before, after in around_changes(subject):
            assert_identical(after[:, :place], before[:, :place], f"{subject.name}: token {place} changed")

    def test_only_temporal_kinds_reach_later_tokens(self, subject: Subject) -> None:
        for place, before, after in around_changes(subject):
            later, earlier = after[:, place + 1 :], before[:, place + 1 :]
            if not mixes_tokens(subject):
                assert_identical(later, earlier, f"{subject.name}: token {place} changed")
            elif place + 1 < TOKENS:
                mixed = (later - earlier).abs().max()
                assert mixed > 1e-6, f"{subject.name} mixes nothing along time: its kind is 'pointwise'"

    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_is_invisible(self, subject: Subject, side: str, bidirectional: bool) -> None:
        primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
        mask = padded(side)
        x[~mask], x_in[~mask] = JUNK, -JUNK
        found = primitive(x, Context(x_in=x_in, mask=mask, bidirectional=bidirectional))
        for sample in range(BATCH):
            real = mask[sample]
            alone = Context(x_in=x_in[None, sample, real], bidirectional=bidirectional)
            expected = primitive(x[None, sample, real], alone)[0]
            assert_same(found[sample, real], expected, f"{subject.name}: {side} padding of sample {sample}")

    def test_padding_gets_no_gradient_from_real_tokens(self, subject: Subject) -> None:
        primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
        mask = padded("left")
        x[~mask], x_in[~mask] = JUNK, -JUNK
        x.requires_grad_(), x_in.requires_grad_()
        primitive(x, Context(x_in=x_in, mask=mask))[mask].square().mean().backward()
        for grad in (x.grad, x_in.grad):
            if grad is not None:
                assert torch.isfinite(grad).all()
                assert grad[~mask].count_nonzero() == 0, f"{subject.name}: padding has a part in the loss"

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_packed_documents_are_separate(self, subject: Subject, bidirectional: bool) -> None:
        primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
        positions = torch.cat([torch.arange(length) for length in DOCUMENTS]).expand(BATCH, -1)
        packed = Context(x_in=x_in, positions=positions, resets=positions == 0, bidirectional=bidirectional)
        found = primitive(x, packed).split(DOCUMENTS, 1)
        parts = zip(found, x.split(DOCUMENTS, 1), x_in.split(DOCUMENTS, 1), strict=True)
        for index, (document, part, part_in) in enumerate(parts):
            expected = primitive(part, Context(x_in=part_in, bidirectional=bidirectional))
            assert_same(document, expected, f"{subject.name}: packed document {index}")

    def test_both_ways_is_mirror_symmetric(self, subject: Subject) -> None:
        if subject.info.kind != "causal":
            pytest.skip("only causal primitives are read both ways; a pointwise one may tell early from late")
        primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
        mask = padded("right")

        def run(x: Tensor, x_in: Tensor, mask: Tensor) -> Tensor:
            return primitive(x, Context(x_in=x_in, mask=mask, bidirectional=True)) * mask[..., None]

        mirrored = run(x.flip(1), x_in.flip(1), mask.flip(1)).flip(1)
        assert_same(mirrored, run(x, x_in, mask), f"{subject.name}: time mirrored")

    def test_one_token(self, subject: Subject) -> None:
        primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
        alone = primitive(x[:, :1], Context(x_in=x_in[:, :1]))
        assert alone.shape == (BATCH, 1, subject.d_out)
        if subject.info.kind != "global":
            whole = primitive(x, Context(x_in=x_in))[:, :1]
            assert_same(alone, whole, f"{subject.name}: the first token alone")


def around_changes(subject: Subject) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For several tokens: the place, and what the primitive returns before and after another vector stands there."""
    primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
    before = primitive(x, Context(x_in=x_in))
    for place in PLACES:
        yield place, before, primitive(replaced(x, place), Context(x_in=replaced(x_in, place, seed=43)))


def padded(side: str) -> Tensor:
    """A mask (BATCH, TOKENS) with the real tokens of `LENGTHS`, padded on one side."""
    right = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
    return right if side == "right" else right.flip(1)
