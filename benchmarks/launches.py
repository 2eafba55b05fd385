"""What an accelerator sees of every adapter: operations dispatched and bytes moved, in training and in decoding.

    python benchmarks/launches.py                          # all primitives; writes results/launches.csv
    python benchmarks/launches.py --only gap_junction --only kv_lif
    python benchmarks/launches.py --decoding               # that alone, written into the table that there is

Every operation that is no view is a launch on an accelerator, and what it reads and writes is traffic with its memory;
neither depends on the machine. Counts are per adapted layer: those of the model with the adapter, less those of the
model without, over the number of adapted layers.

Where a CPU works in blocks that fit its cache, as spiking neurons do, an accelerator is given all units at once; that
is what is counted. Two set-ups:

- a training step (forward and backward) of the BERT-shaped encoder of `primitives.py`, 8 texts of 64 tokens, adapters
  on query and value;
- one decoding step of a Qwen2 from its config, 6 layers of width 256, with a cache of 64 tokens, adapters on o_proj and
  down_proj, batch 1 and 8.

`decode_time` is the processor time of 24 decoding steps at batch 1 as a ratio to LoRA's in the same round, the median
over the rounds, one thread.

`kernels` is what inductor makes of one adapted layer's part of a training step, compiled by `compile_adapters`: the
kernels that it writes for this processor, and the calls of operations that it leaves as they are, of which a recurrence
is one. The code is written and counted, not built. `graph_breaks` are those in it; `fullgraph` says whether the whole
model's training step is one graph, where the adapter is part of it. PEFT's own methods have no part to be compiled by
itself.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gc
import random
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import peft
import torch
from _measure import RESULTS, machine_name, render, write_csv
from functorch.compile import make_boxed_func
from peft import IA3Config, LoraConfig, get_peft_model
from primitives import TARGETS, batch, encoder, forward
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM

from bioadapt import BioConfig, compile_adapters, list_primitives, primitive_info
from bioadapt.primitives.dendritic import _spiking

LORA = "lora_r8"
DECODER_TARGETS = ["o_proj", "down_proj"]
SITES = 12  # adapted layers in either set-up
CACHED, STEPS = 64, 24
# At most, relative to LoRA: medians over the catalogue, and any single primitive's operations in a training step.
OPERATIONS_BAR, BYTES_BAR, MOST_OPERATIONS = 5.0, 1.4, 40.0


@dataclass(frozen=True)
class Row:
    """Counts per adapted layer; ratios are to LoRA r=8."""

    method: str
    kind: str
    step_operations: float
    step_operations_ratio: float
    step_mib: float
    step_mib_ratio: float
    decode_operations: float
    decode_operations_ratio: float
    decode_operations_batch8: float
    decode_kib: float
    decode_time: float
    kernels: int | None
    graph_breaks: int | None
    fullgraph: bool | None


class Traffic(TorchDispatchMode):
    """Counts the operations that are no views, and the bytes of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func._schema.name not in VIEWS:
            self.operations += 1
            touched = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in touched)
        return result


VIEWS = {"aten::_unsafe_view", "aten::_reshape_alias", "aten::detach", "aten::lift_fresh", "aten::alias"}


def counted(run: Callable[[], object]) -> tuple[int, int]:
    with Traffic() as traffic:
        run()
    return traffic.operations, traffic.bytes


class _Written(BaseException):
    """Ends inductor's work once the code of a graph is written."""


