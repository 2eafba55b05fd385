"""What every primitive costs, next to PEFT's LoRA, IA3 and C3A on the same layers in the same process.

    python benchmarks/primitives.py                       # everything; writes results/<machine>.csv
    python benchmarks/primitives.py --only lateral_inhibition --only c3a
    python benchmarks/primitives.py --quick               # few rounds: counts are exact, times are rough

README.md beside this file says what the columns mean and how to read them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial

import peft
import torch
import transformers
from _measure import (
    RESULTS,
    Step,
    clock_of,
    file_bytes,
    flops,
    machine_name,
    relative_times,
    render,
    saved_bytes,
    sharing_copy,
    write_csv,
)
from peft import C3AConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import bioadapt
from bioadapt import BioConfig, list_primitives, primitive_info

TARGETS = ("query", "value")
BATCH, TOKENS, WIDTH, VOCABULARY = 8, 64, 384, 1000
REFERENCE = "lora_r8"
# What LoRA r=8 must come to on this encoder; another number means that something else is being measured.
ANCHOR = {"saved_mib": (50.6, 0.05), "parameters": (73_728, 0), "file_kib": (291, 0.5)}

# At most: the medians over the primitives, and a single one's time unless the catalogue gives its reason.
STEP_BAR, SAVED_BAR, DEAR = 1.10, 1.25, 1.5


@dataclass(frozen=True)
class Method:
    """Something to measure: ``family`` is ``peft``, ``primitive`` or ``set``."""

    name: str
    family: str
    kind: str
    config: Callable[[], peft.PeftConfig]


@dataclass
class Row:
    """One line of the table and of the CSV; ratios are to LoRA r=8 in the same process."""

    method: str
    family: str
    kind: str
    flops_ratio: float
    saved_mib: float
    saved_ratio: float
    parameters: int
    file_kib: float
    forward_ratio: float
    step_ratio: float
    step_ratio_low: float
    step_ratio_high: float


# -- what is measured --------------------------------------------------------------------------------------------------


def methods(sets: Iterable[str] = ()) -> list[Method]:
    """PEFT's three, every registered primitive alone, and the given sets (names joined by ``+``)."""
    targets = list(TARGETS)
    found = [
        Method(REFERENCE, "peft", "", lambda: LoraConfig(r=8, target_modules=targets)),
        Method("ia3", "peft", "", lambda: IA3Config(target_modules=targets, feedforward_modules=[])),
        Method("c3a", "peft", "", lambda: C3AConfig(block_size=32, target_modules=targets)),
    ]
    for name in list_primitives():
        found.append(Method(name, "primitive", primitive_info(name).kind, _bio([name])))
    for joined in sets:
        found.append(Method(joined, "set", "", _bio(joined.split("+"))))
    return found


def _bio(names: list[str]) -> Callable[[], peft.PeftConfig]:
    return lambda: BioConfig(primitives=list(names), target_modules=list(TARGETS))


def encoder() -> BertModel:
    """BERT-shaped, random weights, no dropout."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=4 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return BertModel(config)


def adapted(base: nn.Module, method: Method) -> PeftModel:
    """A copy of the encoder with the method on it, training. The copies share their frozen weights."""
    return get_peft_model(sharing_copy(base), method.config()).train()


def batch(padded: bool) -> dict[str, Tensor]:
    """Token numbers, and with ``padded`` a mask under which sequences have 16 to 64 tokens."""
    ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    if not padded:
        return {"input_ids": ids}
    lengths = torch.linspace(TOKENS / 4, TOKENS, BATCH).long()
    return {"input_ids": ids, "attention_mask": (torch.arange(TOKENS) < lengths[:, None]).long()}


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A loss."""
    return model(**inputs).last_hidden_state.square().mean()


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as transformers' Trainer has it; at a rate of 0 it has all its work, and parameters stay."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)


# -- the table ---------------------------------------------------------------------------------------------------------


