"""NeuroAda: every neuron adapts its few strongest synapses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from bioadapt.primitives.base import Blend, Context, Fused, Host, OnWeight, Primitive, setting
from bioadapt.primitives.frames import base_weight, check_indices
from bioadapt.registry import register_primitive

BYTES = 2**22  # of any one transient: tokens and rows are taken in pieces of about that size
SCRATCH_SHARE, SCRATCH_ROWS = 8, 64  # a scratch holds one in so many of the matrix's rows, but some in any case


def _pieces(count: int, bytes_each: int, at_most: int | None = None) -> list[slice]:
    size = max(1, min(BYTES // bytes_each, at_most or count))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


# -- four ways to multiply by the matrix A (m, n) that holds ``values`` at ``index``, both (m, k) --
#
# v (N, n), z and grad (N, m) may be in half precision; sums are taken in the dtype of ``values``.


Order = tuple[Tensor, Tensor]  # what `by_column` gives


@dataclass(frozen=True)
class Path:
    """One way of computing.

    Attributes:
        product: ``(v, index, values, z)``: z = v A^T.
        back: ``(v, grad, index, values, on_v, on_values, order)``: on_v = grad A, and on_values_ij += the sum over
            tokens of grad_i v[index_ij]; each of the two may be None. ``order`` may be None.
    """

    product: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    back: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Order | None], None]


def _apart(
    back: Callable[[Tensor, Tensor, Tensor, Tensor], None], correlate: Callable[[Tensor, Tensor, Tensor, Tensor], None]
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Order | None], None]:
    """Both gradients, one after the other."""

    def both(
        v: Tensor,
        grad: Tensor,
        index: Tensor,
        values: Tensor,
        on_v: Tensor | None,
        on_values: Tensor | None,
        order: Order | None,
    ) -> None:
        if on_v is not None:
            back(grad, index, values, on_v)
        if on_values is not None:
            correlate(v, index, grad, on_values)

    return both


def _gather(v: Tensor, index: Tensor, values: Tensor, z: Tensor) -> None:
    for part in _pieces(len(v), 4 * len(index)):
        total = values.new_zeros(z[part].shape)
        for chosen, value in zip(index.T, values.T, strict=True):
            total.addcmul_(v[part].index_select(1, chosen).to(values.dtype), value)
        z[part] = total


def _gather_back(grad: Tensor, index: Tensor, values: Tensor, on_v: Tensor) -> None:
    for part in _pieces(len(grad), 4 * max(len(index), on_v.shape[1])):
        g = grad[part].to(values.dtype).T.contiguous()
        total = g.new_zeros(on_v.shape[1], g.shape[1])  # rows are added to many times faster than columns
        for chosen, value in zip(index.T, values.T, strict=True):
            total.index_add_(0, chosen, g * value[:, None])
        on_v[part] = total.T


def _gather_correlate(v: Tensor, index: Tensor, grad: Tensor, total: Tensor) -> None:
    for part in _pieces(len(v), 4 * len(index)):
        g = grad[part].to(total.dtype)
        for j, chosen in enumerate(index.T):
            total[:, j] += (v[part].index_select(1, chosen) * g).sum(0)


def by_column(index: Tensor, columns: int) -> Order:
    """The synapses sorted by the column that they read: their places in ``index`` read row by row (m k,), and where
    each column's begin (columns,), int32."""
    sorted_columns, order = index.reshape(-1).sort(stable=True)
    starts = torch.searchsorted(sorted_columns, torch.arange(columns, dtype=index.dtype, device=index.device))
    return order.int(), starts.int()


def _bags(v: Tensor, index: Tensor, values: Tensor, z: Tensor) -> None:
    """Each neuron's synapses are a bag of words, each of these a channel of all tokens."""
    starts = torch.arange(0, index.numel(), index.shape[1], dtype=index.dtype)
    for part in _pieces(len(v), 4 * max(len(index), v.shape[1])):
        z[part] = _bag_sums(index.reshape(-1), _channels(v[part], values), starts, values.reshape(-1))


