"""The space of bio adapters: which primitives, in which order, where, how strong, on what, how fast."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import combinations
from typing import Any, cast

import optuna

from ... import BioConfig, primitive_info
from ..._words import suggest
from ..settings import SLOTS
from ..thompson import Feature
from .configuration import Configuration, Slot
from .model import SearchedModel, SearchedModule
from .places import ALL, HOME, LOWER, UPPER, Place, places_of
from .size import disjoint_tuples, heaps

NONE, FULL = "none", "full"
RANKS: tuple[int | str, ...] = (FULL, 4, 8, 16, 32)
STRENGTHS = (0.3, 1.0, 3.0)
COMPOSITIONS = ("serial", "staged", "parallel")
# As far as a LoRA's own go, which is trained at the same rate where it is trained along.
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

# How far effects are believed to reach before anything is seen, relative to that of a primitive being there.
_AT_PLACE, _STRENGTH, _STAGE, _ORDER = 0.5, 0.33, 0.5, 0.5


class SearchSpace:
    """Every way to put from none to ``slots`` primitives into a model, within a budget of parameters.

    A primitive occurs at most once in a configuration, in one slot, which may cover many modules. The order of the
    slots matters where the composition is serial and two of them share a module. One that has a home in this model,
    such as the head of a language model, is there wherever a slot puts it.

    What the constraints forbid cannot be proposed: primitives that some site refuses are no choice, nor are those that
    exceed the budget wherever they are put; slots that no longer fit the budget are dropped, from the last on, and so
    is a slot whose primitive an earlier slot has.

    Args:
        host: what the model offers.
        budget: the most trainable numbers that a configuration may have; None for no limit.
        slots: the most primitives that a configuration may have.
        ranks: sizes of the population, or ``"full"`` for the layer's full output; those that exceed the narrowest
            module's width are left out. Primitives of kind ``weight``, which have sizes of their own, ignore it, and
            so do those at home.
        strengths: factors on what is zero at birth in a primitive (its setting ``zero_scale``): how fast it learns.
        compositions: as in `BioConfig`.
        learning_rates: the grid.

    Raises:
        ValueError: an empty or wrong list of choices, or a budget below what any primitive needs.
    """

    def __init__(
        self,
        host: SearchedModel,
        *,
        budget: int | None = None,
        slots: int = SLOTS,
        ranks: Sequence[int | str] = RANKS,
        strengths: Sequence[float] = STRENGTHS,
        compositions: Sequence[str] = COMPOSITIONS,
        learning_rates: Sequence[float] = LEARNING_RATES,
    ) -> None:
        _check(slots, ranks, strengths, compositions, learning_rates)
        self.host, self.budget, self.slots = host, budget, slots
        width = min(site.d_out for site in host.sites)
        fitting = tuple(rank for rank in ranks if rank == FULL or int(rank) <= width)
        if not fitting:
            raise ValueError(f"ranks={list(ranks)}: a module of this model has {width} features, no rank can be larger")
        self.ranks, self.strengths = fitting, tuple(float(s) for s in strengths)
        self.compositions, self.learning_rates = tuple(compositions), tuple(float(rate) for rate in learning_rates)
        self._kinds = {name: primitive_info(name).kind for name in host.primitives}
        self._stages = {name: primitive_info(name).stage for name in host.primitives}
        # Those at home and those of kind weight: no rank holds for them, and in which order they come means nothing.
        self._apart = {name for name in host.primitives if self._kinds[name] == "weight" or name in host.homes}
        self._sites = (*host.sites, *dict.fromkeys(host.homes.values()))
        self._homes = {name: (HOME, home.kind) for name, home in host.homes.items()}
        self._anywhere = places_of(host.sites)
        at_home = {(HOME, home.kind): (self._sites.index(home),) for home in host.homes.values()}
        self.places = self._anywhere | at_home
        self._masks = {place: sum(1 << i for i in sites) for place, sites in self.places.items()}
        self._counts: dict[tuple[str, int, int], int] = {}
        self._costs: dict[tuple[str, Place, int | None], int] = {}
        self.too_large = tuple(name for name in host.primitives if not self._fits_somewhere(name))
        self.primitives = tuple(name for name in host.primitives if name not in self.too_large)
        if not self.primitives:
            raise ValueError(f"budget of {budget} parameters: no primitive is so small on this model")

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layers for layers, _ in self._anywhere))

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(modules for _, modules in self._anywhere))

    # -- from a trial to a configuration --

    @cached_property
    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """Every parameter of the space."""
        choice = optuna.distributions.CategoricalDistribution
        space = {
            "composition": choice(self.compositions),
            "learning_rate": choice(self.learning_rates),
            "rank": choice(self.ranks),
        }
        for number in range(1, self.slots + 1):
            space[f"slot{number}.primitive"] = choice((NONE, *self.primitives))
            space[f"slot{number}.layers"] = choice(self.layers)
            space[f"slot{number}.modules"] = choice(self.modules)
            space[f"slot{number}.strength"] = choice(self.strengths)
        return space

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """The parameters of a trial; where a slot is empty, its place and strength are not asked for."""

        def choose(name: str) -> Any:
            return trial.suggest_categorical(name, self.distributions[name].choices)

        params = {name: choose(name) for name in ("composition", "learning_rate", "rank")}
        for number in range(1, self.slots + 1):
            params[f"slot{number}.primitive"] = choose(f"slot{number}.primitive")
            if params[f"slot{number}.primitive"] != NONE:
                for part in ("layers", "modules", "strength"):
                    params[f"slot{number}.{part}"] = choose(f"slot{number}.{part}")
        return params

    def alone(self, primitive: str, learning_rate: float | None = None) -> dict[str, Any]:
        """Parameters of the configuration with one primitive, at the widest place that the budget allows.

        Its rate is the one next to ``learning_rate``, the middle one if None.
        """
        rank, fitting = next(
            (rank, places)
            for rank in sorted(self.ranks, key=lambda rank: rank != FULL)
            if (places := [place for place in self._anywhere if self._fits(primitive, place, rank)])
        )
        layers, modules = max(fitting, key=lambda place: len(self.places[place]))
        params: dict[str, Any] = {f"slot{number}.primitive": NONE for number in range(2, self.slots + 1)}
        usual = learning_rate or self.learning_rates[len(self.learning_rates) // 2]
        strength = min(self.strengths, key=lambda s: abs(math.log(s)))
        return params | {
            "composition": self.compositions[0],
            "learning_rate": min(self.learning_rates, key=lambda rate: abs(math.log(rate / usual))),
            "rank": rank,
            "slot1.primitive": primitive,
            "slot1.layers": layers,
            "slot1.modules": modules,
            "slot1.strength": strength,
        }

    def realise(self, params: Mapping[str, Any]) -> Configuration:
        """The configuration that parameters stand for. A slot that is missing, or has no strength, is an empty one."""
        rank = _number(params.get("rank", self.ranks[0]))
        slots: list[Slot] = []
        placed: list[tuple[str, Place]] = []
        for number in range(1, self.slots + 1):
            name, strength = params.get(f"slot{number}.primitive", NONE), params.get(f"slot{number}.strength")
            place = self._place(name, (params.get(f"slot{number}.layers"), params.get(f"slot{number}.modules")))
            taken = any(name == slot.primitive for slot in slots)
            if name == NONE or strength is None or place not in self.places or taken:
                continue
            placed.append((name, place))
            slots.append(Slot(name, *place, strength=float(strength)))
        while slots and not self._within(self._cost(placed, rank)):
            slots.pop()
            placed.pop()
        return self._canonical(slots, rank, params)

    def _canonical(self, slots: list[Slot], rank: int | None, params: Mapping[str, Any]) -> Configuration:
        """Equal for equal adapters: what means nothing has its first choice, what commutes is in order of name."""
        composition = params.get("composition", self.compositions[0])
        rate = float(params.get("learning_rate", self.learning_rates[0]))
        free = [slot for slot in slots if slot.primitive not in self._apart]
        if not free:
            rank = _number(self.ranks[0])
        if not slots:
            rate = self.learning_rates[0]
        if not any(self._share(a, b) for a, b in combinations(free, 2)):
            composition = self.compositions[0]
        return Configuration(tuple(self._in_order(slots, composition)), rank, composition, rate)

    def _in_order(self, slots: list[Slot], composition: str) -> list[Slot]:
        """The first by name among the orders that mean the same."""
        if composition != "serial":
            return sorted(slots, key=lambda slot: slot.primitive)
        left, ordered = list(slots), []
        while left:
            ready = [slot for i, slot in enumerate(left) if not any(self._bound(slot, o) for o in left[:i])]
            ordered.append(min(ready, key=lambda slot: slot.primitive))
            left.remove(ordered[-1])
        return ordered

    def _bound(self, a: Slot, b: Slot) -> bool:
        """Whether it matters in a series which of two comes first."""
        return not self._apart & {a.primitive, b.primitive} and self._share(a, b)

    def _place(self, primitive: str, place: tuple[Any, Any]) -> tuple[Any, Any]:
        """Where a slot with this place has a primitive."""
        return self._homes.get(primitive, place)

    def _share(self, a: Slot, b: Slot) -> bool:
        return bool(self._masks[a.layers, a.modules] & self._masks[b.layers, b.modules])

    # -- what it costs --

    def parameters(self, configuration: Configuration) -> int:
        """Trainable numbers of a configuration."""
        placed = [(slot.primitive, (slot.layers, slot.modules)) for slot in configuration.slots]
        return self._cost(placed, configuration.rank)

    def _within(self, count: int) -> bool:
        return self.budget is None or count <= self.budget

    def _fits_somewhere(self, name: str) -> bool:
        return any(self._fits(name, place, rank) for place in self._anywhere for rank in self.ranks)

    def _fits(self, name: str, place: Place, rank: int | str) -> bool:
        return self._within(self._cost([(name, self._place(name, place))], _number(rank)))

    def _cost(self, placed: Sequence[tuple[str, Place]], rank: int | None) -> int:
        total, populated = 0, 0
        for name, place in placed:
            population = None if name in self._apart else rank
            key = (name, place, population)
            if key not in self._costs:
                self._costs[key] = sum(self._count(name, self._sites[i], population) for i in self.places[place])
            total += self._costs[key]
            if population is not None:
                populated |= self._masks[place]
        if populated:
            assert rank is not None
            total += sum(2 * rank * site.d_out for i, site in enumerate(self.host.sites) if populated >> i & 1)
        return total

    def _count(self, name: str, site: SearchedModule, population: int | None) -> int:
        key = (name, site.d_in, site.d_out if population is None else population)
        if key not in self._counts:
            self._counts[key] = primitive_info(name).parameter_count(*key[1:])
        return self._counts[key]

    # -- what the adapter is --

    def configs(self, configuration: Configuration) -> list[BioConfig]:
        """The adapters, to be active together: modules with equal lists share one; none for an empty configuration."""
        lists: dict[tuple[tuple[Slot, ...], int | None], list[str]] = {}
        for i, site in enumerate(self._sites):
            here = [slot for slot in configuration.slots if i in self.places[slot.layers, slot.modules]]
            apart = tuple(slot for slot in here if slot.primitive in self._apart)
            others = tuple(slot for slot in here if slot not in apart)
            groups = [(apart + others, None)] if configuration.rank is None else [
                (apart, None), (others, configuration.rank)
            ]  # fmt: skip
            for slots, rank in groups:
                if slots:
                    lists.setdefault((slots, rank), []).append(site.path)
        return [
            BioConfig(
                primitives=[slot.entry(rank) for slot in slots],
                target_modules=_exactly(paths),
                rank=rank,
                composition=cast(Any, configuration.composition),
            )
            for (slots, rank), paths in lists.items()
        ]

    # -- what the sampler's model sees --

    def features(self, params: Mapping[str, Any]) -> dict[Feature, float]:
        """Named features of the configuration that parameters stand for; equal configurations have equal ones.

        A primitive, that primitive at a place, its stage, its strength, pairs of primitives, the order of two that
        share a module, rank, composition and learning rate. Smaller numbers mean that less is expected of a feature.
        """
        configuration = self.realise(params)
        slots = configuration.slots
        features: dict[Feature, float] = {
            f"rank {configuration.rank or FULL}": 1.0,
            f"learning rate {configuration.learning_rate:g}": 1.0,
            f"composition {configuration.composition}": 1.0,
        }
        for slot in slots:
            stage = f"stage {self._stages[slot.primitive]}"
            features[stage] = features.get(stage, 0.0) + _STAGE
            features[slot.primitive] = 1.0
            if slot.layers != HOME:
                features[f"{slot.primitive} @ {slot.place}"] = _AT_PLACE
            if slot.strength != 1:
                features[f"{slot.primitive} strength"] = _STRENGTH * math.log(slot.strength, 3)
        serial = configuration.composition == "serial"
        for first, second in combinations(slots, 2):
            a, b = sorted((first.primitive, second.primitive))
            features[a, b] = 1.0
            if serial and self._bound(first, second):
                # A tuple of one name makes the order of two primitives an interaction: it is heavily shrunk, and
                # needs many trials.
                features[(f"{a} before {b}",)] = _ORDER if first.primitive == a else -_ORDER
        return features

    # -- how large it is --

    def size(self) -> int:
        """The exact number of distinct configurations, the budget not counted.

        Two configurations are distinct if a module has another list of primitives, or one of them another strength, if
        the order of two that share a module differs and is serial, or composition, rank or learning rate differ where
        they mean something. Orders are counted as heaps of pieces: n labelled pieces, each at one of the places, make
        ``n! [t^n] 1 / sum_j (-1)^j d_j t^j / j!`` heaps, where d_j counts j-tuples of disjoint places (Viennot, 1986,
        "Heaps of pieces, I: basic definitions and combinatorial lemmas").
        """
        at_home = sum(name in self._homes for name in self.primitives)
        on_weight = sum(name in self._apart for name in self.primitives) - at_home
        others = len(self.primitives) - on_weight - at_home
        places, rates, ranks = len(self._anywhere), len(self.learning_rates), len(self.ranks)
        disjoint = disjoint_tuples(self._anywhere, self.slots, (ALL, LOWER, UPPER))
        heaped = heaps(disjoint)
        serial, commuting = "serial" in self.compositions, len(self.compositions) - ("serial" in self.compositions)
        total = 1
        for free in range(self.slots + 1):
            sharing = places**free - disjoint[free]
            arranged = disjoint[free] + commuting * sharing + serial * (heaped[free] - disjoint[free])
            for bound in range(self.slots + 1 - free):
                for resident in range(self.slots + 1 - free - bound):
                    if filled := free + bound + resident:
                        chosen = math.comb(others, free) * math.comb(on_weight, bound) * math.comb(at_home, resident)
                        settings = len(self.strengths) ** filled * rates * (ranks if free else 1)
                        total += chosen * arranged * places**bound * settings
        return total

    def record(self) -> dict[str, Any]:
        """As JSON can hold it; `from_record` is the way back."""
        return {
            "size": str(self.size()),
            "slots": self.slots,
            "primitives": list(self.primitives),
            "places": [f"{layers} {modules}" for layers, modules in self.places],
            "learning_rates": list(self.learning_rates),
            "ranks": list(self.ranks),
            "strengths": list(self.strengths),
            "compositions": list(self.compositions),
            "budget": self.budget,
            "too_large": list(self.too_large),
            "host": self.host.record(),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> SearchSpace:
        """The space that a study was made with."""
        names = ("budget", "slots", "ranks", "strengths", "compositions", "learning_rates")
        return cls(SearchedModel.from_record(record["host"]), **{name: record[name] for name in names})


def _number(rank: int | str) -> int | None:
    return None if rank == FULL else int(rank)


def _exactly(paths: Sequence[str]) -> list[str] | str:
    """Targets that mean these modules alone: PEFT reads a name in a list as the end of a path."""
    return "|".join(path.replace(".", r"\.") for path in paths)


def _check(
    slots: int,
    ranks: Sequence[int | str],
    strengths: Sequence[float],
    compositions: Sequence[str],
    learning_rates: Sequence[float],
) -> None:
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise ValueError(f"slots={slots!r}: an integer of at least 1 is needed")
    for rank in ranks:
        if rank != FULL and (isinstance(rank, (bool, str)) or int(rank) != rank or rank < 1):
            raise ValueError(f"ranks: {rank!r} is not accepted; 'full' and integers of at least 1 are")
    for name, values in (("strengths", strengths), ("learning_rates", learning_rates)):
        for value in values:
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: {value!r} is not accepted; numbers above zero are")
    for composition in compositions:
        if composition not in COMPOSITIONS:
            raise ValueError(f"compositions: {composition!r}; {suggest(composition, COMPOSITIONS)}")
    choices = {"ranks": ranks, "strengths": strengths, "compositions": compositions, "learning_rates": learning_rates}
    for name, choice in choices.items():
        if not choice or len(set(choice)) < len(choice):
            raise ValueError(f"{name}={list(choice)}: at least one choice is needed, each once")
