"""The contenders of a fair comparison: what each of them puts into a model, where, and with how many numbers.

Every arm is built over the frozen model from one `Recipe`. The LoRA of equal size has two places where its numbers may
sit, LoRA's own modules and those of the bio adapter, and so is two rivals. A placebo is a plain bottleneck at the very
sites of the bio adapter, of the same size and born as the identity: what it reaches is capacity and place, not biology.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import BioConfig
from .._words import suggest
from ..tuner.targets import block_of
from .training import adapt, trainable_parameters, transformer_of

ZERO_SHOT, LORA, LORA_BIO, BIO = "zero-shot", "lora", "lora+bio", "bio"
LORA_EQUAL, LORA_BIO_SIZE = "lora-equal", "lora-bio-size"
ALPHA_PER_RANK = 2
GELU, LINEAR = "gelu", "linear"
_OWN, _BIO_SITES = "@lora-sites", "@bio-sites"
_BLOCK = nn.Linear | nn.Conv1d | nn.Conv2d | Conv1D


@dataclass(frozen=True)
class Arm:
    """One contender.

    Attributes:
        meaning: in a few words, for the help.
        lora: whether it has the recipe's LoRA.
        over: what it has besides or over that: ``bio``, a placebo's non-linearity (``gelu``, ``linear``), or nothing.
        sized_as: for a LoRA of equal size, the arm that says how large.
        at_bio_sites: whether that LoRA sits where the bio adapter does.
    """

    meaning: str
    lora: bool = False
    over: str = ""
    sized_as: str = ""
    at_bio_sites: bool = False


ARMS: dict[str, Arm] = {
    ZERO_SHOT: Arm("the model as it comes"),
    LORA: Arm("a LoRA", lora=True),
    LORA_EQUAL + _OWN: Arm("a LoRA as large as lora+bio, on LoRA's modules", sized_as=LORA_BIO),
    LORA_EQUAL + _BIO_SITES: Arm("a LoRA as large as lora+bio, where bio sits", sized_as=LORA_BIO, at_bio_sites=True),
    LORA_BIO: Arm("a LoRA and a bio adapter over it, trained together", lora=True, over=BIO),
    "lora+placebo": Arm("a LoRA and a plain GELU bottleneck in the place of bio", lora=True, over=GELU),
    "lora+linear": Arm("a LoRA and a linear bottleneck in the place of bio", lora=True, over=LINEAR),
    BIO: Arm("a bio adapter alone", over=BIO),
    "placebo": Arm("a plain GELU bottleneck in the place of bio, alone", over=GELU),
    "linear": Arm("a linear bottleneck in the place of bio, alone", over=LINEAR),
    LORA_BIO_SIZE + _OWN: Arm("a LoRA as large as bio alone, on LoRA's modules", sized_as=BIO),
    LORA_BIO_SIZE + _BIO_SITES: Arm("a LoRA as large as bio alone, where it sits", sized_as=BIO, at_bio_sites=True),
}
# What can be asked for: the two LoRAs of equal size come together.
ASKED = tuple(dict.fromkeys(name.partition("@")[0] for name in ARMS))


def arms_named(names: Sequence[str]) -> tuple[str, ...]:
    """The arms that names stand for, ``lora-equal`` and ``lora-bio-size`` for two each.

    Raises:
        ValueError: an unknown arm, or none.
    """
    if not names:
        raise ValueError(f"arms: at least one is needed; accepted: {', '.join(ASKED)}")
    ordered: dict[str, None] = {}
    for name in names:
        own = [arm for arm in ARMS if name in (arm, arm.partition("@")[0])]
        if not own:
            raise ValueError(f"arms: unknown arm {name!r}; {suggest(name, ASKED)}")
        ordered |= dict.fromkeys(own)
    return tuple(ordered)


def rivals_of_equal_size(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each asked-for name, the arms of it: of several, the better one counts."""
    groups: dict[str, tuple[str, ...]] = {}
    for name in names:
        short = name.partition("@")[0]
        groups[short] = (*groups.get(short, ()), name)
    return groups


@dataclass(frozen=True)
class AdaptedModule:
    """Where a bio adapter acts: ``width`` features of a module's output, or of its input; and with how many numbers."""

    path: str
    width: int
    at_input: bool
    parameters: int


