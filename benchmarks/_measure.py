"""What the benchmarks share: how operations, bytes and time are taken, and how tables are written."""

from __future__ import annotations

import copy
import csv
import gc
import platform
import random
import re
import statistics
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Step:
    """Forward and backward of a model on inputs that stay the same; where there is an optimiser, its part is timed."""

    model: nn.Module
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object] = Tensor.backward
    optimiser: torch.optim.Optimizer | None = None

    def run(self) -> None:
        self.backward(self.forward())
        self.forget()

    def forget(self) -> None:
        self.model.zero_grad(set_to_none=True)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


# -- what does not depend on the machine -------------------------------------------------------------------------------


def flops(step: Step) -> int:
    """Of forward and backward: matrix products, sparse ones by their entries; neither elementwise work nor FFT."""
    own = {
        torch.ops.aten.mm: _product,
        torch.ops.aten.sparse_sampled_addmm: _sampled_product,
        torch.ops.aten._embedding_bag: _bags,
        torch.ops.aten._embedding_bag_forward_only: _bags,
        torch.ops.aten._embedding_bag_per_sample_weights_backward: _bags_weights,
    }
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        step.run()
    return counter.get_total_flops()


def _product(a: Tensor, b: Tensor, **_: Any) -> int:
    if b.layout != torch.strided:
        return 2 * b._nnz() * a.shape[0]
    return 2 * (a.numel() if a.layout == torch.strided else a._nnz()) * b.shape[1]


def _sampled_product(places: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return 2 * places._nnz() * a.shape[1]


def _bags(words: Tensor, indices: Tensor, *_: Any, **__: Any) -> int:
    return 2 * indices.numel() * words.shape[1]


def _bags_weights(grad: Tensor, words: Tensor, indices: Tensor, *_: Any, **__: Any) -> int:
    return 2 * indices.numel() * words.shape[1]


# Torch's own formulas see shapes alone, and take a sparse matrix for a dense one.
for _count in (_product, _sampled_product, _bags, _bags_weights):
    _count._get_raw = True  # type: ignore[attr-defined]


def saved_bytes(step: Step, lasting: Iterable[Tensor]) -> int:
    """Size of the storages held for backward, each once, without those of the ``lasting`` tensors."""
    apart = {tensor.untyped_storage().data_ptr() for tensor in lasting}
    held: dict[int, Tensor] = {}  # keeping the tensors keeps addresses from being used twice

    def pack(tensor: Tensor) -> Tensor:
        for part in _parts(tensor):
            address = part.untyped_storage().data_ptr()
            if address not in apart:
                held[address] = part.detach()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step.forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


class Allocations(TorchDispatchMode):
    """Follows the storages that come into being inside: ``live`` and ``peak`` bytes, and the ``largest`` of them.

    Every tensor that an operator returns is seen, in forward and in backward. What a kernel takes and gives back within
    itself is not, so that the numbers are the same on every machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._sizes: dict[int, int] = {}
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._meet(storage, storage.nbytes(), born=False)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._meet(storage, storage.nbytes(), born=True)
        return result

    def _meet(self, storage: torch.UntypedStorage, size: int, born: bool) -> None:
        key = id(storage)  # torch keeps the Python object for as long as the storage lives
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._part(key))
            if born:
                self._sizes[key] = 0
        if key in self._sizes:
            self.live += size - self._sizes[key]
            self._sizes[key] = size
            self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

    def _part(self, key: int) -> None:
        del self._known[key]
        self.live -= self._sizes.pop(key, 0)


def _storages(tree: Any) -> Iterable[torch.UntypedStorage]:
    for tensor in tree_leaves(tree):
        if isinstance(tensor, Tensor):
            yield from (part.untyped_storage() for part in _parts(tensor))


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a tensor is made of."""
    if tensor.layout == torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout == torch.sparse_csr:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout == torch.sparse_csc:
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def file_bytes(model: PeftModel) -> int:
    """Size of the adapter file that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Path(folder, SAFETENSORS_WEIGHTS_NAME).stat().st_size


# -- time --------------------------------------------------------------------------------------------------------------


def clock_of(device: str) -> Callable[[], float]:
    """Seconds, for differences."""
    if device != "cpu":
        return _when_done
    # One thread's own processor time does not count what other processes take; several threads need the wall clock.
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _when_done() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


REFERENCE_EVERY = 8  # turns of others between two of the reference


@dataclass(frozen=True)
class Ratios:
    """To the reference's times: medians over rounds, and for the whole step also quartiles."""

    forward_ratio: float
    step_ratio: float
    step_ratio_low: float
    step_ratio_high: float


def relative_times(
    steps: Mapping[str, Step], reference: str, rounds: int, warmup: int, clock: Callable[[], float]
) -> dict[str, Ratios]:
    """What every step takes next to the reference.

    A round visits all steps in an order of its own and the reference after every few of them; what all are divided by
    is the median of its turns in the same round. So a machine that slows down slows both, and no single turn of the
    reference, lucky or disturbed, moves everybody's ratio. A turn is two steps, of which the second is timed: in a
    training a step finds caches as the same model's last step has left them, not as another model has.
    """
    others = [name for name in steps if name != reference]
    rounds_of: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warmup, rounds):
            random.Random(turn).shuffle(others)
            spent, references = {}, []
            for place, name in enumerate(others):
                if place % REFERENCE_EVERY == 0:
                    references.append(_turn(steps[reference], clock))
                spent[name] = _turn(steps[name], clock)
            references.append(_turn(steps[reference], clock))
            spent[reference] = forward, both = tuple(map(statistics.median, zip(*references, strict=True)))
            if turn >= 0:
                for name, own in spent.items():
                    rounds_of[name].append((own[0] / forward, own[1] / both))
            _progress(turn + warmup + 1, rounds + warmup)
    finally:
        gc.enable()
    return {name: _middle(turns) for name, turns in rounds_of.items()}


