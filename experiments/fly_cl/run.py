"""Does Fly-CL's head learn class after class as well as, and faster than, other heads on the same frozen features?

    python -m experiments.fly_cl.run --data-dir FOLDER

README.md beside this file states claim, set-up and results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from bioadapt.circuits.fly_cl import PENALTIES, FlyCLClassifier
from bioadapt.circuits.ridge import RidgeSums
from bioadapt.evaluation import load_task
from bioadapt.evaluation.training import load_encoder
from experiments.ledger import COLOURS, Claim, by_seed, markdown, over_seeds, parser, publish

FOLDER = Path(__file__).resolve().parent
Array = NDArray[np.float64]
Row = dict[str, Any]

DIGITS, BANKING = "digits", "Banking77"
FLY, TASK_GCV, LINEAR = "Fly-CL", "Fly-CL, published GCV", "Fly-CL without winners"
DENSE, RIDGE, MEANS, SGD = "dense + ReLU + ridge", "ridge", "class means", "softmax SGD"
ARMS = (FLY, TASK_GCV, LINEAR, DENSE, RIDGE, MEANS, SGD)
FEATURES, LEVELS = "features", (1.0, 0.3, 0.1, 0.05)
RATES, EPOCHS = (0.01, 0.1, 1.0), 20
SIZES = {DIGITS: (1000, 16), BANKING: (2000, 154)}  # expanded units, features that each reads
TASKS = {DIGITS: 5, BANKING: 11}
POINT = 0.01


class OnTheLastTask(FlyCLClassifier):
    """Chooses the penalty on the last task alone, from the grid that all arms have."""

    def _chosen(self, sums: RidgeSums, moment: Array, relative: Array) -> float:
        return super()._chosen(sums, moment, PENALTIES)


class Ridge:
    """Ridge regression on expanded features, with statistics and choice of the penalty as in `FlyCLClassifier`."""

    def __init__(self, expand: Callable[[Array], Array]) -> None:
        self.expand = expand
        self.sums: RidgeSums | None = None

    def partial_fit(self, X: Array, y: Array, classes: Array) -> None:
        codes, targets = self.expand(X), (y[:, None] == classes).astype(float)
        if self.sums is None:
            self.sums, self.classes, self.moment = RidgeSums(codes.shape[1]), classes, 0.0
        self.sums.add(codes, y)
        self.moment = self.moment + targets.T @ codes
        penalties = PENALTIES * self.sums.activity
        penalty = penalties[self.sums.validation(self.moment, classes, penalties).best()]
        self.weights = self.sums.weights(self.moment, classes, penalty)

    def predict(self, X: Array) -> Array:
        return self.classes[(self.expand(X) @ self.weights.T).argmax(1)]


class Means:
    """The nearest class mean."""

    def __init__(self) -> None:
        self.means: dict[int, Array] = {}

    def partial_fit(self, X: Array, y: Array, classes: Array) -> None:
        self.means |= {label: X[y == label].mean(0) for label in np.unique(y)}

    def predict(self, X: Array) -> Array:
        labels, means = np.array(list(self.means)), np.array(list(self.means.values()))
        return labels[(np.square(means).sum(1) - 2 * X @ means.T).argmin(1)]


class Softmax:
    """Softmax regression by stochastic gradient descent, several epochs per task."""

    def __init__(self, rate: float, seed: int) -> None:
        self.network = MLPClassifier(
            (), solver="sgd", learning_rate_init=rate, batch_size=32, alpha=0.0, random_state=seed
        )

    def partial_fit(self, X: Array, y: Array, classes: Array) -> None:
        for _ in range(EPOCHS):
            self.network.partial_fit(X, y, classes=classes)

    def predict(self, X: Array) -> Array:
        return self.network.predict(X)


def learner(arm: str, data: str, features: int, seed: int, rate: float) -> Any:
    units, degree = SIZES[data]
    if arm in (FLY, TASK_GCV, LINEAR):
        level = 1.0 if arm == LINEAR else 0.3
        if arm == TASK_GCV:
            return OnTheLastTask(units, degree, level, gcv="task", random_state=seed)
        return FlyCLClassifier(units, degree, level, random_state=seed)
    if arm == DENSE:
        projection = np.random.default_rng(seed).normal(size=(features, units))
        return Ridge(lambda X: np.maximum(X @ projection, 0))
    if arm == RIDGE:
        return Ridge(lambda X: X)
    return Means() if arm == MEANS else Softmax(rate, seed)


def learned(model: Any, train: tuple[Array, Array], test: tuple[Array, Array], tasks: Sequence[Array]) -> Row:
    """Learn the tasks, lists of labels, one after the other.

    Returns:
        final: accuracy on all classes after the last task; mean: of the accuracies on the classes met so far, after
        each task; forgetting: what earlier tasks lost since they were learned, single head; seconds: processor time of
        learning, with the solution after each task.
    """
    (X, y), (Xt, yt) = train, test
    classes = np.unique(np.concatenate(tasks))
    seconds, fresh, on_the_way = 0.0, [], []
    for number, labels in enumerate(tasks, start=1):
        rows = np.isin(y, labels)
        start = time.process_time()
        model.partial_fit(X[rows], y[rows], classes=classes)
        model.predict(X[:1])  # Fly-CL solves when it is asked first
        seconds += time.process_time() - start
        right = model.predict(Xt) == yt
        fresh.append(right[np.isin(yt, labels)].mean())
        on_the_way.append(right[np.isin(yt, np.concatenate(tasks[:number]))].mean())
    kept = [right[np.isin(yt, labels)].mean() for labels in tasks]
    return {
        "final": on_the_way[-1],
        "mean": np.mean(on_the_way),
        "forgetting": np.mean(np.subtract(fresh, kept)[:-1]),
        "seconds": seconds,
    }


def best_rate(train: tuple[Array, Array], tasks: Sequence[Array], data: str, seed: int) -> float:
    """The rate of softmax SGD with the best final accuracy on a fifth of the training rows, learned from the others."""
    X, Xv, y, yv = train_test_split(*train, test_size=0.2, random_state=seed)
    finals = [learned(learner(SGD, data, 0, seed, rate), (X, y), (Xv, yv), tasks)["final"] for rate in RATES]
    return RATES[int(np.argmax(finals))]


def likeness(channels: Array) -> float:
    """Mean absolute correlation between two different channels, those that never change left out: (n, m) -> scalar."""
    channels = channels[:, channels.std(0) > 1e-12]
    correlations = np.abs(np.corrcoef(channels.T))
    return float((correlations.sum() - len(correlations)) / (len(correlations) * (len(correlations) - 1)))


def run_data(data: str, X: Array, y: Array, Xt: Array, yt: Array, seed: int, arms: Sequence[str] = ARMS) -> list[Row]:
    """All arms on one cut of the classes into tasks."""
    order = np.random.default_rng(seed).permutation(np.unique(y))
    tasks = np.array_split(order, TASKS[data])
    rate = best_rate((X, y), tasks, data, seed)
    rows = []
    for arm in arms:
        course = learned(learner(arm, data, X.shape[1], seed, rate), (X, y), (Xt, yt), tasks)
        rows += [{"arm": arm, "measure": measure, "value": value} for measure, value in course.items()]
    rows.append({"arm": SGD, "measure": "rate", "value": rate})
    rows.append({"arm": FEATURES, "measure": "correlation", "value": likeness(Xt)})
    for level in LEVELS:
        head = FlyCLClassifier(*SIZES[data], level, penalty=1.0, random_state=seed).partial_fit(X[:1], y[:1])
        rows.append({"arm": f"winners {level:g}", "measure": "correlation", "value": likeness(head.codes(Xt))})
    return [{"data": data, "seed": seed, **row} for row in rows]


def run_seed(seed: int, quick: bool, texts: dict[str, Array] | None = None) -> list[Row]:
    """The seed decides on the split, the order of classes, the random wiring and the start of softmax SGD.

    Args:
        seed: from 0.
        quick: a quarter of the rows.
        texts: embeddings of Banking77, ``X, y, Xt, yt``; None: digits alone.
    """
    images, labels = load_digits(return_X_y=True)
    X, Xt, y, yt = train_test_split(images / 16, labels, test_size=0.4, stratify=labels, random_state=seed)
    thin = slice(None, None, 4 if quick else 1)
    rows = run_data(DIGITS, X[thin], y[thin], Xt, yt, seed)
    if texts is not None:
        # Eight of ten training rows, others for every seed; the test rows are the published ones.
        kept = np.random.default_rng(seed).permutation(len(texts["y"]))[: int(0.8 * len(texts["y"]))][thin]
        rows += run_data(BANKING, texts["X"][kept], texts["y"][kept], texts["Xt"], texts["yt"], seed)
    return rows


def embeddings(folder: Path, limit: int) -> dict[str, Array]:
    """all-MiniLM-L6-v2's embeddings of Banking77, kept in quick/ for the next run."""
    cache = FOLDER / "quick" / f"minilm-banking77-{limit}.npz"
    if cache.is_file():
        with np.load(cache) as stored:
            return dict(stored)
    task = load_task("banking77", folder, limit=limit)
    train, test = task.rows("train"), task.rows("test")
    encoder = load_encoder()
    found = {}
    for (features, labels), rows in zip((("X", "y"), ("Xt", "yt")), (train, test), strict=True):
        found[features] = np.float64(encoder.encode(rows["text"], batch_size=64, show_progress_bar=False))
        found[labels] = np.array(rows["label"])
    cache.parent.mkdir(exist_ok=True)
    np.savez(cache, **found)
    return found


