"""Time without token loops: linear recurrences, exponential traces, and looking one token back.

All functions take (B, T, ...) tensors in fp32 and honour the context: padding is invisible (at a padded token the
recurrence is the identity), a reset forgets everything before it, and decoding continues where the last step stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import Context, Fused
from .exporting import is_exporting

BLOCK = 8  # tokens that `_scan` goes through one after the other
DOUBLINGS = 20  # of a scan whose length is left open: it may be up to 2 ** 20 tokens
CHUNK = 128  # tokens up to which a product with a matrix of powers is cheaper than the scan


def _solve(decay: Tensor, drive: Tensor, initial: Tensor | None = None, backwards: bool = False) -> Tensor:
    """h_t = decay_t h_{t-1} + drive_t from h_{-1} = initial; decay has a time axis of one where it is constant.

    ``backwards``: h_t = decay_t h_{t+1} + drive_t instead, from zero.
    """
    steps = drive.shape[1]
    if torch.compiler.is_compiling() and not is_exporting():
        return _solved(decay, drive, initial, backwards)
    if is_symbol(steps):
        return _doubled(decay, drive, initial, backwards)
    if decay.numel() > 1 or not is_short(steps) or drive.is_complex():
        return _scan(decay, drive, initial, backwards)
    if initial is not None:
        drive = drive.clone()
        drive[:, 0].addcmul_(decay[:, 0], initial)
    matrix = powers(decay.flatten(), steps)[0]
    return ((matrix.mT if backwards else matrix) @ drive.reshape(*drive.shape[:2], -1)).view_as(drive)


@torch.library.custom_op("bioadapt::linear_recurrence", mutates_args=())
def _solved(decay: Tensor, drive: Tensor, initial: Tensor | None, backwards: bool) -> Tensor:
    """`_solve` as one operation of a compiled graph, which then serves sequences of all lengths."""
    return _solve(decay, drive, initial, backwards).contiguous()


@_solved.register_fake
def _(decay: Tensor, drive: Tensor, initial: Tensor | None, backwards: bool) -> Tensor:
    return drive.new_empty(drive.shape)


def is_short(steps: int) -> bool:
    """Whether a product with a matrix of powers is cheaper than the scan for so many tokens."""
    return not is_symbol(steps) and steps <= CHUNK


def is_symbol(steps: int) -> bool:
    """Whether a length is left open, as in a model that is exported for sequences of any length."""
    return isinstance(steps, torch.SymInt)


def powers(decay: Tensor, steps: int, lag: int = 0) -> Tensor:
    """a^(t - lag - s) at (t, s <= t - lag), else 0: (G,) -> (G, T, T)."""
    place = torch.arange(steps, device=decay.device, dtype=decay.dtype)
    return torch.pow(decay[:, None, None], place[:, None] - (place + lag)).tril_(-lag)


def _scan(decay: Tensor, drive: Tensor, initial: Tensor | None = None, backwards: bool = False) -> Tensor:
    """See `_solve`.

    Blocks run side by side, then what each leaves behind runs through the same scan, of a `BLOCK`-th of the length.
    Recursive doubling does log2 T times as much work; the shorter cumprod/cumsum form divides by a product that
    underflows at a = 0.5 after 512 tokens.
    """
    steps, size = drive.shape[1], min(drive.shape[1], BLOCK)
    constant, fill = decay.shape[1] == 1, -steps % size
    if fill:
        drive = _filled(drive, fill)
        decay = decay if constant else _filled(decay, fill)
    blocks = drive.unflatten(1, (-1, size)).clone()  # (B, N, size, ...)
    reach = decay[:, :, None].repeat_interleave(size, 2) if constant else decay.unflatten(1, (-1, size)).clone()
    h, kept = blocks.unbind(2), reach.unbind(2)
    if backwards:
        h, kept = h[::-1], kept[::-1]
    if initial is not None:
        h[0][:, 0].addcmul_(kept[0][:, 0], initial)
    several = blocks.shape[1] > 1
    for t in range(1, size):
        h[t].addcmul_(kept[t], h[t - 1])
        if several:
            kept[t].mul_(kept[t - 1])
    if several:
        ends = _scan(kept[-1], h[-1], backwards=backwards)
        here, before = (slice(None, -1), slice(1, None)) if backwards else (slice(1, None), slice(None, -1))
        blocks[:, here].addcmul_(reach if constant else reach[:, here], ends[:, before, None])
    return blocks.flatten(1, 2)[:, :steps]


def _doubled(decay: Tensor, drive: Tensor, initial: Tensor | None, backwards: bool) -> Tensor:
    """See `_solve`: by recursive doubling, which asks nothing of the length."""
    if initial is not None:
        drive = drive + torch.where(_first(drive), decay * initial[:, None], 0.0)
    h, reach, steps = drive, decay, drive.shape[1]
    for step in (2**k for k in range(DOUBLINGS)):

        def shifted(series: Tensor, step: int = step) -> Tensor:
            sides = (0, step) if backwards else (step, 0)
            moved = nn.functional.pad(series, (*(0, 0) * (series.dim() - 2), *sides))
            return moved[:, step:] if backwards else moved[:, :steps]

        h = h + reach * shifted(h)
        reach = reach * (reach if decay.shape[1] == 1 else shifted(reach))
    return h


def _first(series: Tensor) -> Tensor:
    """True at the first token, with axes to broadcast against the series (B, T, ...)."""
    return _like(torch.arange(series.shape[1], device=series.device)[None] == 0, series)


def _lagged(h: Tensor, initial: Tensor) -> Tensor:
    """h_{t-1} of h (B, T, ...), and ``initial`` (B, 1, ...) before the first token."""
    steps = h.shape[1]
    if steps == 1:
        return initial
    if is_symbol(steps):  # a series that is one token shorter would rule out a length of two
        shifted = nn.functional.pad(h, (*(0, 0) * (h.dim() - 2), 1, 0))[:, :steps]
        return torch.where(_first(h), initial, shifted)
    return torch.cat([initial, h[:, :-1]], 1)


def _sum_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    extra = tensor.dim() - len(shape)
    axes = [i for i in range(tensor.dim()) if i < extra or (shape[i - extra] == 1 and tensor.shape[i] != 1)]
    return tensor.sum(axes, keepdim=True).reshape(shape) if axes else tensor


class _LinearScan(Fused):
    """Keeps little but the decay and the result for backward, which is the same scan with time reversed."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor, initial: Tensor | None) -> Tensor:
        h = _solve(decay, drive, initial)
        ctx.save_for_backward(decay, h, initial)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        decay, h, initial = ctx.saved_tensors
        later = decay  # h_t reaches h_{t+1} through decay_{t+1}
        if decay.shape[1] > 1:
            later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1)
        adjoint = _solve(later, grad, backwards=True)
        grad_decay, grad_initial = None, None
        if ctx.needs_input_grad[0]:
            first = torch.zeros_like(h[:, 0]) if initial is None else initial.expand_as(h[:, 0])
            before = torch.cat([first[:, None], h[:, :-1]], 1)
            grad_decay = _sum_to(adjoint * before, decay.shape)
        if ctx.needs_input_grad[2]:
            grad_initial = _sum_to(adjoint[:, 0] * decay[:, 0], initial.shape)
        return grad_decay, adjoint, grad_initial


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
    if drive.shape[1] == 1:
        return drive if initial is None else torch.addcmul(drive, decay, initial[:, None])
    return _LinearScan.apply(decay, drive, initial)