def _middle(turns: list[tuple[float, float]]) -> Ratios:
    forwards, both = zip(*turns, strict=True)
    low, middle, high = statistics.quantiles(both, n=4, method="inclusive") if len(both) > 1 else 3 * both
    return Ratios(statistics.median(forwards), middle, low, high)


def _turn(step: Step, clock: Callable[[], float]) -> tuple[float, float]:
    for _ in range(2):
        start = clock()
        output = step.forward()
        middle = clock()
        step.backward(output)
        if step.optimiser is not None:
            step.optimiser.step()
        end = clock()
        step.forget()
    return middle - start, end - start


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\rround {done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)


# -- tables ------------------------------------------------------------------------------------------------------------


def render(rows: Sequence[Any]) -> str:
    """A plain table of dataclasses; names to the left, numbers to the right."""
    header = [field.name for field in fields(rows[0])]
    left = [isinstance(value, str) for value in asdict(rows[0]).values()]
    lines = [header, *([_cell(value) for value in asdict(row).values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name else cell.rjust(width)
            for cell, width, name in zip(line, widths, left, strict=True)
        )
        for line in lines
    )


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)


def write_csv(path: Path, rows: Sequence[Any], conditions: dict[str, str | int]) -> None:
    """All rows, each with the conditions it was measured under."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        names = [field.name for field in fields(rows[0])]
        writer = csv.DictWriter(file, [*names, *conditions], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(row), **conditions} for row in rows)
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def machine_name() -> str:
    """Processor model, number of cores and torch version, fit for a file name."""
    model = platform.processor() or platform.machine()
    about = Path("/proc/cpuinfo")
    if about.is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", about.read_text(encoding="utf-8"), re.MULTILINE)
        model = named[1] if named else model
    words = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*", " ", model.lower())
    cores = torch.multiprocessing.cpu_count()
    return "-".join(re.findall(r"[a-z0-9.]+", f"{words} {cores}core torch{torch.__version__.split('+')[0]}"))
