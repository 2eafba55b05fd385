"""Every place of torch and transformers that bioadapt changes, or reads though it is not public, each with its reason.

What is changed is one model, and changed back when its last adapter goes; of caches it is the classes. Each place has
a test in `tests/tuner/test_patches.py` that fails when it moves. One file because whoever asks what bioadapt changes of
other libraries should find all of it here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from transformers import Cache, EncoderDecoderCache
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..primitives._state import Memory

# -- graphs --
#
# Why: 2.13 is the oldest torch whose graphs of all primitives were seen to be right. Of the older ones that were tried,
# 2.6 and 2.9 break graphs at what surrounds a forward, and 2.6 gets the numbers of one primitive wrong.
# It can go with the last of them that is promised.

GRAPHS_FROM = (2, 13)
HAS_GRAPHS = torch.__version__ >= GRAPHS_FROM


def kept_out_of_old_graphs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that runs without graphs where torch is too old for right ones, whatever is compiled around it."""
    return forward if HAS_GRAPHS else torch.compiler.disable(forward)


# -- the forward of a stack --
#
# Why: masks, positions and caches are arguments of a model's forward, and layers far inside have to know them. torch's
# hooks see ``stack(...)`` alone, while sentence-transformers 6 calls ``stack.forward(...)``. A function put on the
# instance would be tied to it, so that the replicas of `nn.DataParallel` ran the tensors of the original. torch's
# parametrisations and FSDP2 give a module a class of its own in the same way.
# It can go once callers agree to call models and not their forwards.


class Around(Protocol):
    """What surrounds the forwards of a stack."""

    replaced: Callable[..., Any] | None  # a forward that somebody has put on the instance

    def run(self, stack: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any: ...


_AROUND = "bio_scope"


def surround(stack: nn.Module, around: Around) -> None:
    """Let ``around`` run every forward of a stack, whether the module or its forward is called."""
    around.replaced = stack.__dict__.pop("forward", None)
    stack.__dict__[_AROUND] = around
    stack.__class__ = _surrounded(type(stack))


def surrounding(stack: nn.Module) -> Any:
    return stack.__dict__.get(_AROUND)


def release(stack: nn.Module) -> None:
    around = stack.__dict__.pop(_AROUND, None)
    plain = type(stack).__dict__.get("_plain_class")
    if plain is not None:
        stack.__class__ = plain
    if around is not None and around.replaced is not None:
        stack.__dict__["forward"] = around.replaced


def _surrounded(cls: type) -> type:
    """A class that is in all else what ``cls`` is, its name included; one for all models of that class."""
    siblings: list[type] = cls.__subclasses__()
    made = next((sibling for sibling in siblings if sibling.__dict__.get("_plain_class") is cls), None)
    return _surround_class(cls) if made is None else made


def _surround_class(cls: type) -> type:
    plain = cls.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        around = self.__dict__.get(_AROUND)
        if around is None:  # made from the class of a surrounded model, like ``type(model)(config)``
            return plain(self, *args, **kwargs)
        if around.replaced is not None:
            return around.run(self, around.replaced, args, kwargs)
        return around.run(self, functools.partial(plain, self), args, kwargs)

    forward = kept_out_of_old_graphs(forward)
    functools.update_wrapper(forward, plain)
    # accelerate takes its own wrappers off by following ``__wrapped__``, and would take off this one with them.
    del forward.__wrapped__
    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        return _unsurrounded, (cls,), *object.__reduce_ex__(self, 2)[2:]

    body = {"forward": forward, "__reduce_ex__": __reduce_ex__, "_plain_class": cls}
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (cls,), {**body, **names})


def _unsurrounded(cls: type) -> nn.Module:
    """An empty instance for `copy` and `pickle` to fill."""
    made: Any = _surrounded(cls)
    return made.__new__(made)


