"""Modules that are trained and saved in full beside the adapter."""

from __future__ import annotations

import pytest
import torch
from helpers.models import (
    B,
    awake,
    base_and_inputs,
    classifier,
    close,
    digest,
    output,
    own_parameters,
    step,
    tokens,
    unchanged,
)
from peft import PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn


def _with_head(adapter_name: str = "default") -> tuple[PeftModel, torch.Tensor, torch.Tensor]:
    base, inputs = base_and_inputs("mlp")
    plain = output(base, inputs)
    config = awake("mergeable", ("lin0", "lin1"), modules_to_save=["out"])
    return get_peft_model(base, config, adapter_name), inputs, plain


def test_the_head_learns_with_the_adapter_and_the_original_stays():
    model, inputs, _ = _with_head()
    head = model.base_model.model.out
    assert isinstance(head, ModulesToSaveWrapper)
    original = digest(head.original_module.state_dict())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if "modules_to_save" in name} == {
        "base_model.model.out.modules_to_save.default.weight", "base_model.model.out.modules_to_save.default.bias"
    }  # fmt: skip
    assert len(trainable) == len(own_parameters(model)) + 2
    before = digest(head.modules_to_save["default"].state_dict())
    step(model, inputs)
    after = digest(head.modules_to_save["default"].state_dict())
    assert all(after[name] != value for name, value in before.items())
    assert digest(head.original_module.state_dict()) == original


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_the_head_is_saved_and_loaded(safe, low_cpu_mem_usage, tmp_path):
    model, inputs, plain = _with_head()
    step(model, inputs)
    wanted = output(model, inputs)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    loaded = PeftModel.from_pretrained(
        base_and_inputs("mlp")[0], tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    assert torch.equal(output(loaded, inputs), wanted)
    with loaded.disable_adapter():
        assert torch.equal(output(loaded, inputs), plain)
    assert torch.equal(output(loaded, inputs), wanted)


def test_unloading_takes_the_trained_head_away_and_merging_keeps_it():
    model, inputs, plain = _with_head()
    step(model, inputs)
    wanted = output(model, inputs)
    merged = model.merge_and_unload()
    assert close(output(merged, inputs), wanted) and type(merged.out) is nn.Linear
    model, inputs, plain = _with_head()
    step(model, inputs)
    bare = model.unload()
    assert torch.equal(output(bare, inputs), plain) and type(bare.out) is nn.Linear


def _two_heads() -> tuple[PeftModel, torch.Tensor, torch.Tensor]:
    model, inputs, plain = _with_head()
    model.add_adapter("other", awake("mergeable", ("lin0",), modules_to_save=["out"]))
    model.add_adapter("bare", awake("mergeable", ("lin1",)))
    step(model, inputs)
    model.set_adapter("other")
    step(model, inputs, rate=0.3)
    return model, inputs, plain


def test_each_adapter_has_its_own_head():
    model, inputs, _ = _two_heads()
    head = model.base_model.model.out
    outputs = {}
    for name in ("default", "other", "bare"):
        model.set_adapter(name)
        outputs[name] = output(model, inputs)
        used = head.modules_to_save[name] if name != "bare" else head.original_module
        hidden = torch.tanh(model.base_model.model.lin1(torch.tanh(model.base_model.model.lin0(inputs))))
        assert torch.equal(outputs[name], used(hidden).detach())
    assert not close(outputs["default"], outputs["other"], 1e-3)


def test_two_adapters_with_a_head_cannot_be_active_together():
    model, _, _ = _two_heads()
    with unchanged(model), pytest.raises(ValueError, match="'default', 'other'.*one can be active"):
        model.base_model.set_adapter(["default", "other"])
    model.base_model.set_adapter(["bare", "default"])
    assert model.base_model.model.out.active_adapters == ["default"]


@pytest.mark.parametrize("active", ["default", "other"])
def test_of_several_heads_the_active_one_stays_after_merging(active):
    model, inputs, _ = _two_heads()
    model.set_adapter(active)
    wanted = output(model, inputs)
    merged = model.merge_and_unload()
    assert type(merged.out) is nn.Linear and close(output(merged, inputs), wanted)


def test_deleting_hands_the_head_on():
    model, inputs, plain = _two_heads()
    model.set_adapter("default")
    wanted = output(model, inputs)
    model.set_adapter("other")
    model.delete_adapter("bare")
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert torch.equal(output(model, inputs), wanted)
    assert list(model.base_model.model.out.modules_to_save) == ["default"]
    model.delete_adapter("default")
    assert type(model.base_model.model.out) is nn.Linear
    assert torch.equal(output(model.base_model, inputs), plain)


def test_each_sample_is_served_by_its_own_head():
    model, inputs, plain = _two_heads()
    alone = {"__base__": plain}
    for name in ("default", "other", "bare"):
        model.set_adapter(name)
        alone[name] = output(model, inputs)
    with torch.no_grad():
        for names in (["other", "__base__", "default"], ["bare", "other", "bare"]):
            mixed = model(inputs, adapter_names=names)
            assert all(close(mixed[row], alone[name][row]) for row, name in enumerate(names))
    assert torch.equal(output(model, inputs), alone["bare"])  # the request has left nothing behind


def test_classifiers_bring_their_head_along(tmp_path):
    model = get_peft_model(classifier(), awake("pointwise", task_type=TaskType.SEQ_CLS))
    assert isinstance(model.base_model.model.classifier, ModulesToSaveWrapper)
    inputs = tokens(B)
    step(model, inputs)
    wanted = output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(), tmp_path, is_trainable=True)
    assert torch.equal(output(loaded, inputs), wanted)
    assert not torch.equal(output(PeftModel.from_pretrained(classifier(), tmp_path).unload(), inputs), wanted)
