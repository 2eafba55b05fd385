"""What surrounds a forward, collected once per model stack: padding, positions, document borders, decoding state.

A scope belongs to the nearest enclosing model (an encoder, a decoder, a language model) that is called with the mask.
It works by hooks on that module, so the user does nothing, and it works where no PeftModel exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..primitives._state import Memory
from .decoding import attach_memory, find_cache, memory_of
from .learning import Learning

if TYPE_CHECKING:
    from .layer import BioLayer

_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "encoder_attention")
_READS = ("k", "v", "key", "value", "k_proj", "v_proj", "c_attn")


@dataclass(eq=False)
class Surroundings:
    """One forward of one stack. Masks are (B, T) bool, positions (B, T) int; None where nothing is known."""

    tokens: tuple[int, int] | None = None
    mask: Tensor | None = None
    unreadable_mask: bool = False
    positions: Tensor | None = None
    resets: Tensor | None = None
    encoder_mask: Tensor | None = None
    memory: Memory | None = None
    live: bool = False  # in a training forward, not in its recomputation
    terms: Any = None  # what it adds to the loss
    awaited: bool = True  # the hooks have run, the forward that they belong to has not begun


class Scope:
    """Hooks on one stack, and what they found in the running forward."""

    def __init__(self, stack: nn.Module) -> None:
        self.stack_name = type(stack).__name__
        self.arguments = tuple(inspect.signature(stack.forward).parameters)
        self.layers: list[BioLayer] = []
        self.running: list[Surroundings] = []
        self.adapter_names: list[str] | None = None
        self.learning = Learning(self.layers)
        self.checkpointing = [m for m in stack.modules() if hasattr(m, "gradient_checkpointing")]
        self.hooks = (
            stack.register_forward_pre_hook(self.enter, with_kwargs=True),
            stack.register_forward_hook(self.leave, with_kwargs=True, always_call=True),
        )
        stack.__dict__["forward"] = CalledByName(stack, self)

    @classmethod
    def of(cls, stack: nn.Module) -> Scope:
        """The scope of a stack, made on first use."""
        found = stack.__dict__.get("bio_scope")
        if found is None:
            found = stack.__dict__["bio_scope"] = cls(stack)
        return found

    def remove(self, stack: nn.Module) -> None:
        for hook in self.hooks:
            hook.remove()
        stack.__dict__.pop("bio_scope", None)
        forward = stack.__dict__.get("forward")
        if isinstance(forward, CalledByName):
            forward.uninstall()
        for module in self.checkpointing:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, CarriedThroughRecomputation):
                module._gradient_checkpointing_func = function.function

    @property
    def surroundings(self) -> Surroundings | None:
        return self.running[-1] if self.running else None

    @property
    def carries_state(self) -> bool:
        return any(layer.carries_state for layer in self.layers)

    # -- the hooks --

    def enter(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        found = Surroundings(live=stack.training and torch.is_grad_enabled())
        if found.live:
            self.learning.begin()
            for module in self.checkpointing:
                self._carry_through_recomputation(module)
        self._read_tokens(found, given)
        self._read_memory(found, given)
        self._read_mask(found, given)
        self.running.append(found)

    def leave(self, stack: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self.running:
            return
        found = self.running.pop()
        found.live = False
        if found.memory is not None and found.memory.series:
            cache = find_cache(output)
            if cache is not None:
                attach_memory(cache, found.memory)
        found.memory = None

    def _read_tokens(self, found: Surroundings, given: dict[str, Any]) -> None:
        for name in ("input_ids", "inputs_embeds"):
            tokens = given.get(name)
            if isinstance(tokens, Tensor) and tokens.dim() >= 2:
                found.tokens = (tokens.shape[0], tokens.shape[1])
                return

    def _read_memory(self, found: Surroundings, given: dict[str, Any]) -> None:
        if not self.carries_state:
            return
        cache = given.get("past_key_values")
        if cache is not None:
            found.memory = memory_of(cache, self.stack_name)
        elif given.get("use_cache") is not False and not found.live:
            found.memory = Memory()  # the model makes a cache of its own and returns it

    def _read_mask(self, found: Surroundings, given: dict[str, Any]) -> None:
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        steps = None if found.tokens is None else found.tokens[1]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            everything = mask.bool()
            found.mask = everything if steps is None else everything[:, -steps:]
            if positions is None:
                counted = (everything.cumsum(-1) - 1).clamp(min=0)
                found.positions = counted if steps is None else counted[:, -steps:]
        elif mask is not None:
            found.unreadable_mask = True
        if isinstance(positions, Tensor) and positions.dim() == 2:
            if found.tokens is not None:
                positions = positions.expand(found.tokens[0], -1)
            found.positions = positions
            found.resets = positions == 0
            if found.mask is not None and found.mask.shape == positions.shape:
                found.resets = found.resets & found.mask
        elif found.positions is None and found.tokens is not None:
            cache = given.get("past_key_values")
            past = 0 if cache is None or not hasattr(cache, "get_seq_length") else cache.get_seq_length()
            source = given.get("input_ids")
            device = (source if isinstance(source, Tensor) else given["inputs_embeds"]).device
            found.positions = (torch.arange(found.tokens[1], device=device) + past).expand(found.tokens)
        encoder_mask = given.get("encoder_attention_mask")
        if isinstance(encoder_mask, Tensor) and encoder_mask.dim() == 2:
            found.encoder_mask = encoder_mask.bool()

    # -- gradient checkpointing --

    def _carry_through_recomputation(self, module: nn.Module) -> None:
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, CarriedThroughRecomputation):
            module._gradient_checkpointing_func = CarriedThroughRecomputation(function, self)

    @contextmanager
    def restored(self, found: Surroundings | None) -> Iterator[None]:
        """Run as in that forward again."""
        if found is None:
            yield
            return
        self.running.append(found)
        try:
            yield
        finally:
            self.running.pop()


class CalledByName:
    """A stack's forward that runs the hooks where a caller passes them by.

    ``stack.forward(...)`` instead of ``stack(...)`` skips torch's hooks; sentence-transformers 6 calls its model so.
    """

    def __init__(self, stack: nn.Module, scope: Scope) -> None:
        self.stack, self.scope = stack, scope
        self.replaced = stack.__dict__.get("forward")
        self.__signature__ = inspect.signature(stack.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self.scope.surroundings
        if found is not None and found.awaited:
            found.awaited = False
            return self._forward(*args, **kwargs)
        self.scope.enter(self.stack, args, kwargs)
        self.scope.running[-1].awaited = False
        output = None
        try:
            output = self._forward(*args, **kwargs)
            return output
        finally:
            self.scope.leave(self.stack, args, kwargs, output)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.stack).forward(self.stack, *args, **kwargs)

    def uninstall(self) -> None:
        if self.replaced is None:
            del self.stack.__dict__["forward"]
        else:
            self.stack.__dict__["forward"] = self.replaced


class CarriedThroughRecomputation:
    """A checkpointing function whose recomputation, long after the forward, finds the forward's surroundings again."""

    def __init__(self, function: Callable[..., Any], scope: Scope) -> None:
        self.function, self.scope = function, scope

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = self.scope.surroundings

        def run_within(*inputs: Any) -> Any:
            with self.scope.restored(found):
                return run(*inputs)

        return self.function(run_within, *args, **kwargs)


