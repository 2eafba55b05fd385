"""Benchmarks as modules: they are scripts beside the package, and their folder is on the path while they load."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    """The benchmark of this name, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Its command with these words; the number of threads that it sets is taken back."""
    monkeypatch.setattr(sys, "argv", [Path(bench.__file__).name, *words])
    threads = torch.get_num_threads()
    try:
        return bench.main()
    finally:
        torch.set_num_threads(threads)
