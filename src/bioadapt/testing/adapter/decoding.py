"""Cached decoding equals the full forward: contract, point 3."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel

from ..compare import assert_same
from .leaks import padded, with_padding
from .subject import Adapted, Inside, on

DECODERS = on("gpt2", "qwen2", "t5")
PROMPT, NEW = 3, 4


class AdapterDecoding(Inside):
    """Greedy, beam, and by hand: the cache carries all there is."""

    @DECODERS
    @pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beam"])
    def test_generation_is_the_same_with_and_without_cache(self, adapted: Adapted, beams: int) -> None:
        model, inputs = adapted.woken(), prompts(adapted)
        cached, full = (generated(model, inputs, beams, cache) for cache in (True, False))
        found, expected = cached.sequences, full.sequences
        assert torch.equal(found, expected), (
            f"{adapted.host.name} goes on with {found.tolist()}, not {expected.tolist()}"
        )
        if beams > 1:  # the best words may be the same by chance, their probability is not
            assert_same(cached.sequences_scores, full.sequences_scores, "log-probability of the continuations")

    @on("gpt2", "qwen2")
    def test_padded_prompts_continue_as_alone(self, adapted: Adapted) -> None:
        model, inputs = adapted.woken(), prompts(adapted)
        together = generated(model, inputs, beams=1, cache=True).sequences[:, -NEW:]
        for sample, real in enumerate(inputs["attention_mask"].bool()):
            alone = {"input_ids": inputs["input_ids"][sample : sample + 1, real]}
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            found = generated(model, alone, beams=1, cache=True).sequences[0, -NEW:]
            assert torch.equal(together[sample], found), f"prompt {sample} continues differently in a padded batch"

    @DECODERS
    def test_prefill_and_steps_equal_the_full_forward(self, adapted: Adapted) -> None:
        host, model, inputs = adapted.host, adapted.woken(), adapted.host.inputs()
        expected = host.output(model, {**inputs, "use_cache": False})
        ids = inputs[host.stream]
        with torch.no_grad():
            found = model(**{**inputs, host.stream: ids[:, :PROMPT]}, use_cache=True)
            parts = [found.logits]
            for place in range(PROMPT, ids.shape[1]):
                step = {**inputs, host.stream: ids[:, place : place + 1]}
                found = model(**step, past_key_values=found.past_key_values, use_cache=True)
                parts.append(found.logits)
        assert_same(torch.cat(parts, 1), expected, f"steps on {host.name}")


def prompts(adapted: Adapted) -> dict[str, Any]:
    """Prompts of several lengths, padded on the left."""
    ids = adapted.host.inputs()["input_ids"]
    return with_padding(ids, padded(ids, "left"), causal=False, stream=adapted.host.stream)


def generated(model: PeftModel, inputs: dict[str, Any], beams: int, cache: bool) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        num_beams=beams,
        use_cache=cache,
        return_dict_in_generate=True,
        output_scores=True,
    )
