"""Learning beyond the gradients of the user's loss: local rules after each step, and auxiliary terms."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..primitives.local_rule import LocalRule, whole_parameters
from ..primitives.on_weight import OnWeight
from .auxiliary import Terms

if TYPE_CHECKING:
    from .layer import BioLayer

_live: weakref.WeakSet[Learning] = weakref.WeakSet()
_count = itertools.count()
_OF_ZERO = ("_hp_mapping", "ds_id")  # what DeepSpeed's ZeRO puts on parameters, of stages 1 and 2, and 3


class Learning:
    """What the layers of one stack learn.

    Args:
        layers: the stack's layers, a list that its owner keeps up to date.
    """

    def __init__(self, layers: list[BioLayer]) -> None:
        self.layers, self.terms = layers, Terms()
        self._enlist()

    def _enlist(self) -> None:
        self.number = next(_count)  # the same in all replicas, unlike the order of a set
        self.wrapper: weakref.ref[DistributedDataParallel] | None = None
        self.committed: set[int] = set()  # ids of the rules that have learned from the running step
        _live.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "terms": self.terms}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # a copied or unpickled model learns like the original
        self._enlist()

    def rules(self) -> list[LocalRule]:
        """The local rules of all adapters that are trained."""
        return [rule for rule in self._all_rules() if any(p.requires_grad for p in rule.parameters())]

    def _all_rules(self) -> Iterator[LocalRule]:
        primitives = (primitive for layer in self.layers for primitive in layer.primitives())
        return (primitive for primitive in primitives if isinstance(primitive, LocalRule))

    def begin(self) -> None:
        """A training forward of the stack begins."""
        if torch.compiler.is_compiling():
            return
        _steps.running.clear()  # of steps that have failed
        for rule in self._all_rules():
            _check_reachable(rule)
            rule.sharded = [p for p in rule.parameters() if hasattr(p, "full_tensor")] or rule.sharded
        if dist.is_available() and dist.is_initialized():
            wrapper = DistributedDataParallel._active_ddp_module
            self.wrapper = None if wrapper is None else weakref.ref(wrapper)
        # Where the optimiser holds but a part of a rule's parameters, only the next forward tells that it is time.
        commit([(self, rule) for rule in self.rules() if rule.stepped and not rule.announced])

    def replicas(self, rule: LocalRule) -> tuple[dist.ProcessGroup, ...]:
        """The groups of processes over which a rule's primitive is replicated."""
        if not (dist.is_available() and dist.is_initialized()):
            return ()
        parameter: Any = next(iter(rule.sharded or rule.parameters()))
        if hasattr(parameter, "device_mesh"):
            return tuple(parameter.device_mesh.get_all_groups())
        if _kept_elsewhere(parameter):
            return () if dist.group.WORLD is None else (dist.group.WORLD,)
        wrapper = None if self.wrapper is None else self.wrapper()
        return () if wrapper is None else (wrapper.process_group,)


def _check_reachable(rule: LocalRule) -> None:
    """Raise `ValueError` if a rule needs a parameter that is not where the model has it."""
    if next(rule.parameters(), None) is None:
        raise ValueError(
            f"{rule.name} has no parameters of its own any more, so that its local rule cannot follow the optimiser: "
            "FullyShardedDataParallel needs use_orig_params=True"
        )
    if not rule.announced and any(hasattr(p, mark) for p in rule.parameters() for mark in _OF_ZERO):
        raise ValueError(
            f"{rule.name} learns by a local rule, and DeepSpeed's optimiser does not tell when it has stepped: train "
            "with transformers.Trainer and BioTrainerCallback"
        )
    for name in rule.governed:
        if _kept_elsewhere(getattr(rule, name)):
            raise ValueError(
                f"the local rule of {rule.name} changes its parameter {name!r}, which FullyShardedDataParallel or "
                "DeepSpeed keeps in a tensor of its own: shard the model with torch's fully_shard, or replicate it"
            )


def _is_divided_flat(primitive: OnWeight) -> bool:
    """Whether a primitive's penalty would read parameters of which this process has a flat part alone."""
    divided = any(hasattr(parameter, "_fsdp_flattened") for parameter in primitive.parameters())
    return divided and type(primitive).penalty is not OnWeight.penalty


def _kept_elsewhere(parameter: Tensor) -> bool:
    """Whether the optimiser works on a copy or a part of the parameter (FullyShardedDataParallel, DeepSpeed's ZeRO)."""
    return any(hasattr(parameter, mark) for mark in ("_fsdp_flattened", *_OF_ZERO))


