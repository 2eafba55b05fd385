"""Cheap cells: a small model, or the upper two blocks of MiniLM, where what the lower four compute is computed once.

A cell trains on some rows of a task and scores its validation split; the test split is never read here.
"""

from __future__ import annotations

import csv
import gzip
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, v_measure_score
from torch import Tensor, nn
from transformers import PreTrainedModel

from bioadapt import auxiliary_loss
from bioadapt.evaluation.training import load_encoder

FAMILIES = {
    "stsb": "sts", "snli": "pairs", "stackoverflow": "clustering", "sst2": "classification",
    "sickr": "sts", "mrpc": "pairs", "searchsnippets": "clustering", "mpqa": "classification",
    "mr": "classification", "subj": "classification", "digits": "images", "cifar10": "images",
}  # fmt: skip
FROZEN_BLOCKS, LONGEST = 4, 32
BATCH, WARM_UP = 32, 0.1
TEMPERATURE = 0.05


def task_family(task: str) -> str:
    """What the record ranks a task with; empty for a task that it does not know."""
    return FAMILIES.get(task, task.partition(":")[2])


@dataclass(frozen=True)
class Rows:
    """``texts``: one list, or two for pairs; ``labels``: scores, or numbers of classes."""

    texts: tuple[list[str], ...]
    labels: np.ndarray


class _GivenStates(nn.Module):
    """In the place of embeddings: hands on the hidden states it is given."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


class Bench:
    """Trains what is put into ``model`` on the rows that a subclass knows, scores it and takes it out again.

    Attributes:
        model: what is adapted.
        lora_targets: names of its layers on which a LoRA sits.
        labels: of the ``train`` and ``dev`` rows.
        epochs: of a training.
    """

    model: PreTrainedModel
    lora_targets: tuple[str, ...] = ("query", "value")
    labels: dict[str, np.ndarray]
    epochs: int

    def loss(self, model: nn.Module, chosen: np.ndarray) -> Tensor:
        """Of the training rows with these numbers."""
        raise NotImplementedError

    def score(self, model: nn.Module) -> float:
        """Of the validation split, in percent."""
        raise NotImplementedError

    def run(self, model: PeftModel, rates: dict[str, float], seed: int) -> tuple[int, float, float]:
        """Train and score adapters and take them out again: their size, the score, seconds."""
        params = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        seconds = self.train(model, rates, seed)
        dev = self.score(model)
        plain: Any = model
        while isinstance(plain, PeftModel):
            plain = plain.unload()
        self.model = plain.requires_grad_(False)
        return params, round(dev, 3), round(seconds, 1)

    def train(self, model: nn.Module, rates: dict[str, float], seed: int) -> float:
        """Train all that asks for a gradient; ``rates`` by a part of the parameter's name, "" for the rest. Seconds."""
        torch.manual_seed(seed)
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = next(rate for part, rate in rates.items() if part in name)
                groups.setdefault(rate, []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": group, "lr": rate} for rate, group in groups.items()], weight_decay=0.0
        )
        batches = list(self._batches(seed))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (WARM_UP * len(batches)), 1 - step / len(batches))
        )
        model.train()
        started = time.process_time()
        for chosen in batches:
            loss = self.loss(model, chosen) + auxiliary_loss(model)
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in groups.values() for p in group], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return time.process_time() - started

    def _batches(self, seed: int) -> Iterator[np.ndarray]:
        source = np.random.default_rng(seed)
        for _ in range(self.epochs):
            order = source.permutation(len(self.labels["train"]))
            for start in range(0, len(order) - BATCH + 1, BATCH):
                yield order[start : start + BATCH]


