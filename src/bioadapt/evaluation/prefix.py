"""A cache of frozen prefix activations: what enters the lowest adapted block is worked out once per text.

Below that block nothing learns, so a text comes out the same in every trial of a study. Where all rows of a batch are
known, the blocks below hand the known states on and compute nothing; else they run, and what is new goes into files
that the processes of a study share.

A prefix is judged by what it does. The first batch in training mode and the first one outside of it run in full, and
the cache keeps out of that mode if random numbers were drawn on the way, as dropout does, if a gradient would pass, if
blocks hand on more than hidden states, or if what is found is not what was known.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import BioConfig
from ..tuner.layer import BioLayer
from ..tuner.targets import block_of
from .tasks.task import Task

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Bytes that the files of a study may take.
LIMIT = 2**30
_FILE = ".safetensors"
_DIGEST = 16  # bytes
_IDS = ("input_ids", "token_type_ids")
_MASK = "attention_mask"


@contextmanager
def cached_prefix(
    encoder: SentenceTransformer, task: Task, folder: str | Path | None, limit: int = LIMIT
) -> Iterator[None]:
    """Train, validate and test within: results are those without, to float rounding.

    Does nothing where the lowest block is adapted or trained, or where the states of all texts of a split do not fit
    into what other prefixes have left of the limit. Batches that are padded on the left, have other inputs than token
    ids and a mask, or run under autocast are computed in full.

    Args:
        encoder: with its adapters. What calls the model in it directly is not answered from the cache.
        task: its texts are those to come.
        folder: of the cache, the same for all trials of a study; no cache if None.
        limit: bytes that the folder may take.
    """
    if folder is None:
        yield
        return
    model = next(module for module in encoder[0].modules() if isinstance(module, PreTrainedModel))
    path, count = frozen_blocks(model)
    if not count:
        yield
        return
    store = _Store(Path(folder, _fingerprint(model, path, count)))
    prefix = _Prefix(store, partial(_fits, encoder, task, store, limit))
    hooks = (
        encoder[0].register_forward_pre_hook(prefix.begin, with_kwargs=True),
        encoder[0].register_forward_hook(prefix.end, always_call=True),
    )
    blocks = list(model.get_submodule(path).children())[:count]
    for block in blocks:
        block.__dict__["forward"] = partial(prefix.forward, block is blocks[-1], block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]
        for hook in hooks:
            hook.remove()
        store.write()


def frozen_blocks(model: nn.Module) -> tuple[str, int]:
    """Path of the list of blocks in a model, and how many of its first ones come before all that is adapted or trained.

    None of them do if that lies outside of blocks, or in blocks of several lists.
    """
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moving |= {f"{name}.adapted" for name, module in model.named_modules() if isinstance(module, BioLayer)}
    lowest: dict[str, int] = {}
    for name in moving:
        number, inner = block_of(name) or (0, name)
        path = name.removesuffix(f"{number}.{inner}").removesuffix(".")
        lowest[path] = min(number, lowest.get(path, number))
    path, count = next(iter(lowest.items()), ("", 0))
    blocks = model.get_submodule(path) if count and len(lowest) == 1 else None
    # Where somebody has replaced the forward of a block, replacing it here would undo that.
    if not isinstance(blocks, nn.ModuleList) or any("forward" in vars(block) for block in blocks[:count]):
        return "", 0
    return path, count


def _fingerprint(model: PreTrainedModel, path: str, count: int) -> str:
    """Of all that decides the states: numbers of what lies below, how it is built, on what kind of device it runs."""
    digest = hashlib.sha256(f"{count} {model.device.type} {model.config.to_json_string()}".encode())
    for name, config in getattr(model, "peft_config", {}).items():
        if not isinstance(config, BioConfig):
            content = json.dumps(config.to_dict(), sort_keys=True, default=_in_order)
            digest.update(f"{name} {content}".encode())
    above = tuple(f"{path}.{number}." for number in range(count, len(model.get_submodule(path))))
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if not name.startswith(above):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _in_order(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _fits(
    encoder: SentenceTransformer, task: Task, store: _Store, limit: int, splits: Sequence[str], size: int
) -> bool:
    """Whether there is room for the states, of so many bytes per token, of all texts of the splits."""
    texts = [text for split in splits if task.sizes.get(split) for text in task.texts(split)]
    parts = (texts[start : start + 1000] for start in range(0, len(texts), 1000))
    tokens = sum(int(encoder.preprocess(part)[_MASK].sum()) for part in parts)
    return store.elsewhere() + tokens * size <= limit


class _Batch(NamedTuple):
    """Rows of token ids without their padding: a digest and a length of each."""

    rows: list[bytes]
    lengths: list[int]
    shape: torch.Size

    @classmethod
    def of(cls, features: Mapping[str, Any]) -> _Batch | None:
        """None if the features are anything else than texts that are padded on the right."""
        names = [name for name in _IDS if name in features]
        if set(features) - {*names, _MASK, "modality"} or features.get("modality", "text") != "text":
            return None
        mask = features[_MASK].cpu()
        if mask.dim() != 2 or any(features[name].shape != mask.shape for name in names):
            return None
        lengths = mask.sum(1)
        if not torch.equal(mask.bool(), torch.arange(mask.shape[1]) < lengths[:, None]):
            return None
        ids = torch.stack([features[name].cpu() for name in names], dim=1).numpy()
        contents = [row[:, :length].tobytes() for row, length in zip(ids, lengths.tolist(), strict=True)]
        rows = [
            hashlib.blake2b(content, digest_size=_DIGEST, salt=bytes([len(names)])).digest() for content in contents
        ]
        return cls(rows, lengths.tolist(), mask.shape)


class _Prefix:
    """Stands in for the frozen blocks while one batch after the other passes."""

    def __init__(self, store: _Store, fits: Callable[[Sequence[str], int], bool]) -> None:
        self._store, self._fits = store, fits
        self._sound: dict[bool, bool] = {}  # in training mode, and outside of it, once its first batch has passed
        self._training = False
        self._batch: _Batch | None = None
        self._known: list[Tensor] | None = None  # states of all rows of the batch
        self._random: list[Tensor] = []
        self._in_tuple = False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A batch comes."""
        self._training = module.training
        sound = self._sound.get(self._training)
        if kwargs or sound is False or (batch := _Batch.of(*args)) is None:
            return
        device = args[0][_MASK].device
        if torch.is_autocast_enabled(device.type):
            return
        self._batch = batch
        if sound is None:
            self._random = _random_state(device)
        elif self._store.rows.keys() >= set(batch.rows):
            self._known = [self._store.rows[row] for row in batch.rows]

    def end(self, *_: Any) -> None:
        self._batch = self._known = None

    def forward(self, last: bool, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Of one of the blocks."""
        if self._batch is None:
            return original(*args, **kwargs)
        if self._known is None:
            output = original(*args, **kwargs)
            if last:
                self._learn(self._batch, output, (*args, *kwargs.values()))
            return output
        states = args[0]
        if last:
            states = torch.zeros(states.shape, dtype=self._known[0].dtype)
            for row, known in zip(states, self._known, strict=True):
                row[: len(known)] = known
            states = states.to(args[0].device)
        return (states,) if self._in_tuple else states

    def _learn(self, batch: _Batch, output: Any, arguments: Sequence[Any]) -> None:
        """What the last of the blocks has computed in full."""
        first = self._training not in self._sound
        if first:
            self._in_tuple = isinstance(output, tuple) and len(output) == 1
        states = output[0] if self._in_tuple else output
        if first:
            self._sound[self._training] = self._is_sound(batch, states, arguments) and self._has_room(batch, states)
        if self._sound[self._training]:
            for row, length, computed in zip(batch.rows, batch.lengths, states.detach().cpu(), strict=True):
                self._store.add(row, computed[:length])

    def _is_sound(self, batch: _Batch, states: Any, arguments: Sequence[Any]) -> bool:
        """Whether nothing but these states goes up, and the same ones each time."""
        if not isinstance(states, Tensor) or states.shape[:-1] != batch.shape or states.requires_grad:
            return False
        if not all(map(_carries_nothing, arguments)):
            return False
        if not all(map(torch.equal, self._random, _random_state(states.device))):
            return False
        # Batches of another width take sums in another order: half of the digits have to agree.
        tolerance = torch.finfo(states.dtype).eps ** 0.5 * float(states.abs().max())
        return all(
            torch.allclose(self._store.rows[row], computed[:length], rtol=0, atol=tolerance)
            for row, length, computed in zip(batch.rows, batch.lengths, states.detach().cpu(), strict=True)
            if row in self._store.rows
        )

    def _has_room(self, batch: _Batch, states: Tensor) -> bool:
        if self._store.rows.keys() >= set(batch.rows):
            return True  # an earlier trial has counted
        splits = ("validation", "test", "train") if self._training else ("validation", "test")
        return self._fits(splits, states.shape[-1] * states.element_size())


def _carries_nothing(argument: Any) -> bool:
    """Whether a block can leave nothing in it for the blocks above, as in a cache of keys and values."""
    if isinstance(argument, tuple):
        return all(map(_carries_nothing, argument))
    return argument is None or isinstance(argument, (Tensor, bool, int, float, str))


def _random_state(device: torch.device) -> list[Tensor]:
    of_device = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *of_device]


class _Store:
    """States of rows, (tokens, features) each: those in the files of a folder, mapped into memory, and new ones.

    A file has its name once it is complete and never changes, so that processes may come, write and be killed at any
    time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[bytes, Tensor] = {}
        self._new: set[bytes] = set()
        self._files: set[Path] = set()
        self._read()

    def add(self, row: bytes, states: Tensor) -> None:
        if row not in self.rows:
            self.rows[row] = states.clone()
            self._new.add(row)

    def elsewhere(self) -> int:
        """Bytes of what is in the folders beside this one."""
        total = 0
        for file in self.folder.parent.glob("*/*"):
            with suppress(FileNotFoundError):  # another process has just renamed it
                total += file.stat().st_size if file.parent != self.folder else 0
        return total

    def write(self) -> None:
        """Keep what is new and no other process has written meanwhile. A full disk costs the cache alone."""
        self._read()
        if not self._new:
            return
        new = [self.rows[row] for row in self._new]
        tensors = {
            "rows": torch.frombuffer(bytearray(b"".join(self._new)), dtype=torch.uint8).view(-1, _DIGEST),
            "lengths": torch.tensor([len(states) for states in new]),
            "states": torch.cat(new),
        }
        unfinished = self.folder / f"{uuid.uuid4().hex}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, unfinished)
            unfinished.replace(unfinished.with_suffix(_FILE))
        except (OSError, SafetensorError):
            unfinished.unlink(missing_ok=True)

    def _read(self) -> None:
        for file in set(self.folder.glob(f"*{_FILE}")) - self._files:
            self._files.add(file)
            with suppress(OSError, SafetensorError):  # removed meanwhile, or cut short by a power failure
                held = load_file(file)
                rows = [bytes(row) for row in held["rows"].numpy()]
                self.rows |= zip(rows, held["states"].split(held["lengths"].tolist()), strict=True)
                self._new -= set(rows)
