"""Noisy trials of odours, and read-outs that are to tell the odours apart by a circuit's codes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

NOISES = ("both", "trial", "step")


def odours(classes: int, receptors: int, generator: torch.Generator, shared: float = 0.85) -> Tensor:
    """Similar odours: receptors' drives of one mixture that all share and one of each class's own, (classes, R).

    Both are exponentially distributed; ``shared`` is the share of the common one.
    """
    common, own = (torch.empty(n, receptors).exponential_(generator=generator) for n in (1, classes))
    return 2.5 * (shared * common + (1 - shared) * own)


def noisy_trials(drives: Tensor, steps: int, sigma: float, generator: torch.Generator, kind: str = "both") -> Tensor:
    """One trial for each drive (N, R), rectified: (N, steps, R).

    Args:
        sigma: standard deviation of what is drawn once per trial and receptor; half of it is that of what is drawn
            anew in each step. In units of drive.
        kind: "both", or "trial" or "step" alone.

    Raises:
        ValueError: sigma is negative, or another kind.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be a number of at least 0, got {sigma!r}")
    if kind not in NOISES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, NOISES))}, got {kind!r}")
    trials = drives[:, None].repeat(1, steps, 1)
    if kind != "step":
        trials += sigma * torch.randn(drives.shape, generator=generator)[:, None]
    if kind != "trial":
        trials += 0.5 * sigma * torch.randn(trials.shape, generator=generator)
    return trials.relu_()


def delta_rule(
    codes: Tensor, labels: Tensor, classes: int, generator: torch.Generator, rate: float = 0.3, passes: int = 10
) -> Tensor:
    """Weights (classes, K) of output neurons that learn online: w += rate (target - w x) x, trials in random order.

    Reference: Widrow and Hoff 1960, Adaptive switching circuits.

    Args:
        codes: x, (N, K), of unit norm.
        labels: (N,) int64; the target is 1 for the own class, else 0.
    """
    weights, targets = codes.new_zeros(classes, codes.shape[1]), one_hot(labels, classes).to(codes.dtype)
    for _ in range(passes):
        for i in torch.randperm(len(codes), generator=generator).tolist():
            weights.addr_(targets[i] - weights @ codes[i], codes[i], alpha=rate)
    return weights


def class_means(codes: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Weights (classes, K) of output neurons that know each class by the direction of its mean code."""
    return normalize(one_hot(labels, classes).to(codes.dtype).mT @ codes, dim=-1)


def accuracy(weights: Tensor, codes: Tensor, labels: Tensor) -> float:
    """Share of the codes (N, K) at which the output neuron of the right class is the most driven one."""
    return (codes @ weights.mT).argmax(-1).eq(labels).double().mean().item()
