"""Bad input: one error that names what is wrong, the model as it was before the call, nothing half-written on disk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings

import numpy as np
import peft
import pytest
import torch
from helpers.models import (
    adapted,
    awake,
    base_and_inputs,
    bert,
    classifier,
    close,
    digest,
    gpt2,
    mlp,
    output,
    own_parameters,
    record,
    step,
    tokens,
    unchanged,
)
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from bioadapt import BioConfig, register_primitive, registry
from bioadapt.primitives.base import Primitive, setting

TARGETS = ["lin0", "lin1"]
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")


def refused(call, error, *words: str) -> str:
    """The message of the one error that ``call`` raises; it names every one of ``words``."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # an error is not announced by warnings
        warnings.filterwarnings("ignore", message="Already found a `peft_config`|You are trying to modify a model")
        with pytest.raises(error) as caught:
            call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


# -- configurations --

WRONG = [
    (dict(primitives=["lateral_inhibitoin"]), ["primitives[0]", "'lateral_inhibitoin'", "'lateral_inhibition'"]),
    (dict(primitives=["homeostatic_scaling", "lora"]), ["primitives[1]", "'lora'"]),
    (dict(primitives=[{"name": "neuro_ada", "kk": 3}]), ["primitives[0]", "'kk'", "'k'"]),
    (dict(primitives=[{"name": "neuro_ada", "k": 0}]), ["primitives[0]", "'k'", "from 1 to", "0"]),
    (dict(primitives=[{"name": "neuro_ada", "k": 2.5}]), ["'k'", "integer", "2.5"]),
    (dict(primitives=[{"name": "neuro_ada", "k": True}]), ["'k'", "True"]),
    (dict(primitives=[{"name": "neuro_ada", "k": "4"}]), ["'k'", "'4'"]),
    (dict(primitives=[{"name": "neuro_ada", "selection": "largest"}]), ["'selection'", "'magnitude'", "'largest'"]),
    (dict(primitives=[{"name": "homeostatic_scaling", "rate": float("nan")}]), ["'rate'", "nan"]),
    (dict(primitives=[{"name": "homeostatic_scaling", "rate": -0.1}]), ["'rate'", "-0.1"]),
    (dict(primitives=[]), ["primitives=[]", "list_primitives"]),
    (dict(primitives=b"neuro_ada"), ["primitives=b'neuro_ada'", "list"]),
    (dict(primitives=7), ["primitives=7", "list"]),
    (dict(primitives=None), ["primitives=None"]),
    (dict(primitives=[{"k": 3}]), ["primitives[0]", "'name'"]),
    (dict(primitives=[3]), ["primitives[0]=3"]),
    (dict(primitives=[{"name": 3}]), ["primitives[0]", "3"]),
    (dict(primitives=["neuro_ada", {"name": "neuro_ada", "k": 2}]), ["primitives[1]", "'neuro_ada'", "twice"]),
    (dict(primitives=["synaptic_scaling", "homeostatic_scaling"]), ["'homeostatic_scaling'", "twice"]),
    (dict(rank=0), ["rank=0", "at least 1"]),
    (dict(rank=2.0), ["rank=2.0"]),
    (dict(rank="4"), ["rank='4'", "integer"]),
    (dict(seed="four"), ["seed='four'", "integer"]),
    (dict(seed=1.5), ["seed=1.5"]),
    (dict(seed=None), ["seed=None"]),
    (dict(causal="yes"), ["causal='yes'", "True, False"]),
    (dict(causal=1), ["causal=1"]),
    (dict(init_weights="no"), ["init_weights='no'", "True or False"]),
    (dict(inference_mode="off"), ["inference_mode='off'"]),
    (dict(revision=3), ["revision=3"]),
    (dict(peft_type="LORA"), ["peft_type='LORA'", "BIO"]),
    (dict(target_modules=3), ["target_modules=3", "list of names"]),
    (dict(target_modules=["lin0", 3]), ["target_modules", "3 is no name"]),
    (dict(target_modules=[""]), ["target_modules", "'' is no name"]),
    (dict(target_modules=[]), ["target_modules", "names no module", "None"]),
    (dict(exclude_modules=[None]), ["exclude_modules", "None is no name"]),
    (dict(modules_to_save=5), ["modules_to_save=5"]),
    (dict(layers_to_transform=-1), ["layers_to_transform=-1", "from 0"]),
    (dict(layers_to_transform=[0, 1.5]), ["layers_to_transform=1.5"]),
    (dict(auto_mapping=3), ["auto_mapping=3", "dict"]),
    (dict(primitives=[{"name": "neuro_ada", "selection": np.array(["random"])}]), ["'selection'", "'magnitude'"]),
    (dict(primitives=[{"name": "neuro_ada", "k": np.array([3, 4])}]), ["'k'", "integer"]),
    (dict(primitives=[{"name": "neuro_ada", "k": float("inf")}]), ["'k'", "inf"]),
    (dict(layers_to_transform="0"), ["layers_to_transform='0'"]),
    (dict(layers_to_transform=[]), ["layers_to_transform=[]"]),
    (dict(rank=True), ["rank=True"]),
    (dict(primitives=["neuro_ada"], rank=4), ["rank=4", "'neuro_ada'"]),
    (dict(composition="stages"), ["composition='stages'", "'staged'"]),
    (dict(target_modules="lin.*", layers_to_transform=[0]), ["layers_to_transform=[0]", "'lin.*'"]),
    (dict(layers_pattern="layers"), ["layers_pattern='layers'", "layers_to_transform"]),
    (dict(task_type="SEQ_CLASS"), ["SEQ_CLASS", "SEQ_CLS"]),
]


