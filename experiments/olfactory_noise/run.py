"""When do lateral inhibition and spike-frequency adaptation help a fly to tell noisy odours apart?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import RidgeClassifierCV
from torch import Tensor

from bioadapt.circuits.fly_circuit import Activity, FlyCircuit
from experiments.ledger import COLOURS, Claim, by_seed, markdown, over_seeds, parser, publish
from experiments.olfactory_noise.trials import accuracy, class_means, delta_rule, noisy_trials, odours

FOLDER = Path(__file__).parent
RECEPTORS, KENYON, STEPS = 50, 300, 50
ODOURS, TRAINING, TEST = 12, 5, 20  # trials of each odour
SIGMAS = (0.1, 0.3, 0.6, 1.2, 2.4)
LOW, HIGH = SIGMAS[:3], SIGMAS[3:]  # low and medium, and high noise
NONE, LI, SFA, BOTH = "none", "LI 0.4", "SFA", "LI 0.4 + SFA"
INHIBITED, ADAPTED = {"lateral_inhibition": 0.4}, {"adaptation": 0.3}
ARMS: dict[str, dict[str, Any]] = {
    NONE: {},
    LI: INHIBITED,
    "LI 0.8": {"lateral_inhibition": 0.8},
    SFA: ADAPTED,
    BOTH: INHIBITED | ADAPTED,
    "LI 0.8 + SFA": {"lateral_inhibition": 0.8} | ADAPTED,
    "divisive LI 0.4": INHIBITED | {"inhibition": "divisive"},
    "divisive LI 0.4 + SFA": INHIBITED | ADAPTED | {"inhibition": "divisive"},
    "SFA by drive": ADAPTED | {"adapted_by": "drive"},
    "LI 0.4 + SFA by drive": INHIBITED | ADAPTED | {"adapted_by": "drive"},
}
ONLINE, MEANS, RIDGE, LEVEL = "delta rule", "class means", "ridge", "coding level"
MEASURES = (ONLINE, MEANS, RIDGE, LEVEL)
Row = dict[str, Any]


def ridge(codes: Tensor, labels: Tensor, test: Tensor, wanted: Tensor) -> float:
    """Accuracy of a read-out that is fitted in full, its penalty by leave-one-out on the training trials."""
    model = RidgeClassifierCV(alphas=np.logspace(-4, 2, 7)).fit(codes.numpy(), labels.numpy())
    return model.score(test.numpy(), wanted.numpy())


def online(codes: Tensor, labels: Tensor, test: Tensor, wanted: Tensor, seed: int) -> float:
    """Accuracy of output neurons that learn online."""
    return accuracy(delta_rule(codes, labels, ODOURS, torch.Generator().manual_seed(seed)), test, wanted)


def means(codes: Tensor, labels: Tensor, test: Tensor, wanted: Tensor) -> float:
    """Accuracy of the nearest mean code."""
    return accuracy(class_means(codes, labels, ODOURS), test, wanted)


def activities(seed: int, sigma: float, arms: Sequence[str]) -> Iterator[tuple[str, Activity, tuple[Tensor, ...]]]:
    """Each arm on the same odours, noise and wiring, with codes and labels for training, then for the test."""
    labels = torch.arange(ODOURS).repeat_interleave(TRAINING + TEST)
    training = torch.arange(len(labels)) % (TRAINING + TEST) < TRAINING
    source = torch.Generator().manual_seed(seed)
    drive = noisy_trials(odours(ODOURS, RECEPTORS, source)[labels], STEPS, sigma, source)
    for arm in arms:
        activity = FlyCircuit(RECEPTORS, KENYON, seed=seed, **ARMS[arm])(drive)
        codes = activity.codes
        yield arm, activity, (codes[training], labels[training], codes[~training], labels[~training])


def run_seed(seed: int, quick: bool) -> list[Row]:
    """All arms, noises and read-outs."""
    rows = []
    for sigma in SIGMAS[::2] if quick else SIGMAS:
        for arm, activity, sets in activities(seed, sigma, tuple(ARMS)):
            found = {
                ONLINE: online(*sets, seed),
                MEANS: means(*sets),
                RIDGE: ridge(*sets),
                LEVEL: activity.coding_level,
            }
            rows += [_row(seed, sigma, arm, measure, value) for measure, value in found.items()]
    return rows


def _row(seed: int, sigma: float, arm: str, measure: str, value: float) -> Row:
    return {"seed": seed, "sigma": sigma, "arm": arm, "measure": measure, "value": value}


def values(rows: Sequence[Row], measure: str, sigma: float, arm: str) -> np.ndarray:
    """One value per seed, in the order of seeds."""
    return np.array(list(by_seed(rows, measure=measure, sigma=sigma, arm=arm).values()))


def gain(rows: Sequence[Row], measure: str, sigmas: Sequence[float], arm: str, than: str = NONE) -> np.ndarray:
    """Points of accuracy by which one arm is ahead of another, seed by seed, in the mean over noises."""
    return 100 * np.mean([values(rows, measure, s, arm) - values(rows, measure, s, than) for s in sigmas], axis=0)


def judged(
    measure: str, text: str, unit: str, difference: np.ndarray, side: Literal["above", "below"] = "above"
) -> Claim:
    """A statement for one read-out, in points of accuracy."""
    return Claim(f"{text} ({measure}).", f"{unit}, points", list(difference), side)


def claims(rows: Sequence[Row]) -> list[Claim]:
    """The source's statements for the read-out that learns online, and for the one that takes means."""
    return [claim for measure in (ONLINE, MEANS) for claim in claims_of(measure, rows)]


