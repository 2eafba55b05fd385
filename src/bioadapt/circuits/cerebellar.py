"""Cerebellar network: a granule layer and a linear read-out, alone and as the network of an agent.

Source: the architecture that arXiv:2602.15367 (CDRL, cerebellar circuits with dendritic computation for reinforcement
learning) describes in words; the equations are our reading.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bioadapt._extras import require
from bioadapt.circuits.granule_layer import CerebellarExpansion


class CerebellarNetwork(nn.Module):
    """y = U (h q) + c: a `CerebellarExpansion` and its Purkinje cells, x (..., inputs) -> (..., outputs).

    Args:
        inputs: number of mossy fibres.
        outputs: number of Purkinje cells.
        units: number of granule cells.
        options: the other arguments of `CerebellarExpansion`.

    Raises:
        ValueError: as `CerebellarExpansion` does.
    """

    def __init__(self, inputs: int, outputs: int, units: int = 1024, **options: Any) -> None:
        super().__init__()
        self.granule = CerebellarExpansion(inputs, units, **options)
        self.purkinje = nn.Linear(self.granule.units, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.purkinje(self.granule(x))


def cerebellar_policy(
    *, fibres: int = 16, units: int = 256, train_input: bool = True, **options: Any
) -> dict[str, Any]:
    """``policy_kwargs`` that make the network of a stable-baselines3 agent cerebellar.

    ``DQN("MlpPolicy", env, policy_kwargs=cerebellar_policy())``: observations go through a small dense layer with tanh
    to the mossy fibres, then through the granule layer; the Q values are Purkinje cells. Other agents with features
    extractors (A2C, PPO) take it as well. What `save` writes holds the wiring.

    Args:
        fibres: number of mossy fibres.
        units: number of granule cells.
        train_input: whether the claws are trained.
        options: the other arguments of `CerebellarExpansion`.

    Raises:
        MissingExtra: stable-baselines3 or gymnasium is not installed.
        ValueError: as `CerebellarExpansion` does, once the agent is made.
    """
    require("stable_baselines3", "rl")
    from bioadapt.circuits.cerebellar_features import CerebellarFeatures

    return {
        "features_extractor_class": CerebellarFeatures,
        "features_extractor_kwargs": {"fibres": fibres, "units": units, "train_input": train_input, **options},
        "net_arch": [],
    }
