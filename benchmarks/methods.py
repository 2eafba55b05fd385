"""What the published methods cost, next to their official forms and to PEFT's LoRA and SHiRA in the same process.

    python benchmarks/methods.py                          # everything; writes results/methods-<machine>.csv
    python benchmarks/methods.py --only neuro_ada_k1 --widths 1024 --memory-widths
    python benchmarks/methods.py --bars                   # the largest width alone; fails where a method costs too much
    python benchmarks/methods.py --device cuda            # blocks of Llama-3.2-1B's shapes in bf16, eager and compiled

README.md beside this file says what the columns mean and how to read them.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import peft
import torch
from _measure import (
    RESULTS,
    Allocations,
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
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaModel

import bioadapt
from bioadapt import FlyLoraConfig, NeuroAdaConfig, SanConfig, list_primitives

TOKENS = 512
WIDTHS, MEMORY_WIDTHS = (384, 1024, 4096), (8192,)
REFERENCE, BARE = "lora_r8", "none"
MIB, KIB = 2**20, 2**10
BLOCKS = 2  # of the GPU's model: the cost of a block does not depend on how many there are


@dataclass
class Row:
    """One line of the table and of the CSV; ratios are to LoRA r=8 on the same subject. None: not measured."""

    subject: str
    mode: str
    method: str
    form: str
    width: int
    flops_ratio: float
    saved_mib: float
    peak_mib: float
    extra_mib: float
    largest_mib: float | None
    parameters: int
    active: int
    optimiser_kib: float
    file_kib: float
    forward_ratio: float | None = None
    step_ratio: float | None = None
    step_ratio_low: float | None = None
    step_ratio_high: float | None = None


# -- the official forms, plainly as they are described -----------------------------------------------------------------
#
# Each wraps a layer and trains numbers of the dtype that the layer's weight has.


class MaskedFlyLora(nn.Module):
    """FlyLoRA with a dense mask: the whole projection is kept, the losers are multiplied by zero."""

    def __init__(self, base: nn.Linear, r: int = 32, k: int = 8, rate: float = 1e-3) -> None:
        super().__init__()
        self.base, self.k, self.rate, self.scale = base, k, rate, 2.0
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        places = torch.rand(r, base.in_features, device=base.weight.device).topk(k * base.in_features // r).indices
        entries = torch.randn(places.shape, **like) / r
        self.register_buffer("A", torch.zeros(r, base.in_features, **like).scatter(1, places, entries))
        self.register_buffer("d", torch.zeros(r, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, **like))

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.A)
        winners = (y.detach().abs() + self.d).topk(self.k).indices
        mask = torch.zeros_like(y).scatter_(-1, winners, 1.0)
        if self.training:
            with torch.no_grad():
                load = mask.flatten(0, -2).sum(0)
                self.d += self.rate * torch.sign(load.mean() - load)
        return self.base(x) + self.scale * linear(y * mask, self.B)


class ScatteredNeuroAda(nn.Module):
    """NeuroAda by a copy of the weight, into which the values are added at flat positions in every forward."""

    def __init__(self, base: nn.Linear, k: int) -> None:
        super().__init__()
        self.base = base
        columns = base.weight.detach().abs().topk(k, dim=1).indices
        rows = torch.arange(base.out_features, device=columns.device)
        self.register_buffer("positions", (rows[:, None] * base.in_features + columns).flatten())
        self.values = nn.Parameter(base.weight.new_zeros(self.positions.numel()))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight.flatten().scatter_add(0, self.positions, self.values)
        return linear(x, weight.view_as(self.base.weight), self.base.bias)


class RescaledSan(nn.Module):
    """SAN by a copy of the weight, whose columns are rescaled in every forward."""

    def __init__(self, base: nn.Linear, anterior: RescaledSan | None) -> None:
        super().__init__()
        self.base = base
        self.gamma = nn.Parameter(base.weight.new_ones(base.out_features))
        self._anterior = (anterior,)  # in a tuple: not a submodule

    def forward(self, x: Tensor) -> Tensor:
        weight, (anterior,) = self.base.weight, self._anterior
        if anterior is not None:
            weight = weight.clone() * anterior.gamma
        return self.gamma * linear(x, weight, self.base.bias)


# -- what is adapted ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model with linear layers to adapt, and what it is run on.

    ``questions``: whether it is for methods that adapt ``layers`` on their own, for methods that make ``pairs`` of
    them, or for both; ``anterior``: the path of the layer whose scale reaches the layer at a path, None where there is
    none; ``wiring``: the same for bioadapt.
    """

    name: str
    questions: tuple[str, ...]
    width: int
    targets: tuple[str, ...]
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], Tensor]
    x: Tensor
    anterior: Callable[[str], str | None]
    wiring: Any

    def step(self, model: nn.Module) -> Step:
        """Forward, and backward from a given gradient to the adapter's parameters and to the input."""

        def forward() -> Tensor:
            with self.precision():
                return self.run(model, self.x.detach().requires_grad_())

        gradient = torch.randn(forward().shape, generator=torch.Generator().manual_seed(1)).to(self.x)
        return Step(model, forward, lambda output: output.backward(gradient))

    def precision(self) -> AbstractContextManager[Any]:
        """Half precision is trained under autocast."""
        half = self.x.dtype != torch.float32
        return torch.autocast(self.x.device.type, self.x.dtype) if half else nullcontext()


