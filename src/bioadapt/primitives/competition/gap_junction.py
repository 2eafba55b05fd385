"""Gap junction: neighbours share their charge through electrical synapses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Primitive, setting
from bioadapt.primitives.frames import check_indices
from bioadapt.registry import register_primitive


class _Diffusion(Fused):
    """The coupling is symmetric, so that it is its own adjoint; keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, conductance: Tensor, order: Tensor, with_x: bool) -> Tensor:
        ctx.save_for_backward(x, conductance, order)
        ctx.with_x = with_x
        return _channels(_flows(_ring(x, order, len(conductance)), conductance, with_x), order, x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, conductance, order = ctx.saved_tensors
        reach, width = conductance.shape
        ring, on_ring = _ring(x, order, reach), _ring(grad, order, reach)
        here, on_here = ring.narrow(-1, reach, width), on_ring.narrow(-1, reach, width)
        on_conductance = []
        for offset in range(1, reach + 1):
            drop = ring.narrow(-1, reach + offset, width) - here
            on_conductance.append((on_here - on_ring.narrow(-1, reach + offset, width)).mul_(drop).sum(0))
        on_x = None
        if ctx.needs_input_grad[0]:
            on_x = _channels(_flows(on_ring, conductance, ctx.with_x), order, x.shape)
        return on_x, torch.stack(on_conductance), None, None


def _ring(x: Tensor, order: Tensor, reach: int) -> Tensor:
    """The channels in the order of the ring, ``reach`` of them repeated at either end: (..., d) -> (N, d + 2 reach)."""
    places = torch.arange(-reach, x.shape[-1] + reach, device=x.device) % x.shape[-1]
    return x.flatten(0, -2).index_select(-1, order[places])  # columns of a batch are gathered much more slowly


def _channels(places: Tensor, order: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_ring` with nothing repeated: (N, d) -> ``shape``."""
    channels = places.new_empty(shape)
    torch.index_select(places, -1, order.argsort(), out=channels.view(places.shape))
    return channels


def _flows(ring: Tensor, conductance: Tensor, with_x: bool) -> Tensor:
    """What flows into each place of the ring, plus what is there if ``with_x``."""
    reach, width = conductance.shape
    into = [(offset, g) for offset, g in enumerate(conductance, 1)]
    into += [(-offset, g.roll(offset)) for offset, g in enumerate(conductance, 1)]
    change = ring.narrow(-1, reach, width) * (int(with_x) - sum(g for _, g in into))
    for offset, g in into:
        change.addcmul_(ring.narrow(-1, reach + offset, width), g)
    return change


def diffusion(x: Tensor, conductance: Tensor, order: Tensor, with_x: bool = False) -> Tensor:
    """sum_j g_ij (x_j - x_i) on a ring of channels, plus x_i if ``with_x``.

    x (..., d); order (d,): the channel at each place of the ring; conductance (k, d): in row o - 1 between each place
    and the one o places on. Returns (..., d).
    """
    return _Diffusion.apply(x, conductance, order, with_x)


@register_primitive(
    "gap_junction", stage="competition", kind="pointwise", zero_at="scalar_gate", zero_scale=64.0, merge="left"
)
class GapJunction(Primitive):
    """Every unit moves towards its neighbours, who move towards it by the same amount.

    Biology: inhibitory interneurons of one class are coupled by gap junctions, through which current flows down the
    difference of their voltages, in either direction alike.

    Equation: delta_i = sum over j in N(i) of g_ij (x_j - x_i), g_ij = g_ji = sigmoid(raw) / (4 k), on a ring over a
    frozen random order of the channels, with the k nearest on either side as neighbours.

    Reference: Galarreta and Hestrin 1999, A network of fast-spiking cells in the neocortex connected by electrical
    synapses, Nature; Gibson, Beierlein and Connors 1999, Two networks of electrically coupled inhibitory neurons in
    neocortex, Nature.

    Shapes: x (B, T, d) -> (B, T, d), linear. One gate for all, since a gate per channel would not conserve the sum.
    """

    reach: int = setting(2, low=1, high=64, meaning="number k of neighbours on either side")

    def build(self, host: Host) -> None:
        self.reach = min(self.reach, max(1, (self.d_out - 1) // 2))  # so that no unit is a neighbour on both sides
        self.conductance = nn.Parameter(torch.zeros(self.reach, self.d_out))
        self.register_buffer("order", host.normal("order of the ring", self.d_out).argsort())

    def check_loaded(self, tensors: Mapping[str, Tensor]) -> None:
        check_indices(tensors, order=self.d_out)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        ring = x[..., self.order]
        received = torch.zeros_like(ring)
        for offset, coupling in enumerate(self.coupling(), start=1):
            current = coupling * (ring.roll(-offset, -1) - ring)  # from the unit ``offset`` places on
            received = received + current - current.roll(offset, -1)
        return received[..., self.order.argsort()]

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        return diffusion(x, scale * context.once(self.coupling), self.order, with_x)

    def coupling(self) -> Tensor:
        """g (reach, d), positive and small enough that nobody overshoots the mean of its neighbours."""
        return torch.sigmoid(self.conductance) / (4 * self.reach)

    def left_matrix(self) -> Tensor:
        identity = torch.eye(self.d_out, device=self.conductance.device)
        return diffusion(identity, self.coupling(), self.order)
