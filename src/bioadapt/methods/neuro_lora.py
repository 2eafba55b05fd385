"""NeuroLoRA: FlyLoRA whose units change their gain with the context before they compete."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from bioadapt.methods.fly_lora import FlyLora, chosen, linear
from bioadapt.primitives.base import Blend, Context, Host, Primitive, setting
from bioadapt.primitives.context import in_full
from bioadapt.registry import register_primitive


def gain(drive: Tensor) -> Tensor:
    """What an excitability is multiplied by: between 0 and 2, exactly 1 where nothing drives it."""
    return 2 * torch.sigmoid(drive)


def likeness(writers: Tensor, readers: Tensor | None = None) -> Tensor:
    """How much the experts of a block overlap, in the mean over all pairs of two, then over the blocks.

    Args:
        writers: columns of B, (blocks, r, d).
        readers: rows of A, (blocks, r, n). With them an expert is the matrix b_i a_i^T, and the overlap of two is the
            size of their cosine; without them it is the squared cosine of their columns.
    """
    cosine = _cosines(writers)
    overlap = cosine.square() if readers is None else (cosine * _cosines(readers)).abs()
    experts = writers.shape[1]
    others = 1 - torch.eye(experts, device=writers.device)
    return (overlap * others).sum((1, 2)).mean() / max(experts * (experts - 1), 1)


def _cosines(rows: Tensor) -> Tensor:
    rows = normalize(rows, dim=-1, eps=1e-6)  # columns are born as zeros, which have no direction
    return rows @ rows.mT


@register_primitive("neuro_lora", stage="plasticity", kind="weight", zero_at="update", learns=True, needs_input=True)
class NeuroLora(FlyLora):
    """FlyLoRA with a learned gain per unit and token, which acts before the units compete and in what they write.

    Biology: neuromodulators such as dopamine, noradrenaline and acetylcholine carry no message of their own; they tell
    whole populations what the situation is, by changing how strongly each cell answers to the same input.

    Equation: y = A v; m = 2 sigmoid(U silu(V h) + c); z = m y; S = the k largest of |z| + d;
    delta = (alpha / r) sum over i in S of B_i z_i; penalty = orthogonality mean over i != j of cos(B_i, B_j)^2. The
    context h is v or y; A and d are those of `fly_lora`; B = U = c = 0 at birth, so that m is exactly 1.

    Reference: Yang et al. 2026, NeuroLoRA: Context-aware neuromodulation for parameter-efficient multi-task adaptation,
    arXiv 2603.12378.

    Shapes: v (B, T, n) -> (B, T, d); A is (blocks r, n), B is (d, blocks r), V is (blocks g, n) or (blocks g, r), U is
    (blocks, r, g), c is (blocks r).

    Deviations: only the paper's abstract was at hand. It fixes that a light learned gate rescales the projection by
    context before experts are chosen and that a loss keeps experts orthogonal; the form of the gate, its width, its
    input, the loss and its weight are a reading of that, not the authors' formulas. The rescaled value, not y, is what
    is written: in the choice alone the gate would have no gradient. The context is the token itself; pooled contexts
    are left out, since a mean over the sequence would show later tokens to earlier ones. The map is never linear in v,
    so it merges in no case. ``orth_space="delta"`` takes |cos| of whole experts b_i a_i^T instead: with sparse random
    a_i that are nearly orthogonal from the start it hardly acts.
    """

    approximates: ClassVar[bool] = False
    combinations: ClassVar[tuple[str, ...]] = ("route", "average_B")

    gate_width: int = setting(8, low=1, high=1024, meaning="number of hidden units g of the gate")
    gate_input: str = setting(
        "token", choices=("token", "projection"), meaning="the context h: the layer's input, or its projection"
    )
    orthogonality: float = setting(0.1, low=0.0, high=10.0, meaning="weight of the penalty on experts alike")
    orth_space: str = setting(
        "columns", choices=("columns", "delta"), meaning="what is kept orthogonal: columns of B, or whole experts"
    )

    def build(self, host: Host) -> None:
        super().build(host)
        width = self.d_in if self.gate_input == "token" else self.r
        self.V = nn.Parameter(torch.empty(self.blocks * self.gate_width, width))
        nn.init.kaiming_uniform_(self.V, a=math.sqrt(5))
        self.U = nn.Parameter(torch.zeros(self.blocks, self.r, self.gate_width))
        self.c = nn.Parameter(torch.zeros(self.blocks * self.r))

    @classmethod
    def side_by_side(cls, parts: Sequence[Primitive]) -> dict[str, Tensor]:
        gates = {name: torch.cat([getattr(part, name).detach() for part in parts]) for name in ("U", "V", "c")}
        return super().side_by_side(parts) | gates

    @classmethod
    def blended(cls, parts: Sequence[Primitive], blend: Blend) -> dict[str, Tensor]:
        warnings.warn("the gates of NeuroLoRA adapters are averaged: that is meant for gates that began alike")
        gates = {name: blend([getattr(part, name).detach() for part in parts]) for name in ("U", "V", "c")}
        return super().blended(parts, blend) | gates

    def compete(self, v: Tensor, y: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        drive = self.drive(v, y)
        index = self.winners(gain(drive.detach()) * y.detach(), context)
        return gain(chosen(drive, index)) * chosen(y, index), index  # behind the choice, so that few are kept

    def drive(self, v: Tensor, y: Tensor) -> Tensor:
        """What the context says to each unit, (B, T, blocks r), in full precision."""
        if self.gate_input == "token":
            latent = in_full(linear(v, self.V)).unflatten(-1, (self.blocks, self.gate_width))
        else:
            own = y.unflatten(-1, (self.blocks, self.r))
            latent = torch.einsum("...br,bgr->...bg", own, self._as(own, self.V).unflatten(0, (self.blocks, -1)))
        spoken = torch.einsum("...bg,brg->...br", silu(latent), self._as(latent, self.U))
        return spoken.flatten(-2) + self._as(latent, self.c)

    @staticmethod
    def _as(like: Tensor, parameter: Tensor) -> Tensor:
        return parameter.to(like.dtype)

    def penalty(self) -> Tensor | None:
        if not self.orthogonality:
            return None
        writers = self.B.float().T.unflatten(0, (self.blocks, self.r))
        readers = self.A.unflatten(0, (self.blocks, self.r)) if self.orth_space == "delta" else None
        return self.orthogonality * likeness(writers, readers)
