"""Dale small world: sparse lateral wiring with shortcuts, in which every sender either excites or inhibits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from bioadapt.primitives.base import Context, Fused, Host, Primitive, setting
from bioadapt.primitives.frames import check_indices, inverse_softplus
from bioadapt.primitives.modulation import per_channel
from bioadapt.registry import register_primitive

INHIBITORY = 0.2  # share of the senders


class _Reception(Fused):
    """Works on rows of channels, which can be gathered many times faster than columns; keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, senders: Tensor, first: Tensor, with_x: bool) -> Tensor:
        ctx.save_for_backward(x, weights, senders)
        ctx.with_x = with_x
        received = embedding_bag(senders.flatten(), _rates(x), first, per_sample_weights=weights.flatten(), mode="sum")
        return _as_tokens(received, x if with_x else None, x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        x, weights, senders = ctx.saved_tensors
        rates, rows = _rates(x), grad.flatten(0, -2).mT.contiguous()
        on_weights = torch.empty_like(weights)
        for on_weight, sent in zip(on_weights.unbind(1), senders.unbind(1), strict=True):
            on_weight.copy_(rates.index_select(0, sent).mul_(rows).sum(1))
        on_x = None
        if ctx.needs_input_grad[0]:
            by_sender = senders.flatten().argsort()
            first = torch.searchsorted(senders.flatten()[by_sender], torch.arange(x.shape[-1], device=x.device))
            receivers, sent = by_sender // senders.shape[1], weights.flatten()[by_sender]
            on_rates = embedding_bag(receivers, rows, first, per_sample_weights=sent, mode="sum")
            on_x = _as_tokens(on_rates.mul_(rates.sign_()), grad if ctx.with_x else None, x.shape)
        return on_x, on_weights, None, None, None


def _rates(x: Tensor) -> Tensor:
    """[x]_+ with channels first: (..., d) -> (d, N)."""
    return x.flatten(0, -2).mT.clamp(min=0.0).contiguous()


def _as_tokens(rows: Tensor, others: Tensor | None, shape: torch.Size) -> Tensor:
    """The inverse of channels first, (d, N) -> ``shape``, plus ``others`` of that shape."""
    columns = rows.mT
    return (columns.contiguous() if others is None else others.flatten(0, -2) + columns).view(shape)


def received(x: Tensor, weights: Tensor, senders: Tensor, first: Tensor, with_x: bool = False) -> Tensor:
    """sum_s weights_is [x at senders_is]_+, plus x_i if ``with_x``: x (..., d) -> (..., d).

    ``weights`` and ``senders`` are (d, k); ``first`` (d,): where each receiver's begin if they stand in one row.
    """
    return _Reception.apply(x, weights, senders, first, with_x)


def small_world(units: int, neighbours: int, rewiring: float, generator: torch.Generator) -> Tensor:
    """The senders of each unit, (units, neighbours): its neighbours on a ring, of which some are drawn anew."""
    offsets = torch.tensor([(step // 2 + 1) * (-1) ** step for step in range(neighbours)], dtype=torch.long)
    own = torch.arange(units)[:, None]
    senders = (own + offsets) % units
    if neighbours == units - 1:
        return senders  # all units send already
    loose = torch.rand(units, neighbours, generator=generator) < rewiring
    while loose.any():
        drawn = torch.randint(units, senders.shape, generator=generator)
        senders = torch.where(loose, drawn, senders)
        twice = (senders[:, :, None] == senders[:, None]).sum(-1) > 1
        loose &= twice | (senders == own)
    return senders


@register_primitive("dale_small_world", stage="competition", kind="pointwise", zero_at="gate")
class DaleSmallWorld(Primitive):
    """Units send to a few neighbours and a few far ones, and all that one of them sends has the same sign.

    Biology: cortical wiring is local with rare long shortcuts, which makes any two cells few synapses apart; a neuron
    releases the same transmitters at all its synapses, so it excites or inhibits all its targets.

    Equation: delta_i = sum over j in N(i) of w_ij sign_j [x_j]_+, w positive; each unit has k senders, of which one in
    ten is drawn anew; a fifth of all senders inhibits, with weight 4 / k at birth against 1 / k, so that rows balance
    on average.

    Reference: Watts and Strogatz 1998, Collective dynamics of 'small-world' networks, Nature; Song, Yang and Wang 2016,
    Training excitatory-inhibitory recurrent neural networks for cognitive tasks: a simple and flexible framework, PLoS
    Comput Biol; Cornford et al. 2021, Learning to live with Dale's principle: ANNs with separate excitatory and
    inhibitory units, ICLR.

    Shapes: x (B, T, d) -> (B, T, d); senders and w are (d, k). The gate is per receiver, so a trained negative gate
    turns the sign of all that this receiver gets; the law holds for what is sent.
    """

    neighbours: int = setting(4, low=1, high=64, meaning="number k of senders of each unit")
    rewiring: float = setting(0.1, low=0.0, high=1.0, meaning="share of the senders that are drawn anew")

    def build(self, host: Host) -> None:
        d, k = self.d_out, min(self.neighbours, self.d_out - 1)
        self.neighbours = k
        self.register_buffer("senders", small_world(d, k, self.rewiring, host.generator("wiring")))
        sign = torch.ones(d)
        sign[host.normal("inhibitory senders", d).argsort()[: round(INHIBITORY * d)]] = -1.0
        self.register_buffer("sign", sign)
        strength = torch.where(sign > 0, 1.0, (1 - INHIBITORY) / INHIBITORY)[self.senders] / max(k, 1)
        self.strength = nn.Parameter(strength.apply_(inverse_softplus))

    def check_loaded(self, tensors: Mapping[str, Tensor]) -> None:
        check_indices(tensors, senders=self.d_out)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        return (self.weights() * torch.relu(x)[..., self.senders]).sum(-1)

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        weights = context.once(per_channel, scale, context.once(self.weights))
        return received(x, weights, self.senders, context.once(self.first), with_x)

    def first(self) -> Tensor:
        """Where the senders of each receiver begin in the row of all: (d,)."""
        return torch.arange(self.d_out, device=self.senders.device) * self.neighbours

    def weights(self) -> Tensor:
        """The weight of each sender at each receiver, with its sign: (d, k)."""
        return nn.functional.softplus(self.strength) * self.sign[self.senders]
