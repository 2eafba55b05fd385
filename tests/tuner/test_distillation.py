"""Bio adapters as LoRAs: exact where the change is a matrix of that rank, measured where it is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.models import awake, bert, close, gpt2, mlp, output, tokens, unchanged
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora

from bioadapt import BioConfig, conversion_residuals, distill_to_lora

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
LINEAR = ["query", "value"]


def batches(count: int = 10) -> list[dict]:
    return [tokens(rows=8, seed=seed) for seed in range(count)]


# -- PEFT's own conversion --


@pytest.mark.parametrize("name", ["neuro_ada", "hebbian_trace"])
def test_a_linear_change_converts_exactly_at_full_rank(name, tmp_path):
    model = get_peft_model(bert(), awake([name], LINEAR)).eval()
    inputs = tokens()
    wanted = output(model, inputs)
    config, tensors = convert_to_lora(model, rank=16)
    save_as_lora(tmp_path, model, rank=16)
    assert max(conversion_residuals(model, tensors).values()) < 1e-5
    assert close(output(PeftModel.from_pretrained(bert(), tmp_path), inputs), wanted, 1e-4)
    assert config.r == config.lora_alpha == 16


def test_what_a_lower_rank_loses_is_reported(tmp_path):
    model = get_peft_model(bert(), awake(["neuro_ada"], LINEAR)).eval()
    lost = [max(conversion_residuals(model, convert_to_lora(model, rank=rank)[1]).values()) for rank in (1, 4, 8, 16)]
    assert lost == sorted(lost, reverse=True) and lost[0] > 0.3 and lost[-1] < 1e-5


def test_conv1d_converts_in_its_own_layout(tmp_path):
    model = get_peft_model(gpt2(), awake(["neuro_ada"], ["c_attn", "c_proj"])).eval()
    inputs = tokens()
    wanted = output(model, inputs)
    _, tensors = convert_to_lora(model, rank=16)
    assert max(conversion_residuals(model, tensors).values()) < 1e-5
    save_as_lora(tmp_path, model, rank=16)
    assert close(output(PeftModel.from_pretrained(gpt2(), tmp_path), inputs), wanted, 1e-4)


@pytest.mark.parametrize(
    ("named", "targets", "words"),
    [
        (["lateral_inhibition"], LINEAR, "lateral_inhibition depends on the input"),
        (["homeostatic_scaling"], LINEAR, "changes the bias"),
    ],
)
def test_what_no_lora_can_hold_is_refused_with_the_reason(named, targets, words):
    model = get_peft_model(bert(), awake(named, targets)).eval()
    with pytest.warns(UserWarning, match=words), pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=2)


def test_a_stack_is_not_mixed_up():
    lora = get_peft_model(bert(), LoraConfig(target_modules=LINEAR, init_lora_weights=False))
    model = get_peft_model(lora, awake(["neuro_ada"], LINEAR)).eval()
    with pytest.warns(UserWarning, match="stacked over another adapter"), pytest.raises(TypeError):
        convert_to_lora(model, rank=2)


# -- distillation --


@pytest.mark.parametrize("way", ["peft", "injected"])
def test_distilling_a_matrix_of_the_rank_is_exact(way, tmp_path):
    model = bert()
    if way == "peft":
        model = get_peft_model(model, awake(["hebbian_trace"], LINEAR)).eval()
    else:
        model.add_adapter(awake(["hebbian_trace"], LINEAR))
    inputs = tokens(seed=99)
    wanted = output(model, inputs)
    with unchanged(model):
        distilled = distill_to_lora(model, batches(), rank=8)
    assert len(distilled.residuals) == 4 and max(distilled.residuals.values()) < 1e-2
    distilled.save_pretrained(tmp_path)
    assert close(output(PeftModel.from_pretrained(bert(), tmp_path), inputs), wanted, 1e-2)


def test_distilling_what_depends_on_the_input_reports_what_is_missed():
    model = get_peft_model(bert(), awake(["lateral_inhibition"], LINEAR)).eval()
    few, many = (distill_to_lora(model, batches(), rank=rank) for rank in (2, 16))
    for path, residual in few.residuals.items():
        assert 0.02 < many.residuals[path] <= residual + 1e-3 < 1.1


def test_residuals_are_measured_on_batches_that_were_not_fitted():
    """With fewer tokens than features the fit is perfect on its own batches, and only there."""
    model = get_peft_model(bert(), awake(["lateral_inhibition"], LINEAR)).eval()
    few = [tokens(rows=2, length=3, seed=seed) for seed in range(5)]
    same = distill_to_lora(model, few[:1], rank=16).residuals
    other = distill_to_lora(model, few, rank=16).residuals
    assert all(same[path] < 0.2 < other[path] for path in same)


def test_a_whole_stack_becomes_one_lora(tmp_path):
    lora = get_peft_model(bert(), LoraConfig(target_modules=LINEAR, r=4, init_lora_weights=False))
    model = get_peft_model(lora, awake(["hebbian_trace"], LINEAR)).eval()
    inputs = tokens(seed=99)
    wanted = output(model, inputs)
    own = distill_to_lora(model, batches(), rank=8)
    whole = distill_to_lora(model, batches(), rank=12, whole=True)
    assert max(*own.residuals.values(), *whole.residuals.values()) < 1e-2
    whole.save_pretrained(tmp_path)
    assert close(output(PeftModel.from_pretrained(bert(), tmp_path), inputs), wanted, 2e-2)


def test_conv1d_and_plain_models(tmp_path):
    model = get_peft_model(gpt2(), awake(["hebbian_trace"], ["c_attn"])).eval()
    inputs = tokens(seed=99)
    wanted = output(model, inputs)
    distill_to_lora(model, batches(), rank=8).save_pretrained(tmp_path)
    assert close(output(PeftModel.from_pretrained(gpt2(), tmp_path), inputs), wanted, 1e-2)
    plain = get_peft_model(mlp(), awake(["hebbian_trace"], ["lin0"])).eval()
    x = [torch.randn(64, plain.get_submodule("base_model.model.lin0").in_features) for _ in range(3)]
    distilled = distill_to_lora(plain, x, rank=8, forward=lambda model, batch: model(batch))
    assert max(distilled.residuals.values()) < 1e-2


def test_padding_does_not_count():
    model = get_peft_model(bert(), awake(["lateral_inhibition"], LINEAR)).eval()
    padded = batches()
    junk = [{**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 3)} for batch in padded]
    first, second = (distill_to_lora(model, given, rank=4) for given in (padded, junk))
    for key, tensor in first.tensors.items():
        torch.testing.assert_close(tensor, second.tensors[key], rtol=1e-3, atol=1e-4)


def test_what_cannot_be_distilled_is_refused():
    model = get_peft_model(bert(), awake(["lateral_inhibition"], LINEAR)).eval()
    with pytest.raises(ValueError, match="no active bio adapter"):
        distill_to_lora(bert(), batches(), rank=2)
    with pytest.raises(ValueError, match="batches is empty"):
        distill_to_lora(model, [], rank=2)
    with pytest.raises(ValueError, match="rank=1000"):
        distill_to_lora(model, batches(), rank=1000)
    on_norm = get_peft_model(bert(), awake(["lateral_inhibition"], ["LayerNorm"]))
    with pytest.raises(ValueError, match="not a linear layer"):
        distill_to_lora(on_norm, batches(), rank=2)
    with model.disable_adapter(), pytest.raises(ValueError, match="no active bio adapter"):
        distill_to_lora(model, batches(), rank=2)


def test_a_failing_batch_leaves_the_model_as_it_was():
    model = get_peft_model(bert(), BioConfig(primitives=["lateral_inhibition"], target_modules=LINEAR)).train()
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="input_ids"):
            distill_to_lora(model, [*batches(2), {"no_such_argument": 1}], rank=2)
    assert model.training
