"""What the fly's classifiers share: labels that arrive over time, winners, checks of settings, and files."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from bioadapt._extras import MissingExtra
from bioadapt._words import suggest
from bioadapt.methods.sparse_projection import sparse_projection

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as missing:
    raise MissingExtra(
        f"the fly's classifiers need scikit-learn ({missing.name} is missing): pip install bioadapt[circuits]"
    ) from missing

Array = NDArray[np.float64]
BLOCK = 1024  # samples whose codes are held at a time


def winners(drive: Array, k: int) -> NDArray[np.bool_]:
    """Where the ``k`` largest signed values of each row are; of equal ones those with the lowest index.

    Args:
        drive: (n, m), k from 1 to m.

    Returns:
        (n, m) with exactly k true entries per row.
    """
    if k == drive.shape[1]:
        return np.ones(drive.shape, dtype=bool)
    weakest = np.partition(drive, -k, axis=1)[:, -k, None]
    mask = drive >= weakest
    for row in np.flatnonzero(mask.sum(1) > k):
        tied = np.flatnonzero(drive[row] == weakest[row])
        mask[row, tied[k - mask[row].sum() :]] = False
    return mask


def blocks(samples: int) -> list[slice]:
    """Slices of at most `BLOCK` samples, so that memory does not grow with their number."""
    return [slice(start, start + BLOCK) for start in range(0, samples, BLOCK)]


def check_number(
    name: str, value: Any, low: float, high: float = np.inf, *, whole: bool = False, open_low: bool = False
) -> None:
    """Refuse a setting that is no number, or outside its range.

    Raises:
        ValueError: names the setting, the value and what is accepted.
    """
    numbers = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    fits = isinstance(value, numbers) and not isinstance(value, bool) and low <= float(value) <= high
    if not fits or (open_low and value == low) or not np.isfinite(value):
        bounds = f"{'above' if open_low else 'from'} {low:g}" + (f" to {high:g}" if high < np.inf else "")
        raise ValueError(f"{name} must be {'an integer' if whole else 'a number'} {bounds}, got {value!r}")


def check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    """Refuse a name that is not known.

    Raises:
        ValueError: names the setting, the value, what is accepted and the nearest match.
    """
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}; {suggest(value, accepted)}")


def as_numpy(values: Any) -> Any:
    """A torch tensor as a numpy array; anything else as it is."""
    if not isinstance(values, torch.Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()


class ContinualClassifier(ClassifierMixin, BaseEstimator, ABC):
    """A classifier on a fixed random expansion, with one row of memory per class and classes that arrive when they do.

    A subclass says how large the expansion is, what the code of a sample is, what a batch of codes changes, and how
    codes are scored. Arrays with one row per class are named in ``_per_class``, all others in ``_shared``.
    """

    _per_class: ClassVar[tuple[str, ...]]
    _shared: ClassVar[tuple[str, ...]]
    expand_dim: int | None
    degree: int | None
    coding_level: float
    random_state: Any
    classes_: NDArray[Any]
    class_count_: NDArray[np.int64]
    n_features_in_: int
    projection_: Array

    def fit(self, X: Any, y: Any) -> Self:
        """Forget everything and learn from these samples alone.

        Args:
            X: features (n, d), finite numbers; numpy array, torch tensor or anything that numpy reads.
            y: labels (n,), numbers or strings.

        Raises:
            ValueError: a setting or the data cannot be used; the message says which and why.
        """
        for name in [name for name in vars(self) if name.endswith("_") and not name.startswith("__")]:
            delattr(self, name)
        return self.partial_fit(X, y)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Learn from more samples, of classes already met or of new ones.

        Args:
            X: features (n, d), d as in the first call.
            y: labels (n,); any of them may be new.
            classes: labels that will come later, optional. They have a place in ``classes_`` and never win before a
                sample of theirs was learned.

        Raises:
            ValueError: a setting or the data cannot be used; the message says which and why.
        """
        first = not hasattr(self, "classes_")
        X, y = validate_data(self, as_numpy(X), as_numpy(y), dtype=np.float64, reset=first)
        check_classification_targets(y)
        self._check_settings()
        known = self._known([y] if classes is None else [y, np.asarray(as_numpy(classes)).ravel()])
        if first:
            self._wire(X.shape[1])
        self._admit(known)
        labels = np.searchsorted(self.classes_, y)
        self.class_count_ += np.bincount(labels, minlength=len(known))
        self._learn(X, labels)
        return self

    def decision_function(self, X: Any) -> Array:
        """Scores (n, classes) in the order of ``classes_``, minus infinity for classes without samples.

        For two classes (n,): the score of the second minus that of the first, as everywhere in scikit-learn.
        """
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: Any) -> NDArray[Any]:
        """The labels (n,) with the highest scores; of equal ones the first in ``classes_``."""
        best = self._scores(X).argmax(1)
        return self.classes_[best]

    def save(self, path: str | Path) -> None:
        """Write everything that prediction and further learning need to one safetensors file.

        The file is written whole or not at all: a save that is cut off leaves what was there.

        Raises:
            sklearn.exceptions.NotFittedError: nothing was learned yet.
        """
        check_is_fitted(self)
        path = Path(path)
        settings = {name: _plain(value) for name, value in self.get_params(deep=False).items()}
        if not isinstance(settings["random_state"], int | None):
            settings["random_state"] = None  # a generator has no place in a file; the wiring that it drew is saved
        metadata = {
            "format": type(self).__name__,
            "settings": json.dumps(settings),
            "labels": json.dumps({"dtype": self.classes_.dtype.str, "values": self.classes_.tolist()}),
        }
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(self._tensors(), unfinished, metadata)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote; predictions are bit for bit the same.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or something else than this classifier.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no file {path}")
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != cls.__name__:
                    raise ValueError(f"holds {metadata.get('format', 'something unknown')!r}, not a {cls.__name__}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            loaded = cls(**json.loads(metadata["settings"]))
            labels = json.loads(metadata["labels"])
            loaded.classes_ = np.array(labels["values"], dtype=labels["dtype"])
            loaded._check_settings()
            loaded._take(tensors)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be loaded as a {cls.__name__}: {error}") from error
        return loaded

    def codes(self, X: Any) -> Array:
        """The sparse codes (n, units) of samples (n, d)."""
        return self._coded(self._checked(X))

    def _check_settings(self) -> None:
        """Refuse settings that make no sense, by `ValueError`."""
        if self.expand_dim is not None:
            check_number("expand_dim", self.expand_dim, 1, whole=True)
        if self.degree is not None:
            check_number("degree", self.degree, 1, whole=True)
        check_number("coding_level", self.coding_level, 0, 1, open_low=True)

    @abstractmethod
    def _wire(self, features: int) -> None:
        """Draw the expansion and start all shared arrays."""

    @abstractmethod
    def _coded(self, X: Array) -> Array:
        """Codes (n, units) of checked samples."""

    @abstractmethod
    def _learn(self, X: Array, labels: NDArray[np.int64]) -> None:
        """Take in samples whose labels are indices into ``classes_``."""

    @abstractmethod
    def _score_codes(self, codes: Array) -> Array:
        """Scores (n, classes)."""

    def _row(self) -> Array:
        """What a class that was never met starts with."""
        return np.zeros(len(self.projection_))

    def _expansion(self, features: int, units: int, share: float, kind: str) -> Array:
        """(units, features) with exactly ``degree`` entries per row, drawn as the primitive ``fly_lora`` draws its own.

        The same for the same seed and shape. ``units`` and ``share``, of the features that a unit reads, hold where
        the settings are None.
        """
        units = units if self.expand_dim is None else self.expand_dim
        degree = max(1, round(share * features)) if self.degree is None else self.degree
        if degree > features:
            raise ValueError(f"degree must be at most the number of features, {features}, got {degree}")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        source = torch.Generator().manual_seed(seed)
        return sparse_projection((units, features), degree, 1.0, kind, source).numpy().astype(np.float64)

    def _winners(self, drive: Array) -> NDArray[np.bool_]:
        # The small number undoes rounding: 0.29 * 100 is 28.999999999999996, and means 29 winners.
        return winners(drive, max(1, int(self.coding_level * drive.shape[1] + 1e-9)))

    def _checked(self, X: Any) -> Array:
        check_is_fitted(self)
        return validate_data(self, as_numpy(X), dtype=np.float64, reset=False)

    def _scores(self, X: Any) -> Array:
        X = self._checked(X)
        scores = np.concatenate([self._score_codes(self._coded(X[rows])) for rows in blocks(len(X))])
        scores[:, self.class_count_ == 0] = -np.inf
        return scores

    def _known(self, labels: list[NDArray[Any]]) -> NDArray[Any]:
        """All labels met or announced so far, sorted."""
        met = [self.classes_, *labels] if hasattr(self, "classes_") else labels
        kinds = {_kind(values) for values in met}
        if kinds not in ({"numbers"}, {"strings"}):
            raise ValueError(f"labels must be all numbers or all strings, got {' and '.join(sorted(kinds))}")
        return np.unique(np.concatenate(met))

    def _admit(self, known: NDArray[Any]) -> None:
        """Give every label its row, those already there keeping theirs."""
        old = self.classes_ if hasattr(self, "classes_") else known[:0]
        places = np.searchsorted(known, old)
        counts = np.zeros(len(known), dtype=np.int64)
        if len(old):
            counts[places] = self.class_count_
        for name in self._per_class:
            rows = np.tile(self._row(), (len(known), 1))
            if len(old):
                rows[places] = getattr(self, name)
            setattr(self, name, rows)
        self.classes_, self.class_count_ = known, counts

    def _tensors(self) -> dict[str, NDArray[Any]]:
        names = ("projection_", "class_count_", *self._per_class, *self._shared)
        return {name: np.ascontiguousarray(getattr(self, name)) for name in names}

    def _take(self, tensors: dict[str, NDArray[Any]]) -> None:
        """Set what `_tensors` gave, after checking names, shapes and numbers."""
        expected = {"projection_", "class_count_", *self._per_class, *self._shared}
        if set(tensors) != expected:
            raise ValueError(f"it should hold {', '.join(sorted(expected))}, it has {', '.join(sorted(tensors))}")
        units, self.n_features_in_ = tensors["projection_"].shape
        shapes: dict[str, tuple[int, ...]] = {"class_count_": (len(self.classes_),)}
        shapes |= {name: (len(self.classes_), units) for name in self._per_class}
        for name, values in tensors.items():
            if values.shape != shapes.get(name, values.shape):
                raise ValueError(f"{name} should have the shape {shapes[name]}, it has {values.shape}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} is not finite")
            setattr(self, name, values)


def _kind(labels: NDArray[Any]) -> str:
    if labels.dtype.kind in "biuf":
        return "numbers"
    if labels.dtype.kind in "US" or all(isinstance(label, str) for label in labels):
        return "strings"
    return f"labels of type {labels.dtype}"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