class Kernels:
    """Compiles as inductor does up to the written code, counts its kernels, and runs the graph as it came."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        with inductor_config.patch(fx_graph_cache=False):
            return compile_fx(graph, inputs, inner_compile=self.count_written)

    def count_written(self, graph: fx.GraphModule, inputs: list[Tensor], **options: Any) -> Callable[..., Any]:
        def write(lowering: GraphLowering) -> None:
            before = metrics.generated_kernel_count
            lowering.codegen()
            called = [node for node in lowering.scheduler.nodes if isinstance(node, ExternKernelSchedulerNode)]
            self.count += metrics.generated_kernel_count - before + len(called)
            raise _Written

        try:
            with unittest.mock.patch.object(GraphLowering, "compile_to_module", write):
                compile_fx_inner(copy.deepcopy(graph), inputs, **options)
        except _Written:
            pass
        return make_boxed_func(graph.forward)


def methods() -> dict[str, Callable[[list[str]], peft.PeftConfig | None]]:
    """By name, a configuration for the given modules; None is the model without an adapter."""

    def bio(name: str) -> Callable[[list[str]], peft.PeftConfig]:
        return lambda targets: BioConfig(primitives=[name], target_modules=targets)

    return {
        "base": lambda targets: None,
        LORA: lambda targets: LoraConfig(r=8, target_modules=targets),
        "dora_r8": lambda targets: LoraConfig(r=8, use_dora=True, target_modules=targets),
        "ia3": lambda targets: IA3Config(target_modules=targets, feedforward_modules=[]),
        **{name: bio(name) for name in list_primitives()},
    }


def adapted(model: nn.Module, config: peft.PeftConfig | None) -> nn.Module:
    return model.requires_grad_(False) if config is None else get_peft_model(model, config)


def decoder() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=1024,
        vocab_size=1000,
        max_position_embeddings=256,
    )
    return Qwen2ForCausalLM(config)


def training_step(config: peft.PeftConfig | None) -> tuple[int, int]:
    model = adapted(encoder(), config).train()
    inputs = batch(padded=False)

    def step() -> None:
        loss = forward(model, inputs)
        if loss.requires_grad:
            loss.backward()

    step()  # what is made once is not counted
    model.zero_grad(set_to_none=True)
    with unittest.mock.patch.object(_spiking, "BLOCK", sys.maxsize):
        return counted(step)


def compiled(name: str) -> tuple[int | None, int | None, bool]:
    """Kernels and graph breaks of an adapted layer in a training step, and whether the model's is one graph."""
    base, inputs = encoder(), batch(padded=False)
    base.encoder.layer = base.encoder.layer[:2]
    model = adapted(base, methods()[name](["1.attention.self.value"])).train()
    kernels, breaks = None, None
    if name in list_primitives():
        torch._dynamo.reset()
        counters.clear()
        counter = Kernels()
        compile_adapters(model, backend=counter)
        forward(model, inputs).backward()
        kernels, breaks = counter.count, sum(counters["graph_break"].values())
        compile_adapters(model, disable=True)
    torch._dynamo.reset()
    try:
        forward(torch.compile(model, backend="eager", fullgraph=True), inputs).backward()
    except torch._dynamo.exc.Unsupported:
        return kernels, breaks, False
    return kernels, breaks, True


def prefilled(model: nn.Module, rows: int) -> Any:
    ids = torch.randint(0, 1000, (rows, CACHED), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, use_cache=True).past_key_values


@torch.no_grad()
def decoding_step(model: nn.Module, rows: int) -> tuple[int, int]:
    cache, token = prefilled(model, rows), torch.ones(rows, 1, dtype=torch.long)
    cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
    return counted(lambda: model(input_ids=token, past_key_values=cache, use_cache=True))


@torch.no_grad()
def decoding_time(model: nn.Module) -> float:
    cache, token = prefilled(model, 1), torch.ones(1, 1, dtype=torch.long)
    begun = time.process_time()
    for _ in range(STEPS):
        cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values
    return time.process_time() - begun


