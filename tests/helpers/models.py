"""Small hosts, awake adapters, and a record of everything about a model that a refused call must leave alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, GPT2Config
from transformers.pytorch_utils import Conv1D

from bioadapt import BioConfig
from bioadapt.tuner.layer import BioLayer
from bioadapt.tuner.patches import HAS_GRAPHS

B, T, D = 3, 5, 8


class Chain(nn.Module):
    """Named layers one after the other, with ``between`` after each but the last."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.order, self.between = list(layers), between

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = getattr(self, name)(x)
            x = x if name == self.order[-1] else self.between(x)
        return x


class RMSNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, d))

    def forward(self, x: Tensor) -> Tensor:
        return x * x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt().to(x.dtype) * self.weight


def mlp() -> Chain:
    return Chain(lin0=nn.Linear(D, 2 * D), lin1=nn.Linear(2 * D, D), out=nn.Linear(D, 3))


@dataclass(frozen=True)
class Kind:
    """A host, an input for it, and which of its layers are adapted."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    targets: tuple[str, ...]
    matrix: bool = True  # the targets multiply their input by a matrix
    merges: bool = True


def _features() -> Tensor:
    return torch.randn(B, T, D)


def _transposed(d_out: int, d_in: int) -> Conv1D:
    layer = Conv1D(d_out, d_in)
    nn.init.normal_(layer.weight, std=d_in**-0.5)  # its own 0.02 makes every gradient tiny
    return layer


KINDS = {
    "mlp": Kind(mlp, lambda: torch.randn(B, D), ("lin0", "lin1")),
    "mlp over tokens": Kind(mlp, _features, ("lin0", "lin1")),
    "conv1d": Kind(
        lambda: Chain(conv=nn.Conv1d(4, D, 3), out=nn.Conv1d(D, 2, 3)), lambda: torch.randn(B, 4, 9), ("conv",), False
    ),
    "conv2d": Kind(
        lambda: Chain(conv=nn.Conv2d(3, D, 3, stride=2), out=nn.Conv2d(D, 2, 1)),
        lambda: torch.randn(B, 3, 9, 7),
        ("conv",),
        False,
    ),
    "conv3d": Kind(
        lambda: Chain(conv=nn.Conv3d(2, D, 2, bias=False), out=nn.Conv3d(D, 2, 1)),
        lambda: torch.randn(B, 2, 4, 3, 3),
        ("conv",),
        False,
    ),
    "pointwise conv2d": Kind(
        lambda: Chain(conv=nn.Conv2d(3, D, 1), out=nn.Conv2d(D, 2, 1)), lambda: torch.randn(B, 3, 4, 4), ("conv",)
    ),
    "embedding": Kind(
        lambda: Chain(emb=nn.Embedding(11, D), out=nn.Linear(D, 3)),
        lambda: torch.randint(0, 11, (B, T)),
        ("emb",),
        False,
    ),
    "gpt-2 conv1d": Kind(lambda: Chain(conv=_transposed(D, D), out=_transposed(3, D)), _features, ("conv",)),
    "layer norm": Kind(
        lambda: Chain(norm=nn.LayerNorm(D), out=nn.Linear(D, 3)), _features, ("norm",), matrix=False, merges=False
    ),
    "rms norm": Kind(
        lambda: Chain(norm=RMSNorm(D), out=nn.Linear(D, 3)), _features, ("norm",), matrix=False, merges=False
    ),
    "group norm": Kind(
        lambda: Chain(conv=nn.Conv1d(4, D, 1), norm=nn.GroupNorm(2, D), out=nn.Conv1d(D, 2, 1)),
        lambda: torch.randn(B, 4, 6),
        ("norm",),
        matrix=False,
        merges=False,
    ),
}

PRIMITIVES: dict[str, dict[str, Any]] = {
    "pointwise": {"primitives": ["lateral_inhibition", "divisive_normalization"]},
    "causal": {"primitives": ["predictive_coding", "short_term_depression"]},
    "weight": {"primitives": ["neuro_ada", "heterosynaptic_scaling"]},
    "mergeable": {"primitives": ["homeostatic_scaling"]},
    "mergeable weight": {"primitives": ["homeostatic_scaling", "neuro_ada"]},
    "ranked": {"primitives": ["k_winners_take_all", "lateral_inhibition"], "rank": 4},
    "ranked mergeable": {"primitives": ["homeostatic_scaling"], "rank": 4},
}
MERGING = ("mergeable", "mergeable weight", "ranked mergeable")


def pairs(*, merging: bool = False) -> list[tuple[str, str]]:
    """Every kind of host with every list of primitives it can serve."""
    return [
        (kind, named)
        for kind in KINDS
        for named in (MERGING if merging else PRIMITIVES)
        if (KINDS[kind].matrix or "weight" not in named) and (KINDS[kind].merges or not merging)
    ]


def base_and_inputs(kind: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return KINDS[kind].build().eval(), KINDS[kind].inputs()


def awake(named: str | list = "pointwise", targets: Any = None, **fields: Any) -> BioConfig:
    """A configuration whose fresh adapter is not the identity."""
    chosen = PRIMITIVES[named] if isinstance(named, str) else {"primitives": named}
    targets = list(targets) if isinstance(targets, tuple) else targets
    return BioConfig(**{**chosen, "target_modules": targets, "init_weights": False, **fields})


def adapted(kind: str, named: str, seed: int = 0, **fields: Any) -> tuple[PeftModel, Tensor]:
    model, inputs = base_and_inputs(kind, seed)
    return get_peft_model(model, awake(named, KINDS[kind].targets, **fields)).eval(), inputs


@torch.no_grad()
def output(model: nn.Module, inputs: Any) -> Tensor:
    """The model's output in eval mode, as a tensor of its own."""
    model.eval()
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if isinstance(found, Tensor):
        return found.clone()
    return (found.logits if "logits" in found else found[0]).clone()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


