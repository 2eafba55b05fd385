"""What learning needs beyond gradients of the user's loss: local rules and auxiliary terms."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..primitives.base import Primitive

if TYPE_CHECKING:
    from .layer import BioLayer
    from .scope import Scope


_live: weakref.WeakSet[Scope] = weakref.WeakSet()


def follow(scope: Scope) -> None:
    """Let the local rules beneath a scope run after every step of the optimiser that trains it."""
    _live.add(scope)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    learning = [scope for scope in list(_live) if any(p.learns for layer in scope.layers for p in layer.primitives())]
    if not learning:
        return
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for scope in learning:
        if any(id(parameter) in trained for layer in scope.layers for parameter in layer.circuits.parameters()):
            commit(scope.layers)


def commit(layers: Iterable[BioLayer]) -> None:
    """Let the local rules take in what the forwards since the last call observed; replicas agree on it first."""
    for layer in layers:
        for primitive in layer.primitives():
            if primitive.learns:
                _average_over_replicas(primitive)
                primitive.commit()


def _average_over_replicas(primitive: Primitive) -> None:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for name in ("forwards", *(f"observed_{statistic}" for statistic in primitive._statistics)):
        buffer = getattr(primitive, name)
        dist.all_reduce(buffer)
        buffer.div_(dist.get_world_size())


def scopes_of(model: nn.Module) -> list[Scope]:
    """The scopes of all bio layers of a model, each once."""
    from .layer import BioLayer

    found = {id(m.scope): m.scope for m in model.modules() if isinstance(m, BioLayer) and m.scope is not None}
    return list(found.values())


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Sum of the auxiliary terms: what the forwards since the last call left behind, and what depends on parameters.

    A term of the second kind is the mean over the sites of its primitive. Without any term the sum is 0.

    Add it to the loss in a training loop of your own: ``loss = task_loss + bioadapt.auxiliary_loss(model)``. With
    `transformers.Trainer` pass `BioTrainerCallback` instead. Weights are part of the terms: they are settings of the
    primitives.

    Returns:
        A scalar on the device of the model, with a graph if there are terms.

    Raises:
        RuntimeError: the terms have no graph, as happens with re-entrant gradient checkpointing.
    """
    terms: list[Tensor] = []
    for scope in scopes_of(model):
        terms.extend(scope.terms)
        scope.terms.clear()
    terms.extend(penalties(model))
    if not terms:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        return torch.zeros((), device=device)
    if not all(term.requires_grad for term in terms):
        raise RuntimeError(
            "auxiliary terms without a graph: re-entrant gradient checkpointing computes the forward without one. "
            "Use gradient_checkpointing_kwargs={'use_reentrant': False}, or train with BioTrainerCallback"
        )
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def penalties(model: nn.Module) -> list[Tensor]:
    """Terms that depend on parameters alone, each the mean over the sites where its primitive is active and trained."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    for scope in scopes_of(model):
        for layer in scope.layers:
            for name in [] if layer.disable_adapters or layer.merged else layer.active_adapters:
                for primitive in layer.circuits[name].values() if name in layer.circuits else ():
                    term = primitive.penalty() if any(p.requires_grad for p in primitive.parameters()) else None
                    if term is not None:
                        found.setdefault((name, primitive.name), []).append(term)
    return [torch.stack([term.to(terms[0].device) for term in terms]).mean() for terms in found.values()]


class WithGradientOf(torch.autograd.Function):
    """Passes features through unchanged and adds ``factor * term`` to whatever loss is differentiated later."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, term: Tensor, factor: float) -> Tensor:
        ctx.factor, ctx.like = factor, term
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.factor), None


register_optimizer_step_post_hook(_after_step)
