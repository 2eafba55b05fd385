"""NeuroAda: every neuron adapts its few strongest synapses.

One file because choosing synapses, multiplying by them and combining adapters all rely on the order of one index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bioadapt.primitives.base import Blend, Context, Host, OnWeight, Primitive, setting
from bioadapt.primitives.frames import base_weight, check_indices
from bioadapt.registry import register_primitive

from ._sparse_product import MANY_TOKENS, Order, by_column, changed_product, pieces, sparse_product


def strongest(score: Tensor, k: int) -> Tensor:
    """Columns of the k largest entries of each row, best first, ties to the lower column: (m, n) -> (m, k) int32.

    A search for k' < k finds a prefix of the search for k. What is not a number is never chosen before a number.
    """
    if score.is_meta:
        return score.new_empty(len(score), k, dtype=torch.int32)
    return torch.cat(
        [
            _strongest(score[rows].nan_to_num(-torch.inf, torch.inf, -torch.inf), k)
            for rows in pieces(len(score), 8 * score.shape[1])
        ]
    )


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
    joins_product_from = MANY_TOKENS
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
        z = sparse_product(context.x_in, self.index, self._changes(), x.dtype, order=self._order)
        if self.rows is None:
            return z
        return z.new_zeros(*z.shape[:-1], self.d_out).index_copy(-1, self.rows.long(), z)

    def product_with(self, v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        if self.rows is not None or self.values.dtype != weight.dtype:
            return None
        return changed_product(v, weight, bias, self.index, self._changes())

    def _changes(self) -> Tensor:
        """theta, (rows, k)."""
        if self._unsure and self.training and self.path is not None:
            self._check_chosen()
        return self.values if self.zero_scale == 1 else self.zero_scale * self.values

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
