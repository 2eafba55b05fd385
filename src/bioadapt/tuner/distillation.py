"""Bio adapters as LoRAs: fitted to what the adapter does, or compared with what a conversion kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..checkpoint import ROOT
from .layer import BioLayer
from .tree import named_bio_layers

# Sums of products that are kept at once; layers beyond it are fitted in a further pass over the data.
ACCUMULATED_BYTES = 2**31
# Directions of the input that the data hardly shows are held back by this part of the mean variance.
RIDGE = 1e-4


@dataclass(frozen=True)
class DistilledLora:
    """A LoRA that stands for a bio adapter.

    ``config`` and ``tensors`` are an ordinary LoRA checkpoint. ``residuals``: what the LoRA misses at each layer,
    root mean square relative to the adapter's change, on batches that it was not fitted to where there are several.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    residuals: dict[str, float]

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write the two files of a LoRA adapter, which `PeftModel.from_pretrained` loads."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, folder / SAFETENSORS_WEIGHTS_NAME)
        self.config.save_pretrained(str(folder))


def distill_to_lora(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    rank: int,
    *,
    whole: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> DistilledLora:
    """Fit a LoRA to the change that the active bio adapters make at each layer, whatever they depend on.

    On the inputs that each layer meets in the batches, the change is regressed on the input by least squares under the
    rank (reduced-rank regression), which is exact where the change is a matrix of that rank. Padded tokens do not
    count. Every fifth batch is kept for measuring the residual; a single batch serves for both.

    Args:
        model: with active bio adapters, by whichever way they were added. Its weights stay as they are.
        batches: mappings that the model is called with. They are gone through more than once.
        rank: of the LoRA.
        whole: distil what other adapters below do as well, so that the LoRA replaces all of them; else the LoRA
            stands for the bio adapter alone and is to be used over the same adapters.
        forward: how to call the model on a batch; ``model(**batch)`` if None.

    Raises:
        ValueError: no active bio adapter, no batch, a layer that is not linear, or a rank beyond a layer's size.
    """
    layers = {name: layer for name, layer in named_bio_layers(model) if _active(layer)}
    _check(layers, rank)
    given = list(batches)
    if not given:
        raise ValueError("batches is empty: at least one is needed")
    fitted = [batch for index, batch in enumerate(given) if index % 5 != 4]
    kept = given[4::5] or given
    run = forward or (lambda model, batch: model(**batch))
    tensors: dict[str, Tensor] = {}
    residuals: dict[str, float] = {}
    for group in _groups(layers):
        sums = {name: _Sums(layer) for name, layer in group.items()}
        _go_through(model, group, fitted, run, whole, {name: sums[name].add for name in group})
        factors = {name: sums.pop(name).factors(rank) for name in group}
        misses = {name: _Miss(*factors[name]) for name in group}
        _go_through(model, group, kept, run, whole, {name: misses[name].add for name in group})
        for name, (a, b) in factors.items():
            path = name if name.startswith(ROOT) else f"{ROOT}{name}"
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a.cpu(), b.cpu()
            residuals[layers[name].path] = misses[name].relative
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(layer.path for layer in layers.values()),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        inference_mode=True,
    )
    return DistilledLora(config, tensors, residuals)


def conversion_residuals(
    model: nn.Module, tensors: Mapping[str, Tensor], adapter_name: str = "default"
) -> dict[str, float]:
    """What PEFT's `convert_to_lora` lost at each layer: the Frobenius norm of (change - B A), relative to the change's.

    Args:
        model: the model that was converted.
        tensors: the second thing that `peft.convert_to_lora` returns.
        adapter_name: the adapter that was converted.
    """
    found = {}
    for name, layer in named_bio_layers(model):
        if adapter_name not in layer.circuits or f"{name}.lora_A.weight" not in tensors:
            continue
        change = layer.site.matrix(layer.get_delta_weight(adapter_name)).cpu()
        product = tensors[f"{name}.lora_B.weight"].float() @ tensors[f"{name}.lora_A.weight"].float()
        found[layer.path] = ((change - product.cpu()).norm() / change.norm().clamp(min=1e-30)).item()
    return found


def _active(layer: BioLayer) -> bool:
    return not layer.disable_adapters and any(name in layer.circuits for name in layer.active_adapters)


