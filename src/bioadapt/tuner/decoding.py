"""Decoding state that lives and dies with the model's cache: which cache a forward was given, and what it remembers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..primitives._state import Memory
from .patches import follow_cache, followed_memory

# What models that keep no `Cache` call what they carry from step to step.
_DERIVED = "bio_derived"
_STATES = ("past_key_values", "layer_past", "cache_params", "past_buckets_states", "mems", "state", "cache")


def cache_among(given: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a forward, whatever it is called."""
    return next((value for value in given.values() if isinstance(value, Cache)), None)


def refuse_other_states(given: Mapping[str, Any], stack: str) -> None:
    """Raise `ValueError` if a forward was given something to continue from that is no cache of transformers."""
    for name in _STATES:
        value = given.get(name)
        if value is not None and not isinstance(value, (Cache, bool)):
            raise ValueError(
                f"{stack} was given a {type(value).__name__} as {name}; primitives that carry state over tokens need a "
                "transformers Cache to carry it on. Pass one, or decode with use_cache=False"
            )


def tokens_in(cache: Cache) -> int | Tensor | None:
    """How many tokens a cache holds; None where it does not count them, as those of recurrent models."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return None


def memory_of(cache: Cache, stack: str) -> Memory:
    """The memory of a cache that was passed to a forward, attached now if it has none.

    Raises:
        ValueError: the cache holds tokens that it does not count, and of which no primitive has seen one.
    """
    memory = followed_memory(cache)
    past = tokens_in(cache)
    if memory is None:
        if past is None and _has_begun(cache):
            raise ValueError(
                f"the cache given to {stack} was filled before the adapter was added, or while it was inactive or "
                "disabled. Start from an empty cache"
            )
        memory = Memory()
        follow_cache(cache, memory)
    return memory


class _Derived(dict[Hashable, Any]):
    """See `Context.once`. A copy of a cache computes for itself."""

    def __reduce__(self) -> tuple:
        return _Derived, ()


def derived_with(cache: Cache, past: int | Tensor | None) -> dict[Hashable, Any] | None:
    """What has been computed of parameters for a cache of ``past`` tokens; None where nothing may be kept."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or past is None:
        return None
    if past == 0 or _DERIVED not in cache.__dict__:
        cache.__dict__[_DERIVED] = _Derived()
    return cache.__dict__[_DERIVED]


def _has_begun(cache: Cache) -> bool:
    try:
        return bool(cache.has_previous_state())
    except ValueError:  # it has no layers yet
        return False


def attach_memory(cache: Cache, memory: Memory) -> None:
    """Make the cache carry ``memory``; what it carried already is kept."""
    carried = followed_memory(cache)
    if carried is None:
        follow_cache(cache, memory)
    elif carried is not memory:
        carried.update(memory)


def find_cache(output: Any) -> Cache | None:
    """The cache in a model's output, under whatever name, if it has one."""
    if isinstance(output, Mapping):
        return cache_among(output)
    items = output if isinstance(output, tuple) else ()
    return next((item for item in items if isinstance(item, Cache)), None)
