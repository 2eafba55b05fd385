"""Does a neuron with potassium channels code better, and is a network of such neurons more robust to noise?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import mutual_info_score
from sklearn.model_selection import train_test_split
from torch import Tensor

from bioadapt.circuits.spiking_network import LEAK, SpikingClassifier, constants_at_birth, fire
from experiments.kv_lif.training import accuracy, fit
from experiments.ledger import COLOURS, Claim, by_seed, markdown, over_seeds, parser, publish

FOLDER = Path(__file__).parent
LIF, KV = "leaky_integrate_fire", "kv_lif"
NEURONS = (LIF, KV)
SHORT = {LIF: "LIF", KV: "KvLIF"}
Row = dict[str, Any]

# -- the neuron --
# Amplitudes and noise are in units of the drive under which LIF begins to fire in every step.

STEPS = 16
LEAKS = {"half per step": LEAK, "the primitive's": 0.1}
NOISES = (0.0, 0.15, 0.5, 0.75)
SPANS = (4.0, 1.0)  # amplitudes from 0 to this: mostly where LIF is saturated, and where it is not
FAINT, STRONG = (0.0, 0.6), (1.25, 2.0)  # pairs of amplitudes to be told apart


def saturating(leak: float) -> float:
    """The constant drive under which a leaky integrate-and-fire cell with threshold 1 begins to fire in every step."""
    return -leak / math.expm1(-leak)


def counts(neuron: str, leak: float, amplitudes: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Spikes in `STEPS` steps at each amplitude (n,) with fresh noise in every step: (n,)."""
    drive = amplitudes + noise * torch.randn(1, STEPS, len(amplitudes), generator=generator)
    return fire(saturating(leak) * drive, constants_at_birth(neuron, leak))[0].sum((0, 1))


def bits(neuron: str, leak: float, span: float, noise: float, trials: int, generator: torch.Generator) -> float:
    """Mutual information of the amplitude, uniform up to ``span`` and cut into 64 bins, and the spike count."""
    shares = torch.rand(trials, generator=generator)
    spikes = counts(neuron, leak, span * shares, noise, generator)
    return mutual_info_score((64 * shares).long().numpy(), spikes.numpy()) / math.log(2)


def response(neuron: str, leak: float) -> tuple[Tensor, Tensor]:
    """Amplitudes (801,) up to the larger span and the noiseless rate at each, in spikes per step over 160 steps."""
    amplitudes = torch.linspace(0, SPANS[0], 801)
    drive = saturating(leak) * amplitudes.expand(1, 160, -1)
    return amplitudes, fire(drive, constants_at_birth(neuron, leak))[0].mean((0, 1))


def input_range(neuron: str, leak: float) -> tuple[float, float]:
    """The lowest amplitudes that reach 10 % and 90 % of the highest rate up to the larger span."""
    amplitudes, rates = response(neuron, leak)
    low, high = (amplitudes[rates >= share * rates.max()][0].item() for share in (0.1, 0.9))
    return low, high


def sensitivity(neuron: str, leak: float, pair: tuple[float, float], trials: int, generator: torch.Generator) -> float:
    """d' of the counts at two amplitudes; the variance has that of rounding, 1/12, added, as it may be zero."""
    low, high = (counts(neuron, leak, torch.full((trials,), a), NOISES[1], generator) for a in pair)
    return ((high.mean() - low.mean()) / ((high.var() + low.var()) / 2 + 1 / 12).sqrt()).item()


def neuron_rows(seed: int, quick: bool) -> list[Row]:
    """The panel of the single neuron, with the same noise for both."""
    trials, rows = 2000 if quick else 20000, []
    for name, leak in LEAKS.items():
        below = -math.expm1(-leak) / 2  # half of the least drive that fires at all
        for neuron in NEURONS:
            source = torch.Generator().manual_seed(seed)
            found = {}
            for span in SPANS:
                for noise in NOISES:
                    found[f"bits, span {span:g}, noise {noise:g}"] = bits(neuron, leak, span, noise, trials, source)
            for where, amplitude in (("alone", 0.0), ("below threshold", below)):
                silent = torch.full((trials,), amplitude)
                found[f"noise spikes {where}"] = counts(neuron, leak, silent, NOISES[-1], source).mean().item() / STEPS
            found["d' faint"] = sensitivity(neuron, leak, FAINT, trials, source)
            found["d' strong"] = sensitivity(neuron, leak, STRONG, trials, source)
            found["range from"], found["range to"] = input_range(neuron, leak)
            rows += [_row(seed, "neuron", name, neuron, measure, value) for measure, value in found.items()]
    return rows


