"""ON and OFF channels: increments and decrements are carried apart, each with a threshold and a gain of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Scaled
from bioadapt.primitives.frames import measured_scale, positive, token_scale
from bioadapt.registry import register_primitive


class _Halves(Fused):
    """Keeps x and its scale; backward rectifies again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, on: Tensor, off: Tensor, high: Tensor, low: Tensor) -> Tensor:
        scale = measured_scale(x)
        ctx.save_for_backward(x, scale, on, off, high, low)
        rise, fall = _rectified(x, scale, high, low)
        return rise.mul_(on).addcmul_(fall, off).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, scale, on, off, high, low = ctx.saved_tensors
        rise, fall = _rectified(x, scale, high, low)
        sized = grad * scale
        width, weight = x.shape[-1], scale.flatten()
        on_on = torch.mul(sized, rise).sum(tuple(range(x.dim() - 1)))
        on_off = sized.mul_(fall).sum(tuple(range(x.dim() - 1)))
        rise, fall = rise.sign_().mul_(grad), fall.sign_().neg_().mul_(grad)  # the gradient where each half is open
        on_high = (weight @ rise.flatten(0, -2)).mul_(on).neg_()
        on_low = (weight @ fall.flatten(0, -2)).mul_(off)
        on_scale = (fall @ (off * low)).sub_(rise @ (on * high))[..., None] / (scale * width)
        return rise.mul_(on).addcmul_(fall, off).add_(x * on_scale), on_on, on_off, on_high, on_low


def _rectified(x: Tensor, scale: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """[u - high]_+ and -[-u - low]_+ of u = x / scale."""
    u = x / scale
    rise = torch.sub(u, high).relu_()
    return rise, u.add_(low).clamp_(max=0)


def half_waves(x: Tensor, on: Tensor, off: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """s (on [u - high]_+ - off [-u - low]_+) with u = x / s, s the scale of the token: x (..., d), the rest (d,)."""
    return _Halves.apply(x, on, off, high, low)


@register_primitive("on_off_rectification", stage="sensory_gain", kind="pointwise", zero_at="gate")
class OnOffRectification(Scaled):
    """Each feature is split at two thresholds into an ON and an OFF half with separate gains.

    Biology: from the first synapse of the retina on, bright and dark are signalled by different cells, each silent for
    the other's contrast and each with its own threshold and gain.

    Equation: delta = s (a_on [u - theta_on]_+ - a_off [-u - theta_off]_+), with gains of 1 and thresholds of 0.3 at
    birth, the thresholds never negative.

    Reference: Schiller 1992, The ON and OFF channels of the visual system, TINS.

    Shapes: x (B, T, d) -> (B, T, d), elementwise but for the scale of the token. Homogeneous of degree one.
    """

    def build(self, host: Host) -> None:
        self.on_gain = nn.Parameter(torch.ones(self.d_out))
        self.off_gain = nn.Parameter(torch.ones(self.d_out))
        self.on_threshold = positive(0.3, self.d_out)
        self.off_threshold = positive(0.3, self.d_out)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        scale, (high, low) = token_scale(x), self.thresholds()
        u = x / scale
        return scale * (self.on_gain * torch.relu(u - high) - self.off_gain * torch.relu(-u - low))

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        return half_waves(x, *context.once(self.halves, scale))

    def halves(self, scale: Tensor) -> tuple[Tensor, ...]:
        """``scale`` times the gains of both halves, and their thresholds: (d,) each."""
        return scale * self.on_gain, scale * self.off_gain, *self.thresholds()

    def thresholds(self) -> tuple[Tensor, Tensor]:
        """Of the ON and of the OFF half, (d,) each."""
        return nn.functional.softplus(self.on_threshold), nn.functional.softplus(self.off_threshold)
