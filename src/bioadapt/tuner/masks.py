"""What an attention mask says about tokens: which are padding, and where a document begins.

Models take masks of many forms. Primitives need one flag for each token, so a mask is translated where it says exactly
that, and refused where it says anything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# An additive mask holds 0 where a token is seen. Some models write a large number instead of the lowest one elsewhere.
_HIDDEN = -1e4

# Arguments of any model with ones, or True, at what is no padding.
_OF_REAL = "attention_mask"
# The same of the models of transformers, where these names mean one thing.
_OF_REAL_IN_TRANSFORMERS = (
    "pixel_mask",
    "input_features_mask",
    "input_values_mask",
    "padding_mask",
    "padding_mask_videos",
)
_PADS_WITH_ONES = "xlnet"  # the model type whose ``input_mask`` has ones at padding
# Masks of what is read by cross-attention, or written by another part of the model.
_OF_OTHER_TOKENS = ("encoder_", "decoder_", "cross_", "memory_")
# Masks that say something else of tokens than which are padding, by how their names end.
SAY_SOMETHING_ELSE = {
    "global_attention_mask": "tokens that all others see",
    "head_mask": "heads of attention that are turned off",
    "perm_mask": "which tokens see which",
    "bool_masked_pos": "patches that are hidden, to be predicted",
    "mask_time_indices": "frames that are hidden, to be predicted",
    "observed_mask": "values of a series that were measured",
    "position_mask": "places of images among the tokens",
    "visual_pos_masks": "places of images among the tokens",
    "first_token_mask": "first tokens of words",
    "special_tokens_mask": "tokens that stand for no text",
    "p_mask": "tokens that cannot be in an answer",
    "table_mask": "tokens of a table, for the loss",
    "loss_mask": "tokens that count in the loss",
    "cu_seq_lens_q": "where packed documents begin, which positions say as well",
    "cu_seq_lens_k": "where packed documents begin, which positions say as well",
}


# Words in the names of arguments that may tell which tokens are padding.
_MAY_TELL = ("mask", "pad", "valid", "attn_bias", "attention_bias", "length", "lens")


class Unclear(ValueError):
    """It cannot be told which tokens are padding; the message says why, and goes behind the name of a layer."""


class Tokens(NamedTuple):
    """What is known of the tokens that a layer is called on, each (B, T) or None.

    ``mask`` (bool): real tokens. ``positions`` (int): places in the document. ``resets`` (bool): first tokens of
    documents.
    """

    mask: Tensor | None = None
    positions: Tensor | None = None
    resets: Tensor | None = None

    def telling(self) -> Tokens:
        """Without a mask that says of all tokens that they are real, and without resets that say of none that it is."""
        mask = None if self.mask is None or bool(self.mask.all()) else self.mask
        return Tokens(mask, self.positions, None if self.resets is None or not bool(self.resets.any()) else self.resets)

    def apart(self) -> bool:
        """Whether some tokens are not what others are: padding, or of another document."""
        if torch.compiler.is_compiling() or self.mask is None or self.resets is None:
            return False
        return not bool(self.mask.all()) or bool(self.resets[:, 1:].any())

    def to(self, device: torch.device) -> Tokens:
        if all(flags is None or flags.device == device for flags in self):
            return self
        return Tokens(*(None if flags is None else flags.to(device) for flags in self))


NOTHING = Tokens()


def masks_of(stack: nn.Module, given: Mapping[str, Any], side: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The masks among the arguments of a stack.

    Args:
        side: ``decoder_`` where the tokens of the stack are those of its decoder, else nothing.

    Returns:
        Those that tell padding, by name, with ones, or True, at what is none; and those of which it is not known what
        they mark.
    """
    own = f"{side}{_OF_REAL}"
    telling: dict[str, Any] = {} if given.get(own) is None else {own: given[own]}
    unknown: dict[str, Tensor] = {}
    if side:
        return telling, unknown
    for name, mask in _one_by_one(given):
        if name == own or _says_something_else(name):
            continue
        if name in ("src_key_padding_mask", "tgt_key_padding_mask"):
            telling[name] = read_key_padding(name, mask).mask
        elif name.startswith(_OF_OTHER_TOKENS):
            continue
        elif name.endswith(_OF_REAL) or (isinstance(stack, PreTrainedModel) and name in _OF_REAL_IN_TRANSFORMERS):
            telling[name] = mask
        elif name == "input_mask" and getattr(getattr(stack, "config", None), "model_type", None) == _PADS_WITH_ONES:
            telling.setdefault(own, 1 - mask.float())
        elif isinstance(mask, Tensor) and mask.dim():
            unknown[name] = mask
    return telling, unknown


