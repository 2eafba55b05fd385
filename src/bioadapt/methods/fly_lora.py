"""FlyLoRA: a frozen sparse projection whose few strongest units write into the output."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from bioadapt.methods.sparse_projection import fingerprint, sparse_projection
from bioadapt.primitives.base import Blend, Context, Fused, Host, LocalRule, OnWeight, Primitive, setting
from bioadapt.primitives.context import in_full
from bioadapt.registry import register_primitive

AVERAGING = 0.01  # share of the newest step in the running averages, once a hundred steps have been seen
WITNESSES = 16  # tokens of each forward on which the error of the linear surrogate is measured


class _Linear(Fused):
    """Keeps the input only if the matrix is trained, and never a copy of either in another dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, matrix)
        return x @ matrix.to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, matrix = ctx.saved_tensors
        on_x = grad @ matrix.to(grad.dtype) if ctx.needs_input_grad[0] else None
        on_matrix = grad.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return on_x, on_matrix


class _Projection(Fused):
    """Keeps the matrix alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor) -> Tensor:
        ctx.save_for_backward(matrix)
        ctx.dtype = x.dtype
        full = in_full(x)
        return full @ matrix.to(full.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        return (grad @ matrix.to(grad.dtype)).to(ctx.dtype), None


class _Chosen(Fused):
    """Keeps the indices alone, in as few bytes as they come."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.experts = y.shape[-1] // index.shape[-2]
        return _gathered(y, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _spread(grad, index, ctx.experts), None


class _Readout(Fused):
    """Keeps the chosen values and the matrix; backward spreads them over the units again."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor | None, matrix: Tensor, scale: float) -> Tensor:
        values = scale * values
        ctx.save_for_backward(values, index, matrix)
        ctx.scale = scale
        return _units(values, index, matrix) @ matrix.to(values.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        values, index, matrix = ctx.saved_tensors
        on_values, on_matrix = None, None
        if ctx.needs_input_grad[0]:
            on_units = grad @ (ctx.scale * matrix).to(grad.dtype)
            on_values = on_units if index is None else _gathered(on_units, index)
        if ctx.needs_input_grad[2]:
            on_matrix = grad.flatten(0, -2).T @ _units(values, index, matrix).flatten(0, -2)
        return on_values, None, on_matrix, None


def linear(x: Tensor, matrix: Tensor) -> Tensor:
    """x matrix^T in the dtype of x: x (..., n), matrix (r, n) of any dtype -> (..., r)."""
    return _Linear.apply(x, matrix)


def projection(x: Tensor, matrix: Tensor) -> Tensor:
    """x matrix^T in fp32 at least: x (..., n), frozen matrix (r, n) -> (..., r).

    In half precision a few of a hundred tokens would choose other units.
    """
    return _Projection.apply(x, matrix)


def chosen(y: Tensor, index: Tensor | None) -> Tensor:
    """The units that were chosen: y (..., blocks r), index (..., blocks, k) -> (..., blocks, k); None is all of y."""
    return y if index is None else _Chosen.apply(y, index)


def readout(values: Tensor, index: Tensor | None, matrix: Tensor, scale: float) -> Tensor:
    """scale sum_i matrix_i values_i over the chosen columns: matrix (d, blocks r) -> (..., d) in the dtype of values.

    A product with all columns, most of them times zero: gathering the chosen ones is slower on wide layers.
    """
    return _Readout.apply(values, index, matrix, scale)


def _spread(values: Tensor, index: Tensor, experts: int) -> Tensor:
    """Zeros with the values at their indices: (..., blocks, k) -> (..., blocks experts)."""
    return values.new_zeros(*index.shape[:-1], experts).scatter_(-1, index.long(), values).flatten(-2)


def _gathered(y: Tensor, index: Tensor) -> Tensor:
    return y.unflatten(-1, (index.shape[-2], -1)).gather(-1, index.long())


def _units(values: Tensor, index: Tensor | None, matrix: Tensor) -> Tensor:
    return values if index is None else _spread(values, index, matrix.shape[1] // index.shape[-2])


@register_primitive("fly_lora", stage="competition", kind="weight", zero_at="update", learns=True, needs_input=True)
class FlyLora(LocalRule, OnWeight):
    """A frozen sparse random projection; the k of its r units that answer most strongly write into the output.

    Biology: in the fly's mushroom body a few thousand Kenyon cells each read a random handful of olfactory inputs,
    inhibition lets only the most strongly driven few percent fire, and learning changes what these write. Intrinsic
    excitability keeps any cell from winning always.

    Equation: y = A v; S = the k largest of |y| + d; delta = (alpha / r) sum over i in S of B_i y_i, with A frozen and
    sparse (p = rho n entries N(0, 1/r^2) per row), B = 0 at birth, and after each step of the optimiser
    d_i <- d_i + rate sign(mean load - load_i), where load_i counts the real tokens that chose unit i.

    Reference: Zou et al. 2025, FlyLoRA: Boosting task decoupling and parameter efficiency via implicit rank-wise
    mixture-of-experts, NeurIPS; Dasgupta, Stevens and Navlakha 2017, A neural algorithm for a fundamental computing
    problem, Science.

    Shapes: v (B, T, n) -> (B, T, d); A is (blocks r, n), B is (d, blocks r). With several ``blocks`` (adapters of
    several tasks side by side) every token chooses k units in each.

    Deviations: the paper's equation ranks the signed y + d, its text magnitudes; the text is followed, and
    ``score="signed"`` is the equation. The gradient reaches v through the adapter, which the authors' code cuts off
    (``detach_input=True`` does as well). d moves by ``rate`` once per step of the optimiser. The authors' code moves it
    in every forward, also where checkpointing repeats one: in their recipe, 16 batches of 8 samples a step, each run
    twice, 32 times a step, so that ``rate=0.032`` lets it go as far here. ``per_forward=True`` moves it in every
    training forward, each replica its own, and refuses gradient checkpointing. With k < r the map is not linear, so
    merging B A is not exact; what an approximate merge puts in its place scales each unit by the share of its energy
    that was chosen, pi_i = E[1(i in S) y_i^2] / E[y_i^2], which for uncorrelated y_i is the linear map of least squared
    error.
    """

    any_dtype: ClassVar[bool] = True
    approximates: ClassVar[bool] = True
    combinations: ClassVar[tuple[str, ...]] = (
        "route", "dense", "average_B", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    )  # fmt: skip

    r: int = setting(32, low=1, high=4096, meaning="number of units (experts of rank one)")
    k: int = setting(8, low=1, high=4096, meaning="number of units that write at each token, at most r")
    alpha: float | None = setting(None, low=0.0, high=65536.0, derived="2 r", meaning="size of the change, times 1/r")
    rho: float | None = setting(None, low=1e-6, high=1.0, derived="k / r", meaning="share of the inputs a unit reads")
    score: str = setting("magnitude", choices=("magnitude", "signed"), meaning="what units compete by: |y| or y")
    projection: str = setting("gaussian", choices=("gaussian", "rademacher"), meaning="the entries of A")
    rate: float = setting(1e-3, low=0.0, high=1.0, meaning="step of the excitability d that balances the load")
    per_forward: bool = setting(False, meaning="whether d moves in every training forward, not once per optimiser step")
    dropout: float = setting(0.0, low=0.0, high=0.9, meaning="dropout of the layer's input, in training")
    detach_input: bool = setting(False, meaning="whether no gradient reaches the layer's input through the adapter")
    save_projection: bool = setting(False, meaning="whether A is saved, instead of being drawn again from the seed")
    blocks: int = setting(1, low=1, high=64, meaning="number of adapters side by side, each with r units of its own")

    @classmethod
    def check_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        full = super().check_settings(settings)
        if full["k"] > full["r"]:
            raise ValueError(f"k={full['k']} is more than r={full['r']}: k of the r units write, so k is at most r")
        if full["blocks"] > 1 and not full["save_projection"]:
            raise ValueError(
                f"blocks={full['blocks']} needs save_projection=True: blocks come from adapters of several seeds, "
                "so their projections cannot be drawn again from one"
            )
        return full

    def build(self, host: Host) -> None:
        units, n = self.blocks * self.r, self.d_in
        self.scale = self.zero_scale * (2.0 if self.alpha is None else self.alpha / self.r)
        entries = max(1, round((self.k / self.r if self.rho is None else self.rho) * n))
        source = host.generator(f"projection/{self.d_out}x{n}/{self.r}/{entries}/{self.projection}")
        matrix = sparse_projection((units, n), entries, 1 / self.r, self.projection, source)
        self.register_buffer("A", matrix, persistent=self.save_projection)
        self.register_buffer("fingerprint", fingerprint(matrix, values=self.save_projection))
        self.B = nn.Parameter(torch.zeros(self.d_out, units))
        self.register_buffer("d", _at_rest(units))
        averaged: dict[str, tuple[int, ...]] = {}
        if self.approximates:
            averaged = {"energy": (units,), "energy_chosen": (units,), "error": (2,)}
            for name, shape in {**averaged, "steps": ()}.items():
                self.register_buffer(name, _at_rest(*shape))
            if self.k == self.r:
                self.merge = "weight"  # type: ignore[misc]  # with all units the map is linear
        self.declare_statistics(load=(units,), **averaged)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        v = context.x_in.detach() if self.detach_input else context.x_in
        if self.dropout and self.training:
            v = dropout(v, self.dropout)
        values, index = self.compete(v, projection(v, self.A), context)
        return readout(values.to(v.dtype), index, self.B, self.scale)

    def compete(self, v: Tensor, y: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Input v (B, T, n), projection y (B, T, blocks r) in fp32 -> values (B, T, blocks, k) and their indices.

        The indices are None, and the values (B, T, r), where all units write.
        """
        index = self.winners(y.detach(), context)
        return chosen(y, index), index

    def winners(self, y: Tensor, context: Context) -> Tensor | None:
        """Local indices of the k units of each block that write, (B, T, blocks, k), observed for the local rules."""
        if self.k == self.r:
            return None
        score = (y.abs() if self.score == "magnitude" else y) + self.d
        # Indices, not a comparison with the k-th score, so that ties cannot change k.
        index = score.unflatten(-1, (self.blocks, self.r)).topk(self.k, dim=-1, sorted=False).indices
        if self.training and context.observing:
            statistics = self.statistics(y, index, context.mask)
            self.observe(context, **statistics)
            if self.per_forward and self._is_trained():
                self._refuse_repetition()
                self.balance(statistics["load"])
        if not torch.is_grad_enabled():  # then nothing keeps them
            return index
        return index.to(torch.uint8 if self.r <= 256 else torch.int16)

    # -- local rules --

    def _refuse_repetition(self) -> None:
        if torch._C._current_graph_task_id() >= 0:  # a forward within a backward
            raise RuntimeError(
                f"{self.name} with per_forward=True has moved its excitability since the forward that gradient "
                "checkpointing repeats here, which would now choose other units: use per_forward=False, or train "
                "without gradient checkpointing"
            )

    def balance(self, load: Tensor) -> None:
        """Make units that were chosen less often than the mean more excitable, and the others less.

        Loads that are alike, as those of no token, or no numbers, move nothing.
        """
        self.d.add_(self.rate * torch.sign(load.mean() - load).nan_to_num(0.0))

    def statistics(self, y: Tensor, index: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Of the real tokens: how many chose each unit, and what `weight_delta` needs to know."""
        won = _spread(y.new_ones(index.shape), index, self.r)
        if mask is not None:
            y, won = y.masked_fill(~mask[..., None], 0.0), won.masked_fill(~mask[..., None], 0.0)
        y, won = y.flatten(0, -2), won.flatten(0, -2)
        measured = {"load": won.sum(0) + 0.0 * y.sum(0)}  # no number where y is none
        if self.approximates:
            energy = y.square()
            every = max(1, math.ceil(len(y) / WITNESSES))
            measured |= {"energy": energy.sum(0), "energy_chosen": (energy * won).sum(0)}
            measured["error"] = self.lost(y[::every], won[::every])
        return measured

    def lost(self, y: Tensor, won: Tensor) -> Tensor:
        """Squared size of what the linear surrogate gets wrong, and of the change itself, summed over tokens: (2,)."""
        written = y * won
        both = torch.stack([self.share() * y - written, written]) @ self.B.detach().to(y.dtype).T
        return both.square().sum((1, 2))

    def share(self) -> Tensor:
        """pi, the share of each unit's energy that is written, (blocks r,); k / r before anything was observed."""
        seen = self.energy > 0
        return torch.where(seen, self.energy_chosen / torch.where(seen, self.energy, 1.0), self.k / self.r)

    def learn(self, fresh: Tensor) -> None:
        load = self.observed_load
        fresh = fresh * (load.sum() > 0)
        if not self.per_forward:
            self.balance(load)
        if self.approximates:
            self.steps.add_(fresh)
            newest = fresh * (1 / self.steps.clamp(min=1)).clamp(min=AVERAGING)
            for name in ("energy", "energy_chosen", "error"):
                average = getattr(self, name)
                average.add_(newest * (getattr(self, f"observed_{name}") - average))

    # -- several tasks --

    @classmethod
    def combine(
        cls, parts: Sequence[Primitive], weights: Sequence[float], way: str, blend: Blend
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Adapters of several tasks as one.

        ``route`` sets them side by side, each block with winners of its own: exactly the weighted sum of the adapters.
        ``dense`` does so with all units of every block, which is the sum of the products B A and merges. The others
        blend the tensors B value by value and need one A in all parts; ``average_B`` is their weighted sum.

        Raises:
            ValueError: parts of different settings, or of different A where B is blended.
        """
        first = parts[0]
        settings = first.settings()
        for part in parts[1:]:
            for name in settings.keys() - {"alpha", "rho", "rate", "blocks", "save_projection", "zero_scale"}:
                if getattr(part, name) != settings[name]:
                    raise ValueError(f"{name}={settings[name]!r} in one adapter and {getattr(part, name)!r} in another")
        sized = [weight * part.scale / first.scale for weight, part in zip(weights, parts, strict=True)]
        if way in ("route", "dense"):
            settings |= {"blocks": sum(part.blocks for part in parts), "save_projection": True}
            settings |= {"k": first.r} if way == "dense" else {}
            state = cls.side_by_side(parts)
            state["B"] = torch.cat([size * part.B.detach() for size, part in zip(sized, parts, strict=True)], dim=1)
            state["fingerprint"] = fingerprint(state["A"]).to(state["B"].device)
        else:
            if any(not torch.allclose(part.A, first.A.to(part.A.device), atol=1e-5) for part in parts):
                raise ValueError(
                    f"{way!r} blends columns of B, which only means something where A is the same: these adapters have "
                    "projections of different seeds. 'route' and 'dense' need no common A"
                )
            state = cls.blended(parts, blend)
        if first.approximates:
            state["error"] = torch.zeros_like(first.error)  # it was measured on the parts
        return settings, state

    @classmethod
    def side_by_side(cls, parts: Sequence[Primitive]) -> dict[str, Tensor]:
        """All tensors but B and the fingerprint, block by block."""
        names = ("A", "d", *(("energy", "energy_chosen") if cls.approximates else ()))
        state = {name: torch.cat([getattr(part, name).detach() for part in parts]) for name in names}
        return state | ({"steps": parts[0].steps} if cls.approximates else {})

    @classmethod
    def blended(cls, parts: Sequence[Primitive], blend: Blend) -> dict[str, Tensor]:
        """One block: B value by value, the router as the mean of the routers."""
        state = dict(parts[0].state_dict())
        names = ("d", *(("energy", "energy_chosen") if cls.approximates else ()))
        state |= {name: torch.stack([getattr(part, name) for part in parts]).mean(0) for name in names}
        return state | {"B": blend([part.B.detach() for part in parts])}

    # -- merging and loading --

    def weight_delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        share = 1.0 if self.k == self.r else self.share()
        return (self.scale * self.B.detach() * share) @ self.A, None

    def surrogate_error(self) -> float:
        missed, change = self.error.tolist()
        return math.sqrt(missed / change) if change > 0 else math.nan

    def check_loaded(self, tensors: Mapping[str, Tensor]) -> None:
        if "fingerprint" not in tensors:
            return
        given = tensors["fingerprint"]
        if "A" in tensors:
            other, accepted = "the A beside it", [fingerprint(tensors["A"])]
        else:  # values counted in earlier files that leave A to the seed, too
            other, accepted = "this layer's A", [fingerprint(self.A, values=values) for values in (False, True)]
        if all(given.tolist() != own.tolist() for own in accepted):
            raise ValueError(
                f"the checkpoint was trained with the projection A of fingerprint {_short(given)}, {other} has "
                f"{_short(accepted[0])}: seed, layer, r, rho and projection must be those of training, unless "
                "save_projection=True kept A itself. An early version's file has to be loaded on the kind of processor "
                "that wrote it, too, since its fingerprint covers the last bits of A"
            )


def _at_rest(*shape: int) -> Tensor:
    return torch.zeros(shape, device="cpu", dtype=torch.float32)


def _short(given: Tensor) -> str:
    return bytes(int(byte) for byte in given.tolist()).hex()[:12]
