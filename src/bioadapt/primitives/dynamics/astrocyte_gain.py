"""Astrocyte gain: a slow signal of a territory sets the gain of all synapses in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import group_matrix, group_mean_magnitude, pooling_matrix, positive
from bioadapt.primitives.modulation import Modulation
from bioadapt.primitives.time import decay_of, mean_reading, past_trace
from bioadapt.registry import register_primitive


def exchange_matrix(domains: int) -> Tensor:
    """What each domain gains from its neighbours and loses to them, (G, G); nothing leaves at the two ends."""
    chain = torch.diag(torch.ones(domains - 1), 1)
    chain = chain + chain.T
    return chain - torch.diag(chain.sum(0))


@register_primitive("astrocyte_gain", stage="dynamics", kind="causal", zero_at="gate", zero_scale=16.0)
class AstrocyteGain(Modulation):
    """Activity summed over a territory and many tokens raises or lowers the gain of everything in it.

    Biology: an astrocyte listens to the thousands of synapses in its territory, adds their activity up as calcium over
    seconds, shares it with its neighbours, and modulates all of its synapses, the silent ones included.

    Equation: q = <|x / rho|>_g, smoothed over neighbouring domains with weights (D, 1 - 2 D, D);
    Ca = E_tau(q - theta); delta = x A tanh(kappa Ca_{t-1}), with D = sigmoid / 2, 0.1 at birth. At both ends of the
    chain, the share of the missing neighbour stays where it is.

    Reference: Araque et al. 1999, Tripartite synapses: glia, the unacknowledged partner, Trends Neurosci; Perea,
    Navarrete and Araque 2009, Tripartite synapses: astrocytes process and control synaptic information, Trends
    Neurosci.

    Shapes: x (B, T, d) -> (B, T, d); the calcium is (B, T, groups).
    """

    reads_both_ways = True
    groups: int = setting(16, low=1, high=4096, meaning="number of domains")
    tau: float = setting(64.0, low=1.0, high=4096.0, meaning="time constant of the calcium at birth, in tokens")

    def build(self, host: Host) -> None:
        self.groups = min(self.groups, self.d_out)
        self.log_tau = nn.Parameter(torch.full((self.groups,), math.log(self.tau)))
        self.set_point = positive(0.5, self.groups)
        self.sensitivity = positive(6.0, self.groups)
        self.amplitude = nn.Parameter(torch.ones(self.groups))
        self.coupling = nn.Parameter(torch.logit(torch.tensor([0.2])))
        self.log_level = nn.Parameter(torch.tensor([host.level]).log())
        self.register_buffer("membership", group_matrix(self.d_out, self.groups), persistent=False)
        self.register_buffer("pooling", pooling_matrix(self.d_out, self.groups), persistent=False)
        self.register_buffer("exchange", exchange_matrix(self.groups), persistent=False)

    def factors(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        drive = nn.functional.linear(group_mean_magnitude(x, self.pooling), context.once(self.spread))
        excess = drive - context.once(nn.functional.softplus, self.set_point)
        return mean_reading(self.gain, excess, context), self.membership

    def spread(self) -> Tensor:
        """What each domain hears of each group's magnitude, its own and its neighbours': (groups, groups)."""
        own = torch.eye(self.groups, dtype=self.exchange.dtype, device=self.exchange.device)
        return (own + 0.5 * torch.sigmoid(self.coupling) * self.exchange).mT / self.log_level.exp()

    def gain(self, excess: Tensor, context: Context) -> Tensor:
        """A tanh(kappa Ca_{t-1}) from the activity beyond the set point: (B, T, groups) -> (B, T, groups)."""
        calcium = past_trace("calcium", excess, context.once(decay_of, self.log_tau), context)
        return self.amplitude * torch.tanh(context.once(nn.functional.softplus, self.sensitivity) * calcium)
