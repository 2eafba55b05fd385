"""Few-label digits: read-outs of frozen granule codes against a perceptron with as many trained parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bioadapt.circuits.cerebellar import CerebellarNetwork

PIXELS, CLASSES = 64, 10
HIDDEN = 137  # 10,285 trained parameters, the granule networks with 1,024 units have 10,250
VALIDATION = 20  # rows per class
BATCH = 32
NOISE = 0.5  # sd, in units of the full range of a pixel
LABELS, STEPS, RATES = (5, 20), (50, 500), (1e-3, 3e-3, 1e-2, 3e-2)

MLP, LINEAR = "MLP, 137 hidden", "linear"
GRANULE_4, GRANULE_16, SMALL = "granule, fan-in 4", "granule, fan-in 16", "granule, fan-in 4, 256 units"
GATED, NO_WINNERS = "granule, fan-in 16, dendrites", "granule, fan-in 16, no winners"
ARMS: Mapping[str, Mapping[str, Any]] = {
    MLP: {},
    LINEAR: {},
    GRANULE_4: {"fan_in": 4, "kappa": 0.0},
    GRANULE_16: {"fan_in": 16, "kappa": 0.0},
    "granule, fan-in 32": {"fan_in": 32, "kappa": 0.0},
    SMALL: {"fan_in": 4, "kappa": 0.0, "units": 256},
    NO_WINNERS: {"fan_in": 16, "kappa": 0.0, "active": 1.0},
    GATED: {"fan_in": 16, "kappa": 2.0},
}


@dataclass(frozen=True)
class Rows:
    """What is read (n, features), and digits (n,)."""

    inputs: Tensor
    digits: Tensor


@cache
def images() -> tuple[np.ndarray, np.ndarray]:
    """Pixels from 0 to 1, (1797, 64), and digits."""
    pixels, digits = load_digits(return_X_y=True)
    return pixels / 16, digits


def split(labels: int, seed: int) -> dict[str, Rows]:
    """``labels`` training and 20 validation rows of each digit; all others are test rows, also with pixel noise.

    Pixels (n, 64) have zero mean each over the training rows, and one scale, by which those have unit sd before.
    """
    pixels, digits = images()
    generator = np.random.default_rng(seed)
    ranks = np.empty(len(digits), dtype=int)
    for digit in range(CLASSES):
        own = np.flatnonzero(digits == digit)
        ranks[own] = generator.permutation(len(own))
    places = {
        "train": ranks < labels,
        "validation": (ranks >= labels) & (ranks < labels + VALIDATION),
        "test": ranks >= labels + VALIDATION,
    }
    centre, scale = pixels[places["train"]].mean(0), pixels[places["train"]].std()
    raw = {name: (pixels[place], digits[place]) for name, place in places.items()}
    raw["noise"] = (raw["test"][0] + NOISE * generator.standard_normal(raw["test"][0].shape), raw["test"][1])
    return {
        name: Rows(torch.tensor((own - centre) / scale, dtype=torch.float32), torch.tensor(known))
        for name, (own, known) in raw.items()
    }


def network(arm: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """The frozen part of a network (the identity for the rivals) and the trained one that reads it."""
    torch.manual_seed(seed)
    if arm == MLP:
        return nn.Identity(), nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    if arm == LINEAR:
        return nn.Identity(), nn.Linear(PIXELS, CLASSES)
    whole = CerebellarNetwork(PIXELS, CLASSES, seed=seed, **ARMS[arm])
    return whole.granule, whole.purkinje


def accuracies(
    trained: nn.Module, rows: Mapping[str, Rows], seed: int, rate: float, steps: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Train with Adam; after each of ``steps``, the share of right answers on the rows that are not for training."""
    optimizer = torch.optim.Adam(trained.parameters(), lr=rate)
    order = torch.Generator().manual_seed(seed)
    train, reached = rows["train"], {}
    for step in range(1, max(steps) + 1):
        batch = torch.randint(len(train.digits), (BATCH,), generator=order)
        loss = nn.functional.cross_entropy(trained(train.inputs[batch]), train.digits[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in steps:
            reached[step] = {name: right(trained, rows[name]) for name in ("validation", "test", "noise")}
    return reached


@torch.no_grad()
def right(network: nn.Module, rows: Rows) -> float:
    """The share of right answers."""
    return (network(rows.inputs).argmax(1) == rows.digits).double().mean().item()


@torch.no_grad()
def coded(frozen: nn.Module, rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """What is frozen, computed once."""
    return {name: Rows(frozen(part.inputs), part.digits) for name, part in rows.items()}


def run_seed(
    seed: int,
    quick: bool = False,
    *,
    arms: Sequence[str] = tuple(ARMS),
    labels: Sequence[int] = LABELS,
    steps: Sequence[int] = STEPS,
) -> list[dict[str, Any]]:
    """Test accuracies of every arm, each with the rate that is best on the validation rows of its own condition."""
    found = []
    for count in labels:
        rows = split(count, seed)
        for arm in arms:
            codes, runs = coded(network(arm, seed)[0], rows), {}
            for rate in RATES[2:3] if quick else RATES:
                trained = network(arm, seed)[1]
                runs[rate] = accuracies(trained, codes, seed, rate, steps)
            size = sum(parameter.numel() for parameter in trained.parameters())
            for step in steps:
                validation = {rate: of_rate[step]["validation"] for rate, of_rate in runs.items()}
                best = max(validation, key=validation.__getitem__)
                for measure in ("test", "noise"):
                    found.append({
                        "part": "digits", "arm": arm, "trained": size, "use": "test", "rate": best, "seed": seed,
                        "condition": f"{count} labels, {step} steps", "measure": f"{measure} accuracy",
                        "value": runs[best][step][measure],
                    })  # fmt: skip
    return found