def claims_of(measure: str, rows: Sequence[Row]) -> list[Claim]:
    """The source's statements for one read-out."""
    given = sorted({row["sigma"] for row in rows})
    low, high = ([sigma for sigma in part if sigma in given] for part in (LOW, HIGH))
    least, most = given[0], high[0]
    shrinking = gain(rows, measure, [least], LI) - gain(rows, measure, [most], LI)
    found = [
        judged(measure, "LI helps at low and medium noise", "LI - none", gain(rows, measure, low, LI)),
        judged(measure, "LI's help shrinks with noise", f"LI - none, at {least:g} minus at {most:g}", shrinking),
    ]
    for sigma in high:
        difference = gain(rows, measure, [sigma], LI)
        found.append(judged(measure, f"LI harms at noise {sigma:g}", "LI - none", difference, "below"))
    for sigma in given:
        difference = gain(rows, measure, [sigma], SFA)
        found.append(judged(measure, f"SFA helps at noise {sigma:g}", "SFA - none", difference))
    ahead = gain(rows, measure, low, LI, SFA), gain(rows, measure, high, SFA, LI)
    found.append(judged(measure, "LI is ahead of SFA at low and medium noise", "LI - SFA", ahead[0]))
    found.append(judged(measure, "SFA is ahead of LI at high noise", "SFA - LI", ahead[1]))
    for sigma in given:
        single = {arm: values(rows, measure, sigma, arm).mean() for arm in (LI, SFA)}
        better = max(single, key=single.__getitem__)
        difference = gain(rows, measure, [sigma], BOTH, better)
        text = f"Both together are best at noise {sigma:g}"
        found.append(judged(measure, text, f"both - {better}, the better one", difference))
    return found


def tables(rows: Sequence[Row]) -> str:
    """Means with intervals over seeds, a table for each measure."""
    given = sorted({row["sigma"] for row in rows})
    seeds = len({row["seed"] for row in rows})
    found = [f"{seeds} seeds; mean ± half of the 95 % interval. Chance is {1 / ODOURS:.3f}."]
    for measure in MEASURES:
        lines = []
        for arm in ARMS:
            intervals = [over_seeds(values(rows, measure, sigma, arm)) for sigma in given]
            lines.append([arm, *(f"{i.estimate:.3f} ± {i.estimate - i.low:.3f}" for i in intervals)])
        title = "Share of Kenyon cells that fire" if measure == LEVEL else f"Accuracy, {measure}"
        found += ["", f"{title}:", "", markdown(["arm", *(f"noise {sigma:g}" for sigma in given)], lines)]
    return "\n".join(found)


def draw(rows: Sequence[Row]) -> Figure:
    """Gains of the main arms against noise, for each read-out."""
    given = sorted({row["sigma"] for row in rows})
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained", sharey=True)
    for axis, measure in zip(axes, (ONLINE, MEANS, RIDGE), strict=True):
        for number, arm in enumerate((LI, "LI 0.8", SFA, BOTH)):
            intervals = [over_seeds(gain(rows, measure, [sigma], arm)) for sigma in given]
            places = np.array(given) * 1.03 ** (number - 1.5)
            reach = np.nan_to_num([i.estimate - i.low for i in intervals])
            gains = [i.estimate for i in intervals]
            axis.errorbar(places, gains, yerr=reach, marker="o", capsize=3, color=COLOURS[number], label=arm)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="noise (drives that hold a cell at threshold)", title=f"read-out: {measure}")
        axis.set_xticks(given, [f"{sigma:g}" for sigma in given])
        axis.minorticks_off()
    axes[0].set_ylabel("accuracy gained over neither (points)")
    axes[0].legend()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, seeds=20).parse_args(argv)
    seeds = range(min(options.seeds, 2) if options.quick else options.seeds)
    rows = [row for seed in seeds for row in run_seed(seed, options.quick)]
    publish(FOLDER, rows, claims(rows), tables(rows), draw(rows), quick=options.quick)


if __name__ == "__main__":
    main()
