"""Writes a page for every registered primitive, the catalogue's overview and the capability matrix.

Whatever stands on these pages is taken from the registry, drawn by `bioadapt.portrait`, or found out by running the
primitive (`capabilities`): a primitive without a page, or a page that is out of date, cannot come about.
"""

from __future__ import annotations

import contextlib
import csv
import inspect
import io
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capabilities import COLUMNS, Capabilities, probe
from equations import as_html

from bioadapt import list_primitives, primitive_info
from bioadapt.portrait import portrait
from bioadapt.primitives.names import STAGES
from bioadapt.record import IMAGES, LANGUAGE, PROMISES, Finding, Suggestion, findings, record, suggest
from bioadapt.registry import PrimitiveInfo

HERE = Path(__file__).resolve().parent.parent
RESULTS = sorted((HERE.parent / "benchmarks" / "results").glob("*.csv"))
STAGE_WORDS = {
    "sensory_gain": "Sensory gain: the operating point of a signal is set, split, gated or cancelled.",
    "competition": "Competition: the units of one area suppress, select, share and decorrelate each other.",
    "dendritic": "Dendrites and single neurons: a unit's own law of input and output, and its synapses.",
    "dynamics": "Dynamics: state over tokens, rhythms, recurrent loops.",
    "memory": "Memory and prediction: what is expected, completed, compared or kept.",
    "plasticity": "Plasticity and neuromodulation: signals for all, and laws of slow change.",
}
# When the mechanisms of a stage are worth a try, in the words of somebody who has a model and a task.
USES = {
    "sensory_gain": "some channels should count more, or all of them be brought to a common scale",
    "competition": "few of many features should stand out, or features resemble each other too much",
    "dendritic": "a threshold or a product of inputs should do what a matrix cannot, or weights be sparse",
    "dynamics": "it matters how long ago something was, and how long it has lasted",
    "memory": "the present should be compared with, completed from, or cleared of what came before",
    "plasticity": "one slow or global signal should set the gain of many units, or changes of the weights be protected",
}
KINDS = {
    "pointwise": "every token is to be treated by itself",
    "causal": "earlier tokens may tell something about later ones",
    "weight": "the layer's weight itself is to change, as a LoRA changes it",
    "global": "tokens may read each other in both directions",
}
COSTS = {
    "step_ratio": "time of a training step",
    "flops_ratio": "floating-point operations",
    "saved_ratio": "bytes kept for backward",
}
LAUNCHES = {
    "step_operations_ratio": "operations of a training step",
    "step_mib_ratio": "bytes that they move",
    "decode_operations_ratio": "operations of a decoding step",
    "decode_time": "time of a decoding step",
    "kernels": "kernels, compiled",
    "graph_breaks": "graph breaks",
    "fullgraph": "model in one graph",
}
RATES = HERE.parent / "benchmarks" / "results" / "rates.csv"
LEAST = 1 / 3  # what learns less than this share of what a LoRA learns has to say why
SLOW = {
    "hebbian_trace": "the core of its path follows a correlation that knows nothing of the loss",
    "sequence_memory": "it waits for a token to come again, which no single sentence of that measurement has much of",
    "oja_subspace": "it trains one number for each of its eight components, and these know nothing of the loss",
}
DEAR = 1.5  # what takes more of LoRA's time than this has to say why
PROMISED = ("causal", "cache", "compiles", "half", "quantised")
EXAMPLE = """import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel

from bioadapt import BioConfig

base = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64))
model = get_peft_model(base, BioConfig(primitives=["{name}"]))
hidden = model(torch.tensor([[101, 7592, 2088, 102]])).last_hidden_state
print(tuple(hidden.shape))
model.print_trainable_parameters()"""


def setup(app: Any) -> dict[str, Any]:
    app.connect("builder-inited", lambda app: write(Path(app.srcdir)))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write(docs: Path) -> None:
    """All generated pages, made anew."""
    pages = docs / "catalogue"
    shutil.rmtree(pages, ignore_errors=True)
    (pages / "pictures").mkdir(parents=True)
    found = {name: probe(name) for name in list_primitives()}
    check(found)
    costs, launches = measured("family"), measured("decode_time")
    for name, capabilities in found.items():
        portrait(name, pages / "pictures" / f"{name}.png")
        (pages / f"{name}.md").write_text(page(primitive_info(name), capabilities, costs.get(name)), encoding="utf-8")
    (pages / "index.md").write_text(overview(), encoding="utf-8")
    (pages / "evidence.md").write_text(ranking(), encoding="utf-8")
    (docs / "capabilities.md").write_text(matrix(found, costs, launches), encoding="utf-8")