@dataclass(frozen=True)
class Recipe:
    """What the arms are made of.

    Attributes:
        fresh: makes the model anew: a sentence encoder, an `ImageModel` or a `LanguageModel`.
        bio: configuration of the bio adapter.
        lora_rank: of the LoRA that is not of equal size.
        layers: numbers of the blocks that may be adapted, by every arm alike; all if None.
        lora_targets: names of LoRA's own modules, or how their names end; those that PEFT takes by default if None.
    """

    fresh: Callable[[], Any]
    bio: BioConfig
    lora_rank: int = 8
    layers: tuple[int, ...] | None = None
    lora_targets: tuple[str, ...] | None = None

    def build(self, name: str, seed: int) -> tuple[Any, int]:
        """The model with an arm in it, ready to be trained, and how many numbers will be.

        Args:
            name: one of `ARMS`.
            seed: decides everything that is drawn.

        Raises:
            ValueError: the adapter cannot act on this model.
        """
        arm = ARMS[name]
        # What is asked about fresh models comes first: to load one may draw random numbers.
        sites = self.sites if arm.over or arm.sized_as else ()
        paths = [site.path for site in sites] if arm.at_bio_sites else self.lora_paths
        size = self.size_of(arm.sized_as) if arm.sized_as else 0
        encoder = self.fresh()
        model = transformer_of(encoder)
        model.requires_grad_(False)
        torch.manual_seed(seed)
        if arm.sized_as:
            self._put(encoder, lora_of_size(model, paths, size))
        elif arm.lora:
            self._put(encoder, lora_config(paths, self.lora_rank))
        if arm.over == BIO:
            self._put(encoder, self.bio_config(seed))
        elif arm.over:
            add_placebo(transformer_of(encoder), sites, linear=arm.over == LINEAR)
        return encoder, trainable_parameters(transformer_of(encoder))

    def bio_config(self, seed: int) -> BioConfig:
        """The bio adapter's configuration for one seed, on the blocks of the recipe."""
        return replace(self.bio, seed=seed, layers_to_transform=self._layers_of_bio)

    @property
    def _layers_of_bio(self) -> Any:
        return self.bio.layers_to_transform if self.layers is None else list(self.layers)

    @staticmethod
    def _put(encoder: Any, config: Any) -> None:
        adapt(encoder, partial(get_peft_model, peft_config=config))

    def size_of(self, name: str) -> int:
        """How many numbers ``lora+bio`` or ``bio`` trains."""
        own = sum(site.parameters for site in self.sites)
        return own + self._lora_size if name == LORA_BIO else own

    @cached_property
    def lora_paths(self) -> list[str]:
        """LoRA's own modules."""
        paths = lora_paths(_plain(self.fresh()), self.lora_targets)
        return [path for path in paths if self.layers is None or (block_of(path) or ("",))[0] in self.layers]

    @cached_property
    def _lora_size(self) -> int:
        encoder = self.fresh()
        self._put(encoder, lora_config(self.lora_paths, self.lora_rank))
        return trainable_parameters(transformer_of(encoder))

    @cached_property
    def sites(self) -> tuple[AdaptedModule, ...]:
        """Where the bio adapter acts on a fresh model.

        Raises:
            ValueError: it cannot act on this model.
        """
        encoder = self.fresh()
        plain = _plain(encoder)
        modules = dict(plain.named_modules())
        model = adapt(encoder, partial(get_peft_model, peft_config=self.bio_config(0)))
        config = next(iter(model.peft_config.values()))
        counts = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        places = []
        for path in model.base_model.targeted_module_names:
            own = sum(count for name, count in counts.items() if name.startswith(f"base_model.model.{path}."))
            at_input = config.adapts_input_of(path)
            places.append(AdaptedModule(path, _features(modules[path])[0 if at_input else 1], at_input, own))
        return tuple(places)


# -- a LoRA of any size --


