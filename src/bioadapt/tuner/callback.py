"""What learning needs of `transformers.Trainer`.

It is a module of its own because transformers imports PEFT in the middle of what a callback derives from, and PEFT is
taught the method right then.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from .learning import commit, penalties, scopes_of


class BioTrainerCallback(TrainerCallback):
    """Brings the auxiliary terms into a `transformers.Trainer` (and whatever derives from it) by their gradient.

    The reported loss stays the task's own. Under gradient accumulation and fp16 loss scaling the terms are scaled as
    the task's loss is.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._set(args, kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._set(args, kwargs)
        terms = penalties(kwargs["model"])
        if terms:  # once per step of the optimiser, whose gradients are still empty
            (self._scale(kwargs) * torch.stack([term.to(terms[0].device) for term in terms]).sum()).backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Where the optimiser holds partitions instead of the parameters (ZeRO), its step does not tell whose they are.
        for scope in scopes_of(kwargs["model"]):
            commit(scope.layers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for scope in scopes_of(kwargs["model"]):
            scope.injected = None

    def _set(self, args: Any, kwargs: dict[str, Any]) -> None:
        for scope in scopes_of(kwargs["model"]):
            scope.injected = self._scale(kwargs) / max(args.gradient_accumulation_steps, 1)

    @staticmethod
    def _scale(kwargs: dict[str, Any]) -> float:
        """What fp16 training multiplies the loss by."""
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()
