"""How the experiment trains a spiking network, and how it scores one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bioadapt.circuits.spiking_network import SpikingClassifier


def fit(
    model: SpikingClassifier, x: Tensor, labels: Tensor, *, rate: float, epochs: int, seed: int, batch: int = 64
) -> None:
    """Train on cross-entropy with Adam, backwards through all of time.

    Args:
        model: changed in place.
        x: (N, T, inputs).
        labels: (N,) int64.
        rate: learning rate.
        epochs: passes through the data.
        seed: fixes the order of the samples.
        batch: samples per update.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            optimiser.zero_grad()
            cross_entropy(model(x[chosen]), labels[chosen]).backward()
            optimiser.step()
    model.eval()


@torch.no_grad()
def accuracy(model: SpikingClassifier, x: Tensor, labels: Tensor) -> float:
    """Share of the samples (N, T, inputs) whose class (N,) has the highest score."""
    return model(x).argmax(-1).eq(labels).double().mean().item()
