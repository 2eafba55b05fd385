"""Auxiliary terms: what some primitives add to the loss, and how it reaches the gradients.

A term is a mean over tokens, and so is its sum over the forwards of a stack whose gradients come together: each forward
counts by its tokens, be it one of the two sides of a pair, or a part of a batch under gradient caching.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .scope import Surroundings

Number = Tensor | float


class JointForwards:
    """Forwards whose gradients come together.

    Attributes:
        forwards: without those whose graph is gone: they were skipped.
        factor: what multiplies the gradients of their terms, once that is known.
        begun: whether gradients have come, so that a later forward belongs to others.
        asked: whether the value of their terms is part of a loss, so that the factor will come with its gradient.
        assumed: whether they ran again before that, so that 1 had to be taken for it.
    """

    def __init__(self) -> None:
        self.forwards: list[weakref.ref[Forward]] = []
        self.factor: Number | None = None
        self.begun = self.asked = self.assumed = False

    def alive(self) -> list[Forward]:
        return [forward for ref in self.forwards if (forward := ref()) is not None]

    def tokens(self) -> Number:
        return sum((forward.tokens for forward in self.alive()), 0.0)

    def promised(self, value: Tensor) -> Tensor:
        """A value without a graph as part of a loss, which takes the gradients of the terms along."""
        self.asked = True
        return _GradientOfRepetition.apply(torch.zeros((), requires_grad=True), value, self)


class ForwardsToRepeat(JointForwards):
    """Forwards without gradients, whose parts will run again with them (gradient caching)."""

    def __init__(self) -> None:
        super().__init__()
        self._tokens: Number = 0.0
        self._sum: Number = 0.0

    def count(self, tokens: Number) -> None:
        self._tokens = self._tokens + tokens

    def take(self, forward: Forward, term: Tensor) -> None:
        self._sum = self._sum + forward.tokens * term

    def tokens(self) -> Number:
        return self._tokens

    def value(self) -> Tensor:
        return torch.as_tensor(self._sum / self._tokens)


class Forward:
    """One forward of a stack: how many tokens it has, and its terms, those without a graph apart."""

    def __init__(self, tokens: Number, together: JointForwards) -> None:
        self.tokens, self.together = tokens, together
        self.terms: list[weakref.ref[Tensor]] = []  # their graphs lead back to here
        self.values: list[Tensor] = []

    def share(self) -> Number:
        return self.tokens / self.together.tokens()

    def weight(self) -> Number:
        """What multiplies the gradients of its terms."""
        self.together.begun = True
        return 0.0 if self.together.factor is None else self.share() * self.together.factor

    def collected(self) -> list[Tensor]:
        """What its terms add to the loss."""
        terms = [self.share() * term for ref in self.terms if (term := ref()) is not None]
        return [*terms, *(self.together.promised(self.share() * value) for value in self.values)]


class Terms:
    """The auxiliary terms of one stack.

    Attributes:
        factor: what multiplies their gradients where they are brought in without being part of the loss; None if they
            wait for `auxiliary_loss`.
    """

    def __init__(self) -> None:
        self.factor: Number | None = None
        self.forget()

    def __deepcopy__(self, memo: dict) -> Terms:
        return Terms()  # terms belong to a graph

    def __reduce__(self) -> tuple:
        return (Terms, ())

    def forget(self) -> None:
        """What was run so far will get no gradient any more."""
        self._together = JointForwards()
        self._to_repeat: ForwardsToRepeat | None = None
        self._compiled: list[Tensor] = []
        self._latest: list[Tensor] = []

    def brought_in(self, features: Tensor, losses: list[Tensor] | None, around: Surroundings) -> Tensor:
        """The same features; with their gradient come those of the terms, unless these wait to be collected."""
        if not losses:
            return features
        term = torch.stack(losses).sum()
        if torch.compiler.is_compiling():  # a graph can neither refer weakly nor count what comes later
            if self.factor is not None:
                return _WithGradientOf.apply(features, term, self.factor)
            if around.live:
                self._compiled.append(term)
            return features
        forward = around.terms
        if forward is None:
            forward = around.terms = self._begin(around)
        if around.live and not (isinstance(forward.together, ForwardsToRepeat) or self.factor is not None):
            return self._kept(features, term, forward)
        if not torch.is_grad_enabled():
            if isinstance(forward.together, ForwardsToRepeat):
                forward.together.take(forward, term)
            return features
        if forward.together.asked and forward.together.factor is None:
            forward.together.factor, forward.together.assumed = 1.0, True
        return features if forward.together.factor is None else _WithGradientOf.apply(features, term, forward)

    def _kept(self, features: Tensor, term: Tensor, forward: Forward) -> Tensor:
        """The same features, whose graph keeps the term for `collect`; of the last forward, so does this object."""
        if not term.requires_grad:
            forward.values.append(term)
            return features
        forward.terms.append(weakref.ref(term))
        self._latest.append(term)
        return _Keeping.apply(features, (forward, term), weakref.ref(self))

    def _begin(self, around: Surroundings) -> Forward:
        tokens: Number = 1.0
        if around.mask is not None:
            tokens = around.mask.sum()
        elif around.tokens is not None:
            tokens = float(around.tokens[0] * around.tokens[1])
        if not (around.live or torch.is_grad_enabled()):
            if self._to_repeat is None or self._to_repeat.begun:
                self._to_repeat = ForwardsToRepeat()
            self._to_repeat.count(tokens)
            return Forward(tokens, self._to_repeat)
        again = self._to_repeat
        if again is not None and (again.factor is not None or torch._C._current_graph_task_id() != -1):
            again.factor = again.factor if self.factor is None else self.factor
            return Forward(tokens, again)
        if self._together.begun:
            self._together = JointForwards()
        self._to_repeat, self._together.factor = None, self.factor
        self._latest = []
        forward = Forward(tokens, self._together)
        self._together.forwards = [weakref.ref(other) for other in (*self._together.alive(), forward)]
        return forward

    def collect(self) -> list[Tensor]:
        """The sum of the terms of the forwards since the last call, in the mean over tokens."""
        compiled, self._compiled = self._compiled, []
        together, self._together = self._together, JointForwards()
        terms = [term for forward in together.alive() for term in forward.collected()]
        if not terms and self._to_repeat is not None and not self._to_repeat.begun:
            terms = [self._to_repeat.promised(self._to_repeat.value())]
        self._latest = []
        return compiled + terms


class _Keeping(torch.autograd.Function):
    """Passes features through; what is kept lives as long as their graph."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, kept: Any, owner: weakref.ref[Terms]) -> Tensor:
        ctx.kept, ctx.owner = kept, owner
        return features.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        owner = ctx.owner()
        if owner is not None:
            owner._latest = []
        return grad, None, None


class _WithGradientOf(torch.autograd.Function):
    """Passes features through, and adds the weighted term to whatever loss is differentiated later."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, term: Tensor, weight: Forward | Number) -> Tensor:
        ctx.weight, ctx.like = weight, term.detach()
        return features.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weight = ctx.weight.weight() if isinstance(ctx.weight, Forward) else ctx.weight
        return grad, torch.ones_like(ctx.like) * weight, None


class _GradientOfRepetition(torch.autograd.Function):
    """A value without a graph, whose gradient is what multiplies those of the forwards that are run again later."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, together: JointForwards) -> Tensor:
        ctx.together = together
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        if ctx.together.assumed and grad.item() != 1.0:
            raise RuntimeError(
                f"the loss takes auxiliary_loss(model) times {grad.item():.4g}, but under gradient caching that came "
                "too late to be heeded: add it to the loss as it is, or train with BioTrainerCallback"
            )
        ctx.together.factor = grad
        return None, None, None
