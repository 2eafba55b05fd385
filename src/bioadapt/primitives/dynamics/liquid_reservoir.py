"""Liquid reservoir: rich fixed dynamics, of which only the read-out learns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import read_out
from bioadapt.primitives.latent import Latent
from bioadapt.primitives.rotation import rotation
from bioadapt.registry import register_primitive


@register_primitive("liquid_reservoir", stage="dynamics", kind="causal", zero_at="readout")
class LiquidReservoir(Latent):
    """A frozen bank of damped oscillators, randomly mixed and saturating, from which a read-out is trained.

    Biology: a cortical microcircuit answers to input with transients so rich that simple downstream cells can learn to
    read what they need from them, although the circuit itself does not learn.

    Equation: z_t = lambda z_{t-1} + sqrt(1 - |lambda|^2) V u with complex eigenvalues of modulus 0.6..0.97 and random
    phase; delta = s U tanh(1.5 M [Re z; Im z]), with V, lambda and the orthogonal M frozen.

    Reference: Maass, Natschläger and Markram 2002, Real-time computing without stable states: a new framework for
    neural computation based on perturbations, Neural Comput; Jaeger 2001, The "echo state" approach to analysing and
    training recurrent neural networks, GMD Report 148.

    Shapes: x (B, T, d) -> (B, T, d); the state z is complex, (B, T, units).
    """

    units: int = setting(8, low=1, high=256, meaning="number m of complex units")

    def build(self, host: Host) -> None:
        m = self.units
        random = host.generator("eigenvalues")
        self.register_buffer("modulus", 0.6 + 0.37 * torch.rand(m, generator=random))
        self.register_buffer("angle", math.tau * torch.rand(m, generator=random))
        self.register_buffer("reader", host.normal("reader", m, self.d_out) / self.d_out**0.5)
        self.register_buffer("mix", torch.linalg.qr(host.normal("mix", 2 * m, 2 * m)).Q)
        self.writer = read_out(self.d_out, 2 * m)

    def code(self, drive: Tensor, context: Context) -> Tensor:
        state = self.states(drive, context)
        return torch.tanh(1.5 * (torch.cat([state.real, state.imag], -1) @ self.mix.mT))

    def states(self, drive: Tensor, context: Context) -> Tensor:
        """The state of each unit at each token, complex (B, T, units)."""
        return rotation("units", self.modulus, self.angle, context.once(self.size) * drive, context)

    def size(self) -> Tensor:
        """What the drive is scaled by, (units,)."""
        return (1 - self.modulus.square()).sqrt()
