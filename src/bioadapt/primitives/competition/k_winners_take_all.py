"""k winners take all: the strongest units fire, the others are silenced."""

from __future__ import annotations

import math

from torch import Tensor

from bioadapt.primitives.base import Context, Primitive, setting
from bioadapt.registry import register_primitive


def losers(x: Tensor, k: int) -> Tensor:
    """x with its k entries of largest magnitude set to zero: (..., d) -> (..., d)."""
    # Writing at indices, not comparing with a threshold, so that ties cannot change k.
    return x.scatter(-1, x.detach().abs().topk(k, dim=-1, sorted=False).indices, 0.0)


@register_primitive("k_winners_take_all", stage="competition", kind="pointwise", zero_at="gate")
class KWinnersTakeAll(Primitive):
    """Only the k strongest units of a token pass, unchanged; all others are silenced.

    Biology: inhibition that is fast and shared by a whole population leaves time for only the most strongly driven
    cells to fire before it arrives.

    Equation: delta = (mask_k(|x|) - 1) x, where mask_k is 1 at the k = ceil(fraction d) largest magnitudes.

    Reference: Maass 2000, On the computational power of winner-take-all, Neural Comput; Makhzani and Frey 2015,
    Winner-take-all autoencoders, NeurIPS.

    Shapes: x (B, T, d) -> (B, T, d). Homogeneous of degree one.
    """

    fraction: float = setting(0.25, low=0.05, high=0.9, meaning="share of the units that win")

    @property
    def winners(self) -> int:
        """k, the number of units that pass."""
        return math.ceil(self.fraction * self.d_out - 1e-9)  # 0.07 * 100 is 7.000000000000001

    def transform(self, x: Tensor, context: Context) -> Tensor:
        return -losers(x, self.winners)
