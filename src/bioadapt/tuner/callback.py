"""What learning needs of `transformers.Trainer`.

It is a module of its own because transformers imports PEFT in the middle of what a callback derives from, and PEFT is
taught the method right then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .auxiliary import Number
from .learning import commit, learning_of, penalties
from .movement import warn_if_still


class BioTrainerCallback(TrainerCallback):
    """Brings the auxiliary terms into a `transformers.Trainer` (and whatever derives from it) by their gradient.

    The reported loss stays the task's own. Under gradient accumulation and fp16 loss scaling the terms are scaled as
    the task's loss is: by labels, where the Trainer counts those of a step, else every micro-batch alike. At the end it
    warns if the adapters have hardly moved what their layers put out, with a learning rate to try.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batch: tuple[tuple, dict[str, Any]] | None = None

        def watch(module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
            self._batch = given, named
            self._weigh(args, kwargs, named)

        self._watched = kwargs["model"].register_forward_pre_hook(watch, with_kwargs=True)
        self._weigh(args, kwargs, {})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._weigh(args, kwargs, {})
        for learning in learning_of(kwargs["model"]):
            learning.terms.forget()
            learning.committed.clear()
            for rule in learning.rules():
                rule.announced = True
                rule.forget()
        terms = penalties(kwargs["model"])
        if terms:  # once per step of the optimiser, whose gradients are still empty
            (self._scale(kwargs) * torch.stack([term.to(terms[0].device) for term in terms]).sum()).backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Where the optimiser holds partitions instead of the parameters (ZeRO), its step does not tell whose they are.
        skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        for learning in learning_of(kwargs["model"]):
            rules = learning.rules()
            if not skipped:
                commit([(learning, rule) for rule in rules if id(rule) not in learning.committed])
            for rule in rules:
                rule.forget()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watched.remove()
        for learning in learning_of(kwargs["model"]):
            learning.terms.factor = None
            learning.terms.forget()
            for rule in learning.rules():
                rule.announced = False
        batch, self._batch = self._batch, None
        if batch is not None:
            given, named = batch
            model = kwargs["model"]
            warn_if_still(model, lambda: model(*given, **named), args.learning_rate)

    def _weigh(self, args: Any, kwargs: dict[str, Any], given: dict[str, Any]) -> None:
        weight = self._scale(kwargs) * _share_of_step(kwargs["model"], args, given)
        for learning in learning_of(kwargs["model"]):
            learning.terms.factor = weight

    @staticmethod
    def _scale(kwargs: dict[str, Any]) -> float:
        """What fp16 training multiplies the loss by."""
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        return 1.0 if scaler is None else scaler.get_scale()


def _share_of_step(model: Any, args: Any, given: dict[str, Any]) -> Number:
    """What part of a step's loss a micro-batch is, as the Trainer has it."""
    labels, counted = given.get("shift_labels", given.get("labels")), given.get("num_items_in_batch")
    parts = max(args.gradient_accumulation_steps, 1)
    if not isinstance(labels, Tensor) or counted is None:
        return 1.0 / parts
    replicas = args.world_size if getattr(args, "average_tokens_across_devices", False) else 1
    shifted = "shift_labels" in given or getattr(model.config, "is_encoder_decoder", False)
    if getattr(model, "loss_type", None) == "ForCausalLM" and not shifted:
        # A language model predicts no first token, so the Trainer does not count it; the terms are about all of them.
        counted = counted + labels[..., 0].ne(-100).sum() * parts * replicas
    return labels.ne(-100).sum() * replicas / counted
