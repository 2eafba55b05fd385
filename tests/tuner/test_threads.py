"""What surrounds a forward belongs to its flow of control: threads, replicas and interrupted calls do not meet."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification, BertModel, Qwen2Config, Qwen2ForCausalLM

from bioadapt import BioConfig

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=50)
IN_TIME = ["short_term_depression", "oscillatory_gating"]


def bert():
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES))


def qwen():
    torch.manual_seed(0)
    tokens = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0)
    return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, max_position_embeddings=64, **SIZES, **tokens))


def adapted(model, primitives=IN_TIME, **fields):
    torch.manual_seed(1)
    return get_peft_model(model, BioConfig(primitives=primitives, init_weights=False, **fields)).eval()


def requests(count=12):
    made = []
    for length in range(4, 4 + count):
        ids = torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        made.append(dict(input_ids=ids, attention_mask=mask))
    return made


def together(run, arguments):
    """Each call in a thread of its own, all begun at once."""
    ready = threading.Barrier(len(arguments))

    def begin(argument):
        ready.wait()
        with torch.no_grad():
            return run(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(begin, arguments))


@pytest.mark.compatible("Serving", "threads")
@torch.no_grad()
@pytest.mark.parametrize("build", [bert, qwen], ids=["encoder", "decoder"])
def test_each_thread_has_its_own_mask(build):
    model, given = adapted(build()), requests()
    alone = [model(**request)[0] for request in given]
    for _ in range(3):
        for found, wanted in zip(together(lambda request: model(**request)[0], given), alone, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.compatible("Serving", "threads")
@torch.no_grad()
def test_each_thread_decodes_by_itself():
    model, given = adapted(qwen()), requests(6)

    def run(request):
        return model.generate(**request, max_new_tokens=6, do_sample=False)

    alone = [run(request) for request in given]
    for found, wanted in zip(together(run, given), alone, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.compatible("Serving", "adapters by request")
@torch.no_grad()
def test_each_thread_asks_for_its_own_adapters_and_heads():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES))
    config = dict(primitives=["lateral_inhibition"], init_weights=False, modules_to_save=["classifier"])
    model = get_peft_model(model, BioConfig(**config), adapter_name="a")
    model.add_adapter("b", BioConfig(**config))
    for name, parameter in model.named_parameters():
        if "modules_to_save.b" in name:
            parameter.add_(1.0)
    model.eval()
    ids = torch.randint(3, 50, (4, 6))
    asked = [["a"] * 4, ["b"] * 4, ["a", "b", "__base__", "b"], ["__base__"] * 4] * 2

    def run(names):
        return model(input_ids=ids, adapter_names=names).logits

    alone = [run(names) for names in asked]
    assert not torch.allclose(alone[0], alone[1])
    for found, wanted in zip(together(run, asked), alone, strict=True):
        assert torch.equal(found, wanted)


def test_recomputation_in_another_thread_has_the_mask_of_its_forward():
    given = requests(2)[0]

    def gradients(checkpointing, elsewhere):
        model = adapted(bert()).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable(dict(use_reentrant=False))
        loss = model(**given).last_hidden_state.square().sum()
        if elsewhere:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        else:
            loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    plain = gradients(False, False)
    for elsewhere in (False, True):
        for found, wanted in zip(gradients(True, elsewhere), plain, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.compatible("Several processes", "nn.DataParallel")
@torch.no_grad()
@pytest.mark.parametrize("by_name", [False, True], ids=["called", "by its forward"])
def test_replicas_run_their_own_tensors(by_name):
    # What `nn.DataParallel` does to a model, on one device.
    model = adapted(bert()).get_base_model()
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.mul_(1.5)

    def replicated(module, source):
        replica = module._replicate_for_data_parallel()
        for name, parameter in source._parameters.items():
            replica._parameters[name] = parameter
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicated(child, source._modules[name])
        return replica

    replica, given = replicated(model, copied), requests(1)[0]
    wanted = copied(**given).last_hidden_state
    found = (replica.forward if by_name else replica)(**given).last_hidden_state
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, model(**given).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_reads_masks_when_its_forward_is_called_by_name(twin):
    model, given = adapted(bert()).get_base_model(), requests(1)[0]
    wanted = model(**given).last_hidden_state
    assert torch.equal(model.forward(**given).last_hidden_state, wanted)
    other = twin(model)
    assert torch.equal(other.forward(**given).last_hidden_state, wanted)
    assert torch.equal(other(**given).last_hidden_state, wanted)


@torch.no_grad()
def test_an_interrupted_call_leaves_no_trace():
    model, given = adapted(bert()), requests(1)[0]
    wanted = model(**given).last_hidden_state

    def interrupt(module, args, output):
        raise KeyboardInterrupt

    hook = model.get_base_model().encoder.layer[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**given)
    hook.remove()
    assert all(layer.scope.flow.around is None for layer in model.base_model.layers())
    assert torch.equal(model(**given).last_hidden_state, wanted)
