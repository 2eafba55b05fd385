"""The sliding threshold: weak activity is depressed, strong activity potentiated, and what counts as strong moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bioadapt.primitives.base import Context, Fused, Host, LocalRule, Scaled, setting
from bioadapt.primitives.frames import masked_mean, token_count
from bioadapt.registry import register_primitive


class _Sliding(Fused):
    """scale_i x_i (1 - turn_i / (level + |x_i|)); keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor, level: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, turn, level, scale)
        return _share(x, turn, level).mul_(x).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, turn, level, scale = ctx.saved_tensors
        on_scale = _share(x, turn, level).mul_(x).mul_(grad).sum(tuple(range(x.dim() - 1)))
        # The derivative is 1 - turn level / (level + |x|)^2.
        slope = x.abs().add_(level).square_().reciprocal_().mul_(turn * -level).add_(1)
        return slope.mul_(scale).mul_(grad), None, None, on_scale


def _share(x: Tensor, turn: Tensor, level: Tensor) -> Tensor:
    return x.abs().add_(level).reciprocal_().mul_(-turn).add_(1)


@register_primitive("bcm_threshold", stage="plasticity", kind="pointwise", zero_at="gate", zero_scale=8.0, learns=True)
class BcmThreshold(LocalRule, Scaled):
    """Each channel has a threshold that follows its mean power; activity below it is reversed, above it amplified.

    Biology: whether the synapses of a visual neuron strengthen or weaken depends on whether its activity lies above or
    below a threshold, which itself rises with recent activity, so that cells become selective.

    Equation: y = |c| with c = x / rho; phi = y (y - theta) / (1 + y); delta = rho sgn(c) phi; theta starts at 1 and
    follows theta <- theta + eta (E[c^2] - theta). The level rho is that of the layer at birth and does not change.

    Reference: Bienenstock, Cooper and Munro 1982, Theory for the development of neuron selectivity: orientation
    specificity and binocular interaction in visual cortex, J Neurosci; the threshold E[c^2]: Intrator and Cooper 1992,
    Objective function formulation of the BCM theory of visual cortical plasticity: statistical connections, stability
    conditions, Neural Networks.

    Shapes: x (B, T, d) -> (B, T, d); theta is (d,).
    """

    rate: float = setting(0.05, low=0.0, high=1.0, meaning="learning rate eta of the threshold")

    def build(self, host: Host) -> None:
        self.register_buffer("level", torch.tensor([host.level]))
        self.register_buffer("threshold", torch.ones(self.d_out))
        self.declare_statistics(power=(self.d_out,))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        self.watch(x, context)
        activity = x.abs() / self.level
        return self.level * x.sign() * activity * (activity - self.threshold) / (1 + activity)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        self.watch(x, context)
        # rho sgn(c) phi is x (1 - (1 + theta) / (1 + |x| / rho)).
        return _Sliding.apply(x, context.once(self.excess), self.level, scale)

    def excess(self) -> Tensor:
        """(1 + theta) rho, (d,)."""
        return (1 + self.threshold) * self.level

    @torch.no_grad()
    def watch(self, x: Tensor, context: Context) -> None:
        """Observe E[c^2]."""
        if self.training and context.observing:
            power = masked_mean(x.square(), context.mask) / self.level.square()
            self.observe(context, tokens=token_count(x, context.mask), power=power)

    def learn(self, fresh: Tensor) -> None:
        self.threshold.add_(fresh * self.rate * (self.observed_power - self.threshold))
