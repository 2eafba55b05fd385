"""Names: of adapters inside each other, of adapters and modules that are also words of ours."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers.models import (
    B,
    Chain,
    D,
    adapted,
    awake,
    base_and_inputs,
    bio_layers,
    digest,
    mlp,
    output,
    own_parameters,
    step,
    unchanged,
)
from peft import PeftModel, get_peft_model
from torch import nn

NAMES = [
    "bio", "a", "nrn", "nrn_circuit", "weight", "gate", "base_layer", "lin0", "lateral_inhibition", "model", "0",
    "with space", "mit-Umlaut-ä", "modules_to_save",
]  # fmt: skip


def _model(name: str, seed: int = 0) -> tuple[PeftModel, torch.Tensor]:
    base, inputs = base_and_inputs("mlp", seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of names that are part of the prefix; ours survive them
        return get_peft_model(base, awake("pointwise", ("lin0", "lin1")), adapter_name=name), inputs


@pytest.mark.parametrize("name", NAMES)
def test_any_name_survives_saving_and_loading(name, tmp_path):
    model, inputs = _model(name)
    wanted = output(model, inputs)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(base_and_inputs("mlp")[0], tmp_path / name, name, is_trainable=True)
        assert torch.equal(output(loaded, inputs), wanted)
        loaded.load_adapter(tmp_path / name, f"{name}{name}", is_trainable=True)
        loaded.set_adapter(f"{name}{name}")
        assert torch.equal(output(loaded, inputs), wanted)
    assert digest(loaded.state_dict()).items() >= digest(model.state_dict()).items()


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_trained_switched_off_and_deleted(name):
    model, inputs = _model(name)
    with model.disable_adapter():
        plain = output(model, inputs)
    before = output(model, inputs)
    assert all(p.requires_grad == (f"nrn_circuit.{name}." in key) for key, p in model.named_parameters())
    step(model, inputs)
    assert not torch.equal(output(model, inputs), before)
    model.delete_adapter(name)
    assert not any("nrn_circuit" in key for key in model.state_dict())
    assert torch.equal(output(model.base_model, inputs), plain)


def test_names_within_names_stay_apart(tmp_path):
    model, inputs = _model("a")
    for name in ("ab", "b", "aba"):
        model.add_adapter(name, awake("pointwise", ("lin0", "lin1")))
    wanted = {}
    for name in ("a", "ab", "b", "aba"):
        model.set_adapter(name)
        wanted[name] = output(model, inputs)
    assert len({tuple(value.flatten().tolist()) for value in wanted.values()}) == 4
    model.save_pretrained(tmp_path)
    names = {"a": "aba", "ab": "b", "b": "a", "aba": "ab"}
    loaded = PeftModel.from_pretrained(base_and_inputs("mlp")[0], tmp_path / "a", names["a"])
    for name in ("ab", "b", "aba"):
        loaded.load_adapter(tmp_path / name, names[name])
    for name, other in names.items():
        loaded.set_adapter(other)
        assert torch.equal(output(loaded, inputs), wanted[name]), name
    loaded.delete_adapter("a")
    assert set(bio_layers(loaded)[0].circuits) == {"ab", "b", "aba"}


@pytest.mark.parametrize("name", ["a.b", ".", "", "keys", "update", "forward", "training"])
def test_names_that_torch_cannot_hold_are_refused(name):
    base, _ = base_and_inputs("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with unchanged(base), pytest.raises(ValueError, match="adapter_name="):
            get_peft_model(base, awake("pointwise", ("lin0",)), adapter_name=name)
        model, _ = adapted("mlp", "pointwise")
        with unchanged(model), pytest.raises(ValueError, match="adapter_name="):
            model.add_adapter(name, awake("pointwise", ("lin0",)))


MODULES = ["nrn_lin", "lin_nrn_", "nrn_circuit", "circuit", "default", "other", "bio", "weight", "bio_scope_"]


@pytest.mark.parametrize("module", MODULES)
def test_modules_may_be_called_like_our_parts_and_adapters(module, tmp_path):
    """The hosts have the name twice: on the adapted layer, and on one that is left alone."""

    def host() -> nn.Module:
        torch.manual_seed(0)
        inner = Chain(**{module: nn.Linear(D, D), "target": nn.Linear(D, D)})
        return Chain(**{"first": nn.Linear(D, D), module: inner}).eval()

    inputs = torch.randn(B, D)
    plain = output(host(), inputs)
    targets = [f"{module}.{module}", "target"]
    model = get_peft_model(host(), awake("pointwise", targets))
    model.add_adapter("other", awake("pointwise", targets))
    assert len(bio_layers(model)) == 2
    own = {id(parameter) for parameter in own_parameters(model).values()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == own
    wanted = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        wanted[name] = output(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(host(), tmp_path, is_trainable=True)
    loaded.load_adapter(tmp_path / "other", "other", is_trainable=True)
    for name in ("default", "other"):
        loaded.set_adapter(name)
        assert torch.equal(output(loaded, inputs), wanted[name])
    with loaded.disable_adapter():
        assert torch.equal(output(loaded, inputs), plain)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        loaded.delete_adapter("other")
    assert [list(layer.circuits) for layer in bio_layers(loaded)] == [["default"]] * 2
    assert torch.equal(output(loaded, inputs), wanted["default"])
    assert torch.equal(output(loaded.unload(), inputs), plain)


def test_a_module_left_alone_may_have_the_name_of_the_adapter_beside_it():
    base = Chain(default=nn.Linear(D, D), lin0=nn.Linear(D, D))
    model = get_peft_model(base, awake("pointwise", ("lin0",)))
    assert [layer.path for layer in bio_layers(model)] == ["lin0"]
    assert not model.base_model.model.default.weight.requires_grad


def test_the_default_name_is_peft_s():
    assert list(get_peft_model(mlp(), awake("pointwise", ("lin0",))).peft_config) == ["default"]
