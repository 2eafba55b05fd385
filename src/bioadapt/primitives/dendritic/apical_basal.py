"""Apical-basal coincidence: what arrives now counts where the past expects it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Scaled, setting
from bioadapt.primitives.frames import positive, read_in, read_out, token_scale
from bioadapt.primitives.time import decay_of, past_trace, readings
from bioadapt.registry import register_primitive

STRONGEST = 80.0  # beyond it exp would leave the range of fp32


class _Coincidence(Fused):
    """Keeps x and what is narrow; backward computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frame: Tensor, basal: Tensor, past: Tensor, weights: Tensor, rest: Tensor, scale: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, frame, basal, past, weights, rest, scale)
        change = _beyond(x, frame, basal).mul_(x.sign())
        return change.mul_(_total(_bursts(past, weights, rest))).mul_(scale / len(past))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, frame, basal, past, weights, rest, scale = ctx.saved_tensors
        sign, above, share = x.sign(), _beyond(x, frame, basal), scale / len(past)
        bursts, resting = _bursts(past, weights, rest), rest.sigmoid()
        on_rate = grad.mul(sign).mul_(_total(bursts))
        on_scale = torch.dot(on_rate.flatten(), above.flatten())[None] / len(past)
        on_burst = (grad * sign).mul_(above).mul_(share)
        on_rest = on_burst.sum(0) * resting * (resting - 1) * len(past)
        on_past, on_weights = torch.empty_like(past), torch.zeros_like(weights)
        for burst, latents, on_latents in zip(bursts, past, on_past, strict=True):
            rate = burst.add_(resting)  # the sigmoid itself, whose slope follows
            slope = torch.addcmul(rate, rate, rate, value=-1).mul_(on_burst)
            torch.mm(slope, weights, out=on_latents)
            on_weights.addmm_(slope.mT, latents)
            on_rest += slope.sum(0)
        on_rate.mul_(share).mul_(above.sign_())
        return (
            on_rate * sign,
            (on_rate @ -basal)[:, None],
            frame.mT[0] @ -on_rate,
            on_past,
            on_weights,
            on_rest,
            on_scale,
        )


def _beyond(x: Tensor, frame: Tensor, basal: Tensor) -> Tensor:
    """[|x| - s theta]_+."""
    return x.abs().addcmul_(frame, basal, value=-1).clamp_(min=0.0)


def _bursts(past: Tensor, weights: Tensor, rest: Tensor) -> list[Tensor]:
    """sigmoid(W h + rest) - sigmoid(rest), for each reading h of the past."""
    resting = rest.sigmoid()
    bursts = []
    for latents in past:
        # Written so that no drive gives exactly zero: a difference of two sigmoids may leave a rounding error.
        growth = (latents @ weights.mT).clamp_(max=STRONGEST).exp_().sub_(1)
        divisor = torch.mul(growth, resting).add_(1)
        bursts.append(growth.mul_(resting * (1 - resting)).div_(divisor))
    return bursts


def _total(bursts: list[Tensor]) -> Tensor:
    return bursts[0] if len(bursts) == 1 else bursts[0] + bursts[1]


def coincidence(
    x: Tensor, frame: Tensor, basal: Tensor, past: Tensor, weights: Tensor, rest: Tensor, scale: Tensor
) -> Tensor:
    """scale sgn(x) [|x| - s theta]_+ (sigmoid(W h + rest) - sigmoid(rest)), averaged over the R readings of the past.

    x (..., d); frame s (..., 1); basal theta and rest (d,); past h (R, ..., r), weights W (d, r), scale (1,).
    """
    wide = x.reshape(-1, x.shape[-1])
    narrow = frame.reshape(-1, 1), basal, past.reshape(past.shape[0], -1, past.shape[-1])
    return _Coincidence.apply(wide, *narrow, weights, rest, scale).view(x.shape)


@register_primitive("apical_basal", stage="dendritic", kind="causal", zero_at="readout", zero_scale=4.0)
class ApicalBasal(Scaled):
    """A unit bursts if its own drive of now and a prediction from the past are both above threshold.

    Biology: pyramidal cells of layer 5 receive feed-forward input at their basal and context at their apical dendrites;
    a calcium spike turns the coincidence of both into a burst.

    Equation: h = E_tau(V u) sqrt((1 + a) / (1 - a)), p_t = U h_{t-1};
    delta = s sgn(u) [|u| - theta_b]_+ (sigmoid(beta (p - theta_a)) - sigmoid(-beta theta_a)).

    Reference: Larkum, Zhu and Sakmann 1999, A new cellular mechanism for coupling inputs arriving at different cortical
    layers, Nature; Larkum 2013, A cellular mechanism for cortical associations: an organizing principle for the
    cerebral cortex, Trends Neurosci.

    Shapes: x (B, T, d) -> (B, T, d); the trace is (B, T, rank), V is (rank, d), U is (d, rank). The factor of the trace
    gives it the variance of V u.
    """

    readout = "apical"
    reads_both_ways = True
    rank: int = setting(8, low=1, high=256, meaning="number r of traces of the past")

    def build(self, host: Host) -> None:
        d, r = self.d_out, self.rank
        self.reader = read_in(r, d)
        self.log_tau = nn.Parameter(torch.linspace(math.log(4), math.log(64), r))
        self.apical = read_out(d, r)
        self.basal_threshold, self.apical_threshold = positive(0.2, d), positive(0.5, d)
        self.steepness = positive(4.0, 1)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        softplus, frame = nn.functional.softplus, token_scale(x)
        basal = x.sign() * torch.relu(x.abs() - frame * softplus(self.basal_threshold))
        prediction = readings(self.past, (x @ self.reader.T) / frame, context) @ self.apical.T
        steepness, threshold = softplus(self.steepness), softplus(self.apical_threshold)
        apical = torch.sigmoid(steepness * (prediction - threshold)) - torch.sigmoid(-steepness * threshold)
        return basal * apical.mean(0)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        frame = token_scale(x)
        past = readings(self.past, (x @ self.reader.T) / frame, context)
        basal, weights, rest = context.once(self.constants)
        return coincidence(x, frame, basal, past, weights, rest, scale)

    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """theta_b (d,), beta U (d, rank) and -beta theta_a (d,)."""
        softplus = nn.functional.softplus
        steepness = softplus(self.steepness)
        return softplus(self.basal_threshold), steepness * self.apical, -steepness * softplus(self.apical_threshold)

    def past(self, latents: Tensor, context: Context) -> Tensor:
        """h_{t-1}: (B, T, rank) -> (B, T, rank)."""
        decay, size = context.once(self.decay)
        return past_trace("past", latents, decay, context) * size

    def decay(self) -> tuple[Tensor, Tensor]:
        """a, and what gives the trace the variance of what it reads: (rank,) each."""
        decay = decay_of(self.log_tau)
        return decay, torch.sqrt((1 + decay) / (1 - decay))