def _bags_back(
    v: Tensor,
    grad: Tensor,
    index: Tensor,
    values: Tensor,
    on_v: Tensor | None,
    on_values: Tensor | None,
    order: Order | None,
) -> None:
    rows, k = index.shape
    if on_v is not None:
        places, by_column_starts = by_column(index, on_v.shape[1]) if order is None else order
        neurons, weights = places // k, values.reshape(-1)[places]
    if on_values is not None:
        starts = torch.arange(0, rows * k, k, dtype=index.dtype)
        bag_of = torch.arange(rows, dtype=index.dtype).repeat_interleave(k)
    for part in _pieces(len(v), 4 * max(rows, v.shape[1])):
        g = _channels(grad[part], values)
        if on_v is not None:
            on_v[part] = _bag_sums(neurons, g, by_column_starts, weights)
        if on_values is not None:
            # What autograd calls for the weights of sums (mode 0): the dot product of each word and its bag's gradient.
            on_values += torch.ops.aten._embedding_bag_per_sample_weights_backward(
                g, _channels(v[part], values), index.reshape(-1), starts, bag_of, 0
            ).view(rows, k)


def _bag_sums(words: Tensor, channels: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """(tokens, bags) of channels (words, tokens)."""
    return embedding_bag(words, channels, starts, mode="sum", per_sample_weights=weights).T


def _channels(v: Tensor, like: Tensor) -> Tensor:
    """(tokens, channels) -> (channels, tokens)."""
    return v.T.to(like.dtype).contiguous()


def _csr(index: Tensor, values: Tensor, columns: int) -> Tensor:
    """A with rows of constant length; copies neither index nor values."""
    rows, k = index.shape
    ends = torch.arange(0, rows * k + 1, k, dtype=index.dtype, device=index.device)
    size = (rows, columns)
    return torch.sparse_csr_tensor(ends, index.reshape(-1), values.reshape(-1), size, check_invariants=False)


with warnings.catch_warnings():  # torch says once in a process that these tensors are new
    warnings.simplefilter("ignore", UserWarning)
    _csr(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1), 1)


def _csr_product(v: Tensor, index: Tensor, values: Tensor, z: Tensor) -> None:
    matrix = _csr(index, values, v.shape[1])
    for part in _pieces(len(v), 4 * max(matrix.shape)):
        z[part] = (matrix @ v[part].to(values.dtype).T.contiguous()).T


def _csr_back(grad: Tensor, index: Tensor, values: Tensor, on_v: Tensor) -> None:
    matrix = _csr(index, values, on_v.shape[1]).transpose(0, 1)
    for part in _pieces(len(grad), 4 * max(matrix.shape)):
        on_v[part] = (matrix @ grad[part].to(values.dtype).T.contiguous()).T


def _csr_correlate(v: Tensor, index: Tensor, grad: Tensor, total: Tensor) -> None:
    found = _csr(index, total, v.shape[1])
    for part in _pieces(len(v), 4 * max(found.shape)):
        g = grad[part].to(total.dtype).T.contiguous()
        found = torch.sparse.sampled_addmm(found, g, v[part].to(total.dtype))
    total.copy_(found.values().view_as(total))


