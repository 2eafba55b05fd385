"""Where an adapter does nothing, or less than was asked for, it says so."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from helpers.models import Chain, D, awake, bert, bio_layers, classifier, tokens
from peft import PeftModel, get_peft_model
from torch import nn

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


def said(run) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in found if warning.category is UserWarning]


def siglip():
    torch.manual_seed(0)
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, image_size=16, patch_size=8))


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, vocab_size=50, num_key_value_heads=1, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


def mamba():
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50, state_size=4)
    return transformers.MambaForCausalLM(config)


def test_all_linear_passes_over_what_is_never_called(tmp_path):
    messages = said(lambda: get_peft_model(siglip(), awake("pointwise", "all-linear")))
    assert ["head.attention.out_proj is not adapted" in message for message in messages] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(siglip(), awake("pointwise", "all-linear")).eval()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(siglip(), tmp_path).eval()
    image = torch.randn(1, 3, 16, 16)
    assert any(layer.path.endswith("head.mlp.fc1") for layer in bio_layers(model))
    assert torch.equal(model(image).pooler_output, loaded(image).pooler_output)


@pytest.mark.parametrize("target", ["out_proj", "x_proj", "dt_proj", "conv1d"])
def test_what_the_kernels_of_mamba_read_cannot_be_adapted(target):
    with pytest.raises(
        TypeError, match=rf"mixer.{target} cannot be adapted: the kernels of MambaMixer read its weight"
    ):
        get_peft_model(mamba(), awake("pointwise", [target]))
    messages = said(lambda: get_peft_model(mamba(), awake("pointwise", ["in_proj", target])))
    assert sum(f"{target} is not adapted" in message for message in messages) == 2


def test_a_name_that_no_module_has_is_told_with_the_nearest():
    messages = said(lambda: get_peft_model(bert(), awake("pointwise", ["query", "vlaue"])))
    assert len(messages) == 1 and "'vlaue'" in messages[0] and "'value'" in messages[0]


def test_an_expert_that_is_no_module_is_told_without_a_number_as_the_nearest():
    messages = said(lambda: get_peft_model(mixtral(), awake("pointwise", ["q_proj", "w1"])))
    assert len(messages) == 1 and "'w1'" in messages[0] and "'1'" not in messages[0]


def test_default_targets_and_those_of_a_file_are_not_complained_of(tmp_path):
    def make_and_load():
        get_peft_model(bert(), awake("pointwise")).save_pretrained(tmp_path)
        PeftModel.from_pretrained(bert(), tmp_path)

    assert said(make_and_load) == []


def test_all_linear_tells_of_experts_that_are_no_layers():
    messages = said(lambda: get_peft_model(mixtral(), awake("pointwise", "all-linear")))
    assert any("does not reach the experts at model.layers.0.mlp.experts and 1 more" in message for message in messages)


def test_single_vectors_have_no_past_and_that_is_told_once():
    model = get_peft_model(bert(), awake(["short_term_depression"], ["pooler.dense", "output.dense"])).eval()
    messages = said(lambda: [model(**tokens()) for _ in range(3)])
    assert ["pooler.dense is called on single vectors" in message for message in messages] == [True]


def packed_tower():
    config = transformers.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(
        depth=1, embed_dim=16, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=4
    )
    return transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config)


@pytest.mark.parametrize(
    ("make", "target", "given"),
    [
        (classifier, "classifier", tokens()),
        (lambda: nn.Sequential(nn.Linear(D, D)), "0", {"input": torch.randn(5, D)}),
        (packed_tower, "fc2", {"hidden_states": torch.randn(16, 96), "grid_thw": torch.tensor([[1, 4, 4]])}),
    ],
    ids=["classifier", "rows", "packed patches"],
)
def test_layers_that_see_rows_of_features_are_told_of_by_name(make, target, given):
    model = get_peft_model(make(), awake(["short_term_depression"], [target], causal=True)).eval()
    messages = said(lambda: [model(**given) for _ in range(2)])
    assert len(messages) == 1 and f"{target} is called on single vectors" in messages[0]


class Routed(nn.Module):
    """A mixture of two experts, one of which no token is sent to."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])

    def forward(self, x):
        rows = x.flatten(0, 1)
        sent = torch.zeros(len(rows), dtype=torch.bool)
        out = torch.zeros_like(rows)
        for expert, chosen in zip(self.experts, (~sent, sent), strict=True):
            out[chosen] = expert(rows[chosen])
        return out.view_as(x)


@pytest.mark.parametrize("named", ["pointwise", "causal", "weight", "ranked"])
def test_an_expert_that_no_token_is_sent_to_learns_nothing(named):
    model = get_peft_model(Routed(), awake(named, ["experts.0", "experts.1"], causal=True)).train()
    model(torch.randn(2, 5, D)).square().sum().backward()
    idle = [p.grad for name, p in model.named_parameters() if "experts.1" in name and p.requires_grad]
    assert idle and all(grad is not None and not grad.any() for grad in idle)


def test_the_direction_of_time_that_nothing_tells_is_asked_for():
    base = Chain(lin=nn.Linear(D, D), out=nn.Linear(D, D))
    messages = said(lambda: get_peft_model(base, awake("causal", ["lin"])))
    assert len(messages) == 1 and "causal=True or causal=False" in messages[0]
    assert said(lambda: get_peft_model(Chain(lin=nn.Linear(D, D)), awake("causal", ["lin"], causal=False))) == []
    assert said(lambda: get_peft_model(Chain(lin=nn.Linear(D, D)), awake("pointwise", ["lin"]))) == []


@pytest.mark.parametrize("library", ["timm.models.vision_transformer", "diffusers.models.unets", "torchvision.models"])
def test_models_of_images_see_all_places(library):
    class Model(Chain):
        pass

    Model.__module__ = library
    inside = Chain(backbone=Model(lin=nn.Linear(D, D)))
    for base, path in ((Model(lin=nn.Linear(D, D)), "lin"), (inside, "backbone.lin")):
        model = get_peft_model(base, awake("causal", [path]))
        assert not any(layer.causal for layer in bio_layers(model))


def test_a_module_that_is_held_twice_is_told_of():
    base = Chain(first=nn.Linear(D, D), second=nn.Linear(D, D))
    base.second = base.first
    messages = said(lambda: get_peft_model(base, awake("pointwise", ["first"])))
    assert messages == ["first is the same module as second, from where it is called without the adapter"]
