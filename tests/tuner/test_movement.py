"""How far a training has moved the layers, and the warning where it is next to nothing."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from bioadapt import BioConfig, BioTrainerCallback
from bioadapt.tuner.movement import movement


def host():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            vocab_size=50,
            num_labels=2,
        )
    ).eval()


def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (32, 6), generator=generator)
    return [{"input_ids": row, "labels": (row[0] > 25).long()} for row in ids]


def test_the_movement_is_the_relative_change_of_each_layer():
    model = get_peft_model(host(), BioConfig(primitives=[{"name": "homeostatic_scaling", "zero_scale": 1.0}])).train()
    ids = torch.randint(3, 50, (2, 6))
    assert set(movement(model, lambda: model(ids)).values()) == {0.0}
    layers = [module for module in model.modules() if type(module).__name__ == "BioLinear"]
    with torch.no_grad():
        for layer in layers:
            primitive = layer.circuits["default"]["homeostatic_scaling"]
            primitive.scale.fill_(1.5)
            primitive.gate.fill_(0.1)  # 1 + 0.1 (1.5 - 1)
    found = movement(model, lambda: model(ids))
    outputs = [layer.path for layer in layers if not layer.circuits["default"].at_input]
    assert len(found) == len(layers) and len(outputs) == 4
    assert [found[path] for path in outputs] == pytest.approx([0.05] * 4, rel=1e-4)
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize("rate, still", [(1e-7, True), (1e-2, False)])
def test_a_training_that_hardly_moves_is_told_of_with_a_rate_to_try(tmp_path, rate, still):
    model = get_peft_model(host(), BioConfig(primitives=["lateral_inhibition"], task_type="SEQ_CLS"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=rate,
        lr_scheduler_type="constant",
        num_train_epochs=5,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[BioTrainerCallback()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(warning.message) for warning in caught if "hardly moved" in str(warning.message)]
    assert bool(told) == still
    if still:
        assert "learning_rate=1e-04" in told[0]
