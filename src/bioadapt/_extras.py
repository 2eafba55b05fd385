"""Optional dependencies: imported where used, refused by the name of the extra that brings them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class MissingExtra(ImportError):
    """A package of an optional extra is not installed."""


def require(module: str, extra: str = "demo") -> ModuleType:
    """Import ``module``, or say which extra of bioadapt installs it.

    Raises:
        MissingExtra: the package, or one that it needs itself, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        raise MissingExtra(
            f"{module.partition('.')[0]} cannot be imported ({missing} is missing): pip install bioadapt[{extra}]"
        ) from error


@contextmanager
def only_errors_of(name: str) -> Iterator[None]:
    """A library's logger tells errors alone: its retries mean nothing to a user who is told what failed in the end."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
