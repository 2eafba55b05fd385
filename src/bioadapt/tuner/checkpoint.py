"""Saved adapters: keys that do not depend on what lies underneath, fingerprints, and refusals in words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .._words import suggest
from .bridge import CONTAINER

ROOT = "base_model.model."


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, independent of order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def own_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The bio adapter's part of a checkpoint, under names without PEFT's root."""
    return {key.removeprefix(ROOT): value for key, value in tensors.items() if f".{CONTAINER}." in f".{key}"}


def check_file(path: Path, expected: str | None) -> None:
    """Refuse a weights file that cannot be read in full, or whose adapter is not the one that was saved.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors, it may be cut off: {error}") from error
    check_fingerprint(own_tensors(tensors), expected, str(path))


def check_fingerprint(tensors: Mapping[str, Tensor], expected: str | None, where: str) -> None:
    """Raise `ValueError` if the tensors are not those that the configuration was saved with."""
    if expected is not None and fingerprint(tensors) != expected:
        raise ValueError(
            f"{where} does not hold the tensors that its adapter_config.json was saved with: it was changed, damaged, or "
            "belongs to another adapter. To load it nevertheless, set fingerprint to null in adapter_config.json"
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
    marked = re.sub(rf"(\.|^){CONTAINER}\.{re.escape(adapter_name)}\.", rf"\g<1>{CONTAINER}.", key, count=1)
    return marked if marked != key else None


def signature(weights: Mapping[str, nn.Module]) -> dict[str, float]:
    """Root mean square of each adapted layer's frozen weight: tells one base model from another, whatever the dtype."""
    found = {}
    for name, layer in weights.items():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta:
            found[name] = float(f"{weight.detach().float().square().mean().sqrt().item():.4g}")
    return found
