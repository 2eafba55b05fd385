"""The reticular searchlight: thalamic sectors compete for a gain that is conserved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import group_matrix, group_mean_square, pooling_matrix, positive
from bioadapt.primitives.modulation import Modulation
from bioadapt.registry import register_primitive


@register_primitive("trn_searchlight", stage="sensory_gain", kind="pointwise", zero_at="gate", zero_scale=8.0)
class TrnSearchlight(Modulation):
    """Groups of channels compete, and what one of them gains in amplification the others lose.

    Biology: the thalamic reticular nucleus, a thin sheet of inhibitory cells, receives a copy of the traffic between
    thalamus and cortex and inhibits the thalamus in turn, so that attention lights one sector and dims the rest.

    Equation: e_g = sqrt(d / G) <q u>_g + b_g + lambda log(<u^2>_g + 1e-4);
    gamma_g = 1 - kappa + kappa G softmax(beta e)_g; delta = x (gamma - 1).

    Reference: Crick 1984, Function of the thalamic reticular complex: the searchlight hypothesis, PNAS; Halassa and
    Kastner 2017, Thalamic functions in distributed cognitive control, Nat Neurosci.

    Shapes: x (B, T, d) -> (B, T, d); the gain gamma is (B, T, groups) and sums to G. Homogeneous of degree one.
    """

    groups: int = setting(8, low=1, high=4096, meaning="number G of sectors")

    def build(self, host: Host) -> None:
        self.groups = min(self.groups, self.d_out)
        self.query = nn.Parameter(torch.randn(self.d_out))
        self.bias = nn.Parameter(torch.zeros(self.groups))
        self.steepness = positive(1.0, 1)
        self.salience = positive(0.25, 1)
        self.focus = nn.Parameter(torch.zeros(1))  # the logit of kappa
        self.register_buffer("membership", group_matrix(self.d_out, self.groups), persistent=False)
        self.register_buffer("pooling", pooling_matrix(self.d_out, self.groups), persistent=False)

    def factors(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        return self.gain(x) - 1, self.membership

    def gain(self, x: Tensor) -> Tensor:
        """gamma, (B, T, d) -> (B, T, groups)."""
        power = group_mean_square(x, self.pooling)
        square = power @ (self.membership.sum(0) / self.d_out)  # the mean over channels, from the groups' means
        scale = torch.sqrt(square[..., None] + 1e-6)
        match = (x @ (self.query[:, None] * self.pooling)) * ((self.d_out / self.groups) ** 0.5 / scale)
        log_power = torch.log(power / scale.square() + 1e-4)
        drive = match + self.bias + nn.functional.softplus(self.salience) * log_power
        share = torch.softmax(nn.functional.softplus(self.steepness) * drive, -1)
        kappa = torch.sigmoid(self.focus)
        return 1 - kappa + kappa * self.groups * share
