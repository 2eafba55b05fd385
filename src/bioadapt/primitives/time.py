"""Time without token loops: linear recurrences, exponential traces, and looking one token back.

All functions take (B, T, ...) tensors in fp32 and honour the context: padding is invisible (at a padded token the
recurrence is the identity), a reset forgets everything before it, and decoding continues where the last step stopped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .base import Context

CHUNK = 64  # tokens that one matrix product covers in `past_trace`


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
    """Exponential trace E_tau(z)_t = a E_tau(z)_{t-1} + (1 - a) z_t, with a = exp(-1 / tau) given as ``decay``."""
    return recurrence(name, decay, (1 - decay) * z, context, initial)


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


def past_trace(
    name: str, z: Tensor, decay: Tensor, context: Context, initial: float = 0.0, backwards: bool = False
) -> Tensor:
    """E_tau(z)_{t-1}: the `trace` of what came before each token, or ``backwards`` of what comes after it.

    Where z is (B, T, G) with one decay per group, (G,), or (B, T, G, c) with (G, 1), all strictly between 0 and 1, it is
    solved by matrix products: several times cheaper than a scan and its shift. Packed documents and decoding take those.
    """
    constant = decay.shape == (z.shape[2], *(1,) * (z.dim() - 3)) and z.shape[2] <= CHUNK
    if constant and context.state is None and context.resets is None:
        grouped = z.reshape(*z.shape[:3], -1) - initial if initial else z.reshape(*z.shape[:3], -1)
        past = _grouped_past(grouped, decay.reshape(-1), context.mask, backwards).reshape(z.shape)
        return past + initial if initial else past  # from any start, a trace is that start plus one from zero
    if backwards:
        return past_trace(name, z.flip(1), decay, context.reversed(), initial).flip(1)
    return previous(f"{name} before", trace(name, z, decay, context, initial), context, initial)


def _grouped_past(z: Tensor, decay: Tensor, mask: Tensor | None, backwards: bool) -> Tensor:
    """z (B, T, G, c), decay (G,): strictly triangular products in chunks of C tokens, and a recurrence across chunks."""
    size = min(z.shape[1], CHUNK)
    rate = decay.log()[:, None]  # (G, 1)
    series = z if mask is None else z.masked_fill(_like(~mask, z), 0.0)
    series = _chunks(series, size)  # (B, N, C, G, c)
    if mask is not None:
        # The products take a^(t - s). Scaling both ends by the padded tokens before them in the chunk turns that into a
        # power of the number of real tokens in between.
        padded = _chunks(~mask, size).long()
        padded = (padded.flip(2).cumsum(2).flip(2) if backwards else padded.cumsum(2))[..., None, None]
        series = series * torch.exp(padded * rate)

    place = torch.arange(size + 1, device=z.device)
    age = (place[:, None] - place[1:]).clamp(min=0)
    weights = (age * rate[..., None]).add_(torch.log1p(-decay)[:, None, None]).exp_().tril(-1)
    found, left = weights[:, :-1], weights[:, -1:]  # by token t, (G, C, C); by the chunks after this one, (G, 1, C)
    if backwards:
        found, left = found.transpose(1, 2), left.flip(2)
    past = torch.einsum("gts,bnsgc->bntgc", found, series)
    if series.shape[1] > 1:
        left, kept = torch.einsum("gts,bnsgc->bntgc", left, series)[:, :, 0], torch.exp(size * rate)[None, None]
        if mask is not None:
            regained = torch.exp(-padded[:, :, 0 if backwards else -1] * rate)  # (B, N, G, 1)
            left, kept = left * regained, kept * regained
        reach = torch.exp(place[:-1, None, None] * rate)  # (C, G, 1)
        past = past + (reach.flip(0) if backwards else reach) * _passed_on(kept, left, backwards)[:, :, None]
    if mask is not None:
        past = past * torch.exp(-padded * rate)
    return past.flatten(1, 2)[:, : z.shape[1]]


def _passed_on(kept: Tensor, left: Tensor, backwards: bool) -> Tensor:
    """What each chunk receives from the ones before it, or ``backwards`` from those after it: (B, N, ...)."""
    if backwards:
        return _passed_on(kept.flip(1), left.flip(1), False).flip(1)
    carry = linear_scan(kept, left)
    return torch.cat([torch.zeros_like(carry[:, :1]), carry[:, :-1]], 1)


def _chunks(series: Tensor, size: int) -> Tensor:
    """(B, T, ...) -> (B, N, size, ...), filled up with zeros at the end."""
    fill = -series.shape[1] % size
    if fill:
        series = torch.cat([series, series.new_zeros(series.shape[0], fill, *series.shape[2:])], 1)
    return series.unflatten(1, (-1, size))


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
