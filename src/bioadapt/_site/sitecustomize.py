"""Read at the start of every Python that ``bioadapt run`` starts: PEFT is taught the method when it is imported."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

_here = os.path.dirname(os.path.abspath(__file__))
_hidden = PathFinder.find_spec(__name__, [folder for folder in sys.path if os.path.abspath(folder) != _here])
if _hidden is not None and _hidden.loader is not None:  # the environment's own, which this one stands before
    _hidden.loader.exec_module(module_from_spec(_hidden))

try:
    import bioadapt  # noqa: F401
except ImportError:
    sys.stderr.write(f"bioadapt run: {sys.executable} has no bioadapt, so its PEFT does not learn the method BIO\n")