# -- the steps of optimisers --


class _Steps(threading.local):
    """The optimisers whose steps are running, the outer before the inner one."""

    def __init__(self) -> None:
        self.running: list[int] = []


_steps = _Steps()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _steps.running.append(id(optimizer))


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    running = _steps.running
    while running and running.pop() != id(optimizer):
        pass
    updated: set[int] = set()
    skipped = getattr(optimizer, "found_inf", None)  # a fused optimiser is told to step, and skips by itself
    ready: list[tuple[Learning, LocalRule]] = []
    for learning in sorted(_live, key=lambda learning: learning.number):
        for rule in learning.rules():
            updated = updated or {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            own = {id(parameter) for parameter in rule.parameters() if parameter.requires_grad}
            if own & updated:
                rule.stepped |= own & updated
                if skipped is not None and rule.evidence is not None:
                    rule.evidence = torch.where(skipped.to(rule.evidence.device) > 0, torch.nan, rule.evidence)
            if own <= rule.stepped and not running:  # after the last of several optimisers, the outer of nested ones
                ready.append((learning, rule))
    commit(ready)


def commit(rules: Iterable[tuple[Learning, LocalRule]]) -> None:
    """Let rules take in what was observed; replicas put together first what they have."""
    alone: list[LocalRule] = []
    shared: dict[tuple[tuple[dist.ProcessGroup, ...], torch.device], list[LocalRule]] = {}
    for learning, rule in rules:
        learning.committed.add(id(rule))
        groups = learning.replicas(rule)
        if groups:
            shared.setdefault((groups, rule.slot.device), []).append(rule)
        else:
            alone.append(rule)
    for (groups, device), replicated in shared.items():
        evidence = [torch.zeros(r.size, device=device) if r.evidence is None else r.evidence for r in replicated]
        everything = torch.cat(evidence)
        for group in groups:
            dist.all_reduce(everything, group=group)
        for rule, part in zip(replicated, everything.split([rule.size for rule in replicated]), strict=True):
            rule.evidence = part
    for rule in (*alone, *(rule for replicated in shared.values() for rule in replicated)):
        rule.commit()
        rule.stepped.clear()


def learning_of(model: nn.Module) -> list[Learning]:
    """What the stacks of a model learn, each once."""
    from .layer import BioLayer

    found = {id(m.scope): m.scope.learning for m in model.modules() if isinstance(m, BioLayer) and m.scope is not None}
    return list(found.values())


# -- auxiliary terms --


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Sum of the auxiliary terms: what the forwards since the last call left behind, and what depends on parameters.

    A term of the first kind is a mean over the real tokens of all these forwards, a term of the second kind one over
    the sites of its primitive. Without any term the sum is 0.

    Add it to the loss in a training loop of your own: ``loss = task_loss + bioadapt.auxiliary_loss(model)``.
    Micro-batches whose losses you weigh, weigh it likewise. With `transformers.Trainer` pass `BioTrainerCallback`
    instead. Weights are part of the terms: they are settings of the primitives.

    Returns:
        A scalar on the device of the model, with a graph if there are terms.
    """
    terms = [term for learning in learning_of(model) for term in learning.terms.collect()]
    terms.extend(penalties(model))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if not terms:
        return torch.zeros((), device=device)
    return torch.stack([term.to(device) for term in terms]).sum()


def penalties(model: nn.Module) -> list[Tensor]:
    """Terms that depend on parameters alone, each the mean over the sites where its primitive is active and trained."""
    found: dict[tuple[str, str], list[Tensor]] = {}
    for learning in learning_of(model):
        for layer in learning.layers:
            for name in [] if layer.disable_adapters or layer.merged else layer.active_adapters:
                for primitive in layer.circuits[name].on_weight() if name in layer.circuits else ():
                    trained = any(p.requires_grad for p in primitive.parameters())
                    if trained and _is_divided_flat(primitive):
                        raise ValueError(
                            f"{primitive.name} has a penalty on parameters that FullyShardedDataParallel keeps in a "
                            "tensor of its own: shard the model with torch's fully_shard"
                        )
                    with whole_parameters(primitive, primitive._parameters):
                        term = primitive.penalty() if trained else None
                    if term is not None:
                        found.setdefault((name, primitive.name), []).append(term)
    return [torch.stack([term.to(terms[0].device) for term in terms]).mean() for terms in found.values()]


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
