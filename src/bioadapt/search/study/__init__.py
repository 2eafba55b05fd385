"""Studies of any objective: where they live, how their trials are handed out, and the workers that take them."""

try:
    import cloudpickle  # noqa: F401
    import psutil  # noqa: F401
except ImportError as error:
    raise ImportError(f"bioadapt.search needs {error.name}: pip install bioadapt[search]") from error

from .isolation import Child, Failed, NotFound, Report, Stopped
from .runner import Job, Objective, prepare, run_study
from .storage import open_storage
from .tickets import recover, settled, ticket

__all__ = [
    "Child",
    "Failed",
    "Job",
    "NotFound",
    "Objective",
    "Report",
    "Stopped",
    "open_storage",
    "prepare",
    "recover",
    "run_study",
    "settled",
    "ticket",
]