# -- which stack, and which way time runs --


def enclosing_stack(model: nn.Module, path: str) -> nn.Module:
    """The nearest enclosing transformers model of the module at ``path``, else ``model`` itself."""
    names = path.split(".")[:-1]
    for depth in range(len(names), 0, -1):
        module = model.get_submodule(".".join(names[:depth]))
        if isinstance(module, PreTrainedModel):
            return module
    return model


def reads_encoder(path: str) -> bool:
    """Whether the module at ``path`` projects the encoder's output inside a decoder's cross-attention."""
    names = path.split(".")
    return names[-1] in _READS and any(name in _CROSS_ATTENTION for name in names)


def is_causal(stack: nn.Module) -> bool:
    """Whether tokens of this stack must not see later ones.

    Attention modules of transformers say so themselves. Where none does, a stack counts as causal unless it is known to
    be an encoder: reading time backwards only is always safe.
    """
    if type(stack).__name__.startswith("CLIPText"):  # its attention is told per call
        return True
    told = [module.is_causal for module in _own_modules(stack) if isinstance(getattr(module, "is_causal", None), bool)]
    if told:
        return any(told)
    config = getattr(stack, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(stack, PreTrainedModel) or model_type is None:
        return True
    if getattr(stack, "main_input_name", "") == "pixel_values":
        return False
    if getattr(config, "is_decoder", False):
        return True
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return False
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not getattr(config, "is_encoder_decoder", False)


def _own_modules(stack: nn.Module) -> Iterator[nn.Module]:
    """Modules of a stack without those of the stacks inside it, unless it is nothing but a frame around one."""
    inner = [child for child in stack.modules() if child is not stack and isinstance(child, PreTrainedModel)]
    foreign = {id(module) for child in inner for module in child.modules()}
    own = [module for module in stack.modules() if id(module) not in foreign]
    return iter(own if len(inner) != 1 or any(hasattr(m, "is_causal") for m in own) else stack.modules())
