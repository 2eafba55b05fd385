"""The contract of a primitive: what it declares, what it is given, what it returns.

A primitive is a small module that reads features ``x`` (B, T, d_out) and returns a change ``delta`` of the same shape.
It knows torch alone: neither PEFT nor transformers, neither adapters' names nor caches. Whatever it has to know about
the world (padding, positions, the layer's input, what was said in earlier decoding steps) comes with a `Context`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._words import suggest
from .context import Context, Host, in_full
from .setting import Setting, setting

# Which factor of the path is zero at birth, and what most primitives with a zero there multiply it by, so that a LoRA's
# learning rate trains it: Adam moves every number by about one step, and a gain has one where a LoRA has eight.
ZEROS = {"gate": 4.0, "scalar_gate": 4.0, "readout": 1.0, "update": 1.0}
MERGES = ("weight", "left")


class _Unrecorded:
    """The context of a `Fused` forward of which there will be no backward."""

    needs_input_grad: Mapping[int, bool] = defaultdict(bool)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Users who call ``loss.backward()`` within autocast have the backward run in it as well."""

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        with autocast_off(grads[0].device.type):
            return backward(ctx, *grads)

    return run


class Fused(torch.autograd.Function):
    """An equation with a backward of its own; where nothing is recorded, its forward alone runs."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "backward" in vars(cls):
            setattr(cls, "backward", staticmethod(_without_autocast(cls.backward)))  # noqa: B010  # mypy knows methods only

    @classmethod
    def apply(cls, *args: Any) -> Any:
        return super().apply(*args) if torch.is_grad_enabled() else cls.forward(_Unrecorded(), *args)


class _Scaling(Fused):
    """scale times change, plus x if there is one. Backward makes one tensor where autograd would make two."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, scale: Tensor, x: Tensor | None) -> Tensor:
        ctx.save_for_backward(change, scale)
        return change * scale if x is None else torch.addcmul(x, change, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        change, scale = ctx.saved_tensors
        product = grad * change
        on_scale = product.sum(tuple(range(product.dim() - 1)) if len(scale) > 1 else None).view_as(scale)
        return torch.mul(grad, scale, out=product), on_scale, grad if ctx.needs_input_grad[2] else None


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
    home: ClassVar[str | None] = None  # where in a language model it belongs: its "embedding" or its "head"
    any_dtype: ClassVar[bool] = False  # `transform` takes x and x_in in the layer's dtype and minds its own precision
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
        with born_in_fp32():
            self.build(host if host is not None else Host())
            if self.zero_at != "update":
                gate_shape = self.d_out if self.zero_at == "gate" else 1
                self.gate = nn.Parameter(torch.full((gate_shape,), 1.0 if self.zero_at == "readout" else 0.0))

    @classmethod
    def declared_settings(cls) -> dict[str, Setting]:
        """The settings that the class and its bases declare, in order of declaration."""
        declared: dict[str, Setting] = {}
        for base in reversed(cls.__mro__):
            declared.update({name: value for name, value in vars(base).items() if isinstance(value, Setting)})
        shared = declared.pop("zero_scale", None)  # what all share comes last
        return declared if shared is None else {**declared, "zero_scale": shared}

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

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        """``scale`` (d_out,) or (1,) times `transform`, plus x if ``with_x``.

        To be overridden only where that costs less than it does here, never to compute anything else. Where x is not
        added, what is returned will be written to: neither a backward nor anybody else may need it.
        """
        if not torch.is_grad_enabled():
            change = self.transform(x, context)
            return torch.addcmul(x, change, scale) if with_x else change * scale
        itself = x.view_as(x) if with_x else None  # a view's backward comes last: see `Scaled`
        return _Scaling.apply(self.transform(x, context), scale, itself)

    def left_matrix(self) -> Tensor:
        """For ``merge="left"``: M with transform(x) = M x, as (d_out, d_out), or (d_out,) if it is diagonal."""
        raise NotImplementedError(f"{type(self).__name__} declares merge='left' but defines no left_matrix")

    def settings(self) -> dict[str, Any]:
        """The values of the declared settings, as in a configuration."""
        return {name: getattr(self, name) for name in self.declared_settings()}

    def check_loaded(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `ValueError` if tensors of a checkpoint, by their names here, belong to another primitive."""

    # -- what all primitives share --

    def forward(self, x: Tensor, context: Context | None = None, *, with_x: bool = False) -> Tensor:
        """x (..., T, d_out) -> delta of the same shape and dtype, or x + delta if ``with_x``."""
        if x.numel() == 0:
            return self._of_nothing(x)
        if torch.is_autocast_enabled(x.device.type):
            with autocast_off(x.device.type):
                return self.forward(x, context, with_x=with_x)
        context = self._complete(context or Context(), x)
        sequence = as_sequence(x)
        # Top-k, exponentials and long sums flip or overflow in half precision: mechanisms compute in fp32, or fp64.
        if self.any_dtype:
            result = self._changed(sequence, context, with_x)
        else:
            result = self._in_full(in_full(sequence), context, with_x)
        result = result if sequence is x else result.reshape(x.shape)
        return result if result.dtype == x.dtype else result.to(x.dtype)

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
        v = as_sequence(v) if self.any_dtype else in_full(as_sequence(v))
        return context if v is context.x_in else context.replace(x_in=v)

    def _in_full(self, x: Tensor, context: Context, with_x: bool) -> Tensor:
        if context.once(self._keeps_to, x.dtype):
            return self._changed(x, context, with_x)
        # A user (or FSDP) keeps the adapter in half precision, or the base in double.
        return self.computed_in(x.dtype, "_changed", x, context.replace(derived=None), with_x)

    def _keeps_to(self, dtype: torch.dtype) -> bool:
        """Whether all floating tensors have this dtype."""
        own = (*self._parameters.values(), *self._buffers.values())
        return not any(tensor.dtype != dtype and tensor.is_floating_point() for tensor in own if tensor is not None)

    def computed_in(self, dtype: torch.dtype, method: str, *given: Any) -> Any:
        """What a method returns that finds copies of all floating tensors in ``dtype``."""
        cast = {
            f"primitive.{name}": tensor.to(dtype)
            for name, tensor in (*self.named_parameters(), *self.named_buffers())
            if tensor.is_floating_point() and tensor.dtype != dtype
        }
        if not cast:
            return getattr(self, method)(*given)
        return torch.func.functional_call(_Body(self), cast, (method, *given))

    def _changed(self, x: Tensor, context: Context, with_x: bool) -> Tensor:
        if context.bidirectional and self.kind == "causal" and not self.reads_both_ways:
            return self._both_ways(x, context, with_x)
        if self.zero_at != "update":
            return self.scaled(x, context, context.once(self.scaled_gate), with_x)
        change = self.transform(x, context)
        return x + change if with_x else change

    def _both_ways(self, x: Tensor, context: Context, with_x: bool) -> Tensor:
        forwards = self.transform(x, context)
        backwards = self.transform(x.flip(1), context.reversed()).flip(1)
        change = 0.5 * (forwards + backwards)
        change = change if self.zero_at == "update" else _Scaling.apply(change, self.scaled_gate(), None)
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
                    scale = self.zero_scale if self.zero_at == "update" else 1.0
                    parameter.copy_(0.3 * noise / scale / max(parameter.shape[-1], 1) ** 0.5)
                else:
                    parameter.mul_(1 + 0.1 * noise)

    # -- merging --

    def merged_change(
        self, weight: Tensor, bias: Tensor | None, y: tuple[Tensor, Tensor | None], approximate: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The exact change of (weight, bias) that this primitive makes, gate included, in the dtype of ``weight``,
        which is fp32 at least.

        ``weight``, ``bias``: the layer's own; ``y``: the (weight, bias) that produce what the primitive reads, which
        differs from the layer's own once an earlier primitive has been merged; ``approximate``: where there is no exact
        change, the nearest one that the primitive knows.

        Raises:
            ValueError: the primitive depends on its input.
        """
        gate = weight.new_ones(1) if self.zero_at == "update" else self.scaled_gate().detach().to(weight.dtype)
        if self.merge == "left":
            m, (w, b) = self.left_matrix().detach().to(weight.dtype), y
            if m.dim() == 1:
                return (gate * m)[:, None] * w, None if b is None else gate * m * b
            return gate[:, None] * (m @ w), None if b is None else gate * (m @ b)
        raise ValueError(f"{self.name} depends on its input and cannot be merged into a weight")

    def extra_repr(self) -> str:
        values = [f"{name}={getattr(self, name)!r}" for name in self.declared_settings()]
        return ", ".join([f"{self.d_in} -> {self.d_out}", *values])


class Scaled(Primitive):
    """A primitive whose fused form takes its scale in: ``scaled_change(x, context, scale)``, as `scaled` without x.

    `transform` is the formula beside it. Where the fused form alone can be written down, because its gradient is not
    that of a formula (spikes, thresholds: see `surrogate`), `transform` is the fused form at a scale of one.
    """

    def scaled_change(self, x: Tensor, context: Context, scale: Tensor) -> Tensor:
        """``scale`` (d_out,) or (1,) times `transform`, in memory of its own."""
        raise NotImplementedError(f"{type(self).__name__} must define scaled_change")

    def transform(self, x: Tensor, context: Context) -> Tensor:
        return self.scaled_change(x, context, x.new_ones(self.d_out))

    def scaled(self, x: Tensor, context: Context, scale: Tensor, with_x: bool) -> Tensor:
        # Taken before the mechanism begins: autograd runs a view's backward after that of everything later, so that
        # the mechanism's gradient of x is there first and takes up this one's in place.
        itself = x.view_as(x) if x.requires_grad else x
        change = self.scaled_change(x, context, scale)
        if not with_x:
            return change
        return change + itself if torch.compiler.is_compiling() or change._is_view() else change.add_(itself)


class _Body(nn.Module):
    """Gives `torch.func.functional_call` a forward that is any method of a primitive."""

    def __init__(self, primitive: Primitive) -> None:
        super().__init__()
        self.primitive = primitive

    def forward(self, method: str, *given: Any) -> Any:
        return getattr(self.primitive, method)(*given)


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
