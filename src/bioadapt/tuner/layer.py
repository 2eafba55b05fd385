"""The one layer that carries bio adapters: all plumbing that PEFT expects of a tuner layer, written once.

One file because PEFT asks for all of it as methods of one class.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor, nn

from ..checkpoint import CONTAINER
from ..config import BioConfig
from ..primitives._state import Memory, Recollection
from ..primitives.base import Context, Host, Primitive
from ..primitives.local_rule import with_evidence
from ..registry import primitive_info
from . import patches
from .circuit import AdapterCircuit
from .masks import NOTHING, Tokens, Unclear
from .merging import MergeableLayer, Original, quantization_backend_of
from .placement import asked_for
from .scope import Scope, Surroundings
from .sharding import check_whole, refusal_of_shards
from .single_product import single_product
from .sites import Axes, Layout, Site, describe


class BioLayer(MergeableLayer):
    """Wraps a layer, plain or already adapted by another PEFT method, and adds the change its circuits compute.

    Args:
        base_layer: the layer to wrap.
        site: geometry of the innermost plain layer.
        path: name of the layer in the plain model; it names decoding state and checkpoint keys.
        scope: what surrounds the layer's forwards.
        causal: whether time is read backwards only here.
        across: whether the layer reads the encoder's tokens while the stack is called with the decoder's.
        axes: which axis of its activations is time; None where that cannot be told.
    """

    adapter_layer_names = (CONTAINER,)
    other_param_names = ()

    def __init__(
        self,
        base_layer: nn.Module,
        site: Site,
        path: str,
        scope: Scope,
        causal: bool,
        across: bool,
        axes: Axes | None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        setattr(self, CONTAINER, nn.ModuleDict())
        self.site, self.path, self.scope = site, path, scope
        self.causal, self.across = causal and not across, across
        self.axes = axes
        self.unsure = False  # whether nothing tells which way time may be read
        self.routed = any(part.startswith("expert") for part in path.split("."))  # sees tokens in any order
        self.said: set[str] = set()  # warnings that have been given
        self.in_features, self.out_features = site.d_in, site.d_out
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._original: Original | None = None
        self.lost_in_rounding = 0.0  # share of the changed weights that the last merge left as they were
        self.quantization_backend = quantization_backend_of(self.get_base_layer(), **kwargs)
        scope.layers.append(self)

    # -- adapters --

    @property
    def circuits(self) -> nn.ModuleDict:
        return self._modules[CONTAINER]  # type: ignore[return-value]

    def primitives(self) -> Iterator[Primitive]:
        """All primitives of all adapters at this layer."""
        return (primitive for circuit in self.circuits.values() for primitive in circuit.values())

    @property
    def carries_state(self) -> bool:
        """Whether decoding has to carry anything over tokens here."""
        return self.causal and any(circuit.reads_time for circuit in self.circuits.values())

    @property
    def reads_tokens(self) -> bool:
        """Whether the output depends on where tokens stand and which of them are padding."""
        # Asked at every forward, where a list is quicker than a generator.
        return any([circuit.reads_tokens for circuit in self.circuits.values()])

    def update_layer(self, adapter_name: str, config: BioConfig) -> None:
        """Add an adapter.

        Raises:
            ValueError: the name is taken, or a primitive cannot act here; the layer is as before.
        """
        if adapter_name in self.circuits:
            raise ValueError(f"{self.path} already has an adapter called {adapter_name!r}")
        at_input = config.adapts_input_of(self.path)
        site = self.site.at_input() if at_input else self.site
        for entry in config.primitives:
            info = primitive_info(entry["name"])
            weight = getattr(self.get_base_layer(), "weight", None)
            refusal = site.serves(info) or refusal_of_shards(weight, self.site, info, at_input)
            if at_input and info.kind == "weight":
                refusal = "it acts on a weight, and feedforward_modules asks for a change of the module's input"
            elif at_input and not site.reads_features:
                refusal = f"feedforward_modules asks for a change of the input, and that of {site.layer} is no features"
            if info.kind == "global" and self.causal:
                refusal = "it reads later tokens, which this model must not see"
            if self.axes is None and (info.kind in ("causal", "global") or info.factory.reads_positions):
                refusal = (
                    "it reads time, and the model holds modules with batch_first=False, so that it is not clear which "
                    "axis is time here: say so by batch_first=True or False in the configuration"
                )
            if refusal is not None:
                raise ValueError(f"{info.name} cannot act on {self.path}: {refusal}")
        if config.rank is not None and config.rank > site.d_out:
            raise ValueError(f"rank={config.rank} is more than the {site.d_out} features at {self.path}")
        host = Host(None if at_input else self._matrix_or_none, seed=config.seed_of(self.path))
        circuit = AdapterCircuit(config, site, host, at_input)
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is not None and device.type != "meta" and not any(p.is_meta for p in circuit.parameters()):
            circuit.to(device)
        circuit.train(self.training)
        self.circuits[adapter_name] = circuit
        # A fresh adapter takes part only once it is set active, and must not disturb what is trained already.
        circuit.requires_grad_(adapter_name in self.active_adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter that came by way of the meta device. PEFT also casts it here, which rounds what was saved."""
        found, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if adapter_name in self.circuits and (device or found) is not None:
            self.circuits[adapter_name].to(device or found)

    def _matrix_or_none(self) -> Tensor | None:
        if self.site.weight is None:
            return None
        try:
            return self.site.matrix(self.get_base_weight())
        except TypeError:  # a quantised format that PEFT cannot expand
            return None

    def __getattr__(self, name: str) -> Any:
        """Expose what the wrapped layer exposes (`num_embeddings`, `stride`, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(self.base_layer, name)

    # -- forward --

    @patches.kept_out_of_old_graphs
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        around = self.scope.surroundings
        circuits = self._called(around)
        base_layer: Any = self._modules["base_layer"]
        if not circuits:
            return base_layer(*args, **kwargs)
        read = args[0] if args else next(iter(kwargs.values()))
        reading = {name: circuit for name, circuit in circuits.items() if circuit.changes_input}
        apart: dict[str, Tensor] = {}
        if not reading or (around.adapter_names is None and len(circuits) > 1):
            joint = self._single_product(args, kwargs, circuits, around)
            if joint is not None:
                return joint
            output = base_layer(*args, **kwargs)
            # Each adapter's change is measured from the layer as it is, so that the changes of several add up.
            for name, circuit in reading.items():
                apart[name] = _features(self._run(self._own_input(read, {name: circuit}, around), args, kwargs))
        else:
            output = self._run(self._own_input(read, reading, around), args, kwargs)
            circuits = {name: circuit for name, circuit in circuits.items() if not circuit.at_input}
            if not circuits:
                return output
        changed = self._changed(_features(output), read, circuits, around, apart)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _called(self, around: Surroundings) -> dict[str, AdapterCircuit]:
        """The circuits that this forward runs, by adapter.

        Raises:
            ValueError: samples ask for adapters of their own while some are merged.
        """
        if self._disable_adapters:
            return {}
        names = around.adapter_names
        if self.merged_adapters:
            if names is not None:
                raise ValueError("adapter_names cannot be used while adapters are merged: unmerge them first")
            return {}
        held: dict[str, Any] = self._modules[CONTAINER]._modules  # type: ignore[union-attr]
        active = self.active_adapters if names is None else sorted(set(names))
        return {name: held[name] for name in active if name in held}

    def _single_product(
        self, args: tuple, kwargs: dict[str, Any], circuits: dict[str, AdapterCircuit], around: Surroundings
    ) -> Tensor | None:
        """The output with its change, where one product gives both."""
        if len(circuits) > 1 or len(args) != 1 or kwargs or around.adapter_names is not None:
            return None
        (circuit,) = circuits.values()
        # What is compiled is compiled by itself.
        if circuit.joining is None or self.scope.compilation is not None:
            return None
        return single_product(self.base_layer, args[0], circuit[circuit.joining])

    def _run(self, read: Tensor, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The base layer on another input than it was called with."""
        if args:
            return self.base_layer(read, *args[1:], **kwargs)
        first, *_ = kwargs
        return self.base_layer(**{**kwargs, first: read})

    def _own_input(self, read: Tensor, reading: dict[str, AdapterCircuit], around: Surroundings) -> Tensor:
        """What the layer is to read where one adapter, or each sample's own, changes its input."""
        names = around.adapter_names
        before = {name: circuit for name, circuit in reading.items() if circuit.at_input}
        scales = {name: circuit.input_scale() for name, circuit in reading.items() if circuit.scales_input}
        if before:
            read = self._changed(read, read, before, around, {}, self.site.at_input())
        if scales and names is None:
            read = self._scaled(read, *scales.values())
        elif scales:
            ones = torch.ones(self.site.d_in, device=read.device)
            read = self._scaled(read, torch.stack([scales.get(name, ones) for name in names]))
        return read

    def _scaled(self, v: Tensor, scale: Tensor) -> Tensor:
        """The layer's input with its channels multiplied: scale (d_in,), or (samples, d_in) for one row per sample."""
        if scale.dim() == 2:
            axis = 1 if self.axes is not None and self.axes.time_first and v.dim() == 3 else 0
            scale = scale.repeat_interleave(v.shape[axis] // scale.shape[0], 0)  # beam search repeats samples
            scale = scale.reshape(scale.shape[0], *(1,) * (v.dim() - 2 - axis), self.site.d_in)
        if self.site.spatial:
            scale = scale.movedim(-1, 1) if scale.dim() > 1 else scale.reshape(-1, *(1,) * (v.dim() - 2))
        return (v * scale.to(v.device)).to(v.dtype)  # a gain near one would be rounded away in half precision

    def _changed(
        self,
        y: Tensor,
        v: Tensor,
        circuits: dict[str, AdapterCircuit],
        around: Surroundings,
        apart: dict[str, Tensor],
        site: Site | None = None,
    ) -> Tensor:
        """The layer's output ``y``, or its input, and all changes of it.

        ``v``: the layer's input; ``apart``: what the layer makes of an adapter's own input; ``site``: of ``y``, the
        layer's own if None.
        """
        site = site or self.site
        alone = len(circuits) == 1 and not apart and around.adapter_names is None and not site.spatial
        reading = [name for name, circuit in circuits.items() if circuit.reads_tokens]
        if alone and not reading and not self.training:  # where tokens stand, and how they lie, makes no difference
            check_whole(y, site, self.path)
            (circuit,) = circuits.values()
            x_in = v if site.reads_features and v.shape[:-1] == y.shape[:-1] else None
            bias = self._constant(v) if circuit.reads_weight else None
            context = Context(x_in, bias, observing=False, derived=around.derived)  # type: ignore[arg-type]
            return self._of_circuit(circuit, "applied", y, context, None)
        layout = Layout.of(y, site, None if self.across or self.routed else around.tokens, self.axes)
        counted = f"{self.path} input" if site is not self.site else self.path  # each is asked for once in a call
        tokens = self._tokens(layout, around, circuits, bool(reading), counted)
        if tokens is not NOTHING:
            tokens = tokens.to(y.device)
        context = self._context(layout, v, around, circuits, site, tokens)
        states = self._states(reading, layout, around, counted) if reading else {}
        features = layout.to_sequence(y)
        check_whole(features, site, self.path)
        if alone:
            ((name, circuit),) = circuits.items()
            changed = layout.restore(self._of_circuit(circuit, "applied", features, context, states.get(name)))
        else:
            reads = {name: layout.to_sequence(read) for name, read in apart.items()}
            total = self._sum(features, circuits, context, states, reads, around.adapter_names)
            changed = (y + layout.restore(total)).to(y.dtype)
        if context.observations:
            changed = with_evidence(changed, context.observations)
        return self.scope.learning.terms.brought_in(changed, context.losses, around) if context.losses else changed

    def _of_circuit(
        self, circuit: AdapterCircuit, method: str, features: Tensor, context: Context, state: Recollection | None
    ) -> Tensor:
        """What a method of the circuit gives, compiled where that was asked for."""
        compilation = self.scope.compilation
        if compilation is None or torch.compiler.is_compiling():  # then it becomes part of that graph
            return getattr(circuit, method)(features, context, state)
        return compilation.run(circuit, method, features, context, state)

    def _sum(
        self,
        features: Tensor,
        circuits: dict[str, AdapterCircuit],
        context: Context,
        states: dict[str, Recollection],
        apart: dict[str, Tensor],
        names: list[str] | None,
    ) -> Tensor:
        """The changes of several adapters, or of those that the samples of a mixed batch ask for by ``names``."""
        total: Tensor | None = None
        for name, circuit in circuits.items():
            read = apart.get(name, features)
            changes: list[Tensor] = [read - features] if name in apart else []
            if not (changes and circuit.at_input):
                changes.append(self._of_circuit(circuit, "forward", read, context, states.get(name)))
            delta = changes[0] if len(changes) == 1 else changes[0] + changes[1]
            if names is not None:
                delta = delta * _rows_of(name, names, delta)
            total = delta if total is None else total + delta
        assert total is not None
        return total

    def _states(
        self, reading: list[str], layout: Layout, around: Surroundings, counted: str
    ) -> dict[str, Recollection]:
        """What the adapters whose tokens continue earlier ones remember of those, by name."""
        if self.routed or around.tokens is None or layout.sequence[0] != around.tokens[0]:
            return {}
        call, start = around.place(counted, layout.sequence)
        if not self.causal:
            return {}
        memory = around.memory
        if memory is None and layout.sequence[1] < around.tokens[1]:
            # A part of the sequence, which may continue the one before.
            memory = around.chunks = around.chunks or Memory()
        if memory is None:
            return {}
        heard = None if around.past is None else around.past + start
        again = f"#{call}" if call else ""
        return {name: memory.part(f"{self.path}/{name}{again}", heard) for name in reading}

    def _context(
        self,
        layout: Layout,
        v: Tensor,
        around: Surroundings,
        circuits: dict[str, AdapterCircuit],
        site: Site,
        tokens: Tokens,
    ) -> Context:
        reads_weight = any(circuit.reads_weight for circuit in circuits.values())
        return Context(
            layout.input_to_sequence(v, site),
            self._constant(v) if reads_weight else None,
            *tokens,
            bidirectional=not self.causal or len(layout.grid or ()) > 1,
            observing=torch.is_grad_enabled(),
            observations=[],
            grid=layout.grid,
            losses=[] if self.training else None,
            derived=around.derived,
            targets=self._targets(layout, around, circuits, v.device) if site is self.site else None,
        )

    def _targets(
        self, layout: Layout, around: Surroundings, circuits: dict[str, AdapterCircuit], device: torch.device
    ) -> Tensor | None:
        """The unit that is to fire at each token, (B, T), if this is the head of a model in training."""
        asked = any(primitive.home == "head" for circuit in circuits.values() for primitive in circuit.values())
        if not (around.live and asked) or asked_for(around.stack, "get_output_embeddings") is not self:
            return None
        targets = around.targets(self.causal)
        if targets is None or tuple(targets.shape) != layout.sequence:
            self._say(f"{self.path} learns nothing from what is to be foretold, since the model was not given labels")
            return torch.full(layout.sequence, -1, device=device)
        return targets.to(device)

    def _tokens(
        self,
        layout: Layout,
        around: Surroundings,
        circuits: dict[str, AdapterCircuit],
        reads_tokens: bool,
        counted: str,
    ) -> Tokens:
        """What is known of the tokens that the layer is called on.

        Raises:
            ValueError: a primitive has to know more.
        """
        start = 0
        if reads_tokens:
            _, start = around.calls.get(counted, (0, 0))
            self._check_time(layout, around, start)
        try:
            if self.across:
                return around.about_encoder(layout.sequence)
            if self.routed or (layout.sequence[1] == 1 and start == 0 and layout.sequence != around.tokens):
                return NOTHING  # a vector by itself
            found = around.about(layout.sequence)
            for unread in around.unread if reads_tokens else ():
                self._say(unread)
            return found
        except Unclear as unclear:
            if reads_tokens:
                raise ValueError(
                    f"{self.path} reads its tokens in time, but {unclear}. Pass attention_mask as (batch, tokens), "
                    "call the model without padding, or adapt this module with pointwise primitives alone"
                ) from None
            if around.live and any(primitive.learns for circuit in circuits.values() for primitive in circuit.values()):
                self._say(f"{self.path} learns from padding too, since {unclear}")
        return NOTHING

    def _check_time(self, layout: Layout, around: Surroundings, start: int) -> None:
        """Refuse an activation in which time cannot be found, and say where there is none."""
        if around.stack is None and self.scope.knew_tokens and patches.recomputing():
            raise ValueError(
                f"{self.path} is computed again in the backward by a checkpoint that was put around it after the "
                "adapter, so that masks and positions are not known there: use gradient_checkpointing_enable(), or "
                "wrap the model before adding the adapter"
            )
        if layout.spatial or self.across:
            return
        batch, steps = around.tokens or (None, None)
        if layout.sequence[1] == 1 and layout.sequence != around.tokens and start == 0:
            self._say(
                f"{self.path} is called on single vectors, not on sequences of them: primitives that read time have no "
                "past to read there"
            )
        if steps is None or len(layout.shape) == 2:
            return
        if len(layout.shape) > 3:
            raise ValueError(
                f"{self.path} is called with {len(layout.shape)} axes, so it is not clear which one is time: "
                "primitives that carry state over tokens cannot act here; leave it out of target_modules"
            )
        # What is compiled or exported for any length must not be asked whether that is the number of samples.
        if not torch.compiler.is_compiling() and layout.sequence == (steps, batch) and batch != steps:
            raise ValueError(
                f"{self.path} is called with {tuple(layout.shape)} for {batch} sequences of {steps} tokens: time seems "
                "to come first here. Say so by batch_first=False in the configuration"
            )
        if not self.causal and start > 0:
            raise ValueError(
                f"{self.path} is called on {layout.sequence[1]} of {steps} tokens at a time, but reads time both ways: "
                "let the model run on whole sequences, or adapt this module with pointwise primitives alone"
            )

    def _say(self, text: str) -> None:
        """Warn, once."""
        if text not in self.said and not torch.compiler.is_compiling():
            self.said.add(text)
            warnings.warn(text)

    def _constant(self, v: Tensor) -> Tensor | None:
        """What the layer makes of no input, (d_out,): the bias, which a tuner below may have changed."""
        bias = self._bias()
        if bias is None or self.below is None or self.quantization_backend is not None:
            return bias
        with torch.no_grad():
            return self.base_layer(v.new_zeros(1, self.site.d_in, *(1,) * self.site.spatial)).flatten()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


class BioLinear(BioLayer):
    """A `BioLayer` on a linear layer; PEFT finds linear layers that are already adapted by the name of their class."""


def build_layer(
    base_layer: nn.Module,
    path: str,
    scope: Scope,
    causal: bool,
    across: bool,
    axes: Axes | None,
    **kwargs: Any,
) -> BioLayer:
    """A layer without adapters around ``base_layer``.

    Raises:
        TypeError: a layer whose feature axis is not known.
    """
    plain = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
    try:
        site = describe(plain)
    except TypeError as error:
        raise TypeError(f"{path} cannot be adapted: {error}") from None
    cls = BioLinear if site.weight in ("rows", "columns") and site.reads_features else BioLayer
    return cls(base_layer, site, path, scope, causal, across, axes, **kwargs)


def _features(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _rows_of(name: str, adapter_names: list[str], delta: Tensor) -> Tensor:
    """1 for the samples of the batch that use the adapter, else 0, as (B, 1, 1). Beam search repeats samples."""
    chosen = torch.tensor([given == name for given in adapter_names], device=delta.device)
    if delta.shape[0] % len(chosen):
        raise ValueError(f"adapter_names has {len(chosen)} entries, but the batch has {delta.shape[0]} samples")
    return chosen.repeat_interleave(delta.shape[0] // len(chosen)).to(delta.dtype)[:, None, None]
