"""What docs/architecture.md shows of the package: which room imports from which, and what each file is for.

    python scripts/import_map.py        # writes docs/_static/imports.svg, and the table of files into the page

Arrows point from a room to what it imports when it is loaded. Rooms stand in rows: each above all that it imports. What
a file is for is the first line of its docstring.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "bioadapt"
PICTURE = ROOT / "docs" / "_static" / "imports.svg"
PAGE = ROOT / "docs" / "architecture.md"
MARKS = "<!-- files -->", "<!-- end of files -->"
APART = ("search",)  # rooms that are shown by their inner rooms
CONTRACT = "contract"  # the files directly in primitives/, which the registry knows; mechanisms stand below them
# What words, versions and extras are is used everywhere, and would hide everything else.
BACKGROUND = {"__main__", "__init__", "_extras", "_values", "_version", "_words", "_site"}
WIDTH, HEIGHT, ACROSS, DOWN = 132, 34, 156, 76


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Name -> file, of every module of the package."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
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


def at_load(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run when a module is loaded."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (found for part in node.orelse for found in at_load(part))
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from at_load(node)


def imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """By module, what it imports of the package."""
    known = modules(package)
    return {name: set(imported(name, path, known)) for name, path in known.items()}


def room(module: str) -> str:
    """Where a module stands: the folder or file directly within the package, of some folders the one within that."""
    parts = module.split(".")[1:] or ["__init__"]
    if parts[0] == "primitives":
        return "primitives" if len(parts) > 2 else CONTRACT
    return "/".join(parts[:2]) if parts[0] in APART and len(parts) > 1 else parts[0]


def rooms(found: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """By room, the other rooms that its modules import from."""
    edges: dict[str, set[str]] = {}
    for module, targets in found.items():
        if room(module) not in BACKGROUND:
            others = {room(target) for target in targets} - BACKGROUND - {room(module)}
            edges.setdefault(room(module), set()).update(others)
    return edges


def rows(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Rooms by the longest way down to a room that imports nothing, the lowest row last.

    Raises:
        ValueError: rooms that import each other.
    """
    heights: dict[str, int] = {}

    def height(name: str, way: tuple[str, ...] = ()) -> int:
        if name in way:
            raise ValueError(f"rooms import each other: {' -> '.join([*way[way.index(name) :], name])}")
        if name not in heights:
            heights[name] = 1 + max((height(other, (*way, name)) for other in edges[name]), default=-1)
        return heights[name]

    table: list[list[str]] = [[] for _ in range(1 + max(height(name) for name in edges))]
    for name in sorted(edges):
        table[-1 - heights[name]].append(name)
    return table


def direct(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Without arrows that a longer way shows already."""

    def below(name: str) -> set[str]:
        return edges[name].union(*(below(other) for other in edges[name]))

    return {name: {o for o in others if not any(o in below(p) for p in others - {o})} for name, others in edges.items()}


def drawing(edges: Mapping[str, set[str]]) -> str:
    """The picture as SVG; it follows the reader's dark or light colours."""
    table = rows(edges)
    across = max(len(row) for row in table)
    places = {
        name: ((column + (across - len(row)) / 2) * ACROSS + 12, line * DOWN + 12)
        for line, row in enumerate(table)
        for column, name in enumerate(row)
    }
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across * ACROSS} {len(table) * DOWN}" role="img" '
        'font-family="sans-serif" font-size="13"><title>Which room imports from which</title>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#789"/></marker></defs>',
    ]
    for name, others in direct(edges).items():
        for other in sorted(others):
            (x, y), (to_x, to_y) = places[name], places[other]
            parts.append(
                f'<line x1="{x + WIDTH / 2}" y1="{y + HEIGHT}" x2="{to_x + WIDTH / 2}" y2="{to_y - 2}" '
                'stroke="#789" marker-end="url(#tip)"/>'
            )
    for name, (x, y) in places.items():
        parts.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#f4f6f8" stroke="#456"/>'
            f'<text x="{x + WIDTH / 2}" y="{y + HEIGHT / 2 + 5}" text-anchor="middle" fill="#123">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def file_table(package: Path = PACKAGE) -> str:
    """Every file with the first line of its docstring, in Markdown; mechanisms and empty files are left out."""
    lines = ["| file | what it is for |", "|---|---|"]
    for name, path in modules(package).items():
        place = path.relative_to(package)
        if room(name) != "primitives" and place.name != "__init__.py":
            words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            lines.append(f"| `{place}` | {words.splitlines()[0] if words else ''} |")
    return "\n".join(lines)


def update(page: Path = PAGE) -> None:
    """Put today's table into the page."""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{file_table()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


if __name__ == "__main__":
    PICTURE.write_text(drawing(rooms(imports())), encoding="utf-8")
    update()