def one_layer(width: int, tokens: int = TOKENS) -> Subject:
    """A square linear layer without bias."""
    return _chain("layer", "layers", ("first",), width, tokens)


def two_layers(width: int, tokens: int = TOKENS) -> Subject:
    """Two of them; the second reads the first, and its scale."""
    return _chain("pair", "pairs", ("first", "second"), width, tokens)


def _chain(name: str, question: str, layers: tuple[str, ...], width: int, tokens: int) -> Subject:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict((layer, nn.Linear(width, width, bias=False)) for layer in layers))

    x = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0))
    before = dict(zip(layers[1:], layers, strict=False))
    return Subject(name, (question,), width, layers, build, lambda model, x: model(x), x, before.get, before)


def llama(device: str, dtype: torch.dtype, batch: tuple[int, int], **shapes: int) -> Subject:
    """Blocks of the shapes of Llama-3.2-1B, or others; random weights, all seven projections adapted."""
    blocks = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**{"vocab_size": 128, "num_hidden_layers": BLOCKS, "use_cache": False, **blocks, **shapes})

    def build() -> nn.Module:
        torch.manual_seed(0)
        return LlamaModel(config).to(device, dtype)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return model(inputs_embeds=x).last_hidden_state

    x = torch.randn(*batch, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    both = ("layers", "pairs")
    return Subject("llama", both, config.hidden_size, targets, build, run, x, _residual_anterior, "residual")


def _residual_anterior(path: str) -> str | None:
    """The layer that last wrote what the layer at ``path`` reads, in a Llama."""
    found = re.fullmatch(r"layers\.(\d+)\.\w+\.(\w+)_proj", path)
    assert found is not None
    block, reader = int(found[1]), found[2]
    if reader in ("q", "k", "v"):
        return f"layers.{block - 1}.mlp.down_proj" if block else None
    return {
        "gate": f"layers.{block}.self_attn.o_proj",
        "up": f"layers.{block}.self_attn.o_proj",
        "down": f"layers.{block}.mlp.up_proj",
    }.get(reader)


# -- with what it is adapted -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A way to adapt a model.

    ``form``: ``peft``, ``bioadapt``, ``official`` or ``none``; ``primitive``: must be registered for it; ``share``: of
    the parameters that are at work for a token; ``timed``: whether more than counts are of interest.
    """

    name: str
    form: str
    attach: Callable[[nn.Module, Subject], nn.Module]
    primitive: str | None = None
    share: float = 1.0
    timed: bool = True


def methods(subject: Subject) -> list[Method]:
    """All that the subject is for, and what they are compared with."""
    found = [
        Method(BARE, "none", lambda model, subject: model),
        _configured(REFERENCE, "peft", lambda **where: LoraConfig(r=8, **where)),
    ]
    if "layers" in subject.questions:
        found += [
            _configured("lora_r32", "peft", lambda **where: LoraConfig(r=32, **where)),
            _configured("shira_r8", "peft", lambda **where: ShiraConfig(r=8, random_seed=0, **where)),
            _configured("fly_lora", "bioadapt", FlyLoraConfig, "fly_lora", share=8 / 32),
            _configured(
                "fly_lora_storing_a",
                "bioadapt",
                partial(FlyLoraConfig, save_projection=True),
                "fly_lora",
                share=8 / 32,
                timed=False,
            ),
            Method("fly_lora_masked", "official", _each(lambda base, _: MaskedFlyLora(base)), share=8 / 32),
        ]
        for k in (1, 20):
            found += [
                _configured(f"neuro_ada_k{k}", "bioadapt", partial(NeuroAdaConfig, k=k), "neuro_ada"),
                Method(f"neuro_ada_k{k}_scattered", "official", _each(lambda base, _, k=k: ScatteredNeuroAda(base, k))),
            ]
    if "pairs" in subject.questions:
        found += [
            _configured("san", "bioadapt", partial(SanConfig, wiring=subject.wiring, zero_scale=1.0), "san_scaling"),
            Method("san_rescaled", "official", _each(RescaledSan)),
        ]
    return found


def _configured(
    name: str,
    form: str,
    config: Callable[..., peft.PeftConfig],
    primitive: str | None = None,
    share: float = 1.0,
    timed: bool = True,
) -> Method:
    def attach(model: nn.Module, subject: Subject) -> nn.Module:
        return get_peft_model(model, config(target_modules=list(subject.targets)))

    return Method(name, form, attach, primitive, share, timed)


def _each(wrapped: Callable[[nn.Linear, Any], nn.Module]) -> Callable[[nn.Module, Subject], nn.Module]:
    """Replaces every target; the wrapper is given the layer, and the wrapper before it in the subject's wiring."""

    def attach(model: nn.Module, subject: Subject) -> nn.Module:
        paths = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in subject.targets]
        wrappers: dict[str, nn.Module] = {}
        model.requires_grad_(False)
        for path in _anteriors_first(paths, subject.anterior):
            parent, _, name = path.rpartition(".")
            layer = model.get_submodule(path)
            wrappers[path] = wrapped(layer, wrappers.get(subject.anterior(path) or ""))
            setattr(model.get_submodule(parent), name, wrappers[path])
        return model

    return attach


