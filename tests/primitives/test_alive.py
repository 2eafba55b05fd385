"""What a primitive says of itself holds: its tensors learn, its gates rest shut, and old files keep their function."""

from __future__ import annotations

import pytest
import torch
from helpers.models import bert, tokens
from peft import get_peft_model

from bioadapt import BioConfig, build_primitive
from bioadapt.primitives.base import Context, Host
from bioadapt.primitives.dynamics import cortical_column
from bioadapt.primitives.memory.predictive_coding import PredictiveCoding


@pytest.mark.parametrize("name", ["resonate_and_fire", "vip_disinhibition", "basal_ganglia_gate"])
@pytest.mark.parametrize("targets", [["query", "value"], ["output.dense"], ["intermediate.dense"]], ids=str)
def test_every_tensor_learns_on_a_quiet_layer(name, targets):
    """The projections that write into the residual stream are far below one; short texts hardly drive a resonator."""
    torch.manual_seed(0)
    model = get_peft_model(bert(), BioConfig([name], target_modules=targets)).train()
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    optimiser, inputs = torch.optim.Adam(trained.values(), lr=1e-2), tokens()
    wanted = torch.randn_like(model(**inputs).last_hidden_state)
    silent = set(trained)
    for _ in range(25):
        optimiser.zero_grad()
        (model(**inputs).last_hidden_state - wanted).square().mean().backward()
        silent -= {key for key, parameter in trained.items() if torch.count_nonzero(parameter.grad)}
        optimiser.step()
    assert not silent


class TestGate:
    def test_it_rests_where_it_is_told_to_while_go_and_nogo_are_silent(self):
        silent = torch.full((1, 3, 2), -2.0)
        opened = build_primitive("basal_ganglia_gate", 16, 16).opening(silent, silent)
        torch.testing.assert_close(opened, torch.full_like(opened, 0.2))
        shut = build_primitive("basal_ganglia_gate", 16, 16, resting=0.0).opening(silent, silent)
        assert torch.equal(shut, torch.zeros_like(shut))
        half = build_primitive("basal_ganglia_gate", 16, 16, resting=0.5).opening(silent, silent)
        assert torch.equal(half, torch.full_like(half, 0.5))

    def test_it_opens_as_far_as_go_is_ahead(self):
        go, nogo = torch.tensor([[[0.5, 1.0, 3.0, 1.0]]]), torch.tensor([[[-1.0, 0.25, 0.0, 2.0]]])
        module = build_primitive("basal_ganglia_gate", 16, 16, stripes=4, resting=0.0)
        torch.testing.assert_close(module.opening(go, nogo), torch.tensor([[[0.5, 0.75, 1.0, 0.0]]]))

    def test_a_shut_gate_learns(self):
        silent = torch.full((1, 3, 2), -1.0, requires_grad=True)
        module = build_primitive("basal_ganglia_gate", 16, 16, resting=0.0)
        module.opening(silent, silent).sum().backward()
        assert (module.go_bias.grad > 0).all() and (module.nogo_bias.grad < 0).all()


@pytest.mark.parametrize(
    ("name", "setting", "before", "now"),
    [("basal_ganglia_gate", "resting", 0.5, 0.2), ("san_scaling", "patch_gain", False, True)],
)
def test_a_file_without_a_setting_keeps_the_function_of_its_time(name, setting, before, now):
    fresh = BioConfig([name])
    assert fresh.primitives[0][setting] == now
    content = {key: value for key, value in fresh.primitives[0].items() if key != setting}
    old = BioConfig([content], bioadapt_version="0.1.0")
    assert old.primitives[0][setting] == before
    assert BioConfig(old.primitives, bioadapt_version="0.1.0").primitives == old.primitives


def test_the_second_sweep_of_a_column_is_the_first_one_divided():
    torch.manual_seed(0)
    module = build_primitive("cortical_column", 64, 64)
    found = cortical_column.sweeps(torch.randn(50, 8), module.wiring())
    assert found.first5.any()
    torch.testing.assert_close(found.second5, found.first5, rtol=1e-3, atol=1e-3)


def test_pruning_goes_by_the_weight_that_it_was_put_on():
    torch.manual_seed(0)
    weight, change = torch.randn(12, 10), 0.5 * torch.randn(12, 10)
    v = torch.randn(1, 4, 10)
    apart, merged = (
        build_primitive("synaptic_pruning", 10, 12, host=Host(given)) for given in (weight, weight + change)
    )
    x = torch.zeros(1, 4, 12)
    for module in (apart, merged):
        module.gate.data.fill_(1.0)
    torch.testing.assert_close(apart.thresholds(), 0.2 * weight.abs().mean(1))
    assert not torch.allclose(apart(x, Context(x_in=v)), merged(x, Context(x_in=v)), atol=0.1)


class TestPrediction:
    """A trace that foretells the next token: each is the one before, turned a little, and some noise."""

    @staticmethod
    def error_after(auxiliary: float, steps: int = 150) -> float:
        torch.manual_seed(0)
        turn = torch.linalg.qr(torch.randn(8, 8)).Q
        module = build_primitive("predictive_coding", 16, 16, auxiliary=auxiliary)
        assert isinstance(module, PredictiveCoding)
        module.gate.data.fill_(0.1)
        optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
        shown = torch.randn(8, 16)

        def series() -> torch.Tensor:
            state, tokens = torch.randn(16, 8), []
            for _ in range(24):
                state = 0.9 * state + 0.1 * state @ turn + 0.1 * torch.randn(16, 8)
                tokens.append(state @ shown)
            return torch.stack(tokens, 1)

        module.train()
        for _ in range(steps):
            x, losses = series(), []
            optimiser.zero_grad()
            task = (x + module(x, Context(losses=losses)) - 2 * x).square().mean()
            (task + sum(losses)).backward()
            optimiser.step()
        with torch.no_grad():
            x = series()
            error = module.transform(x, Context())
        return (error.square().mean() / x.square().mean()).item()

    def test_with_the_term_it_predicts_and_without_it_does_what_the_task_asks(self):
        assert self.error_after(1.0) < 0.6 < 1.0 < self.error_after(0.0)
