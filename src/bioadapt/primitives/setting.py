"""A setting of a primitive: what it accepts, what it means, and the words for refusing anything else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .._values import is_flag, is_number


@dataclass(frozen=True)
class Setting:
    """One setting of a primitive: its default, the closed range or the choices it accepts, and what it means.

    ``derived``: where it is not None, the setting may be None, which means that value. ``table``: a dict of strings is
    accepted as well. ``before``: what a saved configuration without it means, where that is not the default: the
    setting came later, and its default is another function than that of the time before.
    """

    default: Any
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None
    meaning: str = ""
    derived: str | None = None
    table: bool = False
    before: Any = None

    @property
    def type(self) -> type:
        return float if self.default is None else type(self.default)

    @property
    def annotation(self) -> str:
        """The type of the accepted values, as source text."""
        words = [self.type.__name__]
        if self.choices is not None:
            words = ["Literal[" + ", ".join(json.dumps(choice) for choice in self.choices) + "]"]
        if self.table:
            words.append("dict[str, str]")
        if self.derived is not None:
            words.append("None")
        return " | ".join(words)

    @property
    def accepted(self) -> str:
        """The accepted values in words, for error messages and pages."""
        words = self._accepted
        if self.derived is not None:
            words += f", or None for {self.derived}"
        return f"{words}, or a dict of strings" if self.table else words

    @property
    def _accepted(self) -> str:
        if self.choices is not None:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        if self.type is bool:
            return "True or False"
        return f"{'an integer' if self.type is int else 'a number'} from {self.low} to {self.high}"

    def check(self, name: str, value: Any) -> Any:
        """Return ``value`` in the setting's type; raise `ValueError` naming the setting if it is not accepted."""
        refusal = ValueError(f"setting {name!r} must be {self.accepted}, got {value!r}")
        if value is None and self.derived is not None:
            return None
        if self.table and isinstance(value, dict):
            if not all(isinstance(word, str) for pair in value.items() for word in pair):
                raise refusal
            return dict(value)
        if self.choices is not None:
            chosen = [choice for choice in self.choices if isinstance(value, type(choice)) and value == choice]
            if not chosen:
                raise refusal
            return chosen[0]  # Python's own, where the value was numpy's
        if self.type is bool or is_flag(value):
            if self.type is not bool or not is_flag(value):
                raise refusal
            return bool(value)
        if not is_number(value):
            raise refusal
        assert self.low is not None and self.high is not None
        if not (self.low <= value <= self.high):  # also refuses NaN
            raise refusal
        if self.type is int and value != int(value):
            raise refusal
        return self.type(value)


def setting(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    meaning: str,
    derived: str | None = None,
    table: bool = False,
    before: Any = None,
) -> Any:
    """Declare a setting as a class attribute; instances carry the checked value under the same name."""
    if choices is None and not isinstance(default, bool) and (low is None or high is None):
        raise TypeError("a numeric setting needs both low and high")
    return Setting(default, low, high, choices, meaning, derived, table, before)
