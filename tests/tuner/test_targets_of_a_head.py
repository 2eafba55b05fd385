"""Which token is to be foretold where, as a model in training tells it to a primitive on its head."""

import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from bioadapt import BioConfig
from bioadapt.tuner.layer import BioLayer

WORDS = 50
SIZES = dict(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=24)


def qwen():
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=WORDS, num_key_value_heads=2, max_position_embeddings=64, **SIZES))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_layer=1, n_embd=16, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def masked_lm():
    return BertForMaskedLM(BertConfig(vocab_size=WORDS, **SIZES))


def counted(build, given, head="lm_head", **settings):
    """How often each word was counted in one step of training, and of how many tokens."""
    torch.manual_seed(0)
    model = get_peft_model(build(), BioConfig("logogen", target_modules=[head], **settings)).train()
    output = model(**given)
    output.logits.square().mean().backward()
    layer = next(module for module in model.modules() if isinstance(module, BioLayer))
    (primitive,) = layer.primitives()
    primitive.commit()
    return (primitive.heard * primitive.tokens).round().long(), primitive.tokens.item()


def times(*words):
    return torch.bincount(torch.tensor(words, dtype=torch.long), minlength=WORDS)


IDS = torch.tensor([[3, 5, 7, 5, 9], [4, 8, 6, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("build", [qwen, gpt2])
def test_without_labels_the_next_token_that_is_no_padding(build):
    found, tokens = counted(build, dict(input_ids=IDS, attention_mask=MASK))
    assert tokens == 6 and torch.equal(found, times(5, 7, 5, 9, 8, 6))


@pytest.mark.parametrize("build", [qwen, gpt2])
def test_of_labels_those_that_the_loss_counts(build):
    labels = IDS.masked_fill(MASK == 0, -100)
    labels[0, :3] = -100  # a prompt
    found, tokens = counted(build, dict(input_ids=IDS, attention_mask=MASK, labels=labels))
    assert tokens == 4 and torch.equal(found, times(5, 9, 8, 6))


def test_no_document_foretells_the_next_one():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    found, tokens = counted(qwen, dict(input_ids=IDS[:1], position_ids=positions))
    assert tokens == 3 and torch.equal(found, times(5, 7, 9))


def test_labels_of_a_decoder_of_an_encoder_stand_where_they_are_foretold():
    labels = torch.tensor([[11, 12, 13], [14, 15, -100]])
    found, tokens = counted(t5, dict(input_ids=IDS, attention_mask=MASK, labels=labels))
    assert tokens == 5 and torch.equal(found, times(11, 12, 13, 14, 15))


def test_labels_of_hidden_words_stand_at_those():
    labels = torch.full_like(IDS, -100)
    labels[0, 2], labels[1, 1] = 20, 21
    found, tokens = counted(masked_lm, dict(input_ids=IDS, labels=labels), head="decoder")
    assert tokens == 2 and torch.equal(found, times(20, 21))


def test_a_head_that_is_told_nothing_learns_nothing_and_says_so():
    with pytest.warns(UserWarning, match="decoder learns nothing from what is to be foretold.*not given labels"):
        _, tokens = counted(masked_lm, dict(input_ids=IDS), head="decoder")
    assert tokens == 0
    with pytest.warns(UserWarning, match="lm_head learns nothing"):
        _, tokens = counted(qwen, dict(inputs_embeds=torch.randn(2, 5, 16)))
    assert tokens == 0


def test_elsewhere_words_are_no_units():
    """Hidden layers have other units than words, and so has a population under ``rank``."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        _, tokens = counted(qwen, dict(input_ids=IDS, attention_mask=MASK, labels=IDS), head="down_proj")
        assert tokens == 8  # all that is no padding, by its strongest unit
        found, tokens = counted(qwen, dict(input_ids=IDS, attention_mask=MASK), rank=4)
    assert tokens == 8 and len(found) == 4
