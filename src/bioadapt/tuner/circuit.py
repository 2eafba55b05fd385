"""One adapter at one site: its primitives, their order, and the population they run on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..config import BioConfig
from ..primitives._state import Recollection
from ..primitives.base import Context, Host, OnWeight, Primitive
from ..primitives.context import in_full
from ..primitives.frames import read_in, read_out
from ..primitives.names import STAGES
from ..primitives.primitive import autocast_off, born_in_fp32
from ..registry import build_primitive
from .sites import Site

_PARAMETRISATIONS = "parametrizations"  # torch's name for the child


class AdapterCircuit(nn.Module):
    """Primitives by name, run in waves: within a wave all read the same features, waves follow each other.

    Primitives of kind ``weight`` act on the layer itself and therefore always come first. Not every child is a
    primitive: where torch has parametrised a projection, one child holds its parametrisation.

    Args:
        config: what to build.
        site: the features that the circuit changes.
        host: what the primitives may read of the layer.
        at_input: whether those features are what the layer reads, and not what it writes.
    """

    def __init__(self, config: BioConfig, site: Site, host: Host, at_input: bool = False) -> None:
        super().__init__()
        self.at_input = at_input
        population = site.d_out if config.rank is None else config.rank
        self.down = self.up = None
        if config.rank is not None:
            with born_in_fp32():
                self.down, self.up = read_in(config.rank, site.d_out), read_out(site.d_out, config.rank)
            host = Host(partial(_population_weight, host, self.down.detach()), seed=host.seed)
        for entry in config.primitives:
            settings = {key: value for key, value in entry.items() if key != "name"}
            primitive = build_primitive(entry["name"], site.d_in, population, host=host, **settings)
            self.add_module(entry["name"], primitive)
            if config.rank is not None:
                primitive.open()  # the one zero of the path is ``up``
        primitives = list(self.values())
        self.waves = _waves(primitives, config.composition)
        # Asked at every forward, and the same for ever.
        self.alone = primitives[0].name if len(primitives) == 1 and config.rank is None else None
        self.reads_time = any(primitive.kind == "causal" for primitive in primitives)
        self.reads_tokens = self.reads_time or any(primitive.reads_positions for primitive in primitives)
        self.reads_weight = any(primitive.kind == "weight" for primitive in primitives)
        joins = any(math.isfinite(part.joins_product_from) for part in self.on_weight())
        self.joining = self.alone if joins else None  # the primitive whose change may join the layer's own product
        self.in_full = config.rank is not None or not all(primitive.any_dtype for primitive in primitives)
        if not config.init_weights and not any(parameter.is_meta for parameter in self.parameters()):
            self.wake()

    def items(self) -> Iterator[tuple[str, Primitive]]:
        return ((name, child) for name, child in self._modules.items() if name != _PARAMETRISATIONS)  # type: ignore[misc]

    def values(self) -> Iterator[Primitive]:
        return (primitive for _, primitive in self.items())

    def on_weight(self) -> Iterator[OnWeight]:
        return (primitive for primitive in self.values() if isinstance(primitive, OnWeight))

    def __contains__(self, name: str) -> bool:
        return name in self._modules and name != _PARAMETRISATIONS

    def __getitem__(self, name: str) -> Primitive:
        return self._modules[name]  # type: ignore[return-value]

    def wake(self) -> None:
        """Leave the identity."""
        for primitive in self.values():
            primitive.wake()
        if self.up is not None:
            nn.init.normal_(self.up, std=0.3 / self.up.shape[1] ** 0.5)

    def forward(self, y: Tensor, context: Context, state: Recollection | None = None) -> Tensor:
        """Features y (B, T, d_out) -> the adapter's change of them, in fp32 at least unless all take any dtype.

        ``state``: what earlier decoding steps left behind, by primitive; that of the context is not read.
        """
        if self.in_full:
            y = in_full(y)
        down, up = self.down, self.up
        if down is None or up is None:
            return self._change(y, context, state)
        context = context.replace(targets=None)  # they are units of the layer's output, not of the population
        with autocast_off(y.device.type):
            population = y @ down.to(y.dtype).T
            return (population + self._change(population, context, state)) @ up.to(y.dtype).T

    def applied(self, y: Tensor, context: Context, state: Recollection | None = None) -> Tensor:
        """y plus its change, in the dtype of y."""
        if self.alone is None:
            itself = y.view_as(y)  # before the primitives read it: see `Scaled`
            return self(y, context, state).add_(itself).to(y.dtype)
        return self[self.alone](y, self._own(self.alone, context, state), with_x=True)

    def _own(self, name: str, context: Context, state: Recollection | None) -> Context:
        return context if state is None else context.replace(state=state.part(name))

    def _change(self, y: Tensor, context: Context, state: Recollection | None) -> Tensor:
        total: Tensor | None = None
        for wave in self.waves:
            read = y if total is None else y + total
            for name in wave:
                primitive = self[name]
                # On the weight means on what the layer itself wrote, whatever has been added since.
                delta = primitive(y if primitive.kind == "weight" else read, self._own(name, context, state))
                total = delta if total is None else total + delta
        assert total is not None
        return total

    @property
    def changes_input(self) -> bool:
        """Whether the layer is to read something else than its input."""
        return self.at_input or (self.reads_weight and self.scales_input)

    @property
    def scales_input(self) -> bool:
        """Whether a primitive multiplies what the layer reads."""
        return any(primitive.scales_input for primitive in self.on_weight())

    def input_scale(self) -> Tensor:
        """What the layer's input is multiplied by before the layer reads it, (d_in,)."""
        first, *others = [primitive.input_scale() for primitive in self.on_weight() if primitive.scales_input]
        return math.prod(others, start=first)

    def check_loaded(self, tensors: dict[str, Tensor]) -> None:
        """Raise `ValueError` if a primitive's tensors of a checkpoint belong to another one."""
        for name, primitive in self.items():
            try:
                start = f"{name}."
                primitive.check_loaded({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def unmergeable(self, approximate: bool = False) -> list[str]:
        """Names of the primitives that depend on their input, hence cannot become part of a weight."""
        approximated = [primitive.name for primitive in self.on_weight() if approximate and primitive.approximates]
        return [name for name, primitive in self.items() if primitive.merge is None and name not in approximated]

    def merged_change(
        self, weight: Tensor, bias: Tensor | None, approximate: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The change of (weight, bias), exact unless ``approximate``; weight (d_out, n), in fp32 at least."""
        if self.at_input:
            features = next(self.values()).d_in
            change, _ = self._population_change(
                torch.eye(features, dtype=weight.dtype, device=weight.device), None, approximate
            )
            kernel = weight.unflatten(1, (features, -1))
            return torch.einsum("oik,ij->ojk", kernel, change).flatten(1), None
        if self.scales_input:
            scale = self.input_scale().detach().to(weight.dtype)
            scale = scale.repeat_interleave(weight.shape[1] // len(scale))  # one per place of a kernel
            dw, db = self._merged_change(weight * scale, bias, approximate)
            return weight * (scale - 1) + dw, db
        return self._population_change(weight, bias, approximate)

    def _population_change(
        self, weight: Tensor, bias: Tensor | None, approximate: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What the primitives change of what they read, written through ``down`` and ``up`` if there are any."""
        down, up = self.down, self.up
        if down is None or up is None:
            return self._merged_change(weight, bias, approximate)
        down, up = down.detach().to(weight.dtype), up.detach().to(weight.dtype)
        w, b = down @ weight, None if bias is None else down @ bias
        dw, db = self._merged_change(w, b, approximate)
        return up @ (w + dw), None if b is None else up @ (b if db is None else b + db)

    def _merged_change(self, weight: Tensor, bias: Tensor | None, approximate: bool) -> tuple[Tensor, Tensor | None]:
        total_w, total_b = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
        for wave in self.waves:
            read = (weight + total_w, None if bias is None or total_b is None else bias + total_b)
            changes = [
                self[name].computed_in(weight.dtype, "merged_change", weight, bias, read, approximate) for name in wave
            ]
            for dw, db in changes:
                total_w = total_w + dw
                total_b = total_b if total_b is None or db is None else total_b + db
        return total_w, total_b


def _population_weight(host: Host, down: Tensor) -> Tensor | None:
    """The weight by which the population reads the layer's input, (rank, d_in)."""
    return None if host.weight is None or host.weight.is_meta else down.to(host.weight.device) @ host.weight.float()


def _waves(primitives: list[Primitive], composition: str) -> list[list[str]]:
    on_weight = [primitive.name for primitive in primitives if primitive.kind == "weight"]
    others = [primitive for primitive in primitives if primitive.kind != "weight"]
    if composition == "serial":
        waves = [[primitive.name] for primitive in others]
    elif composition == "parallel":
        waves = [[primitive.name for primitive in others]]
    else:
        waves = [[primitive.name for primitive in others if primitive.stage == stage] for stage in STAGES]
    return [wave for wave in ([on_weight, *waves]) if wave]
