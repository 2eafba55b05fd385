"""The file format of a saved adapter: its keys, its fingerprints, and writing that is whole or has not happened.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``), and under ``trained_along`` the
adapters of other methods that trained below the bio adapter, each as PEFT itself saves it. Keys of tensors are those of
the plain base, whatever lies underneath: ``base_model.model.<path>.nrn_circuit.<primitive>.<tensor>``.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ._version import __version__
from ._words import suggest

# No plausible adapter name is part of it: PEFT warns, and may re-initialise weights, when the name of an adapter is
# contained in the prefix of its method.
PREFIX = "nrn_"
CONTAINER = f"{PREFIX}circuit"
ROOT = "base_model.model."
ALONG = "trained_along"

# Fields that change nothing of what the adapter computes, and may be edited.
_DESCRIPTIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bioadapt_version",
        "fingerprint",
        "inference_mode",
        "peft_version",
        "revision",
        "settings_fingerprint",
        "trained_over",
    }
)
_UNDER_WAY, _COMPLETE = ".saving", "complete"
_ABANDONED = 3600.0  # seconds after which nobody is writing a file of an adapter any more


# -- keys --


def without_adapter_name(key: str, adapter_name: str) -> str | None:
    """The checkpoint key of a bio tensor, or None if the key is not one of this adapter."""
    path, found, rest = f".{key}".rpartition(f".{CONTAINER}.{adapter_name}.")
    return f"{path}.{CONTAINER}.{rest}"[1:] if found else None


def bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their names in the plain base."""
    return {key.removeprefix(ROOT): tensor for key, tensor in tensors.items()}


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