class _PastScan(Fused):
    """h_{t-1} of a linear recurrence. With time reversed it is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, drive: Tensor, initial: Tensor) -> Tensor:
        past = _lagged(_solve(decay, drive, initial), initial[:, None])
        ctx.save_for_backward(decay, past)
        return past

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        decay, past = ctx.saved_tensors
        adjoint = _solve(decay, grad, backwards=True)
        later = torch.cat([adjoint[:, 1:], torch.zeros_like(grad[:, :1])], 1)
        grad_decay, grad_initial = None, None
        if ctx.needs_input_grad[0]:
            grad_decay = _sum_to(later * past, decay.shape)
        if ctx.needs_input_grad[2]:
            grad_initial = adjoint[:, 0]
        return grad_decay, later, grad_initial


def recurrence(name: str, decay: Tensor, drive: Tensor, context: Context, initial: float | Tensor = 0.0) -> Tensor:
    """`linear_scan` that honours padding, resets and decoding.

    Args:
        name: of the series in the decoding state.
        decay, drive: broadcastable to each other, (B or 1, T or 1, ...).
        initial: the value before the first token of a document, broadcastable to (B, ...).

    Returns:
        h (B, T, ...); h at a padded token is the value before it.
    """
    return _recurrence(name, decay, drive, context, initial)[0]


def _recurrence(
    name: str, decay: Tensor, drive: Tensor, context: Context, initial: float | Tensor
) -> tuple[Tensor, Tensor | None]:
    """h (B, T, ...), and the value before the first token of this call (B, 1, ...), None if none came."""
    before = _before_step(name, context, decay, drive)
    if before is not None:
        return _carried(name, torch.addcmul(drive, decay, before), context), before
    before = None if context.state is None else context.state.latest(name)
    decay, drive = _heard(decay, drive, context)
    start = _start(initial, drive) if before is None or context.resets is not None else None
    if context.resets is not None:
        fresh = _like(context.resets, drive)
        drive = torch.where(fresh, drive + decay * start[:, None], drive)  # type: ignore[index]
        decay = torch.where(fresh, 0.0, decay)
    h = linear_scan(decay, drive, start if before is None else before[:, 0])
    return _carried(name, h, context), before


def _before_step(name: str, context: Context, *terms: Tensor) -> Tensor | None:
    """The value before the one real token that is heard, (B, 1, ...); None if there are more, or a document begins."""
    if context.state is None or context.mask is not None or context.resets is not None:
        return None
    before = context.state.latest(name)
    for term in terms:
        if before is not None and term.dim() == before.dim() and term.shape[1] > 1:
            return None
    return before


def _carried(name: str, h: Tensor, context: Context) -> Tensor:
    """The same series (B, T, ...), whose end the next step of decoding starts from."""
    if context.state is not None:
        context.state.append(name, h)
    return h


def past_recurrence(name: str, decay: Tensor, drive: Tensor, context: Context, initial: float | Tensor = 0.0) -> Tensor:
    """`previous` of a `recurrence`, at once where nothing else is asked of the recurrence."""
    if context.state is not None or context.resets is not None:
        h, before = _recurrence(name, decay, drive, context, initial)
        return _shifted(h, before, context, initial)
    decay, drive = _heard(decay, drive, context)
    decay = decay.reshape(*(1,) * (drive.dim() - decay.dim()), *decay.shape)
    return _PastScan.apply(decay, drive, _start(initial, drive))


def _heard(decay: Tensor, drive: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Decay and drive under which a padded token changes nothing; the drive in its full shape."""
    _, drive = torch.broadcast_tensors(decay, drive)
    if context.mask is None:
        return decay, drive
    real = _like(context.mask, drive)
    return torch.where(real, decay, 1.0), torch.where(real, drive, 0.0)


