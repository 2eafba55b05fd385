"""Several adapters on one model: which are active, which train, what their sum is, and who serves which sample."""

from __future__ import annotations

import pytest
import torch
from helpers.models import (
    KINDS,
    MERGING,
    B,
    adapted,
    awake,
    base_and_inputs,
    bio_layers,
    close,
    digest,
    gpt2,
    output,
    own_parameters,
    pairs,
    step,
    unchanged,
)
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model

from bioadapt import BioConfig


def _two(kind: str, named: str) -> tuple[PeftModel, torch.Tensor]:
    model, inputs = adapted(kind, named)
    model.add_adapter("other", awake(named, KINDS[kind].targets))
    return model.eval(), inputs


def test_a_second_adapter_is_added_inactive_and_frozen():
    model, inputs = adapted("mlp", "pointwise")
    wanted = output(model, inputs)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter("other", awake("pointwise", ("lin0", "lin1")))
    assert torch.equal(output(model, inputs), wanted)
    assert model.active_adapters == ["default"]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable


def test_a_second_adapter_does_not_touch_a_first_that_was_frozen_by_hand():
    model, _ = adapted("mlp", "pointwise")
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.add_adapter("other", awake("pointwise", ("lin0", "lin1")))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_second_adapter_on_other_layers_leaves_the_active_one_alone():
    model, inputs = adapted("mlp", "pointwise")
    wanted = output(model, inputs)
    model.add_adapter("other", awake("pointwise", ("out",)))
    assert torch.equal(output(model, inputs), wanted)
    assert own_parameters(model, "other")
    model.set_adapter("other")
    assert {name.split(".")[0] for name, p in own_parameters(model, "other").items() if p.requires_grad} == {"out"}
    assert not torch.equal(output(model, inputs), wanted)


def test_setting_switches_output_and_training():
    model, inputs = _two("mlp", "pointwise")
    first = output(model, inputs)
    model.set_adapter("other")
    second = output(model, inputs)
    assert not close(first, second, 1e-3)
    assert all(p.requires_grad for p in own_parameters(model, "other").values())
    assert not any(p.requires_grad for p in own_parameters(model).values())
    kept = {name: p.detach().clone() for name, p in own_parameters(model).items()}
    step(model, inputs)
    assert all(torch.equal(kept[name], p) for name, p in own_parameters(model).items())
    assert not torch.equal(output(model, inputs), second)
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(output(model, inputs), first)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "named"), [*pairs(merging=True), ("mlp over tokens", "causal"), ("layer norm", "ranked")]
)
def test_two_active_adapters_give_the_sum_of_their_deltas(kind, named):
    model, inputs = _two(kind, named)
    layer = bio_layers(model)[0]
    base = layer.base_layer(inputs)
    with torch.no_grad():
        deltas = []
        for name in ("default", "other"):
            model.set_adapter(name)
            deltas.append(layer(inputs) - base)
        assert not close(*deltas, 1e-3)
        for names in (["default", "other"], ["other", "default"]):
            model.base_model.set_adapter(names)
            assert model.active_adapters == names
            assert close(layer(inputs), base + deltas[0] + deltas[1])
    assert all(p.requires_grad for name in ("default", "other") for p in own_parameters(model, name).values())


@pytest.mark.parametrize(("kind", "named"), pairs(merging=True))
def test_two_active_adapters_merge_to_what_they_give(kind, named):
    model, inputs = _two(kind, named)
    model.base_model.set_adapter(["default", "other"])
    wanted = output(model, inputs)
    model.merge_adapter()
    assert [layer.merged_adapters for layer in bio_layers(model)] == [["default", "other"]] * len(bio_layers(model))
    assert close(output(model, inputs), wanted)
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), wanted)
    assert close(output(model.merge_and_unload(), inputs), wanted)


def test_of_several_adapters_only_the_named_ones_merge():
    model, inputs = _two("mlp over tokens", "mergeable weight")
    model.set_adapter("other")
    wanted = output(model, inputs)
    model.set_adapter("default")
    assert close(output(model.merge_and_unload(adapter_names=["other"]), inputs), wanted)


def test_merging_one_after_the_other_is_merging_both():
    model, inputs = _two("mlp over tokens", "mergeable weight")
    model.base_model.set_adapter(["default", "other"])
    wanted = output(model, inputs)
    model.merge_adapter(["other"])
    with pytest.warns(UserWarning, match="additionally merging default"):
        model.merge_adapter(["default", "other"])
    assert close(output(model, inputs), wanted)
    before = digest(model.state_dict())
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), wanted)
    assert before != digest(model.state_dict())


# -- deleting --


def test_deleting_the_inactive_adapter():
    model, inputs = _two("mlp", "pointwise")
    wanted = output(model, inputs)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and not own_parameters(model, "other")
    assert torch.equal(output(model, inputs), wanted)
    assert model.active_adapters == ["default"]


def test_deleting_the_active_adapter_falls_back_on_another():
    model, inputs = _two("mlp", "pointwise")
    model.set_adapter("other")
    wanted = output(model, inputs)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"] and model.active_adapter == "other"
    assert torch.equal(output(model, inputs), wanted)
    assert all(p.requires_grad for p in own_parameters(model, "other").values())


def test_deleting_the_only_adapter_leaves_the_base_and_room_for_another():
    base, inputs = base_and_inputs("mlp")
    plain = output(base, inputs)
    model, _ = adapted("mlp", "pointwise")
    model.delete_adapter("default")
    assert torch.equal(output(model.base_model, inputs), plain)
    assert model.active_adapters == []
    model.add_adapter("again", awake("pointwise", ("lin0",)))
    model.set_adapter("again")
    assert not close(output(model, inputs), plain, 1e-3)