# -- the network --

WIDTHS, CLASSES = (64, 128, 128), 10
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
DEVELOPMENT = 1000  # a seed for the choice of the learning rate alone
DENSITY = 0.5  # probability of an event at the brightest pixel
Split = dict[str, tuple[Tensor, Tensor]]


def split(seed: int) -> Split:
    """Digits as train, dev and test, 60, 20 and 20 %, each images (N, 64) in [0, 1] and labels."""
    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    train, dev = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=seed)
    x, y = torch.from_numpy(images / 16).float(), torch.from_numpy(labels)
    return {name: (x[rows], y[rows]) for name, rows in (("train", train), ("dev", dev), ("test", test))}


def pictures(images: Tensor, condition: str, generator: torch.Generator) -> Tensor:
    """The image as a constant drive of six steps, (N, 6, 64), plus noise: "temporal S", "frozen S" or "clean"."""
    kind, _, size = condition.partition(" ")
    series = images[:, None].repeat(1, 6, 1)
    if kind == "temporal":
        series += float(size) * torch.randn(series.shape, generator=generator)
    elif kind == "frozen":
        series += float(size) * torch.randn(images.shape, generator=generator)[:, None]
    return series


def events(images: Tensor, condition: str, generator: torch.Generator) -> Tensor:
    """Random events, the likelier the brighter the pixel: (N, 16, 64), 0 or 1.

    Noise: "background P" adds events with that probability, "lost P" takes events away with that probability.
    """
    kind, _, size = condition.partition(" ")
    chance = torch.rand((2, len(images), STEPS, images.shape[1]), generator=generator)
    found = chance[0] < DENSITY * images[:, None]
    if kind == "background":
        found |= chance[1] < float(size)
    elif kind == "lost":
        found &= chance[1] >= float(size)
    return found.float()


INPUTS = {
    "constant": (pictures, ("clean", "temporal 0.5", "temporal 1", "frozen 0.25", "frozen 0.5")),
    "events": (events, ("clean", "background 0.1", "background 0.2", "lost 0.5", "lost 0.75")),
}


def trained(neuron: str, inputs: str, data: Split, seed: int, rate: float, quick: bool) -> SpikingClassifier:
    """A network that has learned from clean training rows."""
    encode, (clean, *_) = INPUTS[inputs]
    torch.manual_seed(seed)
    model = SpikingClassifier(WIDTHS, CLASSES, neuron)
    images, labels = data["train"]
    if quick:
        images, labels = images[:256], labels[:256]
    series = encode(images, clean, torch.Generator().manual_seed(seed))
    fit(model, series, labels, rate=rate, epochs=2 if quick else 25, seed=seed)
    return model


def choose_rate(neuron: str, inputs: str, quick: bool) -> float:
    """The learning rate with the best accuracy on clean dev rows of the development seed."""
    data, (encode, (clean, *_)) = split(DEVELOPMENT), INPUTS[inputs]
    images, labels = data["dev"]
    series = encode(images, clean, torch.Generator().manual_seed(DEVELOPMENT + 1))

    def score(rate: float) -> float:
        return accuracy(trained(neuron, inputs, data, DEVELOPMENT, rate, quick), series, labels)

    return max(RATES[1:2] if quick else RATES, key=score)


