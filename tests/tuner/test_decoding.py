"""Cached decoding equals the full forward, whatever the strategy does to the cache."""

import copy
import warnings

import pytest
import torch
from helpers.models import own_parameters
from peft import get_peft_model
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from bioadapt import BioConfig, list_primitives, primitive_info
from bioadapt.primitives._state import UNDO_WINDOW, Memory

TOKENS = dict(vocab_size=50, bos_token_id=1, eos_token_id=None, pad_token_id=0)
PRIMITIVES = list_primitives()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **TOKENS))


def qwen2():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return Qwen2ForCausalLM(Qwen2Config(intermediate_size=48, max_position_embeddings=128, **sizes, **TOKENS))


def t5():
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes, **TOKENS))


TARGETS = {
    gpt2: ["c_attn", "c_proj"],
    qwen2: ["q_proj", "o_proj", "down_proj"],
    t5: ["q", "k", "v", "o", "wi", "wo"],
}


def build(host, task="CAUSAL_LM", primitives=PRIMITIVES):
    torch.manual_seed(0)
    config = BioConfig(primitives=primitives, target_modules=TARGETS[host], init_weights=False, task_type=task)
    return get_peft_model(host(), config).eval()


@pytest.fixture(scope="module", params=[gpt2, qwen2], ids=["gpt2", "qwen2"])
def decoder(request):
    return build(request.param)


