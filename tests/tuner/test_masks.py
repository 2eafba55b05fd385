"""Masks of every form: padded equals alone, or a refusal at the first forward that says what to do."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from bioadapt import BioConfig
from bioadapt.tuner.masks import SAY_SOMETHING_ELSE, Unclear, all_real, read_mask

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
LOWEST = torch.finfo(torch.float32).min


def adapted(model, primitives=("short_term_depression", "oscillatory_gating"), **fields):
    torch.manual_seed(1)
    return get_peft_model(model, BioConfig(primitives=list(primitives), init_weights=False, **fields)).eval()


def qwen(**fields):
    torch.manual_seed(0)
    tokens = dict(vocab_size=50, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    config = transformers.Qwen2Config(num_key_value_heads=1, max_position_embeddings=64, **SIZES, **tokens, **fields)
    return transformers.Qwen2ForCausalLM(config)


def bert():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **SIZES))


def ids(rows, length, seed=3):
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


# -- the translation by itself --


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def pairs(mask, structure):
    """The mask of pairs that attention gets for a mask of tokens (B, T)."""
    return (structure & mask[:, None, :].bool())[:, None]


PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("structure", [causal(5), torch.ones(5, 5, dtype=torch.bool)], ids=["causal", "both ways"])
@pytest.mark.parametrize(
    "form",
    [
        lambda mask: mask,
        lambda mask: mask.long(),
        lambda mask: mask[:, 0],
        lambda mask: torch.where(mask, 0.0, LOWEST),
        lambda mask: torch.where(mask, 0.0, -torch.inf).half(),
        lambda mask: mask.expand(-1, 4, -1, -1),
        lambda mask: {"sliding_attention": mask & causal(5), "full_attention": mask},
    ],
    ids=["bool", "int", "three axes", "additive", "half", "heads", "by kind"],
)
def test_a_mask_of_pairs_says_what_the_mask_of_tokens_said(structure, form):
    found = read_mask("attention_mask", form(pairs(PADDED, structure)), 3, 5, 0)
    assert torch.equal(found.mask, PADDED.bool())
    places = (PADDED.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(found.positions[PADDED.bool()], places[PADDED.bool()])


def test_documents_in_a_mask_of_pairs_are_found():
    document = torch.tensor([[0, 0, 1, 1, 1, 2]])
    apart = document[:, :, None] == document[:, None]
    found = read_mask("attention_mask", (apart & causal(6))[:, None], 1, 6, 0)
    assert found.resets.tolist() == [[True, False, True, False, False, True]]
    assert found.positions.tolist() == [[0, 1, 0, 1, 2, 0]]


@pytest.mark.parametrize("past", [3, torch.tensor(3)], ids=["dynamic", "static"])
def test_the_columns_of_a_cache_are_skipped(past):
    mask = torch.tensor([[0, 1, 1, 1, 1, 0, 0]])  # 3 in the cache, 2 tokens, 2 places that are still free
    seen = (causal(7)[3:5] & mask[:, None].bool())[:, None]
    found = read_mask("attention_mask", seen, 1, 2, past)
    assert found.mask.tolist() == [[True, True]] and found.positions.tolist() == [[2, 3]]
    assert not found.resets.any()
    assert read_mask("attention_mask", mask, 1, 2, past).positions.tolist() == [[2, 3]]


def test_a_tree_of_drafts_is_no_sequence():
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)[None, None]
    with pytest.raises(Unclear, match="attention_mask is no sequence of documents"):
        read_mask("attention_mask", tree, 1, 4, 0)


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.randn(1, 1, 4, 4), "other values than 0"),
        (torch.stack([causal(4), ~causal(4)])[None], "differs between heads"),
        (torch.ones(1, 1, 3, 3).bool(), "does not fit 1 sequences of 4 tokens"),
        (torch.ones(1, 2), "has 2 columns where there are 4 tokens"),
        (torch.zeros(1, 4) - 5, "negative values"),
        ("causal", "is a str"),
    ],
)
def test_what_is_not_understood_is_said(mask, says):
    with pytest.raises(Unclear, match=says):
        read_mask("attention_mask", mask, 1, 4, 0)


@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 4), (1, 2, 4, 4)])
def test_a_mask_of_any_shape_may_mark_no_padding(shape):
    assert all_real(torch.ones(shape)) and all_real(torch.ones(shape).bool()) and all_real(torch.zeros(shape))
    padded = torch.ones(shape)
    padded[..., -1] = 0
    assert not all_real(padded) and not all_real(padded.long()) and not all_real((padded - 1) * 1e9)


# -- models --


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_of_pairs_hides_padding_as_a_mask_of_tokens_does(side):
    model, given = adapted(qwen()), ids(1, 6)
    junk = torch.full((1, 3), 49)
    padded = torch.cat([junk, given] if side == "left" else [given, junk], 1)
    real = slice(3, 9) if side == "left" else slice(0, 6)
    mask = torch.zeros(1, 9, dtype=torch.long)
    mask[:, real] = 1
    seen = pairs(mask, causal(9)) | torch.eye(9, dtype=torch.bool) & ~mask.bool().any()
    additive = torch.where(seen, 0.0, LOWEST)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = model(input_ids=given).logits
    for form in (mask, seen, additive):
        found = model(input_ids=padded, attention_mask=form, position_ids=positions).logits[:, real]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.compatible("Serving", "generate with a static cache")
@torch.no_grad()
def test_a_static_cache_with_padding_on_the_left_decodes_the_same():
    model, prompt = adapted(qwen()), torch.cat([torch.zeros(1, 3).long(), ids(1, 5)], 1)
    options = dict(input_ids=prompt, attention_mask=(prompt != 0).long(), max_new_tokens=6, do_sample=False)
    dynamic = model.generate(**options)
    assert torch.equal(model.generate(**options, cache_implementation="static"), dynamic)
    alone = model.generate(input_ids=prompt[:, 3:], max_new_tokens=6, do_sample=False)
    assert torch.equal(dynamic[:, 3:], alone)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 3])
def test_a_window_that_slides_over_a_static_cache_decodes_the_same(padding):
    torch.manual_seed(0)
    tokens = dict(vocab_size=50, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    config = transformers.MistralConfig(num_key_value_heads=1, sliding_window=4, **SIZES, **tokens)
    model = adapted(transformers.MistralForCausalLM(config), target_modules=["down_proj"])
    prompt = torch.cat([torch.zeros(2, padding).long(), ids(2, 6)], 1)
    options = dict(input_ids=prompt, attention_mask=(prompt != 0).long(), max_new_tokens=6, do_sample=False)
    given = dict(options, return_dict_in_generate=True, output_logits=True)
    dynamic, static = model.generate(**given), model.generate(**given, cache_implementation="static")
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), atol=1e-5, rtol=1e-4)
    full = model(dynamic.sequences[:, padding:], use_cache=False).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(static.logits, 1), full, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padded_sound_equals_sound_alone():
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **SIZES, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )  # fmt: skip
    model = adapted(transformers.Wav2Vec2Model(config), target_modules=["output_dense"])
    sound = torch.randn(1, 800)
    padded = torch.cat([sound, torch.zeros(1, 400)], 1)
    mask = torch.cat([torch.ones(1, 800), torch.zeros(1, 400)], 1).long()
    alone = model(sound).last_hidden_state
    found = model(padded, attention_mask=mask).last_hidden_state[:, : alone.shape[1] - 1]
    torch.testing.assert_close(found, alone[:, :-1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_layer_before_the_feature_vectors_is_refused_with_padding_alone():
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        **SIZES, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
    )  # fmt: skip
    model = adapted(transformers.Wav2Vec2Model(config), target_modules=["conv_layers.0.conv"])
    sound, mask = torch.randn(1, 800), torch.ones(1, 800).long()
    model(sound, attention_mask=mask)
    mask[:, 600:] = 0
    with pytest.raises(ValueError, match=r"conv_layers.0.conv reads its tokens in time, but attention_mask \(1, 800\)"):
        model(sound, attention_mask=mask)


@torch.no_grad()
def test_masks_under_another_name_are_read():
    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=4, num_channels=3)
    model = adapted(transformers.Siglip2VisionModel(config), target_modules=["fc2"])
    patches = torch.randn(1, 16, 48)
    junk = patches.clone()
    junk[:, 4:] = 5.0
    given = dict(pixel_attention_mask=torch.tensor([[1] * 4 + [0] * 12]), spatial_shapes=torch.tensor([[2, 2]]))
    found = model(pixel_values=patches, **given).last_hidden_state[:, :4]
    torch.testing.assert_close(model(pixel_values=junk, **given).last_hidden_state[:, :4], found, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_of_torchs_own_layers_mark_the_padding(side):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
    model = adapted(encoder, ["short_term_depression"], target_modules=["linear2"], causal=False)
    x, junk = torch.randn(1, 5, 16), torch.full((1, 3, 16), 9.0)
    real = slice(3, 8) if side == "left" else slice(0, 5)
    padding = torch.ones(1, 8, dtype=torch.bool)
    padding[:, real] = False
    padded = torch.cat([junk, x] if side == "left" else [x, junk], 1)
    for mask in (padding, torch.where(padding, -torch.inf, 0.0)):
        found = model(padded, src_key_padding_mask=mask)[:, real]
        torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_a_model_pads_inside_is_padding():
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        **SIZES, vocab_size=50, attention_window=[4, 4], max_position_embeddings=40, pad_token_id=1
    )
    model = adapted(transformers.LongformerModel(config), ["short_term_depression"], target_modules=["output.dense"])
    given = ids(1, 6)
    padded = torch.cat([given, torch.ones(1, 2).long()], 1)  # as the model itself does
    mask = (padded != 1).long()
    alone = model(given, attention_mask=torch.ones_like(given)).last_hidden_state
    torch.testing.assert_close(model(given).last_hidden_state, alone, atol=1e-5, rtol=1e-4)
    both = model(padded, attention_mask=mask).last_hidden_state[:, :6]
    torch.testing.assert_close(both, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_that_cannot_be_found_is_refused_where_it_matters():
    torch.manual_seed(0)
    config = transformers.VisualBertConfig(**SIZES, vocab_size=50, visual_embedding_dim=16)
    given = dict(input_ids=ids(1, 5), visual_embeds=torch.randn(1, 3, 16), visual_attention_mask=torch.ones(1, 3))
    whole, padded = torch.ones(1, 5), torch.tensor([[1.0, 1, 1, 1, 0]])
    model = adapted(transformers.VisualBertModel(config), target_modules=["output.dense"])
    model(**given, attention_mask=whole)
    with pytest.raises(
        ValueError, match=r"reads its tokens in time, but attention_mask \(1, 5\).*call the model without"
    ):
        model(**given, attention_mask=padded)
    pointwise = adapted(transformers.VisualBertModel(config), ["lateral_inhibition"], target_modules=["output.dense"])
    pointwise(**given, attention_mask=padded)


# -- masks under other names --


class Mixing(nn.Module):
    """A model of the user's own, called with a mask under any name."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, x, **masks):
        return self.lin(x)


