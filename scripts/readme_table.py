"""Write the table of registered primitives into README.md; with --check, only say whether it is current."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bioadapt import list_primitives, primitive_info

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- primitives: begin (make readme) -->", "<!-- primitives: end -->"
STAGES = ("sensory_gain", "competition", "dendritic", "dynamics", "memory", "plasticity")


def table() -> str:
    """One row per primitive, in the order in which the stages act."""
    infos = sorted((primitive_info(name) for name in list_primitives()), key=lambda i: (STAGES.index(i.stage), i.name))
    rows = [
        f"| `{info.name}` | {info.stage} | {info.kind} | {'yes' if info.mergeable else 'no'} | "
        f"{info.summary.replace('|', '&#124;')} |"
        for info in infos
    ]
    return "\n".join(["| primitive | stage | kind | merges | what it does |", "|---|---|---|---|---|", *rows])


def with_table(text: str) -> str:
    """The README's text with the marked block replaced.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md needs exactly one {BEGIN!r} and one {END!r}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is out of date")
    check = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    new = with_table(old)
    if check:
        return 0 if new == old else 1
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
