"""Dopamine: an error in predicted reward gates what is happening now."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import positive, read_in, report_loss, token_scale
from bioadapt.primitives.modulation import Modulation
from bioadapt.primitives.time import held, mean_reading, previous
from bioadapt.registry import register_primitive


@register_primitive("dopamine_rpe", stage="plasticity", kind="causal", zero_at="gate", aliases=("dopamine_gain",))
class DopamineRpe(Modulation):
    """A temporal-difference error, read from the features, raises or lowers all of them together.

    Biology: dopamine cells fire in bursts for unexpected reward, fall silent when an expected one fails to come, and do
    not respond to what was fully predicted.

    Equation: V = w_v u + b; reward = w_r u; e_t = reward_t + gamma V_t - V_{t-1}, 0 on the first token;
    delta = x tanh(beta e).

    Reference: Schultz, Dayan and Montague 1997, A neural substrate of prediction and reward, Science; Barto, Sutton and
    Anderson 1983, Neuronlike adaptive elements that can solve difficult learning control problems, IEEE Trans SMC.

    Shapes: x (B, T, d) -> (B, T, d); the error is (B, T, 1).
    """

    reads_both_ways = True
    auxiliary: float = setting(0.0, low=0.0, high=10.0, meaning="weight of the squared error among the losses")

    def build(self, host: Host) -> None:
        self.critic = read_in(2, self.d_out)  # rows: value, reward
        self.bias = nn.Parameter(torch.zeros(1))
        self.discount = nn.Parameter(torch.logit(torch.tensor([0.9])))
        self.steepness = positive(1.0, 1)
        self.register_buffer("everywhere", torch.ones(self.d_out, 1), persistent=False)

    def factors(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        scores = (x @ self.critic.T) / token_scale(x)
        found = mean_reading(self.gain, scores, context)
        if self.auxiliary:
            report_loss(context, self.auxiliary, found[..., 1:])
        return found[..., :1], self.everywhere

    def gain(self, scores: Tensor, context: Context) -> Tensor:
        """Gain from the scores of value and reward (B, T, 2), and the squared error if asked for: (B, T, 1 or 2)."""
        error = self.error(scores, context)
        gain = torch.tanh(context.once(nn.functional.softplus, self.steepness) * error)
        return torch.cat([gain, error.square()], -1) if self.auxiliary else gain

    def error(self, scores: Tensor, context: Context) -> Tensor:
        """The temporal-difference error at each token, (B, T, 1)."""
        value, reward = scores.split(1, dim=-1)
        value = value + self.bias
        # The ones tell later tokens from a first one.
        series = torch.cat([value, torch.ones_like(value)], -1)
        before, known = previous("value before", held("value", series, context), context).split(1, dim=-1)
        return known * (reward + context.once(torch.sigmoid, self.discount) * value - before)
