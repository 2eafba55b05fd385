"""Identity at birth, and alive: contract, point 1."""

from __future__ import annotations

import pytest
import torch

from ...primitives.base import Context, Primitive
from ...registry import build_primitive
from ..compare import assert_identical, assert_same, gradients, random, seeded
from .subject import BOTH_WIDTHS, Bare, Subject, commit


class Birth(Bare):
    """A fresh primitive changes nothing; training reaches every part of it; a trained one changes something."""

    @BOTH_WIDTHS
    def test_fresh_is_the_identity_bit_for_bit(self, subject: Subject) -> None:
        x, x_in = subject.features(), subject.inputs()
        x[0, 3] = 0.0
        x[1, 5, 2] = 400.0
        for training in (False, True):
            with seeded():
                fresh = subject.fresh().train(training)
                delta = fresh(x, Context(x_in=x_in))
            with seeded():
                whole = fresh(x, Context(x_in=x_in), with_x=True)
            for found in (x + delta, whole):
                assert_identical(found, x, f"{subject.name} at birth, training={training}")

    @BOTH_WIDTHS
    def test_every_trainable_tensor_has_had_gradient_by_the_fourth_step(self, subject: Subject) -> None:
        primitive, context = subject.fresh().train(), Context(x_in=subject.inputs())
        optimizer = torch.optim.AdamW(primitive.parameters(), lr=1e-2)
        silent = dict(primitive.named_parameters())
        with seeded(5):
            for step in range(4):
                commit(primitive)  # as the tuner does before every training forward
                delta = primitive(subject.features(seed=50 + step), context)
                (delta * random(*delta.shape, seed=60 + step)).mean().backward()
                reached = [name for name, p in silent.items() if p.grad is not None and p.grad.count_nonzero()]
                for name in reached:
                    del silent[name]
                optimizer.step()
                optimizer.zero_grad()
        assert not silent, f"{subject.name}: never a gradient at {', '.join(silent)}"

    @BOTH_WIDTHS
    def test_woken_changes_every_sample(self, subject: Subject) -> None:
        x = subject.features()
        delta = subject.woken()(x, Context(x_in=subject.inputs()))
        strength = delta.square().mean((1, 2)).sqrt()
        assert (strength > 1e-3).all(), f"{subject.name}: woken, but a change of {strength.tolist()} of unit features"

    @BOTH_WIDTHS
    @pytest.mark.parametrize("with_x", [False, True], ids=["change", "sum"])
    @pytest.mark.parametrize("bidirectional", [False, True], ids=["forwards", "both ways"])
    def test_scaled_is_what_the_formula_says(self, subject: Subject, with_x: bool, bidirectional: bool) -> None:
        """What a fused form saves must show neither in its value nor in any gradient."""
        if type(subject.fresh()).scaled is Primitive.scaled or subject.info.zero_at == "update":
            pytest.skip(f"{subject.name} has no fused form")
        weights, found = random(2, 6, subject.d_out, seed=7), []
        for fused in (False, True):
            primitive = subject.woken().train()
            scale = (0.5 + 0.1 * random(primitive.gate.numel(), seed=8)).requires_grad_()
            x, x_in = subject.features(2, 6).requires_grad_(), subject.inputs(2, 6).requires_grad_()
            context = Context(x_in=x_in, bidirectional=bidirectional)
            with seeded():
                if fused:
                    y = primitive.scaled(x, context, scale, with_x)
                else:
                    y = scale * primitive.transform(x, context) + (x if with_x else 0.0)
            (y * weights).sum().backward()
            given = {"x": x.grad, "x_in": x_in.grad, "scale": scale.grad}
            found.append({"the value": y.detach(), **given, **gradients(primitive)})
        for name, expected in found[0].items():
            fused_gradient = found[1][name]
            if expected is not None:
                assert fused_gradient is not None, f"{subject.name}, scaled: {name} gets no gradient"
                assert_same(fused_gradient, expected, f"{subject.name}, scaled: {name}")

    @BOTH_WIDTHS
    def test_with_x_is_the_sum(self, subject: Subject) -> None:
        x, context = subject.features(2, 6), Context(x_in=subject.inputs(2, 6))
        with seeded():
            change = subject.woken()(x, context)
        with seeded():
            assert_same(subject.woken()(x, context, with_x=True), x + change, f"{subject.name} with x")

    @BOTH_WIDTHS
    def test_any_number_of_leading_axes(self, subject: Subject) -> None:
        primitive, x, x_in = subject.woken(), subject.features(4, 6), subject.inputs(4, 6)
        expected = primitive(x, Context(x_in=x_in))
        assert expected.shape == x.shape
        grid = primitive(x.unflatten(0, (2, 2)), Context(x_in=x_in.unflatten(0, (2, 2))))
        assert_same(grid.flatten(0, 1), expected, "a batch of two axes")
        assert_same(primitive(x[0], Context(x_in=x_in[0])), expected[0], "no batch axis")
        single = primitive(x[0, 0], Context(x_in=x_in[0, 0]))
        assert_same(single, primitive(x[:1, :1], Context(x_in=x_in[:1, :1]))[0, 0], "a single vector")

    def test_needs_nothing_but_features_where_both_sizes_agree(self, subject: Subject) -> None:
        with seeded(1):
            primitive = build_primitive(subject.name, subject.d_out, subject.d_out, **subject.settings)
            primitive.wake()
        x = subject.features()
        assert_same(primitive.eval()(x), primitive(x, Context(x_in=x)), "x as the layer's input")
