"""Thompson sampling for any Optuna study. Needs numpy, scipy and optuna, and loads nothing else."""

try:
    import optuna  # noqa: F401
    import scipy  # noqa: F401
except ImportError as error:
    raise ImportError(f"bioadapt.search needs {error.name}: pip install bioadapt[search]") from error

from .features import Feature, FeatureMap
from .posterior import LinearPosterior, ShrinkagePosterior
from .pruner import ThompsonPruner
from .sampler import Effect, ThompsonSampler

__all__ = [
    "Effect",
    "Feature",
    "FeatureMap",
    "LinearPosterior",
    "ShrinkagePosterior",
    "ThompsonPruner",
    "ThompsonSampler",
]
