"""`compile_adapters`: graphs for what the adapters compute, and the same numbers as without."""

import copy
import shutil
import warnings

import pytest
import torch
from helpers.models import needs_graphs, own_parameters
from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.exc import InvalidCxxCompiler
from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache

import bioadapt
from bioadapt import BioConfig, compile_adapters, list_primitives, primitive_info

pytestmark = needs_graphs

# Of each kind one; a local rule (hebbian_trace); a wide and a narrow state of decoding; the scales of both input and
# output (nmda_branches).
PRIMITIVES = [
    "lateral_inhibition", "k_winners_take_all", "short_term_depression", "stdp_trace", "hebbian_trace", "nmda_branches",
]  # fmt: skip


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(primitives, **fields):
    """An adapted model, and its copy."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    host = Qwen2ForCausalLM(Qwen2Config(intermediate_size=48, vocab_size=50, max_position_embeddings=256, **sizes))
    config = BioConfig(primitives, target_modules=["o_proj", "down_proj"], init_weights=False, **fields)
    model = get_peft_model(host, config)
    return model, copy.deepcopy(model)


def ids(rows, length):
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(length))


def trained(model, rows, length):
    """The loss of a padded batch, and its gradients."""
    given = ids(rows, length)
    mask = torch.ones_like(given)
    mask[0, :3] = 0
    model.train().zero_grad()
    loss = model(input_ids=given, attention_mask=mask, labels=given).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in own_parameters(model).items()}}


def counted(model, **options):
    counter = CompileCounterWithBackend(options.pop("backend", "eager"))
    assert compile_adapters(model, backend=counter, fullgraph=True, **options) is model
    return counter


def assert_equal(found, expected):
    # The same arithmetic, with products that may be summed in another order.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_it_learns_and_decodes_as_without(name):
    plain, compiled = pair([name])
    counter = counted(compiled)
    assert_equal(trained(compiled, 2, 9), trained(plain, 2, 9))
    graphs = counter.frame_count
    assert 0 < graphs < 6  # shared by the six layers, of which the first gets no gradient of its input
    for rows, length in ((2, 17), (3, 12), (2, 140)):
        assert_equal(trained(compiled, rows, length), trained(plain, rows, length))
    assert counter.frame_count == graphs
    with torch.no_grad():
        texts = [model.eval().generate(ids(2, 7), max_new_tokens=6, do_sample=False) for model in (plain, compiled)]
        assert torch.equal(*texts)
        graphs = counter.frame_count
        compiled.generate(ids(2, 11), max_new_tokens=9, do_sample=False)
    assert counter.frame_count == graphs


def test_a_local_rule_observes_the_same():
    plain, compiled = pair(["hebbian_trace"])
    counted(compiled)
    for model in (plain, compiled):
        optimizer = torch.optim.SGD(own_parameters(model).values(), lr=0.1)
        for _ in range(2):
            trained(model, 2, 9)
            optimizer.step()
    found, expected = compiled.state_dict(), plain.state_dict()
    assert any("trace" in name or "hebbian" in name for name in expected)
    for name, tensor in expected.items():
        assert_equal(found[name], tensor)


def test_the_backward_too_is_a_graph():
    plain, compiled = pair(["lateral_inhibition"])
    counted(compiled, backend="aot_eager")
    assert_equal(trained(compiled, 2, 9), trained(plain, 2, 9))


@pytest.mark.compatible("Graphs", "compile_adapters")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_generated_code_gives_the_same():
    plain, compiled = pair(["leaky_integrator"])
    compile_adapters(compiled, fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapters run without being compiled")
        for length in (9, 12):
            assert_equal(trained(compiled, 2, length), trained(plain, 2, length))


@torch.no_grad()
def test_adapters_come_and_go(tmp_path):
    plain, compiled = pair(["homeostatic_scaling"])
    counter = counted(compiled)
    given, expected = ids(2, 9), plain.eval()(ids(2, 9)).logits
    assert_equal(compiled.eval()(given).logits, expected)
    graphs = counter.frame_count
    with compiled.disable_adapter(), plain.disable_adapter():
        assert torch.equal(compiled(given).logits, plain(given).logits)
    compiled.save_pretrained(tmp_path)
    compiled.load_adapter(tmp_path, "again")
    compiled.set_adapter("again")
    assert_equal(compiled(given).logits, expected)
    assert counter.frame_count <= graphs + 1
    assert {name for name in compiled.state_dict() if ".again." not in name} == set(plain.state_dict())


@pytest.mark.compatible("Graphs", "torch.compile of the whole model")
@torch.no_grad()
def test_the_whole_model_compiles_on_top():
    plain, compiled = pair(["lateral_inhibition"])
    counted(compiled)
    whole = torch.compile(compiled.eval(), backend="eager", fullgraph=True)
    assert_equal(whole(ids(2, 9), use_cache=False).logits, plain.eval()(ids(2, 9), use_cache=False).logits)


def test_a_training_step_with_every_primitive_is_one_graph():
    # All side by side in one layer, so that the host is traced once. What is drawn at random differs between graphs.
    names = [name for name in list_primitives() if not primitive_info(name).stochastic]
    plain, compiled = pair(names, composition="parallel", layers_to_transform=[1])
    whole = torch.compile(compiled.train(), backend="eager", fullgraph=True)
    losses = [model(input_ids=ids(2, 9), labels=ids(2, 9), use_cache=False).loss for model in (whole, plain.train())]
    assert_equal(*losses)
    losses[0].backward()
    assert all(parameter.grad is not None for parameter in own_parameters(compiled).values())


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "model"])
def test_requests_in_one_static_cache_share_their_graphs(whole):
    model, _ = pair(["short_term_depression"])
    model.eval()
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, backend=counter, fullgraph=True) if whole else model
    if not whole:
        compile_adapters(model, backend=counter)
    cache, graphs = StaticCache(config=model.config, max_cache_len=32), []
    for length in (7, 9, 5, 12):
        text = ids(1, length)
        cache.reset()
        logits = model(input_ids=text, past_key_values=cache, use_cache=True).logits
        for _ in range(4):
            token = logits[:, -1:].argmax(-1)
            text = torch.cat([text, token], 1)
            places = torch.tensor([[text.shape[1] - 1]])
            logits = step(input_ids=token, position_ids=places, past_key_values=cache, use_cache=True).logits
        assert_equal(logits[:, -1], model(input_ids=text, use_cache=False).logits[:, -1])
        graphs.append(counter.frame_count)
    assert graphs[1:] == graphs[1:2] * 3


@torch.no_grad()
def test_without_a_compiler_it_goes_on_and_says_so_once():
    plain, compiled = pair(["homeostatic_scaling"])

    def missing(graph, inputs):
        raise InvalidCxxCompiler()

    compile_adapters(compiled, backend=missing)
    with pytest.warns(UserWarning, match="without being compiled.*C\\+\\+") as said:
        found = compiled.eval()(ids(2, 9)).logits
    assert len([warning for warning in said if "compiled" in str(warning.message)]) == 1
    assert torch.equal(found, plain.eval()(ids(2, 9)).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(ids(2, 9))


def test_what_it_refuses():
    with pytest.raises(ValueError, match="Linear has no bio adapter"):
        compile_adapters(torch.nn.Linear(2, 2))
    model, _ = pair(["homeostatic_scaling"])
    with pytest.raises(TypeError, match="fast"):
        compile_adapters(model, fast=True)
    assert "compile_adapters" in bioadapt.__all__
