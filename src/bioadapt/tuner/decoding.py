"""Decoding state that lives and dies with the key-value cache.

The cache object gets a sibling class that carries a `Memory` and passes on whatever happens to the cache: beam search
reorders it, assisted decoding crops it, a copy copies it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from transformers import Cache

from ..primitives._state import Memory


class _Remembering:
    """What a cache class gains: a memory that follows every operation on the batch or time axis."""

    bio_memory: Memory

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        self.bio_memory.map(lambda series: series.index_select(0, beam_idx.to(series.device)))
        return super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> Any:
        self.bio_memory.map(lambda series: series[indices.to(series.device)])
        return super().batch_select_indices(indices)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> Any:
        self.bio_memory.map(lambda series: series.repeat_interleave(repeats, dim=0))
        return super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> Any:
        tokens = int(tokens_to_remove)
        # Older transformers read a positive number as the length that remains.
        removed = -tokens if tokens <= 0 else max(int(self.get_seq_length()) - tokens, 0)  # type: ignore[attr-defined]
        self.bio_memory.crop(removed)
        return super().crop(tokens_to_remove)  # type: ignore[misc]

    def reset(self) -> Any:
        self.bio_memory.clear()
        return super().reset()  # type: ignore[misc]


@cache
def _remembering(cls: type) -> type:
    return type(f"Remembering{cls.__name__}", (_Remembering, cls), {"__module__": __name__})


def attach_memory(cache: Cache, memory: Memory) -> None:
    """Make the cache carry ``memory``; what it carried already is kept."""
    if isinstance(cache, _Remembering):
        if cache.bio_memory is not memory:
            cache.bio_memory.series.update(memory.series)
            cache.bio_memory.seen.update(memory.seen)
        return
    cache.__class__ = _remembering(type(cache))
    cache.bio_memory = memory  # type: ignore[attr-defined]


def memory_of(cache: Any, stack: str) -> Memory:
    """The memory of a cache that was passed to a forward, attached now if it has none.

    Raises:
        ValueError: a cache of an unknown class.
    """
    if not isinstance(cache, Cache):
        raise ValueError(
            f"{stack} was given a cache of class {type(cache).__name__}; primitives that carry state over tokens need "
            "a transformers Cache"
        )
    if not isinstance(cache, _Remembering):
        attach_memory(cache, Memory())
    memory: Memory = cache.bio_memory  # type: ignore[attr-defined]
    memory.past = int(cache.get_seq_length())
    return memory


def find_cache(output: Any) -> Cache | None:
    """The cache in a model's output, if it has one."""
    cache = getattr(output, "past_key_values", None)
    if cache is None and isinstance(output, tuple):
        cache = next((item for item in output if isinstance(item, Cache)), None)
    return cache if isinstance(cache, Cache) else None
