"""What a mechanism has to beat: primitives with its sites, its zero and its scale, but without any biology.

The placebo of `bioadapt.evaluation` is a module of any size, put by hooks where one given adapter sits. These are
primitives instead, because the screen gives every mechanism, and so every placebo, its own default sites, its own rate
and the frame in which the mechanisms read their input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bioadapt import register_primitive
from bioadapt.primitives.base import Context, Host, Primitive, setting
from bioadapt.primitives.frames import read_in, read_out, token_scale


class Bottleneck(Primitive):
    """delta = s U f(D u) with f as the subclass has it."""

    rank: int = setting(8, low=1, high=1024, meaning="number r of hidden units")

    def build(self, host: Host) -> None:
        self.reader = read_in(self.rank, self.d_out)
        self.bias = nn.Parameter(torch.zeros(self.rank))
        self.writer = read_out(self.d_out, self.rank)

    def transform(self, x: Tensor, context: Context) -> Tensor:
        scale = token_scale(x)
        return (scale * self.hidden((x / scale) @ self.reader.T + self.bias)) @ self.writer.T

    def hidden(self, drive: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define hidden")


@register_primitive("gelu_bottleneck", stage="dendritic", kind="pointwise", zero_at="readout")
class GeluBottleneck(Bottleneck):
    """Placebo: a bottleneck of GELU units.

    Biology: none.

    Equation: delta = s U gelu(D u + b).

    Reference: Houlsby et al. 2019, Parameter-efficient transfer learning for NLP, ICML.
    """

    def hidden(self, drive: Tensor) -> Tensor:
        return nn.functional.gelu(drive)


@register_primitive("linear_bottleneck", stage="dendritic", kind="pointwise", zero_at="readout")
class LinearBottleneck(Bottleneck):
    """Placebo: a bottleneck of linear units.

    Biology: none.

    Equation: delta = s U (D u + b).

    Reference: Hu et al. 2022, LoRA: Low-rank adaptation of large language models, ICLR.
    """

    def hidden(self, drive: Tensor) -> Tensor:
        return drive


@register_primitive("plain_gain", stage="sensory_gain", kind="pointwise", zero_at="gate", merge="left")
class PlainGain(Primitive):
    """Placebo: one number per channel.

    Biology: none.

    Equation: delta = g x.

    Reference: Liu et al. 2022, Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning,
    NeurIPS.
    """

    def transform(self, x: Tensor, context: Context) -> Tensor:
        return x

    def left_matrix(self) -> Tensor:
        return self.gate.new_ones(self.d_out)
