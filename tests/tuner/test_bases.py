"""Over layers that torchao, HQQ and quanto have quantised; bitsandbytes has tests of its own."""

from __future__ import annotations

import pytest
import torch
from helpers.models import Chain, awake, bert, bio_layers, close, output, own_parameters, step, tokens
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel

D = 64
ONE_OF_EACH_KIND = ["lateral_inhibition", "short_term_depression", "neuro_ada", "san_scaling"]


def torchao_base() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    host = plain()
    torchao.quantize_(host, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "lin")
    return host


def hqq_base() -> nn.Module:
    hqq, host = pytest.importorskip("hqq.core.quantize"), plain()
    recipe = hqq.BaseQuantizeConfig(nbits=8, group_size=64)
    host.lin = hqq.HQQLinear(host.lin, recipe, compute_dtype=torch.float32, device="cpu")
    return host


def quanto_base() -> nn.Module:
    quanto, host = pytest.importorskip("optimum.quanto"), plain()
    quanto.quantize(host, weights=quanto.qint8, include=["lin"])
    quanto.freeze(host)
    return host


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Chain(lin=nn.Linear(D, D), out=nn.Linear(D, 8)).eval()


def inputs() -> torch.Tensor:
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("primitive", ONE_OF_EACH_KIND)
@pytest.mark.parametrize(
    "base",
    [
        pytest.param(torchao_base, marks=pytest.mark.compatible("Bases", "torchao.quantize_")),
        pytest.param(hqq_base, marks=pytest.mark.compatible("Bases", "HQQ")),
        pytest.param(quanto_base, marks=pytest.mark.compatible("Bases", "quanto")),
    ],
)
def test_adapters_act_train_save_and_load_and_merging_is_refused(base, primitive, tmp_path, record_property):
    unadapted = output(base(), inputs())
    model = get_peft_model(base(), awake([primitive], ["lin"]))
    assert not close(output(model, inputs()), unadapted, 1e-3)
    before = {name: parameter.detach().clone() for name, parameter in own_parameters(model).items()}
    step(model, inputs())
    assert not any(torch.equal(parameter, before[name]) for name, parameter in own_parameters(model).items())
    with model.disable_adapter():
        assert torch.equal(output(model, inputs()), unadapted)
    model.save_pretrained(tmp_path)
    assert close(output(PeftModel.from_pretrained(base(), tmp_path), inputs()), output(model, inputs()), 1e-5)
    reason = "depends on the input|recipe that the model does not keep|made anew|a form of numbers that is not known"
    wanted = output(model, inputs())
    with pytest.raises(ValueError, match=f"cannot be merged: .*({reason})") as refusal:
        model.merge_adapter()
    if "depends on the input" not in str(refusal.value):
        record_property("refused", str(refusal.value))
    assert torch.equal(output(model, inputs()), wanted)


@pytest.fixture(scope="module")
def recipe_of_torchao():
    """As transformers loads it, who keeps the recipe."""
    torchao, transformers = pytest.importorskip("torchao.quantization"), pytest.importorskip("transformers")
    return transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())


@pytest.mark.compatible("Bases", "torchao, loaded by transformers")
def test_a_model_that_keeps_torchaos_recipe_takes_what_is_merged(recipe_of_torchao, tmp_path):
    bert().save_pretrained(tmp_path / "base")

    def loaded() -> nn.Module:
        return AutoModel.from_pretrained(tmp_path / "base", quantization_config=recipe_of_torchao).eval()

    model = get_peft_model(loaded(), awake(["neuro_ada"], ["0.output.dense"]))
    step(model, tokens())
    wanted = output(model, tokens())
    model.save_pretrained(tmp_path / "adapter")
    assert close(output(PeftModel.from_pretrained(loaded(), tmp_path / "adapter"), tokens()), wanted, 1e-5)
    with model.disable_adapter():
        change = (output(model, tokens()) - wanted).abs().mean()
    model.merge_adapter()
    assert 0 < (output(model, tokens()) - wanted).abs().mean() < 0.1 * change  # eight bits round once more
    kind = type(bio_layers(model)[0].get_base_layer().weight)
    model.unmerge_adapter()
    assert close(output(model, tokens()), wanted, 1e-6)
    assert type(bio_layers(model)[0].get_base_layer().weight) is kind


@pytest.mark.compatible("Bases", "torch's dynamic quantisation")
def test_what_is_packed_for_inference_is_refused(record_property):
    quantise = torch.ao.quantization.quantize_dynamic
    with pytest.raises(TypeError, match="lin cannot be adapted: Linear packs its weight") as refusal:
        get_peft_model(quantise(plain(), {nn.Linear}), awake(["lateral_inhibition"], ["lin"]))
    record_property("refused only", str(refusal.value))
