"""Phase coding: the stronger the drive, the earlier in the cycle."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import positive, read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.primitives.time import token_positions
from bioadapt.registry import register_primitive

TURN = 2**30  # of a cycle: integer products stay exact where an angle in fp32 has lost its phase


def clock(frequency: Tensor, positions: Tensor) -> Tensor:
    """(frequency t) mod 2 pi, in radians: frequency (r,) per token, positions (B, T) int -> (B, T, r)."""
    share = (frequency.detach() * (TURN / math.tau)).round().long()
    angle = (positions[..., None] * share % TURN).to(frequency.dtype) * (math.tau / TURN)
    return angle + (frequency - frequency.detach()) * positions[..., None]


@register_primitive("phase_coding", stage="dynamics", kind="pointwise", zero_at="readout")
class PhaseCoding(Latent):
    """What drives a latent moves its phase against a clock; its amplitude never changes.

    Biology: a place cell fires earlier in the theta cycle the farther the animal has come into its field, and a
    strongly driven cell reaches threshold before a weakly driven one, so that time carries the analog value.

    Equation: phi = (omega t mod 2 pi) - pi tanh(kappa D u); delta = s U [cos phi; sin phi], with omega spread evenly in
    its logarithm from 2 pi / 64 to 2 pi / 8 and kappa = 0.5 at birth.

    Reference: O'Keefe and Recce 1993, Phase relationship between hippocampal place units and the EEG theta rhythm,
    Hippocampus; Hopfield 1995, Pattern recognition computation using action potential timing for stimulus
    representation, Nature.

    Shapes: x (B, T, d) -> (B, T, d); the phase is (B, T, rank).
    """

    reads_positions = True

    rank: int = setting(4, low=1, high=256, meaning="number of oscillators r")

    def build(self, host: Host) -> None:
        self.rank = min(self.rank, self.d_out)
        self.reader = read_in(self.rank, self.d_out)
        self.writer = read_out(self.d_out, 2 * self.rank)
        self.frequency = nn.Parameter(torch.logspace(math.log2(math.tau / 64), math.log2(math.tau / 8), self.rank, 2))
        self.precession = positive(0.5, self.rank)

    def code(self, drive: Tensor, context: Context) -> Tensor:
        phase = self.phase(drive, token_positions("count", drive, context))
        return torch.cat([phase.cos(), phase.sin()], -1)

    def phase(self, drive: Tensor, positions: Tensor) -> Tensor:
        """In radians: drive (B, T, rank), positions (B or 1, T) -> (B, T, rank)."""
        advance = torch.tanh(nn.functional.softplus(self.precession) * drive)
        return clock(self.frequency, positions) - math.pi * advance
