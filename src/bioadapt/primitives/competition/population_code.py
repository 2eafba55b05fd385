"""Population code: overlapping tuning curves read a unit's value, and their votes write a new one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Scaled, setting
from bioadapt.primitives.frames import token_scale
from bioadapt.registry import register_primitive

EDGE = 2.5  # the outermost centres, in units of the token's scale


class _Votes(Fused):
    """Keeps x, the result and the sum of all tuning curves; never an axis over centres.

    On equal spaces the normalized Gaussians are a ratio of polynomials: with q = exp(4 u / spacing) the k-th is
    c_k q^(k - m) over the sum of all. m is the middle, since powers counted from either end would overflow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
        heights, middle = _heights(weights.shape[0])
        _, up, down = _powers(x, scale, weights.shape[0])
        total = _series([x.new_full((), height) for height in heights], middle, up, down)
        votes = _series([height * row for height, row in zip(heights, weights, strict=True)], middle, up, down)
        votes.div_(total)
        ctx.save_for_backward(x, scale, weights, votes, total)
        return votes * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, weights, votes, total = ctx.saved_tensors
        heights, middle = _heights(weights.shape[0])
        u, up, down = _powers(x, scale, weights.shape[0])
        axes = tuple(range(x.dim() - 1))
        share = (grad * scale).div_(total)
        on_weights, on_exponent = torch.empty_like(weights), torch.zeros_like(x)
        for step, places in ((up, range(middle, weights.shape[0])), (down, range(middle - 1, -1, -1))):
            power = share.clone()
            for k in places:
                if k != middle:
                    power.mul_(step)
                    on_exponent.addcmul_(weights[k] - votes, power, value=(k - middle) * heights[k])
                on_weights[k] = power.sum(axes) * heights[k]
        inside = u.abs().lt_(EDGE)
        on_u = on_exponent.mul_(inside).mul_(2 * (weights.shape[0] - 1) / EDGE)
        on_scale = torch.linalg.vecdot(grad, votes)[..., None] - torch.linalg.vecdot(on_u, u)[..., None] / scale
        return on_u.div_(scale), on_scale, on_weights


def _heights(centres: int) -> tuple[list[float], int]:
    """The coefficient of each centre, and the centre from which powers count."""
    return [math.exp(-2 * (k - (centres - 1) / 2) ** 2) for k in range(centres)], centres // 2


def _powers(x: Tensor, scale: Tensor, centres: int) -> tuple[Tensor, Tensor, Tensor]:
    """u within the range, q and 1 / q."""
    u = (x / scale).clamp_(-EDGE, EDGE)
    q = (u * (2 * (centres - 1) / EDGE)).exp_()
    return u, q, q.reciprocal()


def _series(coefficients: list[Tensor], middle: int, up: Tensor, down: Tensor) -> Tensor:
    """sum_k coefficients_k q^(k - middle), from both ends by Horner's rule."""
    upper, lower = coefficients[-1].expand_as(up), coefficients[0]
    for coefficient in coefficients[middle:-1][::-1]:
        upper = torch.addcmul(coefficient, upper, up)
    for coefficient in coefficients[1:middle]:
        lower = torch.addcmul(coefficient, lower, down)
    return torch.addcmul(upper, lower, down)


def voted(x: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    """scale sum_k weights_ki phi_k(x_i / scale): x (..., d), scale (..., 1), weights (K, d) -> (..., d)."""
    return _Votes.apply(x, scale, weights)


@register_primitive("population_code", stage="competition", kind="pointwise", zero_at="readout", zero_scale=4.0)
class PopulationCode(Scaled):
    """Each unit's value is read by cells with overlapping preferences, whose weighted vote is added to it.

    Biology: motor and sensory cortex represent one quantity by many broadly tuned cells; the quantity is read out as
    the average of their preferences, weighted by their rates.

    Equation: phi_k(u) is exp(-(u - mu_k)^2 / (2 sigma^2)), normalized over k, with centres mu_k from -2.5 to 2.5, sigma
    half their spacing and u held in that range; delta_i = s sum_k w_ki phi_k(u_i).

    Reference: Pouget, Dayan and Zemel 2000, Information processing with population codes, Nat Rev Neurosci;
    Georgopoulos, Schwartz and Kettner 1986, Neuronal population coding of movement direction, Science.

    Shapes: x (B, T, d) -> (B, T, d), one learned curve per channel; w is (centres, d).
    """

    readout = "votes"
    # More would leave the range of fp32, in which powers of q are computed.
    centres: int = setting(6, low=2, high=12, meaning="number K of tuning curves per channel")

    def build(self, host: Host) -> None:
        self.votes = nn.Parameter(torch.zeros(self.centres, self.d_out))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        scale = token_scale(x)
        preferred = torch.linspace(-EDGE, EDGE, self.centres, device=x.device)
        width = EDGE / (self.centres - 1)  # half the distance of neighbours
        distance = (x / scale).clamp(-EDGE, EDGE)[..., None] - preferred
        tuning = torch.softmax(-(distance**2) / (2 * width**2), dim=-1)
        return scale * (tuning * self.votes.T).sum(-1)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        return voted(x, token_scale(x), context.once(torch.mul, scale, self.votes))
