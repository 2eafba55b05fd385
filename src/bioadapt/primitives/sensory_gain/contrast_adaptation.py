"""Contrast adaptation: the gain follows the recent variance of the signal."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import group_matrix, group_mean_square, pooling_matrix, positive
from bioadapt.primitives.modulation import Modulation
from bioadapt.primitives.time import decay_of, mean_reading, past_trace
from bioadapt.registry import register_primitive

FASTEST, SLOWEST = 4.0, 64.0  # time constants at birth, in tokens


@register_primitive("contrast_adaptation", stage="sensory_gain", kind="causal", zero_at="gate", zero_scale=8.0)
class ContrastAdaptation(Modulation):
    """Each group of channels is divided by how much it has been varying.

    Biology: when the contrast of a scene jumps, retinal and motion-sensitive neurons first overshoot and then return to
    their old range within a second, so that the same output range serves faint and strong scenes.

    Equation: q = E_tau(<c^2>_g) with c = x / rho and q_0 = 1; gain_t = sqrt((1 + sigma) / (q_{t-1} + sigma));
    delta = x (gain - 1).

    Reference: Fairhall et al. 2001, Efficiency and ambiguity in an adaptive neural code, Nature; Baccus and Meister
    2002, Fast and slow contrast adaptation in retinal circuitry, Neuron.

    Shapes: x (B, T, d) -> (B, T, d); the variance q is (B, T, groups).
    """

    reads_both_ways = True
    groups: int = setting(16, low=1, high=4096, meaning="number of channel groups that share a variance")

    def build(self, host: Host) -> None:
        self.groups = min(self.groups, self.d_out)
        self.log_tau = nn.Parameter(torch.linspace(math.log(FASTEST), math.log(SLOWEST), self.groups))
        self.sigma = positive(0.1, self.groups)
        self.log_level = nn.Parameter(torch.tensor([host.level]).log())
        self.register_buffer("membership", group_matrix(self.d_out, self.groups), persistent=False)
        self.register_buffer("pooling", pooling_matrix(self.d_out, self.groups), persistent=False)

    def factors(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        gain = mean_reading(self.gain, group_mean_square(x, self.pooling), context)
        return gain - 1, self.membership

    def gain(self, power: Tensor, context: Context) -> Tensor:
        """What each group is multiplied by, from the power of the tokens before: (B, T, groups) -> (B, T, groups)."""
        unit, decay, sigma, full = context.once(self.constants)
        variance = past_trace("variance", power * unit, decay, context, initial=1.0)
        return torch.sqrt(full / (variance + sigma))

    def constants(self) -> tuple[Tensor, ...]:
        """1 / rho^2 (1,); the decay, sigma and 1 + sigma of each group."""
        sigma = nn.functional.softplus(self.sigma)
        return torch.exp(-2 * self.log_level), decay_of(self.log_tau), sigma, 1 + sigma
