"""A LoRA's learning rate trains it: contract, point 10."""

from __future__ import annotations

from functools import cache, partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from ..compare import random, seeded
from ..hosts import HOSTS
from .subject import Adapted, Inside, on

RATE, STEPS = 1e-3, 12
LORA = LoraConfig(r=8, lora_alpha=8, target_modules=["query", "value"])


class LearningRate(Inside):
    """At a LoRA's rate and in its steps an adapter moves what it sits in.

    Attributes:
        least_movement: relative to a LoRA of rank 8 on a tiny BERT, where populations are small and gates weak; on a
            real model `benchmarks/rates.py` asks for half.
    """

    least_movement: float = 1 / 32

    @on("bert")
    def test_a_loras_learning_rate_moves_it(self, adapted: Adapted) -> None:
        own = _moved(adapted, adapted.fresh())
        lora = _moved_by_lora(adapted.host.name)
        assert own >= self.least_movement * lora, (
            f"{STEPS} steps of AdamW at {RATE:g} change the output by {own:.1%}, where a LoRA changes {lora:.1%}: "
            "a larger zero_scale is needed"
        )


@cache
def _moved_by_lora(host: str) -> float:
    with seeded(12):
        model = get_peft_model(HOSTS[host].model(), LORA)
    return _moved(Adapted([], {}, HOSTS[host]), model)


def _moved(adapted: Adapted, model: PeftModel) -> float:
    """How far training towards random outputs moves the output, relative to its size."""
    output = partial(adapted.output, model.eval())
    with torch.no_grad():
        before = [output(seed=seed) for seed in range(3)]
    targets = [random(*given.shape, seed=80 + seed) for seed, given in enumerate(before)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        loss: Tensor = (output(seed=step % 3) - targets[step % 3]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return max(((output(seed=seed) - old).norm() / old.norm()).item() for seed, old in enumerate(before))
