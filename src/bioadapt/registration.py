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

_PEFT, _CONFIG = "peft", "bioadapt.config"


class _ImportWatch:
    """A finder on ``sys.meta_path`` that finds what the others find, and registers the method when that is imported.

    Registration needs PEFT and `bioadapt.config` whole. The second imports the first in its middle, so both are watched
    and the one that is completed last registers.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (_PEFT, _CONFIG):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader)
        return spec


def _register_after(loader: Any) -> None:
    """Have this loader's next module followed by the registration."""
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        del loader.exec_module
        execute(module)
        (other,) = {_PEFT, _CONFIG} - {module.__name__}
        if not _is_in_the_middle(other):
            _register_or_warn()

    loader.exec_module = execute_and_register


def _is_in_the_middle(name: str) -> bool:
    """Whether this module is being imported just now."""
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


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
    import_module(".tuner.bridge", __package__).register()
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _ImportWatch)]


def register_when_imported() -> None:
    """Teach PEFT the method now if it is imported, otherwise when it will be."""
    if _PEFT in sys.modules:
        register()
    elif not any(isinstance(finder, _ImportWatch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportWatch())
