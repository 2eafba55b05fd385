"""What a mechanism's biology promises, asked of those that promise it: one task for each promise.

`PROMISES` says what is asked and of whom. LoRAs and placebos are asked the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from bioadapt.registry import PrimitiveInfo
from experiments.record.bench import Bench, Rows, TextBench

TYPING_ERRORS = 0.3  # share of the longer words that get one
FEW, MANY_EPOCHS = 100, 8
EXCHANGES = 2


class NoisyText(TextBench):
    """Trained on clean text, scored on text with typing errors."""

    def __init__(self, data_dir: Path, rows: int, epochs: int) -> None:
        super().__init__("stsb", data_dir, rows, rows, epochs)

    def rows(self, path: Path, count: int) -> Rows:
        rows, source = super().rows(path, count), np.random.default_rng(0)
        if path.name.startswith("train"):
            return rows
        return Rows(tuple([mistyped(text, source) for text in texts] for texts in rows.texts), rows.labels)


class WordOrder(TextBench):
    """Tells texts as they were written from texts in which neighbouring words were exchanged."""

    def __init__(self, data_dir: Path, rows: int, epochs: int) -> None:
        super().__init__("sst2", data_dir, rows, rows, epochs)

    def rows(self, path: Path, count: int) -> Rows:
        (texts,), source = super().rows(path, count).texts, np.random.default_rng(0)
        labels = np.arange(len(texts)) % 2
        return Rows(([exchanged(t, source) if label else t for t, label in zip(texts, labels, strict=True)],), labels)


class SecondTask(TextBench):
    """Trained on one set of texts, then on another, and scored on the first."""

    def __init__(self, data_dir: Path, rows: int, epochs: int) -> None:
        super().__init__("stackoverflow", data_dir, rows, rows, epochs)
        self.second = TextBench("searchsnippets", data_dir, rows, 1, epochs)

    def train(self, model: nn.Module, rates: dict[str, float], seed: int) -> float:
        return super().train(model, rates, seed) + self.second.train(model, rates, seed)


class FewRows(TextBench):
    """Trained on five rows of each class."""

    def __init__(self, data_dir: Path, rows: int, epochs: int) -> None:
        super().__init__("stackoverflow", data_dir, FEW, rows, MANY_EPOCHS)


class DelayedResponse(Bench):
    """A cue, a delay, a question: which cue was it? The delay is longer than what attention reaches.

    A small language model with a window of six tokens, two blocks deep, has learned to answer after delays of up to
    four tokens. Adapted to a delay of twenty it can only answer from something that keeps the cue, as cells in the
    prefrontal cortex do in this task (Fuster and Alexander 1971).
    """

    lora_targets = ("q_proj", "v_proj")
    cues, fillers, short, long, window = 8, 8, 4, 20, 6

    def __init__(self, data_dir: Path, rows: int, epochs: int) -> None:
        del data_dir  # there are no texts
        question = self.cues + self.fillers
        torch.manual_seed(0)
        self.model = MistralForCausalLM(
            MistralConfig(
                vocab_size=question + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, sliding_window=self.window, max_position_embeddings=64,
            )
        )  # fmt: skip
        self.epochs = 2 * epochs
        self._use(self.short, 10 * rows)
        self.train(self.model, {"": 3e-3}, 0)
        self.model.requires_grad_(False).eval()
        self._use(self.long, 5 * rows)

    def _use(self, longest: int, rows: int) -> None:
        """Rows with delays up to the longest one, short ones padded on the left by fillers before the cue."""
        source = np.random.default_rng(longest)
        self.tokens, self.labels = {}, {}
        for split in ("train", "dev"):
            cues, delays = source.integers(0, self.cues, rows), source.integers(0, longest + 1, rows)
            if longest == self.long:
                delays[:] = longest
            tokens = source.integers(self.cues, self.cues + self.fillers, (rows, longest + 2))
            tokens[np.arange(rows), longest - delays] = cues
            tokens[:, -1] = self.cues + self.fillers
            self.tokens[split], self.labels[split] = torch.as_tensor(tokens), cues

    def _answers(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens).logits[:, -1, : self.cues]

    def loss(self, model: nn.Module, chosen: np.ndarray) -> Tensor:
        labels = torch.as_tensor(self.labels["train"][chosen])
        return nn.functional.cross_entropy(self._answers(model, self.tokens["train"][chosen]), labels)

    def score(self, model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            said = torch.cat([self._answers(model, part).argmax(1) for part in self.tokens["dev"].split(256)])
        return 100 * float((said.numpy() == self.labels["dev"]).mean())


@dataclass(frozen=True)
class Promise:
    """``family``: what is promised, in a word or two; ``of``: whether a mechanism promises it."""

    family: str
    bench: Callable[[Path, int, int], Bench]
    of: Callable[[PrimitiveInfo], bool]


PROMISES = {
    "delayed-response": Promise("memory", DelayedResponse, lambda info: info.kind == "causal"),
    "stackoverflow-few": Promise("few rows", FewRows, lambda info: info.gain),
    "sst2-order": Promise("order", WordOrder, lambda info: info.kind == "causal"),
    "stackoverflow-kept": Promise("forgetting", SecondTask, lambda info: info.stage == "plasticity"),
    "stsb-noisy": Promise("noise", NoisyText, lambda info: info.stage in ("sensory_gain", "competition")),
}


def mistyped(text: str, source: np.random.Generator) -> str:
    """With two neighbouring letters inside some of the longer words exchanged."""

    def word(given: str) -> str:
        if len(given) < 4 or source.random() >= TYPING_ERRORS:
            return given
        place = source.integers(1, len(given) - 2)
        return given[:place] + given[place + 1] + given[place] + given[place + 2 :]

    return " ".join(word(given) for given in text.split())


def exchanged(text: str, source: np.random.Generator) -> str:
    """With some words and their right neighbours exchanged."""
    words = text.split()
    for _ in range(EXCHANGES if len(words) > 1 else 0):
        place = source.integers(0, len(words) - 1)
        words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words)
