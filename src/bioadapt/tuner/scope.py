"""What surrounds a forward, collected once per model stack: padding, positions, document borders, decoding state.

A scope belongs to the nearest enclosing model (an encoder, a decoder, a language model) that is called with the mask.
It works around that module's forward, so the user does nothing, and it works where no PeftModel exists. What it finds
belongs to one forward in one flow of control: other threads that run the same model see nothing of it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..primitives._state import Memory
from . import patches
from .compilation import Compilation
from .decoding import attach_memory, cache_among, derived_with, find_cache, memory_of, refuse_other_states, tokens_in
from .learning import Learning
from .masks import NOTHING, Tokens, Unclear, all_real, mask_of_encoder, masks_of, read_mask, read_unknown
from .placement import TORCH_STACKS

if TYPE_CHECKING:
    from .layer import BioLayer


@dataclass(eq=False)
class Surroundings:
    """One forward of one stack.

    ``stack``: the module. ``tokens``: (B, T), where its arguments tell. ``given``: the same in any order, where its
    first argument looks like tokens and is not called so. ``known``: what is known of the tokens. ``unclear``: why that
    is not all. ``masks``: its arguments that tell padding, by name. ``unknown``: masks of which it is not known what
    they mark. ``unread``: what was not understood and is left aside, in words. ``encoder_mask``: (B, n) of what a
    decoder reads. ``past``: tokens in the cache. ``live``: in a training forward, not in its recomputation.
    ``adapter_names``: the adapter of each sample, where they differ. ``ids``, ``labels``: in training, the tokens
    themselves and those that are to be foretold, each (B, T) or None. ``decoder``: of an encoder, so that labels stand
    where they are to be foretold. ``terms``: what it adds to the loss. ``calls``: by layer, which call of this forward
    comes next and at which token it begins.
    """

    stack: nn.Module | None = None
    tokens: tuple[int, int] | None = None
    given: tuple[int, int] | None = None
    known: Tokens = NOTHING
    unclear: str | None = None
    masks: dict[str, Any] = field(default_factory=dict)
    unknown: dict[str, Tensor] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    encoder_mask: Tensor | None = None
    memory: Memory | None = None
    past: int | Tensor | None = None
    live: bool = False
    adapter_names: list[str] | None = None
    ids: Tensor | None = None
    labels: Tensor | None = None
    decoder: bool = False
    terms: Any = None
    calls: dict[str, tuple[int, int]] = field(default_factory=dict)
    other_inputs: bool = False  # features besides the tokens, which may be set before or behind them
    chunks: Memory | None = None  # what parts of a sequence leave to those that follow
    derived: dict[Hashable, Any] | None = None  # see `Context.once`

    @property
    def mask(self) -> Tensor | None:
        return self.known.mask

    def about(self, sequence: tuple[int, int]) -> Tokens:
        """What is known of the tokens (B, T) that a layer is called on.

        Raises:
            Unclear: there is padding, and it cannot be told where it is in this layer.
        """
        told = self._told_by_unknown(sequence) if self.unknown else NOTHING
        if told is not NOTHING:
            return told
        if sequence == self.tokens:
            if self.unclear is not None:
                raise Unclear(self.unclear)
            return self.known
        for mask in self.masks.values():
            tokens = self._translated(mask, sequence)
            if tokens is not None:
                return tokens
        if self._pads_inside(sequence) and self.unclear is None:
            assert self.tokens is not None and self.stack is not None
            device = next(self.stack.parameters()).device
            real = torch.ones(self.tokens, dtype=torch.bool, device=device) if self.mask is None else self.mask
            return _of_real(nn.functional.pad(real, (0, sequence[1] - self.tokens[1])))
        for name, mask in self.masks.items():
            if not all_real(mask):
                shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise Unclear(
                    f"{name} {shape} does not tell which of the {sequence[0]} x {sequence[1]} tokens here are padding"
                )
        if self.tokens is not None and sequence[1] > self.tokens[1] and not self.other_inputs:
            raise Unclear(
                f"the model was given {self.tokens[1]} tokens and makes {sequence[1]} of them, so that it cannot be "
                "told which are padding"
            )
        if self.given is not None and sequence[0] in self.given and sequence[1] > max(self.given):
            self.unread.append(
                f"{type(self.stack).__name__} was given {max(self.given)} tokens and makes {sequence[1]} of them: "
                "adapters read those that it adds like all others, also where they are padding"
            )
        return NOTHING

    def _told_by_unknown(self, sequence: tuple[int, int]) -> Tokens:
        """What masks say of the tokens of a layer whose names tell nothing.

        Raises:
            Unclear: as in `about`.
        """
        for name, mask in self.unknown.items():
            tokens = read_unknown(name, mask, *sequence)
            if tokens is None and self.tokens not in (None, sequence):
                tokens = read_unknown(name, mask, *self.tokens)
                if tokens is not None and tokens.apart():
                    raise Unclear(
                        f"{name} {tuple(mask.shape)} does not tell which of the {sequence} tokens are padding"
                    )
            if tokens is None:
                self.unread.append(
                    f"{name} {tuple(mask.shape)} is not read by adapters: nothing tells what it says of tokens"
                )
            elif tokens.apart() and self.mask is not None and not torch.equal(self.mask, tokens.mask):
                raise Unclear(f"{name} and attention_mask do not say the same of which tokens are padding")
            elif tokens.apart():
                return tokens
        return NOTHING

    def about_encoder(self, sequence: tuple[int, int]) -> Tokens:
        """The same for a layer that reads the encoder's output."""
        mask = self.encoder_mask
        if mask is None or tuple(mask.shape) == sequence:
            return Tokens(mask)
        if all_real(mask):
            return NOTHING
        raise Unclear(f"the mask of the encoder {tuple(mask.shape)} does not fit its {sequence} features here")

    def _translated(self, mask: Any, sequence: tuple[int, int]) -> Tokens | None:
        """What a mask tells of the tokens (B, T) of a layer; None if it is not one of those."""
        if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != sequence[0]:
            return None
        if tuple(mask.shape) == sequence:
            return _of_real(mask.bool())
        real = patches.feature_vectors(self.stack, mask, sequence[1])
        return None if real is None else _of_real(real)

    def _pads_inside(self, sequence: tuple[int, int]) -> bool:
        """Whether the model has added padding behind its tokens."""
        if self.tokens is None or sequence[0] != self.tokens[0] or sequence[1] <= self.tokens[1]:
            return False
        return patches.pads_by_itself(self.stack)

    def targets(self, causal: bool) -> Tensor | None:
        """The token that is to be foretold at each token, (B, T), -1 where none is; None if nothing tells."""
        if self.labels is not None and (self.decoder or not causal):
            return self.labels.clamp(min=-1)
        following = self.labels if self.labels is not None else self.ids
        if following is None or not causal:
            return None
        told = torch.ones_like(following, dtype=torch.bool)
        for flags, at in ((self.known.mask, True), (self.known.resets, False)):
            if flags is not None and flags.shape == told.shape:
                told = told & (flags == at)
        following = torch.where(told, following, -1).clamp(min=-1)
        return nn.functional.pad(following[:, 1:], (0, 1), value=-1)

    def place(self, layer: str, sequence: tuple[int, int]) -> tuple[int, int]:
        """Which call of the layer in this forward this is, and at which token it begins.

        A layer that several blocks share is called on all tokens each time; one whose input is split into chunks is
        called on a few at a time.
        """
        call, start = self.calls.get(layer, (0, 0))
        steps = 0 if self.tokens is None else self.tokens[1]
        end = start + sequence[1]
        self.calls[layer] = (call, end) if end < steps else (call + 1, 0)
        return call, start


