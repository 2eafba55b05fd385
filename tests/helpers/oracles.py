"""Mechanisms next to their equations: how a primitive is made for a test, and that two ways to compute it agree."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bioadapt import build_primitive
from bioadapt.primitives.base import Context, Host
from bioadapt.primitives.frames import token_scale, unit


def awake(name: str, seed: int, d: int = 24, **settings):
    """With a gate of one, so that the change is the mechanism's own."""
    torch.manual_seed(seed)
    module = build_primitive(name, d, d, **settings)
    with torch.no_grad():
        module.gate.fill_(1.0)
        if module.zero_at == "readout":
            module.writer.normal_()
    return module.eval()


def assert_agrees(module, expected: Callable[[Tensor], Tensor], x: Tensor, context: Context | None = None):
    """Value and all gradients of the module equal those of another way to compute the same."""
    with torch.no_grad():
        module.wake()
    x = x.clone().requires_grad_()
    weights, results = torch.randn_like(x), []
    for change in (module(x, context), expected(x)):
        gradients = torch.autograd.grad((change * weights).sum(), (x, *module.parameters()))
        results.append((change, *gradients))
    for found, wanted in zip(*results, strict=True):
        assert wanted.any()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * max(1.0, wanted.abs().max().item()))


def scan(step: Callable[[Tensor, Tensor], Tensor], series: Tensor, state: Tensor) -> Tensor:
    """All states of h = step(h, z), one token after the other: series (B, T, ...) -> (B, T, ...)."""
    found = []
    for t in range(series.shape[1]):
        state = step(state, series[:, t])
        found.append(state)
    return torch.stack(found, 1)


def written(module, code: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """gate s U code(D u)."""
    return lambda x: module.gate * token_scale(x) * (code(unit(x) @ module.reader.T) @ module.writer.T)


def born(name: str, seed: int, d: int = 37, n: int | None = None, level: float | None = None, **settings) -> nn.Module:
    """As it is born, but with an open gate."""
    torch.manual_seed(seed)
    module = build_primitive(name, n or d, d, host=Host(seed=seed), **settings)
    with torch.no_grad():
        module.gate.fill_(1.0)
        if level is not None:
            module.log_level.fill_(math.log(level))
    return module


def assert_law(module: nn.Module, by_equation: Callable[[Tensor], Tensor], x: Tensor, context: Context | None = None):
    """The woken module and its equation agree in the change at real tokens and in all gradients."""
    module.wake()
    context = context or Context()
    x = x.requires_grad_()
    weight = torch.randn_like(x)
    if context.mask is not None:
        weight = weight * context.mask[..., None]
    results = []
    for function in (lambda x: module(x, context), lambda x: module.gate * by_equation(x)):
        delta = function(x)
        grads = torch.autograd.grad((delta * weight).sum(), (x, *module.parameters()), allow_unused=True)
        results.append((delta * (weight != 0), *grads))
    for name, found, expected in zip(["delta", "x", *dict(module.named_parameters())], *results, strict=True):
        if found is None and expected is None:
            assert name == "x" and module.kind == "weight"
            continue
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def both_ways(read: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return 0.5 * (read(x) + read(x.flip(1)).flip(1))


def past(z: Tensor, tau: Tensor | float, initial: float = 0.0) -> Tensor:
    """E_tau(z)_{t-1}, token by token."""
    decay, h, found = torch.exp(-1 / torch.as_tensor(tau)), torch.full_like(z[:, 0], initial), []
    for t in range(z.shape[1]):
        found.append(h)
        h = decay * h + (1 - decay) * z[:, t]
    return torch.stack(found, 1)


def results_of(function, inputs: tuple[Tensor, ...], parameters, weight: Tensor) -> list[Tensor]:
    """The value and the gradients of its product with the weight."""
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), (*inputs, *parameters), allow_unused=True)]


def assert_follows(module, plain, *inputs: Tensor, tolerance: float = 1e-4) -> None:
    """Value and all gradients of the module are those of the plain form of its equation."""
    inputs, weight = tuple(tensor.detach().requires_grad_() for tensor in inputs), torch.randn_like(inputs[0])

    def fast(x, v=None):
        return module(x, Context(x_in=v))

    forms = (fast, lambda *tensors: module.gate * plain(*tensors))
    results = [results_of(form, inputs, list(module.parameters()), weight) for form in forms]
    for found, expected in zip(*results, strict=True):
        if found is None or expected is None:
            assert found is expected
        else:
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def woken(name: str, seed: int, n: int, d: int, **settings):
    torch.manual_seed(seed)
    module = build_primitive(name, n, d, host=Host(seed=seed), **settings)
    module.wake()
    return module