def _scratches(index: Tensor, columns: int, like: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A stretch of rows after the other: where they are, their index, and zeros for them in memory used again."""
    most = max(-(-len(index) // SCRATCH_SHARE), SCRATCH_ROWS)
    pieces = _pieces(len(index), like.element_size() * columns, most)
    scratch = like.new_empty(pieces[0].stop, columns)
    for rows in pieces:
        chosen = index[rows].long()
        yield rows, chosen, scratch[: len(chosen)].zero_()


def _scratch(v: Tensor, index: Tensor, values: Tensor, z: Tensor) -> None:
    for part in _pieces(len(v), 4 * v.shape[1]):
        wide = v[part].to(values.dtype)
        for rows, chosen, zeros in _scratches(index, v.shape[1], values):
            z[part, rows] = wide @ zeros.scatter_(1, chosen, values[rows]).T


def _scratch_back(grad: Tensor, index: Tensor, values: Tensor, on_v: Tensor) -> None:
    for part in _pieces(len(grad), 4 * on_v.shape[1]):
        total = values.new_zeros(on_v[part].shape)
        for rows, chosen, zeros in _scratches(index, on_v.shape[1], values):
            total.addmm_(grad[part, rows].to(values.dtype), zeros.scatter_(1, chosen, values[rows]))
        on_v[part] = total


def _scratch_correlate(v: Tensor, index: Tensor, grad: Tensor, total: Tensor) -> None:
    for part in _pieces(len(v), 4 * v.shape[1]):
        wide = v[part].to(total.dtype)
        for rows, chosen, zeros in _scratches(index, v.shape[1], total):
            total[rows] += zeros.addmm_(grad[part, rows].to(total.dtype).T, wide).gather(1, chosen)


PATHS = {
    "gather": Path(_gather, _apart(_gather_back, _gather_correlate)),
    "bags": Path(_bags, _bags_back),
    "csr": Path(_csr_product, _apart(_csr_back, _csr_correlate)),
    "scratch": Path(_scratch, _apart(_scratch_back, _scratch_correlate)),
}


def fastest(columns: int, k: int, device: torch.device) -> str:
    """The path for k synapses of ``columns``.

    Measured on a 2-core CPU with 1 to 4096 tokens and 384 to 4096 features, where the number of tokens and of rows
    moved the borders by less than a factor of two: the loop is overtaken by bags at k = 2 and by the sparse matrix at
    k = 3, both of these by the scratch at k = columns / 8 and columns / 16, and the loop at k = columns / 128.
    """
    if torch.compiler.is_compiling():  # which traces neither sparse tensors nor bags
        return "gather" if 128 * k <= columns else "scratch"
    if device.type == "cpu":
        return "gather" if k == 1 else "bags" if 8 * k <= columns else "scratch"
    if device.type == "cuda":
        return "gather" if k <= 2 else "csr" if 16 * k <= columns else "scratch"
    return "gather" if 128 * k <= columns else "scratch"


class _SparseProduct(Fused):
    """Keeps the input as it came, the indices and the values."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        index: Tensor,
        values: Tensor,
        dtype: torch.dtype,
        path: str,
        order: Callable[[], Order] | None,
    ) -> Tensor:
        ctx.save_for_backward(v, index, values)
        ctx.path, ctx.order = path, order
        z = v.new_empty(*v.shape[:-1], len(index), dtype=dtype)
        PATHS[path].product(_rows(v), index, values.to(_wide(v, values)), _rows(z))
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, index, values = ctx.saved_tensors
        wide = _wide(v, values)
        on_v, on_values, order = None, None, None
        if ctx.needs_input_grad[0]:
            on_v = torch.empty_like(v, memory_format=torch.contiguous_format)
            order = ctx.order and ctx.order()
        if ctx.needs_input_grad[2]:
            on_values = values.new_zeros(values.shape, dtype=wide)
        rows = None if on_v is None else _rows(on_v)
        PATHS[ctx.path].back(_rows(v), _rows(grad), index, values.to(wide), rows, on_values, order)
        return on_v, None, None if on_values is None else on_values.to(values.dtype), None, None, None


def _rows(tensor: Tensor) -> Tensor:
    """(..., features) -> (N, features)."""
    return tensor.reshape(tensor.numel() // tensor.shape[-1], tensor.shape[-1])


def _wide(v: Tensor, values: Tensor) -> torch.dtype:
    """What sums are taken in."""
    return torch.promote_types(torch.promote_types(v.dtype, values.dtype), torch.float32)


def sparse_product(
    v: Tensor,
    index: Tensor,
    values: Tensor,
    dtype: torch.dtype | None = None,
    path: str | None = None,
    order: Callable[[], Order] | None = None,
) -> Tensor:
    """z_i = sum_j values_ij v[index_ij].

    Args:
        v: (..., n), the only thing of its size that is kept for backward.
        index: (m, k) int32, no column twice in a row.
        values: (m, k).
        dtype: of the result; that of v if None. Sums are taken in fp32 at least.
        path: a key of `PATHS`; the fastest if None.
        order: gives `by_column` of the index, for backward, where somebody has it; it is made anew if None.

    Returns:
        (..., m).
    """
    path = path or fastest(v.shape[-1], index.shape[1], v.device)
    return _SparseProduct.apply(v, index, values, dtype or v.dtype, path, order if path == "bags" else None)


def strongest(score: Tensor, k: int) -> Tensor:
    """Columns of the k largest entries of each row, best first, ties to the lower column: (m, n) -> (m, k) int32.

    A search for k' < k finds a prefix of the search for k. What is not a number is never chosen before a number.
    """
    if score.is_meta:
        return score.new_empty(len(score), k, dtype=torch.int32)
    pieces = _pieces(len(score), 8 * score.shape[1])
    return torch.cat([_strongest(score[rows].nan_to_num(-torch.inf, torch.inf, -torch.inf), k) for rows in pieces])


def _strongest(score: Tensor, k: int) -> Tensor:
    last = score.topk(k, dim=1).values[:, -1:]
    above, tied = score > last, score == last
    chosen = above | tied & (tied.cumsum(1) <= k - above.sum(1, keepdim=True))
    columns = chosen.nonzero()[:, 1].view(len(score), k)  # in order of columns, which a stable sort keeps among equals
    order = score.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order).int()


