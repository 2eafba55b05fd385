"""Surrogate slopes: gradients that stand in for those of thresholds, which are zero or do not exist."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHARPNESS = 4.0  # of the sigmoid whose slope stands in for that of a threshold


def with_slope(exact: Tensor, smooth: Tensor) -> Tensor:
    """``exact``, bit for bit, with the gradient of ``smooth``."""
    return exact.detach() + (smooth - smooth.detach())


def rectified(z: Tensor) -> Tensor:
    """[z]_+, which silent cells still get gradient through."""
    return with_slope(torch.relu(z), nn.functional.softplus(SHARPNESS * z) / SHARPNESS)


def step_slope(excess: Tensor) -> Tensor:
    """What stands for the slope of a step from 0 to 1 at no excess: that of a sigmoid."""
    soft = torch.sigmoid(SHARPNESS * excess)
    return SHARPNESS * soft * (1 - soft)


def spike_slope(excess: Tensor) -> Tensor:
    """1 / (1 + 5 |excess|)^2, which stands for the slope of a spike by what the membrane has above threshold."""
    return (5 * excess.abs() + 1).square().reciprocal()
