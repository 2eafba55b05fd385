"""Time without token loops: linear recurrences, exponential traces, and looking one token back.

All functions take (B, T, ...) tensors in fp32 and honour the context: padding is invisible (at a padded token the
recurrence is the identity), a reset forgets everything before it, and decoding continues where the last step stopped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import Context

CHUNK = 64  # tokens that one matrix product covers in `trace`


def _doubling(decay: Tensor, drive: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + drive_t with h_{-1} = 0, by recursive doubling in ceil(log2 T) steps.

    The shorter cumprod/cumsum form divides by a product that underflows at a = 0.5 after 512 tokens.
    """
    steps, shift, constant = drive.shape[1], 1, decay.shape[1] == 1
    while shift < steps:
        factor = decay if constant else decay[:, shift:]
        drive = torch.cat([drive[:, :shift], torch.addcmul(drive[:, shift:], factor, drive[:, :-shift])], 1)
        if 2 * shift < steps:
            longer = factor * (decay if constant else decay[:, :-shift])
            decay = longer if constant else torch.cat([decay[:, :shift], longer], 1)
        shift *= 2
    return drive


def _sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    extra = tensor.dim() - len(shape)
    axes = [i for i in range(tensor.dim()) if i < extra or (shape[i - extra] == 1 and tensor.shape[i] != 1)]
    return tensor.sum(axes, keepdim=True).reshape(shape) if axes else tensor


class _LinearScan(torch.autograd.Function):
    """Keeps only the decay and the result for backward, which is the same scan with time reversed."""

    @staticmethod
    def forward(ctx, decay: Tensor, drive: Tensor) -> Tensor:
        h = _doubling(decay, drive)
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    def backward(ctx, grad: Tensor):
        decay, h = ctx.saved_tensors
        later = decay  # h_t reaches h_{t+1} through decay_{t+1}
        if decay.shape[1] > 1:
            later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1).flip(1)
        adjoint = _doubling(later, grad.flip(1)).flip(1)
        grad_decay = None
        if ctx.needs_input_grad[0]:
            before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
            grad_decay = _sum_to(adjoint * before, decay.shape)
        return grad_decay, adjoint


def linear_scan(decay: Tensor, drive: Tensor, initial: Tensor | None = None) -> Tensor:
    """Solve h_t = decay_t h_{t-1} + drive_t along axis 1.

    Args:
        decay: broadcastable to ``drive``.
        drive: (B, T, ...).
        initial: h_{-1}, broadcastable to (B, ...); zero if None.

    Returns:
        h of the shape of ``drive``.
    """
    decay = decay.reshape(*(1,) * (drive.dim() - decay.dim()), *decay.shape)
    if initial is not None:
        first = torch.addcmul(drive[:, :1], decay[:, :1], initial.expand_as(drive[:, 0])[:, None])
        drive = torch.cat([first, drive[:, 1:]], 1)
    return _LinearScan.apply(decay, drive)


def recurrence(name: str, decay: Tensor, drive: Tensor, context: Context, initial: float | Tensor = 0.0) -> Tensor:
    """`linear_scan` that honours padding, resets and decoding.

    Args:
        name: of the series in the decoding state.
        decay, drive: broadcastable to each other, (B or 1, T or 1, ...).
        initial: the value before the first token of a document, broadcastable to (B, ...).

    Returns:
        h (B, T, ...); h at a padded token is the value before it.
    """
    drive = drive.expand(torch.broadcast_shapes(decay.shape, drive.shape))
    start = torch.as_tensor(initial, dtype=drive.dtype, device=drive.device).expand_as(drive[:, 0])
    if context.mask is not None:
        real = _like(context.mask, drive)
        decay, drive = torch.where(real, decay, 1.0), torch.where(real, drive, 0.0)
    if context.resets is not None:
        fresh = _like(context.resets, drive)
        drive = torch.where(fresh, drive + decay * start[:, None], drive)
        decay = torch.where(fresh, 0.0, decay)
    before = None if context.state is None else context.state.last(name)
    h = linear_scan(decay, drive, start if before is None else before)
    if context.state is not None:
        context.state.append(name, h)
    return h


def trace(name: str, z: Tensor, decay: Tensor, context: Context, initial: float | Tensor = 0.0) -> Tensor:
    """Exponential trace E_tau(z)_t = a E_tau(z)_{t-1} + (1 - a) z_t, with a = exp(-1 / tau) given as ``decay``.

    Where z is (B, T, groups, channels) and ``decay`` is one constant in (0, 1] per group, (groups, 1), the trace is
    solved by matrix products, which for wide series is several times faster than a scan.
    """
    if z.dim() == 4 and decay.shape == (z.shape[2], 1):
        return _grouped_trace(name, z, decay, context, initial)
    return recurrence(name, decay, (1 - decay) * z, context, initial)


