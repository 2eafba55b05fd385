"""Walking over a model's bio layers, taking them out again, and a model as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.config import PeftConfig
from torch import nn

from .heads import release_heads
from .layer import BioLayer

_CONTAINERS = (dict, OrderedDict, list, set)


def bio_layers(model: nn.Module) -> Iterator[BioLayer]:
    return (module for module in model.modules() if isinstance(module, BioLayer))


def named_bio_layers(model: nn.Module) -> Iterator[tuple[str, BioLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BioLayer))


def stacked_over(model: nn.Module) -> tuple[nn.Module, PeftModel | None]:
    """The plain model, and the PeftModel of another method that the bio adapters are stacked over, if there is one."""
    tuner = getattr(model, "base_model", None)
    under = getattr(tuner, "under", None)
    return (tuner.model if isinstance(model, PeftModel) else model), under


def remove_adapter(model: nn.Module, adapter_name: str, keep_heads: bool = False) -> None:
    """Take an adapter out of a model; layers without any adapter left, and scopes without layers, go as well."""
    for name, layer in list(named_bio_layers(model)):
        if adapter_name in layer.circuits:
            del layer.circuits[adapter_name]
        if len(layer.circuits):
            continue
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, layer.base_layer)
        layer.scope.layers.remove(layer)
    for module in list(model.modules()):
        scope = module.__dict__.get("bio_scope")
        if scope is not None and not scope.layers:
            scope.remove(module)
    release_heads(model, adapter_name, keep_heads)


def forget_configs(model: nn.Module, configs: dict[str, PeftConfig] | None) -> None:
    """Leave ``configs`` as the model's table of adapters, or no table."""
    if configs:
        model.__dict__["peft_config"] = configs
        return
    model.__dict__.pop("peft_config", None)
    if getattr(model, "_hf_peft_config_loaded", False):
        model._hf_peft_config_loaded = False


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Whatever the block has put into the model is taken out of it again if the block fails, whatever the exception.

    Modules, hooks, attributes and what is trainable are those of before. Values that were written into tensors of
    before are not: a caller checks those first.
    """
    attributes = [
        (
            module,
            type(module),  # a stack has a class of its own while it carries an adapter
            dict(vars(module)),
            {name: held.copy() for name, held in vars(module).items() if type(held) in _CONTAINERS},
        )
        for module in model.modules()
    ]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    scopes = [(scope, list(scope.layers)) for module, *_ in attributes if (scope := vars(module).get("bio_scope"))]
    try:
        yield
    except BaseException:
        for module, cls, before, contents in attributes:
            if type(module) is not cls:
                module.__class__ = cls
            vars(module).clear()
            vars(module).update(before)
            for name, content in contents.items():
                container = vars(module)[name]
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in trainable:
            parameter.requires_grad = requires_grad
        for scope, layers in scopes:
            scope.layers[:] = layers
        raise
