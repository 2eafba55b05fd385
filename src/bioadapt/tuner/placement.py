"""Where a module stands in a model: in which stack, which axis of its activations is time, and which way time runs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from . import patches
from .sites import Axes

TORCH_STACKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_CROSS_ATTENTION = re.compile(r"(?i)encdecatt|encoder_att|.*cross_?att")
_OF_IMAGES = ("timm", "torchvision", "diffusers")  # libraries whose models see all places of an image at once
_READS = ("k", "v", "key", "value", "k_proj", "v_proj", "key_proj", "value_proj", "kv_proj", "to_k", "to_v", "c_attn")


def enclosing_stack(model: nn.Module, path: str) -> nn.Module:
    """The nearest module around the one at ``path`` that is called with masks, else ``model`` itself."""
    stacks = (PreTrainedModel, *TORCH_STACKS)
    return next((module for module in enclosing_modules(model, path) if isinstance(module, stacks)), model)


def reads_encoder(model: nn.Module, path: str) -> bool:
    """Whether the module at ``path`` works on the encoder's tokens in a stack that is called with the decoder's.

    Keys and values of a decoder's cross-attention do, and all of an encoder that is no stack of its own.
    """
    *around, name = path.split(".")
    stack = enclosing_stack(model, path)
    if name in _READS and any(map(_CROSS_ATTENTION.match, around)):
        return not isinstance(stack, PreTrainedModel) or _meets_others(stack)
    return "encoder" in around and _has_decoder(stack)


def axes_of(model: nn.Module, path: str, batch_first: bool | None) -> Axes | None:
    """Which axis is time for the module at ``path``; None if it cannot be told, and the user has not said it.

    Models of transformers have the batch first, but for a few. torch's own layers say what they expect. Elsewhere time
    is told from nothing, so that a module somewhere that wants it first leaves the question open.
    """
    around = _within_stack(model, path)
    layer = next((module for module in around if isinstance(module, TORCH_STACKS)), None)
    if batch_first is not None:
        return Axes(time_first=not batch_first, unbatched=layer is not None)
    if layer is not None:
        return Axes(time_first=not layer.self_attn.batch_first, unbatched=True)
    if any(map(patches.has_time_first, around)):
        return Axes(time_first=True)
    stack = enclosing_stack(model, path)
    beside = [child for module in around for child in module.children()]
    asked = beside if isinstance(stack, PreTrainedModel) else stack.modules()
    open_question = any(getattr(module, "batch_first", True) is False for module in asked)
    return None if open_question else Axes()


def enclosing_modules(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules around the one at ``path``, from the nearest to the model."""
    names = path.split(".")[:-1]
    return [model.get_submodule(".".join(names[:depth])) for depth in range(len(names), -1, -1)]


def _within_stack(model: nn.Module, path: str) -> list[nn.Module]:
    """The same up to the stack."""
    around, stack = enclosing_modules(model, path), enclosing_stack(model, path)
    return around[: next(i for i, module in enumerate(around) if module is stack) + 1]


def is_causal(model: nn.Module, path: str) -> bool | None:
    """Whether tokens of the module at ``path`` must not see later ones; None if nothing tells.

    Attention modules of transformers say so themselves. Where none does, a model of transformers counts as causal
    unless it is known to be an encoder: reading time backwards only is always safe.
    """
    if any(type(module).__module__.partition(".")[0] in _OF_IMAGES for module in _within_stack(model, path)):
        return False
    stack = enclosing_stack(model, path)
    if isinstance(stack, nn.TransformerDecoderLayer):
        return True
    if type(stack).__name__.startswith("CLIPText"):  # its attention is told per call
        return True
    if _has_decoder(stack):  # what lies in an encoder-decoder itself, such as its head, reads what the decoder wrote
        return True
    own = list(_own_modules(stack))
    if any(getattr(module, "is_decoder", False) is True for module in own):  # some of these leave is_causal at False
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


def _has_decoder(stack: nn.Module) -> bool:
    """Whether a stack holds both an encoder and a decoder."""
    return "decoder_input_ids" in inspect.signature(stack.forward).parameters


def _meets_others(stack: nn.Module) -> bool:
    """Whether a stack is given what its cross-attention reads, rather than making it from its own input."""
    return any("encoder" in name or "cross" in name for name in inspect.signature(stack.forward).parameters)


def _own_modules(stack: nn.Module) -> Iterator[nn.Module]:
    """Modules of a stack without those of the stacks inside it, unless it is nothing but a frame around one."""
    inner = [child for child in stack.modules() if child is not stack and isinstance(child, PreTrainedModel)]
    foreign = {id(module) for child in inner for module in child.modules()}
    own = [module for module in stack.modules() if id(module) not in foreign]
    return iter(own if len(inner) != 1 or any(hasattr(m, "is_causal") for m in own) else stack.modules())
