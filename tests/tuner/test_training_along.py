"""A LoRA that trains along with the bio adapter over it: saved beside it, and found again on every path."""

from __future__ import annotations

import itertools
import json
import warnings

import pytest
import torch
from helpers.models import awake, bert, classifier, close, digest, output, record, step, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import AutoModel, Trainer, TrainingArguments

from bioadapt.checkpoint import ALONG

INPUTS = tokens()
LORA = dict(target_modules=["query", "output.dense"], r=2)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*another method .such as a LoRA. trains along"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
]


def lora(base=None, **fields) -> PeftModel:
    base = bert() if base is None else base
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**{**LORA, **fields}))


def stack(under=None, **fields) -> PeftModel:
    torch.manual_seed(2)
    return get_peft_model(lora() if under is None else under, awake("pointwise", **fields))


def trained(model: PeftModel) -> torch.Tensor:
    """The output after some steps, in which every trainable tensor has moved."""
    before = digest(dict(model.named_parameters()))
    step(model, INPUTS)
    after = digest(dict(model.named_parameters()))
    assert all(before[key] != after[key] for key in before if "lora_" in key)
    return output(model, INPUTS)


@pytest.mark.parametrize("name", ["default", "taste"])
def test_it_is_saved_as_peft_itself_saves_it(name, tmp_path):
    model = stack(lora_under := get_peft_model(bert(), LoraConfig(**LORA), name))
    step(model, INPUTS)
    with pytest.warns(UserWarning, match=f"'{name}' of another method .such as a LoRA. trains along.*{ALONG}"):
        model.save_pretrained(tmp_path / "stack")
    lora_under.save_pretrained(tmp_path / "alone", selected_adapters=[name])
    alone = tmp_path / "alone" if name == "default" else tmp_path / "alone" / name
    for file in (SAFETENSORS_WEIGHTS_NAME, "adapter_config.json"):
        assert (tmp_path / "stack" / ALONG / name / file).read_bytes() == (alone / file).read_bytes()
    (entry,) = json.loads((tmp_path / "stack" / "adapter_config.json").read_text())["trained_over"]["adapters"]
    assert entry["name"] == name and entry["saved_in"] == f"{ALONG}/{name}"


def test_one_that_is_frozen_is_not_saved_again_and_an_earlier_copy_goes(tmp_path):
    model = stack()
    model.save_pretrained(tmp_path)
    assert (tmp_path / ALONG).is_dir()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.requires_grad = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert not (tmp_path / ALONG).exists()


def test_resumed_over_a_fresh_stack(tmp_path):
    model = stack()
    wanted = trained(model)
    model.save_pretrained(tmp_path)
    again = stack()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_adapter(tmp_path, "default", is_trainable=True)
    assert close(output(again, INPUTS), wanted, 1e-6)
    assert digest(again.state_dict()) == digest(model.state_dict())
    assert all(parameter.requires_grad for key, parameter in again.named_parameters() if "lora_" in key)


def test_loaded_over_the_lora_that_it_began_with(tmp_path):
    model = stack()
    model.base_model.under.save_pretrained(tmp_path / "lora")
    wanted = trained(model)
    model.save_pretrained(tmp_path / "bio")
    under = PeftModel.from_pretrained(bert(), tmp_path / "lora")
    with pytest.warns(UserWarning, match="was trained over .*LORA adapter 'default'.*values that 'default' had.*taken"):
        again = PeftModel.from_pretrained(under, tmp_path / "bio")
    assert close(output(again, INPUTS), wanted, 1e-6)


def test_loaded_over_what_was_saved_beside_it_nothing_is_said(tmp_path):
    model = stack()
    wanted = trained(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        under = PeftModel.from_pretrained(bert(), tmp_path / ALONG / "default")
        again = PeftModel.from_pretrained(under, tmp_path)
    assert close(output(again, INPUTS), wanted, 1e-6)


@pytest.mark.parametrize("way", ["PEFT", "transformers"])
def test_over_the_plain_base_it_is_said_where_the_lora_lies(way, tmp_path):
    stack().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"was trained over .*'default'.*loaded over a base.*{ALONG}/default.*merged"):
        PeftModel.from_pretrained(bert(), tmp_path) if way == "PEFT" else bert().load_adapter(tmp_path)


@pytest.mark.parametrize("way", ["PEFT", "transformers"])
def test_over_another_lora_both_are_named(way, tmp_path):
    stack().save_pretrained(tmp_path)
    before = None
    with pytest.warns(UserWarning, match="was trained over .*'default'.*but is loaded over .*'other'"):
        if way == "PEFT":
            under = get_peft_model(bert(), LoraConfig(target_modules=["query"], r=3), "other")
            before = digest(under.state_dict())
            PeftModel.from_pretrained(under, tmp_path)
            assert digest(under.state_dict()) == before
        else:
            model = bert()
            model.add_adapter(LoraConfig(target_modules=["query"], r=3), "other")
            model.load_adapter(tmp_path, adapter_name="bio")