class Listening(transformers.PreTrainedModel):
    """A model as those of transformers."""

    config_class = transformers.PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.lin = nn.Linear(16, 16)

    def forward(self, input_features, input_features_mask=None, pixel_mask=None, padding_mask=None, noise_mask=None):
        return self.lin(input_features)


def own(cls, *args, **fields):
    torch.manual_seed(0)
    return adapted(cls(*args), ["short_term_depression"], target_modules=["lin"], causal=False, **fields)


SOME = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@torch.no_grad()
@pytest.mark.parametrize("name", ["padding_mask", "input_mask", "mask", "attn_mask", "key_padding_mask", "valid_mask"])
def test_a_mask_of_which_nothing_tells_what_it_marks_is_refused_by_name(name):
    model, x = own(Mixing), torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match=rf"lin reads its tokens in time, but {name} \(2, 5\) may mark padding"):
        model(x, **{name: SOME})
    for same in (torch.ones(2, 5), torch.zeros(2, 5).bool()):  # it hides nothing, whatever it means
        assert torch.equal(model(x, **{name: same}), model(x))
    pointwise = get_peft_model(Mixing(), BioConfig("lateral_inhibition", target_modules=["lin"]))
    pointwise(x, **{name: SOME})


REAL = SOME.bool()


@torch.no_grad()
@pytest.mark.parametrize("name", ["mask", "attn_bias", "src_mask", "padding", "seen"])
@pytest.mark.parametrize(
    "form",
    [
        lambda real: real[1].expand(5, 5),
        lambda real: real[:, None].expand(2, 5, 5),
        lambda real: real[:, None, None].expand(2, 1, 5, 5),
        lambda real: real[:, None].expand(2, 5, 5).repeat_interleave(2, 0),
        lambda real: real[:, None, None],
        lambda real: real[..., None],
        lambda real: {"full": real[:, None, None]},
        lambda real: [real],
    ],
    ids=["T T", "B T T", "B 1 T T", "B heads", "B 1 1 T", "B T 1", "dict", "list"],
)
def test_masks_of_every_shape_are_refused_where_nothing_tells_what_they_mark(name, form):
    model, x = own(Mixing), torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match=rf"lin reads its tokens in time, but {name}.* nothing tells which"):
        model(x, **{name: form(REAL)})
    with pytest.raises(ValueError, match=rf"lin reads its tokens in time, but {name}.* nothing tells which"):
        model(x, **{name: form(~REAL)})


