"""Bump attractor: a ring of cells holds an angle after its cue is gone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import positive, read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.primitives.time import recurrence
from bioadapt.registry import register_primitive

SILENCE = 0.03  # root mean square of u below which nothing is heard


@register_primitive("bump_attractor", stage="memory", kind="causal", zero_at="readout", zero_scale=0.5)
class BumpAttractor(Latent):
    """A vector in the plane is moved by what comes in, and a ring of cells shows its direction, not its length.

    Biology: head-direction and working-memory cells on a ring sustain a bump of activity, whose place is the memory and
    whose shape is always the same.

    Equation: h_t = (1 - gamma_t w) h_{t-1} + gamma_t V u_t for each plane, gamma = sigmoid(W u + b) where
    rms(u) > 0.03, else 0, and w = sigmoid(1) at birth; unit j is exp(kappa (cos(theta_j - arg h) - 1)), kappa = 2 at
    birth; delta = s U vec(units). Where h is zero the bump is flat.

    Reference: Compte et al. 2000, Synaptic mechanisms and network dynamics underlying spatial working memory in a
    cortical network model, Cereb Cortex; Kim et al. 2017, Ring attractor dynamics in the Drosophila central brain,
    Science.

    Shapes: x (B, T, d) -> (B, T, d); the state is (B, T, planes, 2), the bumps (B, T, planes, units).
    """

    planes: int = setting(2, low=1, high=64, meaning="number of rings")
    units: int = setting(8, low=2, high=256, meaning="number of cells on a ring")

    def build(self, host: Host) -> None:
        self.reader = read_in(3 * self.planes, self.d_out)  # rows: plane by plane both axes, then the gates
        self.writer = read_out(self.d_out, self.planes * self.units)
        self.bias = nn.Parameter(torch.zeros(self.planes))
        self.leak = nn.Parameter(torch.ones(self.planes))
        self.concentration = positive(2.0, self.planes)
        angles = torch.arange(self.units) * (math.tau / self.units)
        self.register_buffer("directions", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def drive(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        drive, scale = super().drive(x, context)
        loudness = 1 - 1e-6 / scale.detach().square()  # mean square of u
        return torch.cat([drive, (loudness > SILENCE**2).to(drive.dtype)], -1), scale

    def code(self, drive: Tensor, context: Context) -> Tensor:
        return self.bumps(self.state(drive, context)).flatten(-2)

    def state(self, drive: Tensor, context: Context) -> Tensor:
        """h of each plane at each token: (B, T, 3 planes + 1) -> (B, T, planes, 2)."""
        cue, gate, heard = drive.split([2 * self.planes, self.planes, 1], -1)
        opened = (torch.sigmoid(gate + self.bias) * heard)[..., None]
        kept = 1 - opened * context.once(torch.sigmoid, self.leak)[:, None]
        return recurrence("planes", kept, opened * cue.unflatten(-1, (self.planes, 2)), context)

    def bumps(self, state: Tensor) -> Tensor:
        """Activity of each cell: (..., planes, 2) -> (..., planes, units)."""
        # Of length one beyond 1e-4. A one is added to large numbers, since exporters leave out adding very small ones.
        far = 1e4 * state
        direction = far * torch.rsqrt(far.square().sum(-1, keepdim=True) + 1)
        return torch.exp(nn.functional.softplus(self.concentration)[:, None] * (direction @ self.directions - 1))
