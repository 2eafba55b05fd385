"""Primitives that act on the layer's weight, and what only they can be asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from .primitive import Primitive

Blend = Callable[[Sequence[Tensor]], Tensor]


class OnWeight(Primitive):
    """Base class of the primitives of kind ``weight``."""

    per_channel: ClassVar[bool] = False  # it scales channels, so that the layer may be of any form
    approximates: ClassVar[bool] = False  # where it does not merge, `weight_delta` is the nearest linear map
    combinations: ClassVar[tuple[str, ...]] = ()  # in which ways several, trained for a task each, make one
    joins_product_from: ClassVar[float] = math.inf  # so many tokens make its `product_with` worth asking for

    def weight_delta(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """For ``merge="weight"``: the change (before the gate) of weight (d_out, d_in) and of bias, if any."""
        raise NotImplementedError(f"{type(self).__name__} declares merge='weight' but defines no weight_delta")

    def product_with(self, v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The layer's output with the change in it, or None where to add it is cheaper.

        For a finite ``joins_product_from``.
        ``v`` (..., d_in), ``weight`` (d_out, d_in) and ``bias`` (d_out,) are of one dtype; the last two are frozen.
        """
        raise NotImplementedError(f"{type(self).__name__} joins the layer's product but defines no product_with")

    @property
    def scales_input(self) -> bool:
        """Whether the layer is to read its input times `input_scale`.

        ``x`` is then what the layer makes of that; ``context.x_in`` stays the input as it came.
        """
        return False

    def input_scale(self) -> Tensor:
        """For ``scales_input``: the factor of each channel of the layer's input, (d_in,)."""
        raise NotImplementedError(f"{type(self).__name__} scales the input but defines no input_scale")

    def connect(self, path: str, siblings: Mapping[str, OnWeight], model_config: Mapping[str, Any]) -> None:
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
        cls, parts: Sequence[OnWeight], weights: Sequence[float], way: str, blend: Blend
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

    def merged_change(
        self, weight: Tensor, bias: Tensor | None, y: tuple[Tensor, Tensor | None], approximate: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if self.merge != "weight" and not (approximate and self.approximates):
            return super().merged_change(weight, bias, y, approximate)
        gate = weight.new_ones(1) if self.zero_at == "update" else self.scaled_gate().detach().to(weight.dtype)
        dw, db = self.weight_delta(weight, bias)
        return gate[:, None] * dw, None if db is None else gate * db
