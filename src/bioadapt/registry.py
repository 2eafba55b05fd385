"""Names -> primitives. One record per primitive feeds the configuration, the command line, the pages and the tests."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from ._words import suggest
from .primitives.base import Host, LocalRule, OnWeight, Primitive, Setting
from .primitives.names import ENTRY_POINT_GROUP, KINDS, STAGES, check_filter
from .primitives.primitive import MERGES, ZEROS

if TYPE_CHECKING:
    from .record import Finding

_SECTIONS = ("Biology", "Equation", "Reference")

P = TypeVar("P", bound=type[Primitive])


@dataclass(frozen=True)
class PrimitiveInfo:
    """What the registry knows of a primitive.

    ``settings`` maps each setting's name to its type, default, range and meaning. ``merge`` is ``"weight"`` (a change
    of the layer's weight), ``"left"`` (a linear map of the layer's output) or None; ``zero_at`` says which factor of
    the path is zero at birth, and ``fresh_zero_scale`` what it is multiplied by in a new adapter. ``learns``: buffers
    follow a local rule. ``needs_input``: it reads the layer's input.
    """

    name: str
    stage: str
    kind: str
    zero_at: str
    fresh_zero_scale: float
    merge: str | None
    stochastic: bool
    learns: bool
    needs_input: bool
    summary: str
    biology: str
    equation: str
    reference: str
    settings: MappingProxyType[str, Setting]
    factory: type[Primitive]

    @property
    def mergeable(self) -> bool:
        """Whether the adapter can disappear into the layer's weight without changing the function."""
        return self.merge is not None

    @property
    def gain(self) -> bool:
        """Whether it multiplies what is there, channel by channel, and adds nothing new."""
        return self.zero_at in ("gate", "scalar_gate") and self.kind != "weight" and self.factory.home is None

    @property
    def record(self) -> tuple[Finding, ...]:
        """What was measured of it, task by task; empty where nothing was."""
        from .record import findings

        return findings(self.name)

    @property
    def stateful(self) -> bool:
        """Whether it carries anything over: along tokens while decoding, or along steps in buffers."""
        return self.kind == "causal" or self.learns

    def parameter_count(self, d_in: int, d_out: int, **settings: Any) -> int:
        """Trainable numbers, gate included, on a layer from ``d_in`` to ``d_out`` features."""
        module = build_primitive(self.name, d_in, d_out, **settings)
        return sum(parameter.numel() for parameter in module.parameters())


_infos: dict[str, PrimitiveInfo] = {}
_aliases: dict[str, str] = {}


