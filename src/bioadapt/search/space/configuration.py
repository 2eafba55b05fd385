"""A point of the space: which primitives, where, how strong, on what population, at which rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ... import primitive_info

if TYPE_CHECKING:
    from ...config import Composition


@dataclass(frozen=True)
class Slot:
    """One primitive of a configuration.

    Attributes:
        primitive: its registry name.
        layers: ``all``, ``lower`` or ``upper`` (halves of the blocks), or the number of one; ``home`` where the
            primitive has a home in this model.
        modules: ``all``, or the name of one module within a block.
        strength: factor on what is zero at birth in the primitive: how much faster than usual it learns.
    """

    primitive: str
    layers: str
    modules: str
    strength: float

    @property
    def place(self) -> str:
        return f"{self.layers} {self.modules}"

    def entry(self, rank: int | None) -> str | dict[str, Any]:
        """As a `BioConfig` lists it. What is zero at birth takes the strength as a factor.

        A change ``s * gate * f(x)`` whose gate starts at zero and is trained by Adam with rate r is the same as
        ``gate * f(x)`` with the rate s * r, since Adam's steps do not depend on the size of a gradient.
        """
        if self.strength == 1:
            return self.primitive
        usual = 1.0 if rank is not None else primitive_info(self.primitive).fresh_zero_scale
        return {"name": self.primitive, "zero_scale": usual * self.strength}


@dataclass(frozen=True)
class Configuration:
    """A point of the space as it is built: within the budget, without what has no effect.

    Attributes:
        slots: the primitives in their order.
        rank: size of the population that they run on; None for the full output.
        composition: as in `BioConfig`.
        learning_rate: of all that is trained.
    """

    slots: tuple[Slot, ...]
    rank: int | None
    composition: Composition
    learning_rate: float

    def record(self) -> dict[str, Any]:
        """As JSON can hold it; `from_record` is the way back."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Configuration:
        slots = tuple(Slot(**slot) for slot in record["slots"])
        return cls(slots, record["rank"], record["composition"], record["learning_rate"])
