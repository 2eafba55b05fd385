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


class Series:
    """The newest entries of one series, in pieces (B, n, ...), the newest last.

    ``seen``: how many entries there have been. ``needed``: how many of the newest a primitive asks for.
    """

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.seen = self.kept = self.needed = 0

    def append(self, new: Tensor, needed: int) -> None:
        most = needed + UNDO_WINDOW
        piece = new[:, -most:].clone() if new.shape[1] > 1 else new  # the rest is let go
        self.pieces.append(piece)
        self.seen, self.kept, self.needed = self.seen + new.shape[1], self.kept + piece.shape[1], needed
        while self.kept - self.pieces[0].shape[1] >= most:
            self.kept -= self.pieces.pop(0).shape[1]
        if torch.compiler.is_compiling():  # one graph for all steps
            self.map(lambda series: series[:, -most:].clone())

    def latest(self, count: int) -> Tensor:
        """Up to ``count`` newest entries, (B, n <= count, ...)."""
        newest = self.pieces[-1]
        if newest.shape[1] < count and len(self.pieces) > 1:
            self.map(lambda series: series)
            newest = self.pieces[-1]
        return newest if newest.shape[1] <= count else newest[:, -count:]

    def crop(self, tokens: int) -> None:
        """Forget the newest ``tokens`` entries, of which there are more."""
        self.map(lambda series: series[:, :-tokens])
        self.seen -= tokens

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.pieces = [fn(self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces, 1))]
        self.kept = self.pieces[0].shape[1]


class Memory:
    """All carried series of one cache, by key."""

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}

    def part(self, key: str, heard: int | Tensor | None = None) -> Recollection:
        return Recollection(self, key, heard)

    def append(self, key: str, new: Tensor, keep: int) -> None:
        if key not in self.series:
            self.series[key] = Series()
        self.series[key].append(new, keep)

    def get(self, key: str, heard: int | Tensor | None) -> Series | None:
        """A series, None before the first token.

        Args:
            key: of the series.
            heard: how many tokens there have been, where that is known.

        Raises:
            ValueError: the series has not seen all of them.
        """
        found = self.series.get(key)
        seen = 0 if found is None else found.seen
        if isinstance(heard, Tensor):  # counted by a static cache, into which a compiled forward must not look
            torch._assert_async(heard == seen, f"{key} has not seen all tokens of the cache: start from an empty one")
        elif heard is not None and seen != heard:
            raise ValueError(
                f"the cache holds {heard} tokens, of which {key} has seen {seen}: it was filled before the adapter "
                "was added, while it was inactive or disabled, or in training, or the layer was not called on every "
                "token. Start from an empty cache"
            )
        return found

    def crop(self, tokens: int) -> None:
        """Forget the newest ``tokens`` entries of every series.

        Raises:
            ValueError: more is taken back than is kept.
        """
        for key, series in list(self.series.items()):
            most = min(series.kept, series.needed + UNDO_WINDOW) - 1
            if tokens >= series.seen:
                del self.series[key]
            elif tokens > most:
                raise ValueError(
                    f"the cache was cropped by {tokens} tokens, but {key} can take back at most {most}: "
                    "decode again from the start, or use pointwise primitives with this decoding strategy"
                )
            elif tokens:
                series.crop(tokens)

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace what is kept of every series by ``fn`` of it: reorder, repeat or select along the batch axis."""
        for series in self.series.values():
            series.map(fn)

    def update(self, other: Memory) -> None:
        """Take over all series of another memory."""
        self.series.update(other.series)

    def clear(self) -> None:
        self.series.clear()


class Recollection:
    """One primitive's part of a `Memory`, when ``heard`` tokens have gone by (None: nobody counts them)."""

    def __init__(self, memory: Memory, key: str, heard: int | Tensor | None = None) -> None:
        self.memory, self.key, self.heard = memory, key, heard

    def part(self, key: str) -> Recollection:
        return Recollection(self.memory, f"{self.key}/{key}", self.heard)

    def latest(self, name: str, count: int = 1) -> Tensor | None:
        """Up to ``count`` newest entries of a series, (B, n <= count, ...), or None before the first token."""
        series = self.memory.get(f"{self.key}/{name}", self.heard)
        return None if series is None else series.latest(count)

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
        series = {name: memory.series[key] for name, key in held.items()}
        return cls({name: each.latest(each.needed).clone() for name, each in series.items()}, {})

    def part(self, key: str) -> Notes:
        return Notes(self.before, self.after, f"{self.key}/{key}")

    def latest(self, name: str, count: int = 1) -> Tensor | None:
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
