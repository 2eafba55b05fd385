"""Recurrences that turn as they decay: damped oscillators along time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Context, Fused
from .exporting import is_exporting
from .time import recurrence


class _Conjugated(Fused):
    """The identity, whose gradient is the complex conjugate of what comes back."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.conj().resolve_conj()


def rotation(name: str, decay: Tensor, angle: Tensor, drive: Tensor, context: Context) -> Tensor:
    """z_t = decay e^(i angle) z_{t-1} + drive_t from rest: decay and angle (r,), drive (B, T, r) real -> complex."""
    if is_exporting() and context.state is None:
        return _in_turning_frame(name, decay, angle, drive, context)
    # `recurrence` carries gradients without conjugates, as fits real numbers: conjugating what enters and leaves its
    # backward makes that right for complex ones.
    series = _Conjugated.apply(torch.complex(drive, torch.zeros_like(drive)))
    return _Conjugated.apply(recurrence(name, context.once(_turned, decay, angle), series, context))


def _in_turning_frame(name: str, decay: Tensor, angle: Tensor, drive: Tensor, context: Context) -> Tensor:
    """`rotation` by real numbers, as formats of exported models ask for: in a frame that turns along, parts decay."""
    steps = drive.shape[1]
    turned = torch.arange(steps, device=drive.device)[None] if context.mask is None else context.mask.cumsum(1)
    cosine, sine = (wave(turned[..., None] * angle) for wave in (torch.cos, torch.sin))
    parts = torch.stack([drive * cosine, -drive * sine], -1)
    real, imaginary = recurrence(name, decay[:, None], parts, context).unbind(-1)
    return torch.complex(real * cosine - imaginary * sine, real * sine + imaginary * cosine)


def _turned(decay: Tensor, angle: Tensor) -> Tensor:
    return _Conjugated.apply(torch.polar(decay, angle))
