"""Noradrenaline: an unexpected change interrupts, and what was held is let go."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import mean_square, positive, read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.primitives.time import decay_of, past_trace, recurrence
from bioadapt.registry import register_primitive

FLOOR = 0.05  # added to the variance, so that a calm past does not make everything a surprise


@register_primitive("noradrenaline_reset", stage="plasticity", kind="causal", zero_at="readout", zero_scale=2.0)
class NoradrenalineReset(Latent):
    """A slow memory of latents that a surprise clears, so that it starts again from what is new.

    Biology: neurons of the locus coeruleus fire a burst at an unexpected change; the noradrenaline that they release
    all over the cortex interrupts ongoing activity and lets networks settle anew.

    Equation: z = D u; m = E_8(z); e = mean (z - m_{t-1})^2; V = E_8(e) with V_0 = 1;
    nu = sigmoid(kappa (e / (V_{t-1} + 0.05) - theta)); h_t = a (1 - nu) h_{t-1} + (1 - a (1 - nu)) z with
    a = exp(-1/32) at birth; delta = s U h, with U = 0 at birth. The time constant of a is one per latent, that of m and
    V is one number; the surprise comes from a trace that is never reset.

    Reference: Bouret and Sara 2005, Network reset: a simplified overarching theory of locus coeruleus noradrenaline
    function, TINS; Dayan and Yu 2006, Phasic norepinephrine: a neural interrupt signal for unexpected events, Network.

    Shapes: x (B, T, d) -> (B, T, d); the memory h is (B, T, rank).
    """

    rank: int = setting(8, low=1, high=256, meaning="number r of latents")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_out)
        self.reader = read_in(self.rank, self.d_out)
        self.writer = read_out(self.d_out, self.rank)
        self.log_tau = nn.Parameter(torch.full((self.rank,), math.log(32.0)))
        self.log_tau_surprise = nn.Parameter(torch.tensor([math.log(8.0)]))
        self.steepness = positive(2.0, 1)
        self.threshold = nn.Parameter(torch.tensor([3.0]))

    def code(self, z: Tensor, context: Context) -> Tensor:
        """h, (B, T, rank) -> (B, T, rank)."""
        kept = context.once(decay_of, self.log_tau) * (1 - self.interrupt(z, context))
        return recurrence("memory", kept, (1 - kept) * z, context)

    def interrupt(self, z: Tensor, context: Context) -> Tensor:
        """nu, how much each token lets go: (B, T, rank) -> (B, T, 1)."""
        decay = context.once(decay_of, self.log_tau_surprise)
        error = mean_square(z - past_trace("mean", z, decay, context))
        variance = past_trace("variance", error, decay, context, initial=1.0)
        surprise = error / (variance + FLOOR)
        return torch.sigmoid(context.once(nn.functional.softplus, self.steepness) * (surprise - self.threshold))
