"""The contract of a primitive: what it declares, what it is given, what it returns.

A primitive is a small module that reads features ``x`` (B, T, d_out) and returns a change ``delta`` of the same shape.
It knows torch alone: neither PEFT nor transformers, neither adapters' names nor caches. Whatever it has to know about
the world (padding, positions, the layer's input, what was said in earlier decoding steps) comes with a `Context`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._words import suggest
from ._state import Recollection

STAGES = ("sensory_gain", "competition", "dendritic", "dynamics", "memory", "plasticity")
KINDS = ("pointwise", "causal", "weight", "global")
# Which factor of the path is zero at birth, and how far it has to reach so that a LoRA's learning rate trains it: Adam
# moves every number by about the same step, and a gain does with one number what a LoRA does with eight.
ZEROS = {"gate": 16.0, "scalar_gate": 16.0, "readout": 1.0, "update": 1.0}
MERGES = ("weight", "left")

Blend = Callable[[Sequence[Tensor]], Tensor]


class _Gating(torch.autograd.Function):
    """gate times change, plus x if there is one. Backward makes one tensor where autograd would make two."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, gate: Tensor, x: Tensor | None) -> Tensor:
        ctx.save_for_backward(change, gate)
        return change * gate if x is None else torch.addcmul(x, change, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        change, gate = ctx.saved_tensors
        product = grad * change
        on_gate = product.sum(tuple(range(product.dim() - 1)) if len(gate) > 1 else None).view_as(gate)
        return torch.mul(grad, gate, out=product), on_gate, grad if ctx.needs_input_grad[2] else None


@dataclass(frozen=True)
class Setting:
    """One setting of a primitive: its default, the closed range or the choices it accepts, and what it means.

    ``derived``: where it is not None, the setting may be None, which means that value. ``table``: a dict of strings is
    accepted as well.
    """

    default: Any
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None
    meaning: str = ""
    derived: str | None = None
    table: bool = False

    @property
    def type(self) -> type:
        return float if self.default is None else type(self.default)

    @property
    def accepted(self) -> str:
        """The accepted values in words, for error messages and pages."""
        words = self._accepted
        if self.derived is not None:
            words += f", or None for {self.derived}"
        return f"{words}, or a dict of strings" if self.table else words

    @property
    def _accepted(self) -> str:
        if self.choices is not None:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        if self.type is bool:
            return "True or False"
        return f"{'an integer' if self.type is int else 'a number'} from {self.low} to {self.high}"

    def check(self, name: str, value: Any) -> Any:
        """Return ``value`` in the setting's type; raise `ValueError` naming the setting if it is not accepted."""
        refusal = ValueError(f"setting {name!r} must be {self.accepted}, got {value!r}")
        if value is None and self.derived is not None:
            return None
        if self.table and isinstance(value, dict):
            if not all(isinstance(word, str) for pair in value.items() for word in pair):
                raise refusal
            return dict(value)
        if self.choices is not None:
            if value not in self.choices:
                raise refusal
            return value
        if self.type is bool or isinstance(value, bool):
            if self.type is not bool or not isinstance(value, bool):
                raise refusal
            return value
        if not isinstance(value, (int, float)) or (self.type is int and value != int(value)):
            raise refusal
        assert self.low is not None and self.high is not None
        if not (self.low <= value <= self.high):  # also refuses NaN
            raise refusal
        return self.type(value)


def setting(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    meaning: str,
    derived: str | None = None,
    table: bool = False,
) -> Any:
    """Declare a setting as a class attribute; instances carry the checked value under the same name."""
    if choices is None and not isinstance(default, bool) and (low is None or high is None):
        raise TypeError("a numeric setting needs both low and high")
    return Setting(default, low, high, choices, meaning, derived, table)


class Host:
    """What a primitive may read of the layer it is born on.

    Args:
        weight: the frozen base weight as (d_out, d_in) in fp32, or a function that returns it (quantised weights are
            expanded only if somebody asks); None where there is none.
        seed: fixes every frozen random matrix.
    """

    def __init__(self, weight: Tensor | Callable[[], Tensor | None] | None = None, seed: int = 0) -> None:
        self._weight, self.seed = weight, seed

    @cached_property
    def weight(self) -> Tensor | None:
        """(d_out, d_in) in fp32, or None."""
        weight = self._weight() if callable(self._weight) else self._weight
        return None if weight is None else weight.detach().float()

    @cached_property
    def level(self) -> float:
        """Root mean square of the layer's output for inputs of unit variance, estimated without data."""
        if self.weight is None or self.weight.is_meta:
            return 1.0
        return max(self.weight.square().sum(1).mean().sqrt().item(), 1e-6)

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator that depends on the host's seed and the purpose alone, not on device or order."""
        return torch.Generator(device="cpu").manual_seed(zlib.crc32(f"{self.seed}/{purpose}".encode()))

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """A frozen standard normal matrix, the same on every device and for every order of construction."""
        return torch.randn(*shape, generator=self.generator(purpose), device="cpu")


@dataclass(frozen=True)
class Context:
    """What surrounds a forward call. Every field has a neutral default, so a bare primitive needs none of them.

    ``x_in`` (B, T, d_in): the layer's input. ``bias`` (d_out,): the layer's bias. ``mask`` (B, T) bool: True at real
    tokens, None if all are. ``positions`` (B, T) int: place in the document. ``resets`` (B, T) bool: True at the first
    token of each packed document. ``state``: what earlier decoding steps left behind, None outside decoding.
    ``bidirectional``: time may be read both ways. ``observing``: running statistics may be taken. ``grid``: the spatial
    shape behind the token axis. ``losses``: where auxiliary terms are put, None if nobody asks for them.
    """

    x_in: Tensor = None  # type: ignore[assignment]  # what declares needs_input is never run without it
    bias: Tensor | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None
    resets: Tensor | None = None
    state: Recollection | None = None
    bidirectional: bool = False
    observing: bool = True
    grid: tuple[int, ...] | None = None
    losses: list[Tensor] | None = field(default=None, repr=False)

    def replace(self, **changes: Any) -> Context:
        return dataclasses.replace(self, **changes)

    def reversed(self) -> Context:
        """The same surroundings with time running backwards; a document's last token becomes its first."""

        def flip(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.flip(1)

        resets = self.resets
        if resets is not None:
            starts = torch.cat([resets[:, 1:], torch.ones_like(resets[:, :1])], dim=1)
            resets = starts.flip(1)
        return self.replace(
            x_in=flip(self.x_in), mask=flip(self.mask), positions=flip(self.positions), resets=resets, observing=False
        )


class Primitive(nn.Module):
    """Base class of every mechanism.

    A subclass declares settings as class attributes (`setting`), creates its tensors in `build` and computes in
    `transform`; the decorator `bioadapt.register_primitive` adds the rest of what is declared (stage, kind, where the
    zero of the path sits, how it merges). `forward` wraps `transform` with what all primitives share: the gate, fp32
    arithmetic, and the bidirectional reading of time on encoders.

    Args:
        d_in: number of features of the layer's input.
        d_out: number of features of the layer's output, which is also the size of ``x`` and ``delta``.
        host: what may be read of the layer the primitive is born on.
        settings: values for the declared settings, checked here.

    Raises:
        ValueError: an unknown setting, or a value outside what the setting accepts.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    kind: ClassVar[str]
    zero_at: ClassVar[str]
    merge: ClassVar[str | None]
    stochastic: ClassVar[bool]
    learns: ClassVar[bool]
    needs_input: ClassVar[bool]
    reads_both_ways: ClassVar[bool] = False  # for `causal`: `transform` itself heeds `Context.bidirectional`
    reads_positions: ClassVar[bool] = False  # for `pointwise`: `transform` asks where in the document a token stands
    any_dtype: ClassVar[bool] = False  # `transform` takes x and x_in in the layer's dtype and minds its own precision
    per_channel: ClassVar[bool] = False  # for `weight`: it scales channels, so that the layer may be of any form
    approximates: ClassVar[bool] = False  # where it does not merge, `weight_delta` is the nearest linear map
    combinations: ClassVar[tuple[str, ...]] = ()  # in which ways several, trained for a task each, make one
    readout: ClassVar[str] = "writer"  # for a zero at the readout: the name of that tensor

    # A saved configuration without it is of a time without it, so that its value is 1 and not `fresh_zero_scale`.
    zero_scale: float = setting(1.0, low=1e-3, high=1e3, meaning="factor on what is zero at birth: how fast it learns")
    fresh_zero_scale: ClassVar[float]  # what a new adapter takes, so that a LoRA's learning rate trains it

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Buffers and settings are created by name, which torch types as ``Tensor | Module``."""

    def __init__(self, d_in: int, d_out: int, *, host: Host | None = None, **settings: Any) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        for name, value in self.check_settings(settings).items():
            setattr(self, name, value)
        self._statistics: tuple[str, ...] = ()
        with born_in_fp32():
            self.build(host if host is not None else Host())
            if self.zero_at != "update":
                gate_shape = self.d_out if self.zero_at == "gate" else 1
                self.gate = nn.Parameter(torch.full((gate_shape,), 1.0 if self.zero_at == "readout" else 0.0))

    @classmethod
    def declared_settings(cls) -> dict[str, Setting]:
        """The settings that the class and its bases declare, in order of declaration."""
        found: dict[str, Setting] = {}
        for base in reversed(cls.__mro__):
            found.update({name: value for name, value in vars(base).items() if isinstance(value, Setting)})
        return {**found, "zero_scale": found.pop("zero_scale")}  # what all share comes last

    @classmethod
    def check_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the full, checked settings; raise `ValueError` naming the first one that is wrong."""
        declared = cls.declared_settings()
        for name in settings:
            if name not in declared:
                raise ValueError(f"unknown setting {name!r}; {suggest(name, declared)}")
        return {name: spec.check(name, settings.get(name, spec.default)) for name, spec in declared.items()}

    # -- what a subclass writes --

    def build(self, host: Host) -> None:
        """Create parameters (trainable) and buffers (frozen or learned by local rules). Default: nothing."""

    def transform(self, x: Tensor, context: Context) -> Tensor:
        """The mechanism: x (B, T, d_out) in fp32 -> change (B, T, d_out), before the gate."""
        raise NotImplementedError(f"{type(self).__name__} must define transform")

    def gated(self, x: Tensor, context: Context) -> Tensor:
        """`transform` times the gate; to be overridden only where the gate costs less inside the mechanism.

        What it returns will be written to: neither a backward nor anybody else may need it.
        """
        change = self.transform(x, context)
        return change if self.zero_at == "update" else _Gating.apply(change, self.scaled_gate, None)

    def applied(self, x: Tensor, context: Context) -> Tensor:
        """x plus `gated`; to be overridden only where the sum costs less inside the mechanism."""
        # Autograd runs a view's backward after that of everything later: the mechanism's gradient of x is then there
        # first and takes up this one's in place. And another tensor of this width would cost more than the sum itself.
        itself = x.view_as(x)
        if self.zero_at != "update" and type(self).gated is Primitive.gated:
            return _Gating.apply(self.transform(x, context), self.scaled_gate, itself)
        change = self.gated(x, context)
        kept = self.zero_at == "update" or torch.compiler.is_compiling() or change._is_view()
        return change + itself if kept else change.add_(itself)

    def left_matrix(self) -> Tensor:
        """For ``merge="left"``: M with transform(x) = M x, as (d_out, d_out), or (d_out,) if it is diagonal."""
        raise NotImplementedError(f"{type(self).__name__} declares merge='left' but defines no left_matrix")

    def weight_delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """For ``merge="weight"``: the change (before the gate) of weight (d_out, d_in) and of bias, if any."""
        raise NotImplementedError(f"{type(self).__name__} declares merge='weight' but defines no weight_delta")

    @property
    def scales_input(self) -> bool:
        """Whether the layer is to read its input times `input_scale`.

        ``x`` is then what the layer makes of that; ``context.x_in`` stays the input as it came.
        """
        return False

    def input_scale(self) -> Tensor:
        """For ``scales_input``: the factor of each channel of the layer's input, (d_in,)."""
        raise NotImplementedError(f"{type(self).__name__} scales the input but defines no input_scale")

    def connect(self, path: str, siblings: Mapping[str, Primitive], model_config: Mapping[str, Any]) -> None:
        """Meet the same primitive at the adapter's other sites, by path; called once all of them are in place.

        Whatever is kept of a sibling must not become a submodule: its tensors would be saved twice.
        """

    def penalty(self) -> Tensor | None:
        """A term of the training loss that depends on parameters alone, or None; weighted by a setting."""
        return None

    def surrogate_error(self) -> float:
        """For ``approximates``: size of what the linear map of `weight_delta` gets wrong, relative to the change."""
        raise NotImplementedError(f"{type(self).__name__} approximates but defines no surrogate_error")

    @classmethod
    def combine(
        cls, parts: Sequence[Primitive], weights: Sequence[float], way: str, blend: Blend
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """For ``combinations``: one primitive in the place of several, each with a weight.

        Args:
            parts: primitives of this class and of the same sizes.
            weights: one for each.
            way: one of ``combinations``.
            blend: makes one tensor of several equally shaped ones, value by value, with the weights in it.

        Returns:
            The settings of the result, and its whole state.

        Raises:
            ValueError: these parts cannot be combined in this way.
        """
        raise NotImplementedError(f"{cls.__name__} declares combinations but defines no combine")

    def settings(self) -> dict[str, Any]:
        """The values of the declared settings, as in a configuration."""
        return {name: getattr(self, name) for name in self.declared_settings()}

    def check_loaded(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` if tensors of a checkpoint, by their names here, belong to another primitive."""

    def learn(self, fresh: Tensor) -> None:
        """Apply the local rule to the buffers. ``fresh`` is 1 if something was observed since the last call, else 0:
        multiply the rate by it, so that no branch on data is needed."""

    # -- what all primitives share --

    def forward(self, x: Tensor, context: Context | None = None, *, with_x: bool = False) -> Tensor:
        """x (..., T, d_out) -> delta of the same shape and dtype, or x + delta if ``with_x``."""
        shape, dtype = x.shape, x.dtype
        if x.numel() == 0:
            return self._of_nothing(x)
        context = self._complete(context or Context(), x)
        x = as_sequence(x)
        # Top-k, exponentials and long sums flip or overflow in half precision: every mechanism computes in fp32.
        with autocast_off(x.device.type):
            if self.any_dtype:
                found = self.applied(x, context) if with_x else self.gated(x, context)
            else:
                found = self._in_fp32(x.float(), context, with_x)
            found = found.to(dtype)
        return found if found.shape == shape else found.reshape(shape)

    def _of_nothing(self, x: Tensor) -> Tensor:
        """The change of no token at all, such as an expert gets that no token is sent to; all gradients are zero."""
        none = torch.cat([x.new_zeros(0), *(parameter.flatten()[:0].to(x.dtype) for parameter in self.parameters())])
        return x + none.sum()

    def _complete(self, context: Context, x: Tensor) -> Context:
        v = context.x_in
        if v is None and self.d_in == self.d_out:
            v = x
        if v is None:
            if self.needs_input:
                raise ValueError(f"{self.name} reads the layer's input ({self.d_in} features): pass Context(x_in=...)")
            return context
        v = as_sequence(v) if self.any_dtype else as_sequence(v).float()
        return context if v is context.x_in else context.replace(x_in=v)

    def _in_fp32(self, x: Tensor, context: Context, with_x: bool) -> Tensor:
        for parameter in self._parameters.values():
            if parameter is not None and parameter.dtype != torch.float32:
                break
        else:
            return self._both_ways(x, context, with_x)
        # A user (or FSDP) keeps the adapter in half precision: compute with upcast copies of its parameters.
        upcast = {f"primitive.{name}": parameter.float() for name, parameter in self.named_parameters()}
        return torch.func.functional_call(_Body(self), upcast, (x, context, with_x))

    def _both_ways(self, x: Tensor, context: Context, with_x: bool) -> Tensor:
        if self.kind != "causal" or not context.bidirectional or self.reads_both_ways:
            return self.applied(x, context) if with_x else self.gated(x, context)
        forwards = self.transform(x, context)
        backwards = self.transform(x.flip(1), context.reversed()).flip(1)
        change = 0.5 * (forwards + backwards)
        change = change if self.zero_at == "update" else _Gating.apply(change, self.scaled_gate, None)
        return x + change if with_x else change

    def _apply(self, fn: Any, recurse: bool = True) -> Primitive:
        # Running statistics lose small updates in half precision (0.001 steps towards 1.0 stop at 0.25 in bf16), and
        # frozen matrices their exactness: floating buffers keep their dtype and every bit, whatever the host becomes.
        kept = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in kept:
            moved = module._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            self.check_loaded(given)
        except ValueError as error:
            error_messages: list[str] = args[-1]
            error_messages.append(f"{prefix.rstrip('.')}: {error}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def scaled_gate(self) -> Tensor:
        """What the change is multiplied by, (d_out,) or (1,): the gate times ``zero_scale``."""
        return self.gate if self.zero_scale == 1 else self.zero_scale * self.gate

    def open(self) -> None:
        """Be fully on from birth, for a place where another factor of the path is zero already."""
        with torch.no_grad():
            if self.zero_at == "readout":
                readout = getattr(self, self.readout)
                nn.init.normal_(readout, std=max(readout.numel() / self.d_out, 1.0) ** -0.5)
            else:
                self.gate.fill_(1.0)

    def wake(self) -> None:
        """Leave the identity: give every trainable tensor a random, non-zero value of its own order of magnitude."""
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn_like(parameter)
                if parameter is getattr(self, "gate", None):
                    parameter.copy_((0.5 + 0.1 * noise) / self.zero_scale)
                elif torch.count_nonzero(parameter) == 0:
                    parameter.copy_(0.3 * noise / max(parameter.shape[-1], 1) ** 0.5)
                else:
                    parameter.mul_(1 + 0.1 * noise)

    # -- local learning: observe in forward, commit after the optimiser's step --
    #
    # A buffer that changed between a forward and its recomputation under gradient checkpointing, or between two
    # forwards that share a backward, would make gradients belong to another function than the loss.

    def declare_statistics(self, **shapes: tuple[int, ...]) -> None:
        """Reserve slots for statistics of the running step; call it in `build`."""
        self._statistics = tuple(shapes)
        self.register_buffer("forwards", torch.zeros(()), persistent=False)
        for name, shape in shapes.items():
            self.register_buffer(f"observed_{name}", torch.zeros(shape), persistent=False)

    def observe(self, context: Context, **statistics: Tensor) -> None:
        """Average a training forward into the slots; a no-op in eval, under no_grad and in recomputation."""
        if not (self.training and context.observing):
            return
        with torch.no_grad():
            self.forwards.add_(1.0)
            for name, value in statistics.items():
                slot = getattr(self, f"observed_{name}")
                slot.add_((value - slot) / self.forwards)

    def commit(self) -> None:
        """Apply what was observed since the last call to the learned buffers, once."""
        if self._statistics:
            with torch.no_grad():
                self.learn(self.forwards.clamp(max=1.0))
                for name in ("forwards", *(f"observed_{name}" for name in self._statistics)):
                    getattr(self, name).zero_()

    # -- merging --

    def merged_change(
        self, weight: Tensor, bias: Tensor | None, y: tuple[Tensor, Tensor | None], approximate: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The exact change of (weight, bias) that this primitive makes, gate included, all in fp32.

        ``weight``, ``bias``: the layer's own; ``y``: the (weight, bias) that produce what the primitive reads, which
        differs from the layer's own once an earlier primitive has been merged; ``approximate``: where there is no exact
        change, the nearest one that the primitive knows.

        Raises:
            ValueError: the primitive depends on its input.
        """
        gate = weight.new_ones(1) if self.zero_at == "update" else self.scaled_gate.detach().float()
        if self.merge == "weight" or (approximate and self.approximates):
            dw, db = self.weight_delta(weight, bias)
            return gate[:, None] * dw, None if db is None else gate * db
        if self.merge == "left":
            m, (w, b) = self.left_matrix().detach().float(), y
            if m.dim() == 1:
                return (gate * m)[:, None] * w, None if b is None else gate * m * b
            return gate[:, None] * (m @ w), None if b is None else gate * (m @ b)
        raise ValueError(f"{self.name} depends on its input and cannot be merged into a weight")

    def extra_repr(self) -> str:
        values = [f"{name}={getattr(self, name)!r}" for name in self.declared_settings()]
        return ", ".join([f"{self.d_in} -> {self.d_out}", *values])


class _Body(nn.Module):
    """Gives `torch.func.functional_call` a forward that skips the casts of `Primitive.forward`."""

    def __init__(self, primitive: Primitive) -> None:
        super().__init__()
        self.primitive = primitive

    def forward(self, x: Tensor, context: Context, with_x: bool) -> Tensor:
        return self.primitive._both_ways(x, context, with_x)


@contextmanager
def born_in_fp32() -> Iterator[None]:
    """A block in which tensors are made in fp32, whatever the user's default dtype is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def autocast_off(device_type: str) -> AbstractContextManager:
    """A block without autocast; entering one costs more than many a mechanism, so only where there is any."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def as_sequence(x: Tensor) -> Tensor:
    """(..., T, d) -> (B, T, d); a single vector (d,) becomes one token."""
    if x.dim() == 3:  # no view, which autograd would record
        return x
    if x.dim() == 1:
        return x[None, None]
    return x.reshape(-1, *x.shape[-2:])