def values(rows: Sequence[Row], data: str, arm: str, measure: str) -> Array:
    """One per seed."""
    return np.array(list(by_seed(rows, data=data, arm=arm, measure=measure).values()))


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for data in (DIGITS, BANKING):

        def gap(one: str, other: str, measure: str = "final", data: str = data) -> Array:
            return values(rows, data, one, measure) - values(rows, data, other, measure)

        points = "final accuracy, share, "
        alike = "mean absolute correlation between channels, "
        times = values(rows, data, FLY, "seconds") / values(rows, data, SGD, "seconds")
        against_dense = values(rows, data, FLY, "seconds") / values(rows, data, DENSE, "seconds")
        own = [
            Claim(f"{data}: better than ridge on the features", points + f"{FLY} - {RIDGE}", gap(FLY, RIDGE)),
            Claim(f"{data}: better than the nearest class mean", points + f"{FLY} - {MEANS}", gap(FLY, MEANS)),
            Claim(f"{data}: better than sequential SGD", points + f"{FLY} - {SGD}", gap(FLY, SGD)),
            Claim(
                f"{data}: as good as a dense projection with ReLU",
                points + f"{FLY} - dense",
                gap(FLY, DENSE),
                "within",
                POINT,
            ),
            Claim(f"{data}: winners are what helps", points + f"{FLY} - without winners", gap(FLY, LINEAR)),
            Claim(
                f"{data}: GCV on all data is better than GCV on a task", points + "ours - published", gap(FLY, TASK_GCV)
            ),
            Claim(f"{data}: trains faster than SGD", f"processor time, {FLY} / {SGD}", times, "below", 1.0),
            Claim(
                f"{data}: trains faster than a dense projection",
                f"processor time, {FLY} / dense",
                against_dense,
                "below",
                1.0,
                "the two arms' programs differ by more than the mechanism; small differences say nothing",
            ),
            Claim(
                f"{data}: the sparse projection makes channels less alike",
                alike + "projected - features",
                gap("winners 1", FEATURES, "correlation"),
                "below",
            ),
            Claim(
                f"{data}: winners make them less alike",
                alike + "winners 0.3 - projected",
                gap("winners 0.3", "winners 1", "correlation"),
                "below",
            ),
            Claim(
                f"{data}: fewer winners make them still less alike",
                alike + "winners 0.1 - 0.3",
                gap("winners 0.1", "winners 0.3", "correlation"),
                "below",
            ),
        ]
        found += own if len(times) else [replace(claim, note="needs --data-dir") for claim in own]
    return found


