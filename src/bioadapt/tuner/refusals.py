"""What cannot be adapted or named so, said once and in words."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TaskType
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .._words import suggest
from ..config import ELSEWHERE, BioConfig
from .layer import BioLayer
from .tree import undone_on_failure


def base_of(under: PeftModel | PeftMixedModel) -> nn.Module:
    """The plain model under a PeftModel.

    Raises:
        ValueError: the method below works outside the layers, or it is a bio adapter itself.
    """
    if isinstance(under, PeftMixedModel):
        raise ValueError("a bio adapter cannot be stacked over a mixed model, whose layers wrap each other in turn")
    method = str(under.peft_type.value if hasattr(under.peft_type, "value") else under.peft_type)
    if method == "BIO":
        raise ValueError(
            "this model already carries a bio adapter: use model.add_adapter(name, config) and set_adapter for a "
            "second one, or list all primitives in one configuration"
        )
    if not isinstance(under.base_model, BaseTuner) or type(under.base_model).forward is not BaseTuner.forward:
        raise ValueError(
            f"a bio adapter cannot be stacked over {method}: that method works in the model's forward, not in its "
            "layers. Methods such as LORA, LOHA, LOKR, IA3 or OFT can be stacked over"
        )
    return under.base_model.model


def check_names(model: nn.Module, ours: dict[str, PeftConfig], adapter_name: str) -> None:
    """Modules to save are kept by adapter name, whatever the method: ours must not meet the ones below."""
    config = ours[adapter_name]
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r}: torch cannot hold modules under this name; accepted is a word without "
            "dots that is no attribute of nn.ModuleDict"
        )
    for module in model.modules():
        if isinstance(module, BioLayer) and adapter_name in module.circuits:
            raise ValueError(f"adapter_name={adapter_name!r} is taken: {module.path} has an adapter of that name")
        if not isinstance(module, AuxiliaryTrainingWrapper) or adapter_name not in module._adapters:
            continue
        raise ValueError(
            f"adapter_name={adapter_name!r}: the method below keeps a trained module under the same name "
            f"(modules_to_save={sorted(config.modules_to_save or [])} here); give the bio adapter another one, for "
            f"instance adapter_name={free_name(module._adapters)!r}"
        )


# What PEFT trains in full for a task, and notes in the configuration only after the adapter has copied it.
_HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def made_for_task(original: Callable[..., None], self: PeftModel, *args: Any, **kwargs: Any) -> None:
    """Around the ``__init__`` of PEFT's models for tasks: what the task needs is there, or the model is as before.

    Raises:
        ValueError: the model cannot do what ``task_type`` says.
    """
    given = inspect.signature(original).bind(self, *args, **kwargs)
    model, config = given.arguments["model"], given.arguments.get("peft_config")
    if not isinstance(config, BioConfig):
        return original(*given.args, **given.kwargs)
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"task_type={TaskType(config.task_type).value!r}: {type(model).__name__} generates nothing; "
            "load it with its head, such as by AutoModelForCausalLM, or leave task_type=None"
        )
    heads = [*(config.modules_to_save or []), *_HEADS.get(config.task_type, [])]
    given.arguments["peft_config"] = dataclasses.replace(config, modules_to_save=heads or None)
    with undone_on_failure(model):
        return original(*given.args, **given.kwargs)


def check_attributes(config: BioConfig) -> None:
    """Refuse what other methods are configured by and was written into a configuration that has no such field.

    Raises:
        TypeError: naming the attribute, and what to do instead.
    """
    for name, value in vars(config).items():
        if name in ELSEWHERE and value:
            raise TypeError(f"{type(config).__name__} has no field {name!r} (got {value!r}); {ELSEWHERE[name]}")


def check_layers(config: BioConfig, targets: Any, model: nn.Module, is_target: Callable[[BioConfig, str], Any]) -> None:
    """Refuse indices at which the model has no target module.

    Raises:
        ValueError: naming them, and the layers that there are.
    """
    names = [name for name, _ in model.named_modules()]

    def has(index: int) -> bool:
        one = copy.copy(config)
        one.target_modules, one.layers_to_transform = targets, [index]
        return any(is_target(one, name) for name in names)

    asked = config.layers_to_transform
    absent = [index for index in ([asked] if isinstance(asked, int) else asked or []) if not has(index)]
    numbers = sorted({int(word) for name in names for word in name.split(".") if word.isdigit()}) if absent else []
    known = [index for index in numbers if has(index)]
    if known:  # where there is none at all, it is the targets that are wrong
        raise ValueError(
            f"layers_to_transform={asked!r}: no layer {', '.join(map(str, absent))} has a target module; "
            f"accepted are {', '.join(map(str, known))}"
        )


def free_name(taken: Any) -> str:
    return next(name for name in ("bio", *(f"bio{i}" for i in range(2, 1000))) if name not in taken)


def names_to_target(model: nn.Module) -> set[str]:
    """What the layers of a model are called within their blocks, leaving out what adapters consist of."""
    modules = dict(model.named_modules())
    adapted = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    outside = {name: module for name, module in modules.items() if name and not name.startswith(adapted)}
    leaves = [name for name, module in outside.items() if f"{name}." in adapted or not list(module.children())]
    return {name.rpartition(".")[2] for name in leaves if not name.rpartition(".")[2].isdigit()}


def with_suggestion(error: Exception, config: BioConfig, model: nn.Module) -> NoMatchingPeftModuleError:
    targets = config.target_modules
    asked = sorted(targets)[0] if isinstance(targets, (set, list)) and targets else str(targets)
    return NoMatchingPeftModuleError(f"{error} target_modules={targets!r}: {suggest(asked, names_to_target(model))}")


def add_adapter(
    original: Callable[..., Any], self: PeftModel, adapter_name: str, peft_config: Any, *args: Any, **more: Any
) -> Any:
    """Around `PeftModel.add_adapter`: which adapters of two methods can be had together, and how.

    Raises:
        ValueError: one of the model's and the new adapter is a bio adapter, the other is not.
    """
    here, new = (getattr(kind, "value", kind) for kind in (self.peft_type, getattr(peft_config, "peft_type", None)))
    if here == "BIO" and new not in ("BIO", None):
        raise ValueError(
            f"this model carries a bio adapter, to which no {new} can be added: put the bio adapter over the {new}, "
            "get_peft_model(get_peft_model(base, other_config), bio_config); model.unload() gives the base back"
        )
    if new == "BIO" and here != "BIO":
        raise ValueError(
            f"this model carries a {here}, beside which no bio adapter can be added: put it over that, "
            "get_peft_model(model, bio_config)"
        )
    return original(self, adapter_name, peft_config, *args, **more)
