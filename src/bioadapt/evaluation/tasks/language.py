"""Tasks for causal language models: how well they foresee texts, and which of several answers they find likeliest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._extras import require
from ..statistics import Evaluation
from .files import Rows
from .overlap import normal_form
from .task import LANGUAGE, TableTask

if TYPE_CHECKING:
    from transformers import Trainer

    from ..models import LanguageModel

_BATCH = 16
_IGNORED = -100  # torch's label of what takes no part in the loss


class LanguageTask(TableTask):
    """Token sequences of which some tokens are asked for; trained with the usual loss on those."""

    reads = LANGUAGE

    def examples(self, model: LanguageModel, split: str) -> list[tuple[list[int], list[int]]]:
        """Token ids and labels of each training row; the label of what is not asked for is -100."""
        raise NotImplementedError

    def trainer(self, model: LanguageModel, arguments: Mapping[str, Any], callbacks: list[Any]) -> Trainer:
        library = require("transformers")
        examples = [{"input_ids": ids, "labels": labels} for ids, labels in self.examples(model, "train")]
        return library.Trainer(
            model=model.model,
            args=library.TrainingArguments(**arguments, remove_unused_columns=False),
            train_dataset=require("datasets").Dataset.from_list(examples),
            data_collator=lambda batch: padded([(row["input_ids"], row["labels"]) for row in batch]),
            callbacks=callbacks,
        )


class LanguageModellingTask(LanguageTask):
    """Perplexity of texts, each by itself, per token of the model's tokenizer: lower is better.

    Models with different tokenizers cannot be compared by it.
    """

    family = "language_modelling"
    metrics = ("perplexity",)
    columns = ("text",)
    text_columns = ("text",)

    def examples(self, model: LanguageModel, split: str) -> list[tuple[list[int], list[int]]]:
        sequences = (model.tokens(text) for text in self.rows(split)["text"])
        return [(ids, ids) for ids in sequences if len(ids) > 1]

    def evaluate(self, model: LanguageModel, split: str = "test") -> Evaluation:
        sequences = [model.tokens(text) for text in self.rows(split)["text"]]
        # A text of one token has no next token to predict: it adds neither loss nor tokens.
        rows = np.array([[loss.sum(), len(loss)] for loss in losses(model, [(ids, ids) for ids in sequences])])
        return self._evaluation({"perplexity": rows}, np.arange(len(rows)))


class MultipleChoiceTask(LanguageTask):
    """Accuracy of taking the choice that is likeliest after the context, by its summed log-likelihood.

    Columns: ``context``, ``choices`` (a list of texts, or in a file one text with " | " between them) and ``label``,
    the place of the right one from 0 on.
    """

    family = "multiple_choice"
    metrics = ("accuracy",)
    columns = ("context", "choices", "label")
    text_columns = ("context",)

    def _checked(self, rows: Rows, where: str) -> Rows:
        rows = super()._checked(rows, where)
        rows["choices"] = [given.split(" | ") if isinstance(given, str) else list(given) for given in rows["choices"]]
        for row, (label, choices) in enumerate(zip(rows["label"], rows["choices"], strict=True)):
            if not str(label).isdigit() or int(label) >= len(choices):
                raise ValueError(
                    f"{where}, row {row}: label={label!r}; accepted is a place from 0 to {len(choices) - 1}"
                )
        rows["label"] = [int(label) for label in rows["label"]]
        return rows

    def keys(self, split: str) -> list[Hashable]:
        return [(normal_form(context),) for context in self.rows(split)["context"]]

    def examples(self, model: LanguageModel, split: str) -> list[tuple[list[int], list[int]]]:
        rows = self.rows(split)
        return [
            _asked(model, context, choices[label])
            for context, choices, label in zip(rows["context"], rows["choices"], rows["label"], strict=True)
        ]

    def evaluate(self, model: LanguageModel, split: str = "test") -> Evaluation:
        rows = self.rows(split)
        asked = [
            _asked(model, context, choice)
            for context, choices in zip(rows["context"], rows["choices"], strict=True)
            for choice in choices
        ]
        summed = [float(loss.sum()) for loss in losses(model, asked)]
        gold, right, start = np.array(rows["label"]), [], 0
        for label, choices in zip(rows["label"], rows["choices"], strict=True):
            own = summed[start : start + len(choices)]
            right.append(float(int(np.argmin(own)) == label))
            start += len(choices)
        return self._evaluation({"accuracy": np.array(right)}, gold)


def _asked(model: LanguageModel, context: str, choice: str) -> tuple[list[int], list[int]]:
    answer = model.tokens(f" {choice}", start=False)
    before = model.tokens(context)[-max(1, model.length - len(answer)) :]
    return [*before, *answer], [_IGNORED] * len(before) + answer


@torch.no_grad()
def losses(model: LanguageModel, examples: Sequence[tuple[list[int], list[int]]]) -> list[np.ndarray]:
    """The loss of every asked token of each example, in nats; batches are of like lengths, whatever the order."""
    model.model.eval()
    order = sorted(range(len(examples)), key=lambda place: len(examples[place][0]))
    by_place: dict[int, np.ndarray] = {}
    for start in range(0, len(order), _BATCH):
        places = order[start : start + _BATCH]
        batch = {name: values.to(model.device) for name, values in padded([examples[p] for p in places]).items()}
        labels = batch.pop("labels")
        logits = model.model(**batch).logits[:, :-1].float()
        lost = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=_IGNORED, reduction="none"
        )
        for place, row, label in zip(places, lost.cpu(), labels[:, 1:].cpu(), strict=True):
            by_place[place] = row[label != _IGNORED].double().numpy()
    return [by_place[place] for place in range(len(examples))]


def padded(examples: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Examples as one batch, padded on the right."""
    width = max(len(ids) for ids, _ in examples)
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in examples]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples]),
        "labels": torch.tensor([labels + [_IGNORED] * (width - len(labels)) for _, labels in examples]),
    }