@pytest.mark.parametrize(("fields", "words"), WRONG, ids=lambda value: str(value)[:70])
def test_a_wrong_value_names_field_value_and_what_is_accepted(fields, words):
    refused(lambda: BioConfig(**{"primitives": ["lateral_inhibition"], **fields}), ValueError, *words)


def test_an_unknown_field_names_the_nearest():
    refused(
        lambda: BioConfig(primitives=["neuro_ada"], target_module=["q"]),
        TypeError,
        "'target_module'",
        "'target_modules'",
    )
    for words, said in (
        ({"r": 8}, "rank"),
        ({"lora_alpha": 16}, "zero_scale"),
        ({"lora_dropout": 0.1}, "fly_lora"),
        ({"learning_rate": 1e-3}, "TrainingArguments"),
    ):
        (name, value), *_ = words.items()
        refused(lambda w=words: BioConfig(["neuro_ada"], **w), TypeError, repr(name), repr(value), said)


# -- targets --


def test_a_target_that_matches_nothing_names_the_nearest():
    base, _ = base_and_inputs("mlp")
    for targets, near in ((["lim0"], "'lin0'"), ("lin.2", "'lin1'"), (["linear"], "'lin0'"), (["nowhere"], "lin0")):
        with unchanged(base):
            refused(lambda t=targets: get_peft_model(base, awake("pointwise", t)), ValueError, str(targets[0]), near)
    with unchanged(base):
        refused(
            lambda: get_peft_model(base, awake("pointwise", ["lin0"], exclude_modules=["lin0"])), ValueError, "lin0"
        )
    model, _ = adapted("mlp", "pointwise")
    with unchanged(model):
        refused(lambda: model.add_adapter("other", awake("pointwise", ["lim0"])), ValueError, "lim0", "'lin0'")


@pytest.mark.parametrize("targets", [["output.dense"], None])
def test_a_layer_that_is_not_there_names_those_that_are(targets):
    base = bert()
    there = len(base.encoder.layer)
    said = ", ".join(map(str, range(there)))
    for asked, absent in (([0, there], f"no layer {there} "), (99, "no layer 99 "), (range(98, 100), "98, 99")):
        config = awake("pointwise", targets, layers_to_transform=asked)
        with unchanged(base):
            refused(lambda c=config: get_peft_model(base, c), ValueError, "layers_to_transform=", absent, said)
    model = get_peft_model(base, awake("pointwise", targets, layers_to_transform=[0, there - 1]))
    reached = {int(layer.path.split(".")[2]) for layer in model.base_model.layers()}
    assert reached == {0, there - 1}


