"""Over layers that bitsandbytes has quantised, through PEFT's own backends."""

from __future__ import annotations

import pytest
import torch
from helpers.models import PRIMITIVES, Chain, awake, bio_layers, close, digest, output, own_parameters, step, unchanged
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the quantised layers are those of bitsandbytes")
D = 64
# Writing back rounds once more: how far that leads away, as a share of what the adapter does.
ROUNDING = {"4bit": 0.3, "8bit": 0.05}
BACKENDS = {"4bit": "bnb 4bit", "8bit": "bnb 8bit"}


def quantised(bits: str) -> nn.Module:
    torch.manual_seed(0)
    host = Chain(lin=nn.Linear(D, D), out=nn.Linear(D, 8))
    if bits == "4bit":
        layer = bitsandbytes.nn.Linear4bit(D, D, compute_dtype=torch.float32, quant_type="nf4")
    else:
        layer = bitsandbytes.nn.Linear8bitLt(D, D, has_fp16_weights=False)
    layer.load_state_dict(host.lin.state_dict())
    host.lin = layer
    setattr(host, f"is_loaded_in_{bits}", True)  # what transformers sets, and by which PEFT's LoRA finds its layer
    return host.to("cpu").eval()


@pytest.fixture(scope="module", params=["4bit", "8bit"])
def bits(request) -> str:
    try:
        found = output(quantised(request.param), _inputs())
    except Exception as error:  # what bitsandbytes raises where it has no kernel is its own affair
        pytest.skip(f"bitsandbytes cannot run {request.param} layers here: {error}")
    if found.isnan().any():
        pytest.skip(f"bitsandbytes gives no numbers for {request.param} layers here")
    return request.param


def strong(model: PeftModel) -> PeftModel:
    """An adapter whose effect is large beside the steps of four bits."""
    with torch.no_grad():
        for name, parameter in own_parameters(model).items():
            if name.endswith(("gate", "values")):
                parameter.mul_(4)
    return model


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().mean().item()


def _inputs() -> torch.Tensor:
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))


@pytest.mark.compatible("Bases", "bitsandbytes, 4 and 8 bits")
@pytest.mark.parametrize("named", PRIMITIVES)
def test_adapters_act_train_and_go(bits, named, tmp_path):
    inputs, base = _inputs(), quantised(bits)
    plain = output(base, inputs)
    fresh = get_peft_model(base, awake(named, ["lin"], init_weights=True))
    assert torch.equal(output(fresh, inputs), plain)
    assert torch.equal(output(fresh.unload(), inputs), plain)
    model = get_peft_model(quantised(bits), awake(named, ["lin"]))
    assert model.get_model_status().quantization_backend == BACKENDS[bits]
    assert {parameter.dtype for parameter in own_parameters(model).values()} == {torch.float32}
    assert not close(output(model, inputs), plain, 1e-3)
    stored = model.base_model.model.lin.base_layer.weight.data.clone()
    before = {name: parameter.detach().clone() for name, parameter in own_parameters(model).items()}
    step(model, inputs)
    assert torch.equal(model.base_model.model.lin.base_layer.weight.data, stored)
    assert not any(torch.equal(parameter, before[name]) for name, parameter in own_parameters(model).items())
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(bits), tmp_path)
    assert close(output(loaded, inputs), output(model, inputs), 1e-5)


@pytest.mark.compatible("Bases", "bitsandbytes, 4 and 8 bits: merging")
@pytest.mark.parametrize("seen", [False, True], ids=["never run", "run before"])
@pytest.mark.parametrize("named", ["mergeable", "mergeable weight"])
def test_merging_rounds_once_and_unmerging_restores(bits, named, seen):
    """bitsandbytes keeps its numbers in another form once a layer has run."""
    inputs = _inputs()
    twin, model = (strong(get_peft_model(quantised(bits), awake(named, ["lin"]))) for _ in range(2))
    bio_layers(model)[0].circuits.load_state_dict(bio_layers(twin)[0].circuits.state_dict())
    wanted = output(twin, inputs)
    with twin.disable_adapter():
        allowed = ROUNDING[bits] * distance(output(twin, inputs), wanted)
    if seen:
        output(model, inputs)
    kind = type(model.base_model.model.lin.base_layer.weight)
    for _ in range(3):
        model.merge_adapter()
        merged = output(model, inputs)
        assert 0 < distance(merged, wanted) < allowed
        assert type(model.base_model.model.lin.base_layer.weight) is kind
        model.unmerge_adapter()
        assert close(output(model, inputs), wanted, 1e-5)
        model.to("cpu")
        assert close(output(model, inputs), wanted, 1e-5)
    bare = model.merge_and_unload()
    assert distance(output(bare, inputs), wanted) < allowed
    assert type(bare.lin) is type(quantised(bits).lin)


def test_what_was_run_is_restored_bit_for_bit(bits):
    inputs = _inputs()
    model = get_peft_model(quantised(bits), awake("mergeable weight", ["lin"]))
    wanted = output(model, inputs)
    before = digest(model.state_dict())
    wanted = output(model, inputs)
    model.merge_adapter()
    output(model, inputs)
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), wanted)
    assert digest(model.state_dict()) == before


def test_broken_numbers_are_refused(bits):
    model = get_peft_model(quantised(bits), awake("mergeable", ["lin"]))
    output(model, _inputs())
    next(iter(own_parameters(model).values())).data[0] = torch.nan
    with unchanged(model), pytest.raises(ValueError, match="lin.*not finite"):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_over_a_lora_on_a_quantised_base(bits):
    inputs, base = _inputs(), quantised(bits)
    under = get_peft_model(base, LoraConfig(target_modules=["lin"], r=2, init_lora_weights=False))
    plain = output(under, inputs)
    model = strong(get_peft_model(under, awake("mergeable weight", ["lin"])))
    wanted = output(model, inputs)
    allowed = 2 * ROUNDING[bits] * distance(wanted, plain)  # the LoRA's merge rounds as well
    assert bio_layers(model)[0].quantization_backend.backend_name == BACKENDS[bits]
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), plain)
    model.merge_adapter()
    assert 0 < distance(output(model, inputs), wanted) < allowed
    model.unmerge_adapter()
    assert close(output(model, inputs), wanted, 1e-5)
    assert model.unload() is under
    assert close(output(under, inputs), plain, 1e-5)
