"""A layer whose adapters become part of its weight, and come out of it again bit for bit."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from ..primitives.context import in_full
from .sites import Site, offloaded
from .transparent import Transparent


@dataclass
class Original:
    """The base layer's tensors as they were before merging, so that unmerging restores every bit."""

    weight: nn.Parameter
    weight_data: Tensor
    bias: nn.Parameter | None
    bias_data: Tensor | None
    below_was_merged: bool
    matrix: Tensor  # what adapters are merged onto: the weight with everything below, in fp32 at least
    bias_vector: Tensor | None
    attributes: dict[str, Any]  # of the weight: how quantised numbers are to be read
    state: Any  # of a quantised layer: what its forward computes with, beside the weight


class MergeableLayer(Transparent, BaseTunerLayer):
    """What a layer with circuits knows about its weight.

    A subclass sets the attributes below; ``circuits`` are its adapters by name.
    """

    circuits: Any
    site: Site
    path: str
    quantization_backend: Any
    lost_in_rounding: float
    _original: Original | None

    def get_base_weight(self) -> Tensor:
        self._unpack()
        weight = super().get_base_weight()
        return offloaded(self.get_base_layer(), "weight") if weight.is_meta else weight

    def _unpack(self) -> None:
        """Bitsandbytes packs 4-bit weights in its first forward on a CPU, and PEFT misreads them then."""
        base = self.get_base_layer()
        quant_state = getattr(getattr(base, "weight", None), "quant_state", None)
        if getattr(quant_state, "packing_format_for_cpu", False):
            base.state_dict()  # takes the packing back

    def _bias(self) -> Tensor | None:
        bias = getattr(self.get_base_layer(), "bias", None)
        if not isinstance(bias, Tensor):
            return None
        return (offloaded(self.get_base_layer(), "bias") if bias.is_meta else bias).detach()

    def check_mergeable(self, adapter_names: list[str] | None = None, approximate: bool = False) -> None:
        """Raise `ValueError` if an adapter cannot become part of this layer's weight; touches nothing."""
        for name in adapter_names if adapter_names is not None else self.active_adapters:
            if name not in self.circuits:
                continue
            refused = self.circuits[name].unmergeable(approximate)
            if refused:
                possible = not approximate and not self.circuits[name].unmergeable(approximate=True)
                raise ValueError(
                    f"adapter {name!r} cannot be merged: {', '.join(refused)} "
                    f"{'depend' if len(refused) > 1 else 'depends'} on the input (at {self.path}). Keep the adapter as "
                    "it is, or train one of primitives that merge"
                    + ("; approximate=True merges the nearest linear map and tells its error" if possible else "")
                )
            if self.site.weight is None:
                raise ValueError(f"adapter {name!r} cannot be merged: {self.path} ({self.site.layer}) has no matrix")
            if self._not_written_back():
                raise ValueError(
                    f"adapter {name!r} cannot be merged: {self.path} is quantised with "
                    f"{self.quantization_backend.backend_name}, {self._not_written_back()}"
                )
            if self.get_base_layer().weight.is_meta:
                raise ValueError(
                    f"adapter {name!r} cannot be merged: the weight of {self.path} is offloaded, and what is written "
                    "into it here would be lost. Load the model without offloading, add the adapter, and merge it there"
                )
            computed = self._weight_is_computed()
            if computed is not None:
                raise ValueError(
                    f"adapter {name!r} cannot be merged: {self.path} {computed}, so what is written into it would have "
                    "no effect. Make it an ordinary weight first (such as by torch.nn.utils.parametrize."
                    "remove_parametrizations, remove_weight_norm or prune.remove)"
                )

    def _not_written_back(self) -> str | None:
        """Why a quantised weight cannot be changed, in words, or None if it can."""
        backend = self.quantization_backend
        if backend is None:
            return None
        if not backend.supports_merge:
            return "which cannot be written back"
        if getattr(backend, "get_apply_tensor_subclass", None) is _unknown_recipe:
            return "by a recipe that the model does not keep: load it with transformers' TorchAoConfig to merge"
        if not isinstance(getattr(self.get_base_layer(), "weight", None), Tensor):
            return "whose layers would have to be made anew, without their bias"
        return None

    def _weight_is_computed(self) -> str | None:
        """Why the layer does not compute with the weight or the bias that it shows, or None if it does."""
        base = self.get_base_layer()
        for name in ("weight", "bias"):
            held = base._parameters.get(name) is not None or base._buffers.get(name) is not None
            if isinstance(getattr(base, name, None), Tensor) and not held:
                return f"computes its {name} from other tensors in every forward"
        if self.quantization_backend is None and type(base.weight.data) is not Tensor:
            return f"holds a {type(base.weight.data).__name__}, a form of numbers that is not known"
        if self.quantization_backend is None and type(base).__module__.startswith("optimum.quanto"):
            return f"is a {type(base).__name__}, which quantises its weight in every forward"
        return None

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, approximate: bool = False
    ) -> None:
        """Make adapters part of the base weight; whatever other tuner lies below is merged first.

        Args:
            safe_merge: passed to the tuner below. A result that is not finite is refused in any case.
            adapter_names: which; the active ones if None.
            approximate: accept the nearest linear map of a primitive that cannot be merged exactly and knows one.

        Raises:
            ValueError: a primitive depends on its input, or the result is not finite; the layer is as before.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.circuits]
        if not names:
            return
        self.check_mergeable(names, approximate)
        fresh = self._original is None
        original = self._original = self._original or self._keep_original(safe_merge)
        try:
            weight, bias = self._current()
            for name in names:
                dw, db = self.circuits[name].merged_change(original.matrix, original.bias_vector, approximate)
                weight = weight + dw
                bias = bias if bias is None or db is None else bias + db
            stored = self.get_base_weight().dtype  # half precision ends at 65504
            written = [tensor.to(stored) for tensor in (weight, bias) if tensor is not None]
            if not all(torch.isfinite(tensor).all() for tensor in written):
                raise ValueError(
                    f"merging {', '.join(repr(name) for name in names)} gives weights at {self.path} that are not "
                    "finite: the adapter seems to be broken"
                )
        except Exception:
            if fresh:
                self._restore()
            raise
        if self.quantization_backend is None:
            self.lost_in_rounding = _lost_in_rounding(original.matrix, weight, stored)
        self._write(weight, bias)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the base layer bit for bit, and the tuner below to the state it was in."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.clear()
        self._restore()

    # -- as a LoRA --

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` can turn the adapter at this layer into a LoRA; warns why it cannot."""
        reason = self._not_a_lora(adapter_name)
        if reason is not None:
            warnings.warn(
                f"adapter {adapter_name!r} at {self.path} is no change of the weight that a LoRA could hold: {reason}. "
                "bioadapt.distill_to_lora fits one to what it does"
            )
        return reason is None

    def _not_a_lora(self, adapter_name: str) -> str | None:
        if adapter_name not in self.circuits:
            return "it is not there"
        refused = self.circuits[adapter_name].unmergeable()
        if refused:
            return f"{', '.join(refused)} depends on the input"
        if self.below is not None:
            return "it is stacked over another adapter, which the conversion would mix up with it"
        if self.site.weight not in ("rows", "columns") or not self.site.reads_features:
            return f"{self.site.layer} is not a linear layer"
        bias = self._bias()
        _, db = self.circuits[adapter_name].merged_change(
            self.site.matrix(self.get_base_weight()), None if bias is None else in_full(bias)
        )
        return "it changes the bias as well" if db is not None and torch.count_nonzero(db) else None

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The change of the weight that a mergeable adapter makes, in the layout of the base weight, fp32 at least.

        Raises:
            ValueError: a primitive depends on its input.
        """
        self.check_mergeable([adapter_name])
        weight, bias = self.get_base_weight(), self._bias()
        matrix = self.site.matrix(weight)
        dw, _ = self.circuits[adapter_name].merged_change(matrix, None if bias is None else in_full(bias))
        return self.site.unmatrix(dw, in_full(weight))

    def _keep_original(self, safe_merge: bool) -> Original:
        self._unpack()
        base = self.get_base_layer()
        bias = base.bias if isinstance(getattr(base, "bias", None), nn.Parameter) else None
        base_weight, data = base.weight, (base.weight.data, None if bias is None else bias.data)
        state = None if self.quantization_backend is None else copy.copy(getattr(base, "state", None))
        attributes = dict(vars(base_weight))
        merges_below = self.below is not None and not self.below.disable_adapters and not self.below.merged
        if merges_below:
            data = tuple(None if tensor is None else tensor.clone() for tensor in data)  # it writes in place
            self.below.merge(safe_merge=safe_merge)
        matrix = self.site.matrix(self.get_base_weight())
        vector = None if bias is None else in_full(bias.detach())
        # The tuner below has merged nothing where none of its active adapters sits on this layer.
        merged_below = merges_below and self.below.merged
        return Original(base_weight, data[0], bias, data[1], merged_below, matrix, vector, attributes, state)

    def _restore(self) -> None:
        original, self._original = self._original, None
        assert original is not None
        base = self.get_base_layer()
        if original.below_was_merged:
            self.below.unmerge()
            base = self.get_base_layer()
        base.weight = original.weight
        base.weight.data = original.weight_data.to(original.weight.device)
        vars(base.weight).update(original.attributes)
        if original.state is not None:
            base.state = original.state
        if original.bias is not None:
            base.bias = original.bias
            base.bias.data = original.bias_data.to(original.bias.device)

    def _current(self) -> tuple[Tensor, Tensor | None]:
        bias = self._bias()
        return self.site.matrix(self.get_base_weight()), None if bias is None else in_full(bias)

    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        holder: BaseTunerLayer = self
        while isinstance(holder.base_layer, BaseTunerLayer):  # some quantised formats replace the layer in its holder
            holder = holder.base_layer
        current = self.get_base_weight()
        data = self.site.unmatrix(weight, current)
        if self.quantization_backend is None:
            # A new storage: the kept original stays what it is.
            self.get_base_layer().weight.data = data
        else:
            self.quantization_backend.set_base_weight(holder, data)
        base = self.get_base_layer()
        if bias is not None and base.bias is not None:
            base.bias.data = bias.to(base.bias.dtype)


def _unknown_recipe() -> None:
    """Stands for the recipe by which torchao quantised a model, where that does not tell."""


def quantization_backend_of(layer: nn.Module, **kwargs: Any) -> Any:
    """PEFT's way to read and write a quantised layer, None for an ordinary one.

    PEFT refuses a layer that `torchao.quantize_` has quantised, since it cannot be quantised anew after a merge.
    """
    return resolve_quantization_backend(layer, **{"get_apply_tensor_subclass": _unknown_recipe, **kwargs})


def _lost_in_rounding(before: Tensor, after: Tensor, stored: torch.dtype) -> float:
    """The share of the weights to be changed that are too coarse, in the dtype they are stored in, to change.

    In bf16 a weight of 0.06 stays what it is when less than 0.0001 is added.
    """
    changed = after != before
    lost = changed & (after.to(stored) == before.to(stored))
    return lost.sum().item() / max(changed.sum().item(), 1)
