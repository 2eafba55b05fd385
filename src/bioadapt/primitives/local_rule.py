"""Local learning: what training forwards observe changes buffers once per step of the optimiser, without a gradient.

A buffer that changed between a forward and its recomputation under gradient checkpointing, or between two forwards that
share a backward, would make gradients belong to another function than the loss. So a forward only observes, and the
rule is applied in `LocalRule.commit`, after the optimiser's step.

What a forward observed belongs to its gradient: it counts once that gradient has passed, is summed up as long as
gradients are, and is thrown away with them. A batch whose step is skipped leaves no trace.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .context import Context

Observation = tuple["LocalRule", Tensor]


class _Delivery(torch.autograd.Function):
    """Passes features through; when their gradient comes, the slots get the evidence as theirs."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, *slots_and_evidence: Tensor) -> Tensor:
        ctx.save_for_backward(*slots_and_evidence[1::2])
        return features.detach()  # autograd forbids to write to a view that a function of ours returns

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *(tensor for evidence in ctx.saved_tensors for tensor in (evidence, None))


def with_evidence(features: Tensor, observations: Sequence[Observation]) -> Tensor:
    """The same features; with their gradient, what was observed on the way to them reaches the rules."""
    if not observations:
        return features
    pairs = [(rule.slot, evidence.to(rule.slot.device)) for rule, evidence in observations]
    return _Delivery.apply(features, *(tensor for pair in pairs for tensor in pair))


class LocalRule(nn.Module):
    """What a primitive that learns locally inherits besides `Primitive`: ``class Mine(LocalRule, Primitive)``.

    It calls `declare_statistics` in ``build`` and `observe` in ``transform``, and defines `learn`.

    Attributes:
        governed: names of the parameters that the rule changes besides the optimiser.
        evidence: of the gradients at hand, the number of tokens, and the statistics times that number, as one vector;
            None if there is none.
        announced: whether somebody calls `forget` where a step begins. If not, the rule finds out by itself: evidence
            is older than the gradients if these are gone when the next one comes.
        stepped: ids of the parameters that optimisers have updated since the evidence came.
        sharded: the parameters as the optimiser holds them, where forward and backward see others instead.
    """

    governed: ClassVar[tuple[str, ...]] = ()
    evidence: Tensor | None = None
    announced = False

    def declare_statistics(self, **shapes: tuple[int, ...]) -> None:
        """Name the statistics of a forward and their shapes."""
        self._shapes = shapes
        self.stepped: set[int] = set()
        self.sharded: list[nn.Parameter] = []
        self._open_slot(torch.device("cpu"))

    def observe(self, context: Context, *, tokens: Tensor | float = 1.0, **statistics: Tensor) -> None:
        """Take the statistics of a training forward; a no-op in eval, while unobserved, and where nothing is trained.

        Args:
            context: of the forward.
            tokens: how many the statistics are means over: the forwards of one step are averaged by it. Sums need none.
            statistics: a tensor for each declared name.
        """
        if not (self.training and context.observing and self._is_trained()):
            return
        with torch.no_grad():
            count = torch.as_tensor(tokens, dtype=torch.float32, device=self.slot.device).reshape(1)
            parts = [statistics[name].to(count).reshape(-1) * count for name in self._shapes]
            evidence = torch.cat([count, *parts])
            if context.observations is not None:
                context.observations.append((self, evidence))
            else:  # without a tuner around there is nobody to tell that the gradient came
                self.evidence = evidence if self.evidence is None else self.evidence + evidence

    def learn(self, fresh: Tensor) -> None:
        """Apply the local rule to the buffers, with ``self.observed_NAME`` for each statistic.

        ``fresh`` is 1, or 0 if what was observed is of no use, because it is not finite or of no token; the statistics
        are zeros then. Multiply the rate by it, so that no branch on data is needed.
        """
        raise NotImplementedError(f"{type(self).__name__} learns by a local rule but defines no learn")

    def commit(self) -> None:
        """Let the rule take in the evidence, once."""
        if self.evidence is None:
            return
        with torch.no_grad(), whole_parameters(self, self.governed) as governed:
            self.learn(self._fresh().float())
            for sharded, whole in governed.values():
                _write_back(sharded, whole)
        self.forget()

    def forget(self) -> None:
        """Drop the evidence: its gradients are used up or thrown away."""
        self.evidence = None
        self.stepped.clear()

    @property
    def size(self) -> int:
        """Length of the evidence."""
        return 1 + sum(math.prod(shape) for shape in self._shapes.values())

    def __getattr__(self, name: str) -> Any:
        shapes, statistic = self.__dict__.get("_shapes", {}), name.removeprefix("observed_")
        if statistic == name or statistic not in shapes:
            return super().__getattr__(name)
        if self.evidence is None:
            raise AttributeError(f"{type(self).__name__} has no {name}: nothing was observed")
        sizes = [math.prod(shape) for shape in shapes.values()]
        sums = dict(zip(shapes, self.evidence[1:].split(sizes), strict=True))
        return torch.where(self._fresh(), sums[statistic] / self.evidence[0], 0.0).view(shapes[statistic])

    def _fresh(self) -> Tensor:
        assert self.evidence is not None
        return self.evidence.isfinite().all() & (self.evidence[0] > 0)

    def _is_trained(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    # -- the slot: a leaf that gets the evidence of a whole backward as its gradient --

    def _open_slot(self, device: torch.device) -> None:
        self.slot = torch.zeros(self.size, device=device, dtype=torch.float32, requires_grad=True)
        itself = weakref.ref(self)

        def arrived(slot: Tensor) -> None:
            rule, evidence = itself(), slot.grad
            slot.grad = None
            if rule is not None and evidence is not None:
                rule._take(evidence)

        self.slot.register_post_accumulate_grad_hook(arrived)

    @torch.no_grad()
    def _take(self, evidence: Tensor) -> None:
        """Add the evidence of a backward; its gradients have not yet reached the parameters."""
        if self.evidence is not None and self.announced:
            self.evidence = self.evidence + evidence
            return
        gradients = [p.grad for p in (*self.parameters(), *self.sharded) if p.grad is not None]
        if self.evidence is None or not gradients:
            self.forget()
            self.evidence = evidence
        else:  # they may also have been set to zero
            there = torch.stack([_local(gradient).any().to(evidence.device) for gradient in gradients]).any()
            self.evidence = torch.where(there, self.evidence, 0.0) + evidence

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        device = next((parameter.device for parameter in self.parameters()), self.slot.device)
        if device != self.slot.device and device.type != "meta":
            self._open_slot(device)
            self.evidence = None if self.evidence is None else self.evidence.to(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "slot"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open_slot(next((parameter.device for parameter in self.parameters()), torch.device("cpu")))


@contextmanager
def whole_parameters(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, tuple[Any, Tensor]]]:
    """Put whole tensors in the place of the sharded ones among a module's parameters, for as long as the block runs.

    All processes that hold a shard must take part. Yields the sharded and the whole one of each.
    """
    sharded: dict[str, Any] = {
        name: module._parameters[name] for name in names if hasattr(module._parameters[name], "full_tensor")
    }
    whole = {name: (parameter, parameter.full_tensor()) for name, parameter in sharded.items()}
    module._parameters.update({name: tensor for name, (_, tensor) in whole.items()})
    try:
        yield whole
    finally:
        module._parameters.update(sharded)


def _write_back(sharded: Any, whole: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor  # slow to import, and rarely needed

    sharded.copy_(distribute_tensor(whole, sharded.device_mesh, sharded.placements))


def _local(tensor: Tensor) -> Tensor:
    """This process's shard, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
