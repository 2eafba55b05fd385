"""The Fly Model: rules are their equations, silent synapses stay as they are, and odours are not forgotten."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from bioadapt.circuits.fly_model import RULES, FlyModelClassifier

SEEDS = range(4)


def odours(seed: int, classes: int = 20, inputs: int = 50, trials: int = 30):
    """Trials of odours: multiplicative and additive noise around Gamma(1, 1) patterns; without negative rates."""
    generator = np.random.default_rng(seed)
    y = np.arange(classes * trials) % classes
    pattern = generator.gamma(1.0, size=(classes, inputs))[y]
    noise, more = generator.normal(size=(2, len(y), inputs))
    return np.maximum(pattern * (1 + 0.3 * noise) + 0.3 * more, 0), y


@parametrize_with_checks([FlyModelClassifier(rule=rule, learning_rate=0.1) for rule in RULES])
def test_is_an_estimator(estimator, check):
    check(estimator)


# -- codes --


@pytest.mark.parametrize(("level", "active"), [(0.05, 100), (0.1, 200), (1e-9, 1)])
def test_exactly_l_cells_are_active_between_zero_and_one(level, active):
    X, y = odours(0)
    codes = FlyModelClassifier(2000, degree=7, coding_level=level).fit(X, y).codes(X)
    assert ((codes > 0).sum(1) == active).all()
    assert codes.min() >= 0
    np.testing.assert_array_equal(codes.max(1), 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_codes_see_neither_a_constant_nor_a_scale(seed):
    X, y = odours(seed)
    X = np.round(X * 1024) / 1024  # sums are exact: cells with equal inputs stay equal
    fly = FlyModelClassifier(random_state=seed).fit(X, y)
    np.testing.assert_allclose(fly.codes(4 * X + 11), fly.codes(X), atol=1e-10)


def test_codes_are_the_winners_of_sums_of_centred_inputs():
    X, y = odours(0)
    fly = FlyModelClassifier(300, degree=6).fit(X, y)
    assert set(np.unique(fly.projection_)) == {0, 1}
    assert (fly.projection_.sum(1) == 6).all()
    for x, code in zip(X[:20], fly.codes(X[:20]), strict=True):
        drive = fly.projection_ @ (x - x.mean())
        best = np.argsort(-drive)[:15]
        np.testing.assert_allclose(code[best], drive[best] / drive[best[0]])
        assert code.sum() == pytest.approx(code[best].sum())


# -- learning --


def written(rule: str, codes, labels, *, rate: float, forgetting: float):
    """The rules sample by sample as they stand in the docstring, with a row more for the classes not met."""
    memory = np.zeros((labels.max() + 2, codes.shape[1]))
    for h, y in zip(codes, labels, strict=True):
        grows = [(j == y) == (rule == "associative") for j in range(len(memory))]
        for j, grow in enumerate(grows):
            memory[j] = np.clip((1 - forgetting) * memory[j] + rate * grow * h, 0, 1)
    return memory[:-1], memory[-1]


@pytest.mark.parametrize("rule", ["associative", "depression"])
@pytest.mark.parametrize(("rate", "forgetting"), [(0.01, 0.0), (0.3, 0.0), (0.3, 0.1)])
def test_rules_are_their_equations(rule, rate, forgetting):
    X, y = odours(0, classes=4)
    fly = FlyModelClassifier(400, rule=rule, learning_rate=rate, forgetting=forgetting).fit(X, y)
    weights, unmet = written(rule, fly.codes(X), y, rate=rate, forgetting=forgetting)
    np.testing.assert_allclose(fly.weights_, weights, atol=1e-12)
    np.testing.assert_allclose(fly.unmet_, unmet, atol=1e-12)
    assert (fly.weights_.max() == 1) == (rate == 0.3 and not forgetting)
    scores = fly.codes(X) @ weights.T
    np.testing.assert_array_equal(fly.predict(X), (scores if rule == "associative" else -scores).argmax(1))


@pytest.mark.parametrize("forgetting", [0.0, 0.05])
def test_the_gradient_rule_is_gradient_descent_with_decay(forgetting):
    X, y = odours(0, classes=4, trials=8)
    fly = FlyModelClassifier(400, rule="gradient", learning_rate=0.2, forgetting=forgetting)
    fly.partial_fit(X, y, classes=range(5))
    weights = torch.zeros(5, 400, dtype=torch.float64, requires_grad=True)
    for h, label in zip(torch.tensor(fly.codes(X)), torch.tensor(y), strict=True):
        (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(weights @ h, label), weights)
        weights = ((1 - forgetting) * weights - 0.2 * slope).detach().requires_grad_()
    np.testing.assert_allclose(fly.weights_, weights.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_synapses_of_silent_cells_never_change(rule):
    X, y = odours(0, classes=6)
    fly = FlyModelClassifier(1000, rule=rule).fit(X, y)
    more = X[y == 3][:5]
    silent = ~fly.codes(more).any(0)
    before = fly.weights_.copy()
    fly.partial_fit(more, [3] * 5)
    np.testing.assert_array_equal(fly.weights_[:, silent], before[:, silent])
    assert silent.mean() > 0.5 and (fly.weights_ != before).any()


@pytest.mark.parametrize(("rule", "own"), [("associative", True), ("depression", False)])
def test_one_class_changes_its_own_row_alone_or_all_but_its_own(rule, own):
    X, y = odours(0, classes=6)
    fly = FlyModelClassifier(1000, rule=rule).fit(X, y)
    before = fly.weights_.copy()
    fly.partial_fit(X[y == 2], y[y == 2])
    changed = (fly.weights_ != before).any(1)
    np.testing.assert_array_equal(changed, [(label == 2) == own for label in range(6)])


@pytest.mark.rounding
@pytest.mark.parametrize("rule", ["associative", "depression"])
@pytest.mark.parametrize("rate", [0.001, 0.2])
def test_neither_pieces_nor_order_matter_to_the_local_rules(rule, rate):
    X, y = odours(0, classes=6)
    whole = FlyModelClassifier(500, rule=rule, learning_rate=rate).fit(X, y)
    parts = FlyModelClassifier(500, rule=rule, learning_rate=rate)
    for rows in np.array_split(np.argsort(-y, kind="stable"), 7):
        parts.partial_fit(X[rows], y[rows])
    np.testing.assert_allclose(parts.weights_, whole.weights_, atol=1e-12)
    np.testing.assert_array_equal(parts.predict(X), whole.predict(X))


@pytest.mark.rounding
@pytest.mark.parametrize("rule", ["associative", "depression"])
@pytest.mark.parametrize("forgetting", [0.0, 0.1])
def test_a_class_met_late_is_as_if_it_had_been_announced(rule, forgetting):
    X, y = odours(0, classes=4)
    late, early = (FlyModelClassifier(500, rule=rule, forgetting=forgetting, learning_rate=0.05) for _ in range(2))
    for labels in ((2, 3), (1,), (0,)):
        rows = np.isin(y, labels)
        late.partial_fit(X[rows], y[rows])
        early.partial_fit(X[rows], y[rows], classes=range(4))
    # Products with another number of classes may be summed in another order.
    np.testing.assert_allclose(late.weights_, early.weights_, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(late.predict(X), early.predict(X))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_new_class_wins_over_an_old_one_only_by_overlap(seed):
    X, y = odours(seed, classes=2)
    fly = FlyModelClassifier(1000, learning_rate=0.002, random_state=seed).partial_fit(X[y == 0], y[y == 0])
    own = fly.decision_function(X[y == 0])[:, 0]
    fly.partial_fit(X[y == 1], y[y == 1])
    codes = fly.codes(X)
    overlap = codes[y == 0] @ codes[y == 1].sum(0)
    # The score of the new class on samples of the old one; that of the old one stays as it is.
    np.testing.assert_allclose(fly.decision_function(X[y == 0]) + own, 0.002 * overlap, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_disjoint_codes_do_not_disturb_each_other(rule):
    generator = np.random.default_rng(0)
    X = 0.05 * generator.random((40, 60))
    X[:20, :20] += 1 + generator.random((20, 20))
    X[20:, 40:] += 1 + generator.random((20, 20))
    y = np.repeat([0, 1], 20)
    fly = FlyModelClassifier(2000, degree=6, coding_level=0.02, rule=rule)
    fly.partial_fit(X[:20], y[:20], classes=range(3))
    before = fly.codes(X[:20]) @ fly.weights_.T
    fly.partial_fit(X[20:], y[20:])
    codes = fly.codes(X)
    assert not codes[:20].any(0) @ codes[20:].any(0)
    np.testing.assert_array_equal(fly.codes(X[:20]) @ fly.weights_.T, before)


def test_saved_and_loaded_is_the_same_and_learns_on(tmp_path):
    X, y = odours(0, classes=6)
    for rule in RULES:
        fly = FlyModelClassifier(300, rule=rule).partial_fit(X[y < 3], y[y < 3])
        fly.save(tmp_path / "fly")
        loaded = FlyModelClassifier.load(tmp_path / "fly")
        assert loaded.get_params() == fly.get_params()
        np.testing.assert_array_equal(loaded.decision_function(X), fly.decision_function(X))
        for one in (fly, loaded):
            one.partial_fit(X[y > 2], y[y > 2])
        np.testing.assert_array_equal(loaded.weights_, fly.weights_)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": "asociative"}, "rule must be one of .*, got 'asociative'; did you mean 'associative'"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, got 0"),
        ({"forgetting": 1.5}, "forgetting must be a number from 0 to 1, got 1.5"),
        ({"degree": 51}, "degree must be at most the number of features, 50, got 51"),
        ({"coding_level": True}, "coding_level"),
        ({"expand_dim": -1}, "expand_dim"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        FlyModelClassifier(**settings).fit(*odours(0))


# -- gates --


def forgetting(learner, tasks, passes: int = 1):
    """Final accuracy over all tasks, and how much accuracy of earlier tasks fell since they were learned."""
    known = np.unique(np.concatenate([y for _, y, _, _ in tasks]))
    fresh = []
    for X, y, Xt, yt in tasks:
        for _ in range(passes):
            learner.partial_fit(X, y, classes=known)
        fresh.append(learner.score(Xt, yt))
    last = [learner.score(Xt, yt) for _, _, Xt, yt in tasks]
    return np.mean(last), np.mean(np.subtract(fresh, last)[:-1])


def cut(X, y, seed: int, size: int):
    X, Xt, y, yt = train_test_split(X, y, test_size=0.4, stratify=y, random_state=seed)
    groups = [np.arange(first, first + size) for first in range(0, y.max() + 1, size)]
    return [(X[np.isin(y, g)], y[np.isin(y, g)], Xt[np.isin(yt, g)], yt[np.isin(yt, g)]) for g in groups]


def test_odours_are_kept_where_a_network_forgets_them():
    found = []
    for seed in SEEDS:
        tasks = cut(*odours(seed), seed, 4)
        fly = FlyModelClassifier(2000, random_state=seed)
        network = MLPClassifier((100,), solver="sgd", learning_rate_init=0.1, batch_size=20, random_state=seed)
        found.append([*forgetting(fly, tasks), *forgetting(network, tasks, passes=20)])
    fly_accuracy, fly_forgets, network_accuracy, network_forgets = np.mean(found, 0)
    assert fly_forgets < 0.1 and fly_accuracy > 0.95
    assert network_forgets > 0.9 and network_accuracy < 0.3


@pytest.mark.parametrize(("data", "size"), [("odours", 4), ("digits", 2)])
def test_without_winners_most_is_lost(data, size):
    gains = []
    for seed in SEEDS:
        tasks = cut(*(odours(seed) if data == "odours" else load_digits(return_X_y=True)), seed, size)
        sparse, dense = (FlyModelClassifier(1000, coding_level=level, random_state=seed) for level in (0.05, 1.0))
        gains.append(forgetting(sparse, tasks)[0] - forgetting(dense, tasks)[0])
    assert np.mean(gains) > 0.1