def trace(name: str, z: Tensor, decay: Tensor, context: Context, initial: float | Tensor = 0.0) -> Tensor:
    """Exponential trace E_tau(z)_t = a E_tau(z)_{t-1} + (1 - a) z_t, with a = exp(-1 / tau) given as ``decay``."""
    before = _before_step(name, context, z)
    if before is not None:
        return _carried(name, torch.lerp(z, before, decay), context)
    return recurrence(name, decay, (1 - decay) * z, context, initial)


def held(name: str, series: Tensor, context: Context) -> Tensor:
    """The series (B, T, ...) with the value of the real token before in the place of each padded one."""
    if context.mask is None:
        return _carried(name, series, context)
    return recurrence(name, torch.zeros_like(series), series, context)


def previous(name: str, h: Tensor, context: Context, initial: float | Tensor = 0.0) -> Tensor:
    """h_{t-1} of a `recurrence` or a `held` series; ``initial`` at the first token of a document.

    ``name`` must differ from the recurrence's own; h must keep its value at padded tokens, as recurrences do.
    """
    before = None if context.state is None else context.state.latest(name)
    return _shifted(_carried(name, h, context), before, context, initial)


def _shifted(h: Tensor, before: Tensor | None, context: Context, initial: float | Tensor) -> Tensor:
    """h_{t-1} of h (B, T, ...): ``before`` (B, 1, ...) at the first token, ``initial`` without one and where documents
    start."""
    if before is not None and context.resets is None:
        return _lagged(h, before)
    start = _start(initial, h)[:, None]
    shifted = _lagged(h, start if before is None else before)
    return shifted if context.resets is None else torch.where(_like(context.resets, h), start, shifted)


