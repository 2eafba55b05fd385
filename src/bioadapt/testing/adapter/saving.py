"""Saved adapters and copies give the same numbers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from ...checkpoint import PREFIX
from ..compare import assert_equal_tensors, assert_identical
from .subject import Adapted, Inside, bio_tensors, on, with_other_parameters

ROOT = "base_model.model."


class Saving(Inside):
    """Exact through a file, and through a copy."""

    @on("bert", "gpt2", "t5", "resnet")
    def test_round_trip_is_exact(self, adapted: Adapted, tmp_path: Path) -> None:
        model = adapted.woken()
        model.save_pretrained(tmp_path)
        files = {path.name for path in tmp_path.iterdir()} - {"README.md"}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}
        # Trainable, as the original is: matmul chooses its kernel by that, and kernels differ in the last bits.
        loaded = PeftModel.from_pretrained(adapted.host.model(), str(tmp_path), is_trainable=True).eval()
        assert_equal_tensors(bio_tensors(loaded), bio_tensors(model), "loaded tensors")
        assert_identical(adapted.output(loaded), adapted.output(model), "the loaded adapter's output")
        assert_keys_of_the_plain_model(load_file(tmp_path / "adapter_model.safetensors"), adapted, model)

    @on("bert", "gpt2", "resnet")
    @pytest.mark.parametrize("way", ["copied", "pickled"])
    def test_copies_are_equal_and_independent(self, adapted: Adapted, way: str) -> None:
        model = adapted.wake().train()
        adapted.output(model)  # with a graph in memory
        expected = adapted.output(model.eval())
        other = copy.deepcopy(model) if way == "copied" else pickle.loads(pickle.dumps(model))
        assert_identical(adapted.output(other), expected, "the copy's output")
        adapted.output(with_other_parameters(other))
        assert_identical(adapted.output(model), expected, "the original after a change of the copy")


def assert_keys_of_the_plain_model(saved: dict[str, Tensor], adapted: Adapted, model: PeftModel) -> None:
    """``base_model.model.<path in the plain model>.<prefix>...``, one for every tensor of the adapter."""
    plain = dict(adapted.host.model().named_modules())
    assert len(saved) == len(bio_tensors(model))
    for key in saved:
        path, _, rest = key.partition(f".{PREFIX}")
        assert key.startswith(ROOT) and path.removeprefix(ROOT) in plain and rest, key