def _anteriors_first(paths: Iterable[str], anterior: Callable[[str], str | None]) -> Iterator[str]:
    waiting = list(paths)
    while waiting:
        ready = [path for path in waiting if anterior(path) not in waiting]
        yield from ready
        waiting = [path for path in waiting if path not in ready]


def adapted(base: nn.Module, method: Method, subject: Subject) -> nn.Module:
    """A copy of the model with the method on it, training, no adapter at rest. Copies share their frozen weights."""
    base.requires_grad_(False)
    model = method.attach(sharing_copy(base), subject).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# -- what does not depend on the machine -------------------------------------------------------------------------------


def counts(method: Method, step: Step, subject: Subject) -> Row:
    """All but the times; what is relative to other methods is absolute here."""
    model = step.model
    step.run()  # what is made once, in the first step, is no cost of a step
    peak, largest = memory(step, subject.x.device.type)
    parameters = sum(parameter.numel() for parameter in trained(model))
    return Row(
        subject=subject.name,
        mode="eager",
        method=method.name,
        form=method.form,
        width=subject.width,
        flops_ratio=flops(step),
        saved_mib=saved_bytes(step, [*model.parameters(), *model.buffers()]) / MIB,
        peak_mib=peak / MIB,
        extra_mib=peak / MIB,
        largest_mib=None if largest is None else largest / MIB,
        parameters=parameters,
        active=round(method.share * parameters),
        optimiser_kib=optimiser_bytes(step) / KIB,
        file_kib=checkpoint_bytes(model) / KIB,
    )


def memory(step: Step, device: str) -> tuple[int, int | None]:
    """Most bytes alive in a step beyond what there was before, and the largest tensor made, where that is known."""
    if device == "cpu":
        with Allocations() as made:
            step.run()
        return made.peak, made.largest
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.run()
    return torch.cuda.max_memory_allocated() - before, None


def optimiser_bytes(step: Step) -> int:
    """State of AdamW after one step."""
    if not trained(step.model):
        return 0
    optimiser = torch.optim.AdamW(trained(step.model), lr=0.0)
    step.backward(step.forward())
    optimiser.step()
    step.forget()
    return sum(t.nbytes for state in optimiser.state.values() for t in state.values() if isinstance(t, Tensor))


def checkpoint_bytes(model: nn.Module) -> int:
    """Size of the adapter's file; an official form stores all of its tensors."""
    if isinstance(model, PeftModel):
        return file_bytes(model)
    if not trained(model):
        return 0
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return len(save({name: tensor for name, tensor in model.state_dict().items() if name not in frozen}))


# -- the table ---------------------------------------------------------------------------------------------------------


