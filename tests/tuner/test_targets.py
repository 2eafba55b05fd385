"""The default targets, held against real modules of every model type that the installed transformers knows."""

from __future__ import annotations

from dataclasses import dataclass, field

import peft.utils.constants as peft_constants
import pytest
import torch
import transformers
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from bioadapt.tuner.targets import EMBEDDINGS, HEAD, RESIDUAL_WRITERS, residual_writers

D, WIDE, LAYERS, VOCAB = 32, 48, 2, 50
KINDS = (nn.Linear, Conv1D, nn.Conv2d)
REMOTE_CODE = {
    name: "lives in remote code only, transformers has no such model"
    for name in ("RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7")
}
# Blocks of these write into the stream through something else too, which the defaults leave alone.
OTHER_WRITERS = {
    "gemma4": "every block also adds its per-layer embedding",
    "gemma4_text": "every block also adds its per-layer embedding",
    "llama4": "the routed experts are fused parameters, not modules",
    "llama4_text": "the routed experts are fused parameters, not modules",
    "gpt_oss": "the experts are fused parameters, not modules",
    "mixtral": "the experts are fused parameters, not modules",
    "qwen3_moe": "the experts are fused parameters, not modules",
    "nemotron_h": "Mamba mixers and routed experts write as well",
}


@dataclass
class Blocks:
    """Equal blocks at ``path``, a format string: each has the modules ``writers``, which put out ``width`` features."""

    path: str
    writers: list[str]
    width: int = D
    which: tuple[int, ...] = tuple(range(LAYERS))

    @property
    def paths(self) -> list[str]:
        return [self.path.format(index) for index in self.which]

    @property
    def expected(self) -> dict[str, int]:
        return {f"{path}.{writer}": self.width for path in self.paths for writer in self.writers}


@dataclass
class Case:
    blocks: list[Blocks]
    config: dict = field(default_factory=dict)
    model_type: str = ""

    @property
    def expected(self) -> dict[str, int]:
        return {name: width for blocks in self.blocks for name, width in blocks.expected.items()}


