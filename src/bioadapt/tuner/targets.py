"""Which modules are adapted when the user names none.

Most primitives go to the projections that write into the residual stream. In a transformer block these are the
attention's output projection and the MLP's down projection, in a decoder with cross-attention that one's output
projection as well; in a convolutional block it is the last convolution. A population of units that the next block reads
is thus complete at the targets, which a query or a value is not.

Gains go where IA3 (Liu et al. 2022) puts its own: to the keys, the values, and the hidden units of the feed-forward
block behind their activation, which are the input of its last projection. On BERT and ViT the attention's projection
has the same name, so that its input is adapted too, as by PEFT's IA3.

What compares tokens as such goes to the embedding of a language model, where equal tokens are equal. What has a unit
for each word goes to its head.

Values are read as PEFT reads ``target_modules``: a list holds suffixes of module names, a string is a regular
expression for the whole name. Suffixes are as long as needed to miss poolers and heads. Where transformers 5 renamed a
module on the way, both names are listed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import BioConfig
from ..registry import primitive_info

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")

_BERT = ["output.dense"]  # attention.output.dense, crossattention.output.dense and output.dense; not pooler.dense
_BART = ["self_attn.out_proj", "encoder_attn.out_proj", "fc2"]  # not classification_head.out_proj
_T5 = ["SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"]
_GPT2 = ["attn.c_proj", "crossattention.c_proj", "mlp.c_proj"]
_GPTJ = ["attn.out_proj", "mlp.fc_out"]
_NEOX = ["attention.dense", "self_attention.dense", "dense_4h_to_h"]
_LLAMA = ["o_proj", "down_proj"]
_VIT = ["attention.o_proj", "mlp.fc2", "output.dense"]
# A tower's pooling head has an MLP of its own, outside the numbered layers.
_CLIP = r"(.*\.)?layers\.\d+\.(self_attn\.out_proj|mlp\.fc2)"
# Around a language model, the language model alone, as PEFT's own defaults have it.
_LANGUAGE_MODEL = r"(.*\.)?language_model\..*\.(o_proj|down_proj)"
_BLIP2 = r"(.*\.)?language_model\..*\.(self_attn\.out_proj|fc2|SelfAttention\.o|EncDecAttention\.o|DenseReluDense\.wo)"

RESIDUAL_WRITERS: dict[str, list[str] | str] = {
    # text encoders
    "albert": ["attention.dense", "ffn_output"],
    "bert": _BERT,
    "camembert": _BERT,
    "deberta": _BERT,
    "deberta-v2": _BERT,
    "distilbert": ["attention.out_lin", "ffn.lin2"],
    "electra": _BERT,
    "eurobert": _LLAMA,
    "layoutlm": _BERT,
    "modernbert": ["attn.Wo", "mlp.Wo"],
    "mpnet": ["attention.attn.o", "output.dense"],
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    # encoder-decoders
    "bart": _BART,
    "mbart": _BART,
    "mt5": _T5,
    "t5": _T5,
    "whisper": _BART,
    # decoders
    "RefinedWeb": _NEOX,
    "RefinedWebModel": _NEOX,
    "bloom": _NEOX,
    "btlm": _GPT2,
    "chatglm": _NEOX,
    "codegen": _GPTJ,
    "falcon": _NEOX,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gemma4_text": _LLAMA,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_oss": ["o_proj"],  # the experts are fused parameters, not modules
    "gpt_neo": ["attention.out_proj", "mlp.c_proj"],
    "gpt_neox": _NEOX,
    "gptj": _GPTJ,
    "llama": _LLAMA,
    "llama4_text": _LLAMA,  # of the experts, the shared one: the routed ones are fused parameters, not modules
    "mistral": _LLAMA,
    "mixtral": ["o_proj"],  # the experts are fused parameters, not modules
    "mpt": ["attn.out_proj", "ffn.down_proj"],
    "nemotron_h": _LLAMA,  # not the Mamba mixers' out_proj: their kernel reads its weight past any adapter
    "olmo2": _LLAMA,
    "opt": _BART,
    "phi": ["self_attn.dense", "mlp.fc2"],
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": ["o_proj", "mlp.down_proj"],  # of the MLPs, those that are no mixtures of experts
    "rwkv": ["attention.output", "feed_forward.value"],
    "rwkv7": ["o_proj", "ffn.value"],
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    # sound
    "wav2vec2": ["attention.out_proj", "feed_forward.output_dense"],
    # vision
    "beit": _VIT,
    "convnext": ["pwconv2"],
    "convnextv2": ["pwconv2"],
    "deit": _VIT,
    "dinov2": ["attention.o_proj", "attention.output.dense", "mlp.fc2", "mlp.down_proj", "mlp.weights_out"],
    "dinov3_vit": ["attention.o_proj", "mlp.down_proj"],
    "resnet": ["layer.2.convolution"],  # bottleneck blocks; see residual_writers
    "swin": _VIT,
    "vit": _VIT,
    # text and vision
    "blip-2": _BLIP2,
    "clip": _CLIP,
    "clip_text_model": _CLIP,
    "clip_vision_model": _CLIP,
    "gemma3": _LANGUAGE_MODEL,
    "gemma4": _LANGUAGE_MODEL,
    "llama4": _LANGUAGE_MODEL,
    "llava": _LANGUAGE_MODEL,
    "qwen2_5_vl": _LANGUAGE_MODEL,
    "qwen3_vl": _LANGUAGE_MODEL,
    "siglip": _CLIP,
    "siglip_text_model": _CLIP,
    "siglip_vision_model": _CLIP,
}

_GAINS_BERT = (["key", "value", "output.dense"], ["output.dense"])
_GAINS_BART = (["k_proj", "v_proj", "fc2"], ["fc2"])
_GAINS_LLAMA = (["k_proj", "v_proj", "down_proj"], ["down_proj"])
_GAINS_NEOX = (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"])
_GAINS_GPT2 = (["c_attn", "mlp.c_proj"], ["mlp.c_proj"])
_GAINS_VIT = (["k_proj", "v_proj", "key", "value", "mlp.fc2", "output.dense"], ["mlp.fc2", "output.dense"])

# By model type: the modules to adapt, and those of them whose input is adapted.
GAIN_SITES: dict[str, tuple[list[str], list[str]]] = {
    **dict.fromkeys(("bert", "camembert", "electra", "layoutlm", "roberta", "xlm-roberta"), _GAINS_BERT),
    "distilbert": (["k_lin", "v_lin", "ffn.lin2"], ["ffn.lin2"]),
    "mpnet": (["attn.k", "attn.v", "output.dense"], ["output.dense"]),
    **dict.fromkeys(("t5", "mt5"), (["k", "v", "wo"], ["wo"])),
    **dict.fromkeys(("bart", "mbart", "opt", "whisper"), _GAINS_BART),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox", "RefinedWeb", "RefinedWebModel"), _GAINS_NEOX),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GAINS_GPT2),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "stablelm"), _GAINS_LLAMA),
    **dict.fromkeys(("eurobert", "olmo2", "smollm3"), _GAINS_LLAMA),
    "gpt_neo": (["k_proj", "v_proj", "mlp.c_proj"], ["mlp.c_proj"]),
    "gptj": (["k_proj", "v_proj", "fc_out"], ["fc_out"]),
    "phi": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "phi3": (["qkv_proj", "down_proj"], ["down_proj"]),
    **dict.fromkeys(("beit", "deit", "vit"), _GAINS_VIT),
}

# By model type: the embedding of a language model.
EMBEDDINGS: dict[str, str] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "llama", "mistral", "mixtral", "olmo2"), "embed_tokens"),
    **dict.fromkeys(("opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm"), "embed_tokens"),
    **dict.fromkeys(("codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "mpt"), "wte"),
    **dict.fromkeys(("bloom", "falcon", "RefinedWeb", "RefinedWebModel"), "word_embeddings"),
    "gpt_neox": "embed_in",
}
# The head of each of them.
HEAD = "lm_head"


def default_sites(
    config: BioConfig, model_config: Mapping[str, Any]
) -> tuple[list[str] | str | None, list[str] | None]:
    """Default target modules for a model's configuration (as a dict), and those of them whose input is adapted.

    The first is None where no default is known.
    """
    model_type = model_config.get("model_type") or ""
    infos = [primitive_info(entry["name"]) for entry in config.primitives]
    homes = {home_of(info.name, model_type) for info in infos}
    if len(homes) == 1 and None not in homes:
        return [str(home) for home in homes], None
    gains = config.rank is None and all(info.gain for info in infos)
    return (GAIN_SITES.get(model_type) if gains else None) or (residual_writers(model_config), None)


def home_of(primitive: str, model_type: str) -> str | None:
    """What the one module is called where a primitive belongs in models of a type; None where it has no home there."""
    home = primitive_info(primitive).factory.home
    if home is None or model_type not in EMBEDDINGS:
        return None
    return {"embedding": EMBEDDINGS[model_type], "head": HEAD}[home]


def tell_of_homes(config: BioConfig, model_type: str, targets: list[str] | str) -> None:
    """Warn of primitives that the default targets do not have where they belong."""
    for name in (entry["name"] for entry in config.primitives):
        belongs, home = primitive_info(name).factory.home, home_of(name, model_type)
        if belongs is not None and targets != [home]:
            where = f"{home!r}" if home else f"the {belongs} of a language model, and none is known of {model_type!r}"
            ways = "give it a configuration of its own, or target_modules" if home else "give target_modules"
            warnings.warn(f"{name} belongs at {where}, but goes to the default targets {targets}: {ways}")


def residual_writers(model_config: Mapping[str, Any]) -> list[str] | str | None:
    """The default targets for a model's configuration (as a dict), or None where no default is known."""
    model_type = model_config.get("model_type")
    if model_type == "resnet" and model_config.get("layer_type") == "basic":
        return ["layer.1.convolution"]  # basic blocks end one convolution earlier, and names alone do not tell
    return RESIDUAL_WRITERS.get(model_type) if isinstance(model_type, str) else None