def check(found: dict[str, Capabilities]) -> None:
    """What the contract promises of every primitive must have been found.

    Raises:
        RuntimeError: naming the primitives and what they lack.
    """
    broken = [
        f"{name}: {COLUMNS[key]}"
        for name, capabilities in found.items()
        for key, expected in {**dict.fromkeys(PROMISED, "yes"), "merges": _yes(primitive_info(name).mergeable)}.items()
        if capabilities[key] != expected
    ]
    if broken:
        raise RuntimeError("not as promised: " + "; ".join(broken))


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def measured(column: str) -> dict[str, dict[str, str]]:
    """The rows of the committed benchmark that has the column, by primitive."""
    rows: dict[str, dict[str, str]] = {}
    for path in RESULTS:
        with path.open(encoding="utf-8") as file:
            rows |= {row["method"]: row for row in csv.DictReader(file) if column in row and row.get("kind")}
    return rows


def page(info: PrimitiveInfo, capabilities: Capabilities, cost: dict[str, str] | None) -> str:
    example = EXAMPLE.format(name=info.name)
    parts = [
        f"# `{info.name}`",
        info.summary,
        f"**Use it when** {use(info)}",
        "\n".join(evidence(info.record)),
        f"**Rate.** {rate(info)}",
        f"![What {info.name} does, drawn by running it](pictures/{info.name}.png){{.portrait}}",
        "## Biology",
        info.biology[0].upper() + info.biology[1:],
        "## Equation",
        f'<p class="equation">{as_html(info.equation)}</p>',
        "\n\n".join(remarks(info)),
        "## Settings",
        settings(info),
        "## What it can do",
        table(["", ""], [[COLUMNS[key], value] for key, value in capabilities.items()]),
        f"Stage *{info.stage}*, kind *{info.kind}*. On a layer from 384 to 384 features it trains "
        f"{info.parameter_count(384, 384):,} numbers.",
        "## Cost",
        costs_in_words(cost),
        "## Example",
        f"```python\n{example}\n```",
        f"prints\n\n```text\n{run(example)}\n```",
        "## Reference",
        info.reference,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def use(info: PrimitiveInfo) -> str:
    """When to take it, from what the registry knows."""
    count = info.parameter_count(384, 384)
    cost = f"It trains {count:,} {'number' if count == 1 else 'numbers'} on a layer from 384 to 384 features"
    merges = "folds into the weight" if info.mergeable else "stays in the model, as it depends on its input"
    return f"{USES[info.stage]}, and {KINDS[info.kind]}. {cost}, and {merges}."


def evidence(found: Sequence[Finding]) -> list[str]:
    """What was measured, task by task, or that nothing was."""
    if not found:
        return ["**Evidence.** Not measured yet; its mechanism is tested, its worth is not."]
    return [
        "**Evidence**, in points, beside a LoRA r=8 ([how](../record.md)):\n",
        *(f"- {finding}" for finding in found),
    ]


def rate(info: PrimitiveInfo) -> str:
    """At which rate to train it."""
    scale = info.fresh_zero_scale
    scaled = "" if scale == 1 else f": what is zero at birth, the {info.zero_at}, is scaled by {scale:g} for it"
    factors = sorted({finding.factor for finding in info.record})
    best = " to ".join(dict.fromkeys(f"{factor:g}" for factor in (factors[:1] + factors[-1:])))
    tried = "" if factors in ([], [1.0]) else f" Best in the record: {best} times the LoRA's."
    advice = f"That of a LoRA{scaled}.{tried}"
    return f"{advice} {learning(info.name)}"


def learning(name: str) -> str:
    """How far a LoRA's learning rate brings it, from the committed benchmark."""
    with RATES.open(encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    if name not in rows:
        return "How far that brings it was not measured: `benchmarks/rates.py` does."
    share, moved = float(rows[name]["share"]), float(rows[name]["moved"]) / float(rows["lora_r8"]["moved"])
    reason = "" if share >= LEAST else f": {SLOW[name]}"
    return (
        f"In 30 steps of AdamW at 1e-3 its training loss falls {share:.2f} times as far as that of a LoRA r=8{reason}; "
        f"it moves the blocks' outputs {moved:.1f} times as far (`benchmarks/rates.py`, 2-core CPU)."
    )


def ranking() -> str:
    """The record as a table, in the order of `suggest`, and how many mechanisms were not measured.

    What was measured of other models than sentence encoders alone stands below.
    """
    families, rows = tuple(dict.fromkeys(f.family for f in record() if f.family not in PROMISES)), []
    ranked: dict[str, Suggestion] = {}
    for family in (None, IMAGES, LANGUAGE):
        for one in suggest(family):
            ranked.setdefault(one.primitive, one)
    for one in ranked.values():
        sure = "confirmed" if all(finding.stage == "confirmed" for finding in one.findings) else "screen"
        beside = [finding for finding in findings(one.primitive) if not finding.alone]
        found = {name: [f.over_equal for f in beside if f.family == name] for name in families}
        by_family = {name: f"{statistics.fmean(values):+.2f}" for name, values in found.items() if values}
        factors = sorted({finding.factor for finding in one.findings})
        best = " to ".join(dict.fromkeys(f"{factor:g}" for factor in (factors[0], factors[-1])))
        link = f"[`{one.primitive}`](catalogue/{one.primitive}.md)"
        rows.append([link, *(by_family.get(name, "") for name in families), f"{one.over_placebo:+.2f}", best, sure])
    head = ["mechanism", *families, "mean over the placebo", "x the LoRA's rate", "sure"]
    missing = len(list_primitives()) - len(rows)
    words = f"Points over the best LoRA up to the mechanism's size. {missing} mechanisms have not been measured yet."
    return f"{table(head, rows)}\n\n{words}\n"


def remarks(info: PrimitiveInfo) -> list[str]:
    """The paragraphs of the docstring that the registry does not keep: shapes, deviations, notes."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(info.factory.__doc__ or "").split("\n\n")]
    kept = ("Biology:", "Equation:", "Reference:")
    return [part.replace("``", "`") for part in paragraphs[1:] if not part.startswith(kept)]


def settings(info: PrimitiveInfo) -> str:
    if not info.settings:
        return "None."
    rows = [[f"`{name}`", f"`{spec.default!r}`", spec.accepted, spec.meaning] for name, spec in info.settings.items()]
    return table(["setting", "default", "accepted", "meaning"], rows)


def costs_in_words(cost: dict[str, str] | None) -> str:
    if cost is None:
        return "Not in the committed benchmark: `make bench` measures it."
    words = "; ".join(f"{label} {float(cost[key]):.2f}" for key, label in COSTS.items())
    return f"Relative to a LoRA of rank 8 on the same 12 layers of a 6 x 384 encoder (`make bench`): {words}."


def run(code: str) -> str:
    """What the example prints; an example that fails fails the build."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "<example>", "exec"), {})
    return printed.getvalue().strip()


def overview() -> str:
    parts = ["# The catalogue", f"{len(list_primitives())} primitives in six stages, in the order in which they act."]
    for stage in STAGES:
        infos = [primitive_info(name) for name in list_primitives(stage=stage)]
        title, _, words = STAGE_WORDS[stage].partition(":")
        rows = [[f"[`{i.name}`]({i.name}.md)", i.kind, "yes" if i.mergeable else "no", i.summary] for i in infos]
        toc = "```{toctree}\n:hidden:\n\n" + "\n".join(info.name for info in infos) + "\n```"
        parts += [
            f"## {title}",
            f"`{stage}`. {words.strip().capitalize()}",
            table(["primitive", "kind", "merges", "what it does"], rows),
            toc,
        ]
    return "\n\n".join(parts) + "\n"


def matrix(
    found: dict[str, Capabilities], costs: dict[str, dict[str, str]], launches: dict[str, dict[str, str]]
) -> str:
    head = ["primitive", *COLUMNS.values(), "time", "FLOPs", "bytes"]
    counts = [
        [f"[`{name}`](catalogue/{name}.md)", *(launches[name][key] for key in LAUNCHES)]
        for name in found
        if name in launches
    ]
    rows = []
    for name, capabilities in found.items():
        cost = costs.get(name)
        ratios = [f"{float(cost[key]):.2f}" if cost else "-" for key in COSTS]
        rows.append([f"[`{name}`](catalogue/{name}.md)", *capabilities.values(), *ratios])
    reasons = [f"- `{name}`: {reason_for_cost(name)}" for name in found if is_dear(costs.get(name))]
    return (
        "# What each primitive can do\n\nEvery cell but the last three was found out by running the primitive while "
        "these pages were built. The last three are ratios to a LoRA of rank 8, from the committed benchmark "
        "(`make bench`).\n\n" + table(head, rows) + "\n\n## Launches\n\n"
        "What an accelerator sees of each, from `benchmarks/launches.py`: ratios to a LoRA of rank 8, the time of "
        "decoding on one thread of a 2-core processor; the kernels are those of one adapted layer's training step, "
        "compiled by `compile_adapters`, in which a recurrence counts as one.\n\n"
        + table(["primitive", *LAUNCHES.values()], counts)
        + "\n"
        + (f"\n## More than {DEAR} times LoRA's time\n\n" + "\n".join(reasons) + "\n" if reasons else "")
    )


def is_dear(cost: dict[str, str] | None) -> bool:
    return cost is not None and float(cost["step_ratio"]) > DEAR


def reason_for_cost(name: str) -> str:
    """The paragraph of the docstring that says why a primitive costs much.

    Raises:
        RuntimeError: there is none.
    """
    found = [part for part in remarks(primitive_info(name)) if part.startswith("Cost:")]
    if not found:
        raise RuntimeError(
            f"{name} takes more than {DEAR} times LoRA's time, and its docstring has no paragraph 'Cost:'"
        )
    return found[0].removeprefix("Cost:").strip()


def table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
