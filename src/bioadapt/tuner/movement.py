"""How far adapters have moved the layers they sit on, and a warning where that is next to nothing."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .layer import BioLayer

STILL = 2e-3  # a LoRA at 1e-3 moves its layers by some 5e-2 within thirty steps
USUAL = 3e-2
HIGHEST_RATE = 1e-2


def movement(model: nn.Module, forward: Callable[[], Any]) -> dict[str, float]:
    """By layer: the size of what its adapters change relative to the layer's output, in one forward.

    Args:
        model: with bio adapters; it is run in eval mode and without gradients.
        forward: calls the model on a batch.

    Returns:
        Norm of the change over norm of the output, for each layer that was called with trained adapters active.
    """
    found: dict[str, float] = {}

    def compare(layer: BioLayer, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not layer.disable_adapters and not layer.merged:
            new, old = _first(output), _first(layer.base_layer(*args, **kwargs))
            found[layer.path] = ((new - old).norm() / old.norm().clamp(min=1e-12)).item()

    layers = [
        module
        for module in model.modules()
        if isinstance(module, BioLayer) and any(parameter.requires_grad for parameter in module.circuits.parameters())
    ]
    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return found


def warn_if_still(model: nn.Module, forward: Callable[[], Any], learning_rate: float) -> None:
    """Warn, with a rate to try, where a training has hardly moved the layers with bio adapters."""
    found = movement(model, forward)
    if not found:
        return
    moved = statistics.median(found.values())
    if moved >= STILL:
        return
    rate = min(HIGHEST_RATE, learning_rate * min(USUAL / max(moved, 1e-9), 1e3))
    advice = (
        f"try learning_rate={rate:.0e} or more steps"
        if rate > 2 * learning_rate
        else "train for more steps, or look at whether the loss reaches the adapter at all"
    )
    warnings.warn(
        f"the bio adapters hardly moved: at a learning rate of {learning_rate:.0e} they change the output of their "
        f"layers by {moved:.2%} in the median, where a trained LoRA changes some {USUAL:.0%}; {advice}"
    )


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
