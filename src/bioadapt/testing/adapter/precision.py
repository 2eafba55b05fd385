"""Half precision, and gradient checkpointing: contract, points 4 and 8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compare import assert_finite, assert_identical, assert_same, gradients, seeded
from .subject import Adapted, Inside, bio_buffers, is_bio, on


class Precision(Inside):
    """The host may be in half or double precision; the adapter computes in fp32 at least."""

    def test_half_precision_host(self, adapted: Adapted) -> None:
        model = adapted.woken(adapted.host.model().bfloat16()).train()
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if is_bio(name) else torch.bfloat16), name
        assert_trains(adapted, model)

    @on("bert", "gpt2", "resnet")
    def test_half_precision_adapter(self, adapted: Adapted) -> None:
        """Cast along with the host, by the user or by a distributed trainer."""
        model = adapted.woken().train().bfloat16()
        assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        assert_trains(adapted, model)

    @on("bert", "gpt2", "resnet")
    def test_double_precision_host(self, adapted: Adapted) -> None:
        """What the adapter is added to must not pass through fp32."""
        base, model = (adapted.host.model().double() for _ in range(2))
        assert_identical(adapted.output(adapted.fresh(model)), adapted.output(base), f"fp64 on {adapted.host.name}")
        assert_trains(adapted, adapted.woken(adapted.host.model().double()).train(), torch.float64)


ORDER = 1e-4  # of sums over tokens and channels that cancel, relative to the largest result


class Checkpointing(Inside):
    """Recomputation changes neither gradients nor what is learned."""

    @on("bert", "qwen2", "t5")
    def test_gradient_checkpointing_changes_nothing(self, adapted: Adapted) -> None:
        expected = trained(adapted, None)
        for reentrant in (False, True):
            found = trained(adapted, {"use_reentrant": reentrant})
            for name, tensor in expected.items():
                # Gradients of one feature from several projections may be added in another order.
                assert_same(found[name], tensor, f"{name} with checkpointing, re-entrant={reentrant}", ORDER)


def assert_trains(adapted: Adapted, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    with seeded(6):
        found = adapted.output(model)
    assert found.dtype == dtype
    found.float().square().mean().backward()
    adapted.step(model)
    assert_finite({"output": found, **gradients(model), **bio_buffers(model)}, f"{dtype} on {adapted.host.name}")


def trained(adapted: Adapted, checkpointing: dict[str, Any] | None) -> dict[str, Tensor]:
    """Gradients, and what was learned."""
    model = adapted.woken().train()
    # Checkpointing needs both, and each by itself makes attention choose other kernels.
    model.enable_input_require_grads()
    uncached = {"use_cache": False} if adapted.host.causal else {}
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        assert model.is_gradient_checkpointing
    with seeded(6):
        for seed in (92, 93):
            adapted.loss(model, seed=seed, **uncached).backward()
    grads = gradients(model)
    adapted.step(model, **uncached)
    return {**grads, **bio_buffers(model)}
