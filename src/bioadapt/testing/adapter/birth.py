"""Identity at birth, and alive; only the adapter learns: contract, points 1 and 8."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from peft import inject_adapter_in_model

from ...primitives.on_weight import OnWeight
from ..compare import assert_equal_tensors, assert_identical, copied, seeded
from ..hosts import TinyHost
from .subject import Adapted, Inside, base_tensors, bio_buffers, bio_tensors, is_bio, on


class AdapterBirth(Inside):
    """A fresh adapter changes nothing; training reaches all of it and nothing else.

    Attributes:
        alive_within: steps of training after which every tensor has had a gradient.
    """

    alive_within: int = 4

    def test_fresh_is_the_identity_bit_for_bit(self, adapted: Adapted) -> None:
        base, model = adapted.host.model(), adapted.fresh()
        for training in (False, True):
            found, expected = (adapted.output(m.train(training)) for m in (model, base))
            assert_identical(found, expected, f"a fresh adapter on {adapted.host.name}, training={training}")

    def test_training_reaches_all_of_the_adapter_and_nothing_else(self, adapted: Adapted) -> None:
        model = adapted.fresh().train()
        assert all(parameter.requires_grad == is_bio(name) for name, parameter in model.named_parameters())
        base = base_tensors(model)
        silent = {name: parameter for name, parameter in model.named_parameters() if is_bio(name)}
        optimizer = torch.optim.AdamW(silent.values(), lr=1e-2)
        with seeded(5):
            for step in range(self.alive_within):
                adapted.loss(model, seed=step).backward()
                reached = [name for name, p in silent.items() if p.grad is not None and p.grad.count_nonzero()]
                for name in reached:
                    del silent[name]
                optimizer.step()
                optimizer.zero_grad()
                if not silent:
                    break
        assert not silent, f"never a gradient at {', '.join(silent)}"
        assert_equal_tensors(base_tensors(model), base, "the base after training")

    def test_woken_changes_every_sample(self, adapted: Adapted) -> None:
        change = adapted.output(adapted.woken()) - adapted.output(adapted.host.model())
        strength = change.flatten(1).abs().amax(1)
        assert (strength > 1e-4).all(), f"woken, but changes of {strength.tolist()}"

    @on("qwen2", "t5", "resnet")
    def test_injected_without_a_peft_model_computes_the_same(self, adapted: Adapted) -> None:
        with seeded(12):
            injected = inject_adapter_in_model(adapted.config(), adapted.host.model()).eval()
        wrapped = adapted.woken()
        own = {name.removeprefix("base_model.model."): tensor for name, tensor in bio_tensors(wrapped).items()}
        injected.load_state_dict(own, strict=False)
        assert_identical(adapted.output(injected), adapted.output(wrapped), f"injected into {adapted.host.name}")

    @on("bert", "qwen2")
    def test_local_rules_learn_in_training_only(self, adapted: Adapted) -> None:
        model = adapted.woken().train()
        before = bio_buffers(model)
        with torch.no_grad():
            adapted.step(model)
        assert_equal_tensors(bio_buffers(model), before, "learned without gradients")
        with model.disable_adapter():
            adapted.step(model)
        assert_equal_tensors(bio_buffers(model), before, "learned while disabled")
        adapted.step(model.eval())
        assert_equal_tensors(bio_buffers(model), before, "learned in eval")
        adapted.loss(model.train()).backward()
        assert_equal_tensors(bio_buffers(model), before, "learned before the optimiser's step")
        adapted.step(model)
        changed = [name for name, buffer in bio_buffers(model).items() if not torch.equal(buffer, before[name])]
        # A rule that acts on updates may have no buffer of its own.
        assert bool(changed) == (adapted.learns and bool(before)), f"learned in training: {changed}"

    def test_eval_leaves_no_trace(self, adapted: Adapted) -> None:
        model = adapted.woken()
        before = copied(model.named_buffers())
        first = adapted.output(model)
        adapted.output(model, seed=5)
        assert_identical(adapted.output(model), first, "the same input again")
        assert_equal_tensors(copied(model.named_buffers()), before, "buffers after eval")


class Refusals(Inside):
    """What cannot be served is refused with the names of both, and the model is as it was."""

    SITES: ClassVar = {
        "resnet": ("encoder.stages.1.layers.0.layer.1.convolution",),  # 3 x 3
        "bert": ("embeddings.word_embeddings", "encoder.layer.1.output.LayerNorm"),
    }

    @on(*SITES)
    def test_unusual_sites_are_served_or_refused(self, adapted: Adapted) -> None:
        """An embedding reads no features; a kernel of several places and a normalisation are no weight matrix."""
        for site in self.SITES[adapted.host.name]:
            self.assert_served_or_refused(adapted, site)

    def assert_served_or_refused(self, adapted: Adapted, site: str) -> None:
        reads_features = "embeddings" not in site
        refused = [
            info.name
            for info in adapted.infos
            if (issubclass(info.factory, OnWeight) and not info.factory.per_channel)
            or (info.needs_input and not reads_features)
        ]
        if refused:
            assert_refused(adapted, refused[0], site, target_modules=[site])
            return
        expected = adapted.output(adapted.host.model())
        assert_identical(adapted.output(adapted.fresh(target_modules=[site])), expected, f"a fresh adapter at {site}")
        woken = adapted.wake(target_modules=[site])
        assert not torch.equal(adapted.output(woken), expected), f"a woken adapter at {site} changes nothing"

    @on("gpt2", "qwen2", "t5")
    def test_global_primitives_are_refused_on_causal_models(self, anywhere: Adapted, host: TinyHost) -> None:
        refused = [info.name for info in anywhere.infos if info.kind == "global"]
        if not refused:
            pytest.skip("no global primitive")
        assert_refused(anywhere, refused[0], "")


def assert_refused(adapted: Adapted, name: str, site: str, **changes: object) -> None:
    base = adapted.host.model().requires_grad_(True)
    modules, attributes = dict(base.named_modules()), set(vars(base))
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules.values()]
    expected = adapted.output(base)
    with pytest.raises(ValueError) as refusal:
        adapted.fresh(base, **changes)
    assert name in str(refusal.value) and site in str(refusal.value), f"the names are missing: {refusal.value}"
    assert dict(base.named_modules()) == modules and set(vars(base)) == attributes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules.values()] == hooks
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert_identical(adapted.output(base), expected, "the model after a refusal")
