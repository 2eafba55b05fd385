"""Spine pruning: synapses of an adapter that stay weak while it is trained are lost, and may regrow until the end.

Biology: a synapse grows from a filopodium, a thin spine that transmits nothing; spines become filopodia and filopodia
spines all the time, at rates that differ from cell to cell, and in development more and more of them are lost.

Equation: w = sgn(theta) a_i [|theta| - d]_+ with one gain a_i = exp(g_i) per row, g = 0 at the start. Backward takes
the slope of [.]_+ for 1, so that filopodia, |theta| < d, are trained like spines and may come back. d rises from 0 to D
over N steps: d(n) = D (1 + sin(pi (n/N - 1/2))) / 2, or D n/N. In the end what is not larger than an elimination
threshold in magnitude is lost for good.

Reference: Cai et al. 2025, NSPDI-SNN: An efficient lightweight SNN based on nonlinear synaptic pruning and dendritic
integration, arXiv:2508.21566 (gain, two thresholds); Chen et al. 2022, State transition of dendritic spines improves
learning of sparse spiking neural networks, ICML (filopodia, slope, schedule). How the second threshold acts is our
reading: once, after training. Dendritic integration is the primitive ``quadratic_dendrite`` with ``mode="ndi"``.

    prune_synapses(model)                                 # any PeftModel: the trainable matrices of its adapter
    Trainer(model, ..., callbacks=[SpineSchedule(1000, 0.02)])
    finalize(model)
    sparsity(model).share
    model.save_pretrained("sparse-adapter")               # an ordinary adapter, with zeros in it

What is saved, at any time, is what the adapter computes with, under the usual names; theta and the gains are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import TrainerCallback

from bioadapt._words import suggest

SHAPES = ("sine", "linear")


class _Shrink(torch.autograd.Function):
    """sgn(theta) [|theta| - d]_+, whose slope is taken for 1 everywhere."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, threshold: Tensor) -> Tensor:
        return theta - theta.clamp(-threshold, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class SpinePruning(nn.Module):
    """Parametrisation of a matrix by the strengths theta of its spines: theta (..., m, n) -> w of the same shape.

    Args:
        matrix: gives shape, dtype and device.
        gain: whether each row has a trainable gain, (..., m, 1) in all.
    """

    threshold: Tensor

    def __init__(self, matrix: Tensor, gain: bool = True) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros((), device=matrix.device))
        self.log_gain = nn.Parameter(matrix.new_zeros(*matrix.shape[:-1], 1)) if gain else None

    def forward(self, theta: Tensor) -> Tensor:
        left = _Shrink.apply(theta, self.threshold)
        return left if self.log_gain is None else left * self.log_gain.exp().to(theta.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A theta that gives this weight: whatever is not zero moves outwards by the threshold."""
        theta = weight if self.log_gain is None else weight / self.log_gain.exp().to(weight.dtype)
        return theta + theta.sign() * self.threshold.to(theta.dtype)


class LostSynapses(nn.Module):
    """Parametrisation that holds lost synapses at zero, whatever an optimiser's momentum does.

    Args:
        kept: which synapses are not lost, (..., m, n) bool.
    """

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, theta: Tensor) -> Tensor:
        return torch.where(self.kept, theta, 0.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self(weight)


class SpineSchedule(TrainerCallback):
    """Raises the threshold of all spines of a model from 0 to its final value, step by step.

    As a callback of `transformers.Trainer` it follows the trainer's count of optimiser steps; in a loop of your own
    call `step` after each of them.

    Source: Chen et al. 2022, State transition of dendritic spines improves learning of sparse spiking neural networks.

    Args:
        total_steps: steps N until the threshold is full, at least 1; it stays there.
        D: full threshold, in the unit of theta, that is of the weights; 0 or more.
        shape: ``sine`` (slow, fast, slow) or ``linear``.

    Raises:
        ValueError: one of them is something else.
    """

    def __init__(self, total_steps: int, D: float, shape: str = "sine") -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps={total_steps!r}: a whole number of steps is needed, at least 1")
        if not isinstance(D, int | float) or not 0 <= D < math.inf:
            raise ValueError(f"D={D!r}: a finite threshold is needed, 0 or more")
        if shape not in SHAPES:
            raise ValueError(f"shape={shape!r}; {suggest(shape, SHAPES)}")
        self.total_steps, self.D, self.shape = total_steps, float(D), shape
        self.steps = 0

    def threshold(self, step: int) -> float:
        """d after so many steps."""
        share = min(step / self.total_steps, 1.0)
        return self.D * (share if self.shape == "linear" else 0.5 * (1 + math.sin(math.pi * (share - 0.5))))

    def step(self, model: nn.Module) -> None:
        """Count a step of the optimiser, and set the threshold of all spines accordingly.

        Raises:
            RuntimeError: no matrix of the model has spines.
        """
        self.steps += 1
        for spines in _spines_of(model):
            if isinstance(spines.rule, SpinePruning):
                spines.rule.threshold.fill_(self.threshold(self.steps))

    def resume(self, model: nn.Module, steps: int) -> None:
        """Go on after so many steps with an adapter that was saved then, and has got fresh spines since.

        It computes with what it was saved with: where the threshold was lower, theta moves outwards with it.

        Raises:
            RuntimeError: no matrix of the model has spines.
        """
        self.steps = steps
        for spines in _spines_of(model):
            if isinstance(spines.rule, SpinePruning) and spines.rule.threshold != self.threshold(steps):
                weight = spines.weight
                spines.rule.threshold.fill_(self.threshold(steps))
                setattr(spines.module, spines.name, weight)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.resume(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step - 1
        self.step(kwargs["model"])


@dataclass(frozen=True)
class Sparsity:
    """How many synapses are exactly zero, by the name that the matrix has in the model's state dict."""

    zeros: dict[str, int]
    synapses: dict[str, int]

    @property
    def share(self) -> float:
        """Of all synapses, from 0 to 1."""
        return sum(self.zeros.values()) / sum(self.synapses.values())

    def __str__(self) -> str:
        lost, total = sum(self.zeros.values()), sum(self.synapses.values())
        return f"{lost:,} of {total:,} synapses are zero ({self.share:.1%})"


def add_spines(module: nn.Module, name: str = "weight", *, gain: bool = True) -> SpinePruning:
    """Let one matrix of a module, of any kind, be pruned. The threshold is 0, so that nothing changes yet.

    The matrix stays the parameter that an optimiser may hold already; the gains are new parameters, to be added to it.

    Args:
        module: owner of the matrix.
        name: of the matrix in the module.
        gain: whether each row has a trainable gain.

    Raises:
        ValueError: the module has no such parameter, it is parametrised already, or the module is a container, for
            which torch's parametrisations would be one more entry.
    """
    _check(module, name, name)
    spines = SpinePruning(getattr(module, name), gain)
    _translate_names(module)
    _parametrise(module, name, spines)
    return spines


def prune_synapses(model: PeftModel, adapter_name: str | None = None, *, gain: bool = True) -> list[str]:
    """Let the trainable matrices of an adapter be pruned; base weights, copied heads and vectors are left alone.

    Call it before the optimiser is built: the gains are parameters too. Then raise the threshold with `SpineSchedule`,
    and end with `finalize`.

    Args:
        model: a PeftModel with a bio adapter, a LoRA or whatever else keeps its matrices in the model's layers.
        adapter_name: which adapter; the active ones if None.
        gain: whether each row of a matrix has a trainable gain.

    Returns:
        The names of the matrices, as they stand in the model's state dict.

    Raises:
        ValueError: no PeftModel, an unknown adapter, one without trainable matrices, one that has spines already, or a
            matrix that cannot get any (see `add_spines`); the model is as before.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"model is a {type(model).__name__}; a PeftModel is needed, or add_spines for a plain module")
    if adapter_name is not None and adapter_name not in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r}; {suggest(adapter_name, model.peft_config)}")
    names = set(model.active_adapters if adapter_name is None else [adapter_name])
    matrices = list(_matrices(model, names))
    if not matrices:
        raise ValueError(f"adapter {', '.join(map(repr, sorted(names)))} has no trainable matrix that could be pruned")
    for path, name in matrices:
        _check(model.get_submodule(path), name, f"{path}.{name}")
    for path, name in matrices:
        add_spines(model.get_submodule(path), name, gain=gain)
    return [f"{path}.{name}" for path, name in matrices]


def finalize(model: nn.Module, elimination: float = 0.0) -> Sparsity:
    """End pruning: write zeros where synapses are lost, make thresholds and gains part of the others, hold the zeros.

    Training may go on afterwards; lost synapses get no gradient and stay zero.

    Args:
        model: with spines.
        elimination: weights of at most this magnitude are lost too, in the unit of the weights; 0 or more.

    Returns:
        What `sparsity` says from now on, as long as no other weight happens to become zero.

    Raises:
        ValueError: a negative threshold.
        RuntimeError: no matrix of the model has spines.
    """
    if not elimination >= 0:
        raise ValueError(f"elimination={elimination!r}: a threshold is needed, 0 or more")
    for spines in _spines_of(model):
        if isinstance(spines.rule, SpinePruning):
            kept = spines.weight.abs() > elimination
            parametrize.remove_parametrizations(spines.module, spines.name)
            _parametrise(spines.module, spines.name, LostSynapses(kept))
    return sparsity(model)


def sparsity(model: nn.Module) -> Sparsity:
    """Counts the zeros in all matrices that have, or had, spines: those that a saved adapter has.

    Raises:
        RuntimeError: there are none.
    """
    weights = {spines.key: spines.weight for spines in _spines_of(model)}
    zeros = {key: int((weight == 0).sum()) for key, weight in weights.items()}
    return Sparsity(zeros, {key: weight.numel() for key, weight in weights.items()})


@dataclass(frozen=True)
class _Spines:
    """A matrix with spines: where it is, and its parametrisation."""

    path: str
    module: nn.Module
    name: str
    rule: SpinePruning | LostSynapses

    @property
    def key(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def weight(self) -> Tensor:
        with torch.no_grad():
            return getattr(self.module, self.name)


def _spines_of(model: nn.Module) -> list[_Spines]:
    every = [spines for path, module in model.named_modules() for spines in _of(module, path)]
    if not every:
        raise RuntimeError(f"no matrix of this {type(model).__name__} has spines: call prune_synapses or add_spines")
    return every


def _of(module: nn.Module, path: str = "") -> Iterator[_Spines]:
    if parametrize.is_parametrized(module):
        for name, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
            if isinstance(chain[0], SpinePruning | LostSynapses):
                yield _Spines(path, module, name, chain[0])


def _matrices(model: PeftModel, adapters: set[str]) -> Iterator[tuple[str, str]]:
    """Module path and name of each trainable matrix of the adapters, found where PEFT keeps what it trains."""
    layer_kind = getattr(model.base_model, "tuner_layer_cls", ())  # prompts have no layers
    for path, layer in model.named_modules():
        if isinstance(layer, layer_kind):
            for table in layer.adapter_layer_names:
                for name, parameter in getattr(layer, table).named_parameters():
                    # A vector, (1, n) or (m, 1) included, holds one value per neuron: no synapses.
                    matrix = sum(size > 1 for size in parameter.shape) > 1
                    if matrix and parameter.requires_grad and name.split(".")[0] in adapters:
                        inner = name.split(".parametrizations.")  # where it is parametrised already
                        owner, _, last = ".".join([path, table, inner[0]]).rpartition(".")
                        yield (owner, last) if len(inner) == 1 else (f"{owner}.{last}", inner[1].split(".")[0])


def _check(module: nn.Module, name: str, called: str) -> None:
    """Raise `ValueError` if the tensor of that name cannot get spines."""
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"{called} is parametrised already: it can be pruned once")
    if not isinstance(module._parameters.get(name), nn.Parameter):
        raise ValueError(f"{type(module).__name__} has no parameter {name!r}; {suggest(name, module._parameters)}")
    if isinstance(module, nn.ModuleDict | nn.ModuleList | nn.Sequential):
        raise ValueError(
            f"{called} cannot be pruned: its {type(module).__name__} would take the spines for an entry; "
            "let a module of another kind own the matrix"
        )


class _ByAnyName(nn.ModuleDict):
    """Parametrisations by the name of their tensor, be it that of one of a dict's methods, such as ``values``."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        self._modules[name] = module  # type: ignore[assignment]


def _parametrise(module: nn.Module, name: str, rule: SpinePruning | LostSynapses) -> None:
    """What torch does, also for a tensor whose name its table of parametrisations refuses."""
    if not hasattr(nn.ModuleDict, name):
        parametrize.register_parametrization(module, name, rule)
        return
    # Torch makes its table along with a module's first parametrisation, and only then another can stand in for it.
    module.register_buffer("_first", torch.zeros(()))
    parametrize.register_parametrization(module, "_first", nn.Identity())
    module.parametrizations = _ByAnyName(module.parametrizations)  # type: ignore[arg-type]
    parametrize.register_parametrization(module, name, rule)
    parametrize.remove_parametrizations(module, "_first")
    del module._first


def _translate_names(module: nn.Module) -> None:
    """Let the module's state dict hold the matrix itself, under its own name, as if nothing were parametrised."""
    if not any(_of(module)):
        module.register_state_dict_post_hook(_give_weights)
        module.register_load_state_dict_pre_hook(_take_weights)


def _give_weights(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for spines in _of(module):
        inner = f"{prefix}parametrizations.{spines.name}."
        for key in [key for key in state if key.startswith(inner)]:
            del state[key]
        state[prefix + spines.name] = spines.weight


def _take_weights(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    for spines in _of(module):
        weight = state.pop(prefix + spines.name, None)
        if weight is not None:
            inner = f"{prefix}parametrizations.{spines.name}."
            state[f"{inner}original"] = spines.rule.right_inverse(weight.to(spines.weight.device))
            state.update({f"{inner}0.{name}": tensor for name, tensor in spines.rule.state_dict().items()})