def past_trace(name: str, z: Tensor, decay: Tensor, context: Context, initial: float | Tensor = 0.0) -> Tensor:
    """E_tau(z)_{t-1}: the `trace` of what came before each token, ``initial`` at the first token of a document."""
    before = _before_step(name, context, z)
    if before is not None:
        _carried(name, torch.lerp(z, before, decay), context)
        return before
    return past_recurrence(name, decay, (1 - decay) * z, context, initial)


def mean_reading(read: Callable[[Tensor, Context], Tensor], series: Tensor, context: Context) -> Tensor:
    """The mean over `readings`: (B, T, ...)."""
    return readings(read, series, context).mean(0) if context.bidirectional else read(series, context)


def readings(
    read: Callable[[Tensor, Context], Tensor], series: Tensor, context: Context, backwards: Tensor | None = None
) -> Tensor:
    """``read(series, context)``, and where time may be read both ways also the reading backwards.

    For primitives of which only a narrow series depends on the past: x itself need not be reversed. Both readings go
    through ``read`` side by side along the batch axis; it must not ask for the layer's input or for positions.

    Args:
        read: (B, T, ...) -> (B, T, ...).
        series: (B, T, ...).
        backwards: the series to read backwards, if that is another one.

    Returns:
        (R, B, T, ...), R = 1 or 2, both in the order of ``series``.
    """
    if not context.bidirectional:
        return read(series, context)[None]
    joint = context.replace(x_in=None, positions=None, bidirectional=False)
    if context.mask is not None or context.resets is not None:
        back = joint.reversed()
        sides = {name: (getattr(joint, name), getattr(back, name)) for name in ("mask", "resets")}
        joint = joint.replace(**{k: None if a is None else torch.cat([a, b]) for k, (a, b) in sides.items()})
    pair = torch.cat([series, (series if backwards is None else backwards).flip(1)])
    read_both, batch = read(pair, joint), series.shape[0]  # which may be left open: halves ask nothing of it
    return torch.stack([read_both[:batch], read_both[batch:].flip(1)])


def _filled(series: Tensor, steps: int) -> Tensor:
    """(B, T, ...) -> (B, T + steps, ...) with zeros at the end."""
    if not steps:
        return series
    return torch.cat([series, series.new_zeros(series.shape[0], steps, *series.shape[2:])], 1)


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


def _start(initial: float | Tensor, series: Tensor) -> Tensor:
    """``initial`` as one value per sequence of the series (B, T, ...): (B, ...)."""
    if torch.is_tensor(initial):
        return initial.to(series).expand_as(series[:, 0])
    return series.new_full((series.shape[0], *series.shape[2:]), initial)


def _like(flags: Tensor, series: Tensor) -> Tensor:
    """(B, T) flags with trailing axes to broadcast against (B, T, ...)."""
    return flags.reshape(*flags.shape, *(1,) * (series.dim() - 2))
