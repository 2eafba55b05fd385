"""Vesicle release: a synapse transmits in quanta, and more reliably when it is driven."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, Primitive, setting
from bioadapt.primitives.frames import positive, token_scale
from bioadapt.registry import register_primitive


class _Release(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, sites: int) -> Tensor:
        # Counting the rarer outcome, release or failure, keeps its first probability from underflowing. Comparisons in
        # place stay in floating point, which a CPU does several times faster than through booleans.
        common = torch.maximum(p, 1 - p)
        mass, odds = common.clone(), (1 - common).div_(common)
        for _ in range(1, sites):
            mass.mul_(common)
        uniform, below = torch.rand_like(p), mass.clone()
        count = uniform.clone().gt_(below)
        for n in range(1, sites):
            below.add_(mass.mul_(odds).mul_((sites - n + 1) / n))
            count.add_(uniform.clone().gt_(below))
        return count.sub_(p.round(), alpha=sites).abs_().div_(sites)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def released_share(p: Tensor, sites: int) -> Tensor:
    """n / sites with n ~ Binomial(sites, p), elementwise; the gradient passes straight through to p.

    One uniform number per element is compared with the cumulative distribution: drawing every site on its own costs
    ``sites`` times as many random numbers, which dominate on a CPU.
    """
    return _Release.apply(p, sites)


@register_primitive("vesicle_release", stage="dendritic", kind="pointwise", zero_at="gate", stochastic=True)
class VesicleRelease(Primitive):
    """Transmission is the outcome of a few unreliable release sites, whose mean is used at evaluation.

    Biology: a synapse releases an integer number of vesicles from its sites; each site fails often at rest and rarely
    when the cell is strongly driven.

    Equation: p = sigmoid(a + b |u|); in training delta = x n / N with n ~ Binomial(N, p), in evaluation delta = x p.

    Reference: del Castillo and Katz 1954, Quantal components of the end-plate potential, J Physiol; Branco and Staras
    2009, The probability of neurotransmitter release, Nat Rev Neurosci.

    Shapes: x (B, T, d) -> (B, T, d), elementwise.
    """

    sites: int = setting(4, low=1, high=64, meaning="number N of release sites")

    def build(self, host: Host) -> None:
        self.rest = nn.Parameter(torch.full((self.d_out,), -0.5))
        self.drive = positive(1.0, self.d_out)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        p = self.probability(x)
        return x * (released_share(p, self.sites) if self.training else p)

    def probability(self, x: Tensor) -> Tensor:
        """The release probability of each unit, (B, T, d)."""
        rate = x.abs() * token_scale(x).reciprocal()
        return (nn.functional.softplus(self.drive) * rate).add_(self.rest).sigmoid_()
