"""The picture of what imports what, drawn anew whenever the documentation is built."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any


def draw(app: Any) -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "import_map.py"))
    script["PICTURE"].write_text(script["drawing"](script["rooms"](script["imports"]())), encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", draw)
    return {"parallel_read_safe": True}
