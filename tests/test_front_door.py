"""What a user writes: configurations, the catalogue, and how both show themselves."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from peft import PeftConfig

import bioadapt
from bioadapt import BioConfig, build_primitive, catalogue, list_primitives, primitive_info, ready, register_primitive
from bioadapt import registry as names
from bioadapt.primitives.base import Primitive, setting

STUBS = Path(__file__).resolve().parents[1] / "scripts" / "stubs.py"


# -- the configuration --


@pytest.mark.parametrize(
    "written",
    [
        "neuro_ada",
        {"name": "neuro_ada"},
        ["neuro_ada"],
        ("neuro_ada",),
        [{"name": "neuro_ada", "k": 8}],
        [catalogue.neuro_ada()],
        catalogue.neuro_ada(k=np.int64(8)),
    ],
)
def test_every_way_to_write_one_primitive_is_the_same(written):
    assert BioConfig(written) == BioConfig(primitives=["neuro_ada"])


def test_the_primitives_alone_are_given_by_position():
    positional = [p.name for p in inspect.signature(BioConfig).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert positional == ["primitives"]
    with pytest.raises(TypeError, match="positional"):
        BioConfig(["neuro_ada"], ["query"])


def test_values_become_pythons_own(tmp_path):
    config = BioConfig(
        ["neuro_ada"],
        target_modules=("query",),
        layers_to_transform=range(2),
        seed=np.int64(3),
        causal=np.bool_(True),
        modules_to_save="classifier",
        base_model_name_or_path=tmp_path,
    )
    assert config.layers_to_transform == [0, 1] and config.modules_to_save == ["classifier"]
    assert (type(config.seed), type(config.causal)) == (int, bool)
    assert BioConfig("lateral_inhibition", rank=np.int32(4)).rank == 4
    indices = BioConfig(["neuro_ada"], target_modules=["query"], layers_to_transform=np.arange(2)).layers_to_transform
    assert indices == [0, 1] and json.dumps(indices) == "[0, 1]"
    assert BioConfig("neuro_ada", target_modules=["query"], layers_to_transform=np.array(1)).layers_to_transform == 1
    chosen = BioConfig(catalogue.neuro_ada(selection=np.str_("random"))).primitives[0]["selection"]
    assert chosen == "random" and type(chosen) is str
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


CONFIGURATIONS = [
    BioConfig(["lateral_inhibition"]),
    BioConfig("divisive_normalization", target_modules="all-linear", seed=3, causal=False, task_type="CAUSAL_LM"),
    BioConfig([catalogue.neuro_ada(k=4), "hebbian_trace"], target_modules=["b", "a"], composition="serial"),
    BioConfig(["lateral_inhibition", {"name": "predictive_coding", "rank": 4}], rank=8, init_weights=False),
]


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=repr)
def test_a_configuration_shows_what_was_given_and_nothing_else(config, tmp_path):
    assert eval(repr(config)) == config
    twins = [pickle.loads(pickle.dumps(config)), copy.copy(config), copy.deepcopy(config), dataclasses.replace(config)]
    assert all(twin == config and repr(twin) == repr(config) for twin in twins)
    assert dataclasses.replace(config, seed=9).seed == 9
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert loaded == config and eval(repr(loaded)) == loaded


def test_the_shown_form():
    assert repr(BioConfig("lateral_inhibition")) == "BioConfig(['lateral_inhibition'])"
    config = BioConfig([catalogue.neuro_ada(k=4)], target_modules=["b", "a"], task_type="CAUSAL_LM")
    shown = "BioConfig([{'name': 'neuro_ada', 'k': 4}], task_type='CAUSAL_LM', target_modules=['a', 'b'])"
    assert repr(config) == shown
    table = BioConfig("lateral_inhibition", target_modules="<b>.*")._repr_html_()
    assert "lateral_inhibition" in table and "&lt;b&gt;.*" in table and "<b>" not in table and "seed" not in table


# -- the catalogue --


@pytest.mark.parametrize("name", list_primitives())
def test_every_primitive_is_a_function_of_its_settings(name):
    info, function = primitive_info(name), getattr(catalogue, name)
    assert function() == {"name": name} and function.__name__ == name and info.summary in function.__doc__
    parameters = inspect.signature(function).parameters
    assert list(parameters) == list(info.settings)
    every = {word: parameter.default for word, parameter in parameters.items()}
    assert function(**every) == {"name": name, **every}
    assert BioConfig(function(**every)) == BioConfig(name)
    for word, declared in info.settings.items():
        assert word in function.__doc__ and declared.accepted in function.__doc__
    assert pickle.loads(pickle.dumps(function)) is function


def test_the_catalogue_refuses_at_once():
    assert dir(catalogue) == list_primitives()
    with pytest.raises(TypeError, match=r"neuro_ada\(\) has no setting 'ranks'; accepted: k, "):
        catalogue.neuro_ada(ranks=4)
    with pytest.raises(ValueError, match="'k' must be an integer from 1"):
        catalogue.neuro_ada(k=0)
    with pytest.raises(AttributeError, match="did you mean 'neuro_ada'"):
        _ = catalogue.neuro_adda


def test_other_packages_primitives_are_in_it(monkeypatch):
    monkeypatch.setattr(names, "_infos", dict(names._infos))

    @register_primitive("from_elsewhere", stage="memory", kind="pointwise", zero_at="gate")
    class FromElsewhere(Primitive):
        """Adds the features once more.

        Biology: none.

        Equation: delta = factor x.

        Reference: none.
        """

        factor: float = setting(1.0, low=0.0, high=2.0, meaning="how much is added")

        def transform(self, x, context):
            return self.factor * x

    entry = catalogue.from_elsewhere(factor=2)
    assert entry == {"name": "from_elsewhere", "factor": 2.0} and BioConfig(entry).primitives[0]["factor"] == 2.0
    assert build_primitive("from_elsewhere", 4, 4, factor=2).factor == 2.0


# -- what editors read --


def test_the_stubs_are_what_the_registry_says():
    spec = importlib.util.spec_from_file_location("stubs", STUBS)
    stubs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stubs)
    for path, content in stubs.STUBS.items():
        assert path.read_text(encoding="utf-8") == content(), f"{path.name} is stale: make stubs"


@pytest.mark.parametrize("name", ready.__all__)
def test_a_published_method_shows_its_settings(name):
    function = getattr(bioadapt, name)
    (entry,) = function().primitives
    parameters = inspect.signature(function).parameters
    assert set(primitive_info(entry["name"]).settings) <= set(parameters)
    assert {field.name for field in dataclasses.fields(BioConfig)} - {"primitives"} <= set(parameters)
    for word in primitive_info(entry["name"]).settings:
        assert parameters[word].default == entry[word]