def tables(rows: Sequence[Row]) -> str:
    parts = []
    for data in dict.fromkeys(row["data"] for row in rows):
        lines = []
        for arm in ARMS:
            means = {m: over_seeds(values(rows, data, arm, m)) for m in ("final", "mean", "forgetting", "seconds")}
            final = means["final"]
            lines.append(
                [arm, f"{100 * final.estimate:.1f} [{100 * final.low:.1f}, {100 * final.high:.1f}]"]
                + [f"{100 * means[m].estimate:.1f}" for m in ("mean", "forgetting")]
                + [f"{means['seconds'].estimate:.2f}"]
            )
        head = [
            f"{data}, {TASKS[data]} tasks",
            "final accuracy, %",
            "mean accuracy, %",
            "forgetting, points",
            "training, s",
        ]
        alike = [
            f"{values(rows, data, arm, 'correlation').mean():.3f}"
            for arm in (FEATURES, *map("winners {:g}".format, LEVELS))
        ]
        names = ["features", "projected", *(f"winners {level:g}" for level in LEVELS[1:])]
        parts += [markdown(head, lines), markdown([f"{data}: mean absolute correlation", *names], [["", *alike]])]
    return "\n\n".join(parts)


def draw(rows: Sequence[Row]) -> Figure:
    sets = list(dict.fromkeys(row["data"] for row in rows))
    figure, panels = plt.subplots(2, len(sets), figsize=(5.6 * len(sets), 7), squeeze=False, layout="constrained")
    for (accuracy, alike), data in zip(panels.T, sets, strict=True):
        for place, arm in enumerate(ARMS):
            final = 100 * values(rows, data, arm, "final")
            accuracy.plot(final, [place] * len(final), "o", color=COLOURS[place], alpha=0.5)
            accuracy.plot(final.mean(), place, "|", color="black", markersize=16)
        accuracy.set_yticks(range(len(ARMS)), ARMS)
        accuracy.invert_yaxis()
        accuracy.set(title=f"{data}, {TASKS[data]} tasks", xlabel="accuracy after the last task, % (a dot per seed)")
        accuracy.grid(axis="x", alpha=0.3)
        for place, arm in enumerate((FEATURES, *map("winners {:g}".format, LEVELS))):
            found = values(rows, data, arm, "correlation")
            alike.plot([place] * len(found), found, "o", color=COLOURS[0], alpha=0.5)
        alike.set_xticks(range(5), ["features", "projected", *(f"winners\n{level:g}" for level in LEVELS[1:])])
        alike.set(ylabel="mean |correlation| of two channels", ylim=(0, None))
        alike.grid(axis="y", alpha=0.3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, 5)
    options.add_argument(
        "--data-dir", type=Path, default=None, help="has banking77/{train,test}.tsv.gz; else digits alone"
    )
    chosen = options.parse_args(argv)
    texts = None if chosen.data_dir is None else embeddings(chosen.data_dir, 400 if chosen.quick else 4000)
    rows = [row for seed in range(2 if chosen.quick else chosen.seeds) for row in run_seed(seed, chosen.quick, texts)]
    publish(FOLDER, rows, claims(rows), tables(rows), draw(rows), quick=chosen.quick)


if __name__ == "__main__":
    main()
