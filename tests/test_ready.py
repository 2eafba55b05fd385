"""Ready configurations of the published methods: plain `BioConfig`s, told apart from nothing else once saved."""

from __future__ import annotations

import json

import pytest
from helpers.models import bert, close, output, tokens
from peft import PeftConfig, PeftModel, get_peft_model

from bioadapt import BioConfig, FlyLoraConfig, NeuroAdaConfig, NeuroLoraConfig, SanConfig

READY = {
    "fly_lora": (FlyLoraConfig, {"r": 8, "k": 2, "score": "signed"}),
    "neuro_lora": (NeuroLoraConfig, {"r": 8, "k": 2, "orthogonality": 0.5}),
    "neuro_ada": (NeuroAdaConfig, {"k": 3, "selection": "random"}),
    "san_scaling": (SanConfig, {"beta": True}),
}


@pytest.mark.parametrize("name", READY)
def test_it_is_a_plain_configuration_with_one_primitive(name):
    ready, settings = READY[name]
    config = ready(**settings, seed=3, exclude_modules=["value"])
    assert type(config) is BioConfig and config.target_modules == "all-linear"
    assert (config.seed, config.exclude_modules) == (3, {"value"})
    (entry,) = config.primitives
    assert entry["name"] == name and settings.items() <= entry.items()


@pytest.mark.parametrize("name", READY)
def test_it_acts_on_all_linear_layers_and_loads_as_what_it_was(name, tmp_path):
    ready, settings = READY[name]
    model = get_peft_model(bert(), ready(**settings, init_weights=False))
    paths = {path for path, module in model.named_modules() if hasattr(module, "circuits")}
    assert {path.rpartition(".")[2] for path in paths} == {"query", "key", "value", "dense"}
    expected = output(model, tokens())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BIO"
    assert type(PeftConfig.from_pretrained(tmp_path)) is BioConfig
    assert close(output(PeftModel.from_pretrained(bert(), tmp_path), tokens()), expected, 1e-6)


def test_wrong_names_and_values():
    with pytest.raises(TypeError, match="'rhoo' is no setting of fly_lora .* did you mean 'rho'"):
        FlyLoraConfig(rhoo=0.5)
    with pytest.raises(ValueError, match="k=9 is more than r=8"):
        FlyLoraConfig(r=8, k=9)
    with pytest.raises(ValueError, match="'k' must be an integer from 1"):
        NeuroAdaConfig(k=0)
