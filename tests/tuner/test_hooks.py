"""What PEFT and trainers ask of every method: answered, or refused by name before anything has changed."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import disk_offload
from helpers.models import BERT, VOCAB, awake, bert, classifier, close, digest, gpt2, output, step, tokens, unchanged
from peft import LoraConfig, PeftModel, TaskType, TrainableTokensConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    BertConfig,
    PreTrainedTokenizerFast,
)

from bioadapt import BioConfig

HOOKS = {"target_parameters": ["experts.down_proj"], "ensure_weight_tying": True, "trainable_token_indices": [1, 2]}
ADVICE = {
    "target_parameters": "LoRA with target_parameters",
    "ensure_weight_tying": "tie_word_embeddings=False",
    "trainable_token_indices": "TrainableTokensConfig",
}
LORA = {"target_modules": ["c_attn"], "init_lora_weights": False}
pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a `peft_co")


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_is_not_served_says_what_to_do(name):
    with pytest.raises(TypeError, match=f"no field '{name}'.*{ADVICE[name]}"):
        BioConfig(["lateral_inhibition"], **{name: HOOKS[name]})


@pytest.mark.parametrize("name", HOOKS)
def test_a_file_that_asks_for_such_a_hook_is_refused(name, tmp_path):
    get_peft_model(bert(), awake()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: HOOKS[name]}))
    model = bert()
    for load in (lambda: PeftModel.from_pretrained(model, tmp_path), lambda: model.load_adapter(tmp_path)):
        with unchanged(model), pytest.raises(TypeError, match=ADVICE[name]):
            load()


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_was_written_into_the_configuration_is_refused(name):
    model, config = bert(), awake()
    setattr(config, name, HOOKS[name])
    with unchanged(model), pytest.raises(TypeError, match=ADVICE[name]):
        get_peft_model(model, config)


def test_the_adapter_sits_over_trained_tokens():
    tokens_config = TrainableTokensConfig(target_modules=["word_embeddings"], token_indices=[4, 5])
    under = get_peft_model(bert(), tokens_config, "below")
    model = get_peft_model(under, awake())
    before = output(model, tokens())
    step(model, tokens())
    assert not close(output(model, tokens()), before, 1e-3)
    assert model.unload() is under


# -- tasks --


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_a_task_that_the_model_cannot_do_leaves_it_as_it_was(task):
    model = bert()
    with unchanged(model), pytest.raises(ValueError, match=f"task_type='{task}': BertModel generates nothing"):
        get_peft_model(model, awake(task_type=task))


def test_whatever_fails_in_a_task_leaves_the_model_as_it_was(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("later")

    monkeypatch.setattr("peft.peft_model._set_trainable", fail)
    model = classifier()
    with unchanged(model), pytest.raises(RuntimeError, match="later"):
        get_peft_model(model, awake(task_type="TOKEN_CLS"))


@pytest.mark.parametrize(
    ("task", "kind", "head"),
    [
        (TaskType.TOKEN_CLS, AutoModelForTokenClassification, "classifier"),
        (TaskType.QUESTION_ANS, AutoModelForQuestionAnswering, "qa_outputs"),
    ],
)
def test_the_head_of_a_task_is_trained_and_saved(task, kind, head, tmp_path):
    def base():
        torch.manual_seed(0)
        return kind.from_config(BertConfig(**BERT))

    config = awake(task_type=task)
    model = get_peft_model(base(), config)
    assert config.modules_to_save is None and head in model.peft_config["default"].modules_to_save
    before = output(model, tokens()) if task == TaskType.TOKEN_CLS else None
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(f"{head}.modules_to_save.default" in name for name in trained)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert before is None or close(output(again, tokens()), before)


# -- reference adapters of preference training --


def policy(below: str = "below", trained: bool = False) -> PeftModel:
    under = get_peft_model(gpt2(), LoraConfig(**LORA), below)
    if not trained:
        under.requires_grad_(False)
    return get_peft_model(under, awake(["homeostatic_scaling", "predictive_coding"]))


@pytest.mark.parametrize(
    ("below", "trained", "reason"),
    [("default", False, "called 'default' too"), ("default", True, "called 'default' too"), ("below", True, "move")],
)
def test_a_reference_that_would_miss_what_lies_below_is_refused(below, trained, reason):
    model = policy(below, trained)
    with unchanged(model), pytest.raises(ValueError, match=reason):
        model.add_adapter("ref", model.peft_config["default"])


def test_an_adapter_of_another_purpose_may_be_called_ref():
    model = policy("default")
    model.add_adapter("ref", awake(["lateral_inhibition"]))
    model.set_adapter("ref")
    assert torch.isfinite(output(model, tokens())).all()


def trainer(model: PeftModel, folder):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w2", eos_token="w1", unk_token="w0")
    pairs = [{"prompt": "w3 w4", "chosen": " w5 w6", "rejected": " w7 w8 w9"}] * 4
    settings = DPOConfig(
        folder, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True, save_strategy="no",
    )  # fmt: skip
    return DPOTrainer(model, args=settings, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)


@pytest.mark.compatible("Training", "TRL: DPO over a LoRA")
def test_dpo_over_a_lora(tmp_path, record_property):
    pytest.importorskip("trl")
    with pytest.raises(ValueError, match='adapter_name="below"') as refusal:
        trainer(policy("default"), tmp_path)
    record_property("refused", str(refusal.value))
    model = policy("below")
    ours = trainer(model, tmp_path)
    before = digest(dict(model.named_parameters()))
    ours.train()
    losses = [entry["loss"] for entry in ours.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the reference starts where the policy does
    after = digest(dict(model.named_parameters()))
    moved = {name for name in before if after[name] != before[name]}
    assert moved and all(".nrn_circuit.default." in name for name in moved)


# -- a base whose weights lie on disk --


def on_disk(folder):
    model = gpt2()
    disk_offload(model, str(folder), execution_device="cpu", offload_buffers=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


@pytest.mark.compatible("Bases", "offloaded to disk")
@pytest.mark.parametrize(
    "name", ["neuro_ada", "heterosynaptic_scaling", "synaptic_pruning", "divisive_normalization", "predictive_coding"]
)
def test_an_adapter_over_an_offloaded_base_is_the_one_in_memory(name, tmp_path):
    outputs, saved = [], []
    for place in ("memory", "disk"):
        torch.manual_seed(0)
        base = gpt2() if place == "memory" else on_disk(tmp_path / "base")
        model = get_peft_model(base, awake([name], ["c_attn", "mlp.c_proj"]))
        outputs.append(output(model, tokens()))
        step(model, tokens(), steps=2, rate=0.01)
        outputs.append(output(model, tokens()))
        model.save_pretrained(tmp_path / place)
        saved.append(PeftModel.from_pretrained(gpt2(), tmp_path / place))
    in_memory, trained, offloaded, trained_offloaded = outputs
    assert close(offloaded, in_memory) and close(trained_offloaded, trained) and not close(trained, in_memory, 1e-4)
    assert close(output(saved[1], tokens()), trained)


def divided(folder):
    """A base of which `device_map` has put the second block onto the disk."""
    gpt2().save_pretrained(folder / "base")
    places = ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.ln_f", "lm_head"]
    places = dict.fromkeys(places, "cpu") | {"transformer.h.1": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder / "base", device_map=places, offload_folder=str(folder / "offloaded")
    )


@pytest.mark.compatible("Bases", "device_map, a part on disk")
def test_what_device_map_divides_is_adapted_trained_and_saved(tmp_path):
    model = get_peft_model(divided(tmp_path), awake(["lateral_inhibition", "neuro_ada"], ["c_attn"]))
    assert any(parameter.is_meta for parameter in model.parameters())
    before = output(model, tokens())
    step(model, tokens())
    assert not close(output(model, tokens()), before, 1e-4)
    model.save_pretrained(tmp_path / "adapter")
    assert close(output(PeftModel.from_pretrained(gpt2(), tmp_path / "adapter"), tokens()), output(model, tokens()))


@pytest.mark.compatible("Bases", "device_map, a part on disk")
def test_peft_loads_no_adapter_onto_what_device_map_divides(tmp_path, record_property, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where PEFT writes what it renames
    for config, folder in ((LoraConfig(**LORA), "lora"), (awake(["lateral_inhibition"], ["c_attn"]), "bio")):
        get_peft_model(gpt2(), config).save_pretrained(tmp_path / folder)
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            PeftModel.from_pretrained(divided(tmp_path), tmp_path / folder)
    record_property("limit", "PEFT loads no saved adapter onto it, a LoRA neither: load onto a base in memory")


@pytest.mark.compatible("Bases", "offloaded to disk")
def test_a_merge_into_offloaded_weights_is_refused(tmp_path, record_property):
    model = get_peft_model(on_disk(tmp_path), awake(["homeostatic_scaling"], ["c_attn"]))
    before = output(model, tokens())
    with pytest.raises(ValueError, match="is offloaded") as refusal:
        model.merge_adapter()
    record_property("refused", str(refusal.value))
    assert close(output(model, tokens()), before)


@pytest.mark.parametrize("name", ["neuro_ada", "heterosynaptic_scaling", "synaptic_pruning"])
def test_weights_that_have_no_values_yet_are_refused(name):
    model = gpt2().to("meta")
    modules = {path: type(module) for path, module in model.named_modules()}
    with pytest.raises(ValueError, match="load the weights of the base model first"):
        get_peft_model(model, awake([name], ["c_attn"]))
    assert {path: type(module) for path, module in model.named_modules()} == modules
