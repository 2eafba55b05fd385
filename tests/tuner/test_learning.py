"""Local rules and auxiliary terms: once per step of the optimiser, the same with and without gradient checkpointing."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.models import needs_graphs
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Qwen2Config,
    Qwen2Model,
    Trainer,
    TrainingArguments,
)

from bioadapt import BioConfig, BioTrainerCallback, auxiliary_loss, list_primitives, primitive_info
from bioadapt.tuner.learning import learning_of

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=50)
DETERMINISTIC = [name for name in list_primitives() if not primitive_info(name).stochastic]
LEARNED = "nrn_circuit.default.hebbian_trace.trace"
PREDICTION = [{"name": "predictive_coding", "auxiliary": 0.5}]


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES))


def qwen():
    torch.manual_seed(0)
    return Qwen2Model(Qwen2Config(num_key_value_heads=2, max_position_embeddings=64, **SIZES))


def awake(model, primitives, **settings):
    model = get_peft_model(model, BioConfig(primitives=primitives, **settings))
    torch.manual_seed(1)
    for layer in model.base_model.layers():
        layer.circuits["default"].wake()
    return model.train()


def batch(rows=2, tokens=9, short=5):
    ids = torch.randint(3, 50, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[0, short:] = 0
    return dict(input_ids=ids, attention_mask=mask)


def pooled(model, given):
    return (model(**given).last_hidden_state * given["attention_mask"][..., None]).mean(1)


def learned(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "nrn_circuit" in name}


def optimizer_of(model, lr=1e-2):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def siamese_training(build, checkpointing):
    """Two forwards of different shape and padding share every backward, as sentence encoders train."""
    model = awake(build(), DETERMINISTIC)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    optimizer = optimizer_of(model, lr=1e-4)  # large steps would make much of a rounding
    torch.manual_seed(2)
    for _ in range(3):
        optimizer.zero_grad()
        first, second = batch(2, 9, 5), batch(2, 6, 4)
        (pooled(model, first) * pooled(model, second)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    return gradients, learned(model)


@pytest.mark.parametrize("build", [bert, qwen], ids=["encoder", "decoder"])
def test_gradient_checkpointing_changes_neither_gradients_nor_what_is_learned(build):
    gradients, buffers = siamese_training(build, None)
    for reentrant in (True, False):
        again, buffers_again = siamese_training(build, reentrant)
        for name, gradient in gradients.items():
            # Without a graph, as in the first pass of a reentrant checkpoint, sums are taken in another order; what is
            # small against the largest entry shows it.
            rounding = 2e-5 + 2e-4 * gradient.abs().max().item()
            torch.testing.assert_close(again[name], gradient, atol=rounding, rtol=1e-4, msg=name)
        for name, buffer in buffers.items():
            torch.testing.assert_close(buffers_again[name], buffer, atol=1e-5, rtol=1e-4, msg=name)


def test_local_rules_run_once_per_step_and_only_for_the_optimiser_of_the_model():
    model, bystander = awake(bert(), ["hebbian_trace"]), torch.nn.Linear(2, 2)
    before = learned(model)
    pooled(model, batch()).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in learned(model).items() if k.endswith("trace"))
    bystander(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(bystander.parameters(), lr=0.1).step()
    assert all(torch.equal(v, before[k]) for k, v in learned(model).items() if k.endswith("trace"))
    optimizer_of(model).step()
    once = learned(model)
    assert all(not torch.equal(v, before[k]) for k, v in once.items() if k.endswith("trace"))
    optimizer_of(model).step()  # nothing was observed since
    assert all(torch.equal(v, once[k]) for k, v in learned(model).items() if k.endswith("trace"))


def test_accumulated_forwards_are_averaged():
    """Two micro-batches of equal size teach what one batch of both teaches."""
    torch.manual_seed(3)
    first, second = (dict(input_ids=torch.randint(3, 50, (2, 6))) for _ in range(2))
    whole = dict(input_ids=torch.cat([first["input_ids"], second["input_ids"]]))
    taught = []
    for parts in ((first, second), (whole,)):
        model = awake(bert(), ["hebbian_trace", "homeostatic_scaling"])
        for part in parts:
            model(**part).last_hidden_state.sum().backward()
        optimizer_of(model, lr=0.0).step()
        taught.append(learned(model))
    for name in taught[0]:
        torch.testing.assert_close(taught[0][name], taught[1][name], atol=1e-5, rtol=1e-4)


def test_nothing_is_learned_in_eval_under_no_grad_or_while_disabled():
    model = awake(bert(), ["hebbian_trace", "homeostatic_scaling"])
    before, step = learned(model), optimizer_of(model).step
    with torch.no_grad():
        model(**batch())
    model.eval()(**batch()).last_hidden_state.sum().backward()
    model.train()
    with model.disable_adapter():
        model(**batch())
    step()
    assert all(torch.equal(v, before[k]) for k, v in learned(model).items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_learns_by_itself(duplicate):
    model = awake(bert(), ["hebbian_trace"])
    twin = duplicate(model)
    before = learned(model)
    pooled(twin, batch()).sum().backward()
    optimizer_of(twin).step()
    key = next(name for name in before if name.endswith(LEARNED))
    assert torch.equal(learned(model)[key], before[key])
    assert not torch.equal(learned(twin)[key], before[key])


# -- auxiliary terms --


def test_auxiliary_loss_takes_the_terms_once_and_in_the_mean_over_tokens():
    model = awake(bert(), PREDICTION)
    assert auxiliary_loss(model).item() == 0.0
    torch.manual_seed(4)
    given = batch()
    model(**given)
    one = auxiliary_loss(model)
    assert one.requires_grad and one.item() > 0
    assert auxiliary_loss(model).item() == 0.0
    model(**given), model(**given)
    torch.testing.assert_close(auxiliary_loss(model), one)
    doubled = awake(bert(), [{"name": "predictive_coding", "auxiliary": 1.0}])
    doubled(**given)
    torch.testing.assert_close(auxiliary_loss(doubled), 2 * one)


def test_auxiliary_terms_of_forwards_without_a_gradient_are_not_kept():
    model, given = awake(bert(), PREDICTION), batch()
    model(**given)
    one = auxiliary_loss(model)
    model.eval()(**given)
    assert auxiliary_loss(model).item() == 0.0
    with torch.no_grad():
        model.train()(**batch())
    model(**given)
    torch.testing.assert_close(auxiliary_loss(model), one)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_injected_gradients_equal_those_of_the_added_loss(checkpointing):
    torch.manual_seed(5)
    given, gradients = batch(), []
    for injected in (None, 1.0):
        model = awake(bert(), PREDICTION)
        if injected and checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        for learning in learning_of(model):
            learning.terms.factor = injected
        loss = pooled(model, given).sum()
        extra = auxiliary_loss(model)
        assert (extra.item() > 0) is (injected is None)
        (loss + extra).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-6, rtol=1e-4, msg=name)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_reentrant_checkpointing_needs_no_callback():
    found = []
    for checkpointing in (False, True):
        model, (first, second) = awake(bert(), PREDICTION), (batch(), batch(3, 7, 2))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()
        loss = pooled(model, first).sum() + pooled(model, second).sum()
        extra = auxiliary_loss(model)
        ((loss + 3 * extra) / 2).backward()
        found.append((extra.detach(), gradients_of(model)))
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_trainer_needs_the_callback_alone(tmp_path):
    def trained(callbacks):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**SIZES))
        model = get_peft_model(model, BioConfig(primitives=[*PREDICTION, "hebbian_trace"], task_type="SEQ_CLS"))
        torch.manual_seed(6)
        rows = [dict(input_ids=torch.randint(3, 50, (6,)), labels=i % 2) for i in range(16)]
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2,
            learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows, callbacks=callbacks).train()
        assert all(learning.terms.factor is None for learning in learning_of(model))
        return {name: value.clone() for name, value in model.state_dict().items() if "nrn_circuit" in name}

    plain, helped = trained([]), trained([BioTrainerCallback()])
    assert any(not torch.equal(plain[name], helped[name]) for name in plain if "predictive_coding" in name)
    assert any("trace" in name for name in plain)


# -- several processes --

REPLICATED = ["hebbian_trace", "lateral_inhibition", {"name": "fly_lora", "r": 8, "k": 3}]


def _replica(rank, address, results):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(7)
    rows = torch.randint(3, 50, (4, 6))
    model = awake(bert(), REPLICATED)
    replica = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    for _ in range(2):
        optimizer.zero_grad()
        replica(input_ids=rows[2 * rank : 2 * rank + 2]).last_hidden_state.square().mean().backward()
        optimizer.step()
    if rank == 0:
        torch.save(learned(model), results)
    del replica  # before the group it holds: torch 2.13 can deadlock when the last owner of a gloo group is collected
    dist.destroy_process_group()


def test_replicas_learn_what_one_process_learns_from_the_whole_batch(tmp_path):
    mp.spawn(_replica, (f"file://{tmp_path}/store", f"{tmp_path}/learned.pt"), nprocs=2)
    torch.manual_seed(7)
    rows = torch.randint(3, 50, (4, 6))
    model = awake(bert(), REPLICATED)
    optimizer = optimizer_of(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=rows).last_hidden_state.square().mean().backward()
        optimizer.step()
    together = torch.load(f"{tmp_path}/learned.pt")
    found = learned(model)
    assert any(name.endswith("fly_lora.d") and torch.count_nonzero(buffer) for name, buffer in found.items())
    for name, buffer in found.items():
        if name.endswith("fly_lora.error"):  # measured on a few tokens of each replica
            continue
        if "fly_lora.energy" in name:  # sums over a replica's tokens, of which only ratios are used
            buffer, together[name] = (tensor / tensor.sum().clamp(min=1e-9) for tensor in (buffer, together[name]))
        torch.testing.assert_close(together[name], buffer, atol=1e-5, rtol=1e-4, msg=name)


# -- compilation --


@needs_graphs
@pytest.mark.parametrize("build", [bert, qwen], ids=["encoder", "decoder"])
def test_the_whole_model_compiles_without_a_graph_break(build):
    primitives = ["lateral_inhibition", "short_term_depression", "hebbian_trace", "neuro_ada"]
    targets = ["1.output.dense", "1.mlp.down_proj"]  # one layer says as much as all, and compiles sooner
    model, given = awake(build(), primitives, target_modules=targets), batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    extra = {} if build is bert else {"use_cache": False}
    output = compiled(**given, **extra).last_hidden_state
    output.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    expected = model(**given, **extra).last_hidden_state
    expected.sum().backward()
    torch.testing.assert_close(output, expected)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
