"""Fly-CL: a classifier that learns class after class on frozen features, without gradients and without forgetting."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, solveh_banded
from scipy.linalg.blas import dsyrk
from scipy.linalg.lapack import dgeqrt, dtpttr, dtrttp
from torch import Tensor, nn

from bioadapt.circuits._classifier import Array, ContinualClassifier, blocks, check_choice, check_number

PENALTIES = 10.0 ** np.arange(-5, 3)  # in units of the mean squared activity of an expanded unit, summed over samples
BAND = 64  # width of the band to which the Gram matrix is reduced
FREEDOM = 1e-4  # share of the samples' degrees of freedom that a penalty has to leave; less is lost in rounding
LARGE = 2**30  # bytes of the Gram matrix from which on its size is worth a warning


class Curve(NamedTuple):
    """Generalised cross-validation over the penalties, (penalties,) each.

    ``score`` is the mean squared residual of the one-hot labels over the squared share of free degrees of freedom,
    ``freedom`` that share: from 0, where every sample is met exactly, to 1.
    """

    score: Array
    freedom: Array

    def best(self) -> int:
        """The lowest score among penalties that leave enough freedom to be told from rounding; else the strongest."""
        usable = np.flatnonzero(self.freedom >= FREEDOM)
        return int(usable[self.score[usable].argmin()]) if len(usable) else len(self.score) - 1


def gcv_curve(gram: Array, moment: Array, count: int, penalties: Array) -> Curve:
    """GCV of ridge regression from H onto one-hot labels Y by what is left of the data: H^T H and H^T Y.

    H^T H is reduced to a band by orthogonal transformations, once; residuals and traces of all penalties follow from
    the band. In exact arithmetic this is what a singular value decomposition of H gives; with ``r`` for
    ``|Y - H W|^2`` and ``df`` for ``tr H (H^T H + penalty)^-1 H^T``, the score is ``(r / n) / (1 - df / n)^2``.

    Args:
        gram: H^T H (m, m), of which the upper triangle is read.
        moment: H^T Y (m, classes).
        count: n, samples in H.
        penalties: (p,), above zero.
    """
    diagonals, sides, turned = _band(gram, moment)
    band = _stored(diagonals, sides)
    residual = np.empty(len(penalties))
    for i, penalty in enumerate(penalties):
        band[0] += penalty
        weights = solveh_banded(band, turned, lower=True)
        band[0] -= penalty
        # |Y|^2 = n, since each row has a single one.
        residual[i] = count - (turned * weights).sum() - penalty * np.square(weights).sum()
    freedom = (count - len(gram) + penalties * _trace_of_inverse(diagonals, sides, penalties)) / count
    with np.errstate(divide="ignore"):
        return Curve(np.maximum(residual, 0) / count / np.square(freedom), freedom)


def _band(gram: Array, moment: Array) -> tuple[list[Array], list[Array], Array]:
    """Orthogonal Z such that Z^T G Z is block tridiagonal with upper triangular blocks below its diagonal.

    Returns:
        Diagonal blocks, the blocks below them, and Z^T moment.
    """
    size = len(gram)
    work = torch.from_numpy(_full(gram))
    turned = torch.from_numpy(moment.copy())
    sides = []
    for start in range(BAND, size, BAND):
        panel = work[start:, start - BAND : start].numpy()
        reflectors, factor, _ = dgeqrt(min(panel.shape), panel)
        side = np.zeros((min(BAND, size - start), BAND))
        side[: len(reflectors)] = np.triu(reflectors)[: len(side)]
        sides.append(side)
        np.fill_diagonal(reflectors, 1.0)
        v = torch.from_numpy(np.tril(reflectors)[:, : len(factor)])
        vt = v @ torch.from_numpy(factor)
        # With Q = 1 - V T V^T: Q^T A Q = A - W V^T - V W^T.
        rest = work[start:, start:]
        product = rest @ vt
        w = product - 0.5 * v @ (vt.T @ product)
        rest.addmm_(torch.cat([w, v], 1), torch.cat([v, w], 1).T, alpha=-1)
        turned[start:].addmm_(v, vt.T @ turned[start:], alpha=-1)
    diagonals = [work[i : i + BAND, i : i + BAND].numpy().copy() for i in range(0, size, BAND)]
    return diagonals, sides, turned.numpy()


def _full(gram: Array) -> Array:
    """A symmetric matrix, rows contiguous, of its upper triangle."""
    full = np.empty(gram.shape)
    for rows in blocks(len(gram)):
        full[rows, rows.start :] = gram[rows, rows.start :]
        full[rows.start :, rows] = gram[rows, rows.start :].T
        square = np.triu(gram[rows, rows])
        full[rows, rows] = square + np.triu(square, 1).T
    return full


def _stored(diagonals: list[Array], sides: list[Array]) -> Array:
    """LAPACK's storage of the band: row i holds the i-th diagonal below the main one."""
    size = sum(map(len, diagonals))
    band = np.zeros((min(BAND, size - 1) + 1, size))
    for block, diagonal in enumerate(diagonals):
        below = sides[block] if block < len(sides) else np.zeros((0, len(diagonal)))
        column = np.concatenate([diagonal, below])
        for i in range(min(len(band), len(column))):
            entries = np.diagonal(column, -i)
            band[i, block * BAND : block * BAND + len(entries)] = entries
    return band