def test_a_second_adapter_leaves_the_lora_of_the_first_alone(tmp_path):
    other = stack()
    trained(other)
    other.save_pretrained(tmp_path)
    model = stack()
    wanted = output(model, INPUTS)
    with pytest.warns(UserWarning, match="was trained over"):
        model.load_adapter(tmp_path, "second")
    assert torch.equal(output(model, INPUTS), wanted)


@pytest.fixture
def base(tmp_path) -> str:
    bert().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("names", [("default", "default"), ("lora", "bio")])
@pytest.mark.parametrize("way", ["AutoModel", "pipeline"])
def test_where_the_base_is_found_by_the_configuration_so_is_the_lora(way, names, base, tmp_path):
    under = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(**LORA), names[0])
    model = get_peft_model(under, awake("pointwise"), names[1])
    wanted = trained(model)
    model.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" / ("" if names[1] == "default" else names[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        again = AutoModel.from_pretrained(folder) if way == "AutoModel" else _pipeline_model(folder)
    assert close(output(again, INPUTS), wanted, 1e-6)


def _pipeline_model(folder):
    from transformers import BertTokenizerFast, pipeline

    vocabulary = folder.parent / "vocabulary.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]))
    return pipeline("feature-extraction", model=str(folder), tokenizer=BertTokenizerFast(str(vocabulary))).model


def test_a_stack_that_transformers_carries_is_saved_and_found(base, tmp_path):
    model = AutoModel.from_pretrained(base)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(**LORA), "lora")
    model.add_adapter(awake("pointwise"), "bio")
    model.set_adapter(["lora", "bio"])
    wanted = trained(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", adapter_name="bio")
    assert close(output(again, INPUTS), wanted, 1e-6)
    assert digest(again.state_dict()) == digest(model.state_dict())


def test_the_lora_of_a_head_comes_along_with_it(tmp_path):
    torch.manual_seed(0)
    under = get_peft_model(classifier(), LoraConfig(**LORA, modules_to_save=["classifier"]), "lora")
    model = get_peft_model(under, awake("pointwise"), "bio")
    wanted = trained(model)
    model.save_pretrained(tmp_path)
    under = PeftModel.from_pretrained(classifier(), tmp_path / "bio" / ALONG / "lora", "lora")
    again = PeftModel.from_pretrained(under, tmp_path / "bio", "bio")
    assert close(output(again, INPUTS), wanted, 1e-6)


# -- under Trainer --


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(3, 30, (6,), generator=generator), "labels": index % 3}


def _trainer(model, folder, **options) -> Trainer:
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=3, learning_rate=0.05, save_strategy="epoch",
        report_to=[], disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    falling = itertools.count(0, -1)
    return Trainer(
        model, arguments, train_dataset=Rows(), eval_dataset=Rows(), compute_metrics=lambda _: {"rank": next(falling)}
    )


def _classifying(seed: int = 1) -> PeftModel:
    torch.manual_seed(seed)
    under = get_peft_model(classifier(), LoraConfig(**LORA, task_type="SEQ_CLS"), "lora")
    return get_peft_model(under, awake("pointwise", modules_to_save=None))


@pytest.mark.compatible("Training", "transformers: Trainer, resuming with a LoRA that trains along")
def test_a_trainer_resumes_both(tmp_path):
    through = _classifying()
    _trainer(through, tmp_path / "through").train()
    resumed = _classifying(seed=5)
    _trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-4"))
    ours, theirs = resumed.state_dict(), through.state_dict()
    moved = [key for key in theirs if "lora_" in key or "nrn_" in key or "modules_to_save" in key]
    assert moved and all(close(ours[key], theirs[key], 1e-6) for key in moved)


def test_a_trainer_loads_the_best_of_both(tmp_path):
    model = _classifying()
    trainer = _trainer(
        model, tmp_path, eval_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="eval_rank",
        greater_is_better=True,  # the first is the best
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2"), trainer.state.log_history
    own = load_file(f"{best}/{SAFETENSORS_WEIGHTS_NAME}")
    along = load_file(f"{best}/{ALONG}/lora/{SAFETENSORS_WEIGHTS_NAME}")
    state = model.state_dict()
    for key, tensor in own.items():
        assert torch.equal(state[key.replace(".nrn_circuit.", ".nrn_circuit.default.")], tensor), key
    for key, tensor in along.items():
        if ".lora_" in key:
            assert torch.equal(state[key.replace(".weight", ".lora.weight")], tensor), key


def test_a_refused_bio_adapter_leaves_the_lora_below_as_it_was(tmp_path):
    model = stack()
    trained(model)
    model.save_pretrained(tmp_path)
    weights = tmp_path / SAFETENSORS_WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-8])
    again = stack()
    before = record(again)
    with pytest.raises(ValueError, match="cannot be read"):
        again.load_adapter(tmp_path, "default")
    assert record(again) == before
