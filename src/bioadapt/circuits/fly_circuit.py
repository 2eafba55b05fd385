"""The fly's olfactory circuit: receptors, projection neurons and Kenyon cells, under inhibition and adaptation."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from bioadapt._words import suggest
from bioadapt.methods.sparse_projection import sparse_projection
from bioadapt.primitives.base import Context, Host
from bioadapt.primitives.competition.lateral_inhibition import suppression
from bioadapt.primitives.dynamics.spike_frequency_adaptation import SpikeFrequencyAdaptation, Subtraction
from bioadapt.primitives.time import linear_scan, trace

MEMBRANE, LOCAL_NEURON, SYNAPSE, ADAPTATION = 10.0, 5.0, 5.0, 50.0  # time constants, in steps
FAN_IN, GAIN = 6, 2.0  # claws of a Kenyon cell, and what the mean of their synapses is multiplied by

POPULATIONS = ("receptors", "projection", "kenyon")
INHIBITIONS = ("subtractive", "divisive")
BUILDERS = ("spikes", "drive")


@dataclass(frozen=True)
class Activity:
    """What the circuit did: spikes of the projection neurons (N, T, R) and of the Kenyon cells (N, T, K), 0 or 1."""

    projection: Tensor
    kenyon: Tensor

    @property
    def codes(self) -> Tensor:
        """Spike counts of the Kenyon cells with unit norm, zero where none fired: (N, K)."""
        return normalize(self.kenyon.sum(1), dim=-1)

    @property
    def coding_level(self) -> float:
        """Share of the Kenyon cells that fire at least once, in the mean over trials."""
        return self.kenyon.amax(1).mean().item()


class FlyCircuit:
    """Receptors excite projection neurons and, through these, Kenyon cells; both are leaky integrate-and-fire cells.

    A local neuron hears all receptors and inhibits all projection neurons: the kernel of the primitive
    `lateral_inhibition`, in which it is one cell more, whose rate is a trace of the receptors' mean. Adaptation
    subtracts a slow current from a cell's drive, down to silence: the kernel of `spike_frequency_adaptation`. What
    builds the current up is either the drive, as in the primitive, which then runs as it is; or the cell's own spikes.
    Those depend on the current in turn, so that the current is then a state of the circuit beside the membrane.

    Reference: Li, Yu, Yu and Zang 2025, Seemingly redundant modules enhance robust odor learning in fruit flies,
    arXiv:2510.21315 (the question; we know the abstract alone); Jürgensen, Khalili, Chicca, Indiveri and Nawrot 2021, A
    neuromorphic model of olfactory processing and sparse coding in the Drosophila larva brain, Neuromorph Comput Eng
    (the kinds of cells and of connections). The constants, which have no unit but the step, are ours.

    Args:
        receptors: number R of receptors, which is that of the projection neurons.
        kenyon_cells: number K of Kenyon cells; each reads `FAN_IN` projection neurons.
        lateral_inhibition: strength of inhibition, at least 0. Subtractive: what is lost per unit of the local neuron's
            rate; divisive: the drive is divided by one plus this times that rate.
        adaptation: what one spike adds to the cell's slow current, in units of drive, at least 0. Where the drive
            builds the current up, it is of the strength that leaves about the same rate in the end under a strong
            drive: the share b tau_a / (tau_m + b tau_a) of the drive.
        adapting: the populations that adapt, among "receptors", "projection" and "kenyon". Receptors have no spikes
            here, so that their drive adapts in any case.
        inhibition: "subtractive" or "divisive".
        adapted_by: "spikes" or "drive".
        seed: fixes which projection neurons each Kenyon cell reads.

    Raises:
        ValueError: a number out of range or an unknown name.
    """

    def __init__(
        self,
        receptors: int = 50,
        kenyon_cells: int = 300,
        *,
        lateral_inhibition: float = 0.0,
        adaptation: float = 0.0,
        adapting: Collection[str] = ("projection", "kenyon"),
        inhibition: str = "subtractive",
        adapted_by: str = "spikes",
        seed: int = 0,
    ) -> None:
        _at_least("receptors", receptors, FAN_IN)
        _at_least("kenyon_cells", kenyon_cells, 1)
        _at_least("lateral_inhibition", lateral_inhibition, 0)
        _at_least("adaptation", adaptation, 0)
        for name in adapting:
            _one_of("adapting", name, POPULATIONS)
        _one_of("inhibition", inhibition, INHIBITIONS)
        _one_of("adapted_by", adapted_by, BUILDERS)
        self.receptors = receptors
        self.lateral_inhibition, self.inhibition = lateral_inhibition, inhibition
        self.adaptation, self.adapting, self.adapted_by = adaptation, frozenset(adapting), adapted_by
        source = Host(seed=seed).generator("claws")
        self.claws = sparse_projection((kenyon_cells, receptors), FAN_IN, 1 / FAN_IN, "rademacher", source).abs()

    @torch.no_grad()
    def __call__(self, drive: Tensor) -> Activity:
        """Run trials side by side.

        Args:
            drive: of the receptors, (N, T, R), non-negative, in units of what holds a cell at its threshold.

        Raises:
            ValueError: another shape, or a negative drive.
        """
        if drive.dim() != 3 or drive.shape[-1] != self.receptors:
            raise ValueError(f"drive must be (trials, steps, {self.receptors}), got {tuple(drive.shape)}")
        if not (drive >= 0).all():  # also refuses NaN
            raise ValueError(f"drive must not be negative, got {drive.min().item():g}: rectify it")
        if "receptors" in self.adapting:
            drive = self.slowly_reduced(drive)
        projection = self.fired("projection", self.inhibited(drive))
        synapses = linear_scan(_decay(SYNAPSE), projection) @ self.claws.mT
        return Activity(projection, self.fired("kenyon", GAIN * synapses))

    def inhibited(self, drive: Tensor) -> Tensor:
        """What the local neuron leaves of the receptors' drive: (N, T, R) -> (N, T, R)."""
        local = trace("local neuron", drive.mean(-1, keepdim=True), _decay(LOCAL_NEURON), Context())
        if self.inhibition == "divisive":
            return drive / (1 + self.lateral_inhibition * local)
        cells = torch.cat([drive, local], -1)
        is_local = torch.arange(cells.shape[-1]) == self.receptors
        pools = torch.where(is_local, 0.0, self.lateral_inhibition)[:, None]
        sources = is_local.float()[None]
        change = suppression(cells, pools, sources, (pools * sources.mT).sum(-1), torch.ones(cells.shape[-1]))
        return drive + change[..., : self.receptors]

    def slowly_reduced(self, drive: Tensor) -> Tensor:
        """What the primitive `spike_frequency_adaptation` makes of a drive (N, T, C)."""
        if not self.adaptation:
            return drive
        primitive = SpikeFrequencyAdaptation(drive.shape[-1], drive.shape[-1], groups=1)
        strength = self.adaptation * ADAPTATION / MEMBRANE  # share / (1 - share)
        primitive.strength.fill_(math.log(strength))
        primitive.log_tau.fill_(math.log(ADAPTATION))
        primitive.gate.fill_(1.0)
        return drive + primitive(drive)

    def fired(self, population: str, drive: Tensor) -> Tensor:
        """The spikes of a population of cells under a drive, both (N, T, C)."""
        adapting = population in self.adapting
        if adapting and self.adapted_by == "drive":
            return spikes(self.slowly_reduced(drive))
        return spikes(drive, self.adaptation if adapting else 0.0)


