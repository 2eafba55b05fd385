"""CA1 comparator: what is like something earlier in the sequence passes weakly."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.fast_weights import recall
from bioadapt.primitives.frames import positive, read_in
from bioadapt.primitives.modulation import Modulation
from bioadapt.primitives.time import decay_of, mean_reading
from bioadapt.registry import register_primitive


@register_primitive("ca1_comparator", stage="memory", kind="causal", zero_at="gate", zero_scale=16.0)
class Ca1Comparator(Modulation):
    """The gain falls with the similarity between the present token and those before it.

    Biology: CA1 receives what memory expects from CA3 and what arrives from entorhinal cortex, and their mismatch
    signals novelty; repeated stimuli evoke less and less.

    Equation: k = D u / ||D u||; M_t = lambda M_{t-1} + k_t k_t^T - I / r; familiarity F_t = [k_t^T M_{t-1} k_t]_+;
    n = 1 / (1 + kappa F); delta = x (n - b), with lambda = exp(-1 / 64), kappa = 4 and b = 0.5 at birth. The I / r
    takes away the similarity that is there by chance.

    Reference: Lisman and Grace 2005, The hippocampal-VTA loop: controlling the entry of information into long-term
    memory, Neuron; Kumaran and Maguire 2006, An unexpected sequence of events: mismatch detection in the human
    hippocampus, PLoS Biol.

    Shapes: x (B, T, d) -> (B, T, d); the memory M is (B, T, rank^2), the gain (B, T, 1).
    """

    reads_both_ways = True
    rank: int = setting(8, low=2, high=64, meaning="number of features r that are compared")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_out)
        self.reader = read_in(self.rank, self.d_out)
        self.log_tau = nn.Parameter(torch.full((1,), math.log(64)))
        self.sensitivity = positive(4.0, 1)
        self.baseline = nn.Parameter(torch.full((1,), 0.5))
        self.register_buffer("everywhere", torch.ones(self.d_out, 1), persistent=False)

    def factors(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        # The cue has unit length whatever the token's scale, so that the scale-free frame is not needed.
        key = nn.functional.normalize(x @ self.reader.mT, dim=-1, eps=1e-6)
        novelty = mean_reading(self.novelty, key, context)
        return novelty - self.baseline, self.everywhere

    def novelty(self, key: Tensor, context: Context) -> Tensor:
        """n of each token: (B, T, rank) -> (B, T, 1)."""
        sensitivity = context.once(nn.functional.softplus, self.sensitivity)
        return 1 / (1 + sensitivity * torch.relu(self.familiarity(key, context)))

    def familiarity(self, key: Tensor, context: Context) -> Tensor:
        """k_t^T M_{t-1} k_t: (B, T, rank) -> (B, T, 1)."""
        nothing = key[..., :0]  # is bound to the keys, which are only compared
        _, match, mass = recall("memory", key, nothing, context.once(decay_of, self.log_tau), context)
        return match - mass / self.rank
