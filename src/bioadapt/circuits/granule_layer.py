"""The granule layer of the cerebellum: mossy fibres become a wide sparse code, weighed branch by branch.

Source: Marr 1969, A theory of cerebellar cortex, J Physiol, and Albus 1971, A theory of cerebellar function, Math
Biosci; the branches are those of arXiv:2602.15367 (CDRL, cerebellar circuits with dendritic computation for
reinforcement learning), which describes in words: large expansion, sparse connectivity, sparse activation, modulation
at the level of dendrites that is not trained. The equations are our reading.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Host, Setting
from bioadapt.primitives.competition.k_winners_take_all import silencing
from bioadapt.primitives.memory.cerebellar_granule import granule_drive


def weighted_drive(v: Tensor, wiring: Tensor, weight: Tensor) -> Tensor:
    """`granule_drive` with a weight for each claw: v (N, n), wiring and weight (units, fan_in) -> (N, units)."""
    # Scattered into a matrix: at these sizes its product, and above all its backward, costs less than gathering.
    return v @ weight.new_zeros(len(wiring), v.shape[-1]).scatter(1, wiring, weight).mT


def winning_rates(drive: Tensor, k: int) -> Tensor:
    """relu(drive) where it is among the k largest of its row, else 0: (..., units) -> (..., units).

    Errors come back through the winners alone.
    """
    rates = drive.relu()
    return rates + silencing(rates, k, rates.new_ones(rates.shape[-1]))


def branch_gates(rates: Tensor, branches: int, kappa: float) -> Tensor:
    """q_b = 2 sigmoid(kappa (m_b / mean m - 1)), m_b the mean rate on branch b: (..., units) -> (..., branches).

    Between 0 and 2; 1 on a branch of average activity, and everywhere if all units are silent or ``kappa`` is 0. No
    error comes back through it. A branch is a run of units / branches neighbouring units.
    """
    activity = rates.detach().unflatten(-1, (branches, -1)).mean(-1)
    average = activity.mean(-1, keepdim=True)
    contrast = torch.where(average > 0, activity / average - 1, 0.0)
    return 2 * torch.sigmoid(kappa * contrast)


class CerebellarExpansion(nn.Module):
    """Mossy fibres x (..., inputs) -> granule cells on their branches (..., units), in fp32.

    z = W x + b with ``fan_in`` inputs per unit, in the wiring and with the weights of the primitive
    ``cerebellar_granule``; h keeps the largest floor(active units) of relu(z); the code is h_i q_b(i) with the gates q
    of `branch_gates`, which have no parameters.

    Args:
        inputs: number of mossy fibres; 0 on average, and of one scale.
        units: number of granule cells, a multiple of ``branches``.
        fan_in: inputs of a unit. All claws weigh the same at first, so there must be as many different sets of them as
            there are units.
        active: largest share of the units that fire, in (0, 1]; 1 leaves the competition out.
        branches: number of dendritic branches.
        kappa: steepness of their gates; 0 leaves them out.
        train_input: whether W, on its support, and b are trained; else W is frozen and b is 0.
        seed: fixes the wiring.

    Raises:
        ValueError: a number out of range, or numbers that do not go together.
    """

    wiring: Tensor

    def __init__(
        self,
        inputs: int,
        units: int = 1024,
        *,
        fan_in: int = 4,
        active: float = 0.1,
        branches: int = 16,
        kappa: float = 2.0,
        train_input: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.inputs = Setting(2, 2, 2**20).check("inputs", inputs)
        self.units = Setting(1024, 1, 2**20).check("units", units)
        self.fan_in = Setting(4, 1, self.inputs - 1).check("fan_in", fan_in)
        self.active = Setting(0.1, 1 / self.units, 1.0).check("active", active)
        self.branches = Setting(16, 1, self.units).check("branches", branches)
        self.kappa = Setting(2.0, 0.0, 100.0).check("kappa", kappa)
        self.train_input = Setting(False).check("train_input", train_input)
        if self.units % self.branches:
            raise ValueError(f"units must be a multiple of branches={self.branches}, got {self.units}")
        sets = math.comb(self.inputs, self.fan_in)
        if sets < self.units:
            raise ValueError(
                f"fan_in={self.fan_in} makes {sets} different sets of {self.inputs} inputs, fewer than "
                f"units={self.units}: take fewer units or more inputs"
            )
        # The generator of the primitive for the same purpose, so that a seed means the same claws in both.
        shuffled = torch.rand(self.units, self.inputs, generator=Host(seed=seed).generator("claws")).argsort(1)
        self.register_buffer("wiring", shuffled[:, : self.fan_in].contiguous())
        if self.train_input:
            self.weight = nn.Parameter(torch.full((self.units, self.fan_in), self.fan_in**-0.5))
            self.bias = nn.Parameter(torch.zeros(self.units))

    @property
    def winners(self) -> int:
        """The largest number of units that fire at once."""
        return math.floor(self.active * self.units + 1e-9)  # 0.29 * 100 is 28.999999999999996

    def rates(self, x: Tensor) -> Tensor:
        """h, the granule cells before their branches weigh them: (..., inputs) -> (..., units)."""
        v = x.float().reshape(-1, self.inputs)
        if self.train_input:
            drive = weighted_drive(v, self.wiring, self.weight) + self.bias
        else:
            drive = granule_drive(v, self.wiring).mT.contiguous()
        return winning_rates(drive, self.winners).reshape(*x.shape[:-1], self.units)

    def forward(self, x: Tensor) -> Tensor:
        rates = self.rates(x)
        if self.kappa == 0:  # gates of exactly 1
            return rates
        gates = branch_gates(rates, self.branches, self.kappa)
        return (rates.unflatten(-1, (self.branches, -1)) * gates[..., None]).flatten(-2)

    def extra_repr(self) -> str:
        names = ("fan_in", "active", "branches", "kappa", "train_input")
        return ", ".join([f"{self.inputs} -> {self.units}", *(f"{name}={getattr(self, name)!r}" for name in names)])
