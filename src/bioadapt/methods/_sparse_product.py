"""The product with a matrix that holds k numbers in every row, by whichever way is fastest for such a k."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from bioadapt.primitives.base import Fused

BYTES = 2**22  # of any one transient: tokens and rows are taken in pieces of about that size
MANY_TOKENS = 64  # from about here on a matrix is worth making for them
AT_ONCE = 2**15  # numbers that the synapses of all tokens read; up to about here reading them in one go is fastest
SCRATCH_SHARE, SCRATCH_ROWS = 8, 64  # a scratch holds one in so many of the matrix's rows, but some in any case


def pieces(count: int, bytes_each: int, at_most: int | None = None) -> list[slice]:
    """A count of things in stretches of about `BYTES`."""
    size = max(1, min(BYTES // bytes_each, at_most or count))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _pieces(v: Tensor, bytes_each: int) -> list[slice]:
    """Of the tokens of v (N, n): all at once in a graph, which is to serve any number of them and knows no memory."""
    return [slice(None)] if torch.compiler.is_compiling() else pieces(len(v), bytes_each)


# -- four ways to multiply by the matrix A (m, n) that holds ``values`` at ``index``, both (m, k) --
#
# v (N, n), z and grad (N, m) may be in half precision; sums are taken in the dtype of ``values``.


Order = tuple[Tensor, Tensor]  # what `by_column` gives


class Gradients(NamedTuple):
    """What the way back starts from, and where it writes: each of the last two may be None.

    Attributes:
        v, grad, synapses, values: see above; the synapses are the index.
        on_v: becomes grad A.
        on_values: to the number at (i, j) the sum over tokens of grad_i v[synapses_ij] is added.
        order: of the synapses, None if nobody has it.
    """

    v: Tensor
    grad: Tensor
    synapses: Tensor
    values: Tensor
    on_v: Tensor | None
    on_values: Tensor | None
    order: Order | None


class Path(NamedTuple):
    """One way of computing."""

    product: Callable[[Tensor, Tensor, Tensor, Tensor], None]  # (v, index, values, z): z = v A^T
    back: Callable[[Gradients], None]


def _apart(
    back: Callable[[Tensor, Tensor, Tensor, Tensor], None], correlate: Callable[[Tensor, Tensor, Tensor, Tensor], None]
) -> Callable[[Gradients], None]:
    """Both gradients, one after the other."""

    def both(wanted: Gradients) -> None:
        if wanted.on_v is not None:
            back(wanted.grad, wanted.synapses, wanted.values, wanted.on_v)
        if wanted.on_values is not None:
            correlate(wanted.v, wanted.synapses, wanted.grad, wanted.on_values)

    return both


def _gather(v: Tensor, index: Tensor, values: Tensor, z: Tensor) -> None:
    for part in _pieces(v, 4 * len(index)):
        total = values.new_zeros(z[part].shape)
        for chosen, value in zip(index.T, values.T, strict=True):
            total.addcmul_(v[part].index_select(1, chosen).to(values.dtype), value)
        z[part] = total


def _gather_back(grad: Tensor, index: Tensor, values: Tensor, on_v: Tensor) -> None:
    for part in _pieces(grad, 4 * max(len(index), on_v.shape[1])):
        g = grad[part].to(values.dtype).T.contiguous()
        total = g.new_zeros(on_v.shape[1], g.shape[1])  # rows are added to many times faster than columns
        for chosen, value in zip(index.T, values.T, strict=True):
            total.index_add_(0, chosen, g * value[:, None])
        on_v[part] = total.T


def _gather_correlate(v: Tensor, index: Tensor, grad: Tensor, total: Tensor) -> None:
    for part in _pieces(v, 4 * len(index)):
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
    for part in _pieces(v, 4 * max(len(index), v.shape[1])):
        z[part] = _bag_sums(index.reshape(-1), _channels(v[part], values), starts, values.reshape(-1))


def _bags_back(wanted: Gradients) -> None:
    v, grad, index, values, on_v, on_values, order = wanted
    rows, k = index.shape
    if on_v is not None:
        places, by_column_starts = by_column(index, on_v.shape[1]) if order is None else order
        neurons, weights = places // k, values.reshape(-1)[places]
    if on_values is not None:
        starts = torch.arange(0, rows * k, k, dtype=index.dtype)
        bag_of = torch.arange(rows, dtype=index.dtype).repeat_interleave(k)
    for part in _pieces(v, 4 * max(rows, v.shape[1])):
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
    for part in _pieces(v, 4 * max(matrix.shape)):
        z[part] = (matrix @ v[part].to(values.dtype).T.contiguous()).T


def _csr_back(grad: Tensor, index: Tensor, values: Tensor, on_v: Tensor) -> None:
    matrix = _csr(index, values, on_v.shape[1]).transpose(0, 1)
    for part in _pieces(grad, 4 * max(matrix.shape)):
        on_v[part] = (matrix @ grad[part].to(values.dtype).T.contiguous()).T


def _csr_correlate(v: Tensor, index: Tensor, grad: Tensor, total: Tensor) -> None:
    found = _csr(index, total, v.shape[1])
    for part in _pieces(v, 4 * max(found.shape)):
        g = grad[part].to(total.dtype).T.contiguous()
        found = torch.sparse.sampled_addmm(found, g, v[part].to(total.dtype))
    total.copy_(found.values().view_as(total))


def _scratches(index: Tensor, columns: int, like: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A stretch of rows after the other: where they are, their index, and zeros for them in memory used again."""
    most = max(-(-len(index) // SCRATCH_SHARE), SCRATCH_ROWS)
    stretches = pieces(len(index), like.element_size() * columns, most)
    scratch = like.new_empty(stretches[0].stop, columns)
    for rows in stretches:
        chosen = index[rows].long()
        yield rows, chosen, scratch[: len(chosen)].zero_()


def _scratch(v: Tensor, index: Tensor, values: Tensor, z: Tensor) -> None:
    for part in _pieces(v, 4 * v.shape[1]):
        wide = v[part].to(values.dtype)
        for rows, chosen, zeros in _scratches(index, v.shape[1], values):
            z[part, rows] = wide @ zeros.scatter_(1, chosen, values[rows]).T


def _scratch_back(grad: Tensor, index: Tensor, values: Tensor, on_v: Tensor) -> None:
    for part in _pieces(grad, 4 * on_v.shape[1]):
        total = values.new_zeros(on_v[part].shape)
        for rows, chosen, zeros in _scratches(index, on_v.shape[1], values):
            total.addmm_(grad[part, rows].to(values.dtype), zeros.scatter_(1, chosen, values[rows]))
        on_v[part] = total


def _scratch_correlate(v: Tensor, index: Tensor, grad: Tensor, total: Tensor) -> None:
    for part in _pieces(v, 4 * v.shape[1]):
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


def _are_few(v: Tensor, index: Tensor) -> bool:
    """Whether nothing is recorded and the tokens v (..., n) are so few, as in decoding, that `_at_once` is fastest.

    Measured on a 2-core CPU with 256 to 4096 features and k from 1 to 64: for one token it takes less than half the
    time of the path that `fastest` gives. A graph is not asked, since it is to serve any number of tokens.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    tokens, synapses = v.numel() // v.shape[-1], index.numel()
    return tokens * synapses <= AT_ONCE or (tokens == 1 and 4 * synapses <= BYTES)


def _at_once(v: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """The product of a few tokens, by reading for all synapses in one go: (..., n) -> (..., m)."""
    read = v.index_select(-1, index.reshape(-1)).view(*v.shape[:-1], *index.shape)
    return read.to(_wide(v, values)).mul_(values).sum(-1)


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
        PATHS[ctx.path].back(Gradients(_rows(v), _rows(grad), index, values.to(wide), rows, on_values, order))
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
    dtype = dtype or v.dtype
    if path is None and _are_few(v, index):
        return _at_once(v, index, values).to(dtype)
    path = path or fastest(v.shape[-1], index.shape[1], v.device)
    return _SparseProduct.apply(v, index, values, dtype, path, order if path == "bags" else None)


class _ChangedProduct(Fused):
    """Keeps the input, the indices and the values; the matrix with the change in it is made again for backward."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, values: Tensor, path: str
    ) -> Tensor:
        ctx.save_for_backward(v, weight, index, values)
        ctx.path = path
        return linear(v, weight.scatter_add(1, index.long(), values), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, weight, index, values = ctx.saved_tensors
        on_v, on_values = None, None
        if ctx.needs_input_grad[0]:
            on_v = grad @ weight.scatter_add(1, index.long(), values)
        if ctx.needs_input_grad[4]:
            on_values = torch.zeros_like(values)
            PATHS[ctx.path].back(Gradients(_rows(v), _rows(grad), index, values, None, on_values, None))
        return on_v, None, None, None, on_values, None


def changed_product(v: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, values: Tensor) -> Tensor | None:
    """v (W + A)^T + b, where A holds ``values`` at ``index``, or None where v A^T by itself is cheaper.

    The matrix W + A is a transient as small as any other, and pays only where `MANY_TOKENS` share it.

    Args:
        v: (..., n), of the dtype of all others.
        weight: W (m, n), which gets no gradient.
        bias: b (m,), which gets none either.
        index: (m, k) int32, no column twice in a row.
        values: (m, k).
    """
    if weight.numel() * weight.element_size() > BYTES:
        return None
    return _ChangedProduct.apply(v, weight, bias, index, values, fastest(v.shape[-1], index.shape[1], v.device))