def test_deleting_an_unknown_adapter_is_refused():
    model, _ = _two("mlp", "pointwise")
    for owner in (model, model.base_model):
        with unchanged(model), pytest.raises(ValueError, match="othr does not exist"):
            owner.delete_adapter("othr")


def test_deleting_a_merged_adapter_is_refused():
    model, _ = _two("mlp", "mergeable")
    model.merge_adapter()
    with unchanged(model), pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]


# -- status --


def test_status_tells_what_is_there(capsys):
    model, _ = _two("mlp", "mergeable")
    status = get_model_status(model)
    assert status.adapter_model_type == "BioModel" and status.base_model_type == "Chain"
    assert status.peft_types == {"default": "BIO", "other": "BIO"}
    assert status.num_adapter_layers == 2 and status.available_adapters == ["default", "other"]
    assert status.active_adapters == ["default"] and status.enabled is True and status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"]}
    own = sum(parameter.numel() for parameter in own_parameters(model).values())
    assert status.trainable_params == own
    assert status.total_params == sum(parameter.numel() for parameter in model.parameters())
    layers = get_layer_status(model)
    assert [(layer.name, layer.module_type) for layer in layers] == [
        ("model.lin0", "BioLinear"), ("model.lin1", "BioLinear"),
    ]  # fmt: skip
    model.print_trainable_parameters()
    assert f"trainable params: {own} " in capsys.readouterr().out
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["default"]
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    assert get_model_status(model).enabled is False


def test_trainability_is_the_users_to_change():
    model, _ = _two("mlp", "pointwise")
    model.set_requires_grad("other")
    assert get_model_status(model).requires_grad == {"default": True, "other": True}
    model.set_requires_grad(["default", "other"], requires_grad=False)
    assert get_model_status(model).requires_grad == {"default": False, "other": False}


# -- who serves which sample --


@pytest.mark.parametrize("kind", ["mlp", "mlp over tokens", "conv2d", "embedding", "group norm"])
def test_each_sample_is_served_by_its_own_adapter(kind):
    model, inputs = _two(kind, "pointwise")
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = output(model, inputs)
    with model.disable_adapter():
        alone["__base__"] = output(model, inputs)
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        mixed = model(inputs, adapter_names=names)
        for row, name in enumerate(names):
            assert close(mixed[row], alone[name][row]), name
            for wrong in {*names} - {name}:
                assert not close(mixed[row], alone[wrong][row], 1e-3)
        assert close(model(inputs, adapter_names=["__base__"] * B), alone["__base__"])
    assert torch.equal(output(model, inputs), alone["other"])  # the active one again


@pytest.mark.compatible("Serving", "beam search")
def test_samples_keep_their_adapter_in_beam_search():
    base = gpt2()
    config = awake(["k_winners_take_all", "lateral_inhibition"])
    model = get_peft_model(base, config).eval()
    model.add_adapter("other", awake("mergeable"))
    prompt = torch.tensor([[4, 9, 7], [4, 9, 7], [4, 9, 7]])
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model.generate(input_ids=prompt[:1], **settings)[0]
    with model.disable_adapter():
        alone["__base__"] = model.generate(input_ids=prompt[:1], **settings)[0]
    names = ["__base__", "other", "default"]
    mixed = model.generate(input_ids=prompt, adapter_names=names, **settings)
    for row, name in enumerate(names):
        assert mixed[row].tolist()[: len(alone[name])] == alone[name].tolist(), name
    assert len({tuple(row.tolist()) for row in mixed}) > 1


def test_names_of_samples_are_checked():
    model, inputs = _two("mlp", "pointwise")
    with pytest.raises(ValueError, match="'othr'.*'other'"):
        model(inputs, adapter_names=["default", "othr", "__base__"])
    with pytest.raises(ValueError, match="adapter_names has 2 entries, but the batch has 3"):
        model(inputs, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="eval mode"):
        model.train()(inputs, adapter_names=["default"] * B)
    wanted = output(model, inputs)
    assert torch.equal(output(model, inputs), wanted)


def test_samples_cannot_be_told_apart_once_merged():
    model, inputs = _two("mlp", "mergeable")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        model(inputs, adapter_names=["default"] * B)


def test_adapters_of_one_model_may_differ_in_everything():
    model, inputs = adapted("mlp over tokens", "pointwise")
    model.add_adapter("other", awake("ranked", ("lin0", "lin1"), composition="serial"))
    model.add_adapter("third", BioConfig(primitives=["neuro_ada"], target_modules="all-linear"))
    outputs = []
    for name in ("default", "other", "third"):
        model.set_adapter(name)
        outputs.append(output(model, inputs))
    with model.disable_adapter():
        plain = output(model, inputs)
    assert not close(outputs[0], outputs[1], 1e-3)
    assert torch.equal(outputs[2], plain)  # fresh


@pytest.mark.parametrize("named", MERGING)
def test_merging_an_unmergeable_layer_refuses_all_of_them(named):
    model, _ = adapted("mlp", named)
    model.add_adapter("other", awake("pointwise", ("lin1",)))
    model.base_model.set_adapter(["default", "other"])
    with unchanged(model), pytest.raises(ValueError, match="'other'.*lateral_inhibition.*lin1"):
        model.merge_adapter()
