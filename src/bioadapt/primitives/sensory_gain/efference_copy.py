"""Efference copy: what the system caused itself is predicted from its command and subtracted."""

from __future__ import annotations

import torch
from torch import Tensor

from bioadapt.primitives.base import Context, Host, LocalRule, Scaled, setting
from bioadapt.primitives.frames import token_count, token_scale
from bioadapt.primitives.time import held, previous, readings
from bioadapt.registry import register_primitive


@register_primitive(
    "efference_copy",
    stage="sensory_gain",
    kind="causal",
    zero_at="gate",
    learns=True,
    needs_input=True,
)
class EfferenceCopy(LocalRule, Scaled):
    """A local rule learns which features follow from the layer's previous input, and takes them away.

    Biology: motor centres send a copy of each command to sensory ones; in electric fish, granule cells carry it, and
    plasticity forms a negative image of the fish's own discharge that cancels it in the sensory stream.

    Equation: m_t = V v_t / rms(v_t) with V frozen; delta_t = -s C m_{t-1}; C starts at 0 and follows
    C <- C + eta E[(u_t - C m_{t-1}) m_{t-1}^T] / E|m|^2.

    Reference: Crapse and Sommer 2008, Corollary discharge across the animal kingdom, Nat Rev Neurosci; Bell 2001,
    Memory-based expectations in electrosensory systems, Curr Opin Neurobiol.

    Shapes: x (B, T, d), v (B, T, n) -> (B, T, d); the copy m is (B, T, rank). It has no effect before the first commit.
    """

    reads_both_ways = True
    rank: int = setting(16, low=1, high=256, meaning="number r of signals in the copy")
    rate: float = setting(0.5, low=0.0, high=2.0, meaning="learning rate eta of the negative image")

    def build(self, host: Host) -> None:
        self.rank = r = min(self.rank, self.d_in)
        self.register_buffer("command", host.normal("command", r, self.d_in) / self.d_in**0.5)
        self.register_buffer("image", torch.zeros(self.d_out, r))
        self.declare_statistics(correlation=(self.d_out, r), power=(r, r))

    def transform(self, x: Tensor, context: Context) -> Tensor:
        return self.cancelled(x, context, -self.image)

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        return self.cancelled(x, context, context.once(self.written, scale))

    def written(self, scale: Tensor) -> Tensor:
        """What is taken away of each copy, times ``scale``: (d, rank)."""
        return scale[:, None] * -self.image

    def cancelled(self, x: Tensor, context: Context, image: Tensor) -> Tensor:
        """s times ``image`` (d, rank) times the copy of the token before, (B, T, d)."""
        v, scale = context.x_in, token_scale(x)
        copies = readings(self.copy, (v @ self.command.T) / token_scale(v), context)
        if self.training and context.observing:
            self.watch(x.detach(), scale.detach(), copies.detach(), context)
        return (scale * copies.mean(0)) @ image.T

    def copy(self, command: Tensor, context: Context) -> Tensor:
        """m_{t-1}, (B, T, rank) -> (B, T, rank)."""
        return previous("command before", held("command", command, context), context)

    def watch(self, x: Tensor, scale: Tensor, copies: Tensor, context: Context) -> None:
        """Observe how features and copies go together; where time is read both ways, each way tells half."""
        tokens = token_count(x, context.mask)
        count = tokens.clamp(min=1)
        weighed, pre = copies / (count * len(copies)), copies.mean(0) / (count * scale)
        if context.mask is not None:
            padding = ~context.mask[..., None]
            x, weighed, pre = (
                x.masked_fill(padding, 0.0),
                weighed.masked_fill(padding, 0.0),
                pre.masked_fill(padding, 0.0),
            )
        correlation = x.flatten(0, 1).mT @ pre.flatten(0, 1)
        power = weighed.flatten(0, 2).mT @ copies.flatten(0, 2)
        self.observe(context, tokens=tokens, correlation=correlation, power=power)

    def learn(self, fresh: Tensor) -> None:
        correlation, power = self.observed_correlation, self.observed_power
        error = correlation - self.image @ power
        self.image.add_(fresh * self.rate * error / power.trace().clamp(min=1e-6))

    def wake(self) -> None:
        super().wake()
        self.image.copy_(torch.randn_like(self.image) * (0.3 / self.rank**0.5))
