"""Cerebellar granule layer: a wide sparse code of the input, read out by an error that comes in spikes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Scaled, setting
from bioadapt.primitives.frames import check_indices, positive, read_out, token_scale
from bioadapt.registry import register_primitive


def granule_drive(v: Tensor, wiring: Tensor) -> Tensor:
    """What reaches each granule cell from its mossy fibres: v (N, n), wiring (cells, claws) -> (cells, N)."""
    # Cells lie in rows: what is gathered is then contiguous, and costs a third of a product with the dense matrix.
    return nn.functional.embedding_bag(wiring, v.mT.contiguous(), mode="sum").div_(wiring.shape[1] ** 0.5)


def mossy_drive(on_drive: Tensor, wiring: Tensor, fibres: int) -> Tensor:
    """The transpose of `granule_drive`: (cells, N) -> (N, fibres)."""
    ordered, order = wiring.flatten().sort()
    first = torch.searchsorted(ordered, torch.arange(fibres, device=wiring.device))
    on_v = nn.functional.embedding_bag(order // wiring.shape[1], on_drive, first, mode="sum")
    return on_v.mT.div(wiring.shape[1] ** 0.5)


def standardized(drive: Tensor) -> tuple[Tensor, Tensor]:
    """Each column minus its mean, and the inverse of its deviation: (cells, N) -> (cells, N), (1, N).

    The floor under the deviation grows with the drive, so that the code does not depend on the input's scale, and
    rounding errors are no code where all cells are driven alike.
    """
    power = drive.square().mean(0, keepdim=True)
    centred = drive - drive.mean(0, keepdim=True)
    return centred, (centred.square().mean(0, keepdim=True) + 1e-6 * power).clamp(min=1e-12).rsqrt()


def climbing_fibre(error: Tensor) -> Tensor:
    """Errors as complex spikes: of the size of the token's root mean square where they exceed it, zero elsewhere."""
    size = error.square().mean(-1, keepdim=True).sqrt()
    return error.sign() * size * (error.abs() > size)


class _GranuleLayer(Fused):
    """Keeps nothing of the width of the granule layer, which backward computes again."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, threshold: Tensor, purkinje: Tensor, wiring: Tensor) -> Tensor:
        ctx.save_for_backward(v, threshold, purkinje, wiring)
        centred, inverse = standardized(granule_drive(v.flatten(0, -2), wiring))
        active = centred.mul_(inverse).sub_(threshold).relu_()
        return (active.mT @ purkinje.mT).view(*v.shape[:-1], len(purkinje))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        v, threshold, purkinje, wiring = ctx.saved_tensors
        error = climbing_fibre(grad.flatten(0, -2))
        drive = granule_drive(v.flatten(0, -2), wiring)
        centred, inverse = standardized(drive)
        active = (centred * inverse).sub_(threshold).relu_()
        on_purkinje = error.mT @ active.mT
        on_excess = active.sign_().mul_(purkinje.mT @ error.mT)
        on_threshold = -on_excess.sum().view(1)
        on_v = None
        if ctx.needs_input_grad[0]:
            share = (on_excess * centred).mean(0, keepdim=True) * inverse.pow(3)
            on_mean = on_excess.mean(0, keepdim=True) * inverse
            on_drive = on_excess.mul_(inverse).sub_(on_mean).sub_(centred.mul_(share)).sub_(drive.mul_(1e-6 * share))
            on_v = mossy_drive(on_drive, wiring, v.shape[-1]).reshape(v.shape)
        return on_v, on_threshold, on_purkinje, None


@register_primitive(
    "cerebellar_granule", stage="memory", kind="pointwise", zero_at="readout", zero_scale=0.5, needs_input=True
)
class CerebellarGranule(Scaled):
    """Many cells that each sample a few inputs, few of them active, and a read-out that learns from coarse errors.

    Biology: a granule cell has four claws, each on one mossy fibre; Golgi cells keep all but the most driven ones
    silent; Purkinje cells learn from climbing fibres, which report an error by a spike or not at all.

    Equation: a = A v / rms v, with A frozen, ``claws`` entries 1 / sqrt(claws) in each row; gamma = [z(a) - kappa]_+,
    where z is the standard score over granule cells and kappa = 1.28 at birth; delta = -s U P gamma. In backward an
    error e in P gamma becomes sgn(e) rms e where |e| > rms e, and zero elsewhere; the rms is over the token, so that a
    token's error does not depend on the others in the batch, padding among them.

    Reference: Marr 1969, A theory of cerebellar cortex, J Physiol; Albus 1971, A theory of cerebellar function, Math
    Biosci; Litwin-Kumar et al. 2017, Optimal degrees of synaptic connectivity, Neuron.

    Shapes: v (B, T, n), x (B, T, d) -> (B, T, d); the code is (B, T, cells).
    """

    cells: int = setting(256, low=8, high=4096, meaning="number of granule cells")
    claws: int = setting(4, low=1, high=32, meaning="number of inputs that a granule cell samples")
    rank: int = setting(8, low=2, high=256, meaning="number of Purkinje cells r")

    def build(self, host: Host) -> None:
        self.rank, self.claws = min(self.rank, self.d_out), min(self.claws, self.d_in)
        shuffled = torch.rand(self.cells, self.d_in, generator=host.generator("claws")).argsort(1)
        self.register_buffer("wiring", shuffled[:, : self.claws].contiguous())
        self.threshold = positive(1.28, 1)
        self.purkinje = nn.Parameter(torch.randn(self.rank, self.cells) / (self.cells / 4) ** 0.5)
        self.writer = read_out(self.d_out, self.rank)

    def check_loaded(self, tensors: Mapping[str, Tensor]) -> None:
        check_indices(tensors, wiring=self.d_in)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        return -token_scale(x) * (self.purkinje_cells(context) @ self.writer.T)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        return (-scale * token_scale(x) * self.purkinje_cells(context)) @ self.writer.mT

    def purkinje_cells(self, context: Context) -> Tensor:
        """P gamma, (B, T, rank), whose error comes back by climbing fibres."""
        threshold = context.once(nn.functional.softplus, self.threshold)
        return _GranuleLayer.apply(context.x_in, threshold, self.purkinje, self.wiring)

    def granules(self, v: Tensor) -> Tensor:
        """The code of an input: (..., n) -> (..., cells)."""
        centred, inverse = standardized(granule_drive(v.flatten(0, -2), self.wiring))
        code = torch.relu(centred * inverse - nn.functional.softplus(self.threshold))
        return code.mT.reshape(*v.shape[:-1], self.cells)
