"""Auxiliary terms weigh every token alike, count once, come with recomputed forwards, and are not kept for nobody."""

import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments

from bioadapt import BioConfig, BioTrainerCallback, auxiliary_loss
from bioadapt.tuner.learning import learning_of

PREDICTION = [{"name": "predictive_coding", "auxiliary": 0.5}]
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)


def adapted():
    torch.manual_seed(0)
    model = BertModel(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES))
    return get_peft_model(model, BioConfig(primitives=PREDICTION, init_weights=False)).train()


IDS = torch.arange(3, 27).view(4, 6)
MASK = torch.ones_like(IDS)
MASK[2:, 3:] = 0
PARTS = [(IDS[:2], MASK[:2]), (IDS[2:, :3], MASK[2:, :3])]  # ragged


def hidden(model, part):
    return model(input_ids=part[0], attention_mask=part[1]).last_hidden_state.mean(1)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_forwards_of_one_loss_weigh_by_their_tokens():
    model, found = adapted(), []
    for parts in ([(IDS, MASK)], PARTS):
        model.zero_grad()
        outputs = [hidden(model, part) for part in parts]
        loss = auxiliary_loss(model)
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)})
        assert len(outputs) == len(parts)
    assert_close(found[1], found[0])


def brought_in(model, parts):
    """As the callback does where all forwards share one backward."""
    for learning in learning_of(model):
        learning.terms.factor = 1.0
    sum((hidden(model, part) * 0.0).sum() for part in parts).backward()


def test_terms_that_are_brought_in_weigh_by_tokens_as_well():
    found = []
    for parts in ([(IDS, MASK)], PARTS):
        model = adapted()
        brought_in(model, parts)
        found.append(gradients(model))
    assert_close(found[1], found[0])


def test_a_forward_that_was_skipped_does_not_count():
    found = []
    for skipped in (True, False):
        model = adapted()
        for learning in learning_of(model):
            learning.terms.factor = 1.0
        if skipped:
            hidden(model, PARTS[0])
        (hidden(model, PARTS[1]) * 0.0).sum().backward()
        found.append(gradients(model))
    assert_close(*found)


def loss_of(features):
    return (features @ features.T).square().mean()


def cached(model, parts, inside, callback):
    """Gradient caching: forwards without a graph, the loss over all features, and every part again with a graph."""
    with torch.no_grad():
        features = [hidden(model, part) for part in parts]
    features = [feature.requires_grad_() for feature in features]

    def again(gradient=None):
        for part, feature in zip(parts, features, strict=True):
            with torch.enable_grad():
                surrogate = (hidden(model, part) * feature.grad).sum()
            surrogate.backward()

    loss = loss_of(torch.cat(features))
    if inside:  # as in sentence-transformers: the parts run again in a hook of the loss
        loss.backward()
        loss = loss.detach().requires_grad_()
        loss.register_hook(again)
        (loss if callback else loss + auxiliary_loss(model)).backward()
    else:
        (loss if callback else loss + auxiliary_loss(model)).backward()
        again()


@pytest.mark.parametrize("inside, callback", [(True, True), (True, False), (False, False)])
def test_gradient_caching_changes_nothing(inside, callback):
    plain, model = adapted(), adapted()
    loss = loss_of(hidden(plain, (IDS, MASK)))
    (loss + auxiliary_loss(plain)).backward()
    for learning in learning_of(model):
        learning.terms.factor = 1.0 if callback else None
    quarters = [(IDS[i : i + 1], MASK[i : i + 1]) for i in range(4)]
    cached(model, quarters, inside, callback)
    assert_close(gradients(model), gradients(plain))


def test_a_scaled_sum_whose_scale_comes_too_late_is_refused():
    model = adapted()
    with torch.no_grad():
        hidden(model, PARTS[0])
    loss = torch.zeros((), requires_grad=True)

    @loss.register_hook
    @torch.enable_grad()
    def again(gradient):
        hidden(model, PARTS[0]).sum().backward()

    with pytest.raises(RuntimeError, match="times 0.5"):
        ((loss + auxiliary_loss(model)) / 2).backward()


def test_nothing_is_kept_for_a_loop_that_does_not_ask():
    model = adapted()
    kept = []
    for step in range(4):
        output = hidden(model, PARTS[step % 2])
        kept.extend(weakref.ref(forward) for each in learning_of(model) for forward in each.terms._together.alive())
        if step % 2:
            output.sum().backward()
    del output
    gc.collect()
    assert len(kept) >= 4 and [ref for ref in kept if ref() is not None] == []


def test_the_trainer_weighs_micro_batches_as_it_weighs_their_losses(tmp_path):
    """Two ragged micro-batches of a language model step as one padded batch does."""

    def collated(rows):
        rows = [row["input_ids"] for row in rows]
        length = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
        return dict(input_ids=ids, attention_mask=(ids > 0).long(), labels=torch.where(ids > 0, ids, -100))

    found, rows = [], [dict(input_ids=list(range(3, 3 + n))) for n in (9, 9, 3, 3)]
    config = BioConfig(primitives=[{"name": "predictive_coding", "auxiliary": 10.0}], init_weights=False)
    for size, accumulation in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, max_position_embeddings=64, **SIZES))
        model = get_peft_model(model, config)
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1,
            learning_rate=1.0, optim="sgd", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
            max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collated, callbacks=[BioTrainerCallback()])
        trainer._get_train_sampler = lambda rows: torch.utils.data.SequentialSampler(rows)
        trainer.train()
        found.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, max_position_embeddings=64, **SIZES))
    model = get_peft_model(model, config).train()
    (model(**collated(rows)).loss + auxiliary_loss(model)).backward()  # and both as a loop of one's own does
    found.append({name: (p - p.grad).detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, parameter in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], parameter, atol=1e-4, rtol=1e-4, msg=name)