def _grouped_trace(name: str, z: Tensor, decay: Tensor, context: Context, initial: float | Tensor) -> Tensor:
    """`trace` of z (B, T, G, c): a lower-triangular product within chunks, and a short recurrence across them."""
    steps, size = z.shape[1], min(z.shape[1], CHUNK)
    at_zero = not torch.is_tensor(initial) and initial == 0
    start = torch.as_tensor(initial, dtype=z.dtype, device=z.device).expand_as(z[:, 0])
    before = None if context.state is None else context.state.last(name)
    # A trace from any start is that start plus the trace, from zero, of what differs from it.
    drive = z if at_zero else z - start[:, None]
    if before is not None:
        before = before - start
    if context.mask is not None:
        drive = torch.where(_like(context.mask, drive), drive, 0.0)

    def chunks(series: Tensor) -> Tensor:
        """(B, T, ...) -> (B, N, C, ...), filled up with zeros, which are padded tokens."""
        fill = series.new_zeros(series.shape[0], -steps % size, *series.shape[2:])
        return torch.cat([series, fill], 1).unflatten(1, (-1, size))

    drive = chunks(drive) if steps % size else drive.unflatten(1, (-1, size))
    clock = torch.arange(1, size + 1, device=z.device)[None, None]  # real tokens of the chunk so far, (B or 1, N or 1, C)
    if context.mask is not None:
        clock = chunks(context.mask.long()).cumsum(-1)
    linked = torch.ones(size, size, dtype=torch.bool, device=z.device).tril()  # which token hears which, (..., C, C)
    carried = torch.ones_like(clock, dtype=torch.bool)  # which token hears what was before the chunk
    if context.resets is not None:
        document = chunks(context.resets.long()).cumsum(-1)
        linked = linked & (document[..., :, None] == document[..., None, :])
        carried = document == 0

    never, rate = 1e12, decay.log()
    age = torch.where(linked, clock[..., :, None] - clock[..., None, :], never)
    kernel = torch.exp(age[:, :, None] * rate[..., None] + torch.log1p(-decay)[..., None])  # (B or 1, N or 1, G, C, C)
    if kernel.shape[:2] == (1, 1):
        h = torch.einsum("gts,bnsgc->bntgc", kernel[0, 0], drive)
    else:
        h = torch.einsum("bngts,bnsgc->bntgc", kernel.expand(*drive.shape[:2], *kernel.shape[2:]), drive)
    if before is not None or h.shape[1] > 1:
        fade = torch.exp(torch.where(carried, clock, never)[..., None, None] * rate)  # (B or 1, N or 1, C, G, 1)
        ends = linear_scan(fade[:, :, -1], h[:, :, -1], before)
        first = torch.zeros_like(start) if before is None else before
        h = h + fade * torch.cat([first[:, None], ends[:, :-1]], 1)[:, :, None]
    h = h.flatten(1, 2)[:, :steps]
    h = h if at_zero else h + start[:, None]
    if context.state is not None:
        context.state.append(name, h)
    return h


def previous(name: str, h: Tensor, context: Context, initial: float | Tensor = 0.0) -> Tensor:
    """h_{t-1} of a `recurrence`: the value before each token, ``initial`` before the first token of a document.

    ``name`` must differ from the recurrence's own; h must keep its value at padded tokens, as recurrences do.
    """
    start = torch.as_tensor(initial, dtype=h.dtype, device=h.device).expand_as(h[:, 0])
    before = None if context.state is None else context.state.last(name)
    shifted = torch.cat([(start if before is None else before)[:, None], h[:, :-1]], 1)
    if context.resets is not None:
        shifted = torch.where(_like(context.resets, h), start[:, None], shifted)
    if context.state is not None:
        context.state.append(name, h)
    return shifted


def both_ways(read: Callable[[Tensor, Context], Tensor], series: Tensor, context: Context) -> Tensor:
    """``read(series, context)``, or where time may be read both ways the mean of that and of the reading backwards.

    For primitives of which only a narrow series (B, T, ...) depends on the past: x itself need not be reversed. Both
    readings go through ``read`` side by side along the batch axis; it must not ask for the layer's input.
    """
    if not context.bidirectional:
        return read(series, context)
    context = context.replace(x_in=None, bidirectional=False)
    back = context.reversed()
    pairs = {name: (getattr(context, name), getattr(back, name)) for name in ("mask", "positions", "resets")}
    sides = {name: None if there is None else torch.cat([there, here]) for name, (there, here) in pairs.items()}
    onwards, backwards = read(torch.cat([series, series.flip(1)]), context.replace(**sides)).chunk(2)
    return 0.5 * (onwards + backwards.flip(1))


def token_positions(name: str, x: Tensor, context: Context) -> Tensor:
    """Place of each token in its document, (B or 1, T) int64: what the context says, else real tokens are counted."""
    if context.positions is not None:
        return context.positions.long()
    if context.mask is None and context.resets is None and context.state is None:
        return torch.arange(x.shape[1], device=x.device)[None]
    one = x.new_ones(*x.shape[:2])
    return recurrence(name, one, one, context, initial=-1.0).long()


def decay_of(log_tau: Tensor, slowest: float = 4096.0) -> Tensor:
    """exp(-1 / tau) for a trainable log tau, with tau held in [1, slowest] tokens."""
    return torch.exp(-1 / log_tau.exp().clamp(1.0, slowest))


def _like(flags: Tensor, series: Tensor) -> Tensor:
    """(B, T) flags with trailing axes to broadcast against (B, T, ...)."""
    return flags.reshape(*flags.shape, *(1,) * (series.dim() - 2))