def network_rows(seed: int, rates: dict[tuple[str, str], float], quick: bool) -> list[Row]:
    """Accuracy in percent on test rows, under each noise; what is drawn is the same for both neurons."""
    data, rows = split(seed), []
    images, labels = data["test"]
    for inputs, (encode, conditions) in INPUTS.items():
        for neuron in NEURONS:
            model = trained(neuron, inputs, data, seed, rates[neuron, inputs], quick)
            for condition in conditions:
                series = encode(images, condition, torch.Generator().manual_seed(seed + 1))
                value = 100 * accuracy(model, series, labels)
                rows.append(_row(seed, "network", inputs, neuron, f"accuracy, {condition}", value))
    return rows


def _row(seed: int, panel: str, setting: str, neuron: str, measure: str, value: float) -> Row:
    return {"seed": seed, "panel": panel, "setting": setting, "neuron": neuron, "measure": measure, "value": value}


# -- what is made of it --


def run_seed(seed: int, quick: bool, rates: dict[tuple[str, str], float] | None = None) -> list[Row]:
    """All rows of one seed; ``rates`` by neuron and kind of input, the middle one where None."""
    rates = rates or {(neuron, inputs): RATES[1] for neuron in NEURONS for inputs in INPUTS}
    return neuron_rows(seed, quick) + network_rows(seed, rates, quick)


def values(rows: Iterable[Row], setting: str, neuron: str, measure: str) -> list[float]:
    """One value per seed, in the order of seeds."""
    return list(by_seed(rows, setting=setting, neuron=neuron, measure=measure).values())


def gains(rows: Sequence[Row], setting: str, measure: str) -> list[float]:
    """KvLIF minus LIF, seed by seed."""
    pairs = zip(*(values(rows, setting, neuron, measure) for neuron in (KV, LIF)), strict=True)
    return [kv - lif for kv, lif in pairs]


def claims(rows: Sequence[Row]) -> list[Claim]:
    """What the source says of the neuron at the leak of one half per step, and of the network."""
    setting, alike = next(iter(LEAKS)), "No noise and no chance: all seeds are alike."
    found = []
    widths = [b - a for a, b in zip(*(gains(rows, setting, f"range {end}") for end in ("from", "to")), strict=True)]
    found.append(Claim("The range of inputs is wider.", "KvLIF - LIF, saturating drives", widths, note=alike))
    ratios = {}
    for neuron in NEURONS:
        ends = (values(rows, setting, neuron, f"range {end}") for end in ("to", "from"))
        ratios[neuron] = [math.log2(high / low) for high, low in zip(*ends, strict=True)]
    octaves = [kv - lif for kv, lif in zip(ratios[KV], ratios[LIF], strict=True)]
    found.append(Claim("The range is wider as a ratio, too.", "KvLIF - LIF, octaves", octaves, note=alike))
    for noise in NOISES:
        gain = gains(rows, setting, f"bits, span {SPANS[0]:g}, noise {noise:g}")
        found.append(Claim(f"The count tells more of the amplitude (noise {noise:g}).", "KvLIF - LIF, bits", gain))
    where = {"alone": "without any other drive", "below threshold": "at half of the least drive that fires"}
    for key, words in where.items():
        text = f"Noise causes fewer spikes ({words})."
        gain = gains(rows, setting, f"noise spikes {key}")
        found.append(Claim(text, "KvLIF - LIF, spikes per step", gain, side="below"))
    for pair, words in (("strong", STRONG), ("faint", FAINT)):
        text = f"{pair.capitalize()} amplitudes, {words[0]:g} and {words[1]:g}, are told apart better."
        found.append(Claim(text, "KvLIF - LIF, d'", gains(rows, setting, f"d' {pair}")))
    gain = gains(rows, setting, f"bits, span {SPANS[1]:g}, noise {NOISES[1]:g}")
    text = f"The count tells more also where LIF is not saturated (noise {NOISES[1]:g})."
    found.append(Claim(text, "KvLIF - LIF, bits", gain))
    gain = gains(rows, list(LEAKS)[1], f"bits, span {SPANS[0]:g}, noise {NOISES[1]:g}")
    text = f"The count tells more also with the slow leak that the primitive is born with (noise {NOISES[1]:g})."
    found.append(Claim(text, "KvLIF - LIF, bits", gain))
    for inputs, (_, conditions) in INPUTS.items():
        for condition in conditions:
            better = "right more often" if condition == "clean" else "more robust"
            text = f"The network is {better} ({inputs}, {condition})."
            gain = gains(rows, inputs, f"accuracy, {condition}")
            found.append(Claim(text, "KvLIF - LIF, points of accuracy", gain))
    return found


