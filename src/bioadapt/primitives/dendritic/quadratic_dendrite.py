"""Quadratic dendrite: two inputs that meet on a dendrite multiply."""

from __future__ import annotations

from torch import Tensor

from bioadapt.primitives.base import Context, Host, Primitive, setting
from bioadapt.primitives.frames import read_in, read_out, token_scale
from bioadapt.primitives.latent import Latent, encoded
from bioadapt.primitives.modulation import modulated
from bioadapt.registry import register_primitive


@register_primitive(
    "quadratic_dendrite", stage="dendritic", kind="pointwise", zero_at="readout", zero_scale=0.25, needs_input=True
)
class QuadraticDendrite(Latent):
    """Products of projections of the input, or of one projection with the output, are added to each unit.

    Biology: the response of a dendrite to two synaptic inputs exceeds or falls short of their sum by a term that is
    proportional to the product of the two.

    Equation: delta = s U ((V1 w) * (V2 w)) with w = v / rms(v); with mode "ndi", the nonlinear dendritic integration of
    NSPDI-SNN, delta = x * (U V w).

    Reference: Li et al. 2014, Bilinearity in spatiotemporal integration of synaptic inputs, PLoS Comput Biol; Cai et
    al. 2025, NSPDI-SNN: An efficient lightweight SNN based on nonlinear synaptic pruning and dendritic integration,
    arXiv:2508.21566.

    Shapes: v (B, T, n), x (B, T, d) -> (B, T, d); V1 and V2 are (rank, n), stacked, U is (d, rank). With "ndi" there is
    one V.
    """

    rank: int = setting(6, low=1, high=256, meaning="number r of projections, or of pairs of them")
    mode: str = setting("bilinear", choices=("bilinear", "ndi"), meaning="what is multiplied: the input, or the output")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_in)
        self.branches = read_in(self.rank * (2 if self.mode == "bilinear" else 1), self.d_in)
        self.writer = read_out(self.d_out, self.rank)

    def drive(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        drive, _ = encoded(context.x_in, self.branches)
        return drive, token_scale(x)

    def code(self, drive: Tensor, context: Context) -> Tensor:
        """Products of the two drives of each pair: (..., 2 rank) -> (..., rank)."""
        first, second = drive.chunk(2, dim=-1)
        return first * second

    def transform(self, x: Tensor, context: Context) -> Tensor:
        if self.mode == "bilinear":
            return super().transform(x, context)
        drive, _ = encoded(context.x_in, self.branches)
        return modulated(x, drive, self.writer)

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        if self.mode == "bilinear":
            return super().scaled(x, context, scale, with_x)
        return Primitive.scaled(self, x, context, scale, with_x)
