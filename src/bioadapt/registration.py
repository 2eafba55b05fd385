"""When PEFT learns the method: at once if it is imported already, otherwise as soon as somebody imports it.

It loads next to nothing, so that ``import bioadapt`` costs nothing in a process that never uses PEFT.
"""

from __future__ import annotations

import sys
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


class _ImportWatch:
    """A finder on ``sys.meta_path`` that finds what the others find, and has PEFT taught the method once it is there.

    Registration needs PEFT and this package whole. A module of this package may import PEFT in its middle, so it is
    watched as well, and whichever is completed last registers.
    """

    def __init__(self) -> None:
        self.in_the_middle: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "peft" and not fullname.startswith("bioadapt."):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        """Have what this loader executes followed by the registration; then the loader is as it was."""
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            del loader.exec_module
            self.in_the_middle.add(module.__name__)
            try:
                execute(module)
            finally:
                self.in_the_middle.discard(module.__name__)
            if "peft" in sys.modules and not self.in_the_middle:
                _register_or_warn()

        loader.exec_module = execute_and_register


def _register_or_warn() -> None:
    """Whoever imports PEFT for another purpose gets it, even in a version that cannot be taught the method."""
    try:
        register()
    except ImportError as error:
        import warnings

        warnings.warn(str(error))


def register() -> None:
    """Import PEFT and teach it the method; safe to call again.

    Raises:
        ImportError: this version of PEFT keeps its types or methods in a way that bioadapt does not know.
    """
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _ImportWatch)]
    import_module(".tuner.bridge", __package__).register()


def register_when_imported() -> None:
    """Teach PEFT the method now if it is imported, otherwise when it will be."""
    if "peft" in sys.modules:
        register()
    elif not any(isinstance(finder, _ImportWatch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportWatch())