# -- fingerprints --


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, independent of order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a sharded one
        tensor = tensor.cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings_fingerprint(content: Mapping[str, Any]) -> str:
    """SHA-256 over the fields of an ``adapter_config.json`` that change what the adapter computes."""
    settings = {name: value for name, value in content.items() if name not in _DESCRIPTIVE}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_settings(content: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` if a configuration is not the one that was saved; older files do not say which that was."""
    expected = content.get("settings_fingerprint")
    if expected is not None and settings_fingerprint(content) != expected:
        raise ValueError(
            f"{where}/{CONFIG_NAME} was changed since it was saved, so its adapter would be another function. To load "
            "it nevertheless, set settings_fingerprint to null in it"
        )


def check_tensors(tensors: Mapping[str, Tensor], content: Mapping[str, Any], where: str) -> list[str]:
    """Raise `ValueError` if the tensors of a file are not those that its configuration was saved with.

    Files without ``settings_fingerprint`` are older: their fingerprint leaves out all but the adapter's own tensors and
    its modules to save, such as embeddings.

    Returns:
        The names of tensors that no fingerprint covers.
    """
    expected, given = content.get("fingerprint"), bare(tensors)
    covered = given
    if expected is None or content.get("settings_fingerprint") is None:
        covered = _covered_by_older_files(given, tuple(content.get("modules_to_save") or ()))
    if expected is not None and fingerprint(covered) != expected:
        raise ValueError(
            f"{where} does not hold the tensors that its {CONFIG_NAME} was saved with: it was changed, damaged, or "
            f"belongs to another adapter. To load it nevertheless, set fingerprint to null in {CONFIG_NAME}"
        )
    return sorted(given.keys() - covered.keys())


def _covered_by_older_files(tensors: Mapping[str, Tensor], heads: tuple[str, ...]) -> dict[str, Tensor]:
    def owned(key: str) -> bool:
        modules = (key[:dot] for dot, letter in enumerate(key) if letter == ".")
        return f".{CONTAINER}." in f".{key}" or any(module.endswith(heads) for module in modules)  # as PEFT matches

    return {key: tensor for key, tensor in tensors.items() if owned(key)}


def check_trained_over(record: Any) -> None:
    """Raise `ValueError` if the record of what lay underneath has another form than the one that is written."""

    def is_adapter(entry: Any) -> bool:
        texts = isinstance(entry, dict) and all(
            isinstance(entry.get(key), str) for key in ("name", "peft_type", "fingerprint")
        )
        place = PurePosixPath(entry.get("saved_in") or "") if texts else None
        return place is not None and not place.is_absolute() and ".." not in place.parts

    well_formed = record is None or (
        isinstance(record, dict)
        and isinstance(record.get("base"), str | None)
        and isinstance(record.get("signature", {}), dict)
        and all(isinstance(value, int | float) for value in record.get("signature", {}).values())
        and isinstance(record.get("adapters"), list)
        and all(is_adapter(entry) for entry in record["adapters"])
    )
    if not well_formed:
        raise ValueError(
            f"trained_over={record!r}: accepted are None or a dict with 'base' (a name or None), 'signature' (a number "
            "by layer) and 'adapters' (a list of dicts with 'name', 'peft_type' and 'fingerprint')"
        )


# -- files --


def weights_file(folder: Path) -> Path | None:
    """The file of tensors that PEFT reads in a folder."""
    return next((folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / name).is_file()), None)


@contextmanager
def refuse_unreadable(where: Any) -> Iterator[None]:
    """Raise `ValueError` with the name of the file that cannot be read in full."""
    try:
        yield
    except (SafetensorError, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{where} cannot be read, it may be cut off: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU."""
    with refuse_unreadable(path):
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)


def write_configuration(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``adapter_config.json`` whole or not at all: a save that is cut off leaves the old file."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{CONFIG_NAME}.{os.getpid()}"
    try:
        unfinished.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / CONFIG_NAME)
    finally:
        unfinished.unlink(missing_ok=True)


def record_fingerprints(folder: Path, trained_over: Mapping[str, Any] | None) -> None:
    """Write into the configuration of a folder what its tensors and its settings are known by afterwards."""
    content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    path = weights_file(folder)
    content["fingerprint"] = None if path is None else fingerprint(bare(read_tensors(path)))
    content["settings_fingerprint"] = settings_fingerprint(content)
    content["trained_over"], content["bioadapt_version"] = trained_over, __version__
    write_configuration(folder, content)


@contextmanager
def whole_or_not_at_all(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``folder`` file by file once the block has ended well.

    Killed before that, ``folder`` is what it was. Killed while files are put in place, it is completed by
    `complete_saving`, which every loading and saving begins with. Other files of ``folder`` stay.
    """
    complete_saving(folder)
    new = not folder.exists()
    for left in (folder / _UNDER_WAY).glob("*"):  # by processes that were killed
        with suppress(OSError):
            if left.stat().st_mtime < time.time() - _ABANDONED:
                shutil.rmtree(left)
    stage = folder / _UNDER_WAY / str(os.getpid())
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    card = folder / "README.md"  # PEFT reads the one that is there and writes into it
    try:
        if card.is_file():
            shutil.copy2(card, stage)
        yield stage
        _put_in_place(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        with suppress(OSError):  # another process is saving here, or the folder is wanted
            stage.parent.rmdir()
            if new:
                folder.rmdir()


def _put_in_place(stage: Path, folder: Path) -> None:
    for inner in sorted(path.parent for path in stage.glob(f"*/{CONFIG_NAME}")):  # adapters in folders of their own
        _put_in_place(inner, folder / inner.name)
    if not any(stage.iterdir()):
        return
    if (folder / ALONG).is_dir():
        (stage / ALONG).mkdir(exist_ok=True)  # an empty one takes the old one away
    complete = folder / _UNDER_WAY / _COMPLETE
    while stage.exists():
        complete.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(stage, complete)
        except OSError:
            if not complete.exists():
                raise  # otherwise another process is saving here, and its files go into their places first
        complete_saving(folder)


def complete_saving(folder: Path) -> None:
    """Finish a save that was cut off when everything had been written, but was not in its place yet."""
    complete = folder / _UNDER_WAY / _COMPLETE
    if not complete.is_dir():
        return
    for path in sorted(complete.iterdir(), key=lambda path: (path.name == CONFIG_NAME, path.name)):
        place = folder / path.name
        with suppress(FileNotFoundError):  # a process beside this one was faster
            if path.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            elif path.name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
                for name in {SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME} - {path.name}:
                    (folder / name).unlink(missing_ok=True)
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            else:
                os.replace(path, place)
    with suppress(OSError):
        complete.rmdir()
        complete.parent.rmdir()
