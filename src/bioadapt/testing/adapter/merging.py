"""Merges exactly, or refuses by name and changes nothing: contract, point 7."""

from __future__ import annotations

import pytest

from ..compare import assert_equal_tensors, assert_identical, assert_same, copied
from .subject import Adapted, Inside, base_tensors, on
from .switching import ALL, over_lora, with_second

MERGED = 1e-4  # fp32 sums in another order, through two layers
SITES = on("bert", "gpt2", "qwen2", "resnet")


class AdapterMerging(Inside):
    """Either the weight does what the adapter did, or nothing happened."""

    @SITES
    def test_merge_equals_forward_or_is_refused(self, adapted: Adapted) -> None:
        model = adapted.woken()
        if adapted.unmergeable:
            assert_merge_refused(adapted)
            return
        expected, base = adapted.output(model), base_tensors(model)
        model.merge_adapter()
        assert_same(adapted.output(model), expected, "merged", tolerance=MERGED)
        model.unmerge_adapter()
        assert_equal_tensors(base_tensors(model), base, "the base after unmerging")
        assert_identical(adapted.output(model), expected, "unmerged")
        plain = model.merge_and_unload()
        assert plain.state_dict().keys() == adapted.host.model().state_dict().keys()
        assert_same(adapted.output(plain), expected, "merged and unloaded", tolerance=MERGED)

    @on("bert", "gpt2", "resnet")
    def test_two_adapters_merge_into_their_sum(self, adapted: Adapted) -> None:
        if adapted.unmergeable:
            pytest.skip("does not merge")
        model = with_second(adapted)
        model.base_model.set_adapter(ALL)
        expected = adapted.output(model)
        model.merge_adapter(adapter_names=ALL)
        assert_same(adapted.output(model), expected, "two merged adapters", tolerance=MERGED)

    @on("bert", "gpt2", "resnet")
    def test_merging_over_a_lora_keeps_its_contribution(self, adapted: Adapted) -> None:
        if adapted.unmergeable:
            pytest.skip("does not merge")
        model = adapted.woken(over_lora(adapted))
        expected = adapted.output(model)
        plain = model.merge_and_unload()
        assert plain.state_dict().keys() == adapted.host.model().state_dict().keys()
        assert_same(adapted.output(plain), expected, "merged with the LoRA below", tolerance=MERGED)


def assert_merge_refused(adapted: Adapted) -> None:
    model = adapted.woken()
    expected, before = adapted.output(model), copied(model.state_dict().items())
    for attempt in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError) as refusal:
            attempt()
        for name in adapted.unmergeable:
            assert name in str(refusal.value), f"{name!r} is missing: {refusal.value}"
        assert_equal_tensors(copied(model.state_dict().items()), before, "the model after a refusal")
        assert_identical(adapted.output(model), expected, "the output after a refusal")
