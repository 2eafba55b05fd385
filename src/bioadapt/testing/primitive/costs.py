"""What it costs, and that it compiles: contract, points 5 and 6."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...primitives.base import Context, Host, Primitive
from ...registry import build_primitive
from ...tuner.patches import HAS_GRAPHS
from ..compare import assert_equal_tensors, assert_same, gradients, random, seeded
from .subject import AS_WIDTHS, BOTH_WIDTHS, EVEN, Bare, Subject, buffers, subject_of

# A sentence encoder as small as those in use: hidden 384, six layers, of which attention output and MLP output are
# adapted, 22.7 million parameters.
ENCODER_SITES, ENCODER_LAYERS, ENCODER_SIZE = ((384, 384), (1536, 384)), 6, 22_713_216


class Costs(Bare):
    """Few parameters, few bytes, no graph breaks."""

    @BOTH_WIDTHS
    def test_declared_parameter_count_is_the_number_of_trainable_numbers(self, subject: Subject) -> None:
        declared = subject.info.parameter_count(subject.d_in, subject.d_out, **subject.settings)
        named = dict(subject.fresh().named_parameters())
        assert all(parameter.requires_grad for parameter in named.values()), "what is frozen is a buffer"
        assert sum(parameter.numel() for parameter in named.values()) == declared

    def test_parameter_count_depends_on_sizes_alone(self, subject: Subject) -> None:
        declared = subject.info.parameter_count(subject.d_in, subject.d_out, **subject.settings)
        for seed in range(3):
            host = Host(random(subject.d_out, subject.d_in, seed=seed), seed=seed)
            primitive = build_primitive(subject.name, subject.d_in, subject.d_out, host=host, **subject.settings)
            assert sum(parameter.numel() for parameter in primitive.parameters()) == declared

    def test_parameters_grow_with_the_width_and_not_with_its_square(self, subject: Subject) -> None:
        narrow, wide = (subject.info.parameter_count(d, d, **subject.settings) for d in (512, 1024))
        assert wide <= 2 * narrow, f"{narrow} at width 512, {wide} at twice that"

    def test_default_is_a_small_part_of_a_small_encoder(self, subject: Subject) -> None:
        share = ENCODER_LAYERS * sum(subject.info.parameter_count(*site) for site in ENCODER_SITES) / ENCODER_SIZE
        allowed = self.parameters_more.get(subject.name, self.parameters_at_most)
        assert share <= allowed, f"{subject.name} adds {share:.2%} of the encoder's parameters, not {allowed:.2%}"

    def test_keeps_no_hidden_copies_for_backward(self, primitive: str | dict) -> None:
        subject = subject_of(primitive, 64, 64)
        module, x, x_in = subject.woken().train(), subject.features(tokens=128), subject.inputs(tokens=128)
        x.requires_grad_(), x_in.requires_grad_()
        known = [x, x_in, *module.parameters(), *module.buffers()]
        kept = saved_bytes(lambda: module(x, Context(x_in=x_in)), known) / x.untyped_storage().nbytes()
        allowed = self.saved_more.get(subject.name, self.saved_at_most)
        assert kept <= allowed, f"{subject.name} keeps {kept:.2f} times the bytes of x for backward, not {allowed}"

    def test_no_loop_over_tokens(self, subject: Subject) -> None:
        primitive, counts = subject.woken().train(), []
        for tokens in (64, 512):
            x, context = subject.features(1, tokens), Context(x_in=subject.inputs(1, tokens))
            with Calls() as calls, seeded(6):
                primitive(x, context)
            counts.append(calls.count)
        few, many = counts
        # A scan has three levels more over eight times as many tokens, a loop eight times as many operations.
        assert many <= 2 * few + 8, f"{subject.name}: {few} operations on 64 tokens, {many} on eight times as many"

    @pytest.mark.skipif(not HAS_GRAPHS, reason="this torch is too old to compile with")
    @pytest.mark.parametrize("widths", [EVEN], indirect=True, ids=AS_WIDTHS)
    def test_compiles_without_a_graph_break(self, subject: Subject) -> None:
        training = not subject.info.stochastic  # a compiled graph may draw other random numbers
        eager, compiled = (subject.woken().train(training) for _ in range(2))
        torch._dynamo.reset()
        graph = torch.compile(compiled, backend=self.compile_backend, fullgraph=True, dynamic=False)
        results = []
        for module, call in ((eager, eager), (compiled, graph)):
            x, x_in = subject.features(2, 5).requires_grad_(), subject.inputs(2, 5)
            delta = call(x, Context(x_in=x_in))
            (x + delta).square().mean().backward()
            results.append({"delta": delta.detach(), "x": x.grad, **gradients(module), **buffers(module)})
        torch._dynamo.reset()
        for name, expected in results[0].items():
            assert_same(results[1][name].float(), expected.float(), f"{subject.name}, compiled: {name}")

    def test_frozen_matrices_depend_on_the_hosts_seed_alone(self, subject: Subject) -> None:
        """Not on what else drew random numbers before: they may be left out of a file and made anew."""
        host = Host(subject.weight, seed=7)
        first, second = (built(subject, host, draws) for draws in (0, 5))
        assert_equal_tensors(buffers(first), buffers(second), f"{subject.name}: built again")


class Calls(TorchFunctionMode):
    """Counts the tensor operations that Python asks for while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def saved_bytes(forward: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes of the storages that autograd keeps for the backward of ``forward``, each once, without the known ones."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until the end, so that no address is used twice
    free = {tensor.untyped_storage().data_ptr() for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in free:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(forward())
    return sum(sizes.values())


def built(subject: Subject, host: Host, draws: int) -> Primitive:
    with seeded(draws):
        torch.rand(draws + 1)
        return build_primitive(subject.name, subject.d_in, subject.d_out, host=host, **subject.settings)
