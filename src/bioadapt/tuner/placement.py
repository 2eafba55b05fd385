"""Where a module stands in a model: in which stack, which axis of its activations is time, and which way time runs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from . import patches
from .sites import Axes

TORCH_STACKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_CROSS_ATTENTION = re.compile(r"(?i)encdecatt|encoder_att|.*cross_?att")
_OF_IMAGES = ("timm", "torchvision", "diffusers")  # libraries whose models see all places of an image at once
_READS = ("k", "v", "key", "value", "k_proj", "v_proj", "key_proj", "value_proj", "kv_proj", "to_k", "to_v", "c_attn")


class Places:
    """The places of the modules of one model. Layers may be put around them in the meantime, which moves nothing."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stacks: dict[nn.Module, Stack] = {}

    def of(self, path: str) -> Place:
        """The place of the module at ``path``."""
        *names, name = path.split(".")
        around = [*accumulate(names, getattr, initial=self._model)][::-1]
        stacks = (PreTrainedModel, *TORCH_STACKS)
        nearest = next((module for module in around if isinstance(module, stacks)), self._model)
        return Place(name, names, around, self._stacks.setdefault(nearest, Stack(nearest)))


@dataclass
class Place:
    """Where a module stands.

    Attributes:
        name: what it is called there.
        names: of what is around it, from the model inwards.
        around: these modules, from the nearest to the model.
        stack: the nearest of them that is called with masks, else the model.
    """

    name: str
    names: list[str]
    around: list[nn.Module]
    stack: Stack

    @property
    def reads_encoder(self) -> bool:
        """Whether the module works on the encoder's tokens in a stack that is called with the decoder's.

        Keys and values of a decoder's cross-attention do, and all of an encoder that is no stack of its own.
        """
        if self.name in _READS and any(map(_CROSS_ATTENTION.match, self.names)):
            return not isinstance(self.stack.module, PreTrainedModel) or self.stack.meets_others
        return "encoder" in self.names and self.stack.has_decoder

    @property
    def is_causal(self) -> bool | None:
        """Whether tokens of the module must not see later ones; None if nothing tells."""
        if any(type(module).__module__.partition(".")[0] in _OF_IMAGES for module in self._within_stack):
            return False
        return self.stack.is_causal

    def axes(self, batch_first: bool | None) -> Axes | None:
        """Which axis is time for the module; None if it cannot be told, and the user has not said it.

        Models of transformers have the batch first, but for a few. torch's own layers say what they expect. Elsewhere
        time is told from nothing, so that a module somewhere that wants it first leaves the question open.
        """
        around = self._within_stack
        layer = next((module for module in around if isinstance(module, TORCH_STACKS)), None)
        if batch_first is not None:
            return Axes(time_first=not batch_first, unbatched=layer is not None)
        if layer is not None:
            return Axes(time_first=not layer.self_attn.batch_first, unbatched=True)
        if any(map(patches.has_time_first, around)):
            return Axes(time_first=True)
        if isinstance(self.stack.module, PreTrainedModel):
            open_question = any(_wants_time_first(child) for module in around for child in module.children())
        else:
            open_question = self.stack.wants_time_first
        return None if open_question else Axes()

    @property
    def _within_stack(self) -> list[nn.Module]:
        """What is around the module, up to the stack."""
        return self.around[: next(i for i, module in enumerate(self.around) if module is self.stack.module) + 1]


@dataclass(eq=False)
class Stack:
    """A module that is called with masks. What is learned by looking through all of it is looked up once."""

    module: nn.Module

    @cached_property
    def is_causal(self) -> bool | None:
        """Whether tokens must not see later ones; None if nothing tells.

        Attention modules of transformers say so themselves. Where none does, a model of transformers counts as causal
        unless it is known to be an encoder: reading time backwards only is always safe.
        """
        stack = self.module
        if isinstance(stack, nn.TransformerDecoderLayer):
            return True
        if type(stack).__name__.startswith("CLIPText"):  # its attention is told per call
            return True
        if self.has_decoder:  # what lies in an encoder-decoder itself, such as its head, reads what the decoder wrote
            return True
        own = list(_own_modules(stack))
        if any(getattr(module, "is_decoder", False) is True for module in own):  # some leave is_causal at False
            return True
        told = [module.is_causal for module in own if isinstance(getattr(module, "is_causal", None), bool)]
        if told:
            return any(told)
        config = getattr(stack, "config", None)
        model_type = getattr(config, "model_type", None)
        if not isinstance(stack, PreTrainedModel) or model_type is None:
            return None
        if getattr(stack, "main_input_name", "") == "pixel_values":
            return False
        if getattr(config, "is_decoder", False):
            return True
        if patches.predicts_masked_tokens(model_type):
            return False
        return patches.predicts_next_tokens(model_type) or not getattr(config, "is_encoder_decoder", False)

    @cached_property
    def has_decoder(self) -> bool:
        """Whether it holds both an encoder and a decoder."""
        return "decoder_input_ids" in self._arguments

    @cached_property
    def meets_others(self) -> bool:
        """Whether it is given what its cross-attention reads, rather than making it from its own input."""
        return any("encoder" in name or "cross" in name for name in self._arguments)

    @cached_property
    def wants_time_first(self) -> bool:
        """Whether a module in it does."""
        return any(map(_wants_time_first, self.module.modules()))

    @cached_property
    def _arguments(self) -> Collection[str]:
        return inspect.signature(self.module.forward).parameters


def _wants_time_first(module: nn.Module) -> bool:
    return getattr(module, "batch_first", True) is False


def _own_modules(stack: nn.Module) -> Iterator[nn.Module]:
    """Modules of a stack without those of the stacks inside it, unless it is nothing but a frame around one."""
    inner = [child for child in stack.modules() if child is not stack and isinstance(child, PreTrainedModel)]
    foreign = {id(module) for child in inner for module in child.modules()}
    own = [module for module in stack.modules() if id(module) not in foreign]
    return iter(own if len(inner) != 1 or any(hasattr(m, "is_causal") for m in own) else stack.modules())


def asked_for(model: Any, method: str) -> nn.Module | None:
    """The embedding or the head of a model, by the method of transformers that returns it; None if it has none."""
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError):  # no model of transformers, or one that does not tell
        return None