def measure(
    subject: Subject, only: list[str] | None = None, rounds: int = 0, warmup: int = 0, compiled: bool = False
) -> list[Row]:
    """One row per method, the dearest last; without ``rounds`` no times are taken."""
    base, device = subject.build(), subject.x.device.type
    rows, steps = {}, {}
    for method in methods(subject):
        if only and method.name not in (BARE, REFERENCE, *only):
            continue
        if method.primitive is not None and method.primitive not in list_primitives():
            print(f"{method.name} is left out: {method.primitive} is not registered", file=sys.stderr)
            continue
        model = adapted(base, method, subject)
        step = subject.step(model)
        rows[method.name] = counts(method, step, subject)
        if compiled:
            step = subject.step(torch.compile(model))
            _put_compiled_counts(rows[method.name], step, device)
        if rounds and method.timed:
            steps[method.name] = step
    _put_counts_in_relation(rows)
    if steps:
        for name, ratios in relative_times(steps, REFERENCE, rounds, warmup, clock_of(device)).items():
            rows[name] = replace(rows[name], **asdict(ratios))
    return sorted(rows.values(), key=lambda row: (row.step_ratio is None, row.step_ratio or row.peak_mib))


def _put_compiled_counts(row: Row, step: Step, device: str) -> None:
    """In the place of what the eager model needed, where compiling changes it."""
    row.mode = "compiled"
    for _ in range(3):  # compiles
        step.run()
    row.peak_mib = row.extra_mib = memory(step, device)[0] / MIB
    row.saved_mib = saved_bytes(step, [*step.model.parameters(), *step.model.buffers()]) / MIB


def _put_counts_in_relation(rows: dict[str, Row]) -> None:
    work, peak = rows[REFERENCE].flops_ratio, rows[BARE].peak_mib
    for row in rows.values():
        row.flops_ratio /= work
        row.extra_mib -= peak


def rounded(row: Row) -> Row:
    """For the table: three decimals are more than a measurement is worth."""
    return Row(**{name: round(value, 3) if isinstance(value, float) else value for name, value in vars(row).items()})


def anchors(rows: list[Row]) -> str:
    """Whether LoRA r=8 on one layer comes to what can be worked out by hand."""
    wrong = []
    for row in rows:
        if (row.subject, row.mode, row.method) != ("layer", "eager", REFERENCE):
            continue
        saved = 4 * TOKENS * (row.width + 8) / MIB  # the input, and what comes out of the first matrix
        for field, expected in {"parameters": 16 * row.width, "saved_mib": saved}.items():
            if abs(getattr(row, field) - expected) > 1e-6 * expected:
                wrong.append(f"{field} at {row.width} is {getattr(row, field)}, expected {expected}")
    return "LoRA r=8 is NOT as expected: " + "; ".join(wrong) if wrong else "LoRA r=8 comes to the known numbers."


# -- the bars ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """What a number of a method may come to at most. ``found`` is None if it could not be measured."""

    what: str
    found: float | None
    limit: float

    @property
    def holds(self) -> bool:
        return self.found is not None and self.found <= self.limit

    def __str__(self) -> str:
        found = "not measured" if self.found is None else f"{self.found:.3f}"
        return f"{'holds' if self.holds else 'FAILS':5}  {found:>12}  at most {self.limit:5}  {self.what}"


def bars(rows: list[Row]) -> list[Bar]:
    """The bars of all methods, at the largest width that was timed."""
    width = max(row.width for row in rows if row.step_ratio is not None)
    layer = {row.method: row for row in rows if (row.subject, row.width) == ("layer", width)}
    pair = {row.method: row for row in rows if (row.subject, row.width) == ("pair", width)}

    def over(what: str, field: str, own: Row | None, other: Row | None, limit: float) -> Bar:
        found = None if own is None or other is None else getattr(own, field) / getattr(other, field)
        return Bar(f"{what}, {width} wide", found, limit)

    def largest(what: str, own: Row | None) -> Bar:
        found = None if own is None or own.largest_mib is None else own.largest_mib * MIB / (4 * width * width)
        return Bar(f"{what}: largest tensor made, over a weight of {width} x {width}", found, 0.99)

    ada, scattered, lora = layer.get("neuro_ada_k1"), layer.get("neuro_ada_k1_scattered"), layer.get(REFERENCE)
    fly, masked, storing = layer.get("fly_lora"), layer.get("fly_lora_masked"), layer.get("fly_lora_storing_a")
    return [
        largest("NeuroAda k=1", ada),
        over(
            "NeuroAda k=1: peak beyond the frozen layer's, over the scattered form's", "extra_mib", ada, scattered, 0.2
        ),
        over("NeuroAda k=1: time, over the scattered form's", "step_ratio", ada, scattered, 1.0),
        over("NeuroAda k=1: time, over LoRA r=8's", "step_ratio", ada, lora, 1.2),
        over("FlyLoRA r=32 k=8: saved bytes, over the masked form's", "saved_mib", fly, masked, 0.5),
        over("FlyLoRA r=32 k=8: file, over one that stores A", "file_kib", fly, storing, 0.55),
        over("FlyLoRA r=32 k=8: time, over LoRA r=32's", "step_ratio", fly, layer.get("lora_r32"), 1.1),
        largest("SAN", pair.get("san")),
        over("SAN: time, over LoRA r=8's", "step_ratio", pair.get("san"), pair.get(REFERENCE), 1.15),
    ]


