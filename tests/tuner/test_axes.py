"""Which axis is time: told apart, said in the configuration, or refused; samples never read each other."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from bioadapt import BioConfig

IN_TIME = ["short_term_depression", "oscillatory_gating"]


def adapted(model, primitives=IN_TIME, **fields):
    torch.manual_seed(1)
    return get_peft_model(model, BioConfig(primitives=list(primitives), init_weights=False, **fields)).eval()


def encoder(batch_first, layers=2):
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=batch_first), layers)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(6, 3, 16), (4, 4, 16)], ids=["different", "as many samples as tokens"])
def test_torchs_own_layers_say_which_axis_is_time(shape):
    x = torch.randn(shape)
    models = {
        first: adapted(encoder(first), target_modules=["linear2", "norm1"], causal=False) for first in (True, False)
    }
    models[False].load_state_dict(models[True].state_dict())
    found = models[False](x)
    torch.testing.assert_close(found, models[True](x.transpose(0, 1)).transpose(0, 1), atol=1e-6, rtol=1e-5)
    other = x.clone()
    other[:, 0] += 1
    assert torch.equal(models[False](other)[:, 1], found[:, 1])
    for first, model in models.items():  # one sequence by itself, without a batch axis
        alone = x[0] if first else x[:, 0]
        batched = model(x)[0] if first else model(x)[:, 0]
        torch.testing.assert_close(model(alone), batched, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_torchs_fast_path_does_not_pass_the_adapter_over(padded):
    model, x = adapted(encoder(True), target_modules=["linear2"], causal=False), torch.randn(3, 5, 16)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = padded
    given = dict(src_key_padding_mask=mask) if padded else {}
    wanted = model(x, **given)
    with torch.no_grad():
        found = model(x, **given)
        bare = encoder(True).eval()(x, **given)
    torch.testing.assert_close(found[~mask], wanted[~mask], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found[~mask], bare[~mask], atol=1e-3)
    unloaded = model.unload()
    assert not any(module._forward_pre_hooks for module in unloaded.modules())


class Mixed(nn.Module):
    """A recurrent layer that wants time first, and a linear one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.out(self.rnn(x)[0])


@torch.no_grad()
def test_what_nothing_tells_is_refused_unless_it_is_said():
    with pytest.raises(ValueError, match=r"cannot act on out.*batch_first=False.*say so by batch_first=True or False"):
        adapted(Mixed(), target_modules=["out"], causal=True)
    adapted(Mixed(), ["lateral_inhibition"], target_modules=["out"])
    model, x = adapted(Mixed(), target_modules=["out"], causal=True, batch_first=False), torch.randn(5, 3, 8)
    alone = torch.cat([model(x[:, [i]]) for i in range(3)], 1)
    torch.testing.assert_close(model(x), alone, atol=1e-6, rtol=1e-5)
    assert torch.equal(model(x)[:4], model(x[:4]))


@torch.no_grad()
@pytest.mark.parametrize("rows", [2, 6], ids=["different", "as many samples as tokens"])
def test_blocks_of_transformers_that_have_time_first_are_known(rows):
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=24)
    model = adapted(transformers.XLNetModel(config), target_modules=["layer_2"], causal=True)
    ids = torch.randint(3, 50, (rows, 6))
    alone = torch.cat([model(row[None]).last_hidden_state for row in ids])
    torch.testing.assert_close(model(ids).last_hidden_state, alone, atol=1e-5, rtol=1e-4)


class TimeFirst(transformers.BertModel):
    """An encoder whose pooler sees (tokens, batch, features)."""

    def forward(self, input_ids):
        return self.pooler.dense(self.embeddings(input_ids).transpose(0, 1)).transpose(0, 1)


@torch.no_grad()
def test_time_in_an_unknown_place_is_refused_at_the_first_forward():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50)
    model = adapted(TimeFirst(transformers.BertConfig(**sizes)), target_modules=["pooler.dense"])
    with pytest.raises(ValueError, match=r"time seems to come first here. Say so by batch_first=False"):
        model(torch.randint(3, 50, (2, 6)))
    said = adapted(TimeFirst(transformers.BertConfig(**sizes)), target_modules=["pooler.dense"], batch_first=False)
    ids = torch.randint(3, 50, (2, 6))
    alone = torch.cat([said(row[None]) for row in ids])
    torch.testing.assert_close(said(ids), alone, atol=1e-6, rtol=1e-5)
