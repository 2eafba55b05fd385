"""What a primitive carries from one decoding step to the next.

The tensors live on the key-value cache of the model, so that they are reordered with it in beam search, cropped with
it in assisted decoding, and die with it. A primitive sees only its own part, a `Recollection`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Assisted decoding takes back tokens that the large model rejects; a recurrence cannot run backwards, so this many
# past states are kept beyond what the next step needs.
UNDO_WINDOW = 64


class Memory:
    """All carried series of one cache, by key; each (B, n, ...), newest last.

    ``needed``: how many of its newest entries a primitive asks for.
    """

    def __init__(self) -> None:
        self.series: dict[str, Tensor] = {}
        self.seen: dict[str, int] = {}
        self.needed: dict[str, int] = {}

    def part(self, key: str, heard: int | None = None) -> Recollection:
        return Recollection(self, key, heard)

    def append(self, key: str, new: Tensor, keep: int) -> None:
        old = self.series.get(key)
        self.seen[key] = self.seen.get(key, 0) + new.shape[1]
        self.needed[key] = keep
        joined = new if old is None else torch.cat([old, new], dim=1)
        self.series[key] = joined[:, -(keep + UNDO_WINDOW) :]

    def get(self, key: str, heard: int | None) -> Tensor | None:
        """A series, None before the first token.

        Args:
            key: of the series.
            heard: how many tokens there have been, where that is known.

        Raises:
            ValueError: the series has not seen all of them.
        """
        seen = self.seen.get(key, 0)
        if heard is not None and seen != heard:
            raise ValueError(
                f"the cache holds {heard} tokens, of which {key} has seen {seen}: it was filled before the adapter "
                "was added, while it was inactive or disabled, or in training, or the layer was not called on every "
                "token. Start from an empty cache"
            )
        return self.series.get(key)

    def crop(self, tokens: int) -> None:
        """Forget the newest ``tokens`` entries of every series.

        Raises:
            ValueError: more is taken back than is kept.
        """
        for key in list(self.series):
            kept, seen = self.series[key].shape[1], self.seen[key]
            if tokens >= seen:
                del self.series[key], self.seen[key]
            elif tokens >= kept:
                raise ValueError(
                    f"the cache was cropped by {tokens} tokens, but {key} can take back at most {kept - 1}: "
                    "decode again from the start, or use pointwise primitives with this decoding strategy"
                )
            elif tokens:
                self.series[key] = self.series[key][:, :-tokens]
                self.seen[key] = seen - tokens

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace every series by ``fn(series)``: reorder, repeat or select along the batch axis."""
        self.series = {key: fn(value) for key, value in self.series.items()}

    def update(self, other: Memory) -> None:
        """Take over all series of another memory."""
        self.series.update(other.series)
        self.seen.update(other.seen)
        self.needed.update(other.needed)

    def clear(self) -> None:
        self.series.clear()
        self.seen.clear()


class Recollection:
    """One primitive's part of a `Memory`, when ``heard`` tokens have gone by (None: nobody counts them)."""

    def __init__(self, memory: Memory, key: str, heard: int | None = None) -> None:
        self.memory, self.key, self.heard = memory, key, heard

    def part(self, key: str) -> Recollection:
        return Recollection(self.memory, f"{self.key}/{key}", self.heard)

    def last(self, name: str) -> Tensor | None:
        """The newest entry of a series, (B, ...), or None before the first token."""
        series = self.memory.get(f"{self.key}/{name}", self.heard)
        return None if series is None else series[:, -1]

    def latest(self, name: str, count: int) -> Tensor | None:
        """Up to ``count`` newest entries of a series, (B, n <= count, ...), or None before the first token."""
        series = self.memory.get(f"{self.key}/{name}", self.heard)
        return None if series is None else series[:, -count:]

    def append(self, name: str, series: Tensor, keep: int = 1) -> None:
        """Add the entries (B, T, ...) of this step; ``keep`` is how many the next step will ask for."""
        self.memory.append(f"{self.key}/{name}", series, keep)


class Notes(Recollection):
    """What one primitive's `Recollection` holds, under names that are the same at every layer, and what it adds.

    For a compiled region: it reads and writes these alone, so that one graph serves all layers and all steps.
    """

    def __init__(self, before: dict[str, Tensor], after: dict[str, tuple[Tensor, int]], key: str = "") -> None:
        self.before, self.after, self.key = before, after, key

    @classmethod
    def of(cls, source: Recollection) -> Notes:
        memory, start = source.memory, f"{source.key}/"
        held = {key.removeprefix(source.key): key for key in memory.series if key.startswith(start)}
        # Copies, so that how long the whole series is does not matter to the graph.
        return cls({name: memory.series[key][:, -memory.needed[key] :].clone() for name, key in held.items()}, {})

    def part(self, key: str) -> Notes:
        return Notes(self.before, self.after, f"{self.key}/{key}")

    def last(self, name: str) -> Tensor | None:
        series = self.before.get(f"{self.key}/{name}")
        return None if series is None else series[:, -1]

    def latest(self, name: str, count: int) -> Tensor | None:
        series = self.before.get(f"{self.key}/{name}")
        return None if series is None else series[:, -count:]

    def append(self, name: str, series: Tensor, keep: int = 1) -> None:
        self.after[f"{self.key}/{name}"] = (series, keep)

    def enter(self, target: Recollection) -> None:
        """Write what was added where the notes came from.

        Raises:
            ValueError: a series has not seen all tokens.
        """
        for name in self.after:
            target.memory.get(target.key + name, target.heard)
        for name, (series, keep) in self.after.items():
            target.memory.append(target.key + name, series, keep)
