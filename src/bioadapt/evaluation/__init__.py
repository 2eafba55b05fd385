"""Tasks with real data, and statistics to compare adapters by. Needs the extra ``demo``."""

from .._extras import MissingExtra
from ._task import Task
from .statistics import Evaluation, Interval, paired_interval, score_interval
from .tasks import list_tasks, load_task

__all__ = [
    "Evaluation",
    "Interval",
    "MissingExtra",
    "Task",
    "list_tasks",
    "load_task",
    "paired_interval",
    "score_interval",
]
