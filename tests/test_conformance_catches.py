"""The conformance suite itself: each of these primitives breaks one promise, and one test says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bioadapt import list_primitives, register_primitive, registry
from bioadapt.primitives._state import Memory
from bioadapt.primitives.base import LocalRule, Primitive
from bioadapt.testing import HOSTS, AdapterConformance, PrimitiveConformance
from bioadapt.testing.adapter.subject import Adapted
from bioadapt.testing.compare import assert_equal_tensors, assert_identical
from bioadapt.testing.primitive.subject import Subject, subject_of

NAME = "faulty"


@pytest.fixture(autouse=True)
def registered_for_this_test_only(monkeypatch: pytest.MonkeyPatch) -> None:
    list_primitives()
    monkeypatch.setattr(registry, "_infos", dict(registry._infos))


def register(cls: type[Primitive], kind: str = "pointwise", **declared: Any) -> Subject:
    cls.__doc__ = "Faulty.\n\nBiology: none.\n\nEquation: none.\n\nReference: none."
    register_primitive(NAME, stage="dynamics", kind=kind, **{"zero_at": "gate", **declared})(cls)
    return subject_of(NAME, 24, 32)


def running_sum(x, context):
    return x.cumsum(1)


def looping_sum(x, context):
    return torch.stack([x[:, : t + 1].sum(1) for t in range(x.shape[1])], 1)


def primitive_of(transform: Callable) -> type[Primitive]:
    """A primitive without parameters of its own."""
    return type("Faulty", (Primitive,), {"transform": lambda self, x, context: transform(x, context)})


TRANSFORMS = [
    ("test_no_sample_reaches_another", "pointwise", lambda x, c: x - x.mean(0)),
    ("test_no_token_reaches_an_earlier_one", "causal", lambda x, c: x.flip(1).cumsum(1).flip(1)),
    ("test_only_temporal_kinds_reach_later_tokens", "pointwise", running_sum),
    ("test_only_temporal_kinds_reach_later_tokens", "causal", lambda x, c: x.tanh()),
    ("test_padding_is_invisible", "causal", running_sum),
    ("test_padding_gets_no_gradient_from_real_tokens", "causal", running_sum),
    ("test_packed_documents_are_separate", "causal", running_sum),
    ("test_prefill_and_steps_equal_the_full_forward", "causal", running_sum),
    ("test_left_padded_prompts_decode_as_alone", "causal", running_sum),
    ("test_cropping_back_and_going_on_equals_going_straight", "causal", running_sum),
    ("test_carried_state_follows_reordered_samples", "causal", running_sum),
    ("test_eval_is_deterministic_and_leaves_no_trace", "pointwise", lambda x, c: x * torch.rand_like(x)),
    ("test_half_precision_features_stay_finite", "pointwise", lambda x, c: x.exp()),
    ("test_gradient_at_zero_is_finite", "pointwise", lambda x, c: x.square().sum(-1, keepdim=True).sqrt() * x),
    ("test_woken_changes_every_sample", "pointwise", lambda x, c: 0 * x),
    (
        "test_no_loop_over_tokens",
        "causal",
        lambda x, c: torch.stack([x[:, : t + 1].sum(1) for t in range(x.shape[1])], 1),
    ),
    ("test_one_token", "causal", lambda x, c: x * x.shape[1]),
]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "test_padding_is_invisible": {"side": "left", "bidirectional": False},
    "test_packed_documents_are_separate": {"bidirectional": False},
    "test_half_precision_features_stay_finite": {"dtype": torch.float16},
    "test_merged_change_equals_the_forward": {"biased": False},
    "test_nothing_is_learned_in_eval_or_unobserved": {"training": False},
    "test_nothing_is_learned_from_padding": {"bidirectional": False},
    "test_what_is_not_finite_leaves_no_trace": {"broken": float("nan")},
}


def run(test: str, subject: Subject) -> None:
    getattr(PrimitiveConformance(), test)(subject, **ARGUMENTS.get(test, {}))


@pytest.mark.parametrize(("test", "kind", "transform"), TRANSFORMS, ids=[f"{t}-{k}" for t, k, _ in TRANSFORMS])
def test_wrong_functions_are_caught(test, kind, transform):
    subject = register(primitive_of(transform), kind)
    with pytest.raises(AssertionError):
        run(test, subject)


class NotTheIdentity(Primitive):
    def build(self, host):
        self.out = nn.Parameter(torch.ones(self.d_out))

    def transform(self, x, context):
        return self.out * x


class Idle(Primitive):
    def build(self, host):
        self.idle = nn.Parameter(torch.ones(3))

    def transform(self, x, context):
        return x


class Frozen(Primitive):
    def build(self, host):
        self.frozen = nn.Parameter(torch.ones(self.d_out), requires_grad=False)

    def transform(self, x, context):
        return self.frozen * x


class Square(Primitive):
    def build(self, host):
        self.matrix = nn.Parameter(torch.randn(self.d_out, self.d_out))

    def transform(self, x, context):
        return x @ self.matrix


class AnotherEveryTime(Primitive):
    def build(self, host):
        self.register_buffer("projection", torch.randn(self.d_out))

    def transform(self, x, context):
        return self.projection * x


class LearnsInForward(LocalRule, Primitive):
    def build(self, host):
        self.declare_statistics()
        self.register_buffer("mean", torch.zeros(self.d_out))

    def transform(self, x, context):
        self.mean.copy_(x.detach().mean((0, 1)))
        return x - self.mean


class Learns(LocalRule, Primitive):
    """Right, but for what the subclasses do."""

    def build(self, host):
        self.register_buffer("mean", torch.zeros(self.d_out))
        self.declare_statistics(mean=(self.d_out,))

    def transform(self, x, context):
        self.observe(context, mean=x.detach().mean((0, 1)))
        return x - self.mean

    def learn(self, fresh):
        self.mean.add_(fresh * (self.observed_mean - self.mean))


class CommitsForever(Learns):
    def commit(self):
        super().commit()
        self.mean.add_(1.0)


class LearnsForever(Learns):
    def learn(self, fresh):
        self.mean.add_(1.0)


class LearnsInEval(Learns):
    def transform(self, x, context):
        self.train()
        self.observe(context, mean=x.detach().mean((0, 1)))
        return x


class WrongMerge(Primitive):
    def transform(self, x, context):
        return 0.5 * x

    def left_matrix(self):
        return torch.ones(self.d_out)


MODULES = [
    ("test_fresh_is_the_identity_bit_for_bit", NotTheIdentity, {"zero_at": "readout"}),
    ("test_every_trainable_tensor_has_had_gradient_by_the_fourth_step", Idle, {}),
    ("test_declared_parameter_count_is_the_number_of_trainable_numbers", Frozen, {}),
    ("test_parameters_grow_with_the_width_and_not_with_its_square", Square, {}),
    ("test_frozen_matrices_depend_on_the_hosts_seed_alone", AnotherEveryTime, {}),
    ("test_only_a_commit_changes_what_a_local_rule_governs", LearnsInForward, {"learns": True}),
    ("test_only_a_commit_changes_what_a_local_rule_governs", Learns, {"learns": False}),
    ("test_eval_is_deterministic_and_leaves_no_trace", LearnsInForward, {}),
    ("test_nothing_is_learned_from_padding", Learns, {"learns": True}),
    ("test_a_commit_happens_once", CommitsForever, {"learns": True}),
    ("test_what_is_not_finite_leaves_no_trace", LearnsForever, {"learns": True}),
    ("test_nothing_is_learned_in_eval_or_unobserved", LearnsInEval, {"learns": True}),
    ("test_merged_change_equals_the_forward", WrongMerge, {"merge": "left"}),
]


@pytest.mark.parametrize(("test", "module", "declared"), MODULES, ids=[f"{t}-{m.__name__}" for t, m, _ in MODULES])
def test_wrong_modules_are_caught(test, module, declared):
    subject = register(type(module.__name__, (module,), {}), **declared)
    with pytest.raises(AssertionError):
        run(test, subject)


def test_hidden_copies_are_caught():
    register(primitive_of(lambda x, c: x * x.sin() * x.cos() * x.exp() * x.tanh() * x.sigmoid() * x.atan()))
    with pytest.raises(AssertionError, match="keeps"):
        PrimitiveConformance().test_keeps_no_hidden_copies_for_backward(NAME)


def test_a_graph_break_is_caught():
    def broken(x, context):
        torch._dynamo.graph_break()
        return x

    subject = register(primitive_of(broken))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        PrimitiveConformance().test_compiles_without_a_graph_break(subject)


def test_global_primitives_are_refused_on_causal_models_alone():
    register(primitive_of(lambda x, c: x.mean(1, keepdim=True).expand_as(x)), kind="global")
    for name in ("gpt2", "qwen2", "t5"):
        refused = Adapted([NAME], {}, HOSTS[name])
        AdapterConformance().test_global_primitives_are_refused_on_causal_models(refused, refused.host)
    served = Adapted([NAME], {}, HOSTS["bert"])
    AdapterConformance().test_woken_changes_every_sample(served)
    with pytest.raises(AssertionError):  # it takes the padding into its mean
        AdapterConformance().test_padding_is_invisible(served, "right")


def test_a_state_that_does_not_follow_the_beams_is_caught(monkeypatch):
    monkeypatch.setattr(Memory, "map", lambda self, fn: None)
    adapted = Adapted(["predictive_coding"], {}, HOSTS["qwen2"])
    with pytest.raises(AssertionError):
        AdapterConformance().test_generation_is_the_same_with_and_without_cache(adapted, beams=3)


def test_woken_models_are_equal_and_share_nothing():
    adapted = Adapted(["hebbian_trace"], {}, HOSTS["t5"])
    built, first, second = adapted.wake(), adapted.woken(), adapted.woken()
    assert first.base_model.model.shared.weight is first.base_model.model.encoder.embed_tokens.weight
    assert_equal_tensors(first.state_dict(), built.state_dict(), "a cast")
    with torch.no_grad():
        for tensor in first.state_dict().values():
            tensor.zero_()
    assert_equal_tensors(second.state_dict(), built.state_dict(), "another cast")
    assert_identical(adapted.output(second), adapted.output(built), "what a cast makes of its inputs")


def test_a_name_registered_anew_is_another_adapter():
    outputs = []
    for factor in (1.0, 2.0):
        register(primitive_of(lambda x, c, factor=factor: factor * x))
        adapted = Adapted([NAME], {}, HOSTS["bert"])
        outputs.append(adapted.output(adapted.woken()))
    assert not torch.equal(*outputs)


def test_a_gate_that_hardly_opens_is_caught():
    register(primitive_of(lambda x, c: x.tanh()), zero_scale=0.01)
    with pytest.raises(AssertionError, match="a larger zero_scale is needed"):
        AdapterConformance().test_a_loras_learning_rate_moves_it(Adapted([NAME], {}, HOSTS["bert"]))