def test_a_population_is_no_larger_than_what_it_serves():
    base, _ = base_and_inputs("mlp")
    width = base.lin0.out_features
    with unchanged(base):
        refused(
            lambda: get_peft_model(base, awake("pointwise", ["lin0"], rank=width + 1)), ValueError, f"rank={width + 1}",
            f"{width} features", "lin0",
        )  # fmt: skip
    assert get_peft_model(base, awake("pointwise", ["lin0"], rank=width)).peft_config["default"].rank == width


def test_a_target_that_a_primitive_cannot_serve_is_refused_on_every_path():
    def config() -> BioConfig:
        return awake(["neuro_ada"], ["query", "word_embeddings", "LayerNorm"])

    base = bert()
    with unchanged(base):
        refused(lambda: get_peft_model(base, config()), ValueError, "neuro_ada", "cannot act on embeddings.")
    with unchanged(base):
        refused(lambda: base.add_adapter(config(), "taste"), ValueError, "neuro_ada", "cannot act on embeddings.")
    base.add_adapter(awake("pointwise"), "taste")  # after a refusal everything works
    with unchanged(base):
        refused(lambda: base.add_adapter(config(), "smell"), ValueError, "neuro_ada", "cannot act on embeddings.")
    under = get_peft_model(bert(), LoraConfig(target_modules=["query"]))
    with unchanged(under):
        refused(lambda: get_peft_model(under, config()), ValueError, "neuro_ada", "cannot act on embeddings.")
    model = get_peft_model(under, awake("pointwise"))
    with unchanged(model):
        refused(lambda: model.add_adapter("other", config()), ValueError, "neuro_ada", "cannot act on embeddings.")
    assert model.active_adapters == ["default"]


@pytest.fixture
def both_ways():
    """A primitive that mixes both ways along the token axis, for as long as the test runs."""

    @register_primitive("mean_over_all", stage="competition", kind="global", zero_at="gate")
    class MeanOverAll(Primitive):
        """Every token is drawn towards the mean of all.

        Biology: none, a test.

        Equation: delta = mean x - x.

        Reference: none.
        """

        strength: float = setting(1.0, low=0.0, high=1.0, meaning="share of the mean")

        def transform(self, x, context):
            return self.strength * (x.mean(1, keepdim=True) - x)

    yield "mean_over_all"
    del registry._infos["mean_over_all"]


def test_a_global_primitive_on_a_causal_model_is_refused_at_injection(both_ways):
    words = ["mean_over_all", "h.0.attn.c_attn", "later tokens"]
    for base in (gpt2(), gpt2().transformer):
        with unchanged(base):
            refused(lambda b=base: get_peft_model(b, awake([both_ways])), ValueError, *words)
    with unchanged(base):
        refused(lambda: base.add_adapter(awake([both_ways]), "taste"), ValueError, *words)
    under = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with unchanged(under):
        refused(lambda: get_peft_model(under, awake([both_ways])), ValueError, *words)
    encoder = bert()
    plain = output(encoder, tokens())
    assert not close(output(get_peft_model(encoder, awake([both_ways])), tokens()), plain, 1e-3)
    assert get_peft_model(gpt2(), awake([both_ways], causal=False)).peft_config  # who says so himself


def test_the_toy_is_gone():
    refused(lambda: BioConfig(primitives=["mean_over_all"]), ValueError, "mean_over_all")


# -- names --


def test_a_name_that_is_taken():
    model, _ = adapted("mlp", "pointwise")
    with unchanged(model):
        refused(lambda: model.add_adapter("default", awake("pointwise", TARGETS)), ValueError, "'default'")
    with unchanged(model):
        refused(
            lambda: model.base_model.inject_adapter(model.base_model.model, "default"), ValueError, "'default'", "taken"
        )
    injected = bert()
    injected.add_adapter(awake("pointwise"), "taste")
    with unchanged(injected):
        refused(lambda: injected.add_adapter(awake("pointwise"), "taste"), ValueError, "taste")
    with unchanged(injected):
        refused(lambda: get_peft_model(injected, awake("pointwise"), "taste"), ValueError, "'taste'", "'bio'")


# -- checkpoints --


def _saved(folder, safe: bool = True, **fields) -> PeftModel:
    model, _ = adapted("mlp", "mergeable weight", **fields)
    model.save_pretrained(folder, safe_serialization=safe)
    return model