# -- the command -------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="with times (default: %(default)s)")
    parser.add_argument(
        "--memory-widths", type=int, nargs="*", default=MEMORY_WIDTHS, help="counts alone (default: %(default)s)"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="measure this and the reference; repeatable")
    parser.add_argument("--bars", action="store_true", help="the largest of --widths alone; fail if a bar does")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: blocks of Llama-3.2-1B")
    parser.add_argument("--quick", action="store_true", help="3 rounds, 1 to warm up")
    parser.add_argument("--rounds", type=int, default=8, help="rounds at 4096; more at less (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--machine", default=None, help="name of the CSV (default: processor, cores, torch version)")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.warmup = 3, 1
    if given.rounds < 1 or given.warmup < 0 or given.threads < 1:
        parser.error("--rounds and --threads are at least 1, --warmup at least 0")
    known = {method.name for subject in (one_layer(32), two_layers(32)) for method in methods(subject)}
    unknown = [name for name in given.only or () if name not in known]
    if unknown:
        parser.error(f"--only {unknown[0]}: accepted are {', '.join(sorted(known))}")
    if given.bars and (given.only or given.device != "cpu" or not given.widths or max(given.widths) <= TOKENS):
        parser.error(f"--bars takes all methods, on the CPU, at a width above {TOKENS}")
    return given


def on_cpu(given: argparse.Namespace) -> list[Row]:
    rows = []
    for width in [max(given.widths)] if given.bars else given.widths:
        rounds = given.rounds if given.quick else given.rounds * max(1, 4096 // width)
        for subject in (one_layer(width), two_layers(width)):
            rows += measure(subject, given.only, rounds, given.warmup)
    for width in [] if given.bars else given.memory_widths:
        for subject in (one_layer(width), two_layers(width)):
            rows += measure(subject, given.only)
    return rows


def on_gpu(given: argparse.Namespace) -> list[Row]:
    # Every method runs the same functions of the model, each with compiled versions of its own.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 4096
    subject = llama("cuda", torch.bfloat16, (4, 768))
    rows = measure(subject, given.only, given.rounds, given.warmup)
    return rows + measure(subject, given.only, given.rounds, given.warmup, compiled=True)


def main() -> int:
    given = arguments()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", module="peft|transformers")
    rows = on_cpu(given) if given.device == "cpu" else on_gpu(given)
    print(render([rounded(row) for row in rows]))
    checked: list[Bar] = []
    if given.device == "cpu":
        print(anchors(rows))
        if not given.only and given.widths and max(given.widths) > TOKENS:
            checked = bars(rows)
            print("\n".join(map(str, checked)))
    conditions = {
        "tokens": TOKENS if given.device == "cpu" else 4 * 768,
        "threads": given.threads,
        "rounds": given.rounds,
        "warmup": given.warmup,
        "torch": torch.__version__,
        "peft": peft.__version__,
        "bioadapt": bioadapt.__version__,
    }
    if given.only or given.quick or given.bars:
        print("Part of a run: no CSV is written.")
    else:
        name = given.machine or (machine_name() if given.device == "cpu" else gpu_name())
        write_csv(RESULTS / f"methods-{name}.csv", [rounded(row) for row in rows], conditions)
    return int(given.bars and not all(bar.holds for bar in checked))


def gpu_name() -> str:
    words = f"{torch.cuda.get_device_name().lower()} torch{torch.__version__.split('+')[0]}"
    return "-".join(re.findall(r"[a-z0-9.]+", words))


if __name__ == "__main__":
    sys.exit(main())
