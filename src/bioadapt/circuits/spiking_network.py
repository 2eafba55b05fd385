"""Spiking networks on a time axis: layers of the catalogue's neurons.

Reference: Yang et al. 2026, Neuronal self-adaptation enhances capacity and robustness of representation in spiking
neural networks (KvLIF), arXiv:2603.20687; Neftci, Mostafa and Zenke 2019, Surrogate gradient learning in spiking neural
networks: bringing the power of gradient-based optimization to spiking neural networks, IEEE Signal Process Mag. The
equations are those of the primitive `kv_lif`, which are our reading of the first one's abstract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from bioadapt._words import suggest
from bioadapt.primitives.dendritic.kv_lif import KvLif, micro_step
from bioadapt.primitives.frames import inverse_softplus
from bioadapt.primitives.surrogate import spike_slope

NEURONS = ("kv_lif", "leaky_integrate_fire")
LEAK = math.log(2)  # after one step without drive half of the voltage is left


class CellState(NamedTuple):
    """What cells carry to the next step: voltage and share of open potassium channels, both (B, C)."""

    voltage: Tensor
    opened: Tensor


def constants_at_birth(neuron: str = "kv_lif", leak: float = LEAK) -> Tensor:
    """theta, g, h, eta, mu and lambda as the primitive `kv_lif` is born with them, but for the leak g: (6,).

    A leaky integrate-and-fire cell is the same without what potassium does: conductance h, opening by spikes eta and
    deepening of the reset mu are zero.

    Raises:
        ValueError: an unknown neuron, or a leak that is not positive.
    """
    if neuron not in NEURONS:
        raise ValueError(
            f"neuron must be one of {', '.join(map(repr, NEURONS))}, got {neuron!r}; {suggest(neuron, NEURONS)}"
        )
    if not 0 < leak < math.inf:
        raise ValueError(f"leak must be a positive number, got {leak!r}")
    constants = KvLif(1, 1).constants().detach()
    constants[1] = leak
    if neuron == "leaky_integrate_fire":
        constants[2:5] = 0.0
    return constants


def fire(
    drive: Tensor, constants: Tensor, mask: Tensor | None = None, state: CellState | None = None
) -> tuple[Tensor, CellState]:
    """Run cells along the time axis: one micro-step of the primitive `kv_lif` per step.

    The slope of a spike is taken for the one that the catalogue's neurons have.

    Args:
        drive: currents, (B, T, C); under a constant one of I the voltage would settle at I / g.
        constants: theta, g, h, eta, mu and lambda, (6,) or, for each cell its own, (6, C).
        mask: (B, T) bool, True at real steps; the others change no state and have no spike.
        state: to go on from; cells at rest if None.

    Returns:
        Spikes (B, T, C), 0 or 1, and the state after the last step.

    Raises:
        ValueError: drive, constants or mask of another shape.
    """
    if drive.dim() != 3 or not drive.shape[1]:
        raise ValueError(f"drive must be (samples, steps, cells) with at least one step, got {tuple(drive.shape)}")
    if constants.shape not in ((6,), (6, drive.shape[2])):
        raise ValueError(f"constants must be (6,) or (6, {drive.shape[2]}), got {tuple(constants.shape)}")
    if mask is not None and mask.shape != drive.shape[:2]:
        raise ValueError(f"mask must be {tuple(drive.shape[:2])}, got {tuple(mask.shape)}")
    theta, _, _, by_spike, deepening, _ = constants.split(1)
    voltage, opened = (torch.zeros_like(drive[:, 0]),) * 2 if state is None else state
    spikes = []
    for t, now in enumerate(drive.unbind(1)):
        after, step = micro_step(now, voltage, opened, constants)
        # Its value is zero; its slope stands for that of a spike, which the catalogue's step does not have.
        ghost = spike_slope(step.excess.detach()) * (step.excess - step.excess.detach())
        reopened = step.reopened + by_spike * ghost
        after = after - (theta + deepening * (reopened + by_spike * step.spikes)) * ghost
        spike = step.spikes + ghost
        if mask is not None:
            real = mask[:, t, None]
            after, reopened = torch.where(real, after, voltage), torch.where(real, reopened, opened)
            spike = torch.where(real, spike, 0.0)
        voltage, opened = after, reopened
        spikes.append(spike)
    return torch.stack(spikes, 1), CellState(voltage, opened)


class SpikingLayer(nn.Module):
    """Synapses onto cells whose constants are trained, for each cell its own.

    Args:
        inputs: number of inputs.
        cells: number C of cells.
        neuron: "kv_lif" or "leaky_integrate_fire".
        leak: g at birth, per step.

    Shapes: x (B, T, inputs) -> spikes (B, T, C).
    """

    def __init__(self, inputs: int, cells: int, neuron: str = "kv_lif", leak: float = LEAK) -> None:
        super().__init__()
        self.neuron = neuron
        self.synapses = nn.Linear(inputs, cells)
        nn.init.kaiming_normal_(self.synapses.weight)
        nn.init.zeros_(self.synapses.bias)
        *positive, memory = constants_at_birth(neuron, leak).tolist()
        raw = torch.tensor([inverse_softplus(value) for value in positive if value])
        self.raw = nn.Parameter(raw[:, None].repeat(1, cells))
        if neuron == "kv_lif":
            self.memory = nn.Parameter(torch.full((1, cells), memory).logit())

    def constants(self) -> Tensor:
        """What `fire` is given, (6, C)."""
        positive = softplus(self.raw).clamp(min=1e-6)
        if self.neuron == "kv_lif":
            return torch.cat([positive, torch.sigmoid(self.memory)])
        return torch.cat([positive, positive.new_zeros(6 - len(positive), positive.shape[1])])

    def forward(
        self, x: Tensor, mask: Tensor | None = None, state: CellState | None = None
    ) -> tuple[Tensor, CellState]:
        """Spikes (B, T, C) and the state to go on from; mask and state as in `fire`."""
        return fire(self.synapses(x), self.constants(), mask, state)


class SpikingClassifier(nn.Module):
    """Spiking layers in a row, and a linear read-out of the rates of the last one.

    Args:
        sizes: number of inputs, then of the cells of each layer.
        classes: number of classes.
        neuron: "kv_lif" or "leaky_integrate_fire".
        leak: g at birth, per step.

    Raises:
        ValueError: fewer than two sizes, or an unknown neuron.
    """

    def __init__(self, sizes: Sequence[int], classes: int, neuron: str = "kv_lif", leak: float = LEAK) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes must name the inputs and at least one layer of cells, got {tuple(sizes)}")
        self.layers = nn.ModuleList(SpikingLayer(inputs, cells, neuron, leak) for inputs, cells in pairwise(sizes))
        self.readout = nn.Linear(sizes[-1], classes)

    def rates(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Spikes per real step of the last layer's cells, (B, T, inputs) -> (B, C); mask (B, T) as in `fire`."""
        for layer in self.layers:
            x, _ = layer(x, mask)
        return x.mean(1) if mask is None else x.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores of the classes, (B, T, inputs) -> (B, classes)."""
        return self.readout(self.rates(x, mask))
