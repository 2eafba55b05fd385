"""Write the table of results into README.md, and draw it, from the files that the experiments have left.

With --check, write nothing and exit with 1 if the table is out of date.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bioadapt.record import Finding, record

ROOT = Path(__file__).resolve().parent.parent
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "_static" / "results.png"
BEGIN, END = "<!-- results: begin (make readme) -->", "<!-- results: end -->"


@dataclass(frozen=True)
class Row:
    """A claim of an experiment in the words of the README; ``scale`` makes percentage points of what was measured."""

    words: str
    experiment: str
    claim: str
    scale: float = 1.0

    @cached_property
    def found(self) -> dict[str, str]:
        """The claim's line in the experiment's file.

        Raises:
            ValueError: there is no such line, or more than one.
        """
        (line,) = [line for line in claims(self.experiment) if line["claim"] == self.claim]
        return line

    @property
    def seeds(self) -> int:
        return int(self.found["seeds"])

    def value(self, name: str) -> float:
        return self.scale * float(self.found[name])


@dataclass(frozen=True)
class Confirmed:
    """What the record says of a mechanism on fresh seeds and test rows of one task, in the words of the README."""

    words: str
    primitive: str
    task: str
    experiment = "evidence"

    @cached_property
    def found(self) -> Finding:
        """Raises ValueError if there is no such finding, or more than one."""
        own = [one for one in record() if (one.primitive, one.task) == (self.primitive, self.task)]
        (finding,) = [one for one in own if one.stage == "confirmed"]
        return finding

    @property
    def seeds(self) -> int:
        return self.found.seeds

    def value(self, name: str) -> float:
        return float(getattr(self.found, "over_equal" if name == "estimate" else name))


# The question that stands behind each mechanism, with the answer, whichever it is.
ROWS: tuple[Row | Confirmed, ...] = (
    Confirmed(
        "words by their frequency, over a LoRA of its size: next word, opinions", "logogen", "mpqa:language_modelling"
    ),
    Confirmed("the same: opinions, six times the rows", "logogen", "mpqa:language_modelling (logogen_long)"),
    Confirmed("the same: Stack Overflow titles", "logogen", "stackoverflow:language_modelling"),
    Confirmed("the same: texts of the model's own field", "logogen", "subj:language_modelling"),
    Confirmed("the same: docstrings, second model", "logogen", "new-texts:language_modelling"),
    Confirmed(
        "recall of what followed, over a LoRA of its size: next word, snippets",
        "sequence_memory",
        "searchsnippets:language_modelling",
    ),
    Confirmed("the same: docstrings", "sequence_memory", "new-texts:language_modelling"),
    Row(
        "memory beyond a short window, over a LoRA of its size: topic",
        "window",
        "A LoRA with a memory tells the topic of a snippet better than a LoRA of its size",
    ),
    Row(
        "the same: library of a docstring",
        "window",
        "A LoRA with a memory tells the library of a docstring better than a LoRA of its size",
    ),
    Row(
        "the same: next word, percent of perplexity",
        "window",
        "A LoRA with a memory foresees text better than a LoRA of its size",
    ),
    Row("Fly-CL over ridge regression: accuracy, digits", "fly_cl", "digits: better than ridge on the features", 100),
    Row("Fly-CL over ridge: accuracy, Banking77", "fly_cl", "Banking77: better than ridge on the features", 100),
    Row(
        "four FlyLoRAs added up over LoRAs r=8 added up",
        "task_decoupling",
        "Merged with weight 1 each, FlyLoRA route loses less than LoRA r=8",
    ),
    Row(
        "the same, averaged instead of added",
        "task_decoupling",
        "Merged with weight 0.25 each, FlyLoRA route loses less than LoRA r=8",
    ),
    Row("SAN over IA3's gains: V-measure", "san", "SAN is more accurate than plain scaling of the same size"),
    Row(
        "NeuroAda over a LoRA of its size: V-measure",
        "neuro_ada",
        "NeuroAda is at least as accurate as LoRA of the same size",
    ),
    Row(
        "NeuroLoRA over LoRA r=8, after tasks in sequence",
        "several_tasks",
        "After a sequence, NeuroLoRA is better than LoRA r=8 in the mean over tasks",
    ),
    Row(
        "spine pruning over magnitude pruning: accuracy",
        "nspdi",
        "Spine pruning beats magnitude pruning",
    ),
)


def claims(experiment: str) -> list[dict[str, str]]:
    with (ROOT / "experiments" / experiment / "claims.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table() -> str:
    """The rows, and under them in a sentence each what all claims and the record of single mechanisms say."""
    lines = ["| question | points | 95 % interval | seeds |", "|---|---|---|---|"]
    for row in ROWS:
        interval = f"[{row.value('low'):+.1f}, {row.value('high'):+.1f}]"
        link = f"[{row.words}](experiments/{row.experiment}/README.md)"
        lines.append(f"| {link} | {row.value('estimate'):+.1f} | {interval} | {row.seeds} |")
    return "\n".join([*lines, "", of_all_claims(), of_the_record(), of_memory()])


def of_all_claims() -> str:
    experiments = sorted(path.parent.name for path in ROOT.glob("experiments/*/claims.csv"))
    verdicts = Counter(line["verdict"] for experiment in experiments for line in claims(experiment))
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in ("supported", "undecided", "not supported"))
    return f"Of all claims in the [ledger](experiments/README.md), found on a 2-core CPU: {counts}."


def of_the_record() -> str:
    findings = record()
    single = sum(finding.seeds == 1 for finding in findings)
    ahead = sum(finding.over_equal > 0 and finding.over_placebo > 0 for finding in findings)
    tested = [finding for finding in findings if finding.stage == "confirmed"]
    won, lost = sum((one.low or 0) > 0 for one in tested), sum((one.high or 0) < 0 for one in tested)
    names, tasks = {finding.primitive for finding in findings}, {finding.task for finding in findings}
    return (
        f"[{len(names)} mechanisms](experiments/record/README.md) were measured so far beside a LoRA and in its place, "
        f"on {len(tasks)} tasks.\nOf {len(findings)} results {ahead} beat both the best LoRA up to their size and the "
        f"best placebo; {single} rest on one seed.\nOf {len(tested)} that were tried again on fresh seeds and test "
        f"rows {won} won and {lost} lost, their intervals beyond zero."
    )


def of_memory() -> str:
    own = [finding for finding in record() if finding.family == "memory"]
    ahead = sum((finding.low or 0) > 0 for finding in own)
    return (
        f"In a made task whose answer stands beyond what attention reaches, {ahead} of {len(own)} causal mechanisms "
        "beat\nevery LoRA up to their size, their intervals above zero."
    )


def draw(path: Path) -> None:
    """The rows as points with their intervals, the first on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.8), layout="constrained")
    for place, row in enumerate(reversed(ROWS)):
        low, mean, high = (row.value(name) for name in ("low", "estimate", "high"))
        colour = "#0072b2" if low > 0 else "#d55e00" if high < 0 else "#777777"
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([mean], [place], "o", color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(-30, 100)
    axes.set_xticks([-20, -10, -5, 0, 5, 10, 20, 80], ["-20", "", "-5", "0", "+5", "", "+20", "+80"])
    axes.set_yticks(range(len(ROWS)), [row.words for row in reversed(ROWS)])
    axes.set_xlabel(
        "difference in points, logarithmic beyond ten: mean over seeds and 95 % interval;\n"
        "right of zero favours the mechanism"
    )
    axes.xaxis.label.set_horizontalalignment("right")
    axes.xaxis.label.set_x(1.0)
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def with_table(text: str) -> str:
    """The README's text with the marked block replaced.

    Raises:
        ValueError: the markers are not there exactly once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md needs exactly one {BEGIN!r} and one {END!r}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def update() -> None:
    """Put the table of today's files into README.md."""
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is out of date")
    if parser.parse_args().check:
        text = README.read_text(encoding="utf-8")
        return 0 if with_table(text) == text else 1
    update()
    draw(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