def _check(layers: Mapping[str, BioLayer], rank: int) -> None:
    if not layers:
        raise ValueError("the model has no active bio adapter: nothing to distil")
    for layer in layers.values():
        site = layer.site
        if site.weight not in ("rows", "columns") or not site.reads_features:
            raise ValueError(f"{layer.path} ({site.layer}) is not a linear layer: its adapter cannot become a LoRA")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(site.d_in, site.d_out):
            raise ValueError(
                f"rank={rank!r}: accepted is an integer from 1 to {min(site.d_in, site.d_out)} at {layer.path}"
            )
        if layer.merged:
            raise ValueError(f"the adapter is merged at {layer.path}: unmerge it first")


def _groups(layers: Mapping[str, BioLayer]) -> Iterator[dict[str, BioLayer]]:
    """Layers in lots whose sums fit into `ACCUMULATED_BYTES`; a lot has one layer at least."""
    group: dict[str, BioLayer] = {}
    held = 0
    for name, layer in layers.items():
        needed = 8 * layer.site.d_in * (layer.site.d_in + layer.site.d_out)
        if group and held + needed > ACCUMULATED_BYTES:
            yield group
            group, held = {}, 0
        group[name] = layer
        held += needed
    yield group


@torch.no_grad()
def _go_through(
    model: nn.Module,
    layers: Mapping[str, BioLayer],
    batches: list[Any],
    run: Callable[[nn.Module, Any], Any],
    whole: bool,
    take: Mapping[str, Callable[[Tensor, Tensor], None]],
) -> None:
    """Run the batches and hand each layer's inputs (N, d_in) and changes (N, d_out) to its taker."""
    hooks = [
        layer.register_forward_hook(partial(_observe, whole=whole, take=take[name]), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with _eval(model):
            for batch in batches:
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


def _observe(layer: BioLayer, args: tuple, kwargs: dict[str, Any], output: Any, *, whole: bool, take: Callable) -> None:
    v = args[0] if args else next(iter(kwargs.values()))
    base = layer.get_base_layer() if whole else layer.base_layer
    change = (output - base(*args, **kwargs)).float()
    around = layer.scope.surroundings
    mask = around.encoder_mask if layer.across else around.mask
    if mask is not None and mask.numel() == v[..., 0].numel():
        real = mask.reshape(v.shape[:-1]).to(v.device)
        take(v[real].float(), change[real])
    else:
        take(v.flatten(0, -2).float(), change.flatten(0, -2))


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Sums:
    """Products of a layer's inputs v (N, n) with themselves and with the changes (N, m), summed over tokens in fp64."""

    def __init__(self, layer: BioLayer) -> None:
        n, m = layer.site.d_in, layer.site.d_out
        self.inner = torch.zeros(n, n, dtype=torch.float64)
        self.outer = torch.zeros(n, m, dtype=torch.float64)

    def add(self, v: Tensor, change: Tensor) -> None:
        self.inner += (v.T @ v).double().cpu()
        self.outer += (v.T @ change).double().cpu()

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A (rank, n) and B (m, rank) of the matrix B A of that rank that comes nearest to the changes."""
        n = len(self.inner)
        ridge = RIDGE * self.inner.diagonal().mean().clamp(min=1e-12)
        root = torch.linalg.cholesky(self.inner + ridge * torch.eye(n, dtype=torch.float64))
        # In coordinates in which the inputs are white, the best matrix of a rank is the truncated singular value
        # decomposition of the regression.
        white = torch.linalg.solve_triangular(root, self.outer, upper=False)
        u, s, v = torch.linalg.svd(white, full_matrices=False)
        a = torch.linalg.solve_triangular(root.T, u[:, :rank], upper=True).T
        b = (s[:rank, None] * v[:rank]).T
        balance = (b.norm() / a.norm().clamp(min=1e-30)).sqrt().clamp(min=1e-6)
        return (a * balance).float().contiguous(), (b / balance).float().contiguous()


class _Miss:
    """How much of the changes a LoRA does not make."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a, b
        self.missed = self.made = 0.0

    def add(self, v: Tensor, change: Tensor) -> None:
        made = v @ self.a.to(v.device).T @ self.b.to(v.device).T
        self.missed += (change - made).double().square().sum().item()
        self.made += change.double().square().sum().item()

    @property
    def relative(self) -> float:
        return (self.missed / self.made) ** 0.5 if self.made else 0.0