def _rewrite(folder, change, honest: bool = True) -> None:
    """Change the tensors in a folder; ``honest``: without a fingerprint, as from a hand that knows what it does."""
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    if honest:
        _set(folder, fingerprint=None)


def _set(folder, **fields) -> None:
    """Change the configuration in a folder, as a hand that knows what it does."""
    content = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**content, "settings_fingerprint": None, **fields}))


GATE = "base_model.model.lin0.nrn_circuit.homeostatic_scaling.gate"
CHANGES = {
    "missing": (lambda t: t.pop(GATE), ["1 missing", GATE.removeprefix("base_model.model.")]),
    "all missing": (lambda t: t.clear(), ["8 missing"]),
    "extra": (lambda t: t.update({GATE + "s": t[GATE].clone()}), ["1 without a place", "gates", "did you mean"]),
    "extra, not ours": (lambda t: t.update({"base_model.model.x.w": torch.ones(2)}), ["without a place", "x.w"]),
    "of another layer": (
        lambda t: t.update({GATE.replace("lin0", "out"): t.pop(GATE)}), ["1 missing", "1 without a place", "out."],
    ),
    "wrong shape": (lambda t: t.update({GATE: torch.ones(3)}), ["lin0", "gate", "(3,)", "(16,)"]),
}  # fmt: skip


