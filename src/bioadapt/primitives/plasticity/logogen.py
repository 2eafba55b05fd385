"""Logogen: a word that has come more often than its unit fires needs less evidence from then on."""

from __future__ import annotations

import torch
from torch import Tensor

from bioadapt.primitives.base import Context, Host, LocalRule, Primitive, setting
from bioadapt.primitives.frames import masked_mean
from bioadapt.registry import register_primitive


@register_primitive("logogen", stage="plasticity", kind="pointwise", zero_at="scalar_gate", zero_scale=8.0, learns=True)
class Logogen(LocalRule, Primitive):
    """A unit whose word has come more often than the unit fires is easier to excite from then on, and else harder.

    Biology: frequent words are recognised from less evidence than rare ones, as if the threshold of each word's unit
    fell whenever its word comes. In spiking networks an intrinsic excitability that follows the logarithm of how often
    a unit is to fire is what makes the network weigh its inputs by what is known beforehand.

    Equation: b_j = log((n_j + c) / (m_j + c)), delta = a b, with a = 0 at birth. Over all tokens trained on, n_j counts
    where unit j was to fire, and m_j sums up how much it did, softmax(x)_j.

    Reference: Morton 1969, Interaction of information in word recognition, Psychol. Rev.; Tully, Hennig and Lansner
    2014, Synaptic and nonsynaptic plasticity approximating probabilistic inference, Front. Synaptic Neurosci.,
    where the excitability is the logarithm of n_j alone.

    Its place is the head of a language model, where each unit stands for a word, and the unit that is to fire is that
    of the word which comes next, or of the label. Elsewhere nobody says which one it is, and the strongest counts.

    The counts are taken before the step that uses them, so that `a` grows only if what was counted helps with tokens
    that were not.

    Shapes: x (B, T, d) -> (B, T, d); n and m are (d,), kept as means per token beside the number of tokens. A step that
    several forwards share counts as one of their mean size. It has no effect before the first commit.
    """

    home = "head"
    prior: float = setting(0.1, low=1e-3, high=1e3, meaning="c: tokens of evidence before any, equal for all units")

    def build(self, host: Host) -> None:
        self.register_buffer("heard", torch.zeros(self.d_out))
        self.register_buffer("fired", torch.zeros(self.d_out))
        self.register_buffer("tokens", torch.zeros(1))
        self.declare_statistics(heard=(self.d_out,), fired=(self.d_out,))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        self.listen(x, context)
        return _for_each_token(context.once(self.excitability), x)

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        self.listen(x, context)
        shift = scale * context.once(self.excitability)
        return x + shift if with_x else _for_each_token(shift, x)

    def excitability(self) -> Tensor:
        """b, (d,)."""
        return torch.log((self.tokens * self.heard + self.prior) / (self.tokens * self.fired + self.prior))

    @torch.no_grad()
    def listen(self, x: Tensor, context: Context) -> None:
        """Observe which units were to fire, and how much each one did."""
        if not (self.training and context.observing):
            return
        called = x.argmax(-1) if context.targets is None else context.targets
        told = called >= 0
        if context.mask is not None and context.targets is None:
            told = told & context.mask
        heard = x.new_zeros(self.d_out).index_add_(0, called.clamp(min=0).flatten(), told.to(x.dtype).flatten())
        self.observe(context, heard=heard, fired=masked_mean(x.softmax(-1), told) * told.sum())

    def learn(self, fresh: Tensor) -> None:
        tokens = self.observed_heard.sum()
        self.tokens.add_(tokens)
        for mean, total in ((self.heard, self.observed_heard), (self.fired, self.observed_fired)):
            mean.add_((total - tokens * mean) / self.tokens.clamp(min=1))

    @torch.no_grad()
    def wake(self) -> None:
        super().wake()
        self.tokens.fill_(1000.0)
        self.heard.copy_(torch.randn_like(self.heard).softmax(0))
        self.fired.copy_(torch.randn_like(self.fired).softmax(0))


def _for_each_token(shift: Tensor, x: Tensor) -> Tensor:
    """(d,) as (B, T, d), in memory of its own, and with a gradient for x, which is zero."""
    return torch.where(x.new_zeros((), dtype=torch.bool), x, shift)
