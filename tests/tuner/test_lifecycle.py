"""Copies, pickles, bare injection, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers.models import (
    HOOKS,
    KINDS,
    adapted,
    awake,
    base_and_inputs,
    bert,
    bio_layers,
    close,
    digest,
    gpt2,
    output,
    own_parameters,
    record,
    step,
    tokens,
)
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

EVERYTHING = ["lateral_inhibition", "homeostatic_scaling", "neuro_ada", "predictive_coding", "short_term_depression"]


def _copies():
    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "torch.save": _saved_whole,
    }


def _saved_whole(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", _copies())
def test_a_copy_is_a_model_of_its_own(way):
    model, inputs = get_peft_model(bert(), awake(EVERYTHING)), tokens()
    step(model, inputs)
    wanted, before = output(model, inputs), digest(model.state_dict())
    twin = _copies()[way](model)
    assert torch.equal(output(twin, inputs), wanted)
    assert digest(twin.state_dict()) == before
    step(twin, inputs)
    assert not torch.equal(output(twin, inputs), wanted)
    assert torch.equal(output(model, inputs), wanted) and digest(model.state_dict()) == before
    scopes = {id(layer.scope) for layer in bio_layers(model)}
    assert not scopes & {id(layer.scope) for layer in bio_layers(twin)}
    twin.set_adapter("default")
    bare = twin.unload()
    assert torch.equal(output(bare, inputs), output(bert(), inputs)) and not left_behind(bare)
    assert torch.equal(output(model, inputs), wanted)


def left_behind(model) -> list[str]:
    """Hooks, scopes and tables of adapters on a model that should have none."""
    found = []
    for name, module in model.named_modules():
        found += [f"{name}.{kind}" for kind in HOOKS if getattr(module, kind)]
        found += [f"{name}.{attribute}" for attribute in ("bio_scope", "peft_config") if attribute in vars(module)]
    return found


@pytest.mark.parametrize("host", [bert, gpt2])
@pytest.mark.parametrize("end", ["unload", "merge"])
def test_nothing_is_left_behind(host, end):
    base = host()
    before = record(base)
    assert not left_behind(base)
    config = awake("mergeable") if end == "merge" else awake(EVERYTHING)
    model = get_peft_model(base, config)
    model.add_adapter("other", awake("mergeable"))
    assert left_behind(base)
    step(model, tokens())
    bare = model.unload() if end == "unload" else model.merge_and_unload()
    assert bare is base and not left_behind(base)
    after = record(base)
    assert after["modules"] == before["modules"] and after["training"] == before["training"]
    if end == "unload":
        assert after["tensors"] == before["tensors"]


def test_nothing_keeps_an_unloaded_adapter_alive():
    model, inputs = get_peft_model(bert(), awake(EVERYTHING)), tokens()
    step(model, inputs)
    output(model, inputs)
    tensors = [weakref.ref(parameter) for parameter in own_parameters(model).values()]
    layers = [weakref.ref(layer) for layer in bio_layers(model)]
    bare = model.unload()
    del model
    gc.collect()
    assert output(bare, inputs) is not None
    assert not any(reference() is not None for reference in (*tensors, *layers))


def test_a_model_can_be_adapted_again_after_unloading():
    base, inputs = base_and_inputs("mlp")
    plain = output(base, inputs)
    for _ in range(3):
        model = get_peft_model(base, awake("causal", ("lin0", "lin1")))
        assert not close(output(model, inputs), plain, 1e-3)
        base = model.unload()
    assert torch.equal(output(base, inputs), plain)


@pytest.mark.parametrize("kind", ["mlp over tokens", "conv2d", "embedding", "gpt-2 conv1d", "group norm"])
def test_injected_into_a_plain_module_it_is_the_same_adapter(kind, tmp_path):
    model, inputs = adapted(kind, "pointwise")
    wanted = output(model, inputs)
    model.save_pretrained(tmp_path)
    torch.manual_seed(2)
    plain, _ = base_and_inputs(kind)
    injected = inject_adapter_in_model(awake("pointwise", KINDS[kind].targets), plain)
    assert injected is plain
    trainable = {name for name, parameter in injected.named_parameters() if parameter.requires_grad}
    assert trainable and all(".nrn_circuit.default." in name for name in trainable)
    result = set_peft_model_state_dict(injected, get_peft_model_state_dict(model))
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "nrn_" in key]
    assert torch.equal(output(injected, inputs), wanted)
    saved = {f"base_model.model.{key}": tensor for key, tensor in get_peft_model_state_dict(injected).items()}
    assert digest(saved) == digest(get_peft_model_state_dict(model))
    step(injected, inputs)
    assert not torch.equal(output(injected, inputs), wanted)


def test_injected_by_way_of_the_meta_device():
    model, inputs = adapted("mlp over tokens", "mergeable weight")
    plain, _ = base_and_inputs("mlp over tokens")
    config = awake("mergeable weight", ("lin0", "lin1"))
    injected = inject_adapter_in_model(config, plain, low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in own_parameters(injected).values()} == {"meta"}
    set_peft_model_state_dict(injected, get_peft_model_state_dict(model), low_cpu_mem_usage=True)
    assert close(output(injected, inputs), output(model, inputs), 1e-6)


def test_a_second_adapter_can_be_injected_and_a_name_only_once():
    plain, _ = base_and_inputs("mlp")
    inject_adapter_in_model(awake("pointwise", ("lin0",)), plain, "one")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        inject_adapter_in_model(awake("pointwise", ("lin1",)), plain, "two")
    assert set(plain.peft_config) == {"one", "two"}
    before = record(plain)
    with pytest.raises(ValueError, match="adapter_name='two' is taken.*'bio'"):
        inject_adapter_in_model(awake("pointwise", ("lin1",)), plain, "two")
    assert record(plain) == before


def test_training_mode_reaches_adapters_and_new_ones_follow_it():
    model, _ = adapted("mlp", "mergeable")
    model.train()
    model.add_adapter("other", awake("mergeable", ("lin0",)))
    assert all(circuit.training for layer in bio_layers(model) for circuit in layer.circuits.values())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_a_saved_adapter_can_be_trained_on(tmp_path):
    model, inputs = adapted("mlp over tokens", "mergeable weight")
    step(model, inputs)
    model.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(base_and_inputs("mlp over tokens")[0], tmp_path, is_trainable=True)
    for twin in (model, resumed):
        step(twin, inputs)
    assert torch.equal(output(model, inputs), output(resumed, inputs))
