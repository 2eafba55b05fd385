"""Short-term facilitation: residual calcium makes the next release more likely."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host
from bioadapt.primitives.dynamics.short_term_depression import ShortTermDepression
from bioadapt.primitives.frames import group_mean_magnitude
from bioadapt.primitives.time import mean_reading, past_recurrence
from bioadapt.registry import register_primitive

SPEED = 4  # resources come back so much faster than calcium goes


@register_primitive("short_term_facilitation", stage="dynamics", kind="causal", zero_at="gate")
class ShortTermFacilitation(ShortTermDepression):
    """A synapse with little to release at first answers more and more while it is used, and forgets in silence.

    Biology: calcium that enters with a spike and is not yet cleared raises the release probability of the spikes that
    follow, up to certainty; what they release has to be refilled, which takes less time.

    Equation: A_t = tanh <|x_t / rho|>_g; e_{t+1} = (1 - 1 / tau - U A_t) e_t + U (1 - U) A_t with e_0 = 0, and
    u_t = U + e_t; R_{t+1} = (1 - 4 / tau') (1 - u_t A_t) R_t + 4 / tau' with R_0 = 1 and tau' = tau + 3;
    delta_t = x_t (u_t R_t / U - 1). U = 0.1 (1 - 1 / tau) at birth. The recurrence is solved for e / U, which needs no
    division and leaves nothing undefined where training drives U to zero.

    Reference: Tsodyks, Pawelzik and Markram 1998, Neural networks with dynamic synapses, Neural Comput.

    Shapes: x (B, T, d) -> (B, T, d); the facilitation e / U and the resource R are (B, T, groups).

    Without the resource, delta_t = x_t e_t / U is the negative of what `short_term_depression` computes, times
    (1 - U) / U: both recurrences are one, so that a gate of the other sign would turn either into the other. The
    reference has both variables, and their product is neither's multiple.
    """

    def build(self, host: Host) -> None:
        super().build(host)
        nn.init.constant_(self.release, 0.1)

    def factors(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        activity = torch.tanh(group_mean_magnitude(x, self.pooling) / context.once(torch.exp, self.log_level))
        return mean_reading(self.released, activity, context) - 1, self.membership

    def released(self, activity: Tensor, context: Context) -> Tensor:
        """u_t R_t / U (B, T, groups): how much each token releases, relative to rest."""
        remembered, probability, fresh, refilled, rest, used = context.once(self.constants)
        kept = torch.addcmul(remembered, probability, activity, value=-1)
        facilitated = 1 + past_recurrence("facilitation", kept, fresh * activity, context)
        left = torch.addcmul(rest, used, facilitated * activity)
        return facilitated * past_recurrence("resource", left, refilled, context, initial=1.0)

    def constants(self) -> tuple[Tensor, ...]:
        """1 - 1 / tau, U, 1 - U, 1 / tau of the resource, 1 less that, and minus that times U: (groups,) each."""
        tau = 1 + nn.functional.softplus(self.recovery)
        remembered, refilled = 1 - 1 / tau, SPEED / (tau + SPEED - 1)
        probability, rest = self.release.clamp(0.0, 1.0) * remembered, 1 - refilled
        return remembered, probability, 1 - probability, refilled, rest, -rest * probability
