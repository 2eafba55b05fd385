"""What a model offers to a search: the places where adapters can sit, and the primitives that can act there.

A primitive that has a home, such as the head of a language model, is offered there alone; all others are offered the
projections that write into the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ... import BioConfig, list_primitives, primitive_info
from ...tuner.sites import describe
from ...tuner.targets import block_of, home_of

_PROBE = "probe"


@dataclass(frozen=True)
class SearchedModule:
    """A module that adapters can be put around.

    Attributes:
        path: its full name in the plain model.
        layer: number of the block that it belongs to; 0 outside of blocks.
        kind: its name within the block, such as ``attention.output.dense``.
        d_in: features that it reads.
        d_out: features that it writes.
    """

    path: str
    layer: int
    kind: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class SearchedModel:
    """A model as the search sees it.

    Attributes:
        sites: the default targets of `BioConfig`, in the model's order.
        parameters: how many numbers the plain model has.
        primitives: names of those that can act at every site, or at their home.
        refused: the others, with the reason.
        homes: by primitive the one module where it acts, of those that have a home in this model.
    """

    sites: tuple[SearchedModule, ...]
    parameters: int
    primitives: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict)
    homes: dict[str, SearchedModule] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, primitives: Sequence[str] | None = None) -> SearchedModel:
        """Find out by putting adapters into the model; it is as before afterwards.

        Args:
            model: a plain model, or a `PeftModel` over one.
            primitives: names to consider; all that are registered if None.

        Raises:
            ValueError: an unknown primitive, none that can act here, or a model whose default targets are not known.
        """
        names = [primitive_info(name).name for name in (list_primitives() if primitives is None else primitives)]
        parameters = sum(p.numel() for p in _plain(model).parameters())
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        # An adapter that nothing refuses: any site serves it, so that the sites are known before anything else is.
        # No gain: those have default targets of their own, while the others have the projections that write into the
        # residual stream.
        pointwise = list_primitives(stage="dendritic", kind="pointwise")
        harmless = next(name for name in pointwise if not primitive_info(name).gain)
        adapted = get_peft_model(model, BioConfig(primitives=[harmless]), adapter_name=_PROBE)
        try:
            sites = tuple(_site(adapted, path) for path in adapted.base_model.targeted_module_names)
            homes = {name: home for name in names if (home := _home(adapted, name)) is not None}
            refused = _refused(adapted, sites, homes, names)
        finally:
            adapted.unload()
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
        accepted = tuple(name for name in names if name not in refused)
        if not accepted:
            raise ValueError(f"primitives={names}: none can act on this model: {next(iter(refused.values()))}")
        return cls(sites, parameters, accepted, refused, {n: home for n, home in homes.items() if n in accepted})

    def record(self) -> dict[str, Any]:
        """As JSON can hold it; `from_record` is the way back."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> SearchedModel:
        sites = tuple(SearchedModule(**site) for site in record["sites"])
        homes = {name: SearchedModule(**home) for name, home in record.get("homes", {}).items()}
        return cls(sites, record["parameters"], tuple(record["primitives"]), dict(record["refused"]), homes)


def _plain(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _site(adapted: PeftModel, path: str) -> SearchedModule:
    layer = adapted.base_model.model.get_submodule(path)
    number, kind = block_of(path) or (0, path)
    return SearchedModule(path, number, kind, layer.in_features, layer.out_features)


def _home(adapted: PeftModel, name: str) -> SearchedModule | None:
    """The one module of this model where a primitive belongs; None for those that can be anywhere."""
    config = getattr(adapted.base_model.model, "config", None)
    called = home_of(name, getattr(config, "model_type", ""))
    for path, module in adapted.base_model.model.named_modules():
        if called is not None and path.rpartition(".")[2] == called:
            site = describe(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
            return SearchedModule(path, 0, called, site.d_in, site.d_out)
    return None


def _refused(
    adapted: PeftModel, sites: Sequence[SearchedModule], homes: Mapping[str, SearchedModule], names: Sequence[str]
) -> dict[str, str]:
    """Which primitives cannot act at their home, or else at one site of each shape, and why."""
    shapes = {(site.kind, site.d_in, site.d_out): site.path for site in sites}
    anywhere = list(shapes.values())
    refused = {}
    for name in names:
        targets = [homes[name].path] if name in homes else anywhere
        state = torch.get_rng_state()
        try:
            adapted.add_adapter(name, BioConfig(primitives=[name], target_modules=targets))
            adapted.delete_adapter(name)
        except ValueError as error:
            refused[name] = str(error)
        torch.set_rng_state(state)
    return refused
