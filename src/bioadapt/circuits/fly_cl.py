"""Fly-CL: a classifier that learns class after class on frozen features, without gradients and without forgetting."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bioadapt.circuits._classifier import Array, ContinualClassifier, blocks, check_choice, check_number
from bioadapt.circuits.ridge import RidgeSums, packed, unpacked

# Times tr(G) / m, the mean squared activity of a unit, summed over the samples.
PENALTIES: Array = np.logspace(-5, 2, 8)
# The authors' scripts try 10^6 to 10^9. Where features have unit variance, as with theirs, a unit that reads 300 of
# them and is among the strongest 0.3 has a mean squared activity of 145 per sample.
# Divided by it, the grid suits any scale.
PUBLISHED: Array = 10.0 ** np.arange(6, 10) / 145  # times tr(G) / (m n), the mean squared activity of a unit per sample
LARGE = 2**30  # bytes of the Gram matrix from which on its size is worth a warning


class FlyCLClassifier(ContinualClassifier):
    """Sparse random expansion, winners and streaming ridge regression: a continual-learning head for frozen features.

    Each of m expanded units reads s of the d features with fixed random weights; the k units with the largest drive
    keep it, the others are silent; a ridge regression maps these codes h to one-hot labels y. It needs no more of the
    samples than ``G = sum h h^T`` and ``Q = sum h y^T``, so that learning is exact whatever the order of samples,
    batches and tasks, nothing is forgotten, and memory does not grow with the number of samples: m^2 + m classes
    numbers. Learning only adds to G and Q; the weights ``(G + penalty)^-1 Q`` are computed in ``fit``, or by the first
    prediction after ``partial_fit``, in a time that depends on m and the number of classes alone. While there are fewer
    samples than units, their codes take the place of G, being smaller, and the system has a row per sample, not per
    unit.

    Classes may appear at any time without being announced. A class without samples never wins.

    Source: Zou et al. 2025, Fly-CL: a fly-inspired framework for enhancing efficient decorrelation and reduced training
    time in pre-trained model-based continual representation learning, arXiv:2510.16877. Ours: GCV on all data seen, the
    relative grid of penalties, the default size, the silence of classes that were never met. The projection is
    multiplied as a dense matrix: where units read as large a share of the features as here, sparse products are slower.

    With sentence-transformers, an adapted encoder or not::

        head = FlyCLClassifier()
        for texts, labels in tasks:
            head.partial_fit(encoder.encode(texts), labels)
        head.predict(encoder.encode(["Where is my card?"]))

    With any torch module: `attach_continual_head`.

    Args:
        expand_dim: m, expanded units, from 1; None: ten per feature and at most 10,000. G takes 8 m^2 bytes.
        degree: s, features that a unit reads, from 1 to d; None: 0.4 d.
        coding_level: share of the units that win, above 0 to 1; k = floor(coding_level m), at least 1.
        penalty: of the ridge regression, above zero, in the unit of squared codes; "gcv": chosen by generalised
            cross-validation among ``penalties``.
        gcv: "streaming": GCV on all samples seen. "task": as published, on the samples of the last call of ``fit`` or
            ``partial_fit`` alone, whose penalty is then used with all of G and Q.
        penalties: what GCV chooses from, numbers above zero in the unit of squared codes; None: for "streaming" 10^-5
            to 10^2 times tr(G) / m; for "task" the authors' 10^6 to 10^9, brought from the scale of their codes to that
            of these: 7 10^3 to 7 10^6 times the mean squared activity of a unit per sample of the last call. To use
            theirs as they are: ``10.0 ** np.arange(6, 10)``.
        standardize: bring each sample to mean zero and variance one across its features first. For features that share
            a large common part.
        random_state: seed of the expansion, or whatever else scikit-learn accepts.

    Attributes:
        classes_: labels met or announced, sorted.
        class_count_: samples of each (classes,).
        n_features_in_: d.
        projection_: (m, d).
        gram_: G, upper triangle (m, m).
        moment_: Q^T (classes, m).
        coef_: weights (classes, m).
        penalty_: the one in use.
    """

    _per_class: ClassVar = ("moment_",)
    _shared: ClassVar = ()

    def __init__(
        self,
        expand_dim: int | None = None,
        degree: int | None = None,
        coding_level: float = 0.3,
        penalty: float | str = "gcv",
        gcv: str = "streaming",
        standardize: bool = False,
        random_state: Any = 0,
        penalties: Any = None,
    ) -> None:
        self.expand_dim = expand_dim
        self.degree = degree
        self.coding_level = coding_level
        self.penalty = penalty
        self.gcv = gcv
        self.standardize = standardize
        self.random_state = random_state
        self.penalties = penalties

    def fit(self, X: Any, y: Any) -> Self:
        super().fit(X, y)
        self._solve()
        return self

    @property
    def gram_(self) -> Array:
        return self._sums.gram

    @property
    def coef_(self) -> Array:
        return self._solve()[0]

    @property
    def penalty_(self) -> float:
        return self._solve()[1]

    def _check_settings(self) -> None:
        super()._check_settings()
        check_choice("gcv", self.gcv, ("streaming", "task"))
        if isinstance(self.penalty, str):
            check_choice("penalty", self.penalty, ("gcv",))
        else:
            check_number("penalty", self.penalty, 0, open_low=True)
        if self.penalties is not None:
            self._check_penalties()

    def _check_penalties(self) -> None:
        if self.penalty != "gcv":
            raise ValueError(
                f"penalties are what penalty='gcv' chooses from, got both them and penalty={self.penalty!r}"
            )
        if not isinstance(self.penalties, Collection) or isinstance(self.penalties, str) or not len(self.penalties):
            raise ValueError(f"penalties must be a sequence of numbers above 0, or None, got {self.penalties!r}")
        for penalty in self.penalties:
            check_number("each of penalties", penalty, 0, open_low=True)

    def _wire(self, features: int) -> None:
        self.projection_ = self._expansion(features, min(10 * features, 10_000), 0.4, "gaussian")
        units = len(self.projection_)
        if 8 * units**2 > LARGE:
            warnings.warn(f"expand_dim={units}: G alone takes {8e-9 * units**2:.1f} GB; 10000 would take 0.8 GB")
        self._sums = RidgeSums(units)
        self._task_penalty = 0.0
        self._solution: tuple[Array, float] | None = None

    def _coded(self, X: Array) -> Array:
        if self.standardize:
            spread = X.std(1, keepdims=True)
            X = (X - X.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)
        drive = X @ self.projection_.T
        drive[~self._winners(drive)] = 0
        return drive

    def _learn(self, X: Array, labels: NDArray[np.int64]) -> None:
        self._solution = None
        if self.penalty == "gcv" and self.gcv == "task":
            task, moment = RidgeSums(len(self.projection_)), np.zeros_like(self.moment_)
            self._gather(X, labels, task, moment)
            self._task_penalty = self._chosen(task, moment, PUBLISHED / task.count)
        self._gather(X, labels, self._sums, self.moment_)

    def _gather(self, X: Array, labels: NDArray[np.int64], sums: RidgeSums, moment: Array) -> None:
        """Add the samples to ``sums`` and ``moment``, in place."""
        targets = np.eye(len(self.classes_))
        for rows in blocks(len(X)):
            codes = self._coded(X[rows])
            sums.add(codes, self.classes_[labels[rows]])
            moment += targets[labels[rows]].T @ codes

    def _chosen(self, sums: RidgeSums, moment: Array, relative: Array) -> float:
        """The best penalty by GCV among ``penalties`` or, where there are none, those in units of the mean activity."""
        if sums.activity == 0:  # silent codes predict nothing, whatever the penalty
            return 1.0
        absolute = self.penalties is not None
        penalties = np.array(self.penalties, dtype=np.float64) if absolute else sums.activity * relative
        return float(penalties[sums.validation(moment, self.classes_, penalties).best()])

    def _solve(self) -> tuple[Array, float]:
        """Weights and penalty for what was learned up to now."""
        if self._solution is None:
            if self.penalty != "gcv":
                penalty = float(self.penalty)
            elif self.gcv == "task":
                penalty = self._task_penalty
            else:
                penalty = self._chosen(self._sums, self.moment_, PENALTIES)
            self._solution = self._sums.weights(self.moment_, self.classes_, penalty), penalty
        return self._solution

    def _score_codes(self, codes: Array) -> Array:
        return codes @ self.coef_.T

    def _tensors(self) -> dict[str, NDArray[Any]]:
        weights, penalty = self._solve()
        return {
            **super()._tensors(),
            "gram_": packed(self.gram_),
            "weights": np.ascontiguousarray(weights),
            "penalties": np.array([self._task_penalty, penalty]),
        }

    def _take(self, tensors: dict[str, NDArray[Any]]) -> None:
        own = {name: tensors.pop(name) for name in ("gram_", "weights", "penalties")}
        units = len(tensors["projection_"])
        shapes = {"gram_": (units * (units + 1) // 2,), "weights": (len(self.classes_), units), "penalties": (2,)}
        if any(own[name].shape != shape for name, shape in shapes.items()):
            raise ValueError(f"its shapes do not belong to {units} units and {len(self.classes_)} classes")
        if not all(np.isfinite(values).all() for values in own.values()):
            raise ValueError("its sums, weights or penalties are not finite")
        super()._take(tensors)
        self._sums = RidgeSums.of_gram(unpacked(own["gram_"], units), int(self.class_count_.sum()))
        self._task_penalty, penalty = own["penalties"].tolist()
        self._solution = own["weights"], penalty


class ContinualHead(nn.Module):
    """A torch module as a feature extractor that stays as it is, and a classifier that learns on its features.

    Made by `attach_continual_head`. The classifier is no torch module: save it with ``head.classifier.save(path)``.

    Attributes:
        model: the encoder.
        classifier: what learns.
    """

    def __init__(self, model: nn.Module, feature_fn: Callable[[nn.Module, Any], Tensor], classifier: Any) -> None:
        super().__init__()
        self.model, self.feature_fn, self.classifier = model, feature_fn, classifier

    def features(self, inputs: Any) -> Tensor:
        """Features (n, d) of a batch, in evaluation mode and without gradients; the model's modes are put back."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                outputs = self.feature_fn(self.model, inputs)
        finally:
            for module in training:
                module.training = True
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"feature_fn must return a tensor (samples, features), got {shape}")
        return outputs

    def learn(self, inputs: Any, labels: Any) -> Self:
        """Learn one batch: labels (n,), any of them may be new. Also those of a tensor on an accelerator."""
        self.classifier.partial_fit(self.features(inputs), labels)
        return self

    def predict(self, inputs: Any) -> NDArray[Any]:
        """Labels (n,)."""
        return self.classifier.predict(self.features(inputs))

    def forward(self, inputs: Any) -> Tensor:
        """What the classifier's ``decision_function`` gives, as a tensor on the CPU."""
        return torch.from_numpy(self.classifier.decision_function(self.features(inputs)))


def attach_continual_head(
    model: nn.Module, feature_fn: Callable[[nn.Module, Any], Tensor], classifier: Any = None
) -> ContinualHead:
    """Put a continual-learning classifier on a torch module, which may carry PEFT adapters::

        head = attach_continual_head(encoder, lambda model, batch: model(**batch).last_hidden_state[:, 0])
        head.learn(batch, labels)
        head.predict(batch)

    Args:
        model: is run as it is; none of its parameters changes.
        feature_fn: ``feature_fn(model, inputs)`` returns features (n, d); inputs are whatever it takes.
        classifier: an estimator with ``partial_fit``, ``predict`` and ``decision_function``; None: a new
            `FlyCLClassifier`.

    Raises:
        TypeError: ``model`` is no torch module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    return ContinualHead(model, feature_fn, FlyCLClassifier() if classifier is None else classifier)
