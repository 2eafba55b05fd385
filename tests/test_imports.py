"""Imports run one way: no circle within the package, and in the search no room imports from one after it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bioadapt

PACKAGE = Path(bioadapt.__file__).parent
# The rooms of the search; each may import from those before it.
ROOMS = ("settings", "thompson", "study", "space", "report", "contest")


def modules():
    """Name -> file, of every module of the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name, path, known):
    """The package's own modules that a module imports when it is loaded: what functions import later is no circle."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in at_load(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            parent = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*parent, *([node.module] if node.module else [])])
            targets = [f"{source}.{alias.name}" for alias in node.names]
        for target in targets:
            while target and target not in known:  # a name in a module is that module's
                target = target.rpartition(".")[0]
            if target and target != name:
                yield target


def at_load(tree):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (found for part in node.orelse for found in at_load(part))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from at_load(node)


@pytest.fixture(scope="module")
def imports():
    known = modules()
    return {name: set(imported(name, path, known)) for name, path in known.items()}


def circles(imports):
    """Groups of modules that import each other, directly or around corners."""
    reached = {name: reach(name, imports) for name in imports}
    groups = {frozenset({name, *(o for o in reached[name] if name in reached[o])}) for name in imports}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def reach(name, imports):
    seen, ahead = set(), [name]
    while ahead:
        for target in imports[ahead.pop()] - seen:
            seen.add(target)
            ahead.append(target)
    return seen


def test_no_two_modules_import_each_other(imports):
    assert circles(imports) == []


def test_the_test_sees_a_circle(imports):
    one, two = "bioadapt.search.thompson.posterior", "bioadapt.search.thompson.sampler"
    assert two not in imports[one] and one in imports[two]
    assert any({one, two} <= set(group) for group in circles({**imports, one: {two}}))


def test_no_room_of_the_search_imports_from_one_after_it(imports):
    inside = "bioadapt.search."
    wrong = [
        (name, target)
        for name, targets in imports.items()
        for target in targets
        if name.startswith(inside) and target.startswith(inside) and room(target) > room(name)
    ]
    assert wrong == []


def room(name):
    """The place of a module's room; what stands outside of them, the doors, comes last."""
    part = name.split(".")[2]
    return ROOMS.index(part) if part in ROOMS else len(ROOMS)


def test_of_the_package_thompson_imports_nothing_and_study_little(imports):
    outside = {
        name: {target for target in targets if not target.startswith("bioadapt.search.")}
        for name, targets in imports.items()
    }
    for name, targets in outside.items():
        if name.startswith("bioadapt.search.thompson"):
            assert targets <= set(), name
        if name.startswith("bioadapt.search.study"):
            assert targets <= {"bioadapt._extras", "bioadapt._words"}, name


@pytest.mark.parametrize("name", ["bioadapt.search", "bioadapt.search.thompson", "bioadapt.search.study"])
def test_sampler_and_study_load_no_network(name):
    heavy = ("torch", "peft", "transformers")
    code = f"import {name}, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