def spikes(drive: Tensor, adaptation: float = 0.0) -> Tensor:
    """Leaky integrate-and-fire cells: m <- I + (m - I) exp(-1 / tau_m); a spike at 1 takes its charge of 1 away.

    Args:
        drive: (N, T, C), non-negative.
        adaptation: what a spike adds to the current that is subtracted from the later drive, down to silence; it fades
            with `ADAPTATION`.

    Returns:
        0 or 1, (N, T, C).
    """
    membrane, current, all_of_it = torch.zeros_like(drive[:, 0]), torch.zeros_like(drive[:, 0]), torch.ones(())
    kept, fading, fired = _decay(MEMBRANE), _decay(ADAPTATION), torch.empty_like(drive)
    for now, spike in zip(drive.unbind(1), fired.unbind(1), strict=True):
        if adaptation:
            now = now + Subtraction.apply(now, current, all_of_it)
        torch.lerp(now, membrane, kept, out=membrane)
        torch.ge(membrane, 1.0, out=spike)
        membrane.sub_(spike)
        if adaptation:
            current.mul_(fading).add_(spike, alpha=adaptation)
    return fired


def _decay(tau: float) -> Tensor:
    return torch.tensor(math.exp(-1 / tau))


def _at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least {least}, got {value!r}")


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}; {suggest(value, accepted)}"
        )
