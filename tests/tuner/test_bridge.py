"""PEFT knows the method, once, and a PEFT that cannot be taught it is told by name."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from typing import ClassVar

import peft
import pytest
import torch
from helpers.models import awake
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_config
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from bioadapt import BioConfig
from bioadapt.tuner import bridge
from bioadapt.tuner.model import BioModel


def test_the_type_is_a_full_member():
    assert PeftType("BIO") is PeftType.BIO is PeftType["BIO"]
    assert PeftType.BIO == "BIO" and PeftType.BIO.value == PeftType.BIO.name == "BIO"
    assert isinstance(PeftType.BIO, PeftType) and PeftType.BIO in PeftType
    assert list(PeftType).count(PeftType.BIO) == 1 and len({member.value for member in PeftType}) == len(PeftType)
    assert json.dumps(PeftType.BIO) == '"BIO"' and {PeftType.BIO: 1}["BIO"] == 1
    assert repr(PeftType.BIO) == "<PeftType.BIO: 'BIO'>"
    assert str(PeftType.BIO) == str(PeftType.LORA).replace("LORA", "BIO")
    assert pickle.loads(pickle.dumps(PeftType.BIO)) is copy.deepcopy(PeftType.BIO) is PeftType.BIO


def test_the_method_is_registered():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["BIO"] is BioConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.BIO] is BioModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING["BIO"] == "nrn_" == BioModel.prefix
    assert "BIO" not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING


def test_registering_again_changes_nothing():
    tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    before = [dict(table) for table in tables], list(PeftType)
    bridge.register()
    bridge.register()
    assert ([dict(table) for table in tables], list(PeftType)) == before


def test_a_peft_that_has_lost_what_is_needed_is_told_by_name(monkeypatch):
    monkeypatch.delattr(peft.utils, "register_peft_method")
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.BIO)
    with pytest.raises(
        ImportError,
        match=r"bioadapt knows PEFT 0\.21, and what is installed \(.*torch .*peft .*\).*register_peft_method",
    ):
        bridge.register()
    assert PeftType.BIO not in PEFT_TYPE_TO_CONFIG_MAPPING


def test_an_enumeration_that_cannot_be_extended_is_told_by_name(monkeypatch):
    import peft.utils.peft_types as types

    class NoEnumeration:
        __members__: ClassVar[dict] = {}

    monkeypatch.setattr(types, "PeftType", NoEnumeration)
    with pytest.raises(ImportError, match="cannot be taught the method"):
        bridge.register()


def test_a_method_of_that_name_from_elsewhere_is_told_by_name(monkeypatch):
    class Other(PeftConfig):
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.BIO, Other)
    with pytest.raises(ImportError, match=f"another package.*BIO.*{__name__.split('.')[-1]}"):
        bridge.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BIO] is Other


def _config() -> BioConfig:
    return awake(
        ["lateral_inhibition", {"name": "predictive_coding", "rank": 4}],
        ["b", "a"],
        exclude_modules=["c"],
        layers_to_transform=[1],
        layers_pattern="layers",
        modules_to_save=["head"],
        composition="serial",
        causal=True,
        seed=3,
        task_type="CAUSAL_LM",
    )


def test_configurations_can_be_pickled_and_copied():
    config = _config()
    for twin in (pickle.loads(pickle.dumps(config)), copy.copy(config), copy.deepcopy(config)):
        assert type(twin) is BioConfig and twin == config and twin.to_dict() == config.to_dict()


@pytest.mark.parametrize("loader", [BioConfig, PeftConfig])
def test_configurations_are_saved_and_found_again(loader, tmp_path):
    config = _config()
    config.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is BioConfig and loaded == config
    assert get_peft_config(json.loads((tmp_path / "adapter_config.json").read_text())) == config


def test_a_saved_configuration_holds_every_setting_and_is_the_same_text_each_time(tmp_path):
    config = _config()
    config.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    content = json.loads(text)
    assert content["peft_type"] == "BIO" and content["target_modules"] == ["a", "b"]
    names = [entry["name"] for entry in content["primitives"]]
    assert names == ["lateral_inhibition", "predictive_coding"]
    assert all(len(entry) > 1 for entry in content["primitives"])
    BioConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


SURROUNDED = {
    "PEFT's from_pretrained": (PeftModel.from_pretrained, ["model", "model_id", "adapter_name", "config"]),
    "PEFT's load_adapter": (PeftModel.load_adapter, ["model_id", "adapter_name"]),
    "PEFT's reading": (peft.peft_model.load_peft_weights, ["model_id", "device", "key_mapping"]),
    "PEFT's save_pretrained": (
        PeftModel.save_pretrained,
        ["save_directory", "safe_serialization", "selected_adapters", "is_main_process"],
    ),
    "transformers' load_adapter": (
        PeftAdapterMixin.load_adapter,
        ["peft_model_id", "adapter_name", "peft_config", "adapter_state_dict", "is_trainable", "load_config"],
    ),
    "transformers' save_pretrained": (
        PreTrainedModel.save_pretrained,
        ["save_directory", "is_main_process", "state_dict", "push_to_hub", "token"],
    ),
}


@pytest.mark.parametrize("name", SURROUNDED)
def test_what_is_surrounded_takes_what_it_is_known_to_take(name):
    function, arguments = SURROUNDED[name]
    assert function.surrounded_by_bioadapt
    assert set(arguments) <= set(inspect.signature(function).parameters)


def test_surrounded_functions_are_called_by_their_libraries():
    """Where PEFT reads tensors by another way than these, a file would pass unchecked."""
    assert "load_peft_weights(" in inspect.getsource(inspect.unwrap(PeftModel.load_adapter))
    assert ".load_adapter(" in inspect.getsource(inspect.unwrap(PeftModel.from_pretrained.__func__))
    assert ".load_adapter(" in inspect.getsource(PreTrainedModel.from_pretrained)


def test_other_methods_are_saved_and_loaded_as_ever(tmp_path):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model = peft.get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False))
    wanted = model(torch.ones(1, 4))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(again(torch.ones(1, 4)), wanted)
