"""Programs that do not import bioadapt: for one call, or for every Python of an environment.

Either way nothing but ``import bioadapt`` is added to the start of an interpreter, and that waits for PEFT.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import NoReturn

from ._words import suggest

# Python reads the files of this kind in the order of their names: this one after those that put packages on its path.
_FILE = "zz_bioadapt.pth"
_LINE = 'import sys; exec("try:\\n import bioadapt\\nexcept ImportError:\\n pass")\n'
_STARTUP = Path(__file__).parent / "_site"


def enable() -> Path:
    """Have every Python of this environment teach PEFT the method when PEFT is imported.

    Returns:
        The file that was written; `disable` removes it.

    Raises:
        OSError: the environment cannot be written to.
    """
    path = _folder() / _FILE
    path.write_text(_LINE, encoding="utf-8")
    return path


def disable() -> Path | None:
    """Take `enable` back, and return the file that was removed, if there was one.

    Raises:
        OSError: the environment cannot be written to.
    """
    path = _folder() / _FILE
    if not path.exists():
        return None
    path.unlink()
    return path


def run(command: Sequence[str]) -> NoReturn:
    """Become another program, with the method registered in it and in every Python that it starts.

    Args:
        command: a program of this environment or of the search path, or a Python file; then its arguments.

    Raises:
        ValueError: there is no such program.
    """
    tool, *arguments = command
    if Path(tool).suffix == ".py" and Path(tool).is_file():
        words = [sys.executable, tool, *arguments]
    else:
        own = sysconfig.get_path("scripts")
        program = shutil.which(tool, path=os.pathsep.join([own, os.environ.get("PATH", os.defpath)]))
        if program is None:
            names = entry_points(group="console_scripts").names
            raise ValueError(f"no program {tool!r} in {own} or on the search path; {suggest(tool, names)}")
        words = [program, *arguments]
    found_first = [str(_STARTUP), os.environ.get("PYTHONPATH")]
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in found_first if part)}
    if os.name == "nt":  # where a program cannot take another one's place
        raise SystemExit(subprocess.call(words, env=surroundings))
    os.execve(words[0], words, surroundings)


def _folder() -> Path:
    """Where Python looks for such files: beside the package if it is installed there, else among its other packages."""
    beside = Path(__file__).parent.parent
    read_at_start = [*site.getsitepackages(), site.getusersitepackages()]
    return beside if str(beside) in read_at_start else Path(sysconfig.get_path("purelib"))
