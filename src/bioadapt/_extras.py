"""Optional dependencies: imported where used, refused by the name of the extra that brings them."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def versions(*more: str) -> dict[str, str]:
    """Of bioadapt, the libraries that it builds on, and the packages that are named, as far as they are installed."""
    installed = {}
    for name in ("bioadapt", "torch", "transformers", "peft", *more):
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


@contextmanager
def only_errors_of(name: str) -> Iterator[None]:
    """A library's logger tells errors alone: its retries mean nothing to a user, who sees what failed in the end."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
