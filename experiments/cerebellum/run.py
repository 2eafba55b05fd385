"""Do an expansion like the cerebellum's, and its dendrites, save labels or trials?

    OMP_NUM_THREADS=1 python -m experiments.cerebellum.run            # everything; writes beside this file
    OMP_NUM_THREADS=1 python -m experiments.cerebellum.run --quick    # under a minute, into quick/; says nothing

README.md beside this file states claim, set-up and result. ``digits.py`` and ``cartpole.py`` are its two parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.cerebellum import cartpole, digits
from experiments.ledger import COLOURS, Claim, by_seed, markdown, over_seeds, paired, parser, publish

HERE = Path(__file__).resolve().parent
SEEDS = 6
CLEAN, NOISY = "test accuracy", "noise accuracy"


def run_seed(seed: int, quick: bool, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Both parts; ``rates``: what `cartpole.tune` found for each arm."""
    return [*digits.run_seed(seed, quick), *cartpole.run_seed(seed, quick, rates)]


def values(rows: Sequence[Mapping[str, Any]], arm: str, condition: str, measure: str) -> dict[int, float]:
    """What an arm reached in the test, by seed."""
    return by_seed(rows, use="test", arm=arm, condition=condition, measure=measure)


def differences(
    rows: Sequence[Mapping[str, Any]], first: str, second: str, condition: str, measure: str
) -> list[float]:
    """First minus second arm, paired by seed."""
    return paired(*(values(rows, arm, condition, measure) for arm in (first, second)))


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """What the source claims, as paired differences."""
    d, c = digits, cartpole
    compared = [
        ("A larger expansion helps", d.GRANULE_4, d.SMALL, "20 labels, 50 steps", CLEAN),
        ("A larger expansion helps, after long training", d.GRANULE_4, d.SMALL, "20 labels, 500 steps", CLEAN),
        ("The expansion learns in fewer steps", d.GRANULE_16, d.MLP, "20 labels, 50 steps", CLEAN),
        ("It does so with the anatomical fan-in", d.GRANULE_4, d.MLP, "20 labels, 50 steps", CLEAN),
        ("It stays ahead after long training", d.GRANULE_16, d.MLP, "20 labels, 500 steps", CLEAN),
        ("It needs fewer labels", d.GRANULE_16, d.MLP, "5 labels, 500 steps", CLEAN),
        ("It resists noise", d.GRANULE_16, d.MLP, "20 labels, 500 steps", NOISY),
        ("Sparse activation helps", d.GRANULE_16, d.NO_WINNERS, "20 labels, 50 steps", CLEAN),
        ("Dendrites help", d.GATED, d.GRANULE_16, "20 labels, 50 steps", CLEAN),
        ("Dendrites resist noise", d.GATED, d.GRANULE_16, "20 labels, 500 steps", NOISY),
        ("The full circuit learns from fewer trials", c.GATED, c.MLP, "no noise", c.AREA),
        ("The expansion alone does", c.GRANULE, c.MLP, "no noise", c.AREA),
        ("Dendrites add to it", c.GATED, c.GRANULE, "no noise", c.AREA),
        ("The full circuit acts better", c.GATED, c.MLP, "no noise", c.RETURN),
        ("The full circuit acts better on noisy observations", c.GATED, c.MLP, "noise 0.5", c.RETURN),
        ("Dendrites act better on noisy observations", c.GATED, c.GRANULE, "noise 0.5", c.RETURN),
    ]
    judged = [
        Claim(text, f"{measure}: {first} - {second}; {condition}", differences(rows, first, second, condition, measure))
        for text, first, second, condition, measure in compared
    ]
    untested = Claim(
        "The full circuit wins more points of Pong", "share of points won", [],
        note="the source's game is not public; action noise and generalisation were not tried",
    )  # fmt: skip
    return [*judged, untested]


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means and intervals of all arms: accuracies, then the agents."""
    conditions = [f"{count} labels, {steps} steps" for count in digits.LABELS for steps in digits.STEPS]
    columns = [(condition, CLEAN) for condition in conditions] + [(conditions[-1], NOISY)]
    header = ["digits, test accuracy in %", "trained", *conditions, f"{conditions[-1]}, noise"]
    lines = [_line(rows, arm, columns, 100) for arm in digits.ARMS]
    agents = [("no noise", cartpole.AREA)] + [(cartpole.noise_name(s), cartpole.RETURN) for s in cartpole.NOISES]
    agent_header = ["cart and pole", "trained", "rate", *(f"{measure}, {name}" for name, measure in agents)]
    rates = cartpole.best_rates(rows)
    agent_lines = [_line(rows, arm, agents, 1) for arm in cartpole.ARMS]
    for line, arm in zip(agent_lines, cartpole.ARMS, strict=True):
        line.insert(2, f"{rates[arm]:g}")
    return "\n\n".join([markdown(header, lines), markdown(agent_header, agent_lines)])


def _line(rows: Sequence[Mapping[str, Any]], arm: str, columns: Sequence[tuple[str, str]], unit: float) -> list[str]:
    intervals = [over_seeds([unit * value for value in values(rows, arm, *column).values()]) for column in columns]
    trained = next(row["trained"] for row in rows if row["arm"] == arm)
    return [arm, f"{trained:,}", *(f"{i.estimate:.1f} ± {i.high - i.estimate:.1f}" for i in intervals)]


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracies of the arms, learning curves, returns under noise."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    (few, many), (curves, noises) = figure.subplots(2, 2)
    for axes, count in ((few, digits.LABELS[0]), (many, digits.LABELS[1])):
        for colour, marker, steps in zip(COLOURS, "os", digits.STEPS, strict=False):
            found = [values(rows, arm, f"{count} labels, {steps} steps", CLEAN).values() for arm in digits.ARMS]
            intervals = [over_seeds([100 * value for value in of_arm]) for of_arm in found]
            means = [interval.estimate for interval in intervals]
            reach = [interval.high - interval.estimate for interval in intervals]
            places = [place + (0.15 if marker == "s" else -0.15) for place in range(len(means))]
            axes.errorbar(means, places, xerr=reach, fmt=marker, color=colour, capsize=3, label=f"{steps} steps")
        axes.set_yticks(range(len(digits.ARMS)), list(digits.ARMS))
        axes.invert_yaxis()
        axes.set_xlabel("test accuracy, %")
        axes.set_title(f"Digits, {count} labels per class")
        axes.grid(axis="x", alpha=0.3)
        axes.legend()
    shares = list(cartpole.NOISES)
    for place, (colour, marker, arm) in enumerate(zip(COLOURS, "osD", cartpole.ARMS, strict=False)):
        steps = sorted({int(r["condition"].split()[1]) for r in rows if r["measure"] == cartpole.CURVE})
        intervals = [over_seeds(list(values(rows, arm, f"step {s}", cartpole.CURVE).values())) for s in steps]
        curves.plot(steps, [interval.estimate for interval in intervals], color=colour, label=arm)
        curves.fill_between(steps, *zip(*((i.low, i.high) for i in intervals), strict=True), color=colour, alpha=0.15)
        intervals = [
            over_seeds(list(values(rows, arm, cartpole.noise_name(s), cartpole.RETURN).values())) for s in shares
        ]
        reach = [interval.high - interval.estimate for interval in intervals]
        moved = [share + 0.02 * (place - 1) for share in shares]
        noises.errorbar(moved, [interval.estimate for interval in intervals], yerr=reach, fmt=f"{marker}-",
                        color=colour, capsize=3, label=arm)  # fmt: skip
    curves.set_xlabel("steps in the environment")
    curves.set_ylabel("return of training episodes")
    curves.set_title("Cart and pole: learning curve, mean of the last ten episodes")
    noises.set_xticks(shares)
    noises.set_xlabel("noise on observations, in their sd under random actions")
    noises.set_ylabel("return of greedy episodes, up to 500")
    noises.set_title("Cart and pole: after training")
    for axes in (curves, noises):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("Bars and bands: 95 % t intervals over seeds")
    return figure


def main(argv: list[str] | None = None) -> None:
    given = parser(__doc__, SEEDS).parse_args(argv)
    seeds = min(given.seeds, 2) if given.quick else given.seeds
    rows = cartpole.tune(given.quick)
    rates = cartpole.best_rates(rows)
    for seed in range(seeds):
        rows += run_seed(seed, given.quick, rates)
        print(f"seed {seed} done", flush=True)
    publish(HERE, rows, claims(rows), tables(rows), draw(rows), quick=given.quick)


if __name__ == "__main__":
    main()