# -- gradient checkpointing --
#
# Why: a checkpointed region is computed again in the backward, after its forward has ended and perhaps in another
# thread. Without this it would be computed without mask and positions.
# Layers of transformers have the function that checkpoints them in an attribute, and so have torch's wrappers, which
# FSDP's activation checkpointing puts around layers. It can go once a forward's surroundings can be handed to
# checkpointed regions as arguments.

_CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


def checkpointed_modules(stack: nn.Module) -> list[nn.Module]:
    names = ("gradient_checkpointing", *_CHECKPOINTS)
    return [module for module in stack.modules() if any(hasattr(module, name) for name in names)]


def recomputing() -> bool:
    """Whether a backward is running in this thread, so that a forward in it is one that is computed again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class CarriedThroughRecomputation:
    """A checkpointing function whose recomputation finds what surrounded the forward."""

    def __init__(self, function: Callable[..., Any], carry: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.function, self.carry = function, carry

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.function(self.carry(run), *args, **kwargs)


def carry_through_recomputation(
    modules: list[nn.Module], carry: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Run whatever these modules checkpoint as ``carry(run)`` in the place of ``run``."""
    for module in modules:
        for name in _CHECKPOINTS:
            function = module.__dict__.get(name)
            if function is not None and not isinstance(function, CarriedThroughRecomputation):
                setattr(module, name, CarriedThroughRecomputation(function, carry))


def stop_carrying(modules: list[nn.Module]) -> None:
    for module in modules:
        for name in _CHECKPOINTS:
            function = module.__dict__.get(name)
            if isinstance(function, CarriedThroughRecomputation):
                setattr(module, name, function.function)


# -- caches --
#
# Why: what a primitive carries over tokens must follow whatever happens to a cache: beam search reorders it, assisted
# decoding crops it, contrastive search repeats it. transformers' caches tell nobody, so these methods of their classes
# ask whether the cache carries a memory. (A class or methods of the one object's own could not be compiled or would
# keep it alive.) A cache without a memory is not touched.
# It can go once a cache takes layers of another kind, that hold no keys and values, behind those of the model.

_MEMORY = "bio_memory"


def _reorder(cache: Any, memory: Memory, beam_idx: Tensor) -> None:
    memory.map(lambda series: series.index_select(0, beam_idx.to(series.device)))


def _select(cache: Any, memory: Memory, indices: Tensor) -> None:
    memory.map(lambda series: series[indices.to(series.device)])


def _repeat(cache: Any, memory: Memory, repeats: int) -> None:
    memory.map(lambda series: series.repeat_interleave(repeats, dim=0))


def _crop(cache: Any, memory: Memory, tokens_to_remove: int) -> None:
    tokens = int(tokens_to_remove)
    # Older transformers read a positive number as the length that remains.
    memory.crop(-tokens if tokens <= 0 else max(int(cache.get_seq_length()) - tokens, 0))


def _reset(cache: Any, memory: Memory) -> None:
    memory.clear()


FOLLOWED: dict[str, Callable[..., None]] = {
    "reorder_cache": _reorder,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
    "crop": _crop,
    "reset": _reset,
}


def follow_cache(cache: Any, memory: Memory) -> None:
    """Make a cache carry ``memory``, and the memory follow the cache."""
    setattr(cache, _MEMORY, memory)
    if not torch.compiler.is_compiling():  # what is compiled makes caches of known classes
        _follow(type(cache))


def followed_memory(cache: Any) -> Memory | None:
    """The memory that a cache carries."""
    return cache.__dict__.get(_MEMORY)


def _follow(cls: type) -> None:
    """Let the methods of a class of caches move the memory along, wherever in its ancestry they are defined."""
    for name, move in FOLLOWED.items():
        owner = next(ancestor for ancestor in cls.__mro__ if name in vars(ancestor))
        if not hasattr(vars(owner)[name], "followed_by_bioadapt"):
            setattr(owner, name, _followed(vars(owner)[name], move))


