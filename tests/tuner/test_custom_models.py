"""What PEFT expects of a tuner on models of one's own, over kinds of layers and lists of primitives."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import (
    KINDS,
    PRIMITIVES,
    adapted,
    awake,
    base_and_inputs,
    bio_layers,
    close,
    digest,
    output,
    own_parameters,
    pairs,
    step,
)
from peft import PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

PAIRS = pairs()
# Every kind of layer once, and every list of primitives once: for what does not depend on how the two meet.
DIAGONAL = [("mlp over tokens", named) for named in PRIMITIVES] + [
    (kind, named)
    for kind, named in zip(
        list(KINDS)[2:],
        ("causal", "pointwise", "ranked", "mergeable weight", "mergeable", "weight", "ranked", "causal", "pointwise"),
        strict=True,
    )
]


@pytest.mark.parametrize(("kind", "named"), PAIRS)
def test_a_fresh_adapter_is_the_identity_bit_for_bit(kind, named):
    base, inputs = base_and_inputs(kind)
    before = output(base, inputs)
    model = get_peft_model(base, awake(named, KINDS[kind].targets, init_weights=True))
    assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize(("kind", "named"), PAIRS)
def test_what_is_saved_is_what_is_loaded(kind, named, tmp_path):
    model, inputs = adapted(kind, named)
    wanted = output(model, inputs)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(base_and_inputs(kind)[0], tmp_path, is_trainable=True)
    assert torch.equal(output(loaded, inputs), wanted)
    assert digest(loaded.state_dict()) == digest(model.state_dict())


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("named", PRIMITIVES)
def test_both_file_formats_hold_the_same(named, safe, tmp_path):
    kind = "mlp over tokens"
    model, inputs = adapted(kind, named)
    wanted = output(model, inputs)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / SAFETENSORS_WEIGHTS_NAME).exists() == safe
    assert (tmp_path / WEIGHTS_NAME).exists() != safe
    loaded = PeftModel.from_pretrained(base_and_inputs(kind)[0], tmp_path)
    assert close(output(loaded, inputs), wanted, 1e-6)
    assert digest(loaded.state_dict()) == digest(model.state_dict())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(("kind", "named"), DIAGONAL)
def test_loading_by_way_of_the_meta_device_is_the_same(kind, named, tmp_path):
    model, inputs = adapted(kind, named)
    wanted = output(model, inputs)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(base_and_inputs(kind)[0], tmp_path, low_cpu_mem_usage=True)
    assert close(output(loaded, inputs), wanted, 1e-6)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    assert digest(loaded.state_dict()) == digest(model.state_dict())


@pytest.mark.parametrize(("kind", "named"), [pair for pair in PAIRS if pair != ("mlp", "causal")])
def test_only_the_adapter_learns_and_all_of_it_does(kind, named):
    """Vectors without a token axis have no past, from which a causal primitive could learn: they are left out."""
    model, inputs = adapted(kind, named)
    layers = bio_layers(model)
    base = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items() if "nrn_" not in name}
    before = {name: parameter.detach().clone() for name, parameter in own_parameters(model).items()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in own_parameters(model).values()}
    step(model, inputs)
    after = model.get_base_model().state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in base.items())
    moved = {name: not torch.equal(before[name], parameter) for name, parameter in own_parameters(model).items()}
    assert layers and moved and all(moved.values()), moved


@pytest.mark.parametrize(("kind", "named"), DIAGONAL)
def test_disabled_it_is_the_base_and_enabled_it_is_back(kind, named):
    base, inputs = base_and_inputs(kind)
    plain = output(base, inputs)
    model = get_peft_model(base, awake(named, KINDS[kind].targets))
    wanted = output(model, inputs)
    assert not close(wanted, plain, 1e-3)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(output(model, inputs), plain)
        assert torch.equal(output(model, inputs), plain)
    assert torch.equal(output(model, inputs), wanted)
    model.base_model.disable_adapter_layers()
    assert torch.equal(output(model, inputs), plain)
    with model.disable_adapter():
        pass
    assert torch.equal(output(model, inputs), plain)
    model.base_model.enable_adapter_layers()
    assert torch.equal(output(model, inputs), wanted)


@pytest.mark.parametrize(("kind", "named"), DIAGONAL)
def test_unloading_returns_the_base(kind, named):
    base, inputs = base_and_inputs(kind)
    plain = output(base, inputs)
    types = {name: type(module) for name, module in base.named_modules()}
    model = get_peft_model(base, awake(named, KINDS[kind].targets))
    bare = model.unload()
    assert bare is base
    assert {name: type(module) for name, module in bare.named_modules()} == types
    assert torch.equal(output(bare, inputs), plain)
    assert "peft_config" not in vars(bare) and "bio_scope" not in vars(bare)
    assert not bare._forward_hooks and not bare._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_layers_expose_what_the_wrapped_layer_exposes(kind):
    base, _ = base_and_inputs(kind)
    plain = {name: base.get_submodule(name) for name in KINDS[kind].targets}
    model = get_peft_model(base, awake("pointwise", KINDS[kind].targets))
    for name, layer in plain.items():
        wrapped = model.base_model.model.get_submodule(name)
        assert isinstance(wrapped.in_features, int) and isinstance(wrapped.out_features, int)
        for attribute in ("in_features", "out_features", "embedding_dim", "kernel_size", "stride", "nf", "eps"):
            if hasattr(layer, attribute):
                assert getattr(wrapped, attribute) == getattr(layer, attribute)
        assert wrapped.weight is layer.weight
        assert not hasattr(wrapped, "no_such_thing")


@pytest.mark.parametrize("named", PRIMITIVES)
def test_frozen_matrices_depend_on_seed_and_place_alone(named):
    base, _ = base_and_inputs("mlp")
    models = []
    for noise, seed in ((1, 7), (2, 7), (1, 8)):
        torch.manual_seed(noise)
        models.append(get_peft_model(copy.deepcopy(base), awake(named, ("lin0", "lin1"), seed=seed)))
    buffers = [{n: b for n, b in model.named_buffers() if "nrn_" in n and "scale" not in n} for model in models]
    same, other = (
        all(torch.equal(tensor, compared[name]) for name, tensor in buffers[0].items()) for compared in buffers[1:]
    )
    assert same
    if named == "weight":
        assert not other


@pytest.mark.parametrize("named", PRIMITIVES)
def test_checkpoints_hold_the_adapter_alone_under_its_prefix(named, tmp_path):
    model, _ = adapted("mlp over tokens", named)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME).keys()
    assert keys and all(key.startswith("base_model.model.lin") and ".nrn_circuit." in key for key in keys)
    assert not any("default" in key for key in keys)


def test_every_tensor_comes_back_to_its_own_place(tmp_path):
    model, _ = adapted("mlp over tokens", "mergeable weight")
    with torch.no_grad():
        filled = [t for name, t in model.state_dict(keep_vars=True).items() if "nrn_" in name and t.is_floating_point()]
        for value, tensor in enumerate(filled):
            tensor.fill_(value + 1.0)
    wanted = digest(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_and_inputs("mlp over tokens")[0], tmp_path)
    assert digest(loaded.state_dict()) == wanted
    assert len(filled) > 4


def test_two_saves_are_the_same_files(tmp_path):
    model, _ = adapted("mlp", "pointwise")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    for name in ("adapter_config.json", SAFETENSORS_WEIGHTS_NAME):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_whole_state_dict_loads_strictly():
    model, inputs = adapted("mlp", "mergeable weight")
    wanted = output(model, inputs)
    other = adapted("mlp", "mergeable weight", seed=5)[0]
    result = other.load_state_dict(model.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(output(other, inputs), wanted)


def test_shapes_of_one_axis_more_or_less_are_served():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), awake("pointwise", ("0",)))
    x = torch.randn(2, 3, 5, 4)
    with torch.no_grad():
        assert close(model(x)[1, 2, 3], model(x[1, 2, 3]))
        assert close(model(x)[0], model(x[0]))
