"""The Fly Model: odours are learned one class after the other, at the synapses of active cells alone."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bioadapt.circuits._classifier import Array, ContinualClassifier, blocks, check_choice, check_number

RULES = ("associative", "depression", "gradient")


class FlyModelClassifier(ContinualClassifier):
    """The fly's olfactory circuit as a continual learner: projection neurons, Kenyon cells, one output neuron a class.

    Each of m Kenyon cells sums s of the d inputs. The mean of the inputs is taken away, inhibition leaves the l cells
    with the largest drive, and their activity is scaled to [0, 1]: the code h. Learning is local and happens once per
    sample. The update touches synapses of active cells alone (with ``forgetting`` 0), so that what was learned at
    other cells stays frozen: two classes with disjoint codes do not disturb one another.

    Rules, for a sample of class y:

    - "associative": ``w_y <- clip((1 - a) w_y + b h, 0, 1)``, other rows ``(1 - a) w_j``; the largest ``w_j h`` wins.
    - "depression": u, how far a synapse is depressed, follows the same equation for every class but y, among them
      classes not met yet, whose output neurons exist from the start; other rows ``(1 - a) u_j``; the least depressed
      wins, that is the largest ``-u_j h``.
    - "gradient": ``w_j <- (1 - a) w_j + b ([j = y] - softmax(w h)_j) h``, which is one step of stochastic gradient
      descent of the cross-entropy; the largest ``w_j h`` wins. Only this one depends on the order of samples while
      a = 0, and gains from further passes: call ``partial_fit`` again.

    The wiring is drawn as the catalogue's primitive ``fly_lora`` draws its projection, with every entry made 1. What
    differs: the primitive's winners have the largest magnitude, signed values and trained read-outs, inside a network.

    Source: Shen, Dasgupta and Navlakha 2023, Reducing catastrophic forgetting with associative learning: a lesson from
    fruit flies, Neural Comput., for circuit and associative rule; arXiv:2502.01427 (2025) for its use as a continual
    learner, of which the abstract alone was read. Depression as the sign of the change: Hige et al. 2015,
    Heterosynaptic plasticity underlies aversive olfactory learning in Drosophila, Neuron.

    Args:
        expand_dim: m, Kenyon cells, from 1; None: 40 per input and at most 10,000.
        degree: s, inputs per Kenyon cell, from 1 to d; None: 0.12 d, at least 1.
        coding_level: share of the cells that are active, above 0 to 1; l = floor(coding_level m), at least 1.
        rule: "associative", "depression" or "gradient".
        learning_rate: b, above zero.
        forgetting: a, from 0 to 1.
        random_state: seed of the wiring, or whatever else scikit-learn accepts.

    Attributes:
        classes_: labels met or announced, sorted.
        class_count_: samples of each (classes,).
        n_features_in_: d.
        projection_: zeros and ones (m, d).
        weights_: w, or u for "depression" (classes, m).
        unmet_: the row that a class gets when it is met (m,).
    """

    _per_class: ClassVar = ("weights_",)
    _shared: ClassVar = ("unmet_",)
    weights_: Array
    unmet_: Array

    def __init__(
        self,
        expand_dim: int | None = None,
        degree: int | None = None,
        coding_level: float = 0.05,
        rule: str = "associative",
        learning_rate: float = 0.01,
        forgetting: float = 0.0,
        random_state: Any = 0,
    ) -> None:
        self.expand_dim = expand_dim
        self.degree = degree
        self.coding_level = coding_level
        self.rule = rule
        self.learning_rate = learning_rate
        self.forgetting = forgetting
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # A code does not depend on the mean and scale of its input, so that of two features, with which scikit-learn
        # tests, one bit is left.
        tags.classifier_tags.poor_score = True
        return tags

    def _check_settings(self) -> None:
        super()._check_settings()
        check_choice("rule", self.rule, RULES)
        check_number("learning_rate", self.learning_rate, 0, open_low=True)
        check_number("forgetting", self.forgetting, 0, 1)

    def _wire(self, features: int) -> None:
        self.projection_ = np.abs(self._expansion(features, min(40 * features, 10_000), 0.12, "rademacher"))
        self.unmet_ = np.zeros(len(self.projection_))

    def _row(self) -> Array:
        return self.unmet_

    def _coded(self, X: Array) -> Array:
        drive = X @ self.projection_.T
        mask = self._winners(drive)
        # All cells have the same number of inputs, so the mean moves no winner: taken away late, ties stay exact.
        drive -= self.projection_[0].sum() * X.mean(1, keepdims=True)
        drive[~mask] = 0
        low = drive.min(1, keepdims=True)
        reach = drive.max(1, keepdims=True) - low
        return np.where(mask, (drive - low) / np.where(reach > 0, reach, 1), 0)

    def _learn(self, X: Array, labels: NDArray[np.int64]) -> None:
        learn = self._descend if self.rule == "gradient" else self._associate
        for rows in blocks(len(X)):
            learn(self._coded(X[rows]), labels[rows])

    def _associate(self, codes: Array, labels: NDArray[np.int64]) -> None:
        # The last row stands for all classes that have not been met yet; no sample has one of them as its target.
        changed = np.eye(len(self.classes_) + 1)[labels]
        if self.rule == "depression":
            changed = 1 - changed
        memory = np.vstack([self.weights_, self.unmet_])
        if self.forgetting:
            for code, which in zip(codes, changed, strict=True):
                memory *= 1 - self.forgetting
                memory += self.learning_rate * np.outer(which, code)
                np.clip(memory, 0, 1, out=memory)
        else:  # nothing ever falls, so clipping once at the end is clipping after every sample
            memory += self.learning_rate * (changed.T @ codes)
            np.clip(memory, 0, 1, out=memory)
        self.weights_, self.unmet_ = memory[:-1], memory[-1]

    def _descend(self, codes: Array, labels: NDArray[np.int64]) -> None:
        for code, label in zip(codes, labels, strict=True):
            active = np.flatnonzero(code)
            h = code[active]
            drive = self.weights_[:, active] @ h
            error = -np.exp(drive - drive.max())
            error /= -error.sum()
            error[label] += 1
            if self.forgetting:
                self.weights_ *= 1 - self.forgetting
            self.weights_[:, active] += self.learning_rate * np.outer(error, h)

    def _score_codes(self, codes: Array) -> Array:
        scores = codes @ self.weights_.T
        return -scores if self.rule == "depression" else scores