def bio_layers(model: nn.Module) -> list[BioLayer]:
    return [module for module in model.modules() if isinstance(module, BioLayer)]


def own_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    return {
        f"{layer.path}.{name}": parameter
        for layer in bio_layers(model)
        if adapter_name in layer.circuits
        for name, parameter in layer.circuits[adapter_name].named_parameters()
    }


def step(model: nn.Module, inputs: Any, steps: int = 3, rate: float = 0.1) -> None:
    """Plain gradient descent on whatever is trainable, towards a ramp over the features."""
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(trainable, lr=rate)
    for _ in range(steps):
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        found = found if isinstance(found, Tensor) else (found.logits if "logits" in found else found[0])
        optimiser.zero_grad()
        (found.float() - torch.linspace(-2, 2, found.shape[-1])).square().mean().backward()
        optimiser.step()
    model.eval()


# -- transformers --

VOCAB = 30
BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


needs_graphs = pytest.mark.skipif(not HAS_GRAPHS, reason="this torch is too old to compile or export with")


def bert(seed: int = 0, **fields: Any) -> nn.Module:
    torch.manual_seed(seed)
    return _biased(AutoModel.from_config(BertConfig(**BERT, **fields)).eval())


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return _biased(AutoModelForSequenceClassification.from_config(BertConfig(**BERT, num_labels=3)).eval())


def gpt2(seed: int = 0, **fields: Any) -> nn.Module:
    torch.manual_seed(seed)
    return _biased(AutoModelForCausalLM.from_config(GPT2Config(**GPT2 | fields)).eval())


def _biased(model: nn.Module) -> nn.Module:
    """Biases are born as zeros, which hides whatever forgets them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(rows: int = B, length: int = 6, seed: int = 1) -> dict[str, Tensor]:
    """Token ids and a mask with padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": torch.randint(3, VOCAB, (rows, length), generator=generator), "attention_mask": mask}


# -- a model as it was --


def digest(tensors: dict[str, Any]) -> dict[str, str]:
    """A hash of the bytes of each tensor, by name."""
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[name] = f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"
    return found


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def record(model: nn.Module) -> dict[str, Any]:
    """Everything that a refused call must leave as it was."""
    configs = {
        name: {adapter: dict(vars(config)) for adapter, config in module.__dict__["peft_config"].items()}
        for name, module in model.named_modules()
        if "peft_config" in module.__dict__
    }
    return {
        "modules": {name: (type(module), id(module)) for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            (name, kind): len(getattr(module, kind))
            for name, module in model.named_modules()
            for kind in HOOKS
            if getattr(module, kind)
        },
        "scopes": [name for name, module in model.named_modules() if "bio_scope" in module.__dict__],
        "tensors": digest(model.state_dict()),
        "configs": configs,
        "loaded": getattr(model, "_hf_peft_config_loaded", None),
        "active": [layer.active_adapters for layer in bio_layers(model)],
        "merged": [list(layer.merged_adapters) for layer in bio_layers(model)],
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """The model after the block is the model before it, in every respect that can be seen."""
    before = record(model)
    yield
    after = record(model)
    for aspect, value in before.items():
        assert after[aspect] == value, aspect
