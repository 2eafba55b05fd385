"""Sparse coding: the atoms of a dictionary compete to explain the input."""

from __future__ import annotations

import torch
from torch import Tensor

from bioadapt.primitives.base import Context, Host, Primitive, setting
from bioadapt.primitives.frames import positive, read_in, read_out, token_scale
from bioadapt.registry import register_primitive


def active(z: Tensor, threshold: Tensor) -> Tensor:
    """What exceeds the threshold, sign kept: sgn(z) [|z| - threshold]_+."""
    return z - torch.clamp(z, -threshold, threshold)


def code_after(drive: Tensor, overlap: Tensor, threshold: Tensor, rate: float, steps: int) -> Tensor:
    """The code after ``steps`` of competition: drive (..., m), overlap (m, m), threshold (m,) -> (..., m)."""
    # Beyond the inverse of the overlaps' norm the steps would overshoot and grow; a row sum bounds that norm.
    safe = overlap.detach().abs().sum(1).amax(0).reciprocal().clamp(max=rate)
    itself = torch.eye(len(overlap), device=overlap.device, dtype=overlap.dtype)
    # With c = z - S(z), what the threshold holds back, a step is drive + (I - eta G) z + eta (G - I) c.
    pulled, released = itself - safe * overlap, safe * (overlap - itself)
    shape, drive = drive.shape, safe * drive.reshape(-1, drive.shape[-1])
    z, lowest = drive, -threshold
    for _ in range(steps - 1):
        held_back = torch.clamp(z, lowest, threshold)
        z = torch.addmm(torch.addmm(drive, z, pulled), held_back, released)
    return active(z, threshold).view(shape)


@register_primitive("sparse_coding", stage="competition", kind="pointwise", zero_at="readout")
class SparseCoding(Primitive):
    """Atoms that resemble each other inhibit each other, so that the fewest that explain the input remain.

    Biology: in primary visual cortex few cells answer to an image; cells with similar receptive fields suppress each
    other, as if explaining the stimulus away from their rivals.

    Equation: b = D u with rows of D of unit length; from z = 0, K times z <- z + eta (b - z - (D D^T - I) S(z)), where
    S(z) = sgn(z) [|z| - lambda]_+; delta = s U S(z). Where atoms overlap so much that eta would diverge, the inverse of
    the largest row sum of |D D^T| takes its place.

    Reference: Olshausen and Field 1996, Emergence of simple-cell receptive field properties by learning a sparse code
    for natural images, Nature; Rozell et al. 2008, Sparse coding via thresholding and local competition in neural
    circuits, Neural Comput.

    Shapes: x (B, T, d) -> (B, T, d); the code z is (B, T, atoms).
    """

    atoms: int = setting(8, low=1, high=256, meaning="number m of atoms in the dictionary")
    steps: int = setting(6, low=1, high=64, meaning="number K of steps of the competition")
    rate: float = setting(0.4, low=0.01, high=1.0, meaning="size eta of a step")

    def build(self, host: Host) -> None:
        self.dictionary = read_in(self.atoms, self.d_out)
        self.threshold = positive(0.5, self.atoms)
        self.writer = read_out(self.d_out, self.atoms)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        (atoms, alike, threshold), scale = context.once(self.constants), token_scale(x)
        code = code_after((x @ atoms.T) / scale, alike, threshold, self.rate, self.steps)
        return (scale * code) @ self.writer.T

    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """The atoms D (atoms, d) of unit length, D D^T, and the thresholds (atoms,)."""
        atoms = torch.nn.functional.normalize(self.dictionary, dim=1)
        return atoms, atoms @ atoms.T, torch.nn.functional.softplus(self.threshold)
