"""GENbAIs' recipe in one call: the best LoRA, bio adapters over it that a search finds, and a plain encoder of both."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._extras import require
from ..evaluation import Evaluation, Task
from ..evaluation.tasks.overlap import normal_form
from ..evaluation.tasks.task import embeddings
from ..evaluation.training import Schedule, fit, load_encoder, trainable_parameters

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.console import Console
    from sentence_transformers import SentenceTransformer
    from torch import nn

STUDENT = "student"


@dataclass(frozen=True)
class Student:
    """A plain encoder that was trained to give the embeddings of an adapted one.

    Attributes:
        folder: where it is; ``SentenceTransformer(folder)`` loads it without bioadapt and without PEFT.
        parameters: how many numbers were trained: all of them, so that it is no rival to an adapter of a LoRA's size.
        agreement: mean cosine between its embeddings and the adapted encoder's on the validation texts, in percent.
        scores: its scores on test, in percent.
        taught: those of the adapted encoder that it was made from.
    """

    folder: str
    parameters: int
    agreement: float
    scores: dict[str, float]
    taught: dict[str, float]


def genbais(
    *,
    student_epochs: float = 2.0,
    student_rate: float = 5e-5,
    console: Console | None = None,
    **settings: Any,
) -> tuple[dict[str, Any], Student]:
    """Tune a LoRA, search bio adapters to stack over it, test them once, and distil the winner.

    The winner's model of the first test seed is distilled: a copy of the model as it comes is trained, all of it, to
    give that model's embeddings of the training texts, by mean squared error. Its rate and epochs are fixed beforehand,
    nothing is chosen by its scores. Every phase is kept in the output folder: the same call goes on where one was
    ended.

    Source: the README of the repository GENbAIs (Kaki, 2025 to 2026), which names these steps; no code of them was
    published. What its numbers compare is the model as it comes with LoRA and bio adapters together; the search here
    reports the tuned LoRA and the LoRA of the same size beside that.

    Args:
        student_epochs: how often the student sees the texts.
        student_rate: its learning rate, which decays to zero.
        console: where progress is shown.
        settings: fields of `bioadapt.search.SearchSettings`; ``lora`` is ``auto`` unless the folder of one is given.

    Returns:
        What the search records as ``final``, and the student.

    Raises:
        ValueError: wrong settings, or a ``lora`` of "none": the recipe stacks over one.
        RuntimeError: all workers have died, or no trial has succeeded.
    """
    from ..search.contest import Search
    from ..search.settings import NO_LORA, SearchSettings

    for name, value in (("student_epochs", student_epochs), ("student_rate", student_rate)):
        if not value > 0:
            raise ValueError(f"{name}={value!r}: a number above zero is needed")
    if settings.get("lora") == NO_LORA:
        raise ValueError("lora='none': the recipe stacks over a LoRA; accepted: auto, or the folder of one")
    job = Search(SearchSettings(**settings), console)
    final = job.run()
    record = job.output / STUDENT / "student.json"
    if not record.is_file():
        schedule = Schedule(student_epochs, student_rate, job.settings.batch_size, job.settings.seed)
        plain = load_encoder(job.settings.model, job.settings.device)
        distilled = distil(job.task, job.winner(final), plain, schedule, record.parent)
        record.write_text(json.dumps(asdict(distilled), indent=1) + "\n", encoding="utf-8")
    return final, Student(**json.loads(record.read_text(encoding="utf-8")))


def distil(
    task: Task, teacher: SentenceTransformer, student: SentenceTransformer, schedule: Schedule, folder: Path
) -> Student:
    """Train ``student``, all of it, to give the teacher's embeddings of the task's training texts; save and score it.

    Args:
        task: gives the texts, and the test rows that both are scored on once.
        teacher: stays as it is.
        student: a plain encoder whose embeddings have as many numbers as the teacher's; changed in place.
        schedule: of the training.
        folder: where the student goes.

    Raises:
        ValueError: the task has no rows to train or validate on.
    """
    lesson = DistillationTask(task, teacher)
    fit(student, lesson, schedule)
    student.save(str(folder))
    return Student(
        folder=str(folder),
        parameters=trainable_parameters(student),
        agreement=lesson.evaluate(student, "validation").scores["cosine"],
        scores=task.evaluate(student).scores,
        taught=task.evaluate(teacher).scores,
    )


class DistillationTask(Task):
    """Another task's texts, to be embedded as a teacher embeds them."""

    family = "imitation"
    metrics = ("cosine",)

    def __init__(self, task: Task, teacher: SentenceTransformer) -> None:
        super().__init__(f"{task.name}, imitated")
        self._texts = {split: task.texts(split) for split in ("train", "validation")}
        self._vectors = {split: embeddings(teacher, texts) for split, texts in self._texts.items()}

    @property
    def sizes(self) -> dict[str, int]:
        return {split: len(texts) for split, texts in self._texts.items()}

    def train_dataset(self) -> Dataset:
        columns = {"sentence": self._texts["train"], "label": self._vectors["train"].tolist()}
        return require("datasets").Dataset.from_dict(columns)

    def loss(self, model: SentenceTransformer) -> nn.Module:
        return require("sentence_transformers.sentence_transformer.losses").MSELoss(model)

    def evaluate(self, model: SentenceTransformer, split: str = "validation") -> Evaluation:
        """Cosine of both embeddings, text by text."""
        wanted, given = self._vectors[split], embeddings(model, self._texts[split])
        lengths = np.linalg.norm(wanted, axis=1) * np.linalg.norm(given, axis=1)
        cosines = (wanted * given).sum(1) / np.maximum(lengths, 1e-12)
        return Evaluation({"cosine": 100 * float(cosines.mean())}, {"cosine": cosines}, np.ones(len(cosines)))

    def texts(self, split: str) -> list[str]:
        return self._texts[split]

    def keys(self, split: str) -> list[Hashable]:
        return [(normal_form(text),) for text in self._texts[split]]

    def keep(self, split: str, places: Sequence[int]) -> DistillationTask:
        kept = copy(self)
        kept._texts = {**self._texts, split: [self._texts[split][place] for place in places]}
        kept._vectors = {**self._vectors, split: self._vectors[split][list(places)]}
        return kept

    def without_test(self) -> DistillationTask:
        return self  # it has no test split

    def _content(self, split: str) -> Any:
        return self._texts[split]
