"""Imports run one way: no circle within the package, and in the search no room imports from one after it."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

MAP = runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts" / "import_map.py"))
# The rooms of the search; each may import from those before it.
ROOMS = ("settings", "thompson", "study", "space", "report", "contest")


@pytest.fixture(scope="module")
def imports():
    return MAP["imports"]()


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


def test_the_picture_shows_every_room_above_what_it_imports(imports):
    edges = MAP["rooms"](imports)
    places = {room: line for line, row in enumerate(MAP["rows"](edges)) for room in row}
    assert {"contract", "primitives", "methods", "registry", "tuner", "search/thompson", "evaluation"} <= places.keys()
    assert all(places[room] < places[other] for room, others in edges.items() for other in others)
    picture = MAP["drawing"](edges)
    assert all(f">{room}</text>" in picture for room in places)
    with pytest.raises(ValueError, match="rooms import each other: .*contract -> tuner"):
        MAP["rows"]({**edges, "contract": {"tuner"}})


def test_the_page_on_the_house_names_every_file():
    page = MAP["PAGE"].read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", page, re.MULTILINE))
    files = set(re.findall(r"^\| `([\w/]+\.py)` \|", MAP["file_table"](), re.MULTILINE))
    assert listed == files, "python scripts/import_map.py brings the page up to date"


LONG = 400  # lines


def test_a_long_file_says_why():
    silent = []
    for path in MAP["PACKAGE"].rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        opening = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
        if len(text.splitlines()) > LONG and "One file because" not in opening:
            silent.append(path.name)
    assert not silent, (
        f"{silent} over {LONG} lines: split them, or say why in the docstring of the file: 'One file because ...'"
    )
