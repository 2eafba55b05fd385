"""Predictive coding: what the past predicts is subtracted, and the surprise goes on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, Primitive, setting
from bioadapt.primitives.frames import report_loss, token_scale
from bioadapt.primitives.time import decay_of, mean_reading, past_trace
from bioadapt.registry import register_primitive


@register_primitive("predictive_coding", stage="memory", kind="causal", zero_at="gate", zero_scale=4.0)
class PredictiveCoding(Primitive):
    """A latent trace of the past predicts the present token; what remains is the error.

    Biology: in cortical hierarchies feedback carries predictions down and the forward path carries what they failed to
    explain.

    Equation: prediction_t = P E_tau(D u)_{t-1}; delta = s (u - prediction), with the rows of D orthonormal and P = D^T
    at birth.

    Reference: Rao and Ballard 1999, Predictive coding in the visual cortex: a functional interpretation of some
    extra-classical receptive-field effects, Nat Neurosci; Bastos et al. 2012, Canonical microcircuits for predictive
    coding, Neuron.

    Shapes: x (B, T, d) -> (B, T, d); the trace is (B, T, rank).

    As it comes, with ``auxiliary=0``, only the task's loss trains the predictor: it learns what to take away of the
    past for the task's sake, and need not predict, so that the error may grow beyond x. With ``auxiliary`` above 0 the
    squared error, in units of the token's own size, is one of the losses, and the predictor learns to predict.
    """

    reads_both_ways = True
    rank: int = setting(8, low=1, high=256, meaning="number of latent causes r")
    auxiliary: float = setting(0.0, low=0.0, high=10.0, meaning="weight of the squared error among the losses")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_out)
        self.causes = nn.Parameter(nn.init.orthogonal_(torch.empty(self.rank, self.d_out)))
        self.predictor = nn.Parameter(self.causes.detach().T.clone(memory_format=torch.contiguous_format))
        self.log_tau = nn.Parameter(torch.linspace(math.log(2), math.log(16), self.rank))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        scale = token_scale(x)
        expected = mean_reading(self.expected, (x @ self.causes.T) / scale, context)
        error = x - (scale * expected) @ self.predictor.T
        if self.auxiliary and context.losses is not None:
            report_loss(context, self.auxiliary, (error / scale).square())
        return error

    def expected(self, causes: Tensor, context: Context) -> Tensor:
        """What the causes before each token lead to expect: (B, T, rank) -> (B, T, rank)."""
        return past_trace("causes", causes, context.once(decay_of, self.log_tau), context)
