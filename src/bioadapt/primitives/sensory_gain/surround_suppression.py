"""Centre and surround: each position is compared with the positions around it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives._state import Recollection
from bioadapt.primitives.base import Context, Fused, Host, Scaled, setting
from bioadapt.primitives.frames import group_index, positive
from bioadapt.primitives.time import is_symbol
from bioadapt.registry import register_primitive

REACH = 15  # positions that a Gaussian covers on either side
BLOCK = 64  # positions up to which one matrix per group serves all
NARROWEST = 0.05  # of a Gaussian: one of no width at all has no gradient
NOWHERE = -1  # the document of a position that does not exist


class _Contrast(Fused):
    """Keeps what it reads and the widths; backward makes the Gaussians again."""

    @staticmethod
    def forward(ctx: Any, near: Tensor, center: Tensor, surround: Tensor, valid: Tensor, lag: Tensor) -> Tensor:
        ctx.save_for_backward(near, center, surround, valid, lag)
        kernel = gaussians(center, valid, lag).sub_(gaussians(surround, valid, lag))
        return torch.einsum(f"{_axes(valid)}hsw,bnwhc->bnshc", kernel, near)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        near, center, surround, valid, lag = ctx.saved_tensors
        narrow, wide = gaussians(center, valid, lag), gaussians(surround, valid, lag)
        axes = _axes(valid)
        on_near = torch.einsum(f"{axes}hsw,bnshc->bnwhc", narrow - wide, grad)
        on_kernel = torch.einsum(f"bnshc,bnwhc->{axes}hsw", grad, near)
        return (
            on_near,
            _on_width(on_kernel, narrow, center, lag),
            -_on_width(on_kernel, wide, surround, lag),
            None,
            None,
        )


def _axes(valid: Tensor) -> str:
    """Whether the samples have kernels of their own."""
    return "bn" if valid.dim() == 5 else "n"


def gaussians(width: Tensor, valid: Tensor, lag: Tensor) -> Tensor:
    """Normalized over the valid positions: width (H,), valid (..., 1, S, W) as 0 or 1, lag (S, W) -> (..., H, S, W)."""
    weight = torch.exp(lag.square() / (-2 * width.square())[:, None, None]) * valid
    return weight.div_(weight.sum(-1, keepdim=True).clamp_(min=1e-30))


def _on_width(on_kernel: Tensor, kernel: Tensor, width: Tensor, lag: Tensor) -> Tensor:
    """The gradient at the widths, from that at normalized Gaussians."""
    square = lag.square()
    spread = (kernel * square).sum(-1, keepdim=True)
    slope = (square - spread).mul_(kernel).mul_(on_kernel)
    return slope.sum((*range(slope.dim() - 3), -2, -1)) / width.pow(3)


def _windows(series: Tensor, first: Tensor | None, blocks: int, ahead: int, nothing: float) -> Tensor:
    """(B, blocks * size, ...) -> (B, blocks, size and what lies within reach, ...).

    ``first`` (B, REACH, ...) precedes the first block, None where a single block has nothing before it; ``ahead`` is
    how many positions of the next block belong to a window; ``nothing`` stands for what does not exist.
    """
    inner = series.unflatten(1, (blocks, -1))
    parts = [inner]
    if first is not None:
        before = first[:, None]
        parts.insert(0, before if blocks == 1 else torch.cat([before, inner[:, :-1, -REACH:]], 1))
    if ahead:
        last = torch.full_like(inner[:, :1, :ahead], nothing)
        parts.append(torch.cat([inner[:, 1:, :ahead], last], 1))
    return torch.cat(parts, 2) if len(parts) > 1 else inner


@register_primitive("surround_suppression", stage="sensory_gain", kind="causal", zero_at="gate", zero_scale=8.0)
class SurroundSuppression(Scaled):
    """A difference of Gaussians over neighbouring positions: a narrow centre minus a broad surround.

    Biology: ganglion cells of the retina compare a small centre with its surround, and cortical neurons are suppressed
    by stimuli around their receptive field, so that uniform fields say little and borders much.

    Equation: delta_t = sum_k G_c(k) x_{t-k} / sum_k G_c(k) - sum_k G_s(k) x_{t-k} / sum_k G_s(k) over those of
    k = 0..15 that exist; the widths are sigma_c and sigma_s = sigma_c exp([kappa]_+ + 0.1), per group of channels. On
    encoders k also runs over -15..-1, on grids of several axes over both sides of each.

    Reference: Rodieck 1965, Quantitative analysis of cat retinal ganglion cell response to visual stimuli, Vision Res;
    Cavanaugh, Bair and Movshon 2002, Nature and interaction of signals from the receptive field center and surround in
    macaque V1 neurons, J Neurophysiol.

    Shapes: x (B, T, d) -> (B, T, d). Linear in x. Padding has a place in the window like any other position, but does
    not exist there.
    """

    reads_both_ways = True
    groups: int = setting(4, low=1, high=4096, meaning="number H of channel groups with widths of their own")

    def build(self, host: Host) -> None:
        self.groups = min(self.groups, self.d_out)
        self.center = positive(0.7, self.groups)
        self.ratio = nn.Parameter(torch.full((self.groups,), math.log(4.4 / 0.7) - 0.1))  # kappa
        # Groups of unequal sizes are filled up to the largest.
        self.largest = -(-self.d_out // self.groups)
        index = group_index(self.d_out, self.groups)
        first = torch.searchsorted(index, torch.arange(self.groups))
        self.register_buffer("place", torch.arange(self.d_out) - first[index] + index * self.largest, persistent=False)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        even = self.groups * self.largest == self.d_out
        if not even:
            x = x.new_zeros(*x.shape[:2], self.groups * self.largest).index_copy(-1, self.place, x)
        z = x.unflatten(-1, (self.groups, self.largest))
        grid = context.grid or ()
        over_grid = len(grid) > 1 and math.prod(grid) == z.shape[1]
        change = (self.over_grid(z, grid) if over_grid else self.over_time(z, context)).flatten(-2)
        return change if even else change.index_select(-1, self.place)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        return self.transform(scale * x, context)  # channels do not mix

    def widths(self) -> tuple[Tensor, Tensor]:
        """sigma of the centre and of the surround, (groups,) each."""
        center = nn.functional.softplus(self.center).clamp(min=NARROWEST)
        return center, center * torch.exp(self.ratio.clamp(min=0.0) + 0.1)

    def over_time(self, z: Tensor, context: Context) -> Tensor:
        """Along the one axis of z (B, T, groups, width), block by block, each with what lies within reach of it."""
        steps = z.shape[1]
        if steps == 1 and context.state is not None and context.mask is None and context.resets is None:
            past = context.state.latest("features", REACH)
            if past is not None:
                return self.newest(z, past, context.state, context)
        if context.mask is not None:
            z = z.masked_fill(~context.mask[..., None, None], 0.0)
        document, first, first_document = documents(z, context)
        if is_symbol(steps) and context.state is None:
            return self.by_lag(z, document, context.bidirectional)
        if context.state is not None:
            first = remembered(context, "features", z, first)
            first_document = remembered(context, "documents", document, first_document)
        blocks = -(-steps // BLOCK)
        fill = -steps % blocks
        if fill:
            z = nn.functional.pad(z, (0, 0, 0, 0, 0, fill))
            document = nn.functional.pad(document, (0, fill), value=NOWHERE)
        several = blocks > 1
        ahead = REACH if several and context.bidirectional else 0
        behind = REACH if several or context.state is not None else 0
        near = _windows(z, first if behind else None, blocks, ahead, 0.0)
        valid, lag = self.visible(document, first_document if behind else None, blocks, behind, ahead, context)
        change = _Contrast.apply(near, *context.once(self.widths), valid.to(z.dtype), lag.to(z.dtype))
        return change.flatten(1, 2)[:, :steps]

    def by_lag(self, z: Tensor, document: Tensor, both_ways: bool) -> Tensor:
        """`over_time` for a length that is left open: one position of the window after the other."""
        steps = z.shape[1]
        near = nn.functional.pad(z, (0, 0, 0, 0, REACH, REACH))
        there = nn.functional.pad(document, (REACH, REACH), value=NOWHERE)
        narrow, wide = (self._averaged(width, near, there, document, both_ways, steps) for width in self.widths())
        return narrow - wide

    @staticmethod
    def _averaged(width: Tensor, near: Tensor, there: Tensor, document: Tensor, both_ways: bool, steps: int) -> Tensor:
        total = norm = near.new_zeros(1)
        for lag in range(-REACH if both_ways else 0, REACH + 1):
            place = there.narrow(1, REACH - lag, steps)
            exists = ((place == document) & (place != NOWHERE)).to(near.dtype)
            weight = exists[..., None] * torch.exp(lag**2 / (-2 * width.square()))
            total = total + weight[..., None] * near.narrow(1, REACH - lag, steps)
            norm = norm + weight
        return total / norm.clamp(min=1e-30)[..., None]

    def newest(self, z: Tensor, past: Tensor, state: Recollection, context: Context) -> Tensor:
        """The same for the one token z (B, 1, groups, width) that follows those of the past (B, n <= REACH, ...)."""
        document = state.latest("documents", REACH)
        assert document is not None
        own = document.amax(1, keepdim=True).clamp_(min=0)
        state.append("features", z, keep=REACH)
        state.append("documents", own, keep=REACH)
        near = torch.cat([past, z], 1)
        weight = context.once(self.profile)[:, -near.shape[1] :]
        valid = torch.cat([document == own, own >= 0], 1).to(z.dtype)
        narrow, wide = (weight / (valid @ weight.mT)[..., None]).chunk(2, 1)
        kernel = (narrow - wide).mul_(valid[:, None])
        return torch.matmul(kernel[:, :, None], near.transpose(1, 2)).transpose(1, 2)

    def profile(self) -> Tensor:
        """The Gaussians of the centres, then of the surrounds, before they are normalized: (2 groups, REACH + 1)."""
        width = torch.cat(self.widths())
        lag = torch.arange(REACH, -1, -1, device=width.device, dtype=width.dtype)
        return torch.exp(lag.square() / (-2 * width.square())[:, None])

    def visible(
        self, document: Tensor, first: Tensor | None, blocks: int, behind: int, ahead: int, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Which position of its window each position sees, (blocks, 1, size, window), with an axis of samples before
        if these differ; and how far back it lies, (size, window)."""
        own = document.unflatten(1, (blocks, -1))
        there = _windows(document, first, blocks, ahead, NOWHERE)
        lag, within = context.once(_lags, self.place, own.shape[2], there.shape[2], behind, context.bidirectional)
        there = there[:, :, None]
        valid = ((there == own[..., None]) & (there != NOWHERE) & within)[:, :, None]
        return (valid[0] if len(valid) == 1 else valid), lag

    def over_grid(self, z: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Along every axis of the grid behind the one axis of z (B, T, groups, width)."""
        center, surround = self.widths()
        shaped = z.unflatten(1, grid)
        narrow, wide = shaped, shaped
        for axis, size in enumerate(grid, start=1):
            place = torch.arange(size, device=z.device, dtype=z.dtype)
            lag = place[:, None] - place
            valid = (lag.abs() <= REACH).to(z.dtype)
            # The window is a box, within the grid as well: a Gaussian normalized on it is one along each axis.
            narrow = along(narrow, gaussians(center, valid, lag), axis)
            wide = along(wide, gaussians(surround, valid, lag), axis)
        return (narrow - wide).flatten(1, len(grid))


def _lags(like: Tensor, size: int, window: int, behind: int, both_ways: bool) -> tuple[Tensor, Tensor]:
    """How far back each position of a window lies, and whether that is within reach: (size, window) each."""
    steps = torch.arange(max(behind + size, window), device=like.device)
    lag = steps[behind : behind + size, None] - steps[:window]
    return lag, (lag <= REACH) & (lag >= (-REACH if both_ways else 0))


def documents(z: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """The number of each position's document, (B or 1, T), and a first window before it of what does not exist."""
    alike = context.mask is None and context.resets is None and context.state is None
    batch = 1 if alike else z.shape[0]
    number = torch.zeros(batch, z.shape[1], dtype=torch.long, device=z.device)
    if context.state is not None:
        past = context.state.latest("documents", REACH)
        number = number if past is None else number + past.amax(1, keepdim=True).clamp(min=0)
    if context.resets is not None:
        number = number + context.resets.long().cumsum(1)
    if context.mask is not None:
        number = number.masked_fill(~context.mask, NOWHERE)
    return number, torch.zeros_like(z[:, :1]).expand(-1, REACH, -1, -1), number.new_full((batch, REACH), NOWHERE)


def remembered(context: Context, name: str, series: Tensor, nothing: Tensor) -> Tensor:
    """The last `REACH` entries of a series before this step, ``nothing`` where there are none; adds those of now."""
    assert context.state is not None
    past = context.state.latest(name, REACH)
    context.state.append(name, series, keep=REACH)
    return nothing if past is None else torch.cat([nothing, past], 1)[:, -REACH:]


def along(z: Tensor, kernel: Tensor, axis: int) -> Tensor:
    """kernel (H, L, L) along one axis of size L of z (B, ..., H, c)."""
    moved = z.movedim(axis, 1)
    mixed = torch.einsum("hsw,bwrhc->bsrhc", kernel, moved.flatten(2, -3))
    return mixed.reshape(moved.shape).movedim(1, axis)
