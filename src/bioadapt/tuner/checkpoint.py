"""Saved adapters: keys that do not depend on what lies underneath, fingerprints, and refusals in words."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .._words import suggest
from .bridge import CONTAINER

if TYPE_CHECKING:
    from ..config import BioConfig

ROOT = "base_model.model."


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, independent of order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def own_tensors(tensors: Mapping[str, Tensor], modules_to_save: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The bio adapter's part of a checkpoint, modules to save included, under names without PEFT's root."""
    heads = tuple(modules_to_save or ())

    def owned(key: str) -> bool:
        modules = (key[:dot] for dot, letter in enumerate(key) if letter == ".")
        return f".{CONTAINER}." in f".{key}" or any(module.endswith(heads) for module in modules)  # as PEFT matches

    return {key.removeprefix(ROOT): value for key, value in tensors.items() if owned(key.removeprefix(ROOT))}


def check_file(path: Path, config: BioConfig) -> None:
    """Refuse a weights file that cannot be read in full, or whose adapter is not the one that was saved.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read, it may be cut off: {error}") from error
    check_fingerprint(own_tensors(tensors, config.modules_to_save), config.fingerprint, str(path))


def check_fingerprint(tensors: Mapping[str, Tensor], expected: str | None, where: str) -> None:
    """Raise `ValueError` if the tensors are not those that the configuration was saved with."""
    if expected is not None and fingerprint(tensors) != expected:
        raise ValueError(
            f"{where} does not hold the tensors that its adapter_config.json was saved with: it was changed, damaged, "
            "or belongs to another adapter. To load it nevertheless, set fingerprint to null in adapter_config.json"
        )


def check_keys(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], adapter_name: str) -> None:
    """Refuse a checkpoint that would leave part of the adapter untrained, or holds what has no place.

    Raises:
        ValueError: naming the first missing, extra or wrongly shaped key, and how many there are.
    """
    missing = [key for key in expected if key not in given]
    extra = [key for key in given if key not in expected]
    if missing or extra:
        words = []
        if missing:
            words.append(f"{len(missing)} missing, such as {missing[0]!r}")
        if extra:
            words.append(f"{len(extra)} without a place, such as {extra[0]!r} ({suggest(extra[0], expected)})")
        raise ValueError(f"the checkpoint does not fit adapter {adapter_name!r}: {'; '.join(words)}")
    for key, tensor in given.items():
        if tuple(tensor.shape) != tuple(expected[key].shape):
            raise ValueError(
                f"the checkpoint does not fit adapter {adapter_name!r}: {key!r} has shape {tuple(tensor.shape)}, "
                f"needed is {tuple(expected[key].shape)}"
            )


def without_adapter_name(key: str, adapter_name: str) -> str | None:
    """The checkpoint key of a bio tensor, or None if the key is not one of this adapter."""
    path, found, rest = f".{key}".rpartition(f".{CONTAINER}.{adapter_name}.")
    return f"{path}.{CONTAINER}.{rest}"[1:] if found else None


def signature(weights: Mapping[str, nn.Module]) -> dict[str, float]:
    """Root mean square of each adapted layer's frozen weight: tells one base model from another, whatever the dtype."""
    found = {}
    for name, layer in weights.items():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta:
            found[name] = float(f"{weight.detach().float().square().mean().sqrt().item():.4g}")
    return found