def _union(indices: Sequence[Tensor], columns: int) -> tuple[Tensor, Tensor]:
    """All columns that stand in a row of any index (m, k_t), and which of them do: (m, k) int32 and bool.

    Rows of fewer columns than the longest are filled up with the lowest that they do not have.
    """
    together = torch.cat(list(indices), 1).long()
    rows, most = together.shape
    filling = torch.arange(min(most, columns), device=together.device).expand(rows, -1)
    candidates = torch.cat([together, filling], 1)
    ordered, order = candidates.sort(dim=1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.zeros_like(first).scatter_(1, order, first)  # whether a candidate is the first of its column
    taken = first.clone()
    taken[:, most:] = False
    width = int(taken.sum(1).max())
    # What is taken first, then what may fill up, then repetitions; each in the order in which they came.
    rank = torch.where(taken, 0, torch.where(first, 1, 2))
    chosen = rank.sort(dim=1, stable=True).indices[:, :width]
    return candidates.gather(1, chosen).int(), taken.gather(1, chosen)


def _looked_up(wanted: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """The value at each wanted column, 0 where the index does not have it: (m, k) of values (m, k_t) at index."""
    found = torch.zeros(wanted.shape, dtype=values.dtype, device=values.device)
    for column, value in zip(index.T, values.T, strict=True):
        found += (wanted == column[:, None]) * value[:, None]
    return found


@register_primitive("neuro_ada", stage="dendritic", kind="weight", zero_at="update", merge="weight", needs_input=True)
class NeuroAda(OnWeight):
    """Every output neuron may change its k strongest input synapses, and no others.

    Biology: plasticity is not spread evenly over a neuron's thousands of synapses; the few large ones carry most of the
    drive, and every neuron keeps some that can change.

    Equation: delta_i = sum over j in S_i of theta_ij v_j, with S_i the k columns of largest |W_ij| and theta = 0 at
    birth.

    Reference: Zhang et al. 2025, NeuroAda: Activating each neuron's potential for parameter-efficient fine-tuning,
    EMNLP.

    Shapes: v (B, T, n) -> (B, T, d); the indices and values are (d, k), or (rows, k) where only some rows adapt.

    The values are fp32 on a half-precision layer too, where the authors' are in half precision, in which most small
    changes of the largest weights are lost. Neither a copy nor a gradient of the weight is ever made. Indices are int32
    though 16 bits would do for most layers: torch has next to no operations on unsigned 16-bit numbers.
    """

    any_dtype = True
    combinations = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")

    k: int = setting(8, low=1, high=4096, meaning="number of synapses per neuron, at most all of them")
    selection: str = setting(
        "magnitude",
        choices=("magnitude", "gradient", "random", "reverse"),
        meaning="which synapses: largest weight, largest gradient (see select_synapses), any, smallest weight",
    )
    row_fraction: float = setting(1.0, low=1e-6, high=1.0, meaning="share of the neurons that adapt, at least one")

    def build(self, host: Host) -> None:
        self.k = min(self.k, self.d_in)
        adapting = self.d_out
        self.register_buffer("rows", None)
        if self.row_fraction < 1:
            adapting = max(1, round(self.row_fraction * self.d_out))
            self.rows = host.normal("rows", self.d_out).argsort()[:adapting].sort().values.int()
        if self.selection == "gradient":
            index = torch.arange(self.k, dtype=torch.int32).repeat(adapting, 1)
            self.register_buffer("chosen", torch.zeros((), dtype=torch.bool))
        else:
            index = strongest(self._adapting(self._score(host)), self.k)
        self.register_buffer("index", index if index.is_meta else index.cpu())
        self.values = nn.Parameter(torch.zeros(adapting, self.k, dtype=torch.float32))
        self.path: str | None = None  # of the layer, where it is part of a model
        self._unsure = self.selection == "gradient"  # whether a choice has been made
        self._sorted: tuple[Tensor, int, Order] | None = None  # the index, its version, and what `by_column` made of it

    def _score(self, host: Host) -> Tensor:
        """How eligible each synapse is, (d_out, d_in)."""
        if self.selection == "random":
            return host.normal("eligibility", self.d_out, self.d_in)
        magnitude = base_weight(host, self.d_out, self.d_in).abs()
        return magnitude if self.selection == "magnitude" else -magnitude

    def _adapting(self, matrix: Tensor) -> Tensor:
        """The adapting rows of a matrix."""
        return matrix if self.rows is None else matrix[self.rows.to(matrix.device)]

    def connect(self, path: str, siblings: Mapping[str, Primitive], model_config: Mapping[str, Any]) -> None:
        self.path = path

    def choose(self, score: Tensor) -> None:
        """Let the synapses of the highest score (d_out, d_in) adapt; for ``selection="gradient"``."""
        self.index.copy_(strongest(self._adapting(score), self.k))
        self.chosen.fill_(True)

    def _check_chosen(self) -> None:
        if not self.chosen:
            raise RuntimeError(
                f"neuro_ada at {self.path} has selection='gradient', and no synapses have been chosen yet: call "
                "select_synapses(model, batches) before training"
            )
        self._unsure = False  # the buffer is asked once: on an accelerator that waits for all that is under way

    def _order(self) -> Order:
        """`by_column` of the index, made once for every state of it."""
        if self._sorted is None or self._sorted[0] is not self.index or self._sorted[1] != self.index._version:
            self._sorted = self.index, self.index._version, by_column(self.index, self.d_in)
        return self._sorted[2]

    def check_loaded(self, tensors: Mapping[str, Tensor]) -> None:
        check_indices(tensors, index=self.d_in, rows=self.d_out)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        if self._unsure and self.training and self.path is not None:
            self._check_chosen()
        values = self.values if self.zero_scale == 1 else self.zero_scale * self.values
        z = sparse_product(context.x_in, self.index, values, x.dtype, order=self._order)
        if self.rows is None:
            return z
        return z.new_zeros(*z.shape[:-1], self.d_out).index_copy(-1, self.rows.long(), z)

    @classmethod
    def combine(
        cls, parts: Sequence[Primitive], weights: Sequence[float], way: str, blend: Blend
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Adapters of several tasks as one, on the union of their synapses; ``linear`` is exactly their weighted sum.

        Raises:
            ValueError: different neurons adapt.
        """
        first = parts[0]
        for part in parts[1:]:
            same = (part.rows is None) == (first.rows is None) and (first.rows is None or part.rows.equal(first.rows))
            if part.index.shape[0] != first.index.shape[0] or not same:
                raise ValueError("different rows adapt in them, so there is no table of values for all")
        index, fresh = _union([part.index for part in parts], first.d_in)
        # Synapses that none of the adapters has are neither pruned nor counted in the vote over signs.
        given = [
            _looked_up(index, part.index, part.zero_scale / first.zero_scale * part.values.detach())[fresh]
            for part in parts
        ]
        values = first.values.new_zeros(index.shape, dtype=given[0].dtype)
        values[fresh] = blend(given)
        state = {**first.state_dict(), "index": index, "values": values}
        return first.settings() | {"k": index.shape[1]}, state

    def weight_delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        values = self.zero_scale * self.values.detach().to(weight.dtype)
        change = torch.zeros_like(weight)
        if self.rows is None:
            return change.scatter_(1, self.index.long(), values), None
        return change.index_put_((self.rows.long()[:, None], self.index.long()), values), None
