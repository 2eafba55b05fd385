"""Grid-cell code: a path is integrated and read out by periodic hexagonal fields."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import read_in, read_out
from bioadapt.primitives.latent import Latent
from bioadapt.primitives.time import recurrence
from bioadapt.registry import register_primitive

RATIO = 1.42  # of the scales of neighbouring modules
FIELDS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5))  # centres, in steps of the lattice


@register_primitive("grid_cell_code", stage="memory", kind="causal", zero_at="readout")
class GridCellCode(Latent):
    """Features are steps on a plane; grids of several scales read where their sum has led.

    Biology: entorhinal grid cells add up self-motion and fire at the corners of a hexagonal lattice; neighbouring cells
    share the lattice and differ in its offset, modules differ in its scale by about 1.4.

    Equation: p_t = p_{t-1} + tanh(V u_t) / 2; phi = K_m p are the phases along the two axes of the lattice of module m,
    of length lambda_m and orientation o_m, 60 degrees apart; g = [cos phi_1 + cos phi_2 + cos(phi_1 + phi_2)]_+ / 3 at
    4 offsets; delta = s U g. At birth lambda_m = 4 1.42^m and the orientations divide 60 degrees evenly.

    Reference: Hafting et al. 2005, Microstructure of a spatial map in the entorhinal cortex, Nature; Burak and Fiete
    2009, Accurate path integration in continuous attractor network models of grid cells, PLoS Comput Biol; the ratio
    1.42: Stensola et al. 2012, The entorhinal grid map is discretized, Nature.

    Shapes: x (B, T, d) -> (B, T, d); the place is (B, T, 2), the code (B, T, scales, 4).
    """

    scales: int = setting(4, low=1, high=32, meaning="number of modules, each a lattice of its own scale")

    def build(self, host: Host) -> None:
        module = torch.arange(self.scales)
        self.reader = read_in(2, self.d_out)
        self.writer = read_out(self.d_out, self.scales * len(FIELDS))
        self.log_scale = nn.Parameter(math.log(4) + module * math.log(RATIO))
        self.orientation = nn.Parameter(module * (math.pi / 3 / self.scales))
        self.register_buffer("offsets", math.tau * torch.tensor(FIELDS), persistent=False)

    def code(self, drive: Tensor, context: Context) -> Tensor:
        return self.cells(self.place(drive, context)).flatten(-2)

    def place(self, drive: Tensor, context: Context) -> Tensor:
        """Where the path has led: (B, T, 2) -> (B, T, 2)."""
        return recurrence("path", drive.new_ones(1), 0.5 * torch.tanh(drive), context)

    def cells(self, place: Tensor) -> Tensor:
        """Activity of each cell at the given places: (..., 2) -> (..., scales, 4)."""
        offsets = self.offsets.unbind(1)
        first, second = ((place @ axis)[..., None] - offset for axis, offset in zip(self.axes(), offsets, strict=True))
        # The axes of the reciprocal lattice are 120 degrees apart, so that the third wave is along their sum.
        return torch.relu(first.cos() + second.cos() + (first + second).cos()) / 3

    def axes(self) -> tuple[Tensor, Tensor]:
        """The reciprocal axes of each module: phases grow by 2 pi per step of the lattice. Two (2, scales)."""
        size = (2 * math.tau / 3**0.5) / self.log_scale.exp().clamp(1.0, 1e4)
        angles = (self.orientation - math.pi / 6, self.orientation + math.pi / 2)
        first, second = (size * torch.stack([angle.cos(), angle.sin()]) for angle in angles)
        return first, second