# One set of sizes per family, in which only the stream is D wide.
TEXT = dict(
    vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=WIDE,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA = TEXT | dict(num_key_value_heads=2, head_dim=12)
GPT2 = dict(vocab_size=VOCAB, n_embd=D, n_layer=LAYERS, n_head=4, n_inner=WIDE, bos_token_id=1, eos_token_id=2)
BART = dict(
    vocab_size=VOCAB, d_model=D, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=WIDE, decoder_ffn_dim=WIDE,
)  # fmt: skip
OPT = TEXT | dict(ffn_dim=WIDE, word_embed_proj_dim=D)
T5 = dict(vocab_size=VOCAB, d_model=D, d_kv=6, d_ff=WIDE, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0)
VIT = dict(
    hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=WIDE, image_size=16, patch_size=8
)
VISION_HOST = VIT | dict(hidden_size=40)
QWEN_VL_TEXT = TEXT | dict(
    num_key_value_heads=2, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4)
)
QWEN_VL_VISION = dict(depth=2, hidden_size=40, num_heads=4, intermediate_size=WIDE, out_hidden_size=D, patch_size=4)
GEMMA4_TEXT = LLAMA | dict(
    global_head_dim=12, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB,
    num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
LLAMA4_TEXT = LLAMA | dict(
    intermediate_size_mlp=WIDE, num_local_experts=2, interleave_moe_layer_step=2, layer_types=None
)

BERT_BLOCKS = [Blocks("encoder.layer.{}", ["attention.output.dense", "output.dense"])]
LLAMA_BLOCKS = [Blocks("layers.{}", ["self_attn.o_proj", "mlp.down_proj"])]
GPT2_BLOCKS = [Blocks("h.{}", ["attn.c_proj", "mlp.c_proj"])]
GPTJ_BLOCKS = [Blocks("h.{}", ["attn.out_proj", "mlp.fc_out"])]
BART_BLOCKS = [
    Blocks("encoder.layers.{}", ["self_attn.out_proj", "fc2"]),
    Blocks("decoder.layers.{}", ["self_attn.out_proj", "encoder_attn.out_proj", "fc2"]),
]
T5_BLOCKS = [
    Blocks("encoder.block.{}", ["layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"]),
    Blocks("decoder.block.{}", ["layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"]),
]
VIT_BLOCKS = [Blocks("layers.{}", ["attention.o_proj", "mlp.fc2"])]
CLIP_WRITERS = ["self_attn.out_proj", "mlp.fc2"]
CLIP_BLOCKS = [Blocks("encoder.layers.{}", CLIP_WRITERS)]
TWO_TOWERS = [
    Blocks("text_model.encoder.layers.{}", CLIP_WRITERS),
    Blocks("vision_model.encoder.layers.{}", CLIP_WRITERS, width=40),
]
LANGUAGE_BLOCKS = [Blocks("language_model.layers.{}", ["self_attn.o_proj", "mlp.down_proj"])]
CONVNEXT = dict(
    hidden_sizes=[16, D, 40, WIDE], depths=[1, 2, 1, 1], image_size=32, patch_size=2, layer_scale_init_value=1.0
)
CONVNEXT_BLOCKS = [
    Blocks(f"encoder.stages.{stage}.layers.{{}}", ["pwconv2"], width, tuple(range(depth)))
    for stage, (width, depth) in enumerate(zip(CONVNEXT["hidden_sizes"], CONVNEXT["depths"], strict=True))
]
RESNET = dict(embedding_size=16, hidden_sizes=[D, WIDE], depths=[2, 1])


def resnet_blocks(last: int) -> list[Blocks]:
    writer = [f"layer.{last}.convolution"]
    return [
        Blocks("encoder.stages.0.layers.{}", writer, D, (0, 1)),
        Blocks("encoder.stages.1.layers.{}", writer, WIDE, (0,)),
    ]


CASES = {
    "albert": Case(
        [Blocks("encoder.albert_layer_groups.{}.albert_layers.0", ["attention.dense", "ffn_output"], which=(0,))],
        TEXT | dict(embedding_size=16),
    ),
    "bert": Case(BERT_BLOCKS, TEXT),
    "bert with cross-attention": Case(
        [Blocks("encoder.layer.{}", ["attention.output.dense", "crossattention.output.dense", "output.dense"])],
        TEXT | dict(is_decoder=True, add_cross_attention=True),
    ),
    "camembert": Case(BERT_BLOCKS, TEXT),
    "deberta": Case(BERT_BLOCKS, TEXT),
    "deberta-v2": Case(BERT_BLOCKS, TEXT),
    "distilbert": Case(
        [Blocks("transformer.layer.{}", ["attention.out_lin", "ffn.lin2"])],
        dict(vocab_size=VOCAB, dim=D, n_layers=LAYERS, n_heads=4, hidden_dim=WIDE),
    ),
    "electra": Case(BERT_BLOCKS, TEXT | dict(embedding_size=16)),
    "eurobert": Case(LLAMA_BLOCKS, TEXT | dict(num_key_value_heads=4)),
    "layoutlm": Case(BERT_BLOCKS, TEXT),
    "modernbert": Case([Blocks("layers.{}", ["attn.Wo", "mlp.Wo"])], TEXT),
    "mpnet": Case([Blocks("encoder.layer.{}", ["attention.attn.o", "output.dense"])], TEXT),
    "roberta": Case(BERT_BLOCKS, TEXT),
    "xlm-roberta": Case(BERT_BLOCKS, TEXT),
    "bart": Case(BART_BLOCKS, BART),
    "mbart": Case(BART_BLOCKS, BART),
    "mt5": Case(T5_BLOCKS, T5),
    "t5": Case(T5_BLOCKS, T5),
    "whisper": Case(
        BART_BLOCKS,
        BART
        | dict(num_mel_bins=8, max_source_positions=8, max_target_positions=16, pad_token_id=0)
        | dict(bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
    ),
    "bloom": Case(
        [Blocks("h.{}", ["self_attention.dense", "mlp.dense_4h_to_h"])],
        dict(vocab_size=VOCAB, hidden_size=D, n_layer=LAYERS, n_head=4),
    ),
    "codegen": Case(GPTJ_BLOCKS, GPT2 | dict(rotary_dim=4)),
    "falcon": Case([Blocks("h.{}", ["self_attention.dense", "mlp.dense_4h_to_h"])], TEXT),
    "gemma": Case(LLAMA_BLOCKS, LLAMA),
    "gemma2": Case(LLAMA_BLOCKS, LLAMA),
    "gemma3_text": Case(LLAMA_BLOCKS, LLAMA),
    "gemma4_text": Case(LLAMA_BLOCKS, GEMMA4_TEXT),
    "gpt2": Case(GPT2_BLOCKS, GPT2),
    "gpt2 with cross-attention": Case(
        [Blocks("h.{}", ["attn.c_proj", "crossattention.c_proj", "mlp.c_proj"])], GPT2 | dict(add_cross_attention=True)
    ),
    "gpt_bigcode": Case(GPT2_BLOCKS, GPT2),
    "gpt_neo": Case(
        [Blocks("h.{}", ["attn.attention.out_proj", "mlp.c_proj"])],
        dict(vocab_size=VOCAB, hidden_size=D, num_layers=LAYERS, num_heads=4, intermediate_size=WIDE)
        | dict(attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2),
    ),
    "gpt_neox": Case([Blocks("layers.{}", ["attention.dense", "mlp.dense_4h_to_h"])], TEXT),
    "gpt_oss": Case(
        [Blocks("layers.{}", ["self_attn.o_proj"])], LLAMA | dict(num_local_experts=2, num_experts_per_tok=1)
    ),
    "gptj": Case(GPTJ_BLOCKS, GPT2 | dict(rotary_dim=4)),
    "llama": Case(LLAMA_BLOCKS, LLAMA),
    "llama4_text": Case(
        [
            Blocks("layers.{}", ["self_attn.o_proj"]),
            Blocks("layers.{}", ["feed_forward.down_proj"], which=(0,)),
            Blocks("layers.{}", ["feed_forward.shared_expert.down_proj"], which=(1,)),
        ],
        LLAMA4_TEXT,
    ),
    "mistral": Case(LLAMA_BLOCKS, LLAMA),
    "mixtral": Case([Blocks("layers.{}", ["self_attn.o_proj"])], LLAMA | dict(num_local_experts=2)),
    "mpt": Case(
        [Blocks("blocks.{}", ["attn.out_proj", "ffn.down_proj"])],
        dict(vocab_size=VOCAB, d_model=D, n_layers=LAYERS, n_heads=4, max_seq_len=32),
    ),
    "nemotron_h": Case(
        [
            Blocks("layers.{}.mixer", ["o_proj"], which=(1,)),
            Blocks("layers.{}.mixer", ["down_proj"], which=(2,)),
            Blocks("layers.{}.mixer", ["shared_experts.down_proj"], which=(3,)),
        ],
        LLAMA
        | dict(layers_block_type=["mamba", "attention", "mlp", "moe"], mamba_num_heads=4, mamba_head_dim=12)
        | dict(n_groups=2, ssm_state_size=8, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=20),
    ),
    "olmo2": Case(LLAMA_BLOCKS, TEXT | dict(num_key_value_heads=2)),
    "opt": Case([Blocks("decoder.layers.{}", ["self_attn.out_proj", "fc2"])], OPT),
    "phi": Case([Blocks("layers.{}", ["self_attn.dense", "mlp.fc2"])], TEXT),
    "phi3": Case(LLAMA_BLOCKS, LLAMA | dict(head_dim=8)),
    "qwen2": Case(LLAMA_BLOCKS, TEXT | dict(num_key_value_heads=2)),
    "qwen3": Case(LLAMA_BLOCKS, LLAMA),
    "qwen3_moe": Case(
        [Blocks("layers.{}", ["self_attn.o_proj"]), Blocks("layers.{}", ["mlp.down_proj"], which=(0,))],
        LLAMA | dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=20, mlp_only_layers=[0]),
    ),
    "rwkv": Case(
        [Blocks("blocks.{}", ["attention.output", "feed_forward.value"])],
        TEXT | dict(attention_hidden_size=D, context_length=16),
    ),
    "smollm3": Case(LLAMA_BLOCKS, TEXT | dict(num_key_value_heads=2)),
    "stablelm": Case(LLAMA_BLOCKS, TEXT | dict(num_key_value_heads=2)),
    "convnext": Case(CONVNEXT_BLOCKS, CONVNEXT),
    "convnextv2": Case(CONVNEXT_BLOCKS, CONVNEXT),
    "deit": Case(VIT_BLOCKS, VIT),
    "dinov2": Case(
        [Blocks("encoder.layer.{}", ["attention.o_proj", "mlp.fc2"])], VIT | dict(mlp_ratio=2, use_swiglu_ffn=False)
    ),
    "dinov2 with a gated MLP": Case(
        [Blocks("encoder.layer.{}", ["attention.o_proj", "mlp.down_proj"])], VIT | dict(use_swiglu_ffn=True)
    ),
    "resnet": Case(resnet_blocks(2), RESNET),
    "resnet of basic blocks": Case(resnet_blocks(1), RESNET | dict(layer_type="basic")),
    "swin": Case(
        [
            Blocks(f"encoder.layers.{stage}.blocks.{{}}", ["attention.o_proj", "mlp.fc2"], width=width)
            for stage, width in enumerate((D, 2 * D))
        ],
        dict(embed_dim=D, depths=[2, 2], num_heads=[2, 4], window_size=2, image_size=16, patch_size=2),
    ),
    "vit": Case(VIT_BLOCKS, VIT),
    "beit": Case(VIT_BLOCKS, VIT),
    "dinov3_vit": Case([Blocks("model.layer.{}", ["attention.o_proj", "mlp.down_proj"])], VIT),
    "wav2vec2": Case(
        [Blocks("encoder.layers.{}", ["attention.out_proj", "feed_forward.output_dense"])],
        TEXT
        | dict(conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 4), num_feat_extract_layers=2)
        | dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
    ),
    "blip-2": Case(
        [Blocks("language_model.model.decoder.layers.{}", ["self_attn.out_proj", "fc2"])],
        dict(vision_config=VISION_HOST, qformer_config=TEXT | dict(encoder_hidden_size=40))
        | dict(text_config=OPT | dict(model_type="opt"), num_query_tokens=3),
    ),
    "blip-2 over t5": Case(
        [Blocks(f"language_model.{part.path}", part.writers) for part in T5_BLOCKS],
        dict(vision_config=VISION_HOST, qformer_config=TEXT | dict(encoder_hidden_size=40))
        | dict(text_config=T5 | dict(model_type="t5"), num_query_tokens=3),
    ),
    "clip": Case(TWO_TOWERS, dict(text_config=TEXT, vision_config=VISION_HOST, projection_dim=24)),
    "clip_text_model": Case(CLIP_BLOCKS, TEXT),
    "clip_vision_model": Case(CLIP_BLOCKS, VIT),
    "gemma3": Case(LANGUAGE_BLOCKS, dict(text_config=LLAMA, vision_config=VISION_HOST, mm_tokens_per_image=1)),
    "gemma4": Case(LANGUAGE_BLOCKS, dict(text_config=GEMMA4_TEXT)),
    "llama4": Case(
        [
            Blocks("language_model.model.layers.{}", ["self_attn.o_proj"]),
            Blocks("language_model.model.layers.{}", ["feed_forward.down_proj"], which=(0,)),
            Blocks("language_model.model.layers.{}", ["feed_forward.shared_expert.down_proj"], which=(1,)),
        ],
        dict(text_config=LLAMA4_TEXT, vision_config=VISION_HOST | dict(vision_output_dim=24)),
    ),
    "llava": Case(
        LANGUAGE_BLOCKS,
        dict(
            text_config=LLAMA | dict(model_type="llama"),
            vision_config=VISION_HOST | dict(model_type="clip_vision_model"),
        ),
    ),
    "qwen2_5_vl": Case(
        LANGUAGE_BLOCKS,
        dict(text_config=QWEN_VL_TEXT, vision_config=QWEN_VL_VISION | dict(fullatt_block_indexes=[1])),
    ),
    "qwen3_vl": Case(
        LANGUAGE_BLOCKS,
        dict(
            text_config=QWEN_VL_TEXT | dict(head_dim=8),
            vision_config=QWEN_VL_VISION | dict(num_position_embeddings=16, deepstack_visual_indexes=[0]),
        ),
    ),
    "siglip": Case(TWO_TOWERS, dict(text_config=TEXT | dict(projection_size=40), vision_config=VISION_HOST)),
    "siglip_text_model": Case(CLIP_BLOCKS, TEXT),
    "siglip_vision_model": Case(CLIP_BLOCKS, VIT),
}
for _name, _case in CASES.items():
    _case.model_type = next(part for part in (_name, _name.split()[0]) if part in RESIDUAL_WRITERS)