def _trace_of_inverse(diagonals: list[Array], sides: list[Array], penalties: Array) -> Array:
    """tr (T + penalty)^-1 of a block tridiagonal T, for all penalties (p,) at once.

    A diagonal block of the inverse is the inverse of the block less what elimination from above and from below takes.
    """
    shifted = [block + penalties[:, None, None] * np.eye(len(block)) for block in diagonals]
    above = [shifted[0]]
    for block, side in zip(shifted[1:], sides, strict=True):
        above.append(
            block - side @ np.linalg.solve(above[-1], np.broadcast_to(side.T, (len(penalties), *side.T.shape)))
        )
    trace = np.zeros(len(penalties))
    below = shifted[-1]
    for i in reversed(range(len(shifted))):
        trace += np.trace(np.linalg.inv(above[i] + below - shifted[i]), axis1=1, axis2=2)
        if i:
            side = np.broadcast_to(sides[i - 1], (len(penalties), *sides[i - 1].shape))
            below = shifted[i - 1] - sides[i - 1].T @ np.linalg.solve(below, side)
    return trace


class FlyCLClassifier(ContinualClassifier):
    """Sparse random expansion, winners and streaming ridge regression: a continual-learning head for frozen features.

    Each of m expanded units reads s of the d features with fixed random weights; the k units with the largest drive
    keep it, the others are silent; a ridge regression maps these codes h to one-hot labels y. It needs no more of the
    samples than ``G = sum h h^T`` and ``Q = sum h y^T``, so that learning is exact whatever the order of samples,
    batches and tasks, nothing is forgotten, and memory does not grow with the number of samples: m^2 + m classes
    numbers. Learning only adds to G and Q; the weights ``(G + penalty)^-1 Q`` are computed in ``fit``, or by the first
    prediction after ``partial_fit``, in a time that depends on m and the number of classes alone.

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
            cross-validation among 10^-5 to 10^2 times tr(G) / m.
        gcv: "streaming": GCV on all samples seen, from G and Q. "task": as published, on the samples of the last call
            of ``fit`` or ``partial_fit`` alone, whose penalty is then used with all of G and Q.
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
    _shared: ClassVar = ("gram_",)

    def __init__(
        self,
        expand_dim: int | None = None,
        degree: int | None = None,
        coding_level: float = 0.3,
        penalty: float | str = "gcv",
        gcv: str = "streaming",
        standardize: bool = False,
        random_state: Any = 0,
    ) -> None:
        self.expand_dim = expand_dim
        self.degree = degree
        self.coding_level = coding_level
        self.penalty = penalty
        self.gcv = gcv
        self.standardize = standardize
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        super().fit(X, y)
        self._solve()
        return self

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

    def _wire(self, features: int) -> None:
        self.projection_ = self._expansion(features, min(10 * features, 10_000), 0.4, "gaussian")
        units = len(self.projection_)
        if 8 * units**2 > LARGE:
            warnings.warn(f"expand_dim={units}: G alone takes {8e-9 * units**2:.1f} GB; 10000 would take 0.8 GB")
        self.gram_ = np.zeros((units, units), order="F")
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
            gram, moment = np.zeros_like(self.gram_), np.zeros_like(self.moment_)
            self._gather(X, labels, gram, moment)
            self._task_penalty = _chosen(gram, moment, len(X))
        self._gather(X, labels, self.gram_, self.moment_)

    def _gather(self, X: Array, labels: NDArray[np.int64], gram: Array, moment: Array) -> None:
        """Add the samples' statistics to ``gram`` and ``moment``, in place."""
        targets = np.eye(len(self.classes_))
        for rows in blocks(len(X)):
            codes = self._coded(X[rows])
            dsyrk(1.0, codes.T, beta=1.0, c=gram, overwrite_c=1)
            moment += targets[labels[rows]].T @ codes

    def _solve(self) -> tuple[Array, float]:
        """Weights and penalty for what was learned up to now."""
        if self._solution is None:
            if self.penalty != "gcv":
                penalty = float(self.penalty)
            elif self.gcv == "task":
                penalty = self._task_penalty
            else:
                penalty = _chosen(self.gram_, self.moment_, int(self.class_count_.sum()))
            system = self.gram_.copy(order="F")
            system[np.diag_indices_from(system)] += penalty
            try:
                factor = cho_factor(system, lower=False, overwrite_a=True, check_finite=False)
            except LinAlgError as error:
                raise ValueError(f"penalty={penalty:g} is too small for codes of this size: {error}") from error
            self._solution = cho_solve(factor, self.moment_.T).T, penalty
        return self._solution

    def _score_codes(self, codes: Array) -> Array:
        return codes @ self.coef_.T

    def _tensors(self) -> dict[str, NDArray[Any]]:
        weights, penalty = self._solve()
        return {
            **super()._tensors(),
            "gram_": dtrttp(self.gram_)[0],
            "weights": np.ascontiguousarray(weights),
            "penalties": np.array([self._task_penalty, penalty]),
        }

    def _take(self, tensors: dict[str, NDArray[Any]]) -> None:
        own = {name: tensors.pop(name) for name in ("weights", "penalties")}
        units = len(tensors["projection_"])
        triangle, solution = (units * (units + 1) // 2,), (len(self.classes_), units)
        if tensors["gram_"].shape != triangle or own["weights"].shape != solution or own["penalties"].shape != (2,):
            raise ValueError(f"its shapes do not belong to {units} units and {len(self.classes_)} classes")
        if not all(np.isfinite(values).all() for values in own.values()):
            raise ValueError("its weights or penalties are not finite")
        super()._take({**tensors, "gram_": dtpttr(units, tensors["gram_"])[0]})
        self._task_penalty, penalty = own["penalties"].tolist()
        self._solution = own["weights"], penalty


def _chosen(gram: Array, moment: Array, count: int) -> float:
    """The best of `PENALTIES` by GCV: gram (m, m), moment (classes, m)."""
    activity = np.trace(gram) / len(gram)
    if activity == 0:  # silent codes predict nothing, whatever the penalty
        return 1.0
    penalties = activity * PENALTIES
    return float(penalties[gcv_curve(gram, moment.T, count, penalties).best()])


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
                found = self.feature_fn(self.model, inputs)
        finally:
            for module in training:
                module.training = True
        if not isinstance(found, Tensor) or found.dim() != 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"feature_fn must return a tensor (samples, features), got {shape}")
        return found

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
