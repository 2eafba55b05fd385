"""Every spelling of what is to be adapted, and what cannot be."""

from __future__ import annotations

import pytest
import torch
from helpers.models import Chain, D, awake, base_and_inputs, bert, bio_layers, gpt2, output, tokens, unchanged
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


def paths(model: nn.Module) -> list[str]:
    return [layer.path for layer in bio_layers(model)]


def _block() -> Chain:
    return Chain(attention=nn.Linear(D, D), dense=nn.Linear(D, D))


def _deep() -> nn.Module:
    torch.manual_seed(0)
    body = Chain(layers=nn.Sequential(*(_block() for _ in range(3))))
    return Chain(stem=nn.Linear(D, D), body=body, head=nn.Linear(D, 2)).eval()


SPELLINGS = [
    ({"target_modules": ["dense"]}, ["body.layers.0.dense", "body.layers.1.dense", "body.layers.2.dense"]),
    ({"target_modules": ["0.dense", "head"]}, ["body.layers.0.dense", "head"]),
    ({"target_modules": ("dense",)}, ["body.layers.0.dense", "body.layers.1.dense", "body.layers.2.dense"]),
    ({"target_modules": {"stem"}}, ["stem"]),
    (
        {"target_modules": r".*\.[02]\.(dense|attention)"},
        [f"body.layers.{i}.{m}" for i in (0, 2) for m in _block().order],
    ),
    ({"target_modules": "head"}, ["head"]),
    (
        {"target_modules": "all-linear"},
        ["stem", *(f"body.layers.{i}.{m}" for i in range(3) for m in _block().order), "head"],
    ),
    ({"target_modules": ["dense"], "layers_to_transform": 1}, ["body.layers.1.dense"]),
    ({"target_modules": ["dense"], "layers_to_transform": [0, 2]}, ["body.layers.0.dense", "body.layers.2.dense"]),
    (
        {"target_modules": ["dense"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        ["body.layers.0.dense", "body.layers.2.dense"],
    ),
    ({"target_modules": ["dense"], "exclude_modules": ["1.dense"]}, ["body.layers.0.dense", "body.layers.2.dense"]),
    ({"target_modules": ["dense"], "exclude_modules": r"body\.layers\.[01].*"}, ["body.layers.2.dense"]),
    ({"target_modules": "all-linear", "modules_to_save": ["head"], "exclude_modules": r"body.layers.*"}, ["stem"]),
]


@pytest.mark.parametrize(("fields", "expected"), SPELLINGS, ids=lambda value: str(value)[:60])
def test_every_spelling_finds_its_modules(fields, expected, tmp_path):
    model = get_peft_model(_deep(), awake("pointwise", **fields))
    assert paths(model) == expected
    model.save_pretrained(tmp_path)
    inputs = torch.randn(2, D)
    loaded = PeftModel.from_pretrained(_deep(), tmp_path, is_trainable=True)
    assert paths(loaded) == expected and torch.equal(output(loaded, inputs), output(model, inputs))


def test_layers_are_chosen_among_the_defaults():
    model = get_peft_model(bert(), awake("pointwise", layers_to_transform=[1]))
    assert sorted(paths(model)) == [
        f"encoder.layer.1.{name}"
        for name in ("attention.output.dense", "attention.self.key", "attention.self.value", "output.dense")
    ]


def test_defaults_do_not_stick_to_the_users_configuration():
    config = awake("pointwise")
    first = get_peft_model(bert(), config)
    second = get_peft_model(gpt2(), config)
    assert config.target_modules is None
    assert paths(first)[0].startswith("encoder.layer.0.") and paths(second)[0].startswith("transformer.h.0.")
    assert second.peft_config["default"].target_modules == {"c_attn", "mlp.c_proj"}


def test_all_linear_over_another_adapter_means_the_same_layers():
    model = get_peft_model(_deep(), awake("pointwise", ["dense"]))
    model.add_adapter("other", awake("pointwise", "all-linear"))
    assert set(paths(model)) == set(SPELLINGS[6][1])
    assert [list(layer.circuits) for layer in bio_layers(model)].count(["default", "other"]) == 3


def test_a_model_without_default_targets_is_told_so():
    base = _deep()
    with unchanged(base), pytest.raises(ValueError, match="target_modules=None.*model type"):
        get_peft_model(base, awake("pointwise"))


def test_multihead_attention_is_refused_by_name():
    base = Chain(attention=nn.MultiheadAttention(D, 2), out=nn.Linear(D, D))
    for target in ("attention", "out_proj"):
        with unchanged(base), pytest.raises(TypeError, match=r"attention.*cannot be adapted.*MultiheadAttention"):
            get_peft_model(base, awake("pointwise", [target]))


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.LSTM(D, D), "LSTM"),
        (nn.Bilinear(D, D, D), "Bilinear"),
        (nn.LayerNorm((T := 5, D)), "LayerNorm"),
        (nn.LayerNorm(D, elementwise_affine=False), "LayerNorm"),
        (nn.Dropout(), "Dropout"),
        (nn.Sequential(nn.Linear(D, D)), "Sequential"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_without_a_known_feature_axis_are_refused_by_name(layer, says):
    base = Chain(first=nn.Linear(D, D), odd=layer)
    with unchanged(base), pytest.raises(TypeError, match=f"odd cannot be adapted: {says}"):
        get_peft_model(base, awake("pointwise", ["first", "odd"]))  # the first is adapted already when it comes to odd


@pytest.mark.parametrize(
    ("kind", "primitive", "says"),
    [
        ("embedding", "nmda_branches", "emb.*layer's input"),
        ("embedding", "neuro_ada", "emb"),
        ("layer norm", "neuro_ada", "norm.*weight matrix"),
        ("conv2d", "heterosynaptic_scaling", "conv.*weight matrix"),
    ],
)
def test_targets_that_a_primitive_cannot_serve_are_refused_by_name(kind, primitive, says):
    base, _ = base_and_inputs(kind)
    target = says.partition(".")[0]
    with unchanged(base), pytest.raises(ValueError, match=f"{primitive} cannot act on {says}"):
        get_peft_model(base, awake([primitive], [target]))


def test_any_module_that_states_its_features_can_be_adapted():
    class Mixer(nn.Module):
        in_features, out_features = D, D

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(D, D)

        def forward(self, x, *, scale=2.0):
            return scale * self.inner(x), "something else"

    torch.manual_seed(0)
    base = nn.ModuleDict({"mixer": Mixer()})
    x = torch.randn(2, 3, D)
    plain = base["mixer"](x)[0]
    model = get_peft_model(base, awake("pointwise", ["mixer"]))
    changed, rest = model.base_model.model["mixer"](x, scale=2.0)
    assert rest == "something else" and not torch.equal(changed, plain)
    with unchanged(model), pytest.raises(ValueError, match="mixer.*no matrix"):
        get_peft_model(nn.ModuleDict({"mixer": Mixer()}), awake("mergeable", ["mixer"])).merge_adapter()


def test_an_output_head_is_left_alone_by_all_linear():
    model = get_peft_model(gpt2(), awake("pointwise", "all-linear"))
    assert "lm_head" not in paths(model) and len(paths(model)) == 8
    assert output(model, tokens()).shape[-1] == 30


@pytest.mark.parametrize("under", [False, True], ids=["alone", "over a LoRA"])
def test_the_work_of_adapting_and_loading_grows_with_the_model_and_not_with_its_square(under, monkeypatch, tmp_path):
    """Counted in modules that are come by; a walk through the whole model for every layer would be seen in it."""
    passed = 0
    walk = nn.Module.named_modules

    def counted(module, *args, **kwargs):
        nonlocal passed
        for found in walk(module, *args, **kwargs):
            passed += 1
            yield found

    def model(layers):
        host = gpt2(n_layer=layers)
        return get_peft_model(host, LoraConfig(r=2, target_modules=["c_attn"])) if under else host

    def work(layers):
        nonlocal passed
        host, again, folder = model(layers), model(layers), str(tmp_path / str(layers))
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "named_modules", counted)
            passed = 0
            get_peft_model(host, awake(["neuro_ada"], target_modules="all-linear")).save_pretrained(folder)
            PeftModel.from_pretrained(again, folder)
            return passed

    few, more, most = (work(layers) for layers in (4, 8, 16))
    assert most - more == pytest.approx(2 * (more - few), rel=0.05)