def lora_paths(model: nn.Module, targets: Sequence[str] | None = None) -> list[str]:
    """The full names of the modules of a model of transformers that a LoRA sits on.

    Args:
        model: the plain model.
        targets: the names of the modules, or how they end; those that PEFT takes by default if None. Where PEFT has no
            default, or one that finds nothing, all layers with a weight between numbered blocks are taken.

    Raises:
        ValueError: there are none, or none of one of the names.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, _BLOCK)}
    if targets is not None:
        for end in targets:
            if not any(path == end or path.endswith(f".{end}") for path in layers):
                known = sorted({path.rpartition(".")[2] for path in layers})
                raise ValueError(
                    f"lora_targets: no layer of a {type(model).__name__} is called {end!r}; {suggest(end, known)}"
                )
        return [path for path in layers if any(path == end or path.endswith(f".{end}") for end in targets)]
    usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(getattr(model.config, "model_type", ""), ())
    usable = [path for path in layers if any(path == end or path.endswith(f".{end}") for end in usual)]
    usable = usable or [path for path, module in layers.items() if block_of(path) and getattr(module, "groups", 1) == 1]
    if not usable:
        raise ValueError(f"a LoRA finds no linear or convolutional layer in a {type(model).__name__}")
    return usable


def lora_config(paths: Sequence[str], rank: int, alpha_per_rank: int = ALPHA_PER_RANK) -> LoraConfig:
    """A LoRA on modules by their full names."""
    return LoraConfig(r=rank, lora_alpha=alpha_per_rank * rank, target_modules=list(paths))


def lora_of_size(
    model: nn.Module, paths: Sequence[str], parameters: int, *, alpha_per_rank: int = ALPHA_PER_RANK
) -> LoraConfig:
    """A LoRA on these modules with as nearly ``parameters`` numbers as ranks per module allow.

    The rank differs by at most one between modules, and so does no scale: alpha follows the rank. Where the numbers
    do not suffice for rank one everywhere, it is on some of the modules, spread over all.

    Args:
        model: the plain model.
        paths: full names of the modules that it may sit on.
        parameters: how many trainable numbers there should be.
        alpha_per_rank: the scale of what it adds.
    """
    rank, raised = rank_of_size(rank_costs(model, paths), parameters)
    if not rank:
        return lora_config(raised, 1, alpha_per_rank)
    config = lora_config(paths, rank, alpha_per_rank)
    config.rank_pattern = dict.fromkeys(raised, rank + 1)
    config.alpha_pattern = dict.fromkeys(raised, alpha_per_rank * (rank + 1))
    return config


def rank_costs(model: nn.Module, paths: Sequence[str]) -> dict[str, int]:
    """How many numbers one rank of a LoRA has at each of these modules."""
    modules = dict(model.named_modules())
    return {path: _cost(modules[path]) for path in paths}


def rank_of_size(costs: Mapping[str, int], parameters: int) -> tuple[int, list[str]]:
    """The rank at which a LoRA has as nearly so many numbers as it can, and the modules that get one rank more.

    The rank is 0 where the numbers do not suffice for one everywhere: only the raised modules then have a LoRA.

    Args:
        costs: what one rank costs at each module.
        parameters: how many numbers it should have.
    """
    rank = parameters // sum(costs.values())
    missing = parameters - rank * sum(costs.values())
    raised = []
    # Multiples of the golden ratio, taken modulo one, spread any first few over the whole.
    for place in sorted(range(len(costs)), key=lambda place: place * 0.6180339887 % 1):
        name = list(costs)[place]
        if missing >= costs[name] / 2:
            raised.append(name)
            missing -= costs[name]
    if not rank and not raised:
        raised = [min(costs, key=costs.__getitem__)]
    return rank, raised


def _cost(module: nn.Module) -> int:
    """Numbers of a LoRA of rank one on a module."""
    kernel = module.weight[0, 0].numel() if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 1
    d_in, d_out = _features(module)
    return d_in * kernel + d_out


def _features(module: Any) -> tuple[int, int]:
    """How many features a module reads, and writes."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return module.in_features, module.out_features


def _plain(encoder: Any) -> nn.Module:
    model = transformer_of(encoder)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# -- placebos --


class Placebo(nn.Module):
    """x + up(act(down(x))) on features, with ``up`` zero at birth.

    Built of ``vectors`` vectors of ``width`` numbers: pairs of a unit's input and output weights, and where their count
    is odd one more output whose input is frozen as it was drawn.

    Args:
        width: of the features.
        vectors: how many vectors are trained, at least one.
        linear: without the GELU.
        axis: of the features.
    """

    frozen: Tensor

    def __init__(self, width: int, vectors: int, *, linear: bool = False, axis: int = -1) -> None:
        super().__init__()
        units = (vectors + 1) // 2
        drawn = torch.randn(units, width) / width**0.5
        self.down = nn.Parameter(drawn[: vectors // 2])
        self.register_buffer("frozen", drawn[vectors // 2 :], persistent=True)
        self.up = nn.Parameter(torch.zeros(width, units))
        self.linear, self.axis = linear, axis

    def forward(self, x: Tensor) -> Tensor:
        """x with ``width`` features along the axis -> the same shape and dtype."""
        features = x.movedim(self.axis, -1)
        inner = features.float() @ torch.cat([self.down, self.frozen]).T
        inner = inner if self.linear else nn.functional.gelu(inner)
        return (features + inner @ self.up.T).to(x.dtype).movedim(-1, self.axis)


def add_placebo(model: nn.Module, sites: Sequence[AdaptedModule], *, linear: bool = False) -> list[Placebo]:
    """Put placebos into a model, at the sites of a bio adapter and with as many numbers as it has there.

    A placebo has whole vectors alone; what is missing or too much at one site is made up for at the next. Where the
    bio adapter has too few numbers for any, the first site gets one.

    Args:
        model: a plain model, or a `PeftModel` over one.
        sites: as `Recipe.sites` has them.
        linear: without the non-linearity.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    placed: list[Placebo] = []
    device, missing = next(model.parameters()).device, 0
    too_few = sum(site.parameters for site in sites) < min(site.width for site in sites) / 2
    for site in sites:
        vectors = max(int(too_few and not placed), round((site.parameters + missing) / site.width))
        missing += site.parameters - vectors * site.width
        if not vectors:
            continue
        module = plain.get_submodule(site.path)
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        axis = 1 if isinstance(layer, (nn.Conv1d, nn.Conv2d)) else -1
        placebo = Placebo(site.width, vectors, linear=linear, axis=axis).to(device)
        module.add_module("placebo", placebo)
        if site.at_input:
            module.register_forward_pre_hook(partial(_read, placebo))
        else:
            module.register_forward_hook(partial(_write, placebo))
        placed.append(placebo)
    return placed


def _read(placebo: Placebo, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    first, *others = inputs
    return placebo(first), *others


def _write(placebo: Placebo, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return placebo(output)