@pytest.mark.parametrize("path", ["from_pretrained", "meta", "load_adapter", "over a LoRA", "existing adapter"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_that_does_not_fit(change, path, tmp_path):
    _saved(tmp_path)
    act, words = CHANGES[change]
    _rewrite(tmp_path, act)
    model, call = _way(path, tmp_path)
    with unchanged(model):
        refused(call, ValueError, "does not fit", *words)


def _way(path, folder):
    """A model and a call that loads what is in ``folder`` into it."""
    if path in ("from_pretrained", "meta"):
        base, _ = base_and_inputs("mlp")
        return base, lambda: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=path == "meta")
    if path == "over a LoRA":
        under = get_peft_model(base_and_inputs("mlp")[0], LoraConfig(target_modules=["lin1", "out"]))
        return under, lambda: PeftModel.from_pretrained(under, folder)
    model, _ = adapted("mlp", "mergeable weight", seed=3)
    name = "other" if path == "load_adapter" else "default"
    return model, lambda: model.load_adapter(folder, name, is_trainable=True)


@pytest.mark.parametrize("path", ["from_pretrained", "load_adapter", "over a LoRA"])
@pytest.mark.parametrize("change", ["missing", "extra", "of another layer", "wrong shape"])
def test_a_checkpoint_that_was_changed_is_known_by_its_fingerprint(change, path, tmp_path):
    _saved(tmp_path)
    _rewrite(tmp_path, CHANGES[change][0], honest=False)
    model, call = _way(path, tmp_path)
    with unchanged(model):
        refused(call, ValueError, SAFETENSORS_WEIGHTS_NAME, "does not hold the tensors", "fingerprint")


@pytest.mark.parametrize("path", ["from_pretrained", "meta", "load_adapter", "over a LoRA"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("damage", ["flipped bit", "cut off", "cut to nothing", "not the format"])
def test_a_damaged_file(damage, safe, path, tmp_path):
    model = _saved(tmp_path, safe)
    file = tmp_path / (SAFETENSORS_WEIGHTS_NAME if safe else WEIGHTS_NAME)
    raw = bytearray(file.read_bytes())
    if damage == "flipped bit":
        key, tensor = next((k, t) for k, t in own_parameters(model).items() if k.endswith("gate"))
        place = raw.find(tensor.detach().numpy().tobytes())
        assert place > 0, key
        raw[place + 2] ^= 1
    elif damage == "not the format":
        raw = bytearray(b"not found" * 20)
    else:
        del raw[len(raw) // 2 if damage == "cut off" else 0 :]
    file.write_bytes(raw)
    _, call = found = _way(path, tmp_path)
    with unchanged(found[0]):
        refused(call, ValueError, file.name)
    assert file.read_bytes() == raw


def test_a_changed_head_is_known_too(tmp_path):
    model = get_peft_model(classifier(), awake("mergeable", task_type="SEQ_CLS"))
    step(model, tokens())
    model.save_pretrained(tmp_path)
    key = "base_model.model.classifier.weight"
    original = (tmp_path / SAFETENSORS_WEIGHTS_NAME).read_bytes()
    for change in (lambda t: t[key].neg_(), lambda t: t.pop(key)):
        _rewrite(tmp_path, change, honest=False)
        base = classifier()
        with unchanged(base):
            refused(lambda b=base: PeftModel.from_pretrained(b, tmp_path), ValueError, "does not hold the tensors")
        (tmp_path / SAFETENSORS_WEIGHTS_NAME).write_bytes(original)
    assert close(output(PeftModel.from_pretrained(classifier(), tmp_path), tokens()), output(model, tokens()), 1e-6)


def test_tensors_of_another_adapter_beside_a_configuration(tmp_path):
    _saved(tmp_path / "one")
    _saved(tmp_path / "two", seed=5)
    (tmp_path / "one" / SAFETENSORS_WEIGHTS_NAME).write_bytes(
        (tmp_path / "two" / SAFETENSORS_WEIGHTS_NAME).read_bytes()
    )
    base, _ = base_and_inputs("mlp")
    with unchanged(base):
        refused(lambda: PeftModel.from_pretrained(base, tmp_path / "one"), ValueError, "another adapter")


def test_a_refused_checkpoint_leaves_a_model_that_can_be_used(tmp_path):
    good = _saved(tmp_path / "good")
    _saved(tmp_path / "bad")
    _rewrite(tmp_path / "bad", CHANGES["missing"][0])
    base, inputs = base_and_inputs("mlp")
    refused(lambda: PeftModel.from_pretrained(base, tmp_path / "bad"), ValueError, "does not fit")
    loaded = PeftModel.from_pretrained(base, tmp_path / "good")
    refused(lambda: loaded.load_adapter(tmp_path / "bad", "other"), ValueError, "does not fit")
    refused(lambda: loaded.load_adapter(tmp_path / "bad", "default"), ValueError, "does not fit")
    assert close(output(loaded, inputs), output(good, inputs), 1e-6)
    loaded.load_adapter(tmp_path / "good", "other")
    assert set(loaded.peft_config) == {"default", "other"}


def test_a_checkpoint_of_a_deeper_model_does_not_fit(tmp_path):
    get_peft_model(bert(num_labels=2), awake("pointwise")).save_pretrained(tmp_path)
    _set(tmp_path, target_modules=["output.dense", "query"])
    base = bert()
    with unchanged(base):
        refused(lambda: PeftModel.from_pretrained(base, tmp_path), ValueError, "missing", "query")


# -- configurations from elsewhere --

FROM_NEWER = {"dendritic_depth": 3, "use_glia": True}


@pytest.mark.parametrize("loader", ["BioConfig", "PeftConfig", "PeftModel", "load_adapter", "transformers"])
def test_a_configuration_of_a_newer_version_is_refused_with_the_field(loader, tmp_path):
    get_peft_model(bert(), awake("pointwise")).save_pretrained(tmp_path)
    for name, value in FROM_NEWER.items():
        content = (tmp_path / CONFIG_NAME).read_text()
        _set(tmp_path, **{name: value})
        base = bert()
        model = get_peft_model(bert(), awake("pointwise"))
        calls = {
            "BioConfig": lambda: BioConfig.from_pretrained(tmp_path),
            "PeftConfig": lambda: PeftConfig.from_pretrained(tmp_path),
            "PeftModel": lambda base=base: PeftModel.from_pretrained(base, tmp_path),
            "load_adapter": lambda model=model: model.load_adapter(tmp_path, "other"),
            "transformers": lambda base=base: base.load_adapter(tmp_path),
        }
        with unchanged(base), unchanged(model):
            refused(calls[loader], TypeError, f"'{name}'", "newer version", "upgrade")
        (tmp_path / CONFIG_NAME).write_text(content)
    assert BioConfig.from_pretrained(tmp_path).primitives


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"primitives": [{"name": "glia", "depth": 2}]}, ["primitives[0]", "'glia'"]),
        ({"primitives": [{"name": "lateral_inhibition", "rank": 10**6}]}, ["'rank'", "1000000"]),
        ({"composition": "braided"}, ["composition='braided'"]),
    ],
)
def test_a_saved_configuration_with_a_wrong_value_is_refused(fields, words, tmp_path):
    _saved(tmp_path)
    _set(tmp_path, **fields)
    base, _ = base_and_inputs("mlp")
    with unchanged(base):
        refused(lambda: PeftModel.from_pretrained(base, tmp_path), ValueError, *words)