def register_primitive(
    name: str,
    *,
    stage: str,
    kind: str,
    zero_at: str,
    zero_scale: float | None = None,
    merge: str | None = None,
    stochastic: bool = False,
    learns: bool = False,
    needs_input: bool = False,
    aliases: tuple[str, ...] = (),
) -> Callable[[P], P]:
    """Class decorator that puts a `Primitive` into the registry.

    The class docstring supplies the rest of the record: its first paragraph is the summary, and the paragraphs that
    start with ``Biology:``, ``Equation:`` and ``Reference:`` are those fields.

    Args:
        name: registry key, a lower-case identifier from neuroscience's or machine learning's own vocabulary.
        stage: one of the six stages.
        kind: ``pointwise``, ``causal``, ``weight`` or ``global``.
        zero_at: the one factor that is zero at birth: ``gate`` (per channel), ``scalar_gate``, ``readout`` (with a
            scalar gate of 1 behind it) or ``update`` (a change of the weight that no gate follows).
        zero_scale: what a new adapter multiplies that factor by, so that a LoRA's learning rate trains it; None for
            what suits most primitives with a zero there.
        merge: ``weight``, ``left`` or None.
        stochastic: draws random numbers in training.
        learns: has buffers that follow a local rule.
        needs_input: reads the layer's input, hence cannot sit on an embedding.
        aliases: further spellings under which the primitive is found.

    Raises:
        ValueError: a wrong field, a docstring without the required paragraphs, or an unfitting base class.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name={name!r}: a lower-case identifier is needed")
    declared = {"stage": (stage, STAGES), "kind": (kind, KINDS), "zero_at": (zero_at, ZEROS), "merge": (merge, MERGES)}
    for field, (value, accepted) in declared.items():
        if value not in accepted and not (field == "merge" and value is None):
            raise ValueError(f"primitive {name!r}: {field}={value!r}; {suggest(value, accepted)}")

    def decorate(cls: P) -> P:
        fields: dict[str, Any] = {
            "name": name,
            "stage": stage,
            "kind": kind,
            "zero_at": zero_at,
            "fresh_zero_scale": ZEROS[zero_at] if zero_scale is None else zero_scale,
            "merge": merge,
            "stochastic": stochastic,
            "learns": learns,
            "needs_input": needs_input,
        }
        for field, value in fields.items():
            setattr(cls, field, value)
        if (kind == "weight") != issubclass(cls, OnWeight):
            base = "OnWeight" if kind == "weight" else "Primitive"
            raise ValueError(f"primitive {name!r}: kind={kind!r} needs class {cls.__name__}({base})")
        if learns and not issubclass(cls, LocalRule):
            raise ValueError(f"primitive {name!r}: learns=True needs class {cls.__name__}(LocalRule, Primitive)")
        if name in _infos and _infos[name].factory.__qualname__ != cls.__qualname__:
            warnings.warn(f"primitive {name!r} is registered twice; {cls.__qualname__} replaces the earlier class")
        settings = MappingProxyType(cls.declared_settings())
        for setting_name in settings:
            if hasattr(Primitive, setting_name) and setting_name not in Primitive.declared_settings():
                raise ValueError(
                    f"primitive {name!r}: a setting cannot be called {setting_name!r}, a name of the base class"
                )
        fields |= _read_docstring(name, cls)
        _infos[name] = PrimitiveInfo(**fields, settings=settings, factory=cls)
        _aliases.update(dict.fromkeys(aliases, name))
        return cls

    return decorate


def list_primitives(pattern: str = "*", stage: str | None = None, kind: str | None = None) -> list[str]:
    """Sorted registry names, optionally of one pattern, one stage or one kind.

    Args:
        pattern: a name with ``*`` for any letters and ``?`` for any one, such as ``"*lora*"``.
        stage: one of the six stages.
        kind: ``pointwise``, ``causal``, ``weight`` or ``global``.

    Raises:
        ValueError: an unknown stage or kind, or one of them as the pattern.
    """
    check_filter(pattern, stage, kind)
    _load()
    return sorted(
        name
        for name, info in _infos.items()
        if fnmatchcase(name, pattern) and stage in (None, info.stage) and kind in (None, info.kind)
    )


def primitive_info(name: str) -> PrimitiveInfo:
    """The record of a primitive.

    Raises:
        ValueError: no primitive of that name; the nearest names are given.
    """
    _load()
    if not isinstance(name, str):
        raise ValueError(f"a primitive's name is a string, got {name!r}")
    key = _aliases.get(name, name)
    if key not in _infos:
        raise ValueError(f"unknown primitive {name!r}; {suggest(name, (*_infos, *_aliases))}")
    return _infos[key]


def build_primitive(name: str, d_in: int, d_out: int, *, host: Host | None = None, **settings: Any) -> Primitive:
    """The bare module, ``module(x) -> delta`` with x (..., T, d_out), for tests and study.

    Where the module reads the layer's input, that is ``context.x_in``, or x itself if both sizes agree.

    Raises:
        ValueError: unknown name, unknown setting or value out of range; the message names it.
    """
    info = primitive_info(name)
    try:
        return info.factory(d_in, d_out, host=host, **settings)
    except ValueError as error:
        raise ValueError(f"{info.name}: {error}") from None


@cache
def _load() -> None:
    """Import the built-in primitives and those that installed packages announce."""
    for package in ("bioadapt.primitives", "bioadapt.methods"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except Exception as error:  # one broken plug-in must not take the library down
            warnings.warn(f"the primitives of entry point {entry.name!r} ({entry.value}) could not be loaded: {error}")


def _read_docstring(name: str, cls: type) -> dict[str, str]:
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(cls.__doc__ or "").split("\n\n")]
    record = {"summary": paragraphs[0]}
    for section in _SECTIONS:
        parts = [part.removeprefix(f"{section}:").strip() for part in paragraphs if part.startswith(f"{section}:")]
        record[section.lower()] = parts[0] if parts else ""
    missing = [field for field, text in record.items() if not text]
    if missing:
        raise ValueError(f"primitive {name!r}: the docstring of {cls.__name__} lacks {', '.join(missing)}")
    return record
