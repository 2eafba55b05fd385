"""What spiking neurons share: features drive them as currents, and come back as signed rates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, Scaled
from bioadapt.primitives.frames import token_scale

CELLS = 2048  # of the table of slopes
BLOCK = 32768  # units at a time, so that a CPU finds all that belongs to them in its cache


class SpikingNeuron(Scaled):
    """delta = s rate(gamma u + b), with an odd ``rate`` between -1 and 1. A subclass defines `fired`.

    Spikes are counted over a few micro-steps within a token, hence nothing is carried from token to token.
    """

    def build(self, host: Host) -> None:
        self.gain = nn.Parameter(torch.ones(self.d_out))
        self.bias = nn.Parameter(torch.zeros(self.d_out))

    def fired(self, x: Tensor, frame: Tensor, scale: Tensor, context: Context) -> Tensor:
        """``scale`` (d,) times the change, for x (N, d) and frame s (N, 1)."""
        raise NotImplementedError(f"{type(self).__name__} must define fired")

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        flat, frame = x.flatten(0, -2), token_scale(x).flatten(0, -2)
        return self.fired(flat, frame, scale, context).view(x.shape)


def fire(
    rate: Callable[[Tensor], Tensor], x: Tensor, frame: Tensor, gain: Tensor, bias: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The change scale s sgn(I) rate(|I|) with I = gain x / s + bias, and the signed rates."""
    change, rates = torch.empty_like(x), torch.empty_like(x)
    for part, s, changed, kept in _blocks(x, frame, change, rates):
        current = torch.addcmul(bias, part * s.reciprocal(), gain)
        torch.mul(rate(current.abs()), current.sign_(), out=kept)
        torch.mul(kept, scale, out=changed).mul_(s)
    return change, rates


def trace_back(
    slopes: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], grad: Tensor, rates: Tensor, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of `fire` by its inputs x, frame, gain, bias and scale, and by the constants of the rate.

    All units share the constants, so that the rate is one curve of |I|. Spikes have a surrogate slope only, so it is
    taken from a table of drives: that costs a fraction of running the micro-steps of all units in reverse, and keeps
    nothing of them.

    Args:
        slopes: from drives (P,) and a weight for each to the slopes of the rate there, (P,), and to those by the
            constants, summed with these weights.
        grad: of the change.
        rates: what `fire` returned.
        inputs: what `fire` was given.
    """
    x, frame, gain, bias, scale = inputs
    weight, cells, on_rates = grad.new_zeros(CELLS), [], []
    on_scale, on_frame, on_x = torch.zeros_like(scale), torch.empty_like(frame), torch.empty_like(x)
    for part, s, g, kept, on_s in _blocks(x, frame, grad, rates, on_frame):
        product = g * kept
        on_scale += s[:, 0] @ product
        on_s.copy_((product @ scale)[:, None])
        current = torch.addcmul(bias, part * s.reciprocal(), gain)
        on_rate = (g * scale).mul_(s)
        sign, drive = current.sign(), current.abs_()
        # Cells are equally wide in a / (1 + a): they are fine where spikes begin, and cover every drive.
        cell = drive.div_(drive + 1).mul_(CELLS).long().clamp_(0, CELLS - 1).flatten()
        weight.scatter_add_(0, cell, sign.mul_(on_rate).flatten())
        cells.append(cell)
        on_rates.append(on_rate)
    centre = (torch.arange(CELLS, device=grad.device) + 0.5) / CELLS
    slope, on_constants = slopes(centre / (1 - centre), weight)
    on_gain, on_bias = torch.zeros_like(gain), torch.zeros_like(bias)
    for (part, s, on_s, on_part), cell, on_rate in zip(_blocks(x, frame, on_frame, on_x), cells, on_rates, strict=True):
        on_current, inverse = on_rate.mul_(slope.index_select(0, cell).view(part.shape)), s.reciprocal()
        product = (part * inverse).mul_(on_current)
        on_bias += on_current.sum(0)
        on_gain += product.sum(0)
        on_s.sub_((product @ gain)[:, None] * inverse)
        torch.mul(on_current, gain, out=on_part).mul_(inverse)
    return on_x, on_frame, on_gain, on_bias, on_scale, on_constants


def _blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The same rows of each tensor, on a CPU `BLOCK` units of the first at a time."""
    first = tensors[0]
    if first.device.type != "cpu" or torch.compiler.is_compiling():
        return [tensors]
    rows = max(1, BLOCK // first.shape[1])
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
