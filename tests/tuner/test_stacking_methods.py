"""Over the other methods of PEFT: in the layers they can be stacked over, elsewhere they are refused by name."""

from __future__ import annotations

import pytest
import torch
from helpers.models import awake, bert, bio_layers, close, digest, gpt2, output, record, step, tokens, unchanged
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

INPUTS = tokens()
TARGETS = {"target_modules": ["query", "attention.output.dense"]}
METHODS = {
    "IA3": IA3Config(**TARGETS, feedforward_modules=[], init_ia3_weights=False),
    "LOHA": LoHaConfig(**TARGETS, r=2, init_weights=False),
    "LOKR": LoKrConfig(**TARGETS, r=2, init_weights=False),
    "OFT": OFTConfig(**TARGETS, r=4, oft_block_size=0, init_weights=False),
    "HRA": HRAConfig(**TARGETS, r=2, init_weights=False),
    "MISS": MissConfig(**TARGETS, r=2, init_weights=False),
    "FOURIERFT": FourierFTConfig(**TARGETS, n_frequency=8, init_weights=False),
    "VERA": VeraConfig(**TARGETS, r=2, init_weights=False),
    "LN_TUNING": LNTuningConfig(target_modules=["LayerNorm"]),
    "LORA": LoraConfig(target_modules=["word_embeddings", "query"], r=2, init_lora_weights=False, lora_bias=False),
    "LORA with biases": LoraConfig(**TARGETS, r=2, init_lora_weights=False, lora_bias=True),
}
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")


def below(name: str) -> PeftModel:
    base = bert()
    torch.manual_seed(2)
    model = get_peft_model(base, METHODS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def stack(under: nn.Module, named="mergeable", **fields) -> PeftModel:
    torch.manual_seed(1)
    primitives = ["homeostatic_scaling", "neuro_ada", "heterosynaptic_scaling"] if named == "mergeable" else named
    return get_peft_model(under, awake(primitives, **fields)).eval()


@pytest.mark.parametrize("name", METHODS)
def test_the_method_below_is_left_as_it_is(name, tmp_path):
    under = below(name)
    plain, before = output(under, INPUTS), record(under)
    assert not close(plain, output(bert(), INPUTS), 1e-3)
    under.save_pretrained(tmp_path / "before")
    model = stack(under, "pointwise", target_modules=["output.dense", "LayerNorm", "query"])
    wanted = output(model, INPUTS)
    assert not close(wanted, plain, 1e-3)
    with model.disable_adapter():
        assert torch.equal(output(model, INPUTS), plain)
    assert torch.equal(output(model, INPUTS), wanted)
    under.save_pretrained(tmp_path / "within")
    found = {folder: digest(load_file(tmp_path / folder / SAFETENSORS_WEIGHTS_NAME)) for folder in ("before", "within")}
    assert found["before"] == found["within"] and found["before"]
    model.save_pretrained(tmp_path / "bio")
    keys = load_file(tmp_path / "bio" / SAFETENSORS_WEIGHTS_NAME).keys()
    assert {key.partition(".nrn_circuit.")[0].removeprefix("base_model.model.") for key in keys} == {
        layer.path for layer in bio_layers(model)
    }
    assert not any(".base_layer." in key for key in keys)
    loaded = PeftModel.from_pretrained(PeftModel.from_pretrained(bert(), tmp_path / "within"), tmp_path / "bio")
    assert close(output(loaded, INPUTS), wanted)
    assert model.unload() is under
    after = record(under)
    assert {aspect: after[aspect] for aspect in before} == before
    assert torch.equal(output(under, INPUTS), plain)


@pytest.mark.parametrize("name", METHODS)
def test_merging_keeps_both(name):
    model = stack(below(name))
    wanted, before = output(model, INPUTS), digest(model.state_dict())
    model.merge_adapter()
    assert close(output(model, INPUTS), wanted, 2e-4)
    model.unmerge_adapter()
    assert digest(model.state_dict()) == before
    assert torch.equal(output(model, INPUTS), wanted)
    merged = model.merge_and_unload()
    assert {type(module) for module in merged.modules()} == {type(module) for module in bert().modules()}
    assert close(output(merged, INPUTS), wanted, 2e-4)


@pytest.mark.parametrize("name", METHODS)
def test_both_are_trained_along(name):
    model = stack(below(name))
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    step(model, INPUTS)
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert any(".nrn_circuit." in key for key in trainable) and not all(".nrn_circuit." in key for key in trainable)
    assert moved == trainable


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("PROMPT_TUNING", PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)),
        ("PREFIX_TUNING", PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)),
        ("ADALORA", AdaLoraConfig(target_modules=["c_attn"], task_type=TaskType.CAUSAL_LM, total_step=10)),
    ],
)
def test_methods_that_work_in_the_models_forward_are_refused_by_name(name, config):
    under = get_peft_model(gpt2(), config)
    with unchanged(under), pytest.raises(ValueError, match=f"cannot be stacked over {name}"):
        stack(under)


def test_a_bio_adapter_is_refused_by_name():
    under = stack(bert())
    with unchanged(under), pytest.raises(ValueError, match="already carries a bio adapter.*add_adapter"):
        stack(under)
    twice = stack(below("IA3"))
    with unchanged(twice), pytest.raises(ValueError, match="already carries a bio adapter"):
        stack(twice)


def test_mixed_models_are_refused_by_name():
    under = get_peft_model(bert(), METHODS["LOHA"], mixed=True)
    with unchanged(under), pytest.raises(ValueError, match="cannot be stacked over .*mixed"):
        stack(under)
