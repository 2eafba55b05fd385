"""Teaches PEFT the method ``BIO``. PEFT has no public way to add one from outside: this file alone reaches in."""

from __future__ import annotations

from functools import wraps
from typing import Any

from .._extras import versions
from ..checkpoint import PREFIX

_KNOWN = "0.21"


def register() -> None:
    """Add ``BIO`` to PEFT's types and register configuration and tuner; safe to call again.

    Raises:
        ImportError: what is installed keeps types or methods in a way that bioadapt does not know; with all versions.
    """
    import peft
    from peft.utils.peft_types import PeftType
    from transformers import PreTrainedModel
    from transformers.integrations.peft import PeftAdapterMixin
    from transformers.utils import PushToHubMixin

    try:
        if "BIO" not in PeftType.__members__:
            _extend(PeftType, "BIO")
        # Imported only now: the configuration class looks its type up.
        from ..config import BioConfig
        from . import loading, refusals, saving
        from .model import BioModel

        _register_method(peft, PeftType, BioConfig, BioModel)
        # Neither library has a hook around injecting an adapter and reading its tensors, or around writing tensors and
        # configuration. Each of these can go once it has one.
        for task_model in peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values():
            _surround(task_model, "__init__", refusals.made_for_task)
        _surround(peft.PeftModel, "from_pretrained", loading.from_pretrained)
        _surround(peft.PeftModel, "load_adapter", loading.load_adapter)
        _surround(peft.PeftModel, "add_adapter", refusals.add_adapter)
        _surround(peft.peft_model, "load_peft_weights", loading.read_weights)
        _surround(PeftAdapterMixin, "load_adapter", loading.load_adapter_of_transformers)
        _surround(peft.PeftModel, "save_pretrained", saving.save_pretrained)
        _surround(peft.utils.save_and_load, "has_valid_embedding_base_layer", saving.has_valid_embedding_base_layer)
        _surround(PreTrainedModel, "save_pretrained", saving.save_pretrained_of_transformers)
        for pushed in (PushToHubMixin, PreTrainedModel):  # a PeftModel's is the first one's
            _surround(pushed, "push_to_hub", saving.push_to_hub)
    except (AttributeError, TypeError, ImportError) as error:
        installed = ", ".join(f"{name} {version}" for name, version in versions().items())
        raise ImportError(
            f"bioadapt knows PEFT {_KNOWN}, and what is installed ({installed}) cannot be taught the method: {error}"
        ) from error


def _extend(enumeration: Any, name: str) -> None:
    """Add a member to a string enumeration that is already complete."""
    member = str.__new__(enumeration, name)
    member._name_, member._value_, member.__objclass__ = name, name, enumeration
    member._sort_order_ = len(enumeration._member_names_)
    type.__setattr__(enumeration, name, member)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
    enumeration._member_names_.append(name)


def _register_method(peft: Any, types: Any, config_cls: type, model_cls: type) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(types.BIO)
    if known is config_cls:
        return
    if known is not None:
        raise ImportError(f"another package has already registered the method BIO ({known.__module__})")
    register_peft_method(name="bio", config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)


def _surround(owner: Any, name: str, around: Any) -> None:
    """Have ``around`` called in the place of a function, with that function as its first argument."""
    present = vars(owner)[name]
    original = present.__func__ if isinstance(present, classmethod) else present
    if hasattr(original, "surrounded_by_bioadapt"):
        return

    @wraps(original)
    def surrounded(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    surrounded.surrounded_by_bioadapt = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(surrounded) if isinstance(present, classmethod) else surrounded)
