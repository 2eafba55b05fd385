"""The arms: how large they are, where they sit, and that what has not learned yet changes nothing."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

pytest.importorskip("sentence_transformers")

from bioadapt import BioConfig, list_primitives
from bioadapt.evaluation.arms import (
    ARMS,
    ASKED,
    Placebo,
    Recipe,
    add_placebo,
    arms_named,
    lora_of_size,
    lora_paths,
    rank_of_size,
    rivals_of_equal_size,
)
from bioadapt.evaluation.training import trainable_parameters, transformer_of


class Held:
    """A bare transformer in the place of a sentence encoder."""

    def __init__(self, model):
        self.model, self.tokens = model, None

    @property
    def device(self):
        return next(self.model.parameters()).device


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Held(BertModel(config).eval())


def recipe(*primitives, **settings):
    bio = BioConfig(primitives=list(primitives or ["lateral_inhibition", "predictive_coding"]), **settings)
    return Recipe(bert, bio)


def output(encoder):
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        return transformer_of(encoder)(input_ids=tokens).last_hidden_state


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_is_born_as_the_identity_and_all_its_parts_learn_together(name):
    encoder, count = recipe().build(name, seed=3)
    model = transformer_of(encoder)
    assert torch.equal(output(encoder), output(bert()))
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == count
    assert bool(count) == (name != "zero-shot")
    before = {path: p.detach().clone() for path, p in trained.items()}
    optimiser = torch.optim.SGD(trained.values(), lr=0.5) if trained else None
    for _ in range(3 if trained else 0):
        optimiser.zero_grad()
        model(input_ids=torch.arange(6)[None]).last_hidden_state.square()[..., :5].sum().backward()
        optimiser.step()
    moved = {path for path, p in trained.items() if not torch.equal(before[path], p)}
    # That every tensor of a primitive learns is a matter of the conformance suite.
    assert moved >= {path for path in trained if "lora_" in path or "placebo" in path}
    assert bool({path for path in moved if "lora_" not in path and "placebo" not in path}) == (ARMS[name].over == "bio")


@pytest.mark.parametrize("primitives", [("lateral_inhibition", "predictive_coding"), ("divisive_normalization",)])
@pytest.mark.parametrize("rank", [None, 6])
def test_rivals_of_equal_size_are_within_two_percent_or_the_finest_step(primitives, rank):
    plan = recipe(*primitives, rank=rank)
    for stack, names in {
        "lora+bio": ("lora-equal@lora-sites", "lora-equal@bio-sites", "lora+placebo", "lora+linear"),
        "bio": ("lora-bio-size@lora-sites", "lora-bio-size@bio-sites", "placebo", "linear"),
    }.items():
        _, wanted = plan.build(stack, 0)
        assert wanted == plan.size_of(stack)
        for name in names:
            # One rank of a module of this tiny model is 64 or 96 numbers, half of which is the finest step.
            assert plan.build(name, 0)[1] == pytest.approx(wanted, rel=0.02, abs=48), name


def test_a_placebo_sits_where_the_bio_adapter_does():
    plan = recipe("divisive_normalization")  # a gain: keys, values, and the hidden units before the last projection
    assert any(site.at_input for site in plan.sites) and not all(site.at_input for site in plan.sites)
    encoder, _ = plan.build("placebo", 0)
    model = transformer_of(encoder)
    for site in plan.sites:
        module = model.get_submodule(site.path)
        assert isinstance(module.placebo, Placebo)
        width = module.in_features if site.at_input else module.out_features
        assert site.width == width
        assert len(module._forward_pre_hooks) == site.at_input and len(module._forward_hooks) == (not site.at_input)


def test_a_placebo_over_a_lora_reads_what_the_lora_wrote():
    encoder, _ = recipe(target_modules=["query"]).build("lora+placebo", 0)
    layer = transformer_of(encoder).get_base_model().get_submodule("encoder.layer.0.attention.self.query")
    with torch.no_grad():
        layer.placebo.up.fill_(0.1)
        layer.lora_B["default"].weight.fill_(0.5)
    x = torch.randn(1, 3, 32)
    lora = layer.base_layer(x) + 2 * layer.lora_B["default"](layer.lora_A["default"](x))
    assert torch.allclose(layer(x), layer.placebo(lora), atol=1e-5)
    assert not torch.allclose(layer(x), lora, atol=1e-3)


@pytest.mark.parametrize("vectors", [1, 2, 5])
@pytest.mark.parametrize("linear", [False, True])
def test_a_placebo_s_formula(vectors, linear):
    torch.manual_seed(0)
    placebo = Placebo(8, vectors, linear=linear)
    assert trainable_parameters(placebo) == 8 * vectors
    x = torch.randn(2, 3, 8)
    assert torch.equal(placebo(x), x)
    nn.init.normal_(placebo.up)
    down = torch.cat([placebo.down, placebo.frozen])
    inner = torch.einsum("btd,ud->btu", x, down)
    inner = inner if linear else nn.functional.gelu(inner)
    assert torch.allclose(placebo(x), x + torch.einsum("btu,du->btd", inner, placebo.up), atol=1e-6)
    channels_first = Placebo(8, vectors, linear=linear, axis=1)
    channels_first.load_state_dict(placebo.state_dict())
    assert torch.allclose(channels_first(x.movedim(-1, 1)).movedim(1, -1), placebo(x), atol=1e-6)


def test_placebos_on_convolutions_act_on_channels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    from bioadapt.evaluation.arms import AdaptedModule

    (placebo,) = add_placebo(model, [AdaptedModule("0", 4, False, 8)])
    images = torch.randn(2, 3, 5, 5)
    before = model(images)
    nn.init.ones_(placebo.up)
    assert placebo.axis == 1 and model(images).shape == before.shape and not torch.allclose(model(images), before)


@pytest.mark.parametrize("wanted", [40, 200, 777, 5_000, 12_345])
def test_a_lora_of_any_size(wanted):
    model = bert().model
    paths = lora_paths(model)
    config = lora_of_size(model, paths, wanted)
    from peft import get_peft_model

    adapted = get_peft_model(model, config)
    assert trainable_parameters(adapted) == pytest.approx(wanted, abs=33)  # half a rank of a module of 32 + 32
    scales = {scale for module in adapted.modules() if hasattr(module, "lora_A") for scale in module.scaling.values()}
    assert scales == {2.0}


def test_ranks_are_raised_all_over_the_model():
    rank, raised = rank_of_size({str(n): 10 for n in range(12)}, 3 * 120 + 40)
    places = sorted(map(int, raised))
    assert rank == 3 and len(places) == 4
    assert max(b - a for a, b in zip([-1, *places], [*places, 12], strict=True)) <= 5


def test_modules_of_a_lora_are_peft_s_own_or_all_in_blocks():
    assert {path.rpartition(".")[2] for path in lora_paths(bert().model)} == {"query", "value"}
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=16, patch_size=2)
    paths = lora_paths(ConvNextForImageClassification(config))
    assert paths and all("pwconv" in path or "downsampling" in path for path in paths)


def test_a_lora_sits_where_it_is_told_to():
    paths = lora_paths(bert().model, ("key", "attention.output.dense"))
    assert len(paths) == 6 and all(path.endswith(("key", "attention.output.dense")) for path in paths)
    plan = Recipe(bert, BioConfig(primitives=["predictive_coding"]), lora_targets=("key",))
    encoder, _ = plan.build("lora", 1)
    adapted = {name.split(".lora_")[0] for name, _ in transformer_of(encoder).named_parameters() if ".lora_" in name}
    assert adapted and all(name.endswith(".key") for name in adapted)
    with pytest.raises(ValueError, match=r"lora_targets: no layer of a BertModel is called 'kye'; .*key"):
        lora_paths(bert().model, ("key", "kye"))


def test_at_an_embedding_rivals_have_the_size_of_few_numbers():
    """A LoRA there has a row per token. Where the bio adapter has too few numbers for a unit, a placebo gets one."""
    plan = Recipe(bert, BioConfig(primitives=["sequence_memory"], target_modules=["word_embeddings"]))
    sizes = {name: plan.build(name, 1)[1] for name in ("lora", "lora+bio", "lora+placebo", "lora-equal@bio-sites")}
    assert sizes["lora+bio"] == sizes["lora"] + 4 and sizes["lora+placebo"] == sizes["lora"] + 32
    assert sizes["lora-equal@bio-sites"] == pytest.approx(sizes["lora+bio"], abs=(50 + 32) / 2)


def test_upper_blocks_alone():
    plan = Recipe(bert, BioConfig(primitives=["predictive_coding"]), layers=(2,))
    assert {site.path.split(".")[2] for site in plan.sites} == {"2"}
    assert {path.split(".")[2] for path in plan.lora_paths} == {"2"}


def test_names_of_arms():
    assert arms_named(["lora-equal", "lora"]) == ("lora-equal@lora-sites", "lora-equal@bio-sites", "lora")
    assert rivals_of_equal_size(arms_named(["lora-equal", "lora"])) == {
        "lora-equal": ("lora-equal@lora-sites", "lora-equal@bio-sites"),
        "lora": ("lora",),
    }
    with pytest.raises(ValueError, match=r"unknown arm 'lora\+bo'; did you mean 'lora\+bio'"):
        arms_named(["lora+bo"])
    assert set(ASKED) >= {"zero-shot", "lora", "lora-equal", "lora+bio", "lora+placebo", "bio"}
    assert not set(ASKED) & set(list_primitives())


def test_seeds_change_what_is_drawn_and_nothing_else():
    build = partial(recipe().build, "lora+placebo")
    first, again, other = (
        {name: p.detach() for name, p in transformer_of(build(seed)[0]).named_parameters() if p.requires_grad}
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
