"""Values as users write them, numpy's among them, and as files and errors need them: Python's own."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import numpy as np


def as_plain(value: Any) -> Any:
    """An array as a list, or as its one number; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def is_flag(value: object) -> bool:
    """Whether it is True or False, Python's or numpy's."""
    return isinstance(value, (bool, np.bool_))


def is_number(value: object) -> bool:
    """Whether it is one real number, Python's or numpy's; True and False are none."""
    return isinstance(value, numbers.Real) and not is_flag(value)


def as_flag(field: str, value: Any, accepted: str = "True or False") -> bool:
    """A bool.

    Raises:
        ValueError: anything else, such as 1 or "no".
    """
    if not is_flag(value):
        raise ValueError(f"{field}={value!r}: accepted are {accepted}")
    return bool(value)


def as_integer(field: str, value: Any, low: int | None = None, accepted: str = "an integer") -> int:
    """An int.

    Raises:
        ValueError: anything else, such as 2.0, "4" or True, or a number below ``low``.
    """
    try:
        number = None if is_flag(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (low is not None and number < low):
        raise ValueError(f"{field}={value!r}: accepted is {accepted}")
    return number


def as_names(field: str, value: Any, accepted: str) -> list[str]:
    """A list of strings, none of them empty.

    Raises:
        ValueError: anything else.
    """
    value = as_plain(value)
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise ValueError(f"{field}={value!r}: accepted are {accepted}")
    for name in value:
        if not isinstance(name, str) or not name:
            raise ValueError(f"{field}={value!r}: {name!r} is no name; accepted are {accepted}")
    return [str(name) for name in value]  # numpy's strings as well
