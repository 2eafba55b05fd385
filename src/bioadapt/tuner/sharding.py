"""Layers whose weight is divided among processes, by tensor parallelism or by sharding before the adapter was there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..registry import PrimitiveInfo
from .sites import Site


def refusal_of_shards(weight: Any, site: Site, info: PrimitiveInfo, at_input: bool) -> str | None:
    """Why a primitive cannot act at a layer whose weight is divided, in words, or None if it can.

    Where each process has some of the outputs, the layer's output may be a part of what the adapter expects. Where it
    has some of the inputs, the output is whole, but what reads the input or the weight would see a part of them.
    """
    axes = {placement.dim for placement in getattr(weight, "placements", ()) if placement.is_shard()}
    outputs = 1 if site.weight == "columns" else 0
    remedy = "leave the layer out of target_modules or of the parallel plan; for fully_shard, add the adapter first"
    if outputs in axes and not at_input:
        return f"the outputs of {site.layer} are divided among processes: {remedy}"
    reads_parts = at_input or info.needs_input or info.kind == "weight"
    if site.reads_features and 1 - outputs in axes and reads_parts:
        return f"the inputs of {site.layer} are divided among processes, and it reads them: {remedy}"
    return None


def check_whole(features: Tensor, site: Site, path: str) -> None:
    """Raise `ValueError` if the features of a running forward are not those that the adapter was made for."""
    if features.shape[-1] != site.d_out:
        raise ValueError(
            f"{path} has {features.shape[-1]} features where the adapter was made for {site.d_out}: if the layer was "
            "made tensor-parallel after the adapter was added, do it before, or leave it out of target_modules"
        )
