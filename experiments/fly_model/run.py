"""Does the Fly Model keep what it has learned, and which part of the circuit is it that keeps it?

    python -m experiments.fly_model.run

README.md beside this file states claim, set-up and results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from bioadapt.circuits.fly_model import FlyModelClassifier
from experiments.ledger import COLOURS, Claim, by_seed, markdown, over_seeds, parser, publish

FOLDER = Path(__file__).resolve().parent
Array = NDArray[np.float64]
Row = dict[str, Any]
Data = tuple[Array, Array]

ODOURS, DIGITS = "odours", "digits"
PER_TASK = {ODOURS: 4, DIGITS: 2}
UNITS, EPOCHS = 2000, 20
RATES = (0.01, 0.1, 1.0)


class Unexpanded(FlyModelClassifier):
    """The same learning on the inputs themselves, scaled to [0, 1]."""

    def _wire(self, features: int) -> None:
        self.projection_, self.unmet_ = np.eye(features), np.zeros(features)


class Dense(FlyModelClassifier):
    """Every cell reads all inputs, with Gaussian weights."""

    def _wire(self, features: int) -> None:
        source = np.random.default_rng(self.random_state)
        self.projection_, self.unmet_ = source.normal(size=(UNITS, features)), np.zeros(UNITS)

    def _coded(self, X: Array) -> Array:
        return super()._coded(X - X.mean(1, keepdims=True))


class Network:
    """A perceptron with 100 hidden units, stochastic gradient descent with batches of 20."""

    def __init__(self, seed: int, rate: float) -> None:
        self.network = MLPClassifier(
            (100,), solver="sgd", learning_rate_init=rate, batch_size=20, alpha=0.0, random_state=seed
        )

    def partial_fit(self, X: Array, y: Array, classes: Array) -> None:
        self.network.partial_fit(X, y, classes=classes)

    def predict(self, X: Array) -> Array:
        return self.network.predict(X)


Build = Callable[[int, float], Any]


def fly(rule: str, level: float, kind: type[FlyModelClassifier] = FlyModelClassifier) -> Build:
    """A builder from seed and, for rule "gradient", learning rate; the local rules have their default rate."""

    def build(seed: int, rate: float) -> FlyModelClassifier:
        speed = rate if rule == "gradient" else 0.01
        return kind(UNITS, coding_level=level, rule=rule, learning_rate=speed, random_state=seed)

    return build


# name -> builder, passes over each task, whether the learning rate is chosen
MLP, SOFTMAX = "MLP, SGD", "softmax on inputs, SGD"
SOFTMAX_FLY, SOFTMAX_FLY_10 = "softmax on fly code 5 %, SGD", "softmax on fly code 10 %, SGD"
ONCE, ONCE_FLY = "softmax on inputs, one pass", "softmax on fly code 5 %, one pass"
LOCAL, FLY, FLY_10 = "associative on inputs", "associative on fly code 5 %", "associative on fly code 10 %"
NO_WINNERS, DENSE = "associative, no winners", "associative, dense wiring 5 %"
DEPRESSION = "depression on fly code 5 %"
ARMS: dict[str, tuple[Build, int, bool]] = {
    MLP: (Network, EPOCHS, True),
    SOFTMAX: (fly("gradient", 1.0, Unexpanded), EPOCHS, True),
    SOFTMAX_FLY: (fly("gradient", 0.05), EPOCHS, True),
    SOFTMAX_FLY_10: (fly("gradient", 0.1), EPOCHS, True),
    ONCE: (fly("gradient", 1.0, Unexpanded), 1, True),
    ONCE_FLY: (fly("gradient", 0.05), 1, True),
    LOCAL: (fly("associative", 1.0, Unexpanded), 1, False),
    FLY: (fly("associative", 0.05), 1, False),
    FLY_10: (fly("associative", 0.1), 1, False),
    NO_WINNERS: (fly("associative", 1.0), 1, False),
    DENSE: (fly("associative", 0.05, Dense), 1, False),
    DEPRESSION: (fly("depression", 0.05), 1, False),
}


def odours(seed: int, trials: int) -> Data:
    """Trials (20 trials, 50) of twenty odours: Gamma(1, 1) patterns p as relu(p (1 + 0.3 xi) + 0.3 xi')."""
    source = np.random.default_rng(seed)
    y = np.arange(20 * trials) % 20
    pattern = source.gamma(1.0, size=(20, 50))[y]
    first, second = source.normal(size=(2, len(y), 50))
    return np.maximum(pattern * (1 + 0.3 * first) + 0.3 * second, 0), y


def learned(model: Any, passes: int, train: Data, test: Data, tasks: Sequence[Array], seed: int) -> dict[str, float]:
    """Learn the tasks, lists of labels, one after the other; each pass in a new order of the task's rows.

    Returns:
        final: accuracy over all classes after the last task; fresh: accuracy on a task when it was just learned, mean;
        forgetting: what tasks but the last have lost since. One head, all classes announced.
    """
    (X, y), (Xt, yt) = train, test
    classes, source, fresh = np.unique(np.concatenate(tasks)), np.random.default_rng(seed), []
    for labels in tasks:
        places = np.flatnonzero(np.isin(y, labels))
        for _ in range(passes):
            order = source.permutation(places)
            model.partial_fit(X[order], y[order], classes=classes)
        right = model.predict(Xt) == yt
        fresh.append(right[np.isin(yt, labels)].mean())
    kept = [right[np.isin(yt, labels)].mean() for labels in tasks]
    return {
        "final": float(right.mean()),
        "fresh": float(np.mean(fresh)),
        "forgetting": float(np.mean(np.subtract(fresh, kept)[:-1])),
    }


def run_data(data: str, X: Array, y: Array, seed: int, passes: int, arms: Sequence[str] = tuple(ARMS)) -> list[Row]:
    """All arms on one split and one cut into tasks."""
    X, Xt, y, yt = train_test_split(X, y, test_size=0.4, stratify=y, random_state=seed)
    order = np.random.default_rng(seed).permutation(np.unique(y))
    tasks = np.split(order, len(order) // PER_TASK[data])
    inner, validation, labels, others = train_test_split(X, y, test_size=0.2, stratify=y, random_state=seed)
    rows = []
    for arm in arms:
        build, most, choose = ARMS[arm]
        times, rate = min(passes, most), 0.01
        if choose:
            finals = [
                learned(build(seed, r), times, (inner, labels), (validation, others), tasks, seed)["final"]
                for r in RATES
            ]
            rate = RATES[int(np.argmax(finals))]
        course = learned(build(seed, rate), times, (X, y), (Xt, yt), tasks, seed)
        rows += [
            {"data": data, "seed": seed, "arm": arm, "measure": measure, "value": value}
            for measure, value in {**course, "rate": rate}.items()
        ]
    return rows


def run_seed(seed: int, quick: bool) -> list[Row]:
    """The seed decides on odours, splits, the order of classes and of rows, the wiring, and the start of networks."""
    images, labels = load_digits(return_X_y=True)
    passes = 2 if quick else EPOCHS
    return [
        *run_data(ODOURS, *odours(seed, 20 if quick else 40), seed, passes),
        *run_data(DIGITS, images[:600] / 16 if quick else images / 16, labels[:600] if quick else labels, seed, passes),
    ]


def values(rows: Sequence[Row], data: str, arm: str, measure: str) -> Array:
    """One per seed."""
    return np.array(list(by_seed(rows, data=data, arm=arm, measure=measure).values()))


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for data in (ODOURS, DIGITS):

        def gap(one: str, other: str, measure: str = "final", data: str = data) -> Array:
            return values(rows, data, one, measure) - values(rows, data, other, measure)

        forgets, share = "forgetting, share, ", "final accuracy, share, "
        found += [
            Claim(f"{data}: more stable than an MLP", forgets + f"{FLY} - {MLP}", gap(FLY, MLP, "forgetting"), "below"),
            Claim(
                f"{data}: forgets less than a tenth",
                forgets + FLY,
                values(rows, data, FLY, "forgetting"),
                "below",
                0.1,
            ),
            Claim(f"{data}: winners are essential", share + f"{FLY} - {NO_WINNERS}", gap(FLY, NO_WINNERS)),
            Claim(f"{data}: the expansion helps the associative rule", share + f"{FLY} - {LOCAL}", gap(FLY, LOCAL)),
            Claim(
                f"{data}: the fly code lets plain SGD remember",
                forgets + f"{SOFTMAX_FLY} - {SOFTMAX}",
                gap(SOFTMAX_FLY, SOFTMAX, "forgetting"),
                "below",
            ),
            Claim(
                f"{data}: a sparser code makes SGD forget less",
                forgets + "5 % - 10 %",
                gap(SOFTMAX_FLY, SOFTMAX_FLY_10, "forgetting"),
                "below",
            ),
            Claim(
                f"{data}: more plastic in one pass",
                f"accuracy when just learned, share, {ONCE_FLY} - {ONCE}",
                gap(ONCE_FLY, ONCE, "fresh"),
            ),
            Claim(
                f"{data}: more stable in one pass",
                forgets + f"{ONCE_FLY} - {ONCE}",
                gap(ONCE_FLY, ONCE, "forgetting"),
                "below",
            ),
            Claim(
                f"{data}: sparse wiring is as good as dense", share + f"{FLY} - dense", gap(FLY, DENSE), "within", 0.01
            ),
            Claim(
                f"{data}: depression is as good as potentiation",
                share + "depression - associative",
                gap(DEPRESSION, FLY),
                "within",
                0.01,
            ),
        ]
    return found


def tables(rows: Sequence[Row]) -> str:
    parts = []
    for data in (ODOURS, DIGITS):
        lines = []
        for arm in ARMS:
            intervals = {m: over_seeds(values(rows, data, arm, m)) for m in ("final", "fresh", "forgetting")}
            final = intervals["final"]
            lines.append(
                [arm, f"{100 * final.estimate:.1f} [{100 * final.low:.1f}, {100 * final.high:.1f}]"]
                + [f"{100 * intervals[m].estimate:.1f}" for m in ("fresh", "forgetting")]
            )
        head = [
            f"{data}, {PER_TASK[data]} classes per task",
            "final accuracy, %",
            "when just learned, %",
            "forgetting, points",
        ]
        parts.append(markdown(head, lines))
    return "\n\n".join(parts)


def draw(rows: Sequence[Row]) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for panel, data in zip(panels, (ODOURS, DIGITS), strict=True):
        for place, arm in enumerate(ARMS):
            for shift, measure, colour, marker in (
                (-0.13, "final", COLOURS[0], "o"),
                (0.13, "forgetting", COLOURS[1], "^"),
            ):
                found = 100 * values(rows, data, arm, measure)
                label = (
                    {"final": "accuracy after the last task", "forgetting": "forgetting"}[measure]
                    if not place
                    else None
                )
                panel.plot(found, [place + shift] * len(found), marker, color=colour, alpha=0.6, label=label)
        panel.set(title=f"{data}, {PER_TASK[data]} classes per task", xlabel="% and points (a mark per seed)")
        panel.set_yticks(range(len(ARMS)), list(ARMS))
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parser(__doc__, 5).parse_args(argv)
    rows = [row for seed in range(2 if chosen.quick else chosen.seeds) for row in run_seed(seed, chosen.quick)]
    publish(FOLDER, rows, claims(rows), tables(rows), draw(rows), quick=chosen.quick)


if __name__ == "__main__":
    main()
