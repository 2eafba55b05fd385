"""Tiny models of real architectures with random weights: milliseconds to build and to run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .compare import random, seeded
from .template import Template

VOCABULARY, WIDTH, LAYERS = 50, 32, 2
FIRST_WORD = 3  # ids below are special
_BLOCK = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}


@dataclass(frozen=True)
class TinyHost:
    """An architecture, and inputs that fit it.

    Attributes:
        name: key in `HOSTS`.
        architecture: name of the model class in transformers.
        configuration: name of the configuration class, and its arguments.
        reads: ``"text"`` or ``"image"``.
        stream: the input whose tokens the output follows.
        causal: whether a token of the output must not see later tokens of the stream.
        shifts: whether positions count from the first column, so that only padding on the right is invisible.
    """

    name: str
    architecture: str
    configuration: tuple[str, dict[str, Any]]
    reads: str = "text"
    stream: str = "input_ids"
    causal: bool = False
    shifts: bool = False

    def model(self) -> nn.Module:
        """A model in eval mode, the same at every call.

        It is frozen: autograd chooses other attention kernels, which differ in the last bits, where the base trains.
        """
        return _template(self.name).copy()

    def inputs(self, batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
        """What a forward is called with."""
        if self.reads == "image":
            return {"pixel_values": random(batch, 3, 16, 16, seed=seed)}
        found = {"input_ids": words(batch, 9, seed=seed)}
        if self.stream != "input_ids":
            found[self.stream] = words(batch, 7, seed=seed + 1)
        return found

    def output(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Logits, or the last hidden state where there is no head."""
        if self.reads == "image":
            dtype: Any = model.dtype
            inputs = {name: t.to(dtype) if isinstance(t, Tensor) else t for name, t in inputs.items()}
        found = model(**inputs)
        return found.logits if "logits" in found else found.last_hidden_state


def words(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Random ids (batch, tokens) of ordinary words."""
    with seeded(seed):
        return torch.randint(FIRST_WORD, VOCABULARY, (batch, tokens))


def _text(**more: Any) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more}


HOSTS: dict[str, TinyHost] = {
    host.name: host
    for host in (
        TinyHost(
            "bert",
            "BertModel",
            ("BertConfig", _text(**_BLOCK, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
            shifts=True,
        ),
        TinyHost(
            "gpt2",
            "GPT2LMHeadModel",
            (
                "GPT2Config",
                _text(n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_inner=48, n_positions=64)
                | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
            ),
            causal=True,
        ),
        TinyHost("qwen2", "Qwen2ForCausalLM", ("Qwen2Config", _text(**_BLOCK, num_key_value_heads=2)), causal=True),
        TinyHost(
            "t5",
            "T5ForConditionalGeneration",
            (
                "T5Config",
                _text(d_model=WIDTH, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4)
                | {"dropout_rate": 0.0, "decoder_start_token_id": 0},
            ),
            stream="decoder_input_ids",
            causal=True,
        ),
        TinyHost("vit", "ViTModel", ("ViTConfig", {**_BLOCK, "image_size": 16, "patch_size": 4}), reads="image"),
        TinyHost(
            "resnet",
            "ResNetModel",
            ("ResNetConfig", {"embedding_size": 16, "hidden_sizes": [32, 48], "depths": [1, 1]}),
            reads="image",
        ),
    )
}


@cache
def _template(name: str) -> Template:
    host = HOSTS[name]
    configuration, arguments = host.configuration
    with seeded(9):
        model = getattr(transformers, host.architecture)(getattr(transformers, configuration)(**arguments))
        _scatter(model)
    return Template(model.requires_grad_(False).eval())


def _scatter(model: nn.Module) -> None:
    """Move what is born as 0 or 1: a bias of zero would hide that it is forgotten."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # Training leaves nothing in the base, so what differs is the adapter's.
            module.momentum, module.num_batches_tracked = 0.0, None
