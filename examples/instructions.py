"""Instruction tuning with TRL: supervised first (SFT), then by preferences (DPO), with one adapter of 2 % of the model.

    python examples/instructions.py [--quick]

The instruction is the name of a function of scikit-learn, the answer the first sentence of its docstring. Preferences
are between that sentence and the one of another function. Scores are on functions that were not trained on.
"""

# %%
import sys
import tempfile

from _descriptions import descriptions, small_language_model
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from bioadapt import BioConfig, BioTrainerCallback

quick = "--quick" in sys.argv

# %%
pairs = descriptions("sklearn", 24 if quick else 200)
rows = [
    {"prompt": f"What is {name}?", "completion": f" {sentence}", "other": f" {pairs[(place + 1) % len(pairs)][1]}"}
    for place, (name, sentence) in enumerate(pairs)
]
parts = {"train": [row for i, row in enumerate(rows) if i % 4], "test": rows[::4]}
answers = {
    name: Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in part])
    for name, part in parts.items()
}
preferences = {
    name: Dataset.from_list(
        [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["other"]} for row in part]
    )
    for name, part in parts.items()
}
language = small_language_model(quick)
common = dict(
    num_train_epochs=1 if quick else 3,
    per_device_train_batch_size=8,
    learning_rate=2e-3,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
)

# %%
scores = {}
with tempfile.TemporaryDirectory() as folder:
    supervised = SFTTrainer(
        language.model,
        args=SFTConfig(folder, **common),
        train_dataset=answers["train"],
        eval_dataset=answers["test"],
        processing_class=language.tokenizer,
        peft_config=BioConfig(["divisive_normalization", "lateral_inhibition"], task_type="CAUSAL_LM"),
        callbacks=[BioTrainerCallback()],
    )
    scores["loss before"] = supervised.evaluate()["eval_loss"]
    supervised.train()
    scores["loss after SFT"] = supervised.evaluate()["eval_loss"]
supervised.model.print_trainable_parameters()

# %%
with tempfile.TemporaryDirectory() as folder:
    by_preference = DPOTrainer(
        supervised.model,
        args=DPOConfig(folder, **common, beta=0.5),
        train_dataset=preferences["train"],
        eval_dataset=preferences["test"],
        processing_class=language.tokenizer,
        callbacks=[BioTrainerCallback()],
    )
    by_preference.train()
    scores["preferred after DPO"] = by_preference.evaluate()["eval_rewards/accuracies"]
for name, score in scores.items():
    print(f"{name}: {score:.3f}")
