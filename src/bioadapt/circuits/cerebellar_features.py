"""The granule layer as a features extractor of stable-baselines3, in a module of its own so that agents pickle."""

from __future__ import annotations

from typing import Any

from gymnasium import Space
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from bioadapt.circuits.granule_layer import CerebellarExpansion


class CerebellarFeatures(BaseFeaturesExtractor):
    """Observations -> granule cells: (N, *shape) -> (N, units).

    Args:
        observation_space: of any shape that flattens.
        fibres: number of mossy fibres, each tanh of a trained combination of the observations.
        units: number of granule cells.
        options: the other arguments of `CerebellarExpansion`.
    """

    def __init__(self, observation_space: Space, fibres: int, units: int, **options: Any) -> None:
        super().__init__(observation_space, units)
        self.mossy = nn.Sequential(nn.Flatten(), nn.Linear(get_flattened_obs_dim(observation_space), fibres), nn.Tanh())
        self.granule = CerebellarExpansion(fibres, units, **options)

    def forward(self, observations: Tensor) -> Tensor:
        return self.granule(self.mossy(observations))
