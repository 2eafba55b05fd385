"""Place fields: each unit is active around one place of a learned map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import positive, read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.registry import register_primitive

FLOOR = 0.25  # of the summed activity: far from every field the code falls silent


@register_primitive("place_fields", stage="memory", kind="pointwise", zero_at="readout", zero_scale=4.0)
class PlaceFields(Latent):
    """Features are read as a place on a map, and only the cells whose field lies there answer.

    Biology: a hippocampal place cell fires in one region of the surroundings and nowhere else; together the cells form
    a map.

    Equation: q = D u; a_m = exp(-||q - mu_m||^2 / (2 sigma_m^2)); f = a / (0.25 + sum a); delta = s U f, with
    mu ~ 1.2 N(0, 1) and sigma = 0.8 at birth.

    Reference: O'Keefe and Dostrovsky 1971, The hippocampus as a spatial map: preliminary evidence from unit activity in
    the freely-moving rat, Brain Res.

    Shapes: x (B, T, d) -> (B, T, d); the map has ``dimensions`` axes and the code is (B, T, fields).
    """

    fields: int = setting(16, low=1, high=1024, meaning="number of place fields")
    dimensions: int = setting(3, low=1, high=64, meaning="number of axes of the map")

    def build(self, host: Host) -> None:
        self.dimensions = min(self.dimensions, self.d_out)
        self.reader = read_in(self.dimensions, self.d_out)
        self.writer = read_out(self.d_out, self.fields)
        self.centres = nn.Parameter(1.2 * torch.randn(self.fields, self.dimensions))
        self.width = positive(0.8, self.fields)

    def code(self, drive: Tensor, context: Context) -> Tensor:
        active = self.activity(drive, context)
        return active / (FLOOR + active.sum(-1, keepdim=True))

    def activity(self, places: Tensor, context: Context) -> Tensor:
        """How much each cell is driven at the given places: (..., dimensions) -> (..., fields)."""
        # The square is multiplied out, so that no tensor of fields times axes is kept.
        far, towards, narrow = context.once(self.constants)
        squares = places.square().sum(-1, keepdim=True) + nn.functional.linear(places, towards, far)
        return torch.exp(squares.clamp(min=0) * narrow)

    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """|c|^2 (fields,), -2 c (fields, dimensions), and -1 / (2 width^2) (fields,)."""
        width = nn.functional.softplus(self.width).clamp(min=1e-2)
        return self.centres.square().sum(-1), -2 * self.centres, -0.5 / width.square()
