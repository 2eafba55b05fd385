"""NMDA branches: inputs that meet on one dendritic branch add up more than linearly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Context, Host, setting
from bioadapt.primitives.frames import check_indices, group_index, positive, read_out, token_scale
from bioadapt.primitives.latent import Latent, encoded
from bioadapt.registry import register_primitive


def branch_spikes(drive: Tensor, steepness: Tensor, offset: Tensor, rest: Tensor) -> Tensor:
    """The sigmoid response of each branch above its response at rest: drive (..., M) -> (..., M)."""
    return torch.addcmul(offset, steepness, drive).sigmoid() - rest


@register_primitive(
    "nmda_branches",
    stage="dendritic",
    kind="pointwise",
    zero_at="readout",
    needs_input=True,
    aliases=("dendritic_branches",),
)
class NmdaBranches(Latent):
    """Input synapses sit on separate dendritic branches, each with a local spike of its own.

    Biology: thin dendrites of pyramidal cells answer supralinearly to inputs on the same branch, through NMDA spikes,
    and the cell body adds the branches up linearly.

    Equation: a_b = sum over synapses j of branch b of w_j v_j / rms(v);
    h_b = sigmoid(beta (a_b - theta)) - sigmoid(-beta theta); delta = s U h, with branches a random partition.

    Reference: Polsky, Mel and Schiller 2004, Computational subunits in thin dendrites of pyramidal cells, Nat Neurosci;
    Poirazi, Brannon and Mel 2003, Pyramidal neuron as two-layer neural network, Neuron.

    Shapes: v (B, T, n), x (B, T, d) -> (B, T, d); the branches are (B, T, branches).
    """

    readout = "soma"
    branches: int = setting(16, low=1, high=4096, meaning="number M of branches")

    def build(self, host: Host) -> None:
        self.branches = min(self.branches, self.d_in)
        shuffled = host.normal("branch of each synapse", self.d_in).argsort()
        self.register_buffer("branch", group_index(self.d_in, self.branches)[shuffled])
        self.synapses = nn.Parameter(torch.randn(self.d_in) * (self.branches / self.d_in) ** 0.5)
        self.threshold = positive(1.0, self.branches)
        self.steepness = positive(4.0, self.branches)
        self.soma = read_out(self.d_out, self.branches)

    def check_loaded(self, tensors: Mapping[str, Tensor]) -> None:
        check_indices(tensors, branch=self.branches)

    def drive(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        drive, _ = encoded(context.x_in, context.once(self.wiring))
        return drive, token_scale(x)

    def code(self, drive: Tensor, context: Context) -> Tensor:
        return branch_spikes(drive, *context.once(self.response))

    def response(self) -> tuple[Tensor, Tensor, Tensor]:
        """beta, -beta theta and sigmoid(-beta theta), (branches,) each."""
        steepness = nn.functional.softplus(self.steepness)
        offset = -steepness * nn.functional.softplus(self.threshold)
        return steepness, offset, offset.sigmoid()

    def wiring(self) -> Tensor:
        """The weights of the synapses, each in the row of its branch: (branches, n)."""
        branches = torch.arange(self.branches, device=self.branch.device)
        return self.synapses * (self.branch == branches[:, None])
