"""Loading is one transaction: an earlier state comes back, and what is not the saved adapter is refused in full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import peft.peft_model
import pytest
import torch
from helpers.models import (
    adapted,
    awake,
    base_and_inputs,
    bert,
    classifier,
    close,
    output,
    own_parameters,
    record,
    step,
    tokens,
    unchanged,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from bioadapt import BioConfig, checkpoint
from bioadapt.checkpoint import CONTAINER

INPUTS = tokens()
SITES = ["query", "output.dense"]
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")


def stateful(**fields) -> PeftModel:
    """An adapter with parameters, learned buffers and indices."""
    torch.manual_seed(0)
    return get_peft_model(bert(), awake(["neuro_ada", "homeostatic_scaling", "lateral_inhibition"], SITES, **fields))


def injected() -> torch.nn.Module:
    torch.manual_seed(0)
    model = bert()
    model.add_adapter(awake(["neuro_ada", "lateral_inhibition"], SITES))
    return model


def edit(folder: Path, **fields) -> None:
    content = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**content, **fields}))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


# -- earlier states --


@pytest.mark.parametrize("after", ["save", "state dict"])
def test_an_earlier_folder_comes_back(after, tmp_path):
    model = stateful()
    first = output(model, INPUTS)
    model.save_pretrained(tmp_path / "first")
    step(model, INPUTS)
    model.save_pretrained(tmp_path / "second") if after == "save" else get_peft_model_state_dict(model)
    assert not close(output(model, INPUTS), first, 1e-3)
    model.load_adapter(tmp_path / "first", "default")
    assert close(output(model, INPUTS), first, 1e-6)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("make", [stateful, injected])
def test_an_earlier_state_dict_comes_back(make, loaded, tmp_path):
    model = make()
    if loaded:
        model.save_pretrained(tmp_path)
        if make is stateful:
            model = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
        else:
            model = bert()
            model.load_adapter(tmp_path, is_trainable=True)
    first = output(model, INPUTS)
    kept = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    step(model, INPUTS)
    get_peft_model_state_dict(model)
    assert not close(output(model, INPUTS), first, 1e-3)
    set_peft_model_state_dict(model, kept)
    assert close(output(model, INPUTS), first, 1e-6)


def test_states_can_be_averaged_between_models():
    models = [stateful(), stateful()]
    states = []
    for rate, model in enumerate(models, 1):
        step(model, INPUTS, rate=0.05 * rate)
        states.append(get_peft_model_state_dict(model))
    first, second = states
    mean = {key: (a + second[key]) / 2 if a.is_floating_point() else a for key, a in first.items()}
    for model in models:
        set_peft_model_state_dict(model, mean)
    assert torch.equal(output(models[0], INPUTS), output(models[1], INPUTS))
    own = get_peft_model_state_dict(models[0])
    assert all(torch.equal(own[key], tensor) for key, tensor in mean.items())


@pytest.mark.parametrize("make", [stateful, injected])
def test_getting_a_state_dict_leaves_the_configuration_alone(make):
    model = make()
    before = dict(vars(model.peft_config["default"]))
    get_peft_model_state_dict(model)
    assert dict(vars(model.peft_config["default"])) == before


def test_a_file_written_by_hand_from_a_loaded_and_trained_adapter_loads(tmp_path):
    stateful().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
    step(model, INPUTS)
    wanted = output(model, INPUTS)
    save_file(get_peft_model_state_dict(model), tmp_path / SAFETENSORS_WEIGHTS_NAME)
    model.peft_config["default"].save_pretrained(tmp_path)
    assert close(output(PeftModel.from_pretrained(bert(), tmp_path), INPUTS), wanted, 1e-6)


def test_tensors_of_another_function_are_not_put_into_an_adapter(tmp_path):
    stateful(composition="serial").save_pretrained(tmp_path)
    model = stateful()
    with unchanged(model), pytest.raises(ValueError, match="composition='serial'.*composition='staged'"):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "other")


def test_transformers_loads_from_memory_with_the_same_checks():
    model = injected()
    wanted, config = output(model, INPUTS), model.peft_config["default"]
    for prefix in ("", "base_model.model."):
        state = {prefix + key: tensor for key, tensor in get_peft_model_state_dict(model).items()}
        again = bert()
        again.load_adapter(peft_config=config, adapter_state_dict=state)
        assert close(output(again, INPUTS), wanted, 1e-6)
        state.popitem()
        base = bert()
        with unchanged(base), pytest.raises(ValueError, match="1 missing"):
            base.load_adapter(peft_config=config, adapter_state_dict=state)


# -- each file once --


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "existing", "transformers"])
def test_tensors_are_read_and_hashed_once(way, tmp_path, monkeypatch):
    model = stateful()
    model.save_pretrained(tmp_path)
    reads, hashes = [], []
    read, hashed = peft.utils.save_and_load.safe_load_file, checkpoint.fingerprint
    monkeypatch.setattr(
        peft.utils.save_and_load, "safe_load_file", lambda *args, **named: reads.append(args) or read(*args, **named)
    )
    monkeypatch.setattr(checkpoint, "fingerprint", lambda tensors: hashes.append(tensors) or hashed(tensors))
    if way == "from_pretrained":
        PeftModel.from_pretrained(bert(), tmp_path)
    elif way == "transformers":
        bert().load_adapter(tmp_path)
    else:
        model.load_adapter(tmp_path, "default" if way == "existing" else "other")
    assert len(reads) == len(hashes) == 1


# -- what is not the saved adapter --

WAYS = ["PEFT", "load_adapter", "transformers", "over a LoRA"]
BOTH = ["PEFT", "transformers"]


def loading(way: str, folder, base=bert):
    """A model, and a call that loads the folder into it."""
    if way == "PEFT":
        model = base()
        return model, lambda: PeftModel.from_pretrained(model, folder)
    if way == "transformers":
        model = base()
        return model, lambda: model.load_adapter(folder)
    if way == "over a LoRA":
        under = get_peft_model(base(), LoraConfig(target_modules=["value"]), "lora")
        return under, lambda: PeftModel.from_pretrained(under, folder)
    model = get_peft_model(base(), awake(["lateral_inhibition"], ["value"]), "first")
    return model, lambda: model.load_adapter(folder, "second")


EDITS = {
    "causal": True,
    "composition": "serial",
    "seed": 4,
    "target_modules": ["output.dense"],
    "init_weights": True,
    "modules_to_save": ["pooler"],
    "task_type": "CAUSAL_LM",
    "exclude_modules": ["layer.0.output.dense"],
    "order": None,
    "setting": None,
    "dropped": None,
}


@pytest.mark.parametrize(
    ("field", "way"), [*((field, way) for field in EDITS for way in BOTH), *(("dropped", way) for way in WAYS[1::2])]
)
def test_an_edited_configuration_is_refused(field, way, tmp_path):
    stateful().save_pretrained(tmp_path)
    entries = json.loads((tmp_path / CONFIG_NAME).read_text())["primitives"]
    if field == "order":
        edit(tmp_path, primitives=entries[::-1])
    elif field == "setting":
        edit(tmp_path, primitives=[{**entries[0], "zero_scale": 0.5 * entries[0]["zero_scale"]}, *entries[1:]])
    elif field == "dropped":
        edit(tmp_path, primitives=entries[:-1])
    else:
        edit(tmp_path, **{field: EDITS[field]})
    model, call = loading(way, tmp_path)
    with unchanged(model), pytest.raises(ValueError, match="was changed since it was saved.*settings_fingerprint"):
        call()


def test_what_describes_an_adapter_may_be_edited(tmp_path):
    model = stateful()
    model.save_pretrained(tmp_path)
    edit(tmp_path, base_model_name_or_path="moved/elsewhere", revision="main", inference_mode=False)
    assert close(output(PeftModel.from_pretrained(bert(), tmp_path), INPUTS), output(model, INPUTS), 1e-6)


HURT = {
    "weights missing": lambda folder: (folder / SAFETENSORS_WEIGHTS_NAME).unlink(),
    "malformed trained_over": lambda folder: edit(folder, trained_over={"adapters": [3]}),
    "trained_over is text": lambda folder: edit(folder, trained_over="a LoRA"),
    "a place outside": lambda folder: edit(
        folder,
        trained_over={"base": None, "adapters": [dict(name="a", peft_type="LORA", fingerprint="", saved_in="../../a")]},
    ),
    "not json": lambda folder: (folder / CONFIG_NAME).write_text("{"),
    "head without tensors": lambda folder: edit(folder, modules_to_save=["pooler"], settings_fingerprint=None),
    "unknown task": lambda folder: edit(folder, task_type="POETRY", settings_fingerprint=None),
}


@pytest.mark.parametrize(
    ("how", "way"), [*((how, way) for how in HURT for way in BOTH), *(("weights missing", way) for way in WAYS[1::2])]
)
def test_a_refusal_leaves_the_model_as_it_was(how, way, tmp_path):
    stateful().save_pretrained(tmp_path)
    HURT[how](tmp_path)
    model, call = loading(way, tmp_path)
    with unchanged(model), pytest.raises(ValueError):
        call()
    if way == "transformers":
        assert not model._hf_peft_config_loaded


def test_a_task_that_the_model_cannot_do_leaves_the_model_as_it_was(tmp_path):
    stateful().save_pretrained(tmp_path)
    edit(tmp_path, task_type="CAUSAL_LM", settings_fingerprint=None)
    model = bert()
    with unchanged(model), pytest.raises(ValueError, match="task_type='CAUSAL_LM': BertModel generates nothing"):
        PeftModel.from_pretrained(model, tmp_path)


def test_an_interrupted_loading_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    stateful().save_pretrained(tmp_path)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(peft.peft_model, "set_peft_model_state_dict", interrupted)
    model = bert()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        PeftModel.from_pretrained(model, tmp_path)


FOREIGN = {
    "word embeddings": ("embeddings.word_embeddings.weight", (30, 16)),
    "a weight of the base": ("encoder.layer.0.attention.self.value.weight", (16, 16)),
    "a LoRA below": ("encoder.layer.0.attention.self.value.lora_A.lora.weight", (8, 16)),
    "another adapter's": ("encoder.layer.0.attention.self.value.nrn_circuit.first.lateral_inhibition.gate", (16,)),
    "of another shape": ("pooler.dense.weight", (3,)),
    "unknown": ("x.y", (2,)),
}


@pytest.mark.parametrize("sealed", [True, False], ids=["fingerprint as saved", "no fingerprint"])
@pytest.mark.parametrize(
    ("kind", "way"),
    [*((kind, way) for kind in FOREIGN for way in BOTH), *(("a LoRA below", way) for way in WAYS[1::2])],
)
def test_a_file_writes_into_nothing_that_is_not_its_own(kind, sealed, way, tmp_path):
    stateful().save_pretrained(tmp_path)
    key, shape = FOREIGN[kind]
    rewrite(tmp_path, lambda tensors: tensors.update({f"base_model.model.{key}": torch.zeros(shape)}))
    if not sealed:
        if kind == "word embeddings":
            pytest.skip("PEFT saves these where they were resized, and whoever takes the fingerprint out wants them")
        edit(tmp_path, fingerprint=None)
    model, call = loading(way, tmp_path)
    with (
        unchanged(model),
        pytest.raises(ValueError, match="does not hold the tensors" if sealed else "without a place"),
    ):
        call()


@pytest.mark.parametrize("way", BOTH)
def test_embeddings_that_were_saved_on_purpose_load_and_are_known(way, tmp_path):
    model = stateful()
    model.get_base_model().embeddings.word_embeddings.weight.data += 1
    wanted = output(model, INPUTS)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base, call = loading(way, tmp_path)
    loaded = call() if way == "PEFT" else call() and base
    assert close(output(loaded, INPUTS), wanted, 1e-6)
    rewrite(tmp_path, lambda t: t["base_model.model.embeddings.word_embeddings.weight"].mul_(2))
    base, call = loading(way, tmp_path)
    with unchanged(base), pytest.raises(ValueError, match="does not hold the tensors"):
        call()


def test_a_state_dict_in_memory_with_foreign_keys_is_refused():
    model = stateful()
    state = get_peft_model_state_dict(model)
    for key in ("base_model.model.encoder.layer.0.attention.self.value.weight", "base_model.model.x"):
        with unchanged(model), pytest.raises(ValueError, match="1 without a place"):
            set_peft_model_state_dict(model, {**state, key: torch.zeros(16, 16)})


@pytest.mark.parametrize("way", WAYS)
def test_a_head_of_another_shape_is_refused_by_name(way, tmp_path):
    torch.manual_seed(0)
    config = awake(["lateral_inhibition"], SITES, modules_to_save=["classifier"])
    get_peft_model(classifier(), config).save_pretrained(tmp_path)
    key = "base_model.model.classifier.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({key: torch.zeros(5, 16)}))
    edit(tmp_path, fingerprint=None)
    model, call = loading(way, tmp_path, classifier)
    with unchanged(model), pytest.raises(ValueError, match=r"classifier.*\(5, 16\).*\(3, 16\)"):
        call()


# -- indices --

INDEXED = {
    "neuro_ada": ({"row_fraction": 0.5}, ["index", "rows"]),
    "gap_junction": ({}, ["order"]),
    "dale_small_world": ({}, ["senders"]),
    "nmda_branches": ({}, ["branch"]),
    "cerebellar_granule": ({}, ["wiring"]),
}


@pytest.mark.parametrize("value", [-1, 10**6])
@pytest.mark.parametrize(("name", "buffer"), [(name, b) for name, (_, found) in INDEXED.items() for b in found])
def test_an_index_out_of_range_is_refused(name, buffer, value, tmp_path):
    model = get_peft_model(bert(), awake([{"name": name, **INDEXED[name][0]}], SITES))
    wanted = output(model, INPUTS)
    model.save_pretrained(tmp_path)
    assert close(output(PeftModel.from_pretrained(bert(), tmp_path), INPUTS), wanted, 1e-6)

    def hurt(tensors):
        tensors[next(key for key in tensors if key.endswith(f".{name}.{buffer}"))].view(-1)[-1] = value

    rewrite(tmp_path, hurt)
    edit(tmp_path, fingerprint=None)
    for way in ("PEFT", "transformers"):
        base, call = loading(way, tmp_path)
        with unchanged(base), pytest.raises(ValueError, match=f"{name}.*{buffer}.*{value}.*from 0 to"):
            call()
    state = get_peft_model_state_dict(model)
    state = {key: tensor.clone() for key, tensor in state.items()}
    hurt(state)
    with unchanged(model), pytest.raises(ValueError, match=f"{name}.*{buffer}"):
        set_peft_model_state_dict(model, state)


# -- older files --


def test_files_without_a_fingerprint_of_the_settings_are_checked_as_they_were(tmp_path):
    model = stateful(modules_to_save=["pooler"])
    model.save_pretrained(tmp_path)
    edit(tmp_path, settings_fingerprint=None)
    assert close(output(PeftModel.from_pretrained(bert(), tmp_path), INPUTS), output(model, INPUTS), 1e-6)
    rewrite(tmp_path, lambda tensors: tensors["base_model.model.pooler.dense.weight"].neg_())
    base = bert()
    with unchanged(base), pytest.raises(ValueError, match="does not hold the tensors"):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize(("primitive", "path"), [("sequence_memory", "model.embed_tokens"), ("logogen", "lm_head")])
def test_an_embedding_or_head_that_is_adapted_is_not_saved_along(primitive, path, tmp_path):
    """PEFT saves it whole beside a LoRA that sits there, and does so beneath a bio adapter as well."""
    model_config = Qwen2Config(vocab_size=50, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    lora = get_peft_model(Qwen2ForCausalLM(model_config), LoraConfig(target_modules=[path.rpartition(".")[2]]))
    expected = get_peft_model_state_dict(lora)
    model = get_peft_model(lora, BioConfig(primitive))
    model.save_pretrained(tmp_path)
    own = f"base_model.model.{path}.{CONTAINER}.{primitive}."
    assert all(key.startswith(own) for key in load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME))
    under = get_peft_model_state_dict(lora)
    assert under.keys() == expected.keys() and f"base_model.model.{path}.base_layer.weight" in under


def test_embeddings_that_an_older_fingerprint_leaves_out_are_named(tmp_path):
    model = stateful()
    model.save_pretrained(tmp_path)
    own = json.loads((tmp_path / CONFIG_NAME).read_text())["fingerprint"]
    model.get_base_model().embeddings.word_embeddings.weight.data += 1
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    edit(tmp_path, settings_fingerprint=None, fingerprint=own)
    for way in BOTH:
        base, call = loading(way, tmp_path)
        with pytest.warns(UserWarning, match="embeddings.word_embeddings.weight of the base.*does not cover"):
            loaded = call() if way == "PEFT" else call() and base
        assert close(output(loaded, INPUTS), output(model, INPUTS), 1e-6)


# -- killed while saving --

LOOP = """
import sys
import torch
from peft import get_peft_model
from helpers.models import adapted, base_and_inputs
model, _ = adapted("mlp", "mergeable weight")
print("ready", flush=True)
while True:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 1
    model.save_pretrained(sys.argv[1])
"""


def test_killed_while_saving_one_adapter_is_there(tmp_path):
    model, _ = adapted("mlp", "mergeable weight")
    model.save_pretrained(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    for attempt in range(2):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", LOOP, str(tmp_path)], stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(0.3 + 0.0137 * attempt)
        process.kill()
        process.wait()
        process.stdout.close()
        loaded = PeftModel.from_pretrained(base_and_inputs("mlp")[0], tmp_path)
        assert own_parameters(loaded) and record(loaded)
    assert BioConfig.from_pretrained(tmp_path).fingerprint