def _of_real(real: Tensor) -> Tokens:
    return Tokens(real, (real.cumsum(-1) - 1).clamp(min=0))


class Flow(threading.local):
    """What one flow of control is in the middle of. A copy of the model is in the middle of nothing."""

    around: Surroundings | None = None
    adapter_names: list[str] | None = None

    def __reduce__(self) -> tuple:
        return Flow, ()


class Scope:
    """Runs the forwards of one stack, and knows what surrounds the running one."""

    def __init__(self, stack: nn.Module) -> None:
        self.stack_name = type(stack).__name__
        self.arguments = tuple(inspect.signature(stack.forward).parameters)
        self.layers: list[BioLayer] = []
        self.flow = Flow()
        self.replaced: Callable[..., Any] | None = None
        self.learning = Learning(self.layers)
        self.checkpointing = patches.checkpointed_modules(stack)
        self.switched: patches.Switched = []
        self.knew_tokens = False  # whether the last forward knew anything of its tokens
        self.compilation: Compilation | None = None  # of what the layers' circuits compute
        patches.surround(stack, self)

    @classmethod
    def of(cls, stack: nn.Module) -> Scope:
        """The scope of a stack, made on first use."""
        scope = patches.surrounding(stack)
        return cls(stack) if scope is None else scope

    def remove(self, stack: nn.Module) -> None:
        patches.release(stack)
        patches.stop_carrying(self.checkpointing)
        patches.switch_back(self.switched)

    def take_in(self, layer: BioLayer, enclosing: list[nn.Module]) -> None:
        """Prepare the modules around a layer, from the nearest to the model, for what its primitives need of them."""
        if any(isinstance(module, TORCH_STACKS) for module in enclosing):
            self.switched += patches.run_part_by_part(layer, enclosing)
        if layer.reads_tokens:
            self.switched += patches.run_whole(enclosing)

    @property
    def surroundings(self) -> Surroundings:
        """Of the running forward of this flow of control, of which nothing is known outside the stack's own."""
        return self.flow.around or Surroundings(adapter_names=self.flow.adapter_names)

    @contextmanager
    def asking_for(self, adapter_names: list[str]) -> Iterator[None]:
        """Forwards in which each sample uses the adapter named for it."""
        before = self.flow.adapter_names
        self.flow.adapter_names = adapter_names
        try:
            yield
        finally:
            self.flow.adapter_names = before

    # Both are asked at every forward, where a list is quicker than a generator.

    @property
    def carries_state(self) -> bool:
        return any([layer.carries_state for layer in self.layers])

    @property
    def reads_tokens(self) -> bool:
        return any([layer.reads_tokens for layer in self.layers])

    # -- a forward --

    def run(self, stack: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        before = self.flow.around
        keep, reads_tokens = None, self.reads_tokens
        if reads_tokens:
            keep, args, kwargs = patches.ask_for_all_logits(self.arguments, args, kwargs)
        around = self._read(stack, {**dict(zip(self.arguments, args, strict=False)), **kwargs}, reads_tokens)
        self.flow.around = around
        try:
            output = forward(*args, **kwargs)
        finally:
            self.flow.around = before
            around.live = False
        if around.memory is not None and around.memory.series:
            cache = find_cache(output)
            if cache is not None:
                attach_memory(cache, around.memory)
        around.memory = None
        return output if keep is None else patches.keep_logits(output, keep)

    def _read(self, stack: nn.Module, given: dict[str, Any], reads_tokens: bool) -> Surroundings:
        around = Surroundings(
            stack, live=stack.training and torch.is_grad_enabled(), adapter_names=self.flow.adapter_names
        )
        if around.live:
            self.learning.begin()
            patches.carry_through_recomputation(self.checkpointing, self._carried)
        self._read_tokens(around, given)
        self._read_cache(around, given, reads_tokens)
        self._read_masks(stack, around, given, reads_tokens)
        self.knew_tokens = around.tokens is not None or bool(around.masks)
        return around

    def _read_tokens(self, around: Surroundings, given: dict[str, Any]) -> None:
        # What lies in an encoder-decoder itself, and in neither of its parts, reads what the decoder wrote.
        side = "decoder_" if "decoder_input_ids" in self.arguments else ""
        for name in (f"{side}input_ids", f"{side}inputs_embeds", "labels" if side else "inputs_embeds"):
            tokens = given.get(name)
            if isinstance(tokens, Tensor) and tokens.dim() >= 2:
                around.tokens = (tokens.shape[0], tokens.shape[1])
                break
        if around.live:
            around.decoder = bool(side)
            around.ids = _of_shape(around.tokens, given.get(f"{side}input_ids"))
            around.labels = _of_shape(around.tokens, given.get("labels"))
        first = next(iter(given.values()), None)
        if around.tokens is None and isinstance(first, Tensor) and first.dim() == 2 + first.is_floating_point():
            around.given = (first.shape[0], first.shape[1])
        own = (f"{side}inputs_embeds", "encoder_hidden_states", "attention_mask")
        around.other_inputs = any(
            isinstance(value, Tensor) and value.dim() > 2 and value.is_floating_point() and name not in own
            for name, value in given.items()
        )

    def _read_cache(self, around: Surroundings, given: dict[str, Any], reads_tokens: bool) -> None:
        cache = cache_among(given)
        if cache is not None:
            past = tokens_in(cache)
            if isinstance(past, Tensor):  # in which a static cache counts on, and a compiled forward must not look
                past = past.clone() if torch.compiler.is_compiling() else int(past)
            around.past = past
            around.derived = derived_with(cache, around.past)
        elif given.get("past_key_values") is None and "cache_params" not in self.arguments:
            around.past = 0  # recurrent models do not count tokens
        if not reads_tokens or not (self.carries_state or around.past is None):
            return
        refuse_other_states(given, self.stack_name)
        if cache is not None:
            around.memory = memory_of(cache, self.stack_name)
        elif given.get("use_cache") is not False and not around.live:
            around.memory = Memory()  # the model makes a cache of its own and returns it

    def _read_masks(self, stack: nn.Module, around: Surroundings, given: dict[str, Any], reads_tokens: bool) -> None:
        side = "decoder_" if "decoder_input_ids" in self.arguments else ""
        around.encoder_mask = mask_of_encoder(given, "attention_mask" if side else "encoder_attention_mask")
        around.masks, around.unknown = masks_of(stack, given, side)
        if around.tokens is None:
            return
        batch, steps = around.tokens
        mask = around.masks.get(f"{side}attention_mask")
        # Without a cache a longer mask belongs to what a model puts before the tokens.
        past = None if cache_among(given) is None else around.past
        try:
            known = read_mask("attention_mask", mask, batch, steps, past)
        except Unclear as unclear:
            known, around.unclear = NOTHING, str(unclear)
        positions = given.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() == 2:
            positions = positions.expand(batch, -1)
            resets = positions == 0
            if known.mask is not None and known.mask.shape == positions.shape:
                resets = resets & known.mask
            known = known._replace(positions=positions, resets=resets)
        elif known.positions is None and around.past is not None and reads_tokens:
            places = torch.arange(steps, device=_device_of(given)) + around.past
            known = known._replace(positions=places.expand(batch, -1))
        # A step of decoding is cheaper where nothing is said of its tokens; of more of them, asking costs too much.
        one = reads_tokens and around.derived is not None and around.past and steps == 1
        around.known = known.telling() if one else known

    # -- gradient checkpointing --

    def _carried(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run`` within what surrounds it now, whenever and in whatever thread it is called."""
        around = self.flow.around

        def run_within(*args: Any, **kwargs: Any) -> Any:
            before = self.flow.around
            self.flow.around = around
            try:
                return run(*args, **kwargs)
            finally:
                self.flow.around = before

        return run_within


def _of_shape(tokens: tuple[int, int] | None, ids: Any) -> Tensor | None:
    """Numbers of tokens, if that is what they are."""
    whole = isinstance(ids, Tensor) and not ids.is_floating_point() and tuple(ids.shape) == tokens
    return ids if whole else None


def _device_of(given: Mapping[str, Any]) -> torch.device:
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels")
    return next(given[name].device for name in names if isinstance(given.get(name), Tensor))
