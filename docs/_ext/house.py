"""The picture of what imports what, drawn anew whenever the documentation is built."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any


def draw(app: Any) -> None:
    runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "import_map.py"), run_name="__main__")


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", draw)
    return {"parallel_read_safe": True}
