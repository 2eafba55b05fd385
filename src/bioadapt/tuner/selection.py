"""Choosing synapses by the gradient of the frozen weights, which are never asked for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..primitives.base import Primitive
from .layer import BioLayer
from .sites import Layout
from .tree import bio_layers


class _GradientOfOutput(torch.autograd.Function):
    """The identity on a layer's output; backward tells the layer's input and the gradient of its output."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, v: Tensor, anchor: Tensor, tell: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(v, anchor)
        ctx.tell = tell
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        v, anchor = ctx.saved_tensors
        ctx.tell(v, grad)
        return grad, None, torch.zeros_like(anchor), None


class _Gradient:
    """The gradient of one layer's weight, summed over batches."""

    def __init__(self, layer: BioLayer, primitives: list[Primitive], anchor: Tensor) -> None:
        self.layer, self.primitives, self.anchor = layer, primitives, anchor
        self.total = torch.zeros(layer.site.d_out, layer.site.d_in)
        self.reached = False

    def watch(self, base_layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook."""
        v = args[0] if args else next(iter(kwargs.values()))
        y, *others = output if isinstance(output, tuple) else (output,)
        watched = _GradientOfOutput.apply(y, v.detach(), self.anchor, self.add)
        return (watched, *others) if isinstance(output, tuple) else watched

    def add(self, v: Tensor, grad: Tensor) -> None:
        site = self.layer.site
        layout = Layout.of(grad, site, None)
        read = layout.input_to_sequence(v, site)
        assert read is not None  # the site reads features, or it would not serve
        g = layout.to_sequence(grad).flatten(0, 1).float()
        with torch.autocast(g.device.type, enabled=False):
            self.total += (g.T @ read.flatten(0, 1).float()).to(self.total.device)
        self.reached = True


def select_synapses(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> None:
    """Let every `neuro_ada` of ``selection="gradient"`` adapt the synapses with the largest gradient.

    One pass over the batches sums the gradient of the loss by each layer's frozen weight, and the k largest magnitudes
    of each row are chosen. The pass runs in eval mode, so without dropout. The weight itself is not touched and may be
    quantised: its gradient follows from the layer's input and the gradient of its output.

    The sums take 4 bytes for each number of the adapted layers' weights. They lie in the main memory, so that a device
    holds the gradient of one layer at a time and no more; each batch copies every layer's from there once.

    Args:
        model: a model with a fresh bio adapter, which is active. It is left as it was, but for the choice.
        batches: what ``model(**batch).loss`` is taken of, such as a data loader.
        loss: ``loss(model, batch)`` gives the scalar instead.

    Raises:
        ValueError: there is no such layer, no batch, no loss, a layer that no batch reaches, or one whose values have
            been trained already; nothing has been chosen then.
    """
    anchor = torch.zeros((), requires_grad=True)
    gradients = [_Gradient(layer, found, anchor) for layer in bio_layers(model) if (found := _waiting(layer))]
    if not gradients:
        raise ValueError("the active adapter has no neuro_ada with selection='gradient': there is nothing to select")
    for gradient in gradients:
        if any(primitive.values.count_nonzero() for primitive in gradient.primitives):
            raise ValueError(
                f"the values of neuro_ada at {gradient.layer.path} have been trained: they belong to the synapses "
                "that were chosen before. Select for a fresh adapter"
            )
    seen = False
    with _recording(model, gradients), torch.enable_grad():
        for batch in batches:
            seen = True
            torch.autograd.grad(_loss_of(model, batch, loss), anchor, allow_unused=True)
    if not seen:
        raise ValueError("batches is empty: synapses are selected by the gradient of at least one batch")
    for gradient in gradients:
        if not gradient.reached:
            raise ValueError(f"no gradient has reached {gradient.layer.path}: the loss does not depend on it")
    for gradient in gradients:
        for primitive in gradient.primitives:
            primitive.choose(gradient.total.abs())


def _waiting(layer: BioLayer) -> list[Primitive]:
    circuits = [layer.circuits[name] for name in layer.active_adapters if name in layer.circuits]
    found = [circuit["neuro_ada"] for circuit in circuits if "neuro_ada" in circuit]
    return [primitive for primitive in found if primitive.selection == "gradient"]


def _loss_of(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor] | None) -> Tensor:
    if loss is not None:
        return loss(model, batch)
    found = getattr(model(**batch), "loss", None)
    if found is None:
        raise ValueError("model(**batch) gives no loss: put labels into the batches, or give loss=")
    return found


@contextmanager
def _recording(model: nn.Module, gradients: list[_Gradient]) -> Iterator[None]:
    """The model in eval mode, with hooks on the layers below the bio layers; afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    hooks = [
        gradient.layer.base_layer.register_forward_hook(gradient.watch, with_kwargs=True) for gradient in gradients
    ]
    model.eval()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
