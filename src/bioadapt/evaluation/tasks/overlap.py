"""Which rows stand in two sets: the leak from training to test, and the test rows that are clean of it.

Two rows are the same if their texts agree in letters and digits, whatever the case, the spaces and the punctuation; of
a pair, in either order. A pair is not the same as another one because they share a sentence.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .task import Task

    T = TypeVar("T", bound=Task)


def normal_form(text: str) -> str:
    """The letters and digits of a text, without case."""
    return "".join(character for character in text.casefold() if character.isalnum())


@dataclass
class Overlap:
    """Who has which rows: ``places[key]`` are the (set, split) in which a row stands."""

    places: dict[Hashable, set[tuple[str, str]]] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, tasks: Iterable[Task]) -> Overlap:
        overlap = cls()
        for task in tasks:
            overlap.add(task)
        return overlap

    def add(self, task: Task) -> None:
        """Take up all rows of a set, unless one of its name is known."""
        if task.source in self._known:
            return
        self._known.add(task.source)
        for split, size in task.sizes.items():
            for key in task.keys(split) if size else ():
                self.places.setdefault(key, set()).add((task.source, split))

    def without_leaks(self, task: T) -> tuple[T, dict[str, int]]:
        """The task without training rows that stand in any test set or in its own validation rows.

        Of the validation rows those go that stand in its own test rows.

        Returns:
            The task, and how many rows each split has lost.
        """
        lost: dict[str, int] = {}

        def leaks(split: str, place: tuple[str, str]) -> bool:
            name, other = place
            if split == "validation":
                return place == (task.source, "test")
            return other == "test" or (name, other) == (task.source, "validation")

        for split in ("train", "validation"):
            if not task.sizes.get(split):
                continue
            keys = task.keys(split)
            kept = [i for i, key in enumerate(keys) if not any(leaks(split, p) for p in self.places.get(key, ()))]
            if len(kept) < len(keys):
                lost[split] = len(keys) - len(kept)
                task = task.keep(split, kept)
        return task, lost

    def clean(self, task: Task, listed: Mapping[str, Iterable[int]] | None = None) -> list[int]:
        """Test rows, by place, that stand neither in another set nor in the task's own training or validation rows.

        Args:
            task: whose test rows.
            listed: by split, rows that are known to stand elsewhere too, in sets that are perhaps not at hand.
        """
        known = set((listed or {}).get("test", ()))
        return [
            place
            for place, key in enumerate(task.keys("test"))
            if place not in known and self.places.get(key, set()) <= {(task.source, "test")}
        ]
