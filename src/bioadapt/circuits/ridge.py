"""Ridge regression of one-hot labels on codes: what to keep of the samples, the solution, and its penalty by GCV.

With H the codes (n, m) and Y the labels (n, classes), the weights (m, classes) are ``(H^T H + penalty)^-1 H^T Y``, or
what is the same, ``H^T (H H^T + penalty)^-1 Y``. The first is solved with m unknowns, the second with n: `RidgeSums`
keeps H while there are fewer samples than units, and H^T H from then on, so that the smaller side is the one solved.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, solveh_banded
from scipy.linalg.blas import dsyrk
from scipy.linalg.lapack import dgeqrt, dtpttr, dtrttp

from bioadapt.circuits._classifier import Array, blocks

BAND = 64  # width of the band to which a symmetric matrix is reduced
FREEDOM = 1e-4  # share of the samples' degrees of freedom that a penalty has to leave; less is lost in rounding
TOO_SMALL = "penalty={:g} is too small for codes of this size: {}"


class RidgeSums:
    """What ridge regression needs of codes (n, m): the codes themselves while n < m, then ``H^T H``.

    Args:
        units: m.

    Attributes:
        count: n, samples taken in.
    """

    def __init__(self, units: int) -> None:
        self.units, self.count = units, 0
        self._held: list[tuple[Array, NDArray]] = []
        self._gram: Array | None = None

    @classmethod
    def of_gram(cls, gram: Array, count: int) -> RidgeSums:
        """From ``H^T H`` (m, m), of which the upper triangle is read, and n."""
        sums = cls(len(gram))
        sums.count, sums._gram = count, np.asfortranarray(gram)
        return sums

    @property
    def activity(self) -> float:
        """Mean over the units of their summed squared codes, ``tr(H^T H) / m``."""
        if self._gram is not None:
            return float(np.trace(self._gram)) / self.units
        return sum(float(np.square(codes).sum()) for codes, _ in self._held) / self.units

    @property
    def gram(self) -> Array:
        """``H^T H`` (m, m), upper triangle."""
        return self._summed() if self._gram is None else self._gram

    def add(self, codes: Array, labels: NDArray) -> None:
        """Take in codes (n, m), which must not change afterwards, and the labels (n,) that they belong to."""
        self.count += len(codes)
        if self._gram is not None:
            _add_products(codes, self._gram)
            return
        self._held.append((codes, labels))
        if self.count >= self.units:
            self._gram, self._held = self._summed(), []

    def weights(self, moment: Array, classes: NDArray, penalty: float) -> Array:
        """The weights, (classes, m).

        Args:
            moment: ``Y^T H`` (classes, m).
            classes: the label of each row of ``moment``.
            penalty: above zero.

        Raises:
            ValueError: the penalty is lost in rounding.
        """
        matrix, right, codes = self._smaller_side(moment, classes)
        matrix = matrix.copy(order="F")
        matrix[np.diag_indices_from(matrix)] += penalty
        try:
            factor = cho_factor(matrix, lower=False, overwrite_a=True, check_finite=False)
        except LinAlgError as error:
            raise ValueError(TOO_SMALL.format(penalty, error)) from error
        solution = cho_solve(factor, right, check_finite=False).T
        return solution if codes is None else solution @ codes

    def validation(self, moment: Array, classes: NDArray, penalties: Array) -> Validation:
        """Generalised cross-validation of all penalties (p,), above zero; the other arguments as in `weights`."""
        matrix, right, codes = self._smaller_side(moment, classes)
        return gcv(matrix, right, self.count, penalties, of_samples=codes is not None)

    def _smaller_side(self, moment: Array, classes: NDArray) -> tuple[Array, Array, Array | None]:
        """``H^T H`` and ``H^T Y``, or ``H H^T``, Y and H; of the matrices the upper triangle."""
        if self._gram is not None:
            return self._gram, moment.T, None
        codes = np.concatenate([codes for codes, _ in self._held])
        labels = np.concatenate([labels for _, labels in self._held])
        return dsyrk(1.0, codes.T, trans=1), (labels[:, None] == classes).astype(np.float64), codes

    def _summed(self) -> Array:
        gram = np.zeros((self.units, self.units), order="F")
        for codes, _ in self._held:
            _add_products(codes, gram)
        return gram


def packed(matrix: Array) -> Array:
    """The upper triangle of a matrix (m, m), column by column: (m (m + 1) / 2,)."""
    return dtrttp(matrix)[0]


def unpacked(triangle: Array, size: int) -> Array:
    """The upper triangle (size, size) that `packed` took apart."""
    return dtpttr(size, triangle)[0]


def _add_products(codes: Array, gram: Array) -> None:
    """Add ``H^T H`` to the upper triangle of ``gram``, in place."""
    dsyrk(1.0, codes.T, beta=1.0, c=gram, overwrite_c=1)


class Validation(NamedTuple):
    """Generalised cross-validation over the penalties, (penalties,) each.

    ``score`` is the mean squared residual of the one-hot labels over the squared share of free degrees of freedom,
    ``freedom`` that share: from 0, where every sample is met exactly, to 1.
    """

    score: Array
    freedom: Array

    def best(self) -> int:
        """The lowest score among penalties that leave more freedom than rounding errors make; else the strongest."""
        usable = np.flatnonzero(self.freedom >= FREEDOM)
        return int(usable[self.score[usable].argmin()]) if len(usable) else len(self.score) - 1


def gcv(matrix: Array, right: Array, count: int, penalties: Array, *, of_samples: bool) -> Validation:
    """GCV of ridge regression from H onto one-hot labels Y by what is left of the data.

    The matrix is reduced to a band by orthogonal transformations, once; residuals and traces of all penalties follow
    from the band. In exact arithmetic this is what a singular value decomposition of H gives; with ``r`` for
    ``|Y - H W|^2`` and ``df`` for ``tr H (H^T H + penalty)^-1 H^T``, the score is ``(r / n) / (1 - df / n)^2``.

    Args:
        matrix: ``H^T H`` (m, m), or with ``of_samples`` ``H H^T`` (n, n), of which the upper triangle is read.
        right: ``H^T Y`` (m, classes), or with ``of_samples`` Y (n, classes).
        count: n, samples in H.
        penalties: (p,), above zero.
        of_samples: which of the two they are.

    Raises:
        ValueError: a penalty is lost in rounding.
    """
    diagonals, sides, turned = _band(matrix, right)
    band = _stored(diagonals, sides)
    residual = np.empty(len(penalties))
    for i, penalty in enumerate(penalties):
        band[0] += penalty
        try:
            solution = solveh_banded(band, turned, lower=True)
        except LinAlgError as error:
            raise ValueError(TOO_SMALL.format(penalty, error)) from error
        band[0] -= penalty
        if of_samples:
            residual[i] = penalty**2 * np.square(solution).sum()
        else:  # |Y|^2 = n, since each row has a single one
            residual[i] = count - (turned * solution).sum() - penalty * np.square(solution).sum()
    freedom = (count - len(matrix) + penalties * _trace_of_inverse(diagonals, sides, penalties)) / count
    with np.errstate(divide="ignore"):
        return Validation(np.maximum(residual, 0) / count / np.square(freedom), freedom)


def _band(matrix: Array, right: Array) -> tuple[list[Array], list[Array], Array]:
    """Orthogonal Z such that Z^T matrix Z is block tridiagonal with upper triangular blocks below its diagonal.

    Returns:
        Diagonal blocks, the blocks below them, and Z^T right.
    """
    size = len(matrix)
    work = torch.from_numpy(_full(matrix))
    turned = torch.from_numpy(right.copy())
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


def _full(matrix: Array) -> Array:
    """A symmetric matrix, rows contiguous, of its upper triangle."""
    full = np.empty(matrix.shape)
    for rows in blocks(len(matrix)):
        full[rows, rows.start :] = matrix[rows, rows.start :]
        full[rows.start :, rows] = matrix[rows, rows.start :].T
        square = np.triu(matrix[rows, rows])
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
