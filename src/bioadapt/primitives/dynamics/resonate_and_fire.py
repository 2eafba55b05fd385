"""Resonate and fire: a cell answers to inputs spaced at its own period."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, setting
from bioadapt.primitives.frames import positive, read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.primitives.rotation import rotation
from bioadapt.primitives.surrogate import step_slope
from bioadapt.registry import register_primitive


class _Threshold(Fused):
    """Keeps one narrow tensor; the slope of the threshold is that of a sigmoid."""

    @staticmethod
    def forward(ctx: Any, potential: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(potential, threshold)
        return torch.where(potential.abs() > threshold, potential, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        potential, threshold = ctx.saved_tensors
        excess = potential.abs() - threshold
        on_excess = grad * potential * step_slope(excess)
        on_potential = torch.where(excess > 0, grad, 0.0) + on_excess * potential.sign()
        return on_potential, -on_excess.flatten(0, -2).sum(0)


@register_primitive("resonate_and_fire", stage="dynamics", kind="causal", zero_at="readout", zero_scale=2.0)
class ResonateAndFire(Latent):
    """Damped oscillators ring at periods of their own, and what rises above a threshold is passed on.

    Biology: many cells have a membrane that resonates, so that two inputs one period apart fire them and two inputs
    half a period apart cancel.

    Equation: z_t = e^(-b + i omega) z_{t-1} + (D u)_t; m = sqrt(2 b) Im z; delta = s U (m where |m| > theta, else 0),
    with omega spread evenly in its logarithm from 2 pi / 64 to 2 pi / 4, b = 0.1 and theta = 0.5 at birth. There is no
    reset after a spike, so that the recurrence stays linear; the threshold has the slope of a sigmoid in backward.
    The threshold is on the magnitude: features with a large mean would hold a one-sided resonator on its silent side
    for good, where no gradient reaches it.

    Reference: Izhikevich 2001, Resonate-and-fire neurons, Neural Networks.

    Shapes: x (B, T, d) -> (B, T, d); the state z is complex, (B, T, rank).
    """

    rank: int = setting(8, low=1, high=256, meaning="number of resonators r")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_out)
        self.reader = read_in(self.rank, self.d_out)
        self.writer = read_out(self.d_out, self.rank)
        self.frequency = nn.Parameter(torch.logspace(math.log2(math.tau / 64), math.log2(math.tau / 4), self.rank, 2))
        self.damping = positive(0.1, self.rank)
        self.threshold = positive(0.5, self.rank)

    def code(self, drive: Tensor, context: Context) -> Tensor:
        return _Threshold.apply(self.potential(drive, context), context.once(nn.functional.softplus, self.threshold))

    def potential(self, drive: Tensor, context: Context) -> Tensor:
        """The membrane potential m of each resonator: (B, T, rank) -> (B, T, rank)."""
        decay, size = context.once(self.constants)
        return size * rotation("resonators", decay, self.frequency, drive, context).imag

    def constants(self) -> tuple[Tensor, Tensor]:
        """What a token leaves of the state, and what the potential is scaled by: (rank,) each."""
        damping = nn.functional.softplus(self.damping).clamp(1e-4, 10.0)
        return torch.exp(-damping), (2 * damping).sqrt()
