"""Half precision, and gradient checkpointing: contract, points 4 and 8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..compare import assert_equal_tensors, assert_finite, assert_same, gradients, seeded
from .subject import Adapted, Inside, bio_buffers, is_bio, on


class Precision(Inside):
    """The host may be in half precision; the adapter computes in fp32."""

    def test_half_precision_host(self, adapted: Adapted) -> None:
        model = adapted.woken(adapted.host.model().bfloat16()).train()
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if is_bio(name) else torch.bfloat16), name
        self._assert_trains(adapted, model)

    @on("bert", "gpt2", "resnet")
    def test_half_precision_adapter(self, adapted: Adapted) -> None:
        """Cast along with the host, by the user or by a distributed trainer."""
        model = adapted.woken().train().bfloat16()
        assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
        self._assert_trains(adapted, model)

    @staticmethod
    def _assert_trains(adapted: Adapted, model: nn.Module) -> None:
        with seeded(6):
            found = adapted.output(model)
        assert found.dtype == torch.bfloat16
        found.float().square().mean().backward()
        adapted.step(model)
        assert_finite({"output": found, **gradients(model), **bio_buffers(model)}, f"bf16 on {adapted.host.name}")


class Checkpointing(Inside):
    """Recomputation changes neither gradients nor what is learned."""

    @on("bert", "qwen2", "t5", "vit")
    @pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
    def test_gradient_checkpointing_changes_nothing(self, adapted: Adapted, reentrant: bool) -> None:
        grads, learned = self._trained(adapted, None)
        found_grads, found_learned = self._trained(adapted, {"use_reentrant": reentrant})
        for name, expected in grads.items():
            assert_same(found_grads[name], expected, f"gradient of {name}", tolerance=1e-6)
        assert_equal_tensors(found_learned, learned, "what was learned")

    @staticmethod
    def _trained(adapted: Adapted, checkpointing: dict[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = adapted.woken().train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
            model.enable_input_require_grads()
            assert model.is_gradient_checkpointing
        with seeded(6):
            for seed in (92, 93):
                adapted.loss(model, seed=seed).backward()
            adapted.step(model)
        return gradients(model), bio_buffers(model)