def _one_by_one(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arguments that may be masks; those in a collection each by itself."""
    for name, value in given.items():
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        parts = {name: value}
        if isinstance(value, Mapping) and not name.endswith(_OF_REAL):
            parts = {f"{name}[{key!r}]": part for key, part in value.items()}
        for part, mask in parts.items():
            if mask is not None and (any(word in part for word in _MAY_TELL) or _is_bool(mask)):
                yield part, mask


def _is_bool(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _says_something_else(name: str) -> bool:
    return "label" in name or any(name == known or name.endswith(f"_{known}") for known in SAY_SOMETHING_ELSE)


def mask_of_encoder(given: Mapping[str, Any], name: str) -> Tensor | None:
    """(B, n) of what a decoder's cross-attention reads, by the argument ``name``: True at what is no padding."""
    mask = given.get(name)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool()
    mask = given.get("memory_key_padding_mask")
    return None if mask is None else read_key_padding("memory_key_padding_mask", mask).mask


def read_mask(name: str, mask: Any, batch: int, steps: int, past: int | Tensor | None) -> Tokens:
    """What the argument ``name`` of a model says about its tokens.

    Args:
        name: of the argument, for messages.
        mask: (B, n) of ones at real tokens; (B, q, k) or (B, 1, q, k), boolean or additive, as attention takes it; or a
            dict of those by kind of attention, of which the one that sees most is read.
        batch, steps: (B, T) of the tokens.
        past: number of tokens before them in a cache; None where that is unknown.

    Raises:
        Unclear: the mask says something else, or more, than which tokens are padding and where documents begin.
    """
    if mask is None:
        return NOTHING
    if isinstance(mask, Mapping):
        kinds = sorted(mask, key=lambda kind: kind != "full_attention")
        return read_mask(f"{name}[{kinds[0]!r}]", mask[kinds[0]], batch, steps, past) if kinds else NOTHING
    if not isinstance(mask, Tensor):
        raise Unclear(f"{name} is a {type(mask).__name__}, which does not tell which tokens are padding")
    if mask.dim() == 2:
        return _by_token(name, mask, steps, past)
    if mask.dim() in (3, 4):
        return _by_pair(name, mask, batch, steps, past)
    raise Unclear(f"{name} of shape {tuple(mask.shape)} does not tell which tokens are padding")


def _by_token(name: str, mask: Tensor, steps: int, past: int | Tensor | None) -> Tokens:
    everything = mask.bool()
    past = _as_number(past)
    if mask.is_floating_point() and not torch.compiler.is_compiling() and (mask < 0).any():
        raise Unclear(f"{name} has negative values, but as (batch, tokens) it must hold 1 at real tokens, 0 at padding")
    places = (everything.cumsum(-1) - 1).clamp(min=0)
    if isinstance(past, Tensor):  # a static cache: the mask may be as long as the cache will ever be
        columns = torch.arange(steps, device=mask.device) + past.to(mask.device)
        return Tokens(everything[:, columns], places[:, columns])
    if past is None:
        past = mask.shape[1] - steps
    if mask.shape[1] < past + steps or past < 0:
        raise Unclear(
            f"{name} has {mask.shape[1]} columns where there are {past + steps} tokens: it needs one for each token, "
            "those in the cache included"
        )
    return Tokens(everything[:, past : past + steps], places[:, past : past + steps])


def _by_pair(name: str, mask: Tensor, batch: int, steps: int, past: int | Tensor | None) -> Tokens:
    """A token is real if it sees itself, and begins a document if it sees nothing before itself."""
    seen = _visible(name, mask)  # (B, q, k)
    if seen.shape[1] != steps or seen.shape[0] not in (1, batch):
        raise Unclear(f"{name} of shape {tuple(mask.shape)} does not fit {batch} sequences of {steps} tokens")
    seen = seen.expand(batch, -1, -1)
    keys = seen.shape[2]
    past = _as_number(past)
    if past is None:
        past = keys - steps
    if not isinstance(past, Tensor) and steps == 1 and keys <= past:  # a window that slides along: the newest is last
        return Tokens(seen[:, :, -1], None, torch.zeros_like(seen[:, :, -1]))
    if not isinstance(past, Tensor) and not 0 <= past <= keys - steps:
        raise Unclear(f"{name} of shape {tuple(mask.shape)} has no column for each of {past} + {steps} tokens")
    own = torch.arange(steps, device=mask.device) + past  # the column of each token
    columns = torch.arange(keys, device=mask.device)
    real = seen.gather(2, own[None, :, None].expand(batch, -1, 1))[..., 0]
    starts = real & ~(seen & (columns < own[:, None])).any(2)
    document = starts.long().cumsum(1)  # 0 for what continues the cache
    if not torch.compiler.is_compiling():
        _check_pairs(name, seen.index_select(2, own), real, starts, document)
    before = (seen[:, :1] & (columns < own[:1])).sum(2)  # real tokens in the cache, (B, 1)
    count = real.long().cumsum(1)
    first = torch.where(starts, count, 0).cummax(1).values
    positions = torch.where(document > 0, count - first, before + count - 1).clamp(min=0)
    return Tokens(real, positions, starts)


def _as_number(past: int | Tensor | None) -> int | Tensor | None:
    """A static cache counts its tokens in a tensor, which only a compiled forward must not look into."""
    return int(past) if isinstance(past, Tensor) and not torch.compiler.is_compiling() else past


def _visible(name: str, mask: Tensor) -> Tensor:
    """A mask of pairs as bool, (B, q, k)."""
    if mask.dim() == 4:
        if mask.shape[1] > 1 and (torch.compiler.is_compiling() or not (mask == mask[:, :1]).all()):
            raise Unclear(f"{name} of shape {tuple(mask.shape)} differs between heads")
        mask = mask[:, 0]
    if not mask.is_floating_point():
        return mask.bool()
    if not torch.compiler.is_compiling() and not ((mask == 0) | (mask <= _HIDDEN)).all():
        raise Unclear(
            f"{name} holds other values than 0 and large negative ones, so that it is not clear what it hides"
        )
    return mask > _HIDDEN


def _check_pairs(name: str, seen: Tensor, real: Tensor, starts: Tensor, document: Tensor) -> None:
    """Refuse what is no sequence of documents, such as the tree of drafts in speculative decoding."""
    across = (document[:, :, None] != document[:, None, :]) & real[:, :, None]
    neighbours = real[:, 1:] & real[:, :-1] & ~starts[:, 1:]
    broken = (neighbours & ~seen.diagonal(-1, 1, 2)).any() or (seen & across).any()
    if broken or (seen & real[:, :, None] & ~real[:, None, :]).any():
        raise Unclear(
            f"{name} is no sequence of documents: it hides tokens from each other that are neither padding nor apart"
        )


def read_key_padding(name: str, mask: Tensor) -> Tokens:
    """A mask as torch's own transformer layers take it: True, or a large negative number, at padding."""
    if mask.dim() != 2:
        raise Unclear(f"{name} of shape {tuple(mask.shape)} does not tell which tokens are padding")
    real = _visible(name, mask[None])[0] if mask.is_floating_point() else ~mask.bool()
    return Tokens(real, (real.cumsum(-1) - 1).clamp(min=0))


def read_unknown(name: str, mask: Tensor, batch: int, steps: int) -> Tokens | None:
    """What a mask under a name that tells nothing says of tokens (B, T); None if it is about something else.

    Of pairs it can be told: every token sees itself, and where padding is hidden by numbers, these are large.

    Raises:
        Unclear: it may mark padding, or what is none.
    """
    shape = tuple(mask.shape)
    if marks_nothing(mask):
        return NOTHING
    if shape[-2:] == (steps, steps) and (shape != (batch, steps) or "src_mask" in name or "tgt_mask" in name):
        if torch.compiler.is_compiling() and mask.dim() == 2:
            return NOTHING  # one for all samples, and nobody may look whether it is more than an order
        return _by_pair(name, _of_seen(name, mask.reshape(-1, *shape[-2:]), batch), batch, steps, 0)
    of_lengths = "len" in name and shape == (batch,)
    if of_lengths or shape[-1] == steps or shape == (batch, steps, 1):
        raise Unclear(f"{name} {shape} may mark padding, or what is none, and nothing tells which")
    return None


def _of_seen(name: str, mask: Tensor, batch: int) -> Tensor:
    """A mask of pairs (n, T, T), of which n may count heads, with True where one sees the other: (B, heads, T, T)."""
    hidden = not torch.compiler.is_compiling() and mask.is_floating_point() and bool((mask < 0).any())
    seen = mask > _HIDDEN if hidden else mask.bool()
    own = seen.diagonal(0, 1, 2)
    if torch.compiler.is_compiling() or (len(seen) > 1 and len(seen) % batch) or not (hidden or marks_nothing(own)):
        raise Unclear(f"{name} {tuple(mask.shape)} hides tokens from themselves, and nothing tells which are padding")
    seen = seen if hidden or bool(own.all()) else ~seen
    return seen if len(seen) == 1 else seen.unflatten(0, (batch, -1))


def marks_nothing(mask: Tensor) -> bool:
    """Whether a mask says the same of all tokens, so that it tells none from another."""
    return not torch.compiler.is_compiling() and bool((mask == mask.flatten()[:1]).all())


def all_real(mask: Any) -> bool:
    """Whether a mask, of whatever shape, marks no padding at all."""
    if torch.compiler.is_compiling() or not isinstance(mask, Tensor):
        return False
    return bool((mask == 0).sum() == 0) if not mask.is_floating_point() or (mask > 0).any() else bool((mask == 0).all())
