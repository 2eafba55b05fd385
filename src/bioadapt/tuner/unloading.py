"""A model whose adapters become part of its weights, or leave it again."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from tqdm import tqdm

from .._words import suggest
from ..config import BioConfig
from .heads import release_heads
from .layer import BioLayer
from .tree import forget_configs, remove_adapter

ROUNDING = 0.01  # a merge that loses more of the changed weights than this is worth a warning


class MergeableModel(BaseTuner):
    """What a tuner does with the weights of its model, and how adapters go."""

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, approximate: bool = False
    ) -> None:
        """Make adapters part of the weights.

        Args:
            adapter_names: which; the active ones if None.
            safe_merge: as PEFT has it. A result that is not finite is refused in any case.
            approximate: put the nearest linear map in the place of a primitive that cannot be merged exactly and knows
                one, and warn with the error that this makes (see `approximation_errors`).

        Raises:
            ValueError: a primitive depends on its input; the model is as before.
        """
        self._check_merge_allowed(adapter_names, approximate)
        errors = self.approximation_errors(adapter_names) if approximate else {}
        self._check_finite(adapter_names)
        merged: list[BioLayer] = []
        try:
            for layer in self.layers():
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names, approximate=approximate)
                merged.append(layer)
        except Exception:
            for layer in merged:
                if layer.merged:
                    layer.unmerge()
            raise
        lost = sum(layer.lost_in_rounding for layer in merged) / max(len(merged), 1)
        if lost > ROUNDING:
            warnings.warn(
                f"merged, but {lost:.0%} of the weights to be changed are too coarse to: what is added to them is less "
                "than their dtype can tell. Merge into a base model in float32, and cast it afterwards if at all"
            )
        if errors:
            worst = max(errors, key=errors.__getitem__)
            warnings.warn(
                f"merged approximately: what is lost is {sum(errors.values()) / len(errors):.3f} of the size of the "
                f"adapter's change in the mean over {len(errors)} sites, at most {errors[worst]:.3f} (at {worst})"
            )

    def approximation_errors(self, adapter_names: list[str] | None = None) -> dict[str, float]:
        """What ``approximate=True`` would lose, relative to the change of the primitive, by site and primitive."""
        return {
            f"{layer.path}/{primitive.name}": primitive.surrogate_error()
            for layer in self.layers()
            for name in (layer.active_adapters if adapter_names is None else adapter_names)
            if name in layer.circuits
            for primitive in layer.circuits[name].on_weight()
            if primitive.merge is None and primitive.approximates
        }

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        approximate: bool = False,
    ) -> nn.Module:
        """The base model with the adapters in its weights; ``approximate`` as for `merge_adapter`."""
        self.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge, approximate=approximate)
        return self._take_out(merged=True, progressbar=progressbar, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        for layer in self.layers():
            layer.unmerge()

    def _check_merge_allowed(self, adapter_names: list[str] | None = None, approximate: bool = False) -> None:
        super()._check_merge_allowed()
        owners = Counter(id(p) for m in self.model.modules() for p in m._parameters.values() if p is not None)
        for layer in self.layers():
            layer.check_mergeable(adapter_names, approximate)
            if owners[id(layer.get_base_layer().weight)] > 1:
                raise ValueError(
                    f"the weight of {layer.path} is tied to another module's, which merging would change as well: "
                    "clone it first (tie_word_embeddings=False)"
                )

    def _check_tied_modules(self, model: nn.Module, peft_config: BioConfig) -> None:
        """Without PEFT's warning of a tied head or embedding: its weight stays, and merging into it is refused."""
        if peft_config.modules_to_save:
            super()._check_tied_modules(model, peft_config)

    def _check_finite(self, adapter_names: list[str] | None) -> None:
        """Raise `ValueError` if a tensor that is to be merged, of a method below too, is not finite."""
        for path, layer in self.model.named_modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            names = adapter_names if isinstance(layer, BioLayer) and adapter_names else layer.active_adapters
            for attribute in layer.adapter_layer_names:
                held = getattr(layer, attribute)
                for name in (name for name in names if name in held):
                    tensors = held[name].parameters() if isinstance(held[name], nn.Module) else [held[name]]
                    if not all(torch.isfinite(tensor).all() for tensor in tensors):
                        raise ValueError(
                            f"adapter {name!r} cannot be merged: its values at {path} ({attribute}) are not finite"
                        )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        elif any(layer.merged for layer in self.layers()):
            self.unmerge_adapter()
        return self._take_out(merge, progressbar, safe_merge)

    def _take_out(self, merged: bool, progressbar: bool, safe_merge: bool) -> nn.Module:
        """Remove all bio adapters, and return what remains, with the adapters below merged if ours were."""
        names = self.own_names
        for name in tqdm(names, disable=not progressbar, desc="Unloading"):
            remove_adapter(self.model, name, keep_heads=merged)
        if self.under is None:
            for name in names:
                del self.peft_config[name]
            forget_configs(self.model, self.peft_config)
            return self.model
        if self._hiding is not None:
            self._hiding.remove()
        if not merged:
            return self.under
        with warnings.catch_warnings():
            # The layers that carried a bio adapter have merged what was below them already.
            warnings.filterwarnings("ignore", message="All adapters are already merged|Already following adapters")
            return self.under.merge_and_unload(safe_merge=safe_merge)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was the active one, another takes its place, the same in all layers."""
        if adapter_name not in self.own_names:
            raise ValueError(f"Adapter {adapter_name} does not exist; {suggest(adapter_name, self.own_names)}")
        if any(adapter_name in layer.merged_adapters for layer in self.layers()):
            raise ValueError(f"Adapter {adapter_name} cannot be deleted while it is merged: unmerge it first")
        active = [name for name in self.active_adapters if name != adapter_name]
        was_active = adapter_name in self.active_adapters
        del self.peft_config[adapter_name]
        for layer in self.layers():
            if adapter_name in layer.circuits:
                del layer.circuits[adapter_name]
        release_heads(self.model, adapter_name)
        if was_active:
            if not active and self.own_names:
                active = sorted(self.own_names)[:1]
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {active[0]}."
                )
            self.set_adapter(active)
