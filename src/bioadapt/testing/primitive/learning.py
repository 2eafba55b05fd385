"""State that training changes without gradients: contract, point 8."""

from __future__ import annotations

import pytest
import torch

from ...primitives.base import Context, LocalRule
from ..compare import assert_equal_tensors, assert_identical, assert_same, copied, seeded
from .subject import BOTH_WIDTHS, Bare, Subject, buffers, commit, learn, learned
from .time import JUNK, padded


class LocalLearning(Bare):
    """A local rule acts in a commit after a training forward, and in nothing else."""

    @BOTH_WIDTHS
    def test_only_a_commit_changes_what_a_local_rule_governs(self, subject: Subject) -> None:
        primitive, x, context = subject.woken().train(), subject.features(), Context(x_in=subject.inputs())
        before = learned(primitive)
        with seeded(6):
            primitive(x, context).square().mean().backward()
        assert_equal_tensors(learned(primitive), before, f"{subject.name}: buffers after a forward")
        with torch.no_grad():  # some rules act on the update itself
            for parameter in primitive.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad.sign())
        before = copied(primitive.state_dict().items())
        commit(primitive)
        after = primitive.state_dict()
        changed = [name for name in after if not torch.equal(after[name], before[name])]
        declared = subject.info.learns
        assert bool(changed) == declared, f"{subject.name}: learns={declared}, but changed: {changed}"

    def test_a_commit_happens_once(self, subject: Subject) -> None:
        primitive = subject.woken()
        learn(primitive, subject.features(), subject.inputs())
        before = buffers(primitive)
        commit(primitive)
        assert_equal_tensors(buffers(primitive), before, f"{subject.name}: a second commit")

    @pytest.mark.parametrize("broken", [float("nan"), float("inf")])
    def test_what_is_not_finite_leaves_no_trace(self, subject: Subject, broken: float) -> None:
        primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
        before = learned(primitive)
        x[1, 3], x_in[1, 3] = broken, broken
        with seeded(6):
            learn(primitive, x, x_in)
        if not isinstance(primitive, LocalRule) or primitive.governed:  # such a rule goes by the update alone
            return
        assert_equal_tensors(learned(primitive), before, f"{subject.name}: buffers after {broken}")

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "unobserved"])
    def test_nothing_is_learned_in_eval_or_unobserved(self, subject: Subject, training: bool) -> None:
        primitive = subject.woken().train(training)
        before = buffers(primitive)
        with seeded(6):
            primitive(subject.features(), Context(x_in=subject.inputs(), observing=not training))
        commit(primitive)
        assert_equal_tensors(buffers(primitive), before, f"{subject.name}: buffers, training={training}")

    def test_a_repeated_forward_is_learned_from_once(self, subject: Subject) -> None:
        """Forwards between two commits share what is observed: the same data twice is no stronger evidence."""
        once, twice = subject.woken().train(), subject.woken().train()
        x, context = subject.features(), Context(x_in=subject.inputs())
        for primitive, count in ((once, 1), (twice, 2)):
            for _ in range(count):
                with seeded(6):
                    primitive(x, context)
            commit(primitive)
        assert_equal_tensors(buffers(twice), buffers(once), f"{subject.name}: a repeated forward")

    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_nothing_is_learned_from_padding(self, subject: Subject, bidirectional: bool) -> None:
        mask, found = padded("right"), []
        for junk in (0.0, JUNK):
            primitive, x, x_in = subject.woken(), subject.features(), subject.inputs()
            x[~mask], x_in[~mask] = junk, -junk
            with seeded(6):
                learn(primitive, x, x_in, mask=mask, bidirectional=bidirectional)
            found.append(learned(primitive))
        for name, expected in found[0].items():
            assert_same(found[1][name].float(), expected.float(), f"{subject.name}: {name} after other padding")

    def test_saved_state_restores_the_function(self, subject: Subject) -> None:
        primitive, other = subject.woken(), subject.fresh().eval()
        other.load_state_dict(primitive.state_dict())
        x, context = subject.features(), Context(x_in=subject.inputs())
        assert_identical(other(x, context), primitive(x, context), f"{subject.name}: loaded")
        assert_equal_tensors(learned(other), learned(primitive), f"{subject.name}: loaded")
