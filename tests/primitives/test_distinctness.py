"""No two primitives are one function under two names."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bioadapt import build_primitive, list_primitives, primitive_info
from bioadapt.primitives.base import Context, Host, OnWeight, Primitive
from bioadapt.testing.primitive.subject import commit

D, BATCH, TOKENS, DRAWS = 24, 6, 24, 3
NAMES = list_primitives()
# A channel's change that is explained to this part by another primitive's is the same change.
SAME = 0.99
# At evaluation these are one map, a gain per channel: what tells them apart is how the gain comes about.
GAINS_PER_CHANNEL = {"homeostatic_scaling", "synaptic_consolidation", "san_scaling"} & set(NAMES)


def woken(name: str, draw: int) -> Primitive:
    torch.manual_seed(1000 * draw + NAMES.index(name))
    host = Host(torch.randn(D, D, generator=torch.Generator().manual_seed(draw)) / D**0.5, seed=draw)
    primitive = build_primitive(name, D, D, host=host)
    primitive.wake()
    with torch.no_grad():
        for parameter in primitive.parameters():
            parameter.mul_(1 + torch.randn_like(parameter))  # far from where it was born
    if primitive_info(name).learns:
        for _ in range(3):
            primitive.train()(torch.randn(BATCH, TOKENS, D), Context(x_in=torch.randn(BATCH, TOKENS, D)))
            commit(primitive)
    return primitive.eval()


@pytest.fixture(scope="module")
def changes() -> dict[str, list[Tensor]]:
    """For every primitive its change of the same inputs, (tokens, channels), one for every draw of parameters."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for draw in range(DRAWS):
        # Tokens of different strength, and some strong channels, as real features have them.
        x = (
            torch.randn(BATCH, TOKENS, D, generator=generator)
            * torch.randn(BATCH, TOKENS, 1, generator=generator).exp()
        )
        x[..., :: D // 4] *= 4
        context = Context(x_in=torch.randn(BATCH, TOKENS, D, generator=generator))
        for name in NAMES:
            with torch.no_grad():
                found[name].append(woken(name, draw)(x, context).flatten(0, 1))
    return found


def explained(target: Tensor, by: Tensor) -> float:
    """Part of each channel's variance that an affine map of the other's same channel explains; the median channel."""
    a, b = target - target.mean(0), by - by.mean(0)
    squared = (a * b).sum(0).square() / (a.square().sum(0) * b.square().sum(0)).clamp(min=1e-20)
    return squared.median().item()


def test_no_change_is_an_affine_image_of_another(changes):
    for one, other in itertools.combinations(NAMES, 2):
        same = min(explained(a, b) for a, b in zip(changes[one], changes[other], strict=True))
        if {one, other} <= GAINS_PER_CHANNEL:
            assert same > SAME
        else:
            assert same < SAME, f"{one} and {other}: {same:.4f} of the variance of one is explained by the other"


def test_the_measure_sees_a_copy_under_another_gain_and_shift(changes):
    change = changes["lateral_inhibition"][0]
    assert explained(change, 3 * change - 1) > 0.999
    assert explained(change, torch.linspace(1, 2, D) * change) > 0.999


@pytest.mark.parametrize("name", sorted(GAINS_PER_CHANNEL))
def test_gains_per_channel_come_about_in_different_ways(name):
    """By the channel's activity, by the history of its own updates, or by the gradient alone and shared downstream."""
    by_activity, by_updates, shared = moved_by_activity(name), moved_by_updates(name), shares_with_sibling(name)
    assert (by_activity, by_updates, shared) == {
        "homeostatic_scaling": (True, False, False),
        "synaptic_consolidation": (False, True, False),
        "san_scaling": (False, False, True),
    }[name]


def moved_by_activity(name: str) -> bool:
    primitive = build_primitive(name, D, D).train()
    before = {key: value.clone() for key, value in primitive.state_dict().items()}
    primitive(torch.randn(2, 5, D) * torch.linspace(0.5, 2, D))
    commit(primitive)
    return any(not torch.equal(value, before[key]) for key, value in primitive.state_dict().items())


def moved_by_updates(name: str) -> bool:
    """Whether what a commit leaves in the buffers depends on what the optimiser did before it."""
    states = []
    for update in (0.0, 0.5):
        torch.manual_seed(0)
        primitive = build_primitive(name, D, D).train()
        primitive(torch.randn(2, 5, D))
        with torch.no_grad():
            for parameter in primitive.parameters():
                parameter.add_(update)
        commit(primitive)
        states.append(dict(primitive.named_buffers()))
    return any(not torch.equal(buffer, states[1][key]) for key, buffer in states[0].items())


def shares_with_sibling(name: str) -> bool:
    first, second = (build_primitive(name, D, D, host=Host(torch.randn(D, D))) for _ in range(2))
    siblings = {"encoder.layer.0.attention.output.dense": first, "encoder.layer.0.intermediate.dense": second}
    for path, primitive in siblings.items():
        if isinstance(primitive, OnWeight):
            primitive.connect(path, siblings, {"model_type": "bert"})
    return isinstance(second, OnWeight) and second.scales_input