class TextBench(Bench):
    """One set of texts: its rows as the hidden states that enter the adapted blocks.

    Args:
        task: one of `FAMILIES`, of texts.
        data_dir: holds TASK/{train,dev}.tsv.gz.
        train_rows: how many rows are trained on.
        dev_rows: how many are scored.
        epochs: of a training.
    """

    def __init__(self, task: str, data_dir: Path, train_rows: int, dev_rows: int, epochs: int) -> None:
        self.task, self.family, self.epochs = task, FAMILIES[task], epochs
        encoder = load_encoder()
        model = encoder[0].model.eval().requires_grad_(False)
        blocks = model.encoder.layer
        wanted = {"train": train_rows, "dev": dev_rows}
        splits = {split: self.rows(data_dir / task / f"{split}.tsv.gz", rows) for split, rows in wanted.items()}
        self.labels = {split: given.labels for split, given in splits.items()}
        model.encoder.layer = blocks[:FROZEN_BLOCKS]
        self.states = {
            split: [self._lower(encoder, model, texts) for texts in given.texts] for split, given in splits.items()
        }
        model.encoder.layer = blocks[FROZEN_BLOCKS:]
        model.embeddings = _GivenStates()
        self.model = model

    def rows(self, path: Path, count: int) -> Rows:
        """The first ``count`` rows of a split's file."""
        return read(path, count)

    @staticmethod
    def _lower(encoder: Any, model: nn.Module, texts: list[str]) -> list[Tensor]:
        """The states of each text, (tokens, width), without padding."""
        found: dict[int, Tensor] = {}
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        with torch.no_grad():
            for start in range(0, len(order), 64):
                chosen = order[start : start + 64]
                given = encoder.preprocess([texts[index] for index in chosen])
                tokens = {name: tensor[:, :LONGEST] for name, tensor in given.items() if isinstance(tensor, Tensor)}
                lengths = tokens["attention_mask"].sum(1).tolist()
                states = model(**tokens).last_hidden_state
                found |= {index: row[:n].clone() for index, row, n in zip(chosen, states, lengths, strict=True)}
        return [found[index] for index in range(len(texts))]

    def embed(self, model: nn.Module, states: list[Tensor]) -> Tensor:
        """Mean over tokens of the last states, normalised: (texts, width)."""
        padded = nn.utils.rnn.pad_sequence(states, batch_first=True)
        lengths = torch.tensor([len(row) for row in states])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        last = model(inputs_embeds=padded, attention_mask=mask.long()).last_hidden_state
        mean = (last * mask[..., None]).sum(1) / lengths[:, None]
        return nn.functional.normalize(mean, dim=-1)

    def embed_all(self, model: nn.Module, states: list[Tensor]) -> Tensor:
        order = sorted(range(len(states)), key=lambda index: len(states[index]))
        with torch.no_grad():
            chosen = [order[start : start + 64] for start in range(0, len(order), 64)]
            found = torch.cat([self.embed(model, [states[index] for index in each]) for each in chosen])
        return found[torch.tensor(order).argsort()]

    def loss(self, model: nn.Module, chosen: np.ndarray) -> Tensor:
        labels = torch.as_tensor(self.labels["train"][chosen])
        texts = [states[i] for states in self.states["train"] for i in chosen]
        vectors = self.embed(model, texts)
        if len(self.states["train"]) == 2:
            return cosent(*vectors.chunk(2), labels.float())
        return contrastive(vectors, labels)

    def score(self, model: nn.Module) -> float:
        """Of the validation split, in percent: Spearman, average precision, V-measure, accuracy of a linear probe."""
        model.eval()
        dev, labels = [self.embed_all(model, states) for states in self.states["dev"]], self.labels["dev"]
        if self.family == "sts":
            return 100 * float(spearmanr((dev[0] * dev[1]).sum(1).numpy(), labels).statistic)
        if self.family == "pairs":
            return 100 * float(average_precision_score(labels, (dev[0] * dev[1]).sum(1).numpy()))
        if self.family == "clustering":
            count = len(np.unique(labels))
            found = [KMeans(count, n_init=1, random_state=seed).fit(dev[0].numpy()).labels_ for seed in range(5)]
            return 100 * statistics.fmean(v_measure_score(labels, each) for each in found)
        train = self.embed_all(model, self.states["train"][0]).numpy()
        probe = LogisticRegression(C=10, max_iter=1000).fit(train, self.labels["train"])
        return 100 * float(probe.score(dev[0].numpy(), labels))


def read(path: Path, rows: int) -> Rows:
    """The first rows of a split, in the order of the file after a shuffle that is always the same."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        table = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    chosen = [table[i] for i in np.random.default_rng(0).permutation(len(table))[:rows]]
    pairs = "sentence1" in table[0]
    texts = tuple([row[name] for row in chosen] for name in (("sentence1", "sentence2") if pairs else ("text",)))
    if pairs:
        return Rows(texts, np.array([float(row["score" if "score" in row else "label"]) for row in chosen]))
    classes = sorted({row["label"] for row in table})
    return Rows(texts, np.array([classes.index(row["label"]) for row in chosen]))


def cosent(a: Tensor, b: Tensor, scores: Tensor) -> Tensor:
    """Loss of every pair whose cosine is not above that of a pair with a lower score (Su 2022, CoSENT)."""
    cosines = (a * b).sum(1) / TEMPERATURE
    differences = (cosines[None, :] - cosines[:, None])[scores[:, None] > scores[None, :]]
    return torch.logsumexp(torch.cat([differences.new_zeros(1), differences]), 0)


def contrastive(vectors: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrastive loss (Khosla et al. 2020): texts of one class find each other among all of the batch."""
    itself = torch.eye(len(labels), dtype=torch.bool)
    likelihood = (vectors @ vectors.T / TEMPERATURE).masked_fill(itself, -torch.inf).log_softmax(1)
    same = (labels[:, None] == labels[None, :]) & ~itself
    paired = same.any(1)
    return -(likelihood.masked_fill(~same, 0.0).sum(1)[paired] / same.sum(1)[paired]).mean()
