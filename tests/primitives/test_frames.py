"""The small numeric helpers that the equations share."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.functional import softplus

from bioadapt.primitives.base import Context, Host
from bioadapt.primitives.frames import (
    base_weight,
    group_index,
    group_matrix,
    masked_mean,
    mean_square,
    positive,
    report_loss,
    token_scale,
    unit,
)
from bioadapt.primitives.modulation import modulated


def test_scales_and_their_gradients():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(mean_square(x), x.square().mean(-1, keepdim=True))
    torch.testing.assert_close(token_scale(x), (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    for function in (mean_square, token_scale, unit):
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))


def test_a_scale_is_found_wherever_tensors_are_not_what_they_seem():
    """Fake ones, those that torch.func has batched, and other dtypes than those whose floor is kept."""
    x = torch.randn(3, 2, 8)
    expected = token_scale(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(token_scale)(x), expected)
    with FakeTensorMode() as fake:
        assert token_scale(fake.from_tensor(x)).shape == expected.shape
    assert token_scale(x.to("meta")).is_meta
    torch.testing.assert_close(token_scale(x.bfloat16()).float(), expected, rtol=2e-2, atol=0)


def test_unit_survives_silence_and_outliers():
    x = torch.zeros(1, 2, 6, requires_grad=True)
    unit(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    loud = torch.zeros(1, 1, 400)
    loud[..., 0] = 400.0
    torch.testing.assert_close(unit(loud)[0, 0, 0], torch.tensor(20.0))


@pytest.mark.parametrize("value", [1e-3, 0.1, 1.0, 4.0, 50.0])
def test_positive_quantities_are_what_softplus_gives_back(value):
    torch.testing.assert_close(softplus(positive(value, 3)), torch.full((3,), value))


@pytest.mark.parametrize(("features", "groups"), [(12, 4), (37, 16), (5, 5), (7, 1)])
def test_groups_are_contiguous_and_nearly_equal(features, groups):
    index, members = group_index(features, groups), group_matrix(features, groups)
    assert (index.diff() >= 0).all() and set(index.tolist()) == set(range(groups))
    assert torch.equal(members.argmax(1), index) and (members.sum(1) == 1).all()
    assert members.sum(0).max() - members.sum(0).min() <= 1


def test_masked_mean_hears_real_tokens_alone():
    values = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    junk = torch.where(mask[..., None], values, torch.nan)
    torch.testing.assert_close(masked_mean(junk, mask), values[mask].mean(0))
    torch.testing.assert_close(masked_mean(values, None), values.mean((0, 1)))
    assert torch.equal(masked_mean(values, torch.zeros_like(mask)), torch.zeros(2))


def test_losses_are_reported_where_asked_for():
    penalty, mask, losses = torch.arange(6.0).reshape(1, 3, 2), torch.tensor([[True, True, False]]), []
    report_loss(Context(losses=losses, mask=mask), 2.0, penalty)
    assert [loss.item() for loss in losses] == [2.0 * 1.5]
    report_loss(Context(losses=losses), 0.0, penalty)
    report_loss(Context(), 2.0, penalty)
    assert len(losses) == 1


def test_a_layer_without_weight_has_a_stand_in():
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    read = base_weight(Host(weight), 5, 7)
    assert torch.equal(read, weight) and read.dtype == torch.float64 and not read.requires_grad
    assert base_weight(Host(weight.half()), 5, 7).dtype == torch.float32
    stand_in = base_weight(Host(seed=3), 400, 300)
    assert torch.equal(stand_in, base_weight(Host(seed=3), 400, 300))
    assert not torch.equal(stand_in, base_weight(Host(seed=4), 400, 300))
    assert stand_in.shape == (400, 300) and stand_in.std().item() == pytest.approx(300**-0.5, rel=0.02)


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_modulation_and_its_gradient(shape):
    torch.manual_seed(0)
    x, gain, channels = (torch.randn(*size, dtype=torch.float64) for size in ((2, 3, 5), (*shape, 4), (5, 4)))
    inputs = [tensor.requires_grad_() for tensor in (x, gain, channels)]
    torch.testing.assert_close(modulated(*inputs), x * (gain @ channels.T))
    assert torch.autograd.gradcheck(modulated, inputs)
