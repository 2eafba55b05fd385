"""A layer and its change in one product: what comes out, and when the two are computed apart after all."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.models import Chain, bio_layers, needs_graphs, own_parameters
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import bioadapt.tuner.layer
from bioadapt import BioConfig, compile_adapters, list_primitives, primitive_info
from bioadapt.methods import _sparse_product
from bioadapt.tuner.single_product import single_product

ON_WEIGHT = [name for name in list_primitives() if primitive_info(name).kind == "weight"]
JOINING = [name for name in ON_WEIGHT if math.isfinite(primitive_info(name).factory.joins_product_from)]
N, M, TOKENS = 40, 24, 64


def adapted(name: str, *, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Chain(first=nn.Linear(N, M, bias=bias))
    return get_peft_model(model, BioConfig([name], target_modules=["first"], init_weights=False))


def outcome(model: nn.Module, v: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    v = v.clone().requires_grad_()
    y = model(v)
    ramp = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad(y, [v, *own_parameters(model).values()], ramp)]


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, TOKENS // 2, N, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def joint(monkeypatch) -> list[bool]:
    """For each layer that was asked in a forward, whether one product gave its output."""
    found: list[bool] = []

    def asked(*args):
        y = single_product(*args)
        found.append(y is not None)
        return y

    monkeypatch.setattr(bioadapt.tuner.layer, "single_product", asked)
    return found


def watched(model: nn.Module) -> nn.Module:
    """Somebody listens at the layer itself."""
    bio_layers(model)[0].base_layer.register_forward_hook(lambda *run: None)
    return model


@pytest.mark.parametrize("name", JOINING)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_and_gradients_are_those_of_two_products(name, bias, dtype, joint):
    found = outcome(adapted(name, bias=bias).to(dtype), tokens(dtype))
    expected = outcome(watched(adapted(name, bias=bias).to(dtype)), tokens(dtype))
    assert joint == [True, False]
    for own, other in zip(found, expected, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", JOINING)
def test_a_fresh_adapter_changes_nothing_at_all(name, joint):
    torch.manual_seed(0)
    plain = Chain(first=nn.Linear(N, M))
    expected = plain(tokens()).detach()
    assert torch.equal(get_peft_model(plain, BioConfig([name], target_modules=["first"]))(tokens()), expected)
    assert joint == [True]


def listens_backwards(model: nn.Module) -> None:
    bio_layers(model)[0].base_layer.register_full_backward_hook(lambda *run: None)


def listens_to_the_primitive(model: nn.Module) -> None:
    next(bio_layers(model)[0].primitives()).register_forward_hook(lambda *run: None)


def patched(model: nn.Module) -> None:
    layer = bio_layers(model)[0].base_layer
    layer.forward = lambda v, forward=layer.forward: 2 * forward(v)


def trained_along(model: nn.Module) -> None:
    bio_layers(model)[0].base_layer.weight.requires_grad_(True)


def half(model: nn.Module) -> None:
    bio_layers(model)[0].base_layer.to(torch.bfloat16)


def beside_another(model: nn.Module) -> None:
    model.add_adapter("other", BioConfig(["gain_field"], target_modules=["first"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize("name", JOINING)
@pytest.mark.parametrize(
    "change",
    [
        watched,
        listens_backwards,
        listens_to_the_primitive,
        patched,
        trained_along,
        half,
        beside_another,
        pytest.param(compile_adapters, marks=needs_graphs),
    ],
)
def test_a_layer_that_is_more_than_a_frozen_product_runs_itself(name, change, joint):
    model = adapted(name)
    change(model)
    v = tokens(torch.bfloat16 if change is half else torch.float32)
    with torch.no_grad():
        model(v)
    assert not any(joint)


@pytest.mark.parametrize("name", JOINING)
def test_a_watcher_of_all_modules_sees_the_layer(name):
    model, seen = adapted(name), []
    with register_module_forward_hook(lambda module, given, made: seen.append(module)):
        model(tokens())
    assert bio_layers(model)[0].base_layer in seen


@pytest.mark.parametrize("name", JOINING)
def test_over_a_lora_the_lora_is_in_the_output(name, joint):
    torch.manual_seed(0)
    lora = get_peft_model(
        Chain(first=nn.Linear(N, M)), LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    )
    expected = lora(tokens()).detach()
    model = get_peft_model(lora, BioConfig([name], target_modules=["first"]))
    assert torch.allclose(model(tokens()), expected)
    assert not any(joint)


@pytest.mark.parametrize("name", JOINING)
def test_few_tokens_and_wide_layers_are_worth_no_matrix(name, joint, monkeypatch):
    model = adapted(name)
    with torch.no_grad():
        model(tokens()[:1, :1])
        monkeypatch.setattr(_sparse_product, "BYTES", 4 * N * M - 1)
        model(tokens())
    assert joint == [False, False]


@pytest.mark.parametrize("name", JOINING)
def test_merged_or_disabled_the_layer_is_itself(name, joint):
    model = adapted(name)
    with torch.no_grad():
        expected = model(tokens())
        with model.disable_adapter():
            assert not torch.allclose(model(tokens()), expected)
        model.merge_adapter()
        assert torch.allclose(model(tokens()), expected, atol=1e-5)
    assert joint == [True]
