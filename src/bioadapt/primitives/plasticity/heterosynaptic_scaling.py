"""Heterosynaptic scaling: what some synapses gain, the others of the same neuron lose."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, OnWeight, setting
from bioadapt.primitives.frames import base_weight, read_out
from bioadapt.registry import register_primitive


@register_primitive(
    "heterosynaptic_scaling",
    stage="plasticity",
    kind="weight",
    zero_at="readout",
    zero_scale=2.0,
    merge="weight",
    needs_input=True,
)
class HeterosynapticScaling(OnWeight):
    """A low-rank change of the weights that leaves the length of every neuron's weight vector as it was.

    Biology: when a few synapses of a cell are potentiated, their neighbours are depressed, so that its total synaptic
    weight is conserved.

    Equation: kappa_i = |W_i| / |W_i + (B A)_i|; delta = (kappa - 1) (y - bias) + kappa B A v, with the rows of A frozen
    and orthonormal.

    Reference: Royer and Paré 2003, Conservation of total synaptic weight through balanced synaptic depression and
    potentiation, Nature; Oh, Parajuli and Zito 2015, Heterosynaptic structural plasticity on basal dendrites of CA1
    pyramidal neurons, Cell Rep.

    Shapes: y (B, T, d), v (B, T, n) -> (B, T, d); A is (rank, n), B is (d, rank).
    """

    readout = "change"
    rank: int = setting(8, low=1, high=256, meaning="rank r of the change")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_in)
        weight = base_weight(host, self.d_out, self.d_in).float()
        plane = torch.linalg.qr(host.normal("plane", self.d_in, self.rank)).Q.T.contiguous()
        self.register_buffer("plane", plane)
        self.register_buffer("power", weight.square().sum(1).cpu())  # |W_i|^2, (d,)
        self.register_buffer("overlap", (weight @ plane.T.to(weight.device)).cpu())  # W A^T, (d, rank)
        self.change = read_out(self.d_out, self.rank)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        lost, change = context.once(self.rescaled)
        bias = None if context.bias is None else -lost * context.bias.to(x.dtype)
        low_rank = nn.functional.linear(context.x_in @ self.plane.T, change, bias)
        return torch.addcmul(low_rank, x, lost)

    def rescaled(self) -> tuple[Tensor, Tensor]:
        """kappa - 1 (d,), and kappa times the change (d, rank)."""
        kappa = self.kappa(self.change)
        return kappa - 1, kappa[:, None] * self.change

    def kappa(self, change: Tensor) -> Tensor:
        """What shrinks each changed row to the length of the base row, (d,); exactly 1 without a change."""
        grown = self.power + (change * (2 * self.overlap + change)).sum(1)
        smallest = 1e-12
        return torch.sqrt(self.power.clamp(min=smallest) / grown.clamp(min=smallest))

    def weight_delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self.change.detach()
        kappa = self.kappa(change)[:, None]
        return (kappa - 1) * weight + kappa * (change @ self.plane), None
