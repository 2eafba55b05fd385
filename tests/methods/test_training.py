"""Losses that depend on parameters alone, in a loop of one's own, with `Trainer` and in TRL."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from bioadapt import BioTrainerCallback, NeuroLoraConfig, auxiliary_loss
from bioadapt.tuner.tree import bio_layers

SIZES = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
STEPS, ROWS, ACCUMULATED = 3, 2, 2


def classifier(orthogonality: float = 5.0):
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    config = NeuroLoraConfig(
        r=8,
        k=3,
        orthogonality=orthogonality,
        target_modules=["query", "value"],
        init_weights=False,
        task_type="SEQ_CLS",
    )
    return get_peft_model(base, config)


def examples() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    count = STEPS * ROWS * ACCUMULATED
    return [dict(input_ids=torch.randint(3, 50, (6,), generator=generator), labels=i % 2) for i in range(count)]


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "neuro_lora" in name}


def penalty(model) -> float:
    return sum(layer.circuits["default"]["neuro_lora"].penalty().item() for layer in bio_layers(model))


def test_the_auxiliary_loss_is_the_mean_over_the_layers():
    model = classifier()
    layers = list(bio_layers(model))
    torch.testing.assert_close(auxiliary_loss(model).item(), penalty(model) / len(layers))
    with model.disable_adapter():
        assert auxiliary_loss(model).item() == 0.0
    for parameter in model.parameters():
        parameter.requires_grad = False
    assert auxiliary_loss(model).item() == 0.0


@pytest.mark.compatible("Training", "transformers: Trainer")
def test_trainer_with_the_callback_does_what_the_loop_does(tmp_path):
    """The term counts once per step, however many batches the step is made of."""
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=ROWS, gradient_accumulation_steps=ACCUMULATED, max_steps=STEPS,
        learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    by_trainer = classifier()
    Trainer(by_trainer, arguments, train_dataset=examples(), callbacks=[BioTrainerCallback()]).train()
    by_hand = classifier().train()
    optimizer = torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], lr=0.1)
    rows = examples()
    for step in range(STEPS):
        for part in range(ACCUMULATED):
            start = (step * ACCUMULATED + part) * ROWS
            some = rows[start : start + ROWS]
            ids = torch.stack([row["input_ids"] for row in some])
            labels = torch.tensor([row["labels"] for row in some])
            (by_hand(input_ids=ids, labels=labels).loss / ACCUMULATED).backward()
        auxiliary_loss(by_hand).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = adapter(by_hand)
    for name, value in adapter(by_trainer).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    without = classifier()
    Trainer(without, arguments, train_dataset=examples()).train()
    assert any((value - expected[name]).abs().max() > 1e-3 for name, value in adapter(without).items())


@pytest.mark.compatible("Training", "TRL: SFT")
def test_the_penalty_falls_in_trl(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    words = {f"w{i}": i for i in range(40)} | {"<pad>": 40, "<eos>": 41}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="<pad>", eos_token="<eos>"
    )
    rows = datasets.Dataset.from_dict({"input_ids": [[(i + j) % 40 for j in range(8)] for i in range(16)]})
    found = {}
    for name, callbacks in (("without", []), ("with", [BioTrainerCallback()])):
        torch.manual_seed(0)
        base = GPT2LMHeadModel(GPT2Config(vocab_size=42, n_embd=16, n_layer=2, n_head=2, n_positions=16))
        config = NeuroLoraConfig(r=8, k=3, orthogonality=10.0, init_weights=False, target_modules=["c_attn"])
        model = get_peft_model(base, config)
        arguments = trl.SFTConfig(
            str(tmp_path / name), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2, report_to=[],
            save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False, max_length=8,
        )  # fmt: skip
        before = penalty(model)
        trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks).train()
        found[name] = penalty(model) / before
    assert found["with"] < 0.95 * found["without"]
