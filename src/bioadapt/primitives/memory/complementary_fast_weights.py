"""Complementary fast weights: bound at once and forgotten, or consolidated slowly."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, LocalRule, setting
from bioadapt.primitives.fast_weights import recall
from bioadapt.primitives.frames import read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.primitives.time import decay_of
from bioadapt.registry import register_primitive


@register_primitive(
    "complementary_fast_weights", stage="memory", kind="causal", zero_at="readout", zero_scale=2.0, learns=True
)
class ComplementaryFastWeights(LocalRule, Latent):
    """Content is bound to a key within the sequence at once, and what recurs is kept in a slow store.

    Biology: the hippocampus stores an episode in one trial and loses it again; replay teaches the cortex, which learns
    slowly and keeps.

    Equation: k = K u / ||K u||, w = V u; A_t = lambda A_{t-1} + w k^T, N_t = lambda N_{t-1} + k k^T;
    fast = A_{t-1} k / max(1, k^T N_{t-1} k), slow = S k; delta = s U (mu fast + (1 - mu) slow), with
    lambda = exp(-1 / 32) and mu = sigmoid(0) at birth. S starts at 0 and follows S <- S + eta (A_T / max(1, tr N_T) -
    S), with A_T and N_T of the last document of a sequence, read forwards, averaged over sequences.

    Reference: McClelland, McNaughton and O'Reilly 1995, Why there are complementary learning systems in the hippocampus
    and neocortex: insights from the successes and failures of connectionist models of learning and memory, Psychol Rev;
    Ba et al. 2016, Using fast weights to attend to the recent past, NeurIPS.

    Shapes: x (B, T, d) -> (B, T, d); the fast memories A and N are (B, T, rank, rank), S is (rank, rank).
    """

    rank: int = setting(8, low=1, high=64, meaning="number of features r of a key and of its content")
    rate: float = setting(0.02, low=0.0, high=1.0, meaning="learning rate eta of the slow store")

    def build(self, host: Host) -> None:
        self.rank = r = min(self.rank, self.d_out)
        self.reader = read_in(2 * r, self.d_out)  # rows: keys, contents
        self.writer = read_out(self.d_out, r)
        self.log_tau = nn.Parameter(torch.full((1,), math.log(32)))
        self.balance = nn.Parameter(torch.zeros(1))
        self.register_buffer("slow", torch.zeros(r, r))
        self.declare_statistics(episode=(r, r))

    def drive(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        drive, scale = super().drive(x, context)
        key, content = drive.split(self.rank, -1)
        key = nn.functional.normalize(key, dim=-1, eps=1e-6)
        if self.training and context.observing:
            episode = self.episode(key.detach(), content.detach(), context)
            self.observe(context, tokens=len(x), episode=episode)  # a mean over sequences
        return torch.cat([key, content], -1), scale

    def code(self, drive: Tensor, context: Context) -> Tensor:
        slow, share = (
            nn.functional.linear(drive[..., : self.rank], self.slow),
            context.once(torch.sigmoid, self.balance),
        )
        return torch.lerp(slow, self.fast(drive, context), share)

    def fast(self, drive: Tensor, context: Context) -> Tensor:
        """What the sequence so far has bound to each key: (B, T, 2 rank) -> (B, T, rank)."""
        key, content = drive.split(self.rank, -1)
        recalled, match, _ = recall("memory", key, content, context.once(decay_of, self.log_tau), context)
        return recalled / match.clamp(min=1.0)

    @torch.no_grad()
    def episode(self, key: Tensor, content: Tensor, context: Context) -> Tensor:
        """A_T / max(1, tr N_T), averaged over sequences: two (B, T, rank) -> (rank, rank)."""
        weight = decay_of(self.log_tau) ** later(key, context)[..., None]
        if context.mask is not None:
            padding = ~context.mask[..., None]
            weight, content = weight.masked_fill(padding, 0.0), content.masked_fill(padding, 0.0)
        if context.resets is not None:
            documents = context.resets.long().cumsum(1)[..., None]
            weight = weight * (documents == documents[:, -1:])
        bound, trace = (content * weight).mT @ key, (key.square() * weight).sum((1, 2))
        return (bound / trace.clamp(min=1.0)[:, None, None]).mean(0)

    def learn(self, fresh: Tensor) -> None:
        self.slow.add_(fresh * self.rate * (self.observed_episode - self.slow))


def later(x: Tensor, context: Context) -> Tensor:
    """How many real tokens follow each one, (B, T)."""
    real = torch.ones(x.shape[:2], device=x.device) if context.mask is None else context.mask.to(x.dtype)
    return real.flip(1).cumsum(1).flip(1) - real
