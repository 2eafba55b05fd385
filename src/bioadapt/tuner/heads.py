"""Modules to save, above all classification heads, where methods above and below each keep a trained copy.

PEFT keeps the copies of a module in one wrapper, by adapter name, whatever the method. What is in use without a bio
adapter is the copy of the method below, not the untrained original.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..checkpoint import CONTAINER
from .layer import BioLayer

_NOT_BELOW = (".modules_to_save.", f".{CONTAINER}.")
_HOOKS = "bio_hooks"


def heads(model: nn.Module, names: Iterable[str]) -> Iterator[AuxiliaryTrainingWrapper]:
    """The wrappers that hold a copy for one of the named adapters."""
    wanted = set(names)
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and wanted & module._adapters:
            yield module


def take_over_heads(model: nn.Module, adapter_name: str) -> None:
    """Let a fresh copy of a module to save start from the trained copy of the method below, not from scratch."""
    for wrapper in heads(model, [adapter_name]):
        # The hook is put on once, and not for each request: one for a request would act in those of other threads.
        hooks = wrapper.__dict__.setdefault(_HOOKS, {})
        hooks[adapter_name] = wrapper.register_forward_pre_hook(tell_head, with_kwargs=True)
        below = head_below(model, wrapper)
        copies = getattr(wrapper, "modules_to_save", {})
        if adapter_name in copies and below in copies:
            copies[adapter_name].load_state_dict(copies[below].state_dict())


def use_head(
    model: nn.Module, wrapper: AuxiliaryTrainingWrapper, names: Iterable[str], inference_mode: bool = False
) -> None:
    """Use the copy of one of the named adapters, or if none has one, what is used without a bio adapter."""
    ours = [name for name in names if name in wrapper._adapters]
    if ours:
        wrapper.set_adapter(ours[0], inference_mode=inference_mode)
    else:
        use_head_below(model, wrapper)


def release_heads(model: nn.Module, adapter_name: str, keep: bool = False) -> None:
    """Give up an adapter's copies of modules to save; ``keep``: what it trained stays in use."""
    for name, wrapper in list(model.named_modules()):
        if not isinstance(wrapper, AuxiliaryTrainingWrapper) or adapter_name not in wrapper._adapters:
            continue
        in_use = adapter_name in wrapper.active_adapters
        others = sorted(wrapper._adapters - {adapter_name})
        copies = getattr(wrapper, "modules_to_save", {})
        trained = copies[adapter_name] if keep and in_use and adapter_name in copies else None
        if not others:
            parent_name, _, child = name.rpartition(".")
            left = trained if trained is not None else wrapper.original_module
            setattr(model.get_submodule(parent_name), child, left)
            continue
        if trained is not None:
            heir = head_below(model, wrapper) or others[0]
            copies[heir].load_state_dict(trained.state_dict())
            wrapper.set_adapter(heir, inference_mode=not is_trained(model, heir))
        elif in_use:
            use_head_below(model, wrapper)
        wrapper.delete_adapter(adapter_name, wrapper.active_adapters)
        hook = wrapper.__dict__.get(_HOOKS, {}).pop(adapter_name, None)
        if hook is not None:
            hook.remove()


def head_below(model: nn.Module, wrapper: AuxiliaryTrainingWrapper) -> str | None:
    """The adapter of another method whose copy of the wrapped module is in use where no bio adapter has one."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, BioLayer):
            for name in layer.active_adapters:
                if name in wrapper._adapters:
                    return name
    return None


def use_head_below(model: nn.Module, wrapper: AuxiliaryTrainingWrapper) -> None:
    below = head_below(model, wrapper)
    wrapper.set_adapter([] if below is None else below, inference_mode=not is_trained(model, below))


def is_trained(model: nn.Module, adapter_name: str | None) -> bool:
    """Whether the tensors of an adapter of another method, apart from its modules to save, are trainable."""
    return any(
        parameter.requires_grad and f".{adapter_name}." in f"{key}." and not any(part in key for part in _NOT_BELOW)
        for key, parameter in model.named_parameters()
    )


class _ChosenCopies(threading.local):
    """Which copy each sample is to use, by the id of the module to save: in this flow of control alone."""

    copies: dict[int, list[str]] | None = None


_chosen = _ChosenCopies()


@contextmanager
def choosing_heads(model: nn.Module, ours: Iterable[str], adapter_names: list[str]) -> Iterator[None]:
    """Forwards in which each sample uses the copy of the adapter named for it."""
    copies = {}
    for wrapper in heads(model, ours):
        instead = head_below(model, wrapper) or "__base__"
        copies[id(wrapper)] = [name if name in wrapper._adapters else instead for name in adapter_names]
    before, _chosen.copies = _chosen.copies, copies
    try:
        yield
    finally:
        _chosen.copies = before


def tell_head(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Tell a module to save which sample uses which copy. Beam search repeats samples."""
    names = (_chosen.copies or {}).get(id(module))
    if names is None:
        return None
    repeats = len(args[0]) // len(names)
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(repeats)]}
