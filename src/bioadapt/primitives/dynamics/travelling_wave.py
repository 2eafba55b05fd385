"""Travelling wave: the recent past is laid out along a sheet, one site per token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.alignment import front_order
from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.registry import register_primitive


def lags(name: str, z: Tensor, sites: int, context: Context) -> Tensor:
    """z_t, z_{t-1}, ... of the document so far, zero before its start: (B, T, C) -> (B, T, C, sites).

    Padded tokens are skipped, and repeat what the real token before them saw.
    """
    before = None if context.state is None else context.state.latest(name)
    past = z.new_zeros(z.shape[0], z.shape[2], sites) if before is None else before[:, -1]
    if context.mask is None and context.resets is None:
        lagged = _windows(past, z)[:, 1:]
    else:
        lagged = _lags_of_real(past, z, context)
    if context.state is not None:
        context.state.append(name, lagged)
    return lagged


def _windows(past: Tensor, z: Tensor) -> Tensor:
    """The lags before the first token and at each: past (B, C, N), z (B, T, C) -> (B, 1 + T, C, N)."""
    sites, series = past.shape[-1], torch.cat([past.flip(-1).mT, z], 1)
    # Not `unfold`, which an export for any length cannot follow.
    return torch.stack([series[:, sites - 1 - lag : series.shape[1] - lag] for lag in range(sites)], -1)


def _lags_of_real(past: Tensor, z: Tensor, context: Context) -> Tensor:
    real = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if context.mask is None else context.mask
    seen = real.cumsum(1)  # real tokens up to each
    aligned = _chosen(z, front_order(real)[0])
    lagged = _chosen(_windows(past, aligned).flatten(2), seen).unflatten(2, past.shape[1:])
    if context.resets is not None:
        sites = past.shape[-1]
        # Real tokens before the document; without a reset in sight all that is carried belongs to it.
        earlier = torch.where(context.resets, seen - real.long(), -sites).cummax(1).values
        inside = torch.arange(sites, device=z.device) < (seen - earlier)[..., None]
        lagged = torch.where(inside[:, :, None], lagged, 0.0)
    return lagged


def _chosen(series: Tensor, places: Tensor) -> Tensor:
    """series (B, T, c) at places (B, S) -> (B, S, c)."""
    return series.gather(1, places[..., None].expand(-1, -1, series.shape[2]))


@register_primitive("travelling_wave", stage="dynamics", kind="causal", zero_at="readout", zero_scale=0.5)
class TravellingWave(Latent):
    """Each latent runs along a row of sites, so that where something is tells when it came.

    Biology: waves sweep across cortex and carry what happened a moment ago along with them, so that the recent past is
    laid out in space; a delay line of axons does the same.

    Equation: h_t[c, j] = lambda_c^j (V u)_{t-j, c} for sites j = 0..7, with an absorbing end; delta = s U vec(h).

    Reference: Muller et al. 2018, Cortical travelling waves: mechanisms and computational principles, Nat Rev Neurosci;
    Keller et al. 2024, Traveling waves encode the recent past and enhance sequence learning, ICLR.

    Shapes: x (B, T, d) -> (B, T, d); the sheet is (B, T, rows, sites).
    """

    rows: int = setting(2, low=1, high=64, meaning="number C of rows of the sheet")
    sites: int = setting(8, low=2, high=64, meaning="number N of sites in a row")

    def build(self, host: Host) -> None:
        self.rows = min(self.rows, self.d_out)
        self.reader = read_in(self.rows, self.d_out)
        self.writer = read_out(self.d_out, self.rows * self.sites)
        self.transmission = nn.Parameter(torch.full((self.rows,), 0.9).logit())

    def code(self, drive: Tensor, context: Context) -> Tensor:
        height = torch.sigmoid(self.transmission)[:, None] ** torch.arange(self.sites, device=drive.device)
        return (lags("sheet", drive, self.sites, context) * height).flatten(2)
