"""Lateral inhibition: each unit subtracts what its neighbours do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, Primitive, setting
from bioadapt.primitives.frames import inverse_softplus
from bioadapt.registry import register_primitive


def inhibited(x: Tensor, pools: Tensor, sources: Tensor) -> Tensor:
    """sgn(x) [|x| - inhibition]_+ with the inhibition of unit i free of unit i itself.

    x (..., d); pools P (d, r), sources Q (r, d), both non-negative. Returns (..., d).
    """
    rate = x.abs()
    own = (pools * sources.T).sum(-1)  # diag(PQ), (d,)
    inhibition = (rate @ sources.T) @ pools.T - own * rate
    return torch.sign(x) * torch.relu(rate - inhibition)


@register_primitive("lateral_inhibition", stage="competition", kind="pointwise", zero_at="gate")
class LateralInhibition(Primitive):
    """Each unit is reduced by a weighted sum of its neighbours' activity, down to silence.

    Biology: in the eye of Limulus, and in every sensory sheet since, neighbouring receptors inhibit each other, which
    sharpens contrast.

    Equation: f = sgn(x) [|x| - (PQ|x| - diag(PQ)|x|)]_+, delta = f - x, with P (d, r) and Q (r, d) non-negative.

    Reference: Hartline and Ratliff 1957, Inhibitory interaction of receptor units in the eye of Limulus, J Gen Physiol.

    Shapes: x (B, T, d) -> (B, T, d). Homogeneous of degree one, so no frame is needed.
    """

    rank: int = setting(4, low=1, high=64, meaning="number of inhibitory pools r")

    def build(self, host: Host) -> None:
        d, r = self.d_out, self.rank
        noise = 0.1 * torch.randn(d, r)
        self.pools = nn.Parameter(inverse_softplus(0.3 / r) + noise)
        self.sources = nn.Parameter(inverse_softplus(1.0) + 0.1 * torch.randn(r, d))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        pools = nn.functional.softplus(self.pools)
        sources = nn.functional.softplus(self.sources) / self.d_out
        return inhibited(x, pools, sources) - x
