"""Tasks with real data, the fair comparison of adapters on them, and its statistics. Needs the extra ``demo``."""

from .._extras import MissingExtra
from ..settings import EvaluationSettings
from .comparison import Comparison, compare
from .protocol import evaluate
from .statistics import Evaluation, Interval, paired_interval, score_interval
from .tasks import (
    ClassificationTask,
    ClusteringTask,
    ImageTask,
    LanguageModellingTask,
    MultipleChoiceTask,
    PairClassificationTask,
    RetrievalTask,
    StsTask,
    Task,
    list_tasks,
    load_task,
)

__all__ = [
    "ClassificationTask",
    "ClusteringTask",
    "Comparison",
    "Evaluation",
    "EvaluationSettings",
    "ImageTask",
    "Interval",
    "LanguageModellingTask",
    "MissingExtra",
    "MultipleChoiceTask",
    "PairClassificationTask",
    "RetrievalTask",
    "StsTask",
    "Task",
    "compare",
    "evaluate",
    "list_tasks",
    "load_task",
    "paired_interval",
    "score_interval",
]
