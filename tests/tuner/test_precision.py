"""Half precision hosts, with and without autocast: adapters compute in fp32, outputs keep the host's dtype."""

from __future__ import annotations

import pytest
import torch
from helpers.models import KINDS, PRIMITIVES, awake, base_and_inputs, close, digest, output, own_parameters, step
from peft import PeftModel, get_peft_model

HALVES = [torch.float16, torch.bfloat16]
EPSILON = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _half(kind, dtype):
    base, inputs = base_and_inputs(kind)
    return base.to(dtype), inputs.to(dtype) if inputs.is_floating_point() else inputs


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("named", PRIMITIVES)
def test_adapters_of_a_half_precision_host_are_fp32(named, dtype):
    base, inputs = _half("mlp over tokens", dtype)
    plain = output(base, inputs)
    fresh = get_peft_model(base, awake(named, ("lin0", "lin1"), init_weights=True))
    assert {p.dtype for p in own_parameters(fresh).values()} == {torch.float32}
    assert torch.equal(output(fresh, inputs), plain)
    step(fresh, inputs)
    assert all(torch.isfinite(p).all() for p in own_parameters(fresh).values())
    assert output(fresh, inputs).dtype == dtype


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("named", PRIMITIVES)
def test_adapters_take_the_dtype_of_the_host_when_asked(named, dtype):
    base, inputs = _half("mlp over tokens", dtype)
    model = get_peft_model(base, awake(named, ("lin0", "lin1")), autocast_adapter_dtype=False)
    assert {p.dtype for p in own_parameters(model).values()} == {dtype}
    wide = get_peft_model(base_and_inputs("mlp over tokens")[0], awake(named, ("lin0", "lin1")))
    wide.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in model.state_dict().items()})
    assert output(model, inputs).dtype == dtype
    if named != "ranked":  # winners change with the last bit
        assert close(output(model, inputs).float(), output(wide, inputs.float()), EPSILON[dtype])
    model.train()
    model(inputs).float().square().mean().backward()
    grads = [p.grad for p in own_parameters(model).values()]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_saved_fp32_adapter_is_not_rounded_on_loading(dtype, autocast, low_cpu_mem_usage, tmp_path):
    base, inputs = _half("mlp over tokens", dtype)
    model = get_peft_model(base, awake("mergeable weight", ("lin0", "lin1")))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        _half("mlp over tokens", dtype)[0],
        tmp_path,
        autocast_adapter_dtype=autocast,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    if autocast:
        assert digest(loaded.state_dict()) == digest(model.state_dict())
        assert close(output(loaded, inputs).float(), output(model, inputs).float(), 1e-6)
    else:
        assert {p.dtype for p in own_parameters(loaded).values()} == {dtype}
        assert close(output(loaded, inputs).float(), output(model, inputs).float(), EPSILON[dtype])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["mlp over tokens", "conv2d", "embedding", "layer norm"])
def test_under_autocast(kind, dtype):
    base, inputs = base_and_inputs(kind)
    with torch.autocast("cpu", dtype):
        plain = output(base, inputs)
        fresh = get_peft_model(base, awake("pointwise", KINDS[kind].targets, init_weights=True))
        assert torch.equal(output(fresh, inputs), plain) and output(fresh, inputs).dtype == plain.dtype
    model = get_peft_model(base_and_inputs(kind)[0], awake("pointwise", KINDS[kind].targets))
    wanted = output(model, inputs)
    with torch.autocast("cpu", dtype):
        assert close(output(model, inputs).float(), wanted, EPSILON[dtype])
        step(model, inputs)
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in own_parameters(model).values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_merging_in_half_precision_rounds_once(dtype, autocast):
    base, inputs = _half("mlp over tokens", dtype)
    model = get_peft_model(base, awake("mergeable weight", ("lin0", "lin1")), autocast_adapter_dtype=autocast)
    wanted, before = output(model, inputs), digest(model.state_dict())
    model.merge_adapter()
    assert close(output(model, inputs).float(), wanted.float(), EPSILON[dtype])
    assert model.base_model.model.lin0.base_layer.weight.dtype == dtype
    model.unmerge_adapter()
    assert digest(model.state_dict()) == before


def test_integer_and_learned_buffers_keep_their_dtype_when_the_model_is_cast():
    model = get_peft_model(base_and_inputs("mlp")[0], awake("mergeable weight", ("lin0",)))
    model.to(torch.bfloat16)
    buffers = {name.rpartition(".")[2]: buffer.dtype for name, buffer in model.named_buffers()}
    assert buffers["scale"] == torch.float32 and buffers["index"] == torch.int32
