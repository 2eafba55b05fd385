"""Memories that a sequence writes and reads: outer products of what came before, which fade."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Context, Fused
from .time import CHUNK, is_short, is_symbol, linear_scan, past_recurrence


class _Recall(Fused):
    """`recall` by comparing all pairs of tokens; keeps what is narrow."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, content: Tensor, seen: Tensor, real: Tensor, decay: Tensor) -> Any:
        ctx.save_for_backward(key, content, seen, real, decay)
        _, kernel = _fading(decay, seen, real)
        scores = key @ key.mT
        weighted = kernel * scores
        return weighted @ content, scores.mul_(weighted).sum(-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, on_content: Tensor, on_match: Tensor) -> tuple[Tensor | None, ...]:
        key, content, seen, real, decay = ctx.saved_tensors
        age, kernel = _fading(decay, seen, real)
        scores = key @ key.mT
        weighted = scores * kernel
        on_weighted = on_content @ content.mT
        matched = scores * on_match
        on_decay = (on_weighted + matched).mul_(weighted).mul_(age).sum().view(1) / decay
        on_scores = on_weighted.add_(matched, alpha=2).mul_(kernel)
        on_key = on_scores @ key + on_scores.mT @ key
        return on_key, weighted.mT @ on_content, None, None, on_decay


def _fading(decay: Tensor, seen: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """How many real tokens lie between s and t > s, and what they leave of s: seen (B or 1, T) -> (B or 1, T, T)."""
    age = (seen[:, :, None] - 1 - seen[:, None]).clamp(min=0)
    return age, (age * decay.log()).exp_().mul_(real[:, None]).tril_(-1)


def _by_blocks(key: Tensor, content: Tensor, decay: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """`_Recall` of a long sequence: pairs within blocks, and what earlier blocks have left; real (B, T)."""
    steps, width = key.shape[1], content.shape[-1]
    joint = nn.functional.pad(torch.cat([content, key, real[..., None]], -1), (0, 0, 0, -steps % CHUNK))
    blocks = joint.unflatten(1, (-1, CHUNK))
    both, key, real = blocks[..., :-1], blocks[..., width:-1], blocks[..., -1]
    seen = real.cumsum(2)
    flat = (tensor.flatten(0, 1) for tensor in (key, both[..., :width], seen, real))
    within = torch.cat(_Recall.apply(*flat, decay), -1).view(*seen.shape, width + 1)
    lasting = (decay ** (seen[..., -1:] - seen) * real)[..., None]
    after = linear_scan((decay ** seen[..., -1:])[..., None], (both * lasting).mT @ key)
    before = nn.functional.pad(after[:, :-1], (0, 0, 0, 0, 1, 0))
    old = (key @ before.mT) * (decay ** (seen - real))[..., None]
    earlier = torch.cat([old[..., :width], (old[..., width:] * key).sum(-1, keepdim=True)], -1)
    recalled, match = (within + earlier).flatten(1, 2)[:, :steps].split([width, 1], -1)
    return recalled, match


def recall(name: str, key: Tensor, content: Tensor, decay: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """Read a fading memory of what came before each token.

    Args:
        name: of the memory in the decoding state.
        key: (B, T, r).
        content: what is bound to each key, (B, T, c); c may be 0.
        decay: what one token leaves of the memory, (1,).

    Returns:
        A_{t-1} k_t, k_t^T N_{t-1} k_t and n_{t-1} for A_t = decay A_{t-1} + w_t k_t^T, N_t = decay N_{t-1} + k_t k_t^T
        and n_t = decay n_{t-1} + 1: (B, T, c), (B, T, 1) and (B or 1, T, 1).
    """
    if context.state is None and context.resets is None:
        real = key.new_ones(1, key.shape[1]) if context.mask is None else context.mask.to(key.dtype)
        seen, rate = real.cumsum(1), decay.log()
        mass = torch.expm1((seen - real)[..., None] * rate) / torch.expm1(rate)
        if is_short(key.shape[1]) or is_symbol(key.shape[1]):
            return *_Recall.apply(key, content, seen, real, decay), mass
        return *_by_blocks(key, content, decay, real.expand(len(key), -1)), mass
    mass = past_recurrence(f"{name} mass", decay, torch.ones_like(key[..., :1]), context)
    bound = past_recurrence(name, decay, torch.cat([content, key], -1)[..., None] * key[..., None, :], context)
    recalled, match = (bound @ key[..., None]).squeeze(-1).split([content.shape[-1], key.shape[-1]], -1)
    return recalled, (match * key).sum(-1, keepdim=True), mass