def block_of(path: str) -> tuple[int, str] | None:
    """Number of the block that a module belongs to, and its name in there; None outside of numbered blocks."""
    number = _NUMBER.search(path)
    return None if number is None else (int(number[1]), path[number.end() :])


def unmatched(targets: Any, model: nn.Module) -> list[str]:
    """Of a list of target modules, those that no module of the model is called."""
    if not isinstance(targets, (set, list, tuple)):
        return []
    names = [f".{name.replace('.base_layer', '')}" for name, _ in model.named_modules()]
    return sorted(target for target in targets if not any(name.endswith(f".{target}") for name in names))


def fused_experts(model: nn.Module) -> list[str]:
    """Modules that hold the weights of many experts in one tensor, so that there is no layer to adapt."""
    return [
        name
        for name, module in model.named_modules()
        if "expert" in name.rpartition(".")[2] and any(p.dim() == 3 for p in module.parameters(recurse=False))
    ]


def shared_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Modules that are held in several places, with the paths to them: an adapter is put into one place alone."""
    holders: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules():
        for name, child in module._modules.items():
            if child is not None:
                place = path if name == "base_layer" else f"{path}.{name}" if path else name
                holders.setdefault(child, []).append(place)
    return {module: paths for module, paths in holders.items() if len(paths) > 1}