AUTO_HEADS = [
    getattr(transformers, name)
    for name in (
        "AutoModelForCausalLM", "AutoModelForImageClassification", "AutoModelForImageTextToText",
        "AutoModelForMaskedLM", "AutoModelForMultipleChoice", "AutoModelForPreTraining",
        "AutoModelForQuestionAnswering", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    )
]  # fmt: skip


def configuration(case: Case) -> transformers.PreTrainedConfig:
    if case.model_type in REMOTE_CODE:
        pytest.skip(REMOTE_CODE[case.model_type])
    if case.model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no model type {case.model_type}")
    return AutoConfig.for_model(case.model_type, **case.config, architectures=[])


def base_model(config: transformers.PreTrainedConfig) -> nn.Module:
    if config.model_type == "siglip_text_model":  # no AutoModel
        return transformers.SiglipTextModel(config)
    return AutoModel.from_config(config)


def matched(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that PEFT itself picks when it is given the defaults."""
    config = LoraConfig(target_modules=residual_writers(model.config.to_dict()))
    return {name: module for name, module in model.named_modules() if check_target_module_exists(config, name)}


def out_features(module: nn.Module) -> int:
    if isinstance(module, Conv1D):
        return module.nf
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def test_every_model_type_with_peft_defaults_has_ours():
    mappings = [value for name, value in vars(peft_constants).items() if name.startswith("TRANSFORMERS_MODELS_TO_")]
    assert len(mappings) > 30
    assert {model_type for mapping in mappings for model_type in mapping} <= set(RESIDUAL_WRITERS)


def test_every_model_type_is_checked_here_or_known_to_be_out_of_reach():
    assert {case.model_type for case in CASES.values()} | set(REMOTE_CODE) == set(RESIDUAL_WRITERS)
    assert not set(REMOTE_CODE) & set(CONFIG_MAPPING_NAMES)


def of_type(name: str) -> pytest.param:
    marks = [] if name in REMOTE_CODE else pytest.mark.compatible("Model types with default targets", name)
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [of_type(name) for name in (*CASES, *REMOTE_CODE)])
def test_defaults_match_exactly_the_residual_writers(name):
    case = CASES.get(name, Case([], model_type=name))
    with torch.device("meta"):
        model = base_model(configuration(case))
    found = matched(model)
    assert {name: out_features(module) for name, module in found.items()} == case.expected
    assert all(isinstance(module, KINDS) for module in found.values())


@pytest.mark.parametrize("name", CASES)
def test_defaults_hit_nothing_in_heads(name):
    config = configuration(CASES[name])
    heads = [head for head in AUTO_HEADS if type(config) in head._model_mapping]
    for head in heads:
        with torch.device("meta"):
            found = matched(head.from_config(config))
        assert found, head
        for module_name in found:  # a head model nests the base, or takes one tower of it
            assert any(
                f".{module_name}".endswith(f".{expected}") or expected.endswith(module_name.removeprefix("model"))
                for expected in CASES[name].expected
            ), module_name


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.model_type not in OTHER_WRITERS])
@torch.no_grad()
def test_blocks_reach_the_stream_through_the_targets_alone(name):
    """With silent targets, whatever else a block computes makes no difference."""
    case = CASES[name]
    torch.manual_seed(0)
    model = base_model(configuration(case)).eval()
    found = matched(model)
    loud = model_output(model)
    for module in found.values():
        for parameter in module.parameters():
            parameter.zero_()
    silent = model_output(model)
    for path in (path for blocks in case.blocks for path in blocks.paths):
        for inner_name, inner in model.get_submodule(path).named_modules():
            if isinstance(inner, KINDS) and f"{path}.{inner_name}" not in found and "shortcut" not in inner_name:
                inner.weight.normal_()
    assert not torch.allclose(loud, silent, atol=1e-4)
    assert torch.equal(model_output(model), silent)


def model_output(model: nn.Module) -> torch.Tensor:
    config = model.config
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB - 1, (2, 6), generator=generator)
    tokens[:, -1] = 2  # CLIP reads its text at the end-of-sequence token
    inputs = {}
    if config.model_type == "wav2vec2":
        return model(torch.randn(2, 800, generator=generator))[0]
    if config.model_type == "whisper":
        inputs = {"input_features": torch.randn(2, 8, 16, generator=generator)}
    elif model.main_input_name == "pixel_values" or hasattr(config, "vision_config"):
        image_size = getattr(getattr(config, "vision_config", config), "image_size", 32)
        inputs = {"pixel_values": torch.randn(2, 3, image_size, image_size, generator=generator)}
    if model.main_input_name == "input_ids" or hasattr(config, "text_config"):
        inputs["input_ids"] = tokens
    if hasattr(config, "text_config") and config.model_type in ("gemma3", "llava", "blip-2", "qwen2_5_vl", "qwen3_vl"):
        del inputs["pixel_values"]  # the language model alone
        model = model.language_model
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    if getattr(model.config, "add_cross_attention", False):
        inputs["encoder_hidden_states"] = torch.randn(2, 5, D, generator=generator)
    output = model(**inputs)
    if "logits_per_image" in output:
        return torch.cat([output.text_embeds, output.image_embeds])
    return output[0]


@pytest.mark.parametrize(
    ("model_type", "hit", "missed"),
    [
        ("vit", ["encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense"], ["pooler.dense"]),
        ("deit", ["encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense"], ["pooler.dense"]),
        (
            "swin",
            ["encoder.layers.0.blocks.0.attention.output.dense", "encoder.layers.0.blocks.0.output.dense"],
            ["encoder.layers.0.blocks.0.intermediate.dense", "encoder.layers.0.downsample.reduction"],
        ),
        (
            "dinov2",
            ["encoder.layer.0.attention.output.dense", "encoder.layer.0.mlp.fc2", "encoder.layer.1.mlp.weights_out"],
            ["encoder.layer.0.mlp.fc1", "encoder.layer.1.mlp.weights_in"],
        ),
        ("siglip", ["vision_model.encoder.layers.0.mlp.fc2"], ["vision_model.head.mlp.fc2"]),
    ],
)
def test_names_of_earlier_transformers_5(model_type, hit, missed):
    config = LoraConfig(target_modules=RESIDUAL_WRITERS[model_type])
    assert [name for name in hit + missed if check_target_module_exists(config, name)] == hit


@pytest.mark.parametrize("name", [of_type(name) for name in EMBEDDINGS if name in CASES or name in REMOTE_CODE])
def test_the_embedding_is_the_one_that_reads_tokens(name):
    with torch.device("meta"):
        model = base_model(configuration(CASES.get(name) or Case([], model_type=name)))
    named = [module for path, module in model.named_modules() if f".{path}".endswith(f".{EMBEDDINGS[name]}")]
    assert named == [model.get_input_embeddings()]


@pytest.mark.parametrize("name", [of_type(name) for name in EMBEDDINGS if name in CASES])
def test_the_head_is_the_one_that_has_a_unit_for_each_word(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration(CASES[name]))
    assert model.get_output_embeddings() is model.get_submodule(HEAD)


def test_unknown_model_types_have_no_default():
    assert residual_writers({"model_type": "custom"}) is None
    assert residual_writers({}) is None
