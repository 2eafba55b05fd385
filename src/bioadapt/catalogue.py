"""Every primitive as a function of its settings: ``BioConfig([catalogue.neuro_ada(k=4)])``.

The functions are made from the registry when they are asked for, those of other packages as well. For editors and type
checkers the built-in ones stand in ``catalogue.pyi``, which ``make stubs`` writes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from ._words import suggest
from .registry import list_primitives, primitive_info


def __getattr__(name: str) -> Callable[..., dict[str, Any]]:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return _function(primitive_info(name).factory)
    except ValueError as error:
        raise AttributeError(f"module {__name__!r}: {error}") from None


def __dir__() -> list[str]:
    return list_primitives()


@cache
def _function(factory: Any) -> Callable[..., dict[str, Any]]:
    """The function that returns an entry of ``BioConfig.primitives`` with the settings that it is given, checked."""
    info = primitive_info(factory.name)

    def entry(**settings: Any) -> dict[str, Any]:
        for word in settings:
            if word not in info.settings:
                raise TypeError(f"{info.name}() has no setting {word!r}; {suggest(word, info.settings)}")
        checked = factory.check_settings(settings)
        return {"name": info.name, **{word: checked[word] for word in settings}}

    entry.__name__ = entry.__qualname__ = info.name
    entry.__doc__ = described(info.name)
    entry.__signature__ = inspect.Signature(settings_of(info.name), return_annotation="dict[str, Any]")  # type: ignore[attr-defined]
    return entry


def settings_of(name: str) -> list[inspect.Parameter]:
    """The settings of a primitive as parameters, with the defaults of a new adapter and types as source text."""
    info = primitive_info(name)
    defaults = {word: setting.default for word, setting in info.settings.items()}
    defaults["zero_scale"] = info.fresh_zero_scale
    return [
        inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY, default=defaults[word], annotation=setting.annotation)
        for word, setting in info.settings.items()
    ]


def described(name: str) -> str:
    """What a primitive does and what its settings mean, as a docstring."""
    info = primitive_info(name)
    lines = [f"    {word}: {setting.meaning}; {setting.accepted}." for word, setting in info.settings.items()]
    return "\n".join([info.summary, "", "Args:", *lines])