def prompt(rows=2):
    torch.manual_seed(2)
    ids = torch.randint(3, 50, (rows, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding in the first row
    return dict(input_ids=ids, attention_mask=mask)


@torch.no_grad()
def test_steps_equal_the_full_forward(decoder):
    # In double precision: products of other shapes round otherwise, and a threshold that one unit of all these
    # primitives just misses or meets turns that into a spike more or less.
    decoder, given = copy.deepcopy(decoder).double(), prompt()
    ids, mask = given["input_ids"], given["attention_mask"]
    full = decoder(**given).logits
    cache, steps = None, []
    for start, stop in ((0, 3), (3, 4), (4, 6), (6, 7)):  # single tokens and chunks
        output = decoder(
            input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1)[1], full[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat(steps, 1)[0, 3:], full[0, 3:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "strategy",
    [
        {},
        dict(num_beams=3),
        dict(do_sample=True),
        dict(do_sample=True, num_beams=2),
        dict(num_return_sequences=2, do_sample=True),
    ],
    ids=["greedy", "beam", "sample", "beam-sample", "several"],
)
def test_generate_is_the_same_with_and_without_cache(decoder, strategy):
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(decoder.generate(**prompt(), max_new_tokens=12, use_cache=use_cache, **strategy))
    assert torch.equal(*texts)


@torch.no_grad()
def test_generate_does_not_see_padding(decoder):
    given = prompt()
    together = decoder.generate(**given, max_new_tokens=10)[0, 7:]
    alone = decoder.generate(input_ids=given["input_ids"][:1, 3:], max_new_tokens=10)[0, 4:]
    assert torch.equal(together, alone)


@torch.no_grad()
def test_assisted_generation_equals_greedy(decoder):
    given = {key: value[1:] for key, value in prompt().items()}
    greedy = decoder.generate(**given, max_new_tokens=20, do_sample=False)
    looked_up = decoder.generate(**given, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, greedy)
    torch.manual_seed(7)
    assistant = type(decoder.get_base_model())(decoder.config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assisted = decoder.generate(**given, max_new_tokens=20, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, greedy)


@torch.no_grad()
@pytest.mark.parametrize("strategy", [{}, dict(num_beams=3)], ids=["greedy", "beam"])
def test_encoder_decoder_generation(strategy):
    model = build(t5, "SEQ_2_SEQ_LM")
    ids = torch.randint(3, 50, (2, 8))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    texts = [
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, use_cache=use_cache, **strategy)
        for use_cache in (True, False)
    ]
    assert torch.equal(*texts)


@torch.no_grad()
def test_a_copied_cache_continues_on_its_own(decoder):
    ids = prompt()["input_ids"][1:]
    cache = decoder(input_ids=ids[:, :5], use_cache=True).past_key_values
    branch = copy.deepcopy(cache)
    decoder(input_ids=ids[:, 5:6] * 0 + 3, past_key_values=cache)  # the original goes elsewhere
    on_branch = decoder(input_ids=ids[:, 5:], past_key_values=branch).logits
    torch.testing.assert_close(on_branch, decoder(input_ids=ids).logits[:, 5:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cache_that_the_adapter_has_not_seen_is_refused():
    model = build(qwen2)
    ids = prompt()["input_ids"]
    with model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 7
    with pytest.raises(ValueError, match="holds 7 tokens, of which .* has seen 0"):
        model(input_ids=ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_cache_that_grew_behind_the_adapters_back_is_refused():
    model = build(qwen2)
    ids = prompt()["input_ids"]
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    with model.disable_adapter():
        model(input_ids=ids[:, 5:6], past_key_values=cache)
    with pytest.raises(ValueError, match="holds 6 tokens, of which .* has seen 5"):
        model(input_ids=ids[:, 6:], past_key_values=cache)


@torch.no_grad()
def test_pointwise_adapters_accept_any_cache():
    model = build(qwen2, primitives=["lateral_inhibition", "divisive_normalization"])
    ids = prompt()["input_ids"]
    with model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    model(input_ids=ids[:, :1], past_key_values=cache)
    assert type(cache) is DynamicCache


@torch.no_grad()
def test_two_forwards_of_eval_leave_no_trace(decoder):
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    first, second = (decoder(**prompt()).logits for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())


def test_memory_takes_back_what_it_kept_and_refuses_more():
    memory = Memory()
    part = memory.part("layer").part("primitive")
    long = torch.arange(float(2 * UNDO_WINDOW)).reshape(1, -1, 1)
    part.append("trace", long)
    memory.crop(5)
    assert part.latest("trace").item() == 2 * UNDO_WINDOW - 6
    with pytest.raises(ValueError, match="can take back at most"):
        memory.crop(UNDO_WINDOW)
    memory.crop(10**6)  # everything: as before the first token
    assert part.latest("trace") is None


# -- what depends on parameters alone --


@torch.no_grad()
def test_constants_are_computed_once_for_a_sequence_and_anew_for_the_next(monkeypatch):
    model, ids = build(qwen2, primitives=["lateral_inhibition", "short_term_depression"]), prompt()["input_ids"]
    computed = []
    for name in ("lateral_inhibition", "short_term_depression"):
        cls = primitive_info(name).factory
        method = "connections" if name == "lateral_inhibition" else "constants"
        plain = getattr(cls, method)
        monkeypatch.setattr(cls, method, lambda self, plain=plain: computed.append(self) or plain(self))

    def decode(cache):
        for token in ids.split(1, 1):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
        return logits

    cache = DynamicCache()
    decode(cache)
    assert len(computed) == len(set(map(id, computed))) == 2 * 3 * 2  # primitives, modules and layers
    other = copy.deepcopy(cache)
    model(input_ids=ids[:, :1], past_key_values=other, use_cache=True)
    assert len(computed) == 2 * 12  # a copy computes for itself
    for parameter in own_parameters(model).values():
        parameter.data.mul_(1.1)  # which no version of the tensor counts
    torch.testing.assert_close(decode(DynamicCache()), model(input_ids=ids).logits[:, -1], atol=1e-5, rtol=1e-4)
    static = StaticCache(config=model.config, max_cache_len=16)
    for _ in range(2):
        for parameter in own_parameters(model).values():
            parameter.data.mul_(1.1)
        static.reset()
        torch.testing.assert_close(decode(static), model(input_ids=ids).logits[:, -1], atol=1e-5, rtol=1e-4)


def test_with_gradients_nothing_is_kept():
    model, ids = build(qwen2, primitives=["short_term_depression"]), prompt()["input_ids"]
    cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
    model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in own_parameters(model).values())


@torch.no_grad()
def test_padding_may_come_after_steps_without():
    model, ids = build(qwen2), prompt()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, -2] = 0  # the first sequence has ended, and is continued later
    model, cache, steps = model.double(), DynamicCache(), []
    for t, token in enumerate(ids.split(1, 1)):
        given = dict(input_ids=token, attention_mask=mask[:, : t + 1], past_key_values=cache, use_cache=True)
        steps.append(model(**given).logits)
    full = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat(steps, 1)[mask.bool()], full[mask.bool()], atol=1e-5, rtol=1e-4)