def test_a_folder_without_an_adapter(tmp_path):
    base, _ = base_and_inputs("mlp")
    with unchanged(base):
        refused(lambda: PeftModel.from_pretrained(base, tmp_path), ValueError, CONFIG_NAME)


@pytest.mark.parametrize("damage", ["changed", "cut off", "another adapter's"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_damaged_file_is_refused_by_transformers_own_loading_too(damage, beside, tmp_path):
    get_peft_model(bert(), awake("pointwise")).save_pretrained(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    weights = tmp_path / "bad" / SAFETENSORS_WEIGHTS_NAME
    if damage == "changed":
        save_file({key: value + 1e-3 for key, value in load_file(weights).items()}, weights)
    elif damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        other = get_peft_model(bert(), awake("pointwise"))
        step(other, tokens())
        other.save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / SAFETENSORS_WEIGHTS_NAME, weights)
    model = bert()
    if beside:
        model.load_adapter(tmp_path / "good", adapter_name="first")
    with unchanged(model):
        refused(lambda: model.load_adapter(tmp_path / "bad", adapter_name="taste"), ValueError, "bad", "adapter_model")
    assert list(getattr(model, "peft_config", {})) == (["first"] if beside else [])
    model.load_adapter(tmp_path / "good", adapter_name="taste")
    assert not any("_load_pretrained_model" in vars(module) for module in model.modules())


@pytest.mark.parametrize("beside", [False, True])
def test_a_part_that_the_file_lacks_is_refused_by_transformers_own_loading_too(beside, tmp_path):
    """It would report it and go on with an untrained part."""
    for name in ("good", "bad"):
        get_peft_model(bert(), awake("pointwise")).save_pretrained(tmp_path / name)
    _set(tmp_path / "bad", target_modules=["output.dense", "query"])
    model = bert()
    if beside:
        model.load_adapter(tmp_path / "good", adapter_name="first")
    with unchanged(model):
        refused(
            lambda: model.load_adapter(tmp_path / "bad", adapter_name="taste"),
            ValueError,
            "'taste'",
            "missing",
            "query",
        )
    model.load_adapter(tmp_path / "good", adapter_name="taste")


# -- saving that is cut off --


class CutOff(OSError):
    pass


def _raise(*args, **kwargs):
    raise CutOff("no space left on device")


def _content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["writing", "replacing", "turning into json"])
def test_a_configuration_is_written_whole_or_not_at_all(where, tmp_path, monkeypatch):
    model = _saved(tmp_path)
    before = _content(tmp_path)

    def write_half(path, text, **kwargs):
        path.write_bytes(text[: len(text) // 2].encode())
        _raise()

    target, name, broken = {
        "writing": ("pathlib.Path", "write_text", write_half),
        "replacing": ("os", "replace", _raise),
        "turning into json": ("json", "dumps", _raise),
    }[where]
    monkeypatch.setattr(f"{target}.{name}", broken)
    with pytest.raises(CutOff):
        model.peft_config["default"].save_pretrained(tmp_path)
    with pytest.raises(CutOff):
        model.peft_config["default"].save_pretrained(tmp_path / "new")
    monkeypatch.undo()
    assert _content(tmp_path) == before
    base, inputs = base_and_inputs("mlp")
    assert close(output(PeftModel.from_pretrained(base, tmp_path), inputs), output(model, inputs), 1e-6)


def test_a_save_that_is_cut_off_before_the_tensors_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = _saved(tmp_path)
    inputs = base_and_inputs("mlp")[1]
    wanted = output(model, inputs)
    step(model, inputs)
    monkeypatch.setattr(peft.peft_model, "safe_save_file", _raise)
    with pytest.raises(CutOff):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    loaded = PeftModel.from_pretrained(base_and_inputs("mlp")[0], tmp_path)
    assert close(output(loaded, inputs), wanted, 1e-6)


@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("name", ["default", "other"])
def test_a_save_that_is_cut_off_anywhere_leaves_one_adapter_whole(name, call, tmp_path, monkeypatch):
    """Each file is put in its place by one `os.replace`; a process can be killed before any of them."""
    base, inputs = base_and_inputs("mlp")
    model = get_peft_model(base, awake("mergeable weight", TARGETS), name)
    model.save_pretrained(tmp_path, safe_serialization=False)
    old = output(model, inputs)
    step(model, inputs)
    new = output(model, inputs)
    replace, calls = os.replace, iter(range(call))

    def cut_off(*args):
        return replace(*args) if next(calls, None) is not None else _raise()

    monkeypatch.setattr(os, "replace", cut_off)
    with contextlib.suppress(CutOff):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    folder = tmp_path if name == "default" else tmp_path / name
    found = output(PeftModel.from_pretrained(base_and_inputs("mlp")[0], folder), inputs)
    assert close(found, old, 1e-6) != close(found, new, 1e-6)
    assert close(found, new, 1e-6) == (call > 2)  # once everything is written, what is left to be moved is moved
    model.save_pretrained(tmp_path)
    assert close(output(PeftModel.from_pretrained(base_and_inputs("mlp")[0], folder), inputs), new, 1e-6)
    assert not list(tmp_path.rglob(".saving")) and not list(tmp_path.rglob(WEIGHTS_NAME))


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("something")
    model, _ = adapted("mlp", "pointwise")
    with unchanged(model):
        refused(lambda: model.save_pretrained(tmp_path / "file"), ValueError, "file")
        refused(lambda: model.peft_config["default"].save_pretrained(tmp_path / "file"), ValueError, "file", "folder")
    assert (tmp_path / "file").read_text() == "something"


def test_saving_leaves_the_model_as_it_is(tmp_path):
    model, _ = adapted("mlp", "pointwise")
    model.save_pretrained(tmp_path)
    with unchanged(model):
        model.save_pretrained(tmp_path)


# -- what PEFT would let pass --


def test_errors_of_a_forward_do_not_stick():
    model = get_peft_model(gpt2(), awake(["predictive_coding"])).eval()
    wanted, before = output(model, tokens()), record(model)
    with pytest.raises(ValueError, match="attention_mask"):
        model(input_ids=tokens()["input_ids"], attention_mask=torch.ones(3, 1, 6, 6))
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 10**6))
    assert record(model) == before
    assert torch.equal(output(model, tokens()), wanted)


def test_a_model_that_was_refused_once_is_as_good_as_new():
    base, inputs = mlp().eval(), base_and_inputs("mlp")[1]
    before = digest(base.state_dict())
    for bad in (
        awake(["neuro_ada"], ["lin9"]),
        awake("pointwise"),
        awake(["neuro_ada"], TARGETS, causal=True, rank=None),
    ):
        bad.primitives[0]["k"] = 0  # changed after it was checked
        refused(lambda config=bad: get_peft_model(base, config), ValueError)
    model = get_peft_model(base, awake("pointwise", TARGETS))
    step(model, inputs)
    assert digest(model.unload().state_dict()) == before


def test_adapters_of_two_methods_are_not_mixed_and_the_way_to_have_both_is_named():
    lora = LoraConfig(r=2, target_modules=TARGETS)
    bio = get_peft_model(mlp(), BioConfig("lateral_inhibition", target_modules=TARGETS))
    refused(lambda: bio.add_adapter("second", lora), ValueError, "no LORA can be added", "bio_config)")
    below = get_peft_model(mlp(), lora)
    refused(
        lambda: below.add_adapter("second", BioConfig("lateral_inhibition", target_modules=TARGETS)),
        ValueError, "carries a LORA", "get_peft_model(model, bio_config)",
    )  # fmt: skip
    bio.add_adapter("second", BioConfig("shunting_inhibition", target_modules=TARGETS))


def test_names_that_are_offered_are_those_of_layers():
    with pytest.warns(UserWarning, match="no module is called so") as said:
        get_peft_model(mlp(), BioConfig("lateral_inhibition", target_modules=["lin0", "q_proj"]))
    (text,) = [str(one.message) for one in said if "called so" in str(one.message)]
    assert "accepted: " in text and "lin1" in text and "base_layer" not in text and ": ," not in text
