"""Regional compilation: what the adapters compute becomes compiled graphs, while the host stays as it is."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..primitives._state import Notes, Recollection
from .patches import GRAPHS_FROM, HAS_GRAPHS, surrounding

if TYPE_CHECKING:
    from ..primitives.base import Context
    from .circuit import AdapterCircuit

Model = TypeVar("Model", bound=nn.Module)


def compile_adapters(model: Model, **options: Any) -> Model:
    """Compile what the bio adapters of a model compute, and leave the host alone.

    Layers of equal sizes with equal primitives share their graphs, of which there is one for each way to run them:
    training, evaluation, and a step of decoding; `neuro_ada`, whose synapses differ from layer to layer, makes one for
    each layer. A graph takes sequences of all lengths. Graphs are made when a forward
    first needs them. Adapters that are added, loaded, activated or disabled later need no second call; nor does it
    change what is saved. Calling it again replaces the options. Where the whole model is compiled, the adapters become
    part of that graph instead.

    Args:
        model: what holds the adapters, such as a `PeftModel`.
        options: of `torch.compile`, such as ``mode="max-autotune-no-cudagraphs"`` or ``fullgraph=True``. ``dynamic`` is
            True unless given. ``disable=True`` goes back to running without graphs.

    Returns:
        The model itself.

    Raises:
        RuntimeError: torch is older than 2.13.
        ValueError: the model has no bio adapter.
        TypeError: an option that `torch.compile` does not know.

    Warns:
        UserWarning: there is no compiler here: the adapters go on without graphs, and compute the same.
    """
    if not HAS_GRAPHS:
        raise RuntimeError(
            f"compile_adapters needs torch>={'.'.join(map(str, GRAPHS_FROM))}, and torch {torch.__version__} is "
            "installed; without it the adapters compute the same"
        )
    scopes = [scope for scope in map(surrounding, model.modules()) if scope is not None]
    if not scopes:
        raise ValueError(f"{type(model).__name__} has no bio adapter to compile: add one with a BioConfig first")
    compilation = Compilation({"dynamic": True, **options})
    for scope in scopes:
        scope.compilation = compilation
    return model


class Compilation:
    """Compiled functions for the circuits of a model, by what a graph depends on.

    Args:
        options: of `torch.compile`.

    Raises:
        TypeError: an unknown option.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        torch.compile(_applied, **options)  # refuses what it does not know, and compiles nothing yet
        self.options = options
        self.regions: dict[Hashable, Callable[..., Tensor]] = {}
        self.kinds: weakref.WeakKeyDictionary[nn.Module, Hashable] = weakref.WeakKeyDictionary()
        self.failed = False

    def __reduce__(self) -> tuple:
        return Compilation, (self.options,)  # a copied or saved model compiles for itself

    def run(
        self, circuit: AdapterCircuit, method: str, y: Tensor, context: Context, state: Recollection | None
    ) -> Tensor:
        """``circuit.applied(y, context, state)`` or ``circuit.forward(y, context, state)``."""
        if self.failed or y.numel() == 0:
            return _METHODS[method](circuit, y, context, state)
        region = self._region(circuit, method, y, state)
        notes = None if state is None else Notes.of(state)
        try:
            found = region(circuit, y, context.replace(derived=None), notes)
        except _COMPILER_FAILED as error:
            self.failed = True
            warnings.warn(f"the adapters run without being compiled, since that failed here: {_reason(error)}")
            return _METHODS[method](circuit, y, context, state)
        if notes is not None and state is not None:
            notes.enter(state)
        return found

    def _region(
        self, circuit: AdapterCircuit, method: str, y: Tensor, state: Recollection | None
    ) -> Callable[..., Tensor]:
        if circuit not in self.kinds:
            self.kinds[circuit] = _kind(circuit)
        step = state is not None and y.shape[1] == 1
        key = self.kinds[circuit], method, circuit.training, torch.is_grad_enabled(), state is None, step
        if key not in self.regions:
            self.regions[key] = torch.compile(_of_its_own(_METHODS[method]), **self.options)
        return self.regions[key]


def _applied(circuit: AdapterCircuit, y: Tensor, context: Context, state: Recollection | None) -> Tensor:
    return circuit.applied(y, context, state)


def _change(circuit: AdapterCircuit, y: Tensor, context: Context, state: Recollection | None) -> Tensor:
    return circuit.forward(y, context, state)


_METHODS = {"applied": _applied, "forward": _change}
_COMPILER_FAILED = (torch._dynamo.exc.BackendCompilerFailed,)


def _kind(circuit: AdapterCircuit) -> Hashable:
    """What circuits have in common that share a graph."""
    tensors = [(name, tuple(t.shape), t.dtype) for name, t in [*circuit.named_parameters(), *circuit.named_buffers()]]
    settings = [(type(primitive), repr(primitive)) for primitive in circuit.values()]
    return repr(circuit.waves), tuple(settings), tuple(tensors)


def _of_its_own(function: FunctionType) -> FunctionType:
    """A copy of a function with code of its own: the compiler keeps graphs, and limits their number, by code."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _reason(error: BaseException) -> str:
    """The first lines of what went wrong in the compiler itself."""
    cause = getattr(error, "inner_exception", error)
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
