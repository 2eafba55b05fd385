"""Oscillatory gating: a theta clock sets the gain, and gamma rides on theta's crest."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host
from bioadapt.primitives.modulation import Modulation, per_channel
from bioadapt.primitives.time import token_positions
from bioadapt.registry import register_primitive

PERIOD = 32  # tokens in a theta cycle
RATIO = 7  # gamma cycles in a theta cycle; an integer, so that the whole clock repeats


def theta_gamma(theta_phase: Tensor, gamma_phase: Tensor, coupling: Tensor) -> Tensor:
    """One cycle of the clock: phases (d,), coupling (1,) -> (d, PERIOD)."""
    angle = torch.arange(PERIOD, device=theta_phase.device, dtype=theta_phase.dtype) * (math.tau / PERIOD)
    theta = torch.cos(angle + theta_phase[:, None])
    return theta + coupling * 0.5 * (1 + theta) * torch.cos(RATIO * angle + gamma_phase[:, None])


@register_primitive("oscillatory_gating", stage="dynamics", kind="pointwise", zero_at="gate")
class OscillatoryGating(Modulation):
    """Each channel opens and closes with the position in the document, whatever the content.

    Biology: hippocampal cells are excitable at some phases of the theta rhythm and not at others, and the amplitude of
    the faster gamma rhythm follows the phase of theta.

    Equation: with angle = 2 pi (t mod 32) / 32, o = cos(angle + phi) + m (1 + cos(angle + phi)) / 2 cos(7 angle + psi);
    delta = x o.

    Reference: Lisman and Jensen 2013, The theta-gamma neural code, Neuron.

    Shapes: x (B, T, d) -> (B, T, d); phi and psi are (d,).
    """

    reads_positions = True

    def build(self, host: Host) -> None:
        self.theta_phase = nn.Parameter(math.tau * torch.rand(self.d_out))
        self.gamma_phase = nn.Parameter(math.tau * torch.rand(self.d_out))
        self.coupling = nn.Parameter(torch.full((1,), 0.5))

    def factors(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        # A product reads the cycle, since the backward of a look-up with repeated indices is a slow scatter.
        place = self.place(x, context)[..., None] == torch.arange(PERIOD, device=x.device)
        return place.to(x.dtype), context.once(theta_gamma, self.theta_phase, self.gamma_phase, self.coupling)

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        if torch.is_grad_enabled():
            return super().scaled(x, context, scale, with_x)
        cycle = context.once(theta_gamma, self.theta_phase, self.gamma_phase, self.coupling)
        gain = nn.functional.embedding(self.place(x, context), context.once(per_channel, scale, cycle).mT)
        return torch.addcmul(x, x, gain) if with_x else x * gain

    def place(self, x: Tensor, context: Context) -> Tensor:
        """Of each token in the cycle, (B or 1, T): of the integer, so that a position in the millions is exact."""
        return token_positions("count", x, context) % PERIOD
