"""Instruction tuning with TRL: supervised first (SFT), then by preferences (DPO), with one adapter of 2 % of the model.

    python examples/instructions.py [--quick]

The instruction is the name of a function of scikit-learn, the answer the first sentence of its docstring. That sentence
is preferred to the same words in another order. Scores are on functions that were not trained on; chance gets half of
the preferences right.
"""

# %%
import random
import sys
import tempfile

from _descriptions import descriptions, small_language_model
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from bioadapt import BioConfig, BioTrainerCallback

quick = "--quick" in sys.argv

# %%
pairs = descriptions("sklearn", 24 if quick else 200)
parts = {"train": [pair for i, pair in enumerate(pairs) if i % 4], "test": pairs[::4]}
answers = {
    name: Dataset.from_list([{"prompt": f"What is {named}?", "completion": f" {said}"} for named, said in part])
    for name, part in parts.items()
}
shuffled = random.Random(0)


def in_disorder(sentence: str) -> str:
    words = sentence.split()
    return " ".join(shuffled.sample(words, len(words)))


preferences = {
    name: Dataset.from_list(
        [
            {"prompt": f"What is {named}?", "chosen": f" {said}", "rejected": f" {in_disorder(said)}"}
            for named, said in part
        ]
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