@torch.no_grad()
def test_pairs_under_any_name_are_read_where_their_numbers_tell():
    torch.manual_seed(0)
    model, x = adapted(Mixing(), ["short_term_depression"], target_modules=["lin"], causal=True), torch.randn(2, 5, 16)
    alone = model(x), model(x[1:, 2:])
    assert torch.equal(model(x, attn_bias=torch.where(causal(5), 0.0, -torch.inf)), alone[0])
    for order in (causal(5), ~causal(5)):  # which tokens see which, or which do not
        assert torch.equal(model(x, mask=order), alone[0])
    found = model(x, mask=torch.where(pairs(REAL, causal(5)), 0.0, LOWEST).expand(2, 4, 5, 5))
    assert torch.equal(found[0], alone[0][0])
    torch.testing.assert_close(found[1:, 2:], alone[1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"mask of shape \(2, 4, 5, 5\) differs between heads"):
        model(x, mask=torch.stack([causal(5), torch.ones(5, 5).bool()] * 2).expand(2, 4, 5, 5))


@torch.no_grad()
def test_a_mask_of_something_else_is_named_and_left_aside():
    model, x = own(Mixing), torch.randn(2, 5, 16)
    with pytest.warns(UserWarning, match=r"patch_mask \(2, 3\) is not read by adapters"):
        found = model(x, patch_mask=torch.tensor([[1, 0, 1]] * 2))
    assert torch.equal(found, model(x))
    with pytest.raises(ValueError, match=r"lengths \(2,\) may mark padding"):
        model(x, lengths=torch.tensor([5, 3]))
    assert torch.equal(model(x, lengths=torch.tensor([5, 5])), model(x))


@torch.no_grad()
def test_padding_that_a_model_of_ones_own_adds_is_named():
    class Padding(Mixing):
        def forward(self, x):
            return self.lin(nn.functional.pad(x, (0, 0, 0, 3)))[:, :5]

    with pytest.warns(UserWarning, match="Padding was given 5 tokens and makes 8 of them"):
        own(Padding)(torch.randn(2, 5, 16))


@torch.no_grad()
@pytest.mark.parametrize("name", [*SAY_SOMETHING_ELSE, "cross_attn_head_mask", "past_observed_mask", "decoder_mask"])
def test_masks_that_say_something_else_are_not_read(name):
    model, x = own(Mixing), torch.randn(2, 5, 16)
    assert torch.equal(model(x, **{name: SOME}), model(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["input_features_mask", "padding_mask", "pixel_mask"])
def test_masks_of_transformers_are_read_by_the_names_that_they_have_there(name):
    model, x = own(Listening, transformers.PreTrainedConfig()), torch.randn(1, 5, 16)
    padded = torch.cat([torch.full((1, 3, 16), 9.0), x], 1)
    mask = torch.tensor([[0] * 3 + [1] * 5])
    torch.testing.assert_close(model(padded, **{name: mask})[:, 3:], model(x), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=rf"{name} \(1, 16\) does not tell which of the 1 x 8 tokens here"):
        model(padded, **{name: mask.repeat_interleave(2, 1)})
    with pytest.raises(ValueError, match=r"noise_mask \(1, 8\) may mark padding"):
        model(padded, noise_mask=mask)


@torch.no_grad()
def test_padded_images_are_refused_with_padding_alone():
    torch.manual_seed(0)
    config = transformers.ViltConfig(**SIZES, vocab_size=50, image_size=16, patch_size=8)
    model = adapted(transformers.ViltModel(config), target_modules=["output.dense"])
    given = dict(input_ids=ids(1, 5), attention_mask=torch.ones(1, 5).long(), pixel_values=torch.randn(1, 3, 16, 16))
    whole = torch.ones(1, 16, 16).long()
    model(**given, pixel_mask=whole)
    whole[:, 8:] = 0
    with pytest.raises(ValueError, match=r"output.dense reads its tokens in time, but pixel_mask \(1, 16, 16\)"):
        model(**given, pixel_mask=whole)


@torch.no_grad()
def test_padded_sound_is_refused_where_a_codec_makes_frames_of_it():
    torch.manual_seed(0)
    config = transformers.MimiConfig(
        **SIZES, num_filters=4, num_residual_layers=1, upsampling_ratios=[4, 4], codebook_size=8, codebook_dim=4,
        vector_quantization_hidden_dimension=4, num_quantizers=2, num_key_value_heads=1, head_dim=8,
        upsample_groups=16, sampling_rate=16, frame_rate=0.5, num_semantic_quantizers=1,
    )  # fmt: skip
    model = adapted(transformers.MimiModel(config), target_modules=["fc2"])
    sound, mask = torch.randn(1, 1, 320), torch.ones(1, 1, 320).long()
    model(sound, padding_mask=mask)
    mask[..., 200:] = 0
    with pytest.raises(ValueError, match=r"fc2 reads its tokens in time, but padding_mask \(1, 1, 320\)"):
        model(sound, padding_mask=mask)


@torch.no_grad()
def test_a_mask_that_is_one_at_padding_is_read_as_that_where_it_is_known():
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=24)
    model = adapted(transformers.XLNetModel(config), ["short_term_depression"], target_modules=["layer_2"])
    given = torch.cat([torch.zeros(1, 3).long(), ids(1, 5)], 1)
    real = torch.tensor([[0.0] * 3 + [1.0] * 5])
    wanted = model(given, attention_mask=real, use_mems=False).last_hidden_state
    found = model(given, input_mask=1 - real, use_mems=False).last_hidden_state
    torch.testing.assert_close(found[:, 3:], wanted[:, 3:], atol=1e-6, rtol=1e-5)
    ignored = model(given, use_mems=False).last_hidden_state
    assert not torch.allclose(ignored[:, 3:], wanted[:, 3:], atol=1e-4)


@torch.no_grad()
def test_patches_that_are_hidden_to_be_predicted_are_not_padding():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZES, image_size=16, patch_size=4)
    base = transformers.ViTModel(config, use_mask_token=True)
    model, image = adapted(base, target_modules=["output.dense", "fc2"]), torch.randn(2, 3, 16, 16)
    hidden = torch.rand(2, 16) > 0.5
    assert model(image, bool_masked_pos=hidden).last_hidden_state.isfinite().all()