def decoding_times(models: dict[str, nn.Module], rounds: int) -> dict[str, float]:
    """Ratios to LoRA's, whose turn comes before and after each other one's."""
    found: dict[str, list[float]] = {name: [] for name in models}
    names = [name for name in models if name != LORA]
    gc.collect()
    gc.freeze()  # who serves one model has no others that the collector goes through
    before = decoding_time(models[LORA])
    for turn in range(rounds):
        random.Random(turn).shuffle(names)
        for name in names:
            own, after = (decoding_time(models[each]) for each in (name, LORA))
            found[name].append(2 * own / (before + after))
            before = after
    gc.unfreeze()
    return {name: statistics.median(ratios) if ratios else 1.0 for name, ratios in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a method; may be given several times")
    parser.add_argument("--rounds", type=int, default=5, help="of decoding times")
    parser.add_argument("--decoding", action="store_true", help="that alone, written into the table that there is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {n: make for n, make in methods().items() if not options.only or n in ("base", LORA, *options.only)}
    steps = {} if options.decoding else {name: training_step(make(list(TARGETS))) for name, make in chosen.items()}
    models = {name: adapted(decoder(), make(DECODER_TARGETS)).eval() for name, make in chosen.items()}
    decodes = {name: (decoding_step(model, 1), decoding_step(model, 8)) for name, model in models.items()}
    times = decoding_times(models, options.rounds)
    if options.decoding:
        rows = [
            replace(row, **decoding_columns(row.method, decodes, times)) for row in read_table() if row.method in times
        ]
    else:
        rows = table(steps, decodes, times, {name: compiled(name) for name in chosen if name != "base"})
    print(render(rows))
    print(report([row for row in rows if row.method in list_primitives()]))
    if not options.only:
        write_csv(table_file(), rows, {"rounds": options.rounds})


def table_file() -> Path:
    return RESULTS / f"launches-{machine_name()}.csv"


def read_table() -> list[Row]:
    """This machine's table as it was written last."""
    with table_file().open() as file:
        return [
            Row(**{field.name: _value(row[field.name], field.type) for field in fields(Row)})
            for row in csv.DictReader(file)
        ]


def _value(text: str, kind: Any) -> Any:
    """What stands for a value of a `Row` in a file."""
    if text == "" and "None" in kind:
        return None
    return {"str": str, "float": float, "int": int, "bool": "True".__eq__}[kind.split(" ")[0]](text)


def _more(found: dict[str, Any], name: str, part: Callable[[Any], float]) -> tuple[float, float]:
    """A count for each adapted layer beyond the base's, and as a ratio to LoRA's."""
    own, lora = (part(found[each]) - part(found["base"]) for each in (name, LORA))
    return own / SITES, own / lora


def decoding_columns(
    name: str, decodes: dict[str, tuple[tuple[int, int], tuple[int, int]]], times: dict[str, float]
) -> dict[str, float]:
    """The part of a `Row` that is about decoding."""
    single = _more(decodes, name, lambda counts: counts[0][0])
    eight = _more(decodes, name, lambda counts: counts[1][0])
    traffic = _more(decodes, name, lambda counts: counts[0][1])
    return {
        "decode_operations": round(single[0], 1),
        "decode_operations_ratio": round(single[1], 2),
        "decode_operations_batch8": round(eight[0], 1),
        "decode_kib": round(traffic[0] / 2**10, 1),
        "decode_time": round(times[name], 2),
    }


def table(
    steps: dict[str, tuple[int, int]],
    decodes: dict[str, tuple[tuple[int, int], tuple[int, int]]],
    times: dict[str, float],
    graphs: dict[str, tuple[int | None, int | None, bool | None]],
) -> list[Row]:
    """One row for each method, from what has been counted and timed of all; the fewest operations first."""
    rows = []
    for name, (kernels, breaks, whole) in graphs.items():
        operations, moved = _more(steps, name, lambda count: count[0]), _more(steps, name, lambda count: count[1])
        rows.append(
            Row(
                method=name,
                kind=primitive_info(name).kind if name in list_primitives() else "",
                step_operations=round(operations[0], 1),
                step_operations_ratio=round(operations[1], 2),
                step_mib=round(moved[0] / 2**20, 2),
                step_mib_ratio=round(moved[1], 2),
                **decoding_columns(name, decodes, times),
                kernels=kernels,
                graph_breaks=breaks,
                fullgraph=whole,
            )
        )
    return sorted(rows, key=lambda row: row.step_operations)


def report(rows: list[Row]) -> str:
    median = {
        name: statistics.median(getattr(row, name) for row in rows)
        for name in ("step_operations_ratio", "step_mib_ratio")
    }
    compiled = [row for row in rows if row.kernels is not None]
    many = [
        f"{row.method} ({row.step_operations_ratio:g})" for row in rows if row.step_operations_ratio > MOST_OPERATIONS
    ]
    causal, others = ([row.decode_time for row in rows if (row.kind == "causal") is flag] for flag in (True, False))
    decoding = ", ".join(
        f"{what} {statistics.median(found):.2f}" for what, found in (("causal", causal), ("others", others)) if found
    )
    return (
        f"Medians to LoRA r=8: operations of a step {median['step_operations_ratio']:.2f} (bar {OPERATIONS_BAR}), "
        f"bytes {median['step_mib_ratio']:.2f} (bar {BYTES_BAR}); decoding time: {decoding}.\n"
        f"Compiled: {statistics.median([row.kernels or 0 for row in compiled]):g} kernels in the median, "
        f"{sum(row.graph_breaks or 0 for row in compiled)} graph breaks, "
        f"{sum(bool(row.fullgraph) for row in compiled)} of {len(compiled)} whole models in one graph.\n"
        f"More than {MOST_OPERATIONS:g} times LoRA's operations: {', '.join(many) or 'none'}."
    )


if __name__ == "__main__":
    main()
