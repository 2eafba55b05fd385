"""Whether a LoRA's learning rate trains every primitive: how far the training loss falls next to LoRA's own fall.

    python benchmarks/rates.py --data-dir DATA                    # all primitives; writes results/rates.csv
    python benchmarks/rates.py --data-dir DATA --only gap_junction --zero-scale 32

The set-up: all-MiniLM-L6-v2 on pairs of SNLI (the folder `snli` in DATA), CoSENT loss, AdamW at 1e-3 without decay or
warm-up, 30 steps of 8 pairs, each primitive alone on its default targets. The loss is that of the training pairs
themselves, every second batch, in eval mode, before and after. `share` is the fall of the loss relative to that of
PEFT's LoRA r=8 on query and value (mean of three seeds), `moved` the size of the change of a block's output relative to
that output, the median over blocks.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import statistics
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from _measure import RESULTS, machine_name, write_csv
from peft import LoraConfig, PeftConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from bioadapt import BioConfig, auxiliary_loss, list_primitives, primitive_info
from bioadapt.evaluation.training import load_encoder

RATE, STEPS, BATCH, LORA_SEEDS = 1e-3, 30, 8, 3
LORA, ENOUGH, TOO_LITTLE = "lora_r8", 1.0, 1 / 3


@dataclass(frozen=True)
class Row:
    """``moved`` and ``share`` as above; ``zero_at`` and ``zero_scale`` are empty and 1 for the LoRA."""

    name: str
    zero_at: str
    zero_scale: float
    parameters: int
    fall: float
    share: float
    moved: float


def pairs(data_dir: Path) -> list[tuple[str, str, float]]:
    """The first training pairs of SNLI, with 1 for entailment and 0 otherwise."""
    with gzip.open(data_dir / "snli" / "train.tsv.gz", "rt", encoding="utf-8", newline="\n") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        chosen = [row for row, _ in zip(rows, range(STEPS * BATCH), strict=False)]
    return [(row["sentence1"], row["sentence2"], float(row["label"])) for row in chosen]


def cosent(a: Tensor, b: Tensor, scores: Tensor, scale: float = 20.0) -> Tensor:
    """Loss of every pair whose cosine is not above that of a pair with a lower score (Su 2022, CoSENT)."""
    cosines = scale * nn.functional.cosine_similarity(a, b)
    above = scores[:, None] > scores[None, :]
    differences = (cosines[None, :] - cosines[:, None])[above]
    return torch.logsumexp(torch.cat([differences.new_zeros(1), differences]), 0)


class Setup:
    """The model and its batches, tokenised once."""

    def __init__(self, data_dir: Path) -> None:
        self.encoder: SentenceTransformer = load_encoder()
        self.model = self.encoder[0].model
        rows = pairs(data_dir)
        self.batches = [self._tokens(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
        self.before = self.mean_loss(self.model)  # a fresh adapter is the identity

    def _tokens(self, rows: list[tuple[str, str, float]]) -> tuple[dict[str, Tensor], Tensor]:
        texts = [row[0] for row in rows] + [row[1] for row in rows]
        given = self.encoder.preprocess(texts)
        tokens = {name: tensor for name, tensor in given.items() if isinstance(tensor, Tensor)}
        return tokens, torch.tensor([row[2] for row in rows])

    def loss(self, model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        tokens, scores = batch
        states = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(states.dtype)
        a, b = ((states * mask).sum(1) / mask.sum(1)).chunk(2)
        return cosent(a, b, scores)

    def mean_loss(self, model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return statistics.fmean(self.loss(model, batch).item() for batch in self.batches[::2])

    def train(self, config: PeftConfig, seed: int) -> tuple[int, float, float]:
        """Trainable parameters, fall of the loss, and how far a layer's output moved."""
        torch.manual_seed(seed)
        adapted = get_peft_model(self.model, config)
        trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
        adapted.train()
        for batch in self.batches:
            (self.loss(adapted, batch) + auxiliary_loss(adapted)).backward()
            optimizer.step()
            optimizer.zero_grad()
        fall, moved = self.before - self.mean_loss(adapted), self.moved(adapted)
        adapted.unload()
        return sum(parameter.numel() for parameter in trainable), fall, moved

    def moved(self, adapted: nn.Module) -> float:
        """Median over the blocks of the change of a block's output relative to that output, on the first batch."""
        with torch.no_grad():
            tokens, _ = self.batches[0]
            new = adapted(**tokens, output_hidden_states=True).hidden_states[1:]
            with adapted.disable_adapter():
                old = adapted(**tokens, output_hidden_states=True).hidden_states[1:]
        return statistics.median(((a - b).norm() / b.norm()).item() for a, b in zip(new, old, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with the folder snli")
    parser.add_argument("--only", action="append", help="a primitive; may be given several times")
    parser.add_argument("--zero-scale", type=float, help="instead of what a new adapter of each primitive takes")
    parser.add_argument("--output", type=Path, default=RESULTS / "rates.csv")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*second time.*")
    setup = Setup(options.data_dir)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"])
    runs = [setup.train(lora, seed) for seed in range(LORA_SEEDS)]
    reference = statistics.fmean(run[1] for run in runs)
    rows = [Row(LORA, "", 1.0, runs[0][0], reference, 1.0, statistics.fmean(run[2] for run in runs))]
    print(f"{LORA}: the loss falls by {reference:.4f}, moved {rows[0].moved:.3f}", flush=True)
    for name in options.only or list_primitives():
        info = primitive_info(name)
        scale = options.zero_scale or info.fresh_zero_scale
        parameters, fall, moved = setup.train(BioConfig(primitives=[{"name": name, "zero_scale": scale}]), seed=0)
        rows.append(Row(name, info.zero_at, scale, parameters, fall, fall / reference, moved))
        print(f"{name}: {rows[-1].share:.2f} of LoRA's fall, moved {moved:.3f}, zero_scale {scale:g}", flush=True)
    write_csv(options.output, rows, {"machine": machine_name()})
    shares = [row.share for row in rows[1:]]
    print(f"median share {statistics.median(shares):.2f} (bar {ENOUGH}); below {TOO_LITTLE:.2f}: ", end="")
    print(", ".join(row.name for row in rows[1:] if row.share < TOO_LITTLE) or "none")


if __name__ == "__main__":
    main()
