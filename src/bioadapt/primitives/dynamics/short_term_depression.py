"""Short-term depression: release uses up resources that recover slowly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import group_matrix, group_mean_magnitude, inverse_softplus, pooling_matrix
from bioadapt.primitives.modulation import Modulation
from bioadapt.primitives.time import mean_reading, past_recurrence
from bioadapt.registry import register_primitive


@register_primitive("short_term_depression", stage="dynamics", kind="causal", zero_at="gate", zero_scale=8.0)
class ShortTermDepression(Modulation):
    """A synapse answers less and less while it is used, and recovers in silence.

    Biology: each spike releases a fraction of the vesicles that are ready; they are refilled within hundreds of
    milliseconds, so a sustained input depresses its own transmission.

    Equation: A_t = tanh <|x_t / rho|>_g; R_{t+1} = R_t + (1 - R_t) / tau - U A_t R_t with R_0 = 1 and
    U = 0.4 (1 - 1 / tau), which keeps the recurrence stable; delta_t = x_t (R_t - 1).

    Reference: Tsodyks and Markram 1997, The neural code between neocortical pyramidal neurons depends on
    neurotransmitter release probability, PNAS.

    Shapes: x (B, T, d) -> (B, T, d); the resource R is (B, T, groups).
    """

    reads_both_ways = True
    groups: int = setting(32, low=1, high=4096, meaning="number of channel groups that share a resource")
    tau: float = setting(11.0, low=1.5, high=4096.0, meaning="recovery time constant at birth, in tokens")

    def build(self, host: Host) -> None:
        self.groups = min(self.groups, self.d_out)
        # tau = 1 + softplus(raw): the softplus of its raw value is the recovery time beyond one token.
        self.recovery = nn.Parameter(torch.full((self.groups,), inverse_softplus(self.tau - 1)))
        self.release = nn.Parameter(torch.full((self.groups,), 0.4))
        self.log_level = nn.Parameter(torch.tensor([host.level]).log())
        self.register_buffer("membership", group_matrix(self.d_out, self.groups), persistent=False)
        self.register_buffer("pooling", pooling_matrix(self.d_out, self.groups), persistent=False)

    def factors(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        activity = torch.tanh(group_mean_magnitude(x, self.pooling) / context.once(torch.exp, self.log_level))
        return mean_reading(self.resource, activity, context) - 1, self.membership

    def resource(self, activity: Tensor, context: Context) -> Tensor:
        """R_t (B, T, groups): what is left for each token before it is transmitted."""
        recovered, rest, used = context.once(self.constants)
        return past_recurrence("resource", torch.addcmul(rest, used, activity), recovered, context, initial=1.0)

    def constants(self) -> tuple[Tensor, ...]:
        """1 / tau, 1 - 1 / tau and -U: (groups,) each."""
        recovered = 1 / (1 + nn.functional.softplus(self.recovery))
        rest = 1 - recovered
        return recovered, rest, -rest * self.release.clamp(0.0, 1.0)
