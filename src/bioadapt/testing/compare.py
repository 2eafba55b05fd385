"""What both suites share: equality with one tolerance, and random numbers that leave the caller's alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5  # of fp32 results that are the same sum in another order, relative to the largest of them


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """The same random numbers on the CPU whatever ran before; the generator's state is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` walks over accelerators, which is slow
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Equal up to ``tolerance`` times the largest expected magnitude, which must be finite."""
    assert torch.isfinite(found).all(), f"{what}: not finite"
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale, msg=lambda text: f"{what}: {text}")


def assert_identical(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal in every bit but the sign of zero."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, f"{what}: another shape or dtype"
    assert torch.equal(found, expected), f"{what}: differs by {(found - expected).abs().max().item():.3g}"


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """The same names with identical tensors."""
    assert found.keys() == expected.keys(), f"{what}: other names"
    for name, tensor in expected.items():
        assert_identical(found[name], tensor, f"{what}: {name}")


def assert_finite(tensors: dict[str, Tensor], what: str) -> None:
    """No infinity and no NaN in any floating tensor."""
    for name, tensor in tensors.items():
        assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), f"{what}: {name} is not finite"


def copied(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A snapshot of named tensors."""
    return {name: tensor.detach().clone() for name, tensor in tensors}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients of all trainable parameters; zeros where there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