def tables(rows: Sequence[Row], rates: dict[tuple[str, str], float] | None = None) -> str:
    """Means over seeds of both neurons, in Markdown."""
    seeds = len({row["seed"] for row in rows})
    found = [f"{seeds} seeds; mean and 95 % interval of LIF, of KvLIF and of the paired difference."]
    for panel, title in (("neuron", "Single neuron"), ("network", "Network, accuracy in percent")):
        cells = dict.fromkeys((row["setting"], row["measure"]) for row in rows if row["panel"] == panel)
        lines = []
        for setting, measure in cells:
            means = [over_seeds(values(rows, setting, neuron, measure)).estimate for neuron in NEURONS]
            gain = over_seeds(gains(rows, setting, measure))
            difference = f"{gain.estimate:+.3g} [{gain.low:+.3g}, {gain.high:+.3g}]"
            lines.append([setting, measure, *(f"{mean:.4g}" for mean in means), difference])
        header = ["leak" if panel == "neuron" else "input", "measure", "LIF", "KvLIF", "KvLIF - LIF"]
        found += ["", f"{title}:", "", markdown(header, lines)]
    if rates is not None:
        chosen = ", ".join(f"{SHORT[neuron]} on {inputs} {rate:g}" for (neuron, inputs), rate in rates.items())
        found += ["", f"Learning rates, chosen on clean dev rows of a seed of their own: {chosen}."]
    return "\n".join(found)


def draw(rows: Sequence[Row]) -> Figure:
    """Responses of the neurons, bits against noise, and what the network gains."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for number, neuron in enumerate(NEURONS):
        for (name, leak), line in zip(LEAKS.items(), ("-", ":"), strict=True):
            left.plot(*response(neuron, leak), line, color=COLOURS[number], label=f"{SHORT[neuron]}, leak {name}")
            means = [over_seeds(values(rows, name, neuron, f"bits, span {SPANS[0]:g}, noise {n:g}")) for n in NOISES]
            middle.plot(NOISES, [m.estimate for m in means], line, marker="o", color=COLOURS[number])
    left.set(xlabel="amplitude (saturating drives of LIF)", ylabel="spikes per step", title="response without noise")
    left.legend()
    middle.set(xlabel="noise per step (saturating drives of LIF)", ylabel="mutual information (bits)", ylim=(0, None))
    middle.set_title("amplitude and spike count")
    labels = [(inputs, condition) for inputs, (_, conditions) in INPUTS.items() for condition in conditions]
    for place, (inputs, condition) in enumerate(labels):
        gain = over_seeds(gains(rows, inputs, f"accuracy, {condition}"))
        reach = np.nan_to_num([[gain.estimate - gain.low], [gain.high - gain.estimate]])
        colour = COLOURS[2 + list(INPUTS).index(inputs)]
        right.errorbar(gain.estimate, place, xerr=reach, fmt="o", color=colour, capsize=3)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(labels)), [f"{inputs}, {condition}" for inputs, condition in labels])
    right.invert_yaxis()
    right.set(xlabel="points of accuracy (mean and 95 % interval)", title="network: KvLIF - LIF")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__, seeds=6).parse_args(argv)
    seeds = range(min(options.seeds, 2) if options.quick else options.seeds)
    rates = {(neuron, inputs): choose_rate(neuron, inputs, options.quick) for neuron in NEURONS for inputs in INPUTS}
    rows = [row for seed in seeds for row in run_seed(seed, options.quick, rates)]
    publish(FOLDER, rows, claims(rows), tables(rows, rates), draw(rows), quick=options.quick)


if __name__ == "__main__":
    main()
