"""Writes what editors and type checkers read of the functions that are made from the registry; ``make stubs``."""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path

from bioadapt import catalogue, list_primitives, primitive_info, ready
from bioadapt.registry import _aliases

PACKAGE = Path(catalogue.__file__).parent
_NOTE = "Written by scripts/stubs.py from the registry; not to be edited."


def catalogue_stub() -> str:
    """All built-in primitives."""
    names = [name for name in list_primitives() if primitive_info(name).factory.__module__.startswith("bioadapt.")]
    head = f'"""Every primitive as a function of its settings.\n\n{_NOTE}\n"""\n\nfrom typing import Any, Literal\n'
    further = [f"{spelling} = {name}" for spelling, name in sorted(_aliases.items()) if name in names]
    return "\n".join([head, *(_function(name, getattr(catalogue, name)) for name in names), *further, ""])


def ready_stub() -> str:
    """The published methods as configurations."""
    head = (
        f'"""The published methods as ready configurations.\n\n{_NOTE}\n"""\n\n'
        "from typing import Any, Literal\n\nfrom peft import PeftType, TaskType\n\n"
        "from .config import BioConfig, Composition\n\nTargets = list[str] | set[str] | str | None\n"
    )
    return "\n".join([head, *(_function(name, getattr(ready, name)) for name in ready.__all__)])


def _function(name: str, function: object) -> str:
    signature = inspect.signature(function)
    lines, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("    *,")
            keyword_only = True
        lines.append(f"    {parameter.name}: {parameter.annotation} = {_literal(parameter.default)},")
    body = [_wrapped(line) for line in inspect.cleandoc(function.__doc__).splitlines()]
    text = "\n".join(body)
    return (
        f"def {name}(\n"
        + "\n".join(lines)
        + f'\n) -> {signature.return_annotation}:\n    """{text.lstrip()}\n    """\n'
    )


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _wrapped(line: str) -> str:
    indent = " " * (4 + len(line) - len(line.lstrip()))
    return textwrap.fill(
        line.strip(), 116, initial_indent=indent, subsequent_indent=indent + "    ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


STUBS = {PACKAGE / "catalogue.pyi": catalogue_stub, PACKAGE / "ready.pyi": ready_stub}


def main() -> int:
    for path, content in STUBS.items():
        path.write_text(content(), encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
