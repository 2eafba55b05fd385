"""Where an adapter can sit: the feature axis of a layer, its sizes, and its weight as a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..primitives.context import in_full

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_READ_BY_KERNELS = ("conv1d", "x_proj", "dt_proj", "out_proj", "norm")  # of the mixers of Mamba and its kin
_CHANNEL_NORMS = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Site:
    """Geometry of a layer.

    ``d_in``, ``d_out``: features read and written. ``spatial``: number of spatial axes behind a channel axis, 0 if the
    features are last. ``reads_features``: whether the layer's input is made of features (an embedding's is not).
    ``weight``: how the weight becomes a (d_out, n) matrix: ``rows`` as it is, ``columns`` transposed, ``kernel``
    flattened, None if it is no matrix.
    """

    layer: str
    d_in: int
    d_out: int
    spatial: int = 0
    reads_features: bool = True
    weight: str | None = None
    pointwise_weight: bool = True

    def matrix(self, weight: Tensor) -> Tensor:
        """The layer's weight as (d_out, n), in fp32 at least."""
        weight = in_full(weight.detach())
        if self.weight == "kernel":
            return weight.flatten(1)
        return weight.T if self.weight == "columns" else weight

    def unmatrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Inverse of `matrix`, in the shape and dtype of ``like``."""
        shaped = matrix.T if self.weight == "columns" else matrix
        return shaped.reshape(like.shape).to(like.dtype).contiguous()

    def at_input(self) -> Site:
        """The features that the layer reads, as a site of their own, behind which there is no weight."""
        return replace(self, d_out=self.d_in, weight=None)

    def serves(self, info) -> str | None:
        """Why a primitive cannot act here, in words, or None if it can."""
        if info.needs_input and not self.reads_features:
            return f"it reads the layer's input, and the input of {self.layer} is not made of features"
        matrix = self.weight is not None and self.pointwise_weight and self.reads_features
        if info.kind == "weight" and not matrix and not info.factory.per_channel:
            return f"it acts on a weight matrix, and {self.layer} shows none that multiplies its input"
        return None


def offloaded(layer: nn.Module, name: str) -> Tensor:
    """A tensor of a layer on the meta device, as accelerate brings it in for the layer's forward.

    It stays on the meta device where nothing is offloaded and there are no values yet.
    """
    with align_module_device(layer):
        return getattr(layer, name)


def bypassed(parent: nn.Module, name: str, layer: nn.Module) -> str | None:
    """Why an adapter on the child ``name`` of a module would not run, in words, or None if it would."""
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return (
            "this is the output projection inside an nn.MultiheadAttention, which multiplies by its weight without "
            "calling it, so an adapter here would never run: target a layer behind it"
        )
    cls = type(parent).__name__
    if hasattr(parent, "A_log") and ("Mamba" in cls or cls.endswith("Mixer")) and name in _READ_BY_KERNELS:
        return f"the kernels of {cls} read its weight without calling it: of this module, in_proj alone can be adapted"
    return None


def describe(layer: nn.Module) -> Site:
    """The site that a plain layer offers.

    Raises:
        TypeError: a layer without a known feature axis; the message names it.
    """
    name = type(layer).__name__
    if isinstance(layer, nn.MultiheadAttention):
        raise TypeError(
            "nn.MultiheadAttention multiplies by its projections without calling them, so they cannot be adapted: "
            "target the module that contains it or a layer behind it"
        )
    if isinstance(layer, nn.Linear):
        return Site(name, layer.in_features, layer.out_features, weight="rows")
    if isinstance(layer, Conv1D):
        return Site(name, layer.nx, layer.nf, weight="columns")
    if isinstance(layer, nn.Embedding):
        d = layer.embedding_dim
        return Site(name, d, d, reads_features=False, weight="columns", pointwise_weight=False)
    if isinstance(layer, _CONVOLUTIONS):
        spatial = len(layer.kernel_size)
        pointwise = layer.groups == 1 and set(layer.kernel_size) == {1} and set(layer.stride) == {1}
        weight = "kernel" if layer.groups == 1 and not layer.transposed else None
        unpadded = layer.padding == "valid" or (not isinstance(layer.padding, str) and not any(layer.padding))
        return Site(
            name, layer.in_channels, layer.out_channels, spatial, weight=weight, pointwise_weight=pointwise and unpadded
        )
    if isinstance(layer, _CHANNEL_NORMS):
        d = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features
        return Site(name, d, d, spatial=-1)
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.LayerNorm) or (name.endswith(("RMSNorm", "LayerNorm")) and isinstance(weight, Tensor)):
        if weight is None or weight.dim() != 1:
            raise TypeError(f"{name} normalises over several axes or has no weight, so its feature axis is not known")
        return Site(name, weight.shape[0], weight.shape[0])
    d_in, d_out = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if isinstance(d_in, int) and isinstance(d_out, int):
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"{name} packs its weight for inference, and no gradient flows back through it")
        plain = isinstance(weight, Tensor) and tuple(weight.shape) == (d_out, d_in) and weight.is_floating_point()
        readable = plain or callable(getattr(layer, "dequantize", None))
        return Site(name, d_in, d_out, weight="rows" if readable else None)
    raise TypeError(
        f"{name} has no feature axis that bioadapt knows; accepted are Linear, Conv1D, Conv1d/2d/3d, Embedding, "
        "normalisations with a weight vector, and modules with integer in_features and out_features"
    )


@dataclass(frozen=True)
class Axes:
    """How the module around a layer lays out its activations.

    ``time_first``: (T, B, d) instead of (B, T, d). ``unbatched``: two axes are the tokens of one sequence, not single
    vectors.
    """

    time_first: bool = False
    unbatched: bool = False


class Layout(NamedTuple):
    """How one activation of a site lies in memory, and the way to (B, T, d) and back."""

    shape: torch.Size
    spatial: bool
    sequence: tuple[int, ...]  # (B, T) after the reshape
    grid: tuple[int, ...] | None
    time_first: bool = False

    @classmethod
    def of(cls, y: Tensor, site: Site, tokens: tuple[int, int] | None, axes: Axes | None = None) -> Layout:
        """``tokens``: (B, T) of the running forward where it is known; it tells a flattened batch of sequences from a
        batch of single vectors, which have no time axis."""
        if site.spatial:
            shape = y.shape if site.spatial < 0 or y.dim() == site.spatial + 2 else (1, *y.shape)
            grid = tuple(shape[2:])
            return cls(y.shape, True, (shape[0], max(math.prod(grid), 1)), grid or None)
        shape = y.shape
        if axes is not None and axes.time_first and len(shape) == 3:
            return cls(shape, False, (shape[1], shape[0]), None, time_first=True)
        if len(shape) > 2:
            return cls(shape, False, (shape[0], math.prod(shape[1:-1])), None)
        if len(shape) == 1:
            return cls(shape, False, (1, 1), None)
        rows = shape[0]
        if axes is not None and axes.unbatched:
            return cls(shape, False, (1, rows), None)
        flattened = tokens is not None and tokens[1] > 1 and rows == tokens[0] * tokens[1]
        return cls(shape, False, tokens if flattened else (rows, 1), None)

    def to_sequence(self, y: Tensor) -> Tensor:
        if not self.spatial:
            return self._flat(y)
        return y.reshape(self.sequence[0], self._channels(y), self.sequence[1]).transpose(1, 2)

    def _channels(self, y: Tensor) -> int:
        return y.shape[-len(self.grid or ()) - 1]

    def restore(self, sequence: Tensor) -> Tensor:
        if self.time_first:
            return sequence.transpose(0, 1).contiguous()  # as the layer gives it: attention takes views of that
        if not self.spatial:
            return sequence if sequence.shape == self.shape else sequence.reshape(self.shape)
        return sequence.transpose(1, 2).reshape(self.shape)

    def input_to_sequence(self, v: Tensor, site: Site) -> Tensor | None:
        """The layer's input on the grid of its output, (B, T, d_in), or None where it does not correspond."""
        if not site.reads_features:
            return None
        if self.spatial:
            v = v if v.dim() == len(self.grid or ()) + 2 else v[None]
            if self.grid and tuple(v.shape[2:]) != self.grid:
                v = _POOLS[len(self.grid)](v, self.grid)  # a strided convolution reads a neighbourhood of each place
            return v.reshape(self.sequence[0], v.shape[1], -1).transpose(1, 2)
        if v.dim() != len(self.shape) or v.shape[:-1] != self.shape[:-1]:
            return None
        return self._flat(v)

    def _flat(self, features: Tensor) -> Tensor:
        if self.time_first:
            return features.transpose(0, 1)
        shape = (*self.sequence, features.shape[-1])
        return features if features.shape == shape else features.reshape(shape)


_POOLS = {
    1: nn.functional.adaptive_avg_pool1d,
    2: nn.functional.adaptive_avg_pool2d,
    3: nn.functional.adaptive_avg_pool3d,
}
