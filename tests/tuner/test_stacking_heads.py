"""Over a LoRA that trains a head: the head is what the stack starts from, and is there again when the stack is gone."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import awake, classifier, close, digest, output, own_parameters, record, step, tokens, unchanged
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from bioadapt import BioConfig

INPUTS = tokens()
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")


def lora(adapter_name: str = "default", trained: bool = True, **fields) -> PeftModel:
    """A LoRA whose head differs from the original one."""
    base = classifier()
    config = LoraConfig(target_modules=["query"], r=2, init_lora_weights=False, task_type=TaskType.SEQ_CLS, **fields)
    model = get_peft_model(base, config, adapter_name)
    if trained:
        step(model, INPUTS)
    return model.eval()


def bio(under: PeftModel, named="mergeable", heads=("classifier",), adapter_name="bio") -> PeftModel:
    torch.manual_seed(1)
    config = awake(named, modules_to_save=list(heads) or None)
    return get_peft_model(under, config, adapter_name).eval()


def head_of(model) -> torch.nn.Module:
    return model.get_base_model().classifier


def test_the_same_adapter_name_is_refused_with_one_that_works():
    under = lora()
    plain = output(under, INPUTS)
    with unchanged(under), pytest.raises(ValueError, match="adapter_name='default'.*adapter_name='bio'"):
        get_peft_model(under, awake("mergeable", modules_to_save=["classifier"]))
    assert torch.equal(output(under, INPUTS), plain)
    fresh = get_peft_model(under, BioConfig(primitives=["lateral_inhibition"], modules_to_save=["classifier"]), "bio")
    assert torch.equal(output(fresh, INPUTS), plain)


def test_a_suggested_name_is_free():
    under = lora("bio")
    with pytest.raises(ValueError, match="adapter_name='bio2'"):
        get_peft_model(under, awake("mergeable", task_type=TaskType.SEQ_CLS), "bio")
    assert output(get_peft_model(under, awake("mergeable", task_type=TaskType.SEQ_CLS), "bio2"), INPUTS) is not None


@pytest.mark.parametrize("heads", [("classifier",), ()], ids=["own head", "no head"])
def test_the_trained_head_stays_in_use(heads):
    under = lora()
    plain, before = output(under, INPUTS), record(under)
    model = bio(under, heads=heads)
    trained = head_of(model).modules_to_save["default"]
    hidden = {}
    trained_input = head_of(model).register_forward_hook(lambda module, args, out: hidden.update(read=args[0], out=out))
    output(model, INPUTS)
    assert close(hidden["out"], trained(hidden["read"]).detach())
    trained_input.remove()
    with model.disable_adapter():
        assert torch.equal(output(model, INPUTS), plain)
    assert model.unload() is under
    assert torch.equal(output(under, INPUTS), plain)
    after = record(under)
    assert {aspect: after[aspect] for aspect in before} == before


def test_training_moves_the_own_copy_alone():
    under = lora()
    plain = output(under, INPUTS)
    model = bio(under)
    copies = head_of(model).modules_to_save
    theirs = digest(copies["default"].state_dict())
    assert not any(parameter.requires_grad for parameter in copies["default"].parameters())
    step(model, INPUTS)
    assert digest(copies["default"].state_dict()) == theirs != digest(copies["bio"].state_dict())
    for parameter in under.parameters():  # the LoRA itself was trained along, as it was trainable
        parameter.requires_grad = False
    with model.disable_adapter():
        assert not torch.equal(output(model, INPUTS), plain)


@pytest.mark.parametrize("trainable", [True, False])
def test_the_head_below_is_as_trainable_as_before(trainable):
    under = lora()
    for parameter in under.parameters():
        parameter.requires_grad = parameter.requires_grad and trainable
    before = {name: parameter.requires_grad for name, parameter in under.named_parameters()}
    assert any(before.values()) == trainable
    model = bio(under)
    model.add_adapter("other", awake("mergeable"))
    model.set_adapter("other")
    assert {p.requires_grad for p in head_of(model).modules_to_save["default"].parameters()} == {trainable}
    model.set_adapter("bio")
    with model.disable_adapter():
        pass
    model.unload()
    assert {name: parameter.requires_grad for name, parameter in under.named_parameters()} == before


def test_switching_and_deleting_return_to_the_head_below():
    under = lora()
    plain = output(under, INPUTS)
    model = bio(under)
    step(model, INPUTS)
    with model.disable_adapter():
        below = output(model, INPUTS)
    first = output(model, INPUTS)
    model.add_adapter("other", BioConfig(primitives=["lateral_inhibition"]))
    assert torch.equal(output(model, INPUTS), first)
    model.set_adapter("other")  # fresh and without a head
    assert torch.equal(output(model, INPUTS), below)
    model.set_adapter("bio")
    assert torch.equal(output(model, INPUTS), first)
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("bio")
    assert torch.equal(output(model, INPUTS), below)
    assert list(head_of(model).modules_to_save) == ["default"]
    assert not torch.equal(below, plain)  # trained along


def test_saving_and_loading_both(tmp_path):
    under = lora()
    model = bio(under)
    step(model, INPUTS)
    wanted = output(model, INPUTS)
    under.save_pretrained(tmp_path / "lora")
    model.save_pretrained(tmp_path / "stack")
    loaded = PeftModel.from_pretrained(
        PeftModel.from_pretrained(classifier(), tmp_path / "lora"), tmp_path / "stack" / "bio", adapter_name="bio"
    )
    assert close(output(loaded, INPUTS), wanted, 1e-6)
    with model.disable_adapter(), loaded.disable_adapter():
        assert close(output(loaded, INPUTS), output(model, INPUTS), 1e-6)
    alone = PeftModel.from_pretrained(classifier(), tmp_path / "lora")
    with model.disable_adapter():
        assert close(output(alone, INPUTS), output(model, INPUTS), 1e-6)


@pytest.mark.parametrize("heads", [("classifier",), ()], ids=["own head", "no head"])
def test_merging_keeps_the_head_in_use(heads):
    model = bio(lora(), heads=heads)
    if heads:
        step(model, INPUTS)
    wanted = output(model, INPUTS)
    merged = model.merge_and_unload()
    assert type(merged.classifier) is torch.nn.Linear
    assert close(output(merged, INPUTS), wanted, 1e-4)


def test_of_two_loras_with_heads_the_active_one_counts():
    under = lora(trained=False)
    under.add_adapter("second", copy.deepcopy(under.peft_config["default"]))
    under.set_adapter("second")
    step(under, INPUTS)
    plain = output(under, INPUTS)
    model = bio(under, "pointwise", adapter_name="zebra")
    assert digest(head_of(model).modules_to_save["zebra"].state_dict()) == digest(
        head_of(model).modules_to_save["second"].state_dict()
    )
    with model.disable_adapter():
        assert torch.equal(output(model, INPUTS), plain)
    model.unload()
    assert torch.equal(output(under, INPUTS), plain)


def test_each_sample_has_its_own_head_over_the_one_below():
    under = lora()
    plain = output(under, INPUTS)
    model = bio(under)
    for parameter in model.parameters():
        parameter.requires_grad = False
    with torch.no_grad():
        head_of(model).modules_to_save["bio"].weight.mul_(-1.5)
    alone = output(model, INPUTS)
    with torch.no_grad():
        mixed = model(**INPUTS, adapter_names=["bio", "__base__", "bio"]).logits
    assert close(mixed, torch.stack([alone[0], plain[1], alone[2]]))
    assert own_parameters(model, "bio")
