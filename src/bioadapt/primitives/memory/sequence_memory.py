"""Sequence memory: what followed the last time is recalled when its cue comes again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Fused, Host, Primitive, setting
from bioadapt.primitives.frames import token_scale
from bioadapt.primitives.time import decay_of, held, is_symbol, previous, recurrence
from bioadapt.registry import register_primitive


class _Recall(Fused):
    """m by comparing all pairs of tokens; what is as wide as the pairs is computed anew for the backward."""

    @staticmethod
    def forward(
        ctx: Any, now: Tensor, clock: Tensor, stored: Tensor, threshold: Tensor, decay: Tensor, span: int
    ) -> Tensor:
        ctx.save_for_backward(now, clock, stored, threshold, decay)
        ctx.span = span
        pairs = _Pairs(now, clock, stored, span)
        weight = pairs.firing(threshold) * pairs.fading(decay)
        return (weight @ pairs.token).div_(weight.sum(-1, keepdim=True).clamp_(min=1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        now, clock, stored, threshold, decay = ctx.saved_tensors
        pairs = _Pairs(now, clock, stored, ctx.span)
        firing = pairs.firing(threshold)
        weight = firing * pairs.fading(decay)
        total = weight.sum(-1, keepdim=True)
        share = grad / total.clamp(min=1)
        on_weight = share @ pairs.token.mT
        # Where the weights are divided by their sum, all of them together change nothing.
        on_weight -= ((on_weight * weight).sum(-1, keepdim=True) / total.clamp(min=1)).masked_fill_(total <= 1, 0.0)
        on_weight.mul_(weight)  # on its logarithm, from here
        on_decay = (on_weight * pairs.age).sum().view(1) / decay
        on_cosine = on_weight.mul_(1 - firing).mul_(32.0)
        on_product = on_cosine / now.shape[-1]
        on_stored = [weight.mT @ share, on_product.mT @ now, torch.zeros_like(stored[..., :1])]
        return on_product @ pairs.cue, None, torch.cat(on_stored, -1), -on_cosine.sum().view(1), on_decay, None


class _Pairs:
    """Every token with every stored transition, (..., Q, S)."""

    def __init__(self, now: Tensor, clock: Tensor, stored: Tensor, span: int) -> None:
        width = now.shape[-1]
        self.token, self.cue, when = stored.split([width, width, 1], -1)
        self.cosine = now @ self.cue.mT / width
        age = clock - when.mT
        self.alive = (age >= 0) & (age < span) & (when.mT > 0)
        self.age = age.clamp_(min=0)

    def firing(self, threshold: Tensor) -> Tensor:
        """How strongly the present token makes cells fire that its cue has been bound to."""
        return torch.sigmoid(32.0 * (self.cosine - threshold))  # a literal: see `frames._floor_for`

    def fading(self, decay: Tensor) -> Tensor:
        """What time has left of the transition."""
        return decay.pow(self.age) * self.alive


@register_primitive("sequence_memory", stage="memory", kind="causal", zero_at="readout", zero_scale=64.0)
class SequenceMemory(Primitive):
    """What followed earlier tokens that were like the present one is recalled and added to it.

    Biology: recurrent synapses of CA3 bind each item to the one before it within one trial, so that a cue brings back
    what came next; cells that fire only above a threshold keep out what merely resembles the cue.

    Equation: c_ts = sigmoid(32 (cos(u_t, u_{s-1}) - theta)) for s <= t, where u_{s-1} and u_s are neighbours in the
    same document; w_ts = lambda^(t-s) c_ts where t - s is below the span, else 0; m_t = sum_s w_ts u_s / max(1, sum_s
    w_ts); delta = s a m_t, with theta = 0.8, lambda = exp(-1 / 64) and a = 0 at birth.

    Reference: Levy 1996, A sequence predicting CA3 is a flexible associator that learns and uses context to solve
    hippocampal-like tasks, Hippocampus; Lisman 1999, Relating hippocampal circuitry to function: recall of memory
    sequences by reciprocal dentate-CA3 interactions, Neuron.

    Its place is the embedding of a language model: equal tokens are equal there, and what is recalled is the embedding
    of a token, which a head that shares its weights with the embedding can read as a prediction. Elsewhere a cue
    is hardly met again, and little is recalled.

    Cost: all pairs of tokens are compared, and on an encoder twice. At its own place that is one layer of a model; the
    measured ratio is that of twelve.

    Shapes: x (B, T, d) -> (B, T, d); what is compared is (B, T, T), or (B, T, 2 span) in long sequences. A cache keeps
    2 d + 1 numbers for each of the last ``span`` tokens.
    """

    home = "embedding"
    span: int = setting(256, low=2, high=8192, meaning="number of tokens for which a transition can be recalled")

    def build(self, host: Host) -> None:
        self.threshold = nn.Parameter(torch.full((1,), 0.8))
        self.log_tau = nn.Parameter(torch.full((1,), math.log(64)))
        self.writer = nn.Parameter(torch.zeros(1))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        size = token_scale(x)
        now = x / size
        clock = self.clock(now, context)
        return size * self.writer * self.recalled(now, clock, self.stored(now, clock, context))

    def clock(self, now: Tensor, context: Context) -> Tensor:
        """How many real tokens there have been, (B, T, 1). Between documents more time passes than is remembered."""
        step = one = torch.ones_like(now[..., :1])
        if context.resets is not None:
            step = one + self.span * context.resets[..., None].to(one.dtype)
        return recurrence("clock", one, step, context.replace(resets=None))

    def stored(self, now: Tensor, clock: Tensor, context: Context) -> Tensor:
        """Each token with the one before it, its cue, and its time, 0 without a cue: (B, S, 2 d + 1), S >= T."""
        cue = previous("cue", held("token", now, context), context)
        bound = cue.any(-1, keepdim=True)
        if context.mask is not None:
            bound = bound & context.mask[..., None]
        transitions = torch.cat([now, cue, clock * bound], -1)
        if context.state is None:
            return transitions
        before = context.state.latest("transitions", self.span)
        context.state.append("transitions", transitions, self.span)
        return transitions if before is None else torch.cat([before, transitions], 1)

    def recalled(self, now: Tensor, clock: Tensor, stored: Tensor) -> Tensor:
        """m of each token: (B, T, d), (B, T, 1) and transitions up to the last of them -> (B, T, d)."""
        steps, span = now.shape[1], self.span
        if is_symbol(steps) or steps <= span:
            return self.compared(now, clock, stored)
        # Blocks of a span each look at themselves and at the span before them.
        after, before = -steps % span, span - (stored.shape[1] - steps)
        windows = nn.functional.pad(stored, (0, 0, before, after)).unfold(1, 2 * span, span).mT
        blocks = (nn.functional.pad(part, (0, 0, 0, after)).unflatten(1, (-1, span)) for part in (now, clock))
        now, clock = blocks
        return self.compared(now, clock, windows).flatten(1, 2)[:, :steps]

    def compared(self, now: Tensor, clock: Tensor, stored: Tensor) -> Tensor:
        """m by all pairs: (..., Q, d), (..., Q, 1) and (..., S, 2 d + 1) -> (..., Q, d)."""
        return _Recall.apply(now, clock, stored, self.threshold, decay_of(self.log_tau), self.span)

    @torch.no_grad()
    def wake(self) -> None:
        super().wake()
        self.threshold.fill_(0.2)  # so that what is unlike the cue is recalled as well