def measure(chosen: list[Method], inputs: dict[str, Tensor], rounds: int, warmup: int) -> list[Row]:
    """One row per method, the dearest last. The reference has to be among them."""
    base = encoder()
    models = {method.name: adapted(base, method) for method in chosen}
    steps = {
        name: Step(model, partial(forward, model, inputs), optimiser=optimiser(model)) for name, model in models.items()
    }
    work = {name: flops(step) for name, step in steps.items()}
    held = {name: saved_bytes(step, models[name].parameters()) for name, step in steps.items()}
    times = relative_times(steps, REFERENCE, rounds, warmup, clock_of("cpu"))
    rows = []
    for method in chosen:
        name, model = method.name, models[method.name]
        rows.append(
            Row(
                method=name,
                family=method.family,
                kind=method.kind,
                flops_ratio=round(work[name] / work[REFERENCE], 3),
                saved_mib=round(held[name] / 2**20, 1),
                saved_ratio=round(held[name] / held[REFERENCE], 3),
                parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
                file_kib=round(file_bytes(model) / 2**10, 1),
                **{field: round(ratio, 3) for field, ratio in asdict(times[name]).items()},
            )
        )
    return sorted(rows, key=lambda row: row.step_ratio)


def bar_report(rows: list[Row]) -> str:
    """Where the median over the primitives lies, and which of them are far above it."""
    own = [row for row in rows if row.family == "primitive"]
    step, saved = (statistics.median(getattr(row, field) for row in own) for field in ("step_ratio", "saved_ratio"))
    dear = [f"{row.method} ({row.step_ratio})" for row in own if row.step_ratio > DEAR]
    return (
        f"Median of {len(own)} primitives: {step:.3f} x the step's time of LoRA r=8 (bar {STEP_BAR}), "
        f"{saved:.3f} x the bytes it saves (bar {SAVED_BAR}); above {DEAR} in time: {', '.join(dear) or 'none'}."
    )


def anchor_report(rows: list[Row]) -> str:
    """Whether LoRA r=8 comes to the known numbers."""
    row = next(row for row in rows if row.method == REFERENCE)
    wrong = [
        f"{field} is {getattr(row, field)}, expected {value}"
        for field, (value, tolerance) in ANCHOR.items()
        if abs(getattr(row, field) - value) > tolerance
    ]
    return "LoRA r=8 is NOT as expected: " + "; ".join(wrong) if wrong else "LoRA r=8 comes to the known numbers."


# -- the command -------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="measure this and the reference; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="A+B", help="also measure these together")
    parser.add_argument("--quick", action="store_true", help="3 rounds, 1 to warm up")
    parser.add_argument("--rounds", type=int, default=8, help="rounds that count (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--padded", action="store_true", help="sequences of 16 to 64 tokens under an attention mask")
    parser.add_argument("--machine", default=None, help="name of the CSV (default: processor, cores, torch version)")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.warmup = 3, 1
    if given.rounds < 1 or given.warmup < 0 or given.threads < 1:
        parser.error("--rounds and --threads are at least 1, --warmup at least 0")
    known = [method.name for method in methods(given.set)]
    unknown = [name for name in given.only or () if name not in known]
    if unknown:
        parser.error(f"--only {unknown[0]}: accepted are {', '.join(known)}")
    return given


def main() -> int:
    given = arguments()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", module="transformers")
    chosen = [m for m in methods(given.set) if not given.only or m.name in (REFERENCE, *given.only)]
    rows = measure(chosen, batch(given.padded), given.rounds, given.warmup)
    print(render(rows))
    if any(row.family == "primitive" for row in rows):
        print(bar_report(rows))
    if not given.padded:  # a mask is kept for backward, too
        print(anchor_report(rows))
    conditions = {
        "padded": int(given.padded),
        "threads": given.threads,
        "rounds": given.rounds,
        "warmup": given.warmup,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "bioadapt": bioadapt.__version__,
    }
    if given.only or given.quick:
        print("Part of a run: no CSV is written.")
    else:
        name = given.machine or machine_name()
        write_csv(RESULTS / f"{name}{'-padded' if given.padded else ''}.csv", rows, conditions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
