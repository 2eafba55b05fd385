"""Padding moved behind the real tokens, for what computes on whole sequences at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import Context


def front_aligned(compute: Callable[[Tensor, Context], Tensor], x: Tensor, context: Context) -> Tensor:
    """``compute(x, context)`` with the real tokens of each sequence moved to its front, and padding zeroed.

    ``compute`` maps (B, T, d) to (B, T, d) and may read the mask of the context, but nothing else of it.
    """
    if context.mask is None:
        return compute(x, context)
    order, places = front_order(context.mask)
    mask = context.mask.gather(1, order)
    moved = _rows(x, order).masked_fill(~mask[..., None], 0.0)
    return _rows(compute(moved, Context(mask=mask, bidirectional=context.bidirectional)), places)


def front_order(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Real tokens before padding, each in its order: which token stands at each place, and the place of each, (B, T).

    A stable sort, by what formats of exported models know.
    """
    real, padding = mask.cumsum(1), (~mask).cumsum(1)
    places = torch.where(mask, real, real[:, -1:] + padding) - 1
    steps = torch.arange(mask.shape[1], device=mask.device).expand_as(places)
    return torch.zeros_like(places).scatter(1, places, steps), places


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """x (B, T, d) with the tokens of each sequence in the given order (B, T)."""
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (order + first).flatten()).view_as(x)
