"""A layer that the tuner below does not see.

A layer put around another tuner's layer would push that layer one level down: its tensors would be saved under other
keys, and its tuner would look for them in vain. Over another tuner's layer this one therefore passes on the names:
modules, parameters and state-dict keys of the layer below are what they are without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..checkpoint import CONTAINER


class Transparent(nn.Module):
    """What wraps ``base_layer``, and keeps its own parts in the container."""

    base_layer: nn.Module

    @property
    def below(self) -> BaseTunerLayer | None:
        """The layer of another tuner that this one is stacked over."""
        return self.base_layer if isinstance(self.base_layer, BaseTunerLayer) else None

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        if self.below is None:
            yield from super().named_modules(memo, prefix, remove_duplicate)
            return
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, module in self._modules.items():
            if module is not None:
                inner = prefix if name == "base_layer" else f"{prefix}.{name}" if prefix else name
                yield from module.named_modules(memo, inner, remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        if self.below is None:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        own = super().state_dict(prefix=prefix, keep_vars=keep_vars)
        hidden = f"{prefix}base_layer."
        renamed = type(own)(
            (prefix + key[len(hidden) :] if key.startswith(hidden) else key, value) for key, value in own.items()
        )
        renamed._metadata = own._metadata
        if destination is None:
            return renamed
        destination.update(renamed)
        if hasattr(destination, "_metadata"):
            destination._metadata.update(own._metadata)
        return destination

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.below is not None:
            for key in [key for key in state_dict if key.startswith(prefix)]:
                rest = key[len(prefix) :]
                if not rest.startswith(f"{CONTAINER}."):
                    state_dict[f"{prefix}base_layer.{rest}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