def _followed(plain: Callable[..., Any], move: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        memory = self.__dict__.pop(_MEMORY, None)  # a method that calls that of its parent moves the memory once
        if memory is None:
            return plain(self, *args, **kwargs)
        try:
            move(self, memory, *args, **kwargs)
            return plain(self, *args, **kwargs)
        finally:
            self.__dict__[_MEMORY] = memory

    followed.followed_by_bioadapt = True  # type: ignore[attr-defined]
    return followed


for _cls in (Cache, EncoderDecoderCache):
    _follow(_cls)


# -- chunked feed-forward blocks --
#
# Why: transformers can run a feed-forward block on a few tokens at a time to save memory, with the same result. What
# reads time both ways needs all of them at once, and what it reads would depend on the size of the chunks.
# It can go with `chunk_size_feed_forward`, which newer models no longer have.

Switched = list[tuple[nn.Module, str, Any]]  # attributes of modules, with the values that they had


def run_whole(modules: Iterable[nn.Module]) -> Switched:
    """Let feed-forward blocks run on all tokens at once."""
    return [
        _switch(module, "chunk_size_feed_forward", 0) for module in modules if "chunk_size_feed_forward" in vars(module)
    ]


def _switch(module: nn.Module, name: str, value: Any) -> tuple[nn.Module, str, Any]:
    before = getattr(module, name)
    setattr(module, name, value)
    return module, name, before


def switch_back(switched: Switched) -> None:
    for module, name, before in reversed(switched):
        setattr(module, name, before)


# -- logits_to_keep --
#
# Why: `generate` has the head of a language model read the last token alone. A primitive on the head that reads time
# would miss the tokens before it, so all logits are computed, and those asked for are returned.
# It can go if primitives are no longer accepted on heads.

_KEEP = "logits_to_keep"


def ask_for_all_logits(arguments: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> tuple[Any, tuple, dict]:
    """What a forward was to keep of its logits (None: all), and its arguments if it is to keep them all.

    Raises:
        ValueError: there are labels as well, which a model aligns with the logits that it keeps.
    """
    if _KEEP not in arguments:
        return None, args, kwargs
    place = arguments.index(_KEEP)
    keep = args[place] if place < len(args) else kwargs.get(_KEEP)
    if keep is None or (isinstance(keep, int) and keep == 0):
        return None, args, kwargs
    if kwargs.get("labels") is not None:
        raise ValueError(
            f"{_KEEP} was given with labels, but a primitive on the head reads time and needs every token: leave "
            f"{_KEEP} out"
        )
    if place < len(args):
        return keep, (*args[:place], 0, *args[place + 1 :]), kwargs
    return keep, args, {**kwargs, _KEEP: 0}


def keep_logits(output: Any, keep: int | Tensor) -> Any:
    """A forward's output with the logits that were asked for."""
    if isinstance(output, tuple):
        place = next(i for i, item in enumerate(output) if isinstance(item, Tensor) and item.dim() == 3)
        return (*output[:place], _kept(output[place], keep), *output[place + 1 :])
    if "logits" in output:  # else the model stands in another one, which takes from all tokens what it was asked for
        output["logits"] = _kept(output["logits"], keep)
    return output


def _kept(logits: Tensor, keep: int | Tensor) -> Tensor:
    """Of logits (B, T, v): the last few, or those at places (P,), (B, P), or at True of (B, T)."""
    if isinstance(keep, int):
        return logits[:, -keep:]
    if keep.dim() == 1:
        return logits[:, keep]
    if keep.dtype == torch.bool:
        return logits[keep]
    return logits.gather(1, keep[..., None].expand(-1, -1, logits.shape[-1]))


# -- torch's fast path --
#
# Why: in eval, `nn.TransformerEncoderLayer` hands the weights of its parts to one kernel and calls none of them, so
# that an adapter in a part would never run. A layer with a hook is left to run part by part.
# It can go once the fast path asks for more than hooks, such as for the classes of the parts.


def run_part_by_part(part: nn.Module, enclosing: Iterable[nn.Module]) -> Switched:
    """Keep ``part`` of a transformer layer of torch's from being passed over; the hook goes with the part."""
    part.register_forward_pre_hook(_nothing)
    # Nested tensors are read by the fast path alone; without them the values are the same.
    return [
        _switch(module, "use_nested_tensor", False) for module in enclosing if isinstance(module, nn.TransformerEncoder)
    ]


def _nothing(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing but be there."""


# -- read alone: feature vectors of sound --
#
# Why: a speech model is called with a mask of samples, while its layers see feature vectors. How many these are, and
# which of them are padding, is known to private methods of the model.
# It can go once a model has a public way to translate its mask.


def feature_vectors(stack: nn.Module | None, mask: Tensor, count: int) -> Tensor | None:
    """Which of ``count`` feature vectors are no padding, (B, count), by a mask of samples (B, n).

    None if the stack makes no feature vectors of samples, or not so many of them.
    """
    lengths = getattr(stack, "_get_feat_extract_output_lengths", None)
    translate = getattr(stack, "_get_feature_vector_attention_mask", None)
    if lengths is None or translate is None:
        return None
    # A model whose encoder is followed by a pooling counts up to behind that, unless told not to.
    options = {"add_adapter": False} if "add_adapter" in inspect.signature(lengths).parameters else {}
    if int(lengths(torch.tensor(mask.shape[1]), **options)) != count:
        return None
    return translate(count, mask, **options).bool()


# -- read alone: padding that a model adds --
#
# Why: Longformer, LED, BigBird and Reformer lengthen their input to a multiple of a block before their layers see it,
# and tell nobody. That they do is seen from the private method that does it.
# It can go once the forward of such a model returns or takes the length that it works on.


def pads_by_itself(stack: nn.Module | None) -> bool:
    return any(name.startswith("_pad_to_") for name in dir(type(stack)))


# -- read alone: blocks whose first axis is time --
#
# Why: activations of (tokens, batch, features) have the same number of axes as those of (batch, tokens, features), and
# these blocks have no attribute that says which they take.
# It can go once blocks say so, as those of torch do by ``batch_first``.

TIME_FIRST = (
    "modeling_xlnet.XLNetLayer",
    "modeling_fsmt.EncoderLayer",
    "modeling_fsmt.DecoderLayer",
    "modeling_longformer.LongformerSelfAttention",
    "modeling_led.LEDEncoderSelfAttention",
)


def has_time_first(module: nn.Module) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}".endswith(TIME_FIRST) for cls in type(module).__mro__)


# -- read alone: who has hooked a module --
#
# Why: where one product gives a layer's output and its change, the layer does not run, and whoever watches it, or has
# put something in the place of its forward, would be left out without a word.
# It can go once torch says publicly whether a module, or all of them, have hooks.

_LINEAR = nn.Linear.forward
_ON_ALL = (
    of_all_modules._global_forward_hooks,
    of_all_modules._global_forward_pre_hooks,
    of_all_modules._global_backward_hooks,
    of_all_modules._global_backward_pre_hooks,
)


def left_alone(module: nn.Module) -> bool:
    """Whether nobody has hooked the module, or all modules, or replaced its forward."""
    on_it = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(on_it) or any(_ON_ALL):
        return False
    return "forward" not in vars(module) and nn.Linear.forward is _LINEAR


# -- read alone: which models predict which tokens --
#
# Why: many models of transformers do not say whether their attention is causal. The tables of its auto classes know
# which of them predict masked tokens, seeing both sides, and which the next one.
# It can go once every attention module has ``is_causal``.


def predicts_masked_tokens(model_type: str) -> bool:
    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def predicts_next_tokens(model_type: str) -> bool:
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
