"""Serotonin: a global level sets how far back the memory reaches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import positive, read_in, read_out
from bioadapt.primitives.latent import Latent, encoded
from bioadapt.primitives.time import decay_of, trace
from bioadapt.registry import register_primitive

TAUS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)  # of the bank, in tokens
SENSITIVITY = 3.0  # of the level; more or less of it is the size of its weights


@register_primitive("serotonin_horizon", stage="plasticity", kind="causal", zero_at="readout", zero_scale=4.0)
class SerotoninHorizon(Latent):
    """A bank of traces from fast to slow is read at the time constant that a slow level of the features points to.

    Biology: serotonin neurons of the raphe fire while an animal waits for a delayed reward, and raising their activity
    makes it wait longer: their level sets the horizon over which outcomes count.

    Equation: h_j = E_{tau_j}(D u) with tau_j = 2, 4, .., 64; level l = sigmoid(3 E_8(w u) + b);
    log tau* = lo + (hi - lo) l; the weights of the bank are softmax_j(-((log tau_j - log tau*) / width)^2 / 2) with a
    width of 0.7; delta = s U sum_j w_j h_j, with U = 0 at birth. Trainable beside D, U and w are b, lo, hi, the width
    and the time constant of the level.

    Reference: Doya 2002, Metalearning and neuromodulation, Neural Networks; Miyazaki et al. 2014, Optogenetic
    activation of dorsal raphe serotonin neurons enhances patience for future rewards, Curr Biol.

    Shapes: x (B, T, d) -> (B, T, d); the bank is (B, T, 6, rank), the level (B, T, 1).
    """

    rank: int = setting(4, low=1, high=256, meaning="number r of latents that are remembered")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_out)
        self.reader = read_in(self.rank, self.d_out)
        self.writer = read_out(self.d_out, self.rank)
        self.mood = read_in(1, self.d_out)
        self.bias = nn.Parameter(torch.zeros(1))
        self.log_tau = nn.Parameter(torch.tensor([math.log(8.0)]))
        self.shortest = nn.Parameter(torch.tensor([math.log(TAUS[0])]))
        self.longest = nn.Parameter(torch.tensor([math.log(TAUS[-1])]))
        self.width = positive(0.7, 1)
        self.register_buffer("log_taus", torch.tensor(TAUS).log(), persistent=False)

    def drive(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Latents and mood, (B, T, rank + 1), and the scale of each token."""
        return encoded(x, context.once(self.readers))

    def readers(self) -> Tensor:
        """Of the latents and of the mood, (rank + 1, d)."""
        return torch.cat([self.reader, self.mood])

    def code(self, scores: Tensor, context: Context) -> Tensor:
        """The reading of the bank from latents and mood: (B, T, rank + 1) -> (B, T, rank)."""
        latent, mood = scores.split([self.rank, 1], dim=-1)
        series = torch.cat([latent.repeat(1, 1, len(TAUS)), mood], -1)
        traces = trace("bank", series, context.once(self.decays), context)
        bank, mood = traces.split([len(TAUS) * self.rank, 1], dim=-1)
        return (self.weights(mood, context)[..., None, :] @ bank.unflatten(-1, (len(TAUS), -1))).squeeze(-2)

    def decays(self) -> Tensor:
        """Of the bank and of the mood, (6 rank + 1,)."""
        return torch.cat([decay_of(self.log_taus).repeat_interleave(self.rank), decay_of(self.log_tau)])

    def weights(self, mood: Tensor, context: Context) -> Tensor:
        """How much each trace of the bank counts, (B, T, 1) -> (B, T, 6)."""
        far, span, width = context.once(self.constants)
        level = torch.sigmoid(torch.add(self.bias, mood, alpha=SENSITIVITY))
        distance = torch.addcmul(far, span, level) / width
        return torch.softmax(-0.5 * distance.square(), -1)

    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """How far each trace is beyond the shortest horizon (6,), minus the span of horizons (1,), the width (1,)."""
        width = nn.functional.softplus(self.width) + 1e-3
        return self.log_taus - self.shortest, self.shortest - self.longest, width
