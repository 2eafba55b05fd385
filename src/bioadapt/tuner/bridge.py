"""Teaches PEFT the method ``BIO``. PEFT has no public way to add one from outside: this file alone reaches in."""

from __future__ import annotations

from typing import Any

# No plausible adapter name is part of it: PEFT warns, and may re-initialise weights, when the name of an adapter is
# contained in the prefix of its method.
PREFIX = "nrn_"
CONTAINER = f"{PREFIX}circuit"
_KNOWN = "0.21 to 0.22"


def register() -> None:
    """Add ``BIO`` to PEFT's types and register configuration and tuner; safe to call again.

    Raises:
        ImportError: this version of PEFT keeps its types or methods in a way that bioadapt does not know.
    """
    import peft
    from peft.utils.peft_types import PeftType

    try:
        if "BIO" not in PeftType.__members__:
            _extend(PeftType, "BIO")
        # Imported only now: the configuration class looks its type up.
        from ..config import BioConfig
        from .model import BioModel

        _register_method(peft, PeftType, BioConfig, BioModel)
    except (AttributeError, TypeError, ImportError) as error:
        raise ImportError(
            f"bioadapt knows PEFT {_KNOWN}, but PEFT {peft.__version__} is installed and cannot be taught the method: "
            f"{error}"
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
