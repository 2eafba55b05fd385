"""Padding, document borders and the direction of time reach the primitives without the user's doing anything."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from bioadapt import BioConfig, list_primitives
from bioadapt.tuner import placement
from bioadapt.tuner.layer import BioLayer

JUNK = 49
ALL = list_primitives()
SIZES = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48)


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=50, **SIZES))


def qwen(**changes):
    torch.manual_seed(0)
    return Qwen2Model(Qwen2Config(vocab_size=50, num_key_value_heads=2, max_position_embeddings=64, **SIZES, **changes))


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def adapted(model, **settings):
    torch.manual_seed(1)
    settings = {"primitives": ALL, "init_weights": False, **settings}
    return get_peft_model(model, BioConfig(**settings)).eval()


def layer_of(model, path):
    return next(module for module in model.modules() if isinstance(module, BioLayer) and module.path == path)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [bert, qwen], ids=["encoder", "decoder"])
def test_padding_changes_nothing(build, side):
    model = adapted(build())
    ids = torch.randint(3, 48, (1, 6))
    junk = torch.full((1, 4), JUNK)
    parts, real = ([junk, ids], slice(4, 10)) if side == "left" else ([ids, junk], slice(0, 6))
    padded, mask = torch.cat(parts, 1), torch.zeros(1, 10, dtype=torch.long)
    mask[:, real] = 1
    positions = dict(position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    alone = model(input_ids=ids).last_hidden_state
    both = model(input_ids=padded, attention_mask=mask, **positions).last_hidden_state
    torch.testing.assert_close(both[:, real], alone, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_changes_nothing_on_the_injected_path():
    model = bert()
    inject_adapter_in_model(BioConfig(primitives=ALL, init_weights=False), model)
    model.eval()
    ids = torch.randint(3, 48, (1, 6))
    padded = torch.cat([ids, torch.full((1, 4), JUNK)], 1)
    mask = torch.tensor([[1] * 6 + [0] * 4])
    padded_output = model(input_ids=padded, attention_mask=mask).last_hidden_state[:, :6]
    torch.testing.assert_close(padded_output, model(input_ids=ids).last_hidden_state, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_masks_given_by_position_are_found():
    model = adapted(bert(), primitives=["short_term_depression"])
    ids, mask = torch.randint(3, 48, (2, 6)), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    named = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(model(ids, mask).last_hidden_state, named)


@torch.no_grad()
def test_encoder_and_decoder_have_masks_of_their_own():
    model = adapted(t5(), target_modules=["q", "k", "v", "o", "wi", "wo"])
    source, target = torch.randint(3, 48, (1, 5)), torch.randint(3, 48, (1, 4))
    padded = torch.cat([source, torch.full((1, 4), JUNK)], 1)
    mask = torch.tensor([[1] * 5 + [0] * 4])
    alone = model(input_ids=source, decoder_input_ids=target).logits
    both = model(input_ids=padded, attention_mask=mask, decoder_input_ids=target).logits
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)  # through all primitives at every projection
    longer = torch.cat([target, torch.full((1, 3), JUNK)], 1)
    cut = model(input_ids=source, decoder_input_ids=longer).logits[:, :4]
    torch.testing.assert_close(cut, alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_packed_documents_are_separate():
    # An all-attending stack would mix the documents itself; transformers keeps packed documents apart by position.
    model = adapted(qwen(attn_implementation="sdpa"))
    first, second = torch.randint(3, 48, (1, 5)), torch.randint(3, 48, (1, 7))
    packed = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    both = model(input_ids=packed, position_ids=positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(both[:, :5], model(input_ids=first).last_hidden_state, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(both[:, 5:], model(input_ids=second).last_hidden_state, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_time_runs_backwards_only_in_decoders_and_both_ways_in_encoders():
    ids = torch.randint(3, 48, (1, 8))
    changed = ids.clone()
    changed[0, 5] = 3
    decoder = adapted(qwen())
    a, b = (decoder(input_ids=x).last_hidden_state for x in (ids, changed))
    assert torch.equal(a[:, :5], b[:, :5])
    # The attention of this encoder is silenced, so that only the adapter can carry anything between tokens.
    encoder = bert()
    for layer in encoder.encoder.layer:
        layer.attention.self.value.weight.zero_()
        layer.attention.self.value.bias.zero_()
    encoder = adapted(encoder, primitives=["short_term_depression"], target_modules=["query", "output.dense"])
    a, b = (encoder(input_ids=x).last_hidden_state for x in (ids, changed))
    assert (a[:, 2] != b[:, 2]).any() and (a[:, 7] != b[:, 7]).any()


def test_direction_of_time_is_found_for_every_tower():
    def causal(model, path):
        return layer_of(get_peft_model(model, BioConfig(primitives=["short_term_depression"])), path).causal

    assert not causal(bert(), "encoder.layer.0.output.dense")
    assert causal(BertModel(BertConfig(is_decoder=True, vocab_size=50, **SIZES)), "encoder.layer.0.output.dense")
    assert causal(qwen(), "layers.0.mlp.down_proj")
    assert causal(t5(), "decoder.block.1.layer.2.DenseReluDense.wo")
    assert not causal(t5(), "encoder.block.1.layer.1.DenseReluDense.wo")
    vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES))
    path = next(name for name, module in vit.named_modules() if name.endswith("fc2") or name.endswith("output.dense"))
    assert not causal(vit, path)
    text = CLIPTextConfig(vocab_size=50, max_position_embeddings=16, **SIZES)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **SIZES)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    towers = get_peft_model(clip, BioConfig(primitives=["short_term_depression"])).base_model.layers()
    assert {layer.path.split(".")[0]: layer.causal for layer in towers} == {"text_model": True, "vision_model": False}


def bigbird_pegasus():
    sizes = dict(
        d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=32
    )
    return transformers.BigBirdPegasusForCausalLM(transformers.BigBirdPegasusConfig(vocab_size=50, **sizes))


def of_bart_kind(name, **settings):
    config = getattr(transformers, f"{name}Config")(vocab_size=50, d_model=32, **BART, **settings)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


BART = {
    f"{part}_{what}": size
    for part in ("encoder", "decoder")
    for what, size in dict(layers=1, attention_heads=4, ffn_dim=48).items()
}
DECODERS = {
    "bigbird_pegasus": bigbird_pegasus,  # its attention says is_decoder, but not is_causal
    "led": lambda: of_bart_kind("LED", attention_window=8),  # says is_decoder alone
    "mvp": lambda: of_bart_kind("Mvp"),
    "bart": lambda: of_bart_kind("Bart"),
    "t5": t5,
}


@torch.no_grad()
@pytest.mark.parametrize("build", DECODERS.values(), ids=DECODERS)
def test_no_decoder_and_no_head_on_one_sees_a_later_token(build):
    torch.manual_seed(0)
    model = build()
    side = "decoder_" if model.config.is_encoder_decoder else ""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    model = adapted(model, primitives=["short_term_depression"], target_modules=linear)
    ids = torch.randint(3, 48, (1, 8))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 48
    a, b = (model(**{"input_ids": ids, f"{side}input_ids": x}).logits for x in (ids, changed))
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.equal(a[:, 5:], b[:, 5:])


@pytest.mark.parametrize(
    "around", ["EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "cross_attention"]
)
def test_keys_and_values_of_cross_attention_read_the_encoder(around):
    projections = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj")})
    model = torch.nn.ModuleDict({around: projections, "self_attn": projections})
    assert (
        placement.Places(model).of(f"{around}.k_proj").reads_encoder
        and placement.Places(model).of(f"{around}.v_proj").reads_encoder
    )
    assert not placement.Places(model).of(f"{around}.q_proj").reads_encoder
    assert not placement.Places(model).of("self_attn.k_proj").reads_encoder


@torch.no_grad()
def test_cross_attention_within_one_model_has_that_models_padding():
    torch.manual_seed(0)
    config = transformers.PerceiverConfig(
        num_latents=4, d_latents=32, d_model=16, num_blocks=1, num_self_attends_per_block=1, num_cross_attention_heads=2
    )
    perceiver = transformers.PerceiverModel(config)
    assert not placement.Places(perceiver).of("encoder.cross_attention.attention.self.key").reads_encoder
    reads = ["cross_attention.attention.self.key", "cross_attention.attention.self.value"]
    model = adapted(perceiver, primitives=["short_term_depression"], target_modules=reads)
    short = torch.randn(1, 5, 16)
    padded, mask = torch.cat([short, torch.ones(1, 3, 16)], 1), torch.ones(1, 8, dtype=torch.long)
    mask[0, 5:] = 0
    alone = model(inputs=short, attention_mask=mask[:, :5]).last_hidden_state
    assert torch.allclose(model(inputs=padded, attention_mask=mask).last_hidden_state, alone, atol=1e-5)


def fsmt():
    """Encoder and decoder are no models of their own, and lay time first."""
    torch.manual_seed(0)
    quiet = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    config = transformers.FSMTConfig(
        langs=["en", "de"],
        src_vocab_size=50,
        tgt_vocab_size=50,
        d_model=32,
        max_position_embeddings=32,
        **BART,
        **quiet,
    )
    return transformers.FSMTForConditionalGeneration(config).eval()


@torch.no_grad()
def test_an_encoder_that_is_no_model_of_its_own_has_its_own_padding():
    linear = [name for name, module in fsmt().named_modules() if isinstance(module, torch.nn.Linear)]
    model = adapted(fsmt(), primitives=["short_term_depression"], target_modules=linear)
    short, long = torch.randint(3, 48, (1, 5)), torch.randint(3, 48, (1, 8))
    padded = torch.cat([torch.cat([short, torch.ones(1, 3, dtype=torch.long)], 1), long])
    mask = torch.ones_like(padded)
    mask[0, 5:] = 0
    said = torch.randint(3, 48, (1, 6))
    alone = model(input_ids=short, attention_mask=mask[:1, :5], decoder_input_ids=said).logits
    together = model(input_ids=padded, attention_mask=mask, decoder_input_ids=said.expand(2, -1)).logits
    assert torch.allclose(together[:1], alone, atol=1e-5)


def test_the_user_may_say_which_way_time_runs():
    model = get_peft_model(qwen(), BioConfig(primitives=["short_term_depression"], causal=False))
    assert not any(layer.causal for layer in model.base_model.layers())


@torch.no_grad()
def test_a_mask_that_is_not_understood_is_refused_only_where_it_matters():
    ids, mask = torch.randint(3, 48, (2, 6)), torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[:, :, 4, 3] = False  # a token that does not see the one before it, and yet begins no document
    with pytest.raises(ValueError, match="attention_mask is no sequence of documents.*Pass attention_mask as"):
        adapted(qwen(), primitives=["short_term_depression"])(input_ids=ids, attention_mask=mask)
    adapted(qwen(), primitives=["lateral_inhibition"])(input_ids=ids, attention_mask=mask)


@torch.no_grad()
def test_an_error_in_the_forward_leaves_nothing_behind():
    model = adapted(bert())
    ids = torch.randint(3, 48, (2, 6))
    before = model(input_ids=ids).last_hidden_state
    with pytest.raises(Exception):  # noqa: B017 - whatever the model itself raises for a token it does not have
        model(input_ids=ids + 100)
    assert all(layer.scope.flow.around is None for layer in model.base_model.layers())
    assert torch.equal(model(input_ids=ids).last_hidden_state, before)


@torch.no_grad()
def test_single_vectors_have_no_time_axis():
    # A pooler sees one vector per sample: the batch must not be taken for time.
    model = adapted(bert(), primitives=["short_term_depression", "predictive_coding"], target_modules=["pooler.dense"])
    ids = torch.randint(3, 48, (3, 6))
    together = model(input_ids=ids).pooler_output
    alone = torch.cat([model(input_ids=row[None]).pooler_output for row in ids])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_lora_below_is_called_with_the_same_surroundings():
    lora = get_peft_model(bert(), LoraConfig(target_modules=["query"], init_lora_weights=False))
    model = adapted(lora, target_modules=["query"])
    ids = torch.randint(3, 48, (1, 6))
    padded, mask = torch.cat([ids, torch.full((1, 4), JUNK)], 1), torch.tensor([[1] * 6 + [0] * 4])
    output = model(input_ids=padded, attention_mask=mask).last_hidden_state[:, :6]
    torch.testing.assert_close(output, model(input_ids=ids).last_hidden_state, atol=2e-5, rtol=1e-4)
