"""One module called several times in a forward, on parts of a sequence or on all of it; and caches by any name."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers
from helpers.models import needs_graphs
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache

from bioadapt import BioConfig

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)
TOKENS = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0)
IN_TIME = ["short_term_depression", "oscillatory_gating"]


def adapted(model, primitives=IN_TIME, **fields):
    torch.manual_seed(1)
    return get_peft_model(model, BioConfig(primitives=list(primitives), init_weights=False, **fields)).eval()


def bert(**fields):
    torch.manual_seed(0)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertModel(transformers.BertConfig(**SIZES, **quiet, **fields))


def qwen():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(num_key_value_heads=1, max_position_embeddings=64, **SIZES, **TOKENS)
    return transformers.Qwen2ForCausalLM(config)


def ids(rows=2, length=8):
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(3))


# -- chunks --


@pytest.mark.parametrize("fields", [{}, {"is_decoder": True}], ids=["both ways", "causal"])
def test_feed_forward_blocks_in_chunks_give_what_they_give_at_once(fields):
    whole = adapted(bert(**fields), target_modules=["output.dense"])
    parts = adapted(bert(chunk_size_feed_forward=4, **fields), target_modules=["output.dense"])
    parts.load_state_dict(whole.state_dict())
    mask = torch.ones_like(ids())
    mask[0, 5:] = 0
    for training in (False, True):
        for model in (whole, parts):
            model.train(training)
        found, wanted = (model(ids(), attention_mask=mask).last_hidden_state for model in (parts, whole))
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    bare = parts.unload()
    assert all(layer.chunk_size_feed_forward == 4 for layer in bare.encoder.layer)


class Chunked(nn.Module):
    """A linear layer that is called on a few tokens at a time."""

    def __init__(self, linear: nn.Module, size: int) -> None:
        super().__init__()
        self.linear, self.size = linear, size

    def forward(self, x):
        return torch.cat([self.linear(part) for part in x.split(self.size, 1)], 1)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_chunks_of_a_sequence_continue(size, use_cache):
    model = adapted(qwen(), target_modules=["down_proj"])
    mlp = model.get_base_model().model.layers[0].mlp
    with torch.no_grad():
        wanted = model(ids(), use_cache=use_cache).logits
        mlp.down_proj = Chunked(mlp.down_proj, size)
        torch.testing.assert_close(model(ids(), use_cache=use_cache).logits, wanted, atol=1e-5, rtol=1e-4)
    model.train()
    found = model(ids(), use_cache=use_cache).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    found.sum().backward()
    chunked = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    mlp.down_proj = mlp.down_proj.linear
    model(ids(), use_cache=use_cache).logits.sum().backward()
    plain = [p.grad for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(chunked, plain, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_chunked_prefill_of_a_chunked_layer_decodes_the_same():
    model = adapted(qwen(), target_modules=["down_proj"])
    wanted = model(ids()).logits
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.down_proj = Chunked(mlp.down_proj, 2)
    first = model(ids()[:, :5], use_cache=True)
    second = model(ids()[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_chunks_that_would_have_to_be_read_both_ways_are_refused():
    model = adapted(bert(), target_modules=["output.dense"])
    layer = model.get_base_model().encoder.layer[0]
    layer.output.dense = Chunked(layer.output.dense, 4)
    with pytest.raises(ValueError, match=r"called on 4 of 8 tokens at a time, but reads time both ways"):
        model(ids())


@torch.no_grad()
def test_chunks_with_padding_are_refused():
    model = adapted(qwen(), target_modules=["down_proj"])
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.down_proj = Chunked(mlp.down_proj, 4)
    mask = torch.ones_like(ids())
    model(ids(), attention_mask=mask)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match=r"attention_mask \(2, 8\) does not tell which of the 2 x 4 tokens"):
        model(ids(), attention_mask=mask)


# -- modules that are shared --


def test_a_module_that_layers_share_starts_anew_each_time():
    torch.manual_seed(0)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = transformers.AlbertConfig(embedding_size=16, **SIZES, **quiet)
    model = adapted(transformers.AlbertModel(config), target_modules=["ffn_output"])
    evaluated = model(ids()).last_hidden_state
    torch.testing.assert_close(model.train()(ids()).last_hidden_state, evaluated, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_module_that_layers_of_a_decoder_share_decodes_the_same():
    model = qwen()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model = adapted(model, target_modules=["down_proj"])
    full = model(ids(), use_cache=False).logits
    torch.testing.assert_close(model(ids(), use_cache=True).logits, full, atol=1e-6, rtol=1e-5)
    first = model(ids()[:, :5], use_cache=True)
    steps = [first.logits]
    for place in range(5, 8):
        steps.append(model(ids()[:, place : place + 1], past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-5, rtol=1e-4)


# -- heads that see a part of the sequence --


@torch.no_grad()
def test_a_head_that_reads_time_hears_every_token():
    model = adapted(qwen(), target_modules=["lm_head"], task_type="CAUSAL_LM")
    texts = [
        model.generate(input_ids=ids(), max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts)
    full = model(ids()).logits
    assert torch.equal(model(ids(), logits_to_keep=2).logits, full[:, -2:])
    assert torch.equal(model(ids(), logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]])
    assert torch.equal(model(ids(), logits_to_keep=2, return_dict=False)[0], full[:, -2:])
    with pytest.raises(ValueError, match="logits_to_keep was given with labels"):
        model(ids(), logits_to_keep=2, labels=ids())


# -- caches --


@torch.no_grad()
@pytest.mark.parametrize("primitives", [IN_TIME, ["oscillatory_gating"]], ids=["in time", "by position"])
def test_the_cache_of_a_recurrent_model_carries_the_memory(primitives):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=2, vocab_size=50, state_size=4)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, **TOKENS))
    model = adapted(model, primitives, target_modules=["in_proj"])
    options = dict(input_ids=ids(), max_new_tokens=5, do_sample=False, output_scores=True, return_dict_in_generate=True)
    cached, whole = (torch.stack(model.generate(**options, use_cache=cache).scores) for cache in (True, False))
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        cache = model(ids(), use_cache=True).cache_params
    with pytest.raises(ValueError, match="was filled before the adapter was added"):
        model(ids()[:, :1], cache_params=cache)


@torch.no_grad()
def test_something_to_continue_from_that_is_no_cache_is_refused():
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=24, mem_len=8)
    model = adapted(transformers.XLNetModel(config), target_modules=["layer_2"], causal=True)
    memories = model(ids(), use_mems=True).mems
    with pytest.raises(ValueError, match="XLNetModel was given a .* as mems"):
        model(ids(), mems=memories, use_mems=True)


@torch.no_grad()
@pytest.mark.parametrize("twin", [copy.deepcopy, "pickle"], ids=["copy", "pickle"])
def test_a_cache_with_a_memory_can_be_copied_and_pickled(twin):
    model = adapted(qwen())
    cache = model(ids()[:, :5], use_cache=True).past_key_values
    assert type(cache) is DynamicCache
    if twin == "pickle":
        stream = io.BytesIO()
        torch.save(cache, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    else:
        other = twin(cache)
    for found in (other, cache):
        found.reorder_cache(torch.tensor([1, 0]))
        steps = model(ids()[:, 5:].flip(0), past_key_values=found).logits
        torch.testing.assert_close(steps, model(ids()).logits[:, 5:].flip(0), atol=1e-5, rtol=1e-4)


@pytest.mark.compatible("Graphs", "torch.compile with the default cache")
@needs_graphs
@torch.no_grad()
def test_the_default_cache_compiles_without_a_graph_break():
    model = adapted(qwen(), ["short_term_depression"], target_modules=["1.mlp.down_proj"])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    output = compiled(ids(), use_cache=True)
    torch.testing.assert_close(output.logits, model(ids()).logits)
    step = model(ids()[:, :1], past_key_values=output.past_key_values).logits
    full = model(torch.cat([ids(), ids()[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(step, full, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.skipif(not hasattr(transformers, "Gemma4UnifiedTextConfig"), reason="transformers has no such model yet")
def test_a_model_that_is_told_inside_which_logits_to_keep_gives_them():
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=50, hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size_per_layer_input=50
    )
    heads = dict(num_key_value_heads=2, head_dim=8, global_head_dim=8, hidden_size_per_layer_input=8, sliding_window=4)
    layers = dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2)
    config = transformers.Gemma4UnifiedTextConfig(
        **sizes, **heads, **layers, max_position_embeddings=64, pad_token_id=0
    )
    model = adapted(transformers.Gemma4UnifiedForCausalLM(config), target_modules=["o_proj", "down_proj"])
    full = model(input_ids=ids()).logits
    torch.testing.assert_close(model(input_ids=ids(), logits_to_keep=2).logits, full[:, -2:], atol=1e-6, rtol=1e-5)
