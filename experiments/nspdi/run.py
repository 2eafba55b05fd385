"""How sparse can a small spiking network become by spine pruning, and do nonlinear dendrites help it?

python -m experiments.nspdi.run            # everything; writes beside this file
python -m experiments.nspdi.run --quick    # under a minute, into quick/; says nothing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune

from bioadapt import build_primitive
from bioadapt.circuits.spiking_network import constants_at_birth, fire
from bioadapt.circuits.spine_pruning import SpineSchedule, add_spines, finalize
from bioadapt.primitives.base import Context
from experiments.ledger import COLOURS, Claim, by_seed, markdown, over_seeds, parser, publish

PIXELS, CLASSES, STEPS = 64, 10, 4
CELLS = 128
MATCHED = round(CELLS * (2 * PIXELS + 1 + CLASSES) / (PIXELS + 1 + CLASSES))  # as many parameters as with dendrites
RANK = 16  # of the catalogue's dendrites
BATCH, EPOCHS = 96, 30
RATES = (3e-3, 1e-2, 3e-2)
TUNING = (100, 101)  # seeds that rates are chosen by, and none is reported on
THRESHOLDS = (0.1, 0.2, 0.4, 0.8)
AMOUNTS = (0.5, 0.7, 0.9, 0.95)
TARGET = 0.7  # share of zeros at which the source's claim of a small loss is judged

LINEAR, WIDE, NDI, CATALOGUE = "linear", f"linear, {MATCHED} cells", "NDI", "NDI of the catalogue"
SPINES, SPINES_NDI = "NSP", "NSP + gain + NDI"
MAGNITUDE, MAGNITUDE_NDI = "magnitude", "magnitude + NDI"


@dataclass(frozen=True)
class Arm:
    """A network and a way to prune it: ``spines``, ``spines with gain``, ``magnitude`` or none; and how far."""

    network: str
    pruning: str = ""
    amounts: tuple[float, ...] = (0.0,)


ARMS = {
    LINEAR: Arm(LINEAR),
    WIDE: Arm(WIDE),
    NDI: Arm(NDI),
    CATALOGUE: Arm(CATALOGUE),
    SPINES: Arm(LINEAR, "spines", THRESHOLDS),
    SPINES_NDI: Arm(NDI, "spines with gain", THRESHOLDS),
    MAGNITUDE: Arm(LINEAR, "magnitude", AMOUNTS),
    MAGNITUDE_NDI: Arm(NDI, "magnitude", AMOUNTS),
}


# -- network and data --------------------------------------------------------------------------------------------------


class Dendrites(nn.Module):
    """Drive W x + b, and (W x) * (V x) with it where there is V: (B, inputs) -> (B, cells).

    Source: Cai et al. 2025, NSPDI-SNN, nonlinear dendritic integration. V starts at a tenth of the scale of W.
    """

    def __init__(self, inputs: int, cells: int, nonlinear: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(cells))
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(cells, inputs)))
        self.interaction = (
            nn.Parameter(0.1 * nn.init.kaiming_normal_(torch.empty(cells, inputs))) if nonlinear else None
        )

    def forward(self, x: Tensor) -> Tensor:
        drive = x @ self.weight.T
        return drive + self.bias if self.interaction is None else drive + self.bias + drive * (x @ self.interaction.T)


class CatalogueDendrites(nn.Module):
    """The same by a primitive: its V is of low rank and reads the input relative to its size."""

    def __init__(self, inputs: int, cells: int) -> None:
        super().__init__()
        self.plain = Dendrites(inputs, cells, nonlinear=False)
        self.nonlinear = build_primitive("quadratic_dendrite", inputs, cells, mode="ndi", rank=RANK)

    def forward(self, x: Tensor) -> Tensor:
        drive = self.plain(x)
        return drive + self.nonlinear(drive, Context(x_in=x))


class Net(nn.Module):
    """Pixels drive leaky integrate-and-fire cells for `STEPS` steps; a linear read-out of their rates."""

    def __init__(self, network: str) -> None:
        super().__init__()
        cells = MATCHED if network == WIDE else CELLS
        self.dendrites: nn.Module
        if network == CATALOGUE:
            self.dendrites = CatalogueDendrites(PIXELS, cells)
        else:
            self.dendrites = Dendrites(PIXELS, cells, nonlinear=network == NDI)
        self.readout = nn.Linear(cells, CLASSES)
        self.register_buffer("constants", constants_at_birth("leaky_integrate_fire"))

    def rates(self, x: Tensor) -> Tensor:
        """Spikes per step, (B, pixels) -> (B, cells), in the precision of the network."""
        drive = self.dendrites(x.to(self.readout.weight.dtype))
        return fire(drive[:, None].expand(-1, STEPS, -1), self.constants)[0].mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.rates(x))

    def prunable(self) -> list[tuple[nn.Module, str]]:
        """W, and V where there is one."""
        names = ["weight", "interaction"] if self.dendrites.interaction is not None else ["weight"]
        return [(self.dendrites, name) for name in names]


@cache
def digits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """60 % to train on, 20 % to choose by, 20 % to report on; pixels from 0 to 1."""
    pixels, labels = load_digits(return_X_y=True)
    split: dict[str, Any] = {"stratify": labels, "random_state": seed}
    train_x, rest_x, train_y, rest_y = train_test_split(pixels / 16, labels, test_size=0.4, **split)
    half = {"stratify": rest_y, "random_state": seed, "test_size": 0.5}
    val_x, test_x, val_y, test_y = train_test_split(rest_x, rest_y, **half)
    parts = {"train": (train_x, train_y), "validation": (val_x, val_y), "test": (test_x, test_y)}
    return {name: (torch.tensor(x, dtype=torch.float32), torch.tensor(y)) for name, (x, y) in parts.items()}


# -- training ----------------------------------------------------------------------------------------------------------


def train(arm: Arm, amount: float, rate: float, seed: int, epochs: int = EPOCHS) -> Net:
    """A trained network; ``amount`` is the full threshold D of spines, or the share that magnitude pruning removes.

    Spines are lost over the whole of training. Magnitude pruning removes its share half-way, and the rest trains on.
    """
    torch.manual_seed(seed)
    net = Net(arm.network)
    x, labels = digits(seed)["train"]
    batches = -(-len(x) // BATCH)
    schedule = SpineSchedule(epochs * batches, amount)
    with_spines = arm.pruning.startswith("spines")
    if with_spines:
        for module, name in net.prunable():
            add_spines(module, name, gain=arm.pruning.endswith("gain"))
    optimiser = torch.optim.Adam(net.parameters(), lr=rate)
    for epoch in range(epochs):
        if arm.pruning == "magnitude" and epoch == epochs // 2:
            prune.global_unstructured(net.prunable(), prune.L1Unstructured, amount=amount)
        for chosen in torch.randperm(len(x)).split(BATCH):
            optimiser.zero_grad()
            cross_entropy(net(x[chosen]), labels[chosen]).backward()
            optimiser.step()
            if with_spines:
                schedule.step(net)
    if with_spines:
        finalize(net)
    return net.eval()


@torch.no_grad()
def measure(net: Net, seed: int) -> dict[str, float]:
    """Accuracies in percent, share of zeros among the prunable weights, and synaptic operations per digit."""
    found = {}
    for split in ("validation", "test"):
        x, labels = digits(seed)[split]
        rates = net.rates(x)
        found[split] = 100 * net.readout(rates).argmax(-1).eq(labels).float().mean().item()
    if isinstance(net.dendrites, Dendrites):
        matrices = [getattr(module, name) for module, name in net.prunable()]
        zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
        synapses = sum(matrix.numel() for matrix in matrices)
    else:
        zeros, synapses = 0, sum(parameter.numel() for parameter in net.dendrites.parameters() if parameter.dim() > 1)
    # Each synapse that is left passes each pixel on once per step, each spike reaches all classes.
    operations = STEPS * (synapses - zeros) + STEPS * CLASSES * rates.sum(1).mean().item()
    return found | {"sparsity": zeros / synapses, "operations": operations}


def choose_rates(epochs: int = EPOCHS) -> dict[str, float]:
    """For each network the rate of the best mean validation score over the seeds `TUNING`; pruning keeps it."""
    chosen = {}
    for network in (LINEAR, WIDE, NDI, CATALOGUE):
        scores = {
            rate: np.mean([measure(train(Arm(network), 0.0, rate, s, epochs), s)["validation"] for s in TUNING])
            for rate in RATES
        }
        chosen[network] = max(scores, key=lambda rate: scores[rate])
    return chosen


def run_seed(seed: int, quick: bool, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """All arms; the seed decides the split, the first weights and the order of digits."""
    rows = []
    for name, arm in ARMS.items():
        for amount in arm.amounts[::3] if quick else arm.amounts:
            net = train(arm, amount, rates[arm.network], seed, 3 if quick else EPOCHS)
            place = {"arm": name, "amount": amount, "rate": rates[arm.network], "seed": seed}
            trained = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
            rows.append({**place, "parameters": trained, **measure(net, seed)})
    return rows


# -- what came out -----------------------------------------------------------------------------------------------------


def values(rows: Sequence[Mapping[str, Any]], arm: str, amount: float, column: str = "test") -> np.ndarray:
    """A column of one arm and amount, in the order of seeds."""
    return np.array(list(by_seed(rows, column, arm=arm, amount=amount).values()))


def amounts(rows: Sequence[Mapping[str, Any]], arm: str) -> list[float]:
    return sorted({row["amount"] for row in rows if row["arm"] == arm})


def nearest(rows: Sequence[Mapping[str, Any]], arm: str, share: float = TARGET) -> float:
    """The amount that leaves the share of zeros nearest to the one wanted, in the mean over seeds."""
    return min(amounts(rows, arm), key=lambda a: abs(values(rows, arm, a, "sparsity").mean() - share))


def advantage(rows: Sequence[Mapping[str, Any]], arm: str, rival: str, dense: str) -> list[float]:
    """Seed by seed, the accuracy of an arm minus that of its rival at equal sparsity, in the mean over its amounts.

    The rival's accuracy is interpolated between its amounts and the dense network. What is sparser than all of them is
    left out.
    """
    rival_amounts = amounts(rows, rival)
    curve = np.array([values(rows, dense, 0.0), *(values(rows, rival, a) for a in rival_amounts)])
    places = np.array([[0.0] * curve.shape[1], *(values(rows, rival, a, "sparsity") for a in rival_amounts)])
    gaps = []
    for a in amounts(rows, arm):
        sparsity, accuracy = values(rows, arm, a, "sparsity"), values(rows, arm, a)
        if sparsity.max() <= places[-1].min():
            rivals = [np.interp(s, places[:, n], curve[:, n]) for n, s in enumerate(sparsity)]
            gaps.append(accuracy - rivals)
    return np.mean(gaps, axis=0).tolist() if gaps else []


def claims(rows: Sequence[Mapping[str, Any]]) -> list[Claim]:
    def difference(first: str, second: str, amount: float = 0.0) -> list[float]:
        return (values(rows, first, amount) - values(rows, second, 0.0)).tolist()

    best = nearest(rows, SPINES_NDI)
    share = values(rows, SPINES_NDI, best, "sparsity").mean()
    points, equal = "difference of test accuracies, points", "difference of test accuracies at equal sparsity, points"
    return [
        Claim("Nonlinear dendrites improve on linear ones of equal width", points, difference(NDI, LINEAR)),
        Claim("They improve on linear ones with as many parameters", points, difference(NDI, WIDE)),
        Claim(
            f"{SPINES_NDI} at about {TARGET:.0%} zeros loses less than half a point against the dense linear network",
            points,
            difference(SPINES_NDI, LINEAR, best),
            "above",
            -0.5,
            note=f"D = {best:g}, {share:.0%} zeros",
        ),
        Claim("Spine pruning beats magnitude pruning", equal, advantage(rows, SPINES, MAGNITUDE, LINEAR)),
        Claim(
            "It does so with gains and nonlinear dendrites",
            equal,
            advantage(rows, SPINES_NDI, MAGNITUDE_NDI, NDI),
            note="both prune the network with nonlinear dendrites",
        ),
        Claim(
            "It is the best on three sets of event streams",
            points,
            [],
            note="DVS128 Gesture, CIFAR10-DVS and SHD are not at hand",
        ),
    ]


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for a in amounts(rows, arm):
            accuracy = over_seeds(values(rows, arm, a))
            first = next(row for row in rows if row["arm"] == arm)
            cells = [arm, "-" if a == 0 else f"{a:g}", f"{first['parameters']:,}", f"{first['rate']:g}"]
            cells.append(f"{values(rows, arm, a, 'sparsity').mean():.1%}")
            cells.append(f"{accuracy.estimate:.2f} [{accuracy.low:.2f}, {accuracy.high:.2f}]")
            lines.append([*cells, f"{values(rows, arm, a, 'operations').mean():,.0f}"])
    header = ["arm", "D or share", "trained", "rate", "zeros", "test accuracy, %", "synaptic operations per digit"]
    return markdown(header, lines)


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    pruned = {SPINES: (LINEAR, "-"), MAGNITUDE: (LINEAR, "--"), SPINES_NDI: (NDI, "-"), MAGNITUDE_NDI: (NDI, "--")}
    for number, (arm, (dense, style)) in enumerate(pruned.items()):
        places = [(dense, 0.0), *((arm, a) for a in amounts(rows, arm))]
        x = [100 * values(rows, *place, "sparsity").mean() for place in places]
        found = [over_seeds(values(rows, *place)) for place in places]
        reach = [interval.estimate - interval.low for interval in found]
        y = [interval.estimate for interval in found]
        axes.errorbar(x, y, reach, marker="o", capsize=3, linestyle=style, color=COLOURS[number], label=arm)
    axes.axhline(values(rows, WIDE, 0.0).mean(), color=COLOURS[4], linestyle=":", label=f"{WIDE} (mean)")
    axes.axhline(values(rows, CATALOGUE, 0.0).mean(), color=COLOURS[6], linestyle="-.", label=f"{CATALOGUE} (mean)")
    axes.set_xlabel("synapses that are zero, %")
    axes.set_ylabel("test accuracy, % (95 % t intervals)")
    axes.legend(loc="lower left")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, seeds=5).parse_args(argv)
    rates = dict.fromkeys((LINEAR, WIDE, NDI, CATALOGUE), RATES[1]) if options.quick else choose_rates()
    rows = [
        row for seed in range(2 if options.quick else options.seeds) for row in run_seed(seed, options.quick, rates)
    ]
    publish(Path(__file__).parent, rows, claims(rows), tables(rows), draw(rows), quick=options.quick)


if __name__ == "__main__":
    main()
