"""Half precision, outliers and zeros: contract, point 4."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from ...primitives.base import Context
from ..compare import assert_equal_tensors, assert_finite, assert_identical, gradients, seeded
from .subject import Bare, Subject, buffers, commit

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


class Numerics(Bare):
    """Everything stays finite, and is computed in fp32 whatever surrounds it."""

    @HALVES
    def test_half_precision_features_stay_finite(self, subject: Subject, dtype: torch.dtype) -> None:
        primitive = subject.woken().train()
        x, x_in = subject.features().to(dtype), subject.inputs().to(dtype)
        x[0, 3], x_in[0, 3] = 0.0, 0.0
        x[1, 5, 2], x_in[1, 5, 2] = 400.0, -400.0  # single channels of real models are that far out
        x.requires_grad_(), x_in.requires_grad_()
        with seeded(6):
            delta = primitive(x, Context(x_in=x_in))
        assert delta.dtype == dtype
        delta.float().square().mean().backward()
        commit(primitive)
        inputs = {"x": x.grad, "x_in": x_in.grad}
        found = {name: grad for name, grad in inputs.items() if grad is not None}
        assert_finite({"delta": delta, **found, **gradients(primitive)}, f"{subject.name} in {dtype}")
        assert_finite(buffers(primitive), f"{subject.name} in {dtype}")

    @HALVES
    def test_half_precision_parameters_are_computed_with_in_fp32(self, subject: Subject, dtype: torch.dtype) -> None:
        exact, x, x_in = subject.woken(), subject.features(), subject.inputs()
        half = copy.deepcopy(exact)
        for parameter, rounded in zip(half.parameters(), exact.parameters(), strict=True):
            parameter.data = parameter.data.to(dtype)
            rounded.data = parameter.data.float()
        found = half(x, Context(x_in=x_in))
        assert_identical(found, exact(x, Context(x_in=x_in)), f"{subject.name}: parameters in {dtype}")
        found.square().mean().backward()
        assert_finite(gradients(half), f"{subject.name}: parameters in {dtype}")

    @HALVES
    def test_casting_the_host_leaves_buffers_alone(self, subject: Subject, dtype: torch.dtype) -> None:
        """Frozen matrices and running statistics keep every bit: half precision would round or overflow them."""
        primitive = subject.woken()
        before = buffers(primitive)
        assert_equal_tensors(buffers(primitive.to(dtype)), before, f"{subject.name}: cast to {dtype}")

    def test_autocast_changes_nothing(self, subject: Subject) -> None:
        primitive, x, context = subject.woken(), subject.features(), Context(x_in=subject.inputs())
        expected = primitive(x, context)
        with torch.autocast("cpu", torch.bfloat16):
            found = primitive(x, context)
            found.square().mean().backward()  # within it too, though that is advised against
        assert_identical(found, expected, f"{subject.name} under autocast")
        assert_finite(gradients(primitive), f"{subject.name} under autocast")

    def test_settings_at_the_ends_of_their_ranges(self, subject: Subject) -> None:
        for name, spec in subject.info.settings.items():
            for value in spec.choices or ([False, True] if spec.type is bool else [spec.low, spec.high]):
                extreme = replace(subject, settings={**subject.settings, name: value})
                if _refused(extreme):  # for what the others are: a size may be bounded by another one
                    continue
                what = f"{subject.name} with {name}={value}"
                x, context = subject.features(), Context(x_in=subject.inputs())
                with seeded(6):
                    assert_identical(x + extreme.fresh().train()(x, context), x, what)
                    primitive = extreme.woken().train()
                    delta = primitive(x, context)
                delta.square().mean().backward()
                assert_finite({"delta": delta, **gradients(primitive)}, what)

    def test_gradient_at_zero_is_finite(self, subject: Subject) -> None:
        primitive = subject.woken().train()
        x, x_in = torch.zeros_like(subject.features()), torch.zeros_like(subject.inputs())
        x.requires_grad_(), x_in.requires_grad_()
        with seeded(6):
            delta = primitive(x, Context(x_in=x_in))
        (delta * subject.features(seed=46)).sum().backward()
        commit(primitive)
        inputs = {"x": x.grad, "x_in": x_in.grad}
        found = {name: grad for name, grad in inputs.items() if grad is not None}
        assert_finite({"delta": delta, **found, **gradients(primitive)}, f"{subject.name} at zero")
        assert_finite(buffers(primitive), f"{subject.name} at zero")


def _refused(subject: Subject) -> bool:
    try:
        subject.info.factory.check_settings(dict(subject.settings))
    except ValueError:
        return True
    return False
