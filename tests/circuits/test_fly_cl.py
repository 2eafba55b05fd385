"""Fly-CL: streaming is exact, order does not matter, nothing is forgotten, and files are whole or refused."""

from __future__ import annotations

import sys
import tracemalloc
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from peft import get_peft_model
from safetensors.numpy import save_file
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge, SGDClassifier
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestCentroid
from sklearn.utils.estimator_checks import parametrize_with_checks

from bioadapt import BioConfig
from bioadapt._extras import MissingExtra
from bioadapt.circuits import _classifier
from bioadapt.circuits.fly_cl import PENALTIES, PUBLISHED, FlyCLClassifier, attach_continual_head
from bioadapt.circuits.fly_model import FlyModelClassifier
from bioadapt.circuits.ridge import FREEDOM, RidgeSums, gcv
from bioadapt.testing.hosts import HOSTS

SEEDS = range(4)


def blobs(seed: int, n: int = 240, d: int = 12, classes: int = 6):
    generator = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return generator.normal(size=(classes, d))[y] + generator.normal(size=(n, d)), y


@parametrize_with_checks([FlyCLClassifier(), FlyCLClassifier(gcv="task"), FlyCLClassifier(penalty=1.0)])
def test_is_an_estimator(estimator, check):
    check(estimator)


# -- exactness --


def assert_same_weights(one: FlyCLClassifier, other: FlyCLClassifier) -> None:
    np.testing.assert_array_equal(one.classes_, other.classes_)
    np.testing.assert_allclose(one.coef_, other.coef_, rtol=0, atol=1e-8 * np.abs(other.coef_).max())
    assert one.penalty_ == pytest.approx(other.penalty_, rel=1e-12)


@pytest.mark.rounding
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("settings", [{}, {"penalty": 3.0}, {"standardize": True}])
def test_neither_pieces_nor_their_order_nor_the_order_of_classes_matter(seed, settings):
    X, y = blobs(seed)
    whole = FlyCLClassifier(random_state=seed, **settings).fit(X, y)
    generator = np.random.default_rng(seed)
    by_class = np.concatenate([np.flatnonzero(y == label) for label in generator.permutation(6)])
    for order in (by_class, generator.permutation(len(y))):
        parts = FlyCLClassifier(random_state=seed, **settings)
        for rows in np.array_split(order, 17):
            parts.partial_fit(X[rows], y[rows])
        assert_same_weights(parts, whole)
        np.testing.assert_array_equal(parts.predict(X), whole.predict(X))


def test_predictions_on_the_way_change_nothing():
    X, y = blobs(0)
    asked = FlyCLClassifier()
    for rows in np.array_split(np.arange(len(y)), 3):
        asked.partial_fit(X[rows], y[rows]).predict(X)
    assert_same_weights(asked, FlyCLClassifier().fit(X, y))


@pytest.mark.rounding
@pytest.mark.parametrize("seed", SEEDS)
def test_is_ridge_regression_on_its_codes(seed):
    X, y = blobs(seed)
    head = FlyCLClassifier(expand_dim=150).fit(X, y)
    oracle = Ridge(alpha=head.penalty_, fit_intercept=False, solver="svd").fit(head.codes(X), np.eye(6)[y])
    np.testing.assert_allclose(head.coef_, oracle.coef_, rtol=0, atol=1e-8 * np.abs(oracle.coef_).max())
    np.testing.assert_allclose(head.decision_function(X), head.codes(X) @ oracle.coef_.T, atol=1e-8)


@pytest.mark.rounding
@pytest.mark.parametrize("units", [1, 10, 64, 65, 128, 200])
@pytest.mark.parametrize("samples", [3, 50, 300])
def test_gcv_from_the_statistics_is_gcv_from_the_singular_values(units, samples):
    generator = np.random.default_rng(units)
    H = np.maximum(generator.normal(size=(samples, units)) + 0.5, 0)
    H[:, units // 2 + 1 :: 7] = 0  # units that never win
    H[0, 0] = 1.0
    Y = np.eye(5)[generator.integers(5, size=samples)]
    penalties = PENALTIES * np.square(H).sum() / units
    found = gcv(np.triu(H.T @ H), H.T @ Y, samples, penalties, of_samples=False)
    U, S, _ = np.linalg.svd(H, full_matrices=False)
    kept = S**2 / (S**2 + penalties[:, None])
    freedom = 1 - kept.sum(1) / samples
    score = [np.square(Y - U @ (share[:, None] * (U.T @ Y))).sum() / samples for share in kept] / freedom**2
    # Rounding leaves each eigenvalue of H^T H unsure by some parts in 10^16 of the largest one. In the trace they add
    # up, one per unit, each divided by the penalty.
    unsure = 4 * np.finfo(float).eps * S[0] ** 2 / penalties
    assert (np.abs(found.freedom - freedom) <= 1e-12 + unsure * units / samples).all()
    told = freedom >= FREEDOM
    assert told.any()
    np.testing.assert_allclose(found.score[told], score[told], rtol=1e-5)
    assert score[found.best()] <= score[told].min() * (1 + 1e-5)  # of two that are as good either may be taken


@pytest.mark.parametrize("units", [31, 100, 300])
def test_the_side_of_the_samples_gives_what_the_side_of_the_units_gives(units):
    generator = np.random.default_rng(units)
    H = np.maximum(generator.normal(size=(30, units)) + 0.5, 0)
    labels, classes = np.array([*"abc"])[generator.integers(3, size=30)], np.array([*"abcd"])
    Y = (labels[:, None] == classes).astype(float)
    sums = RidgeSums(units)
    for rows in np.array_split(np.arange(30), 4):
        sums.add(H[rows], labels[rows])
    of_units = RidgeSums.of_gram(np.triu(H.T @ H), 30)
    assert sums.activity == pytest.approx(of_units.activity)
    np.testing.assert_allclose(sums.gram, np.triu(H.T @ H), atol=1e-12 * units)
    penalties = PENALTIES * sums.activity
    found, expected = (one.validation(Y.T @ H, classes, penalties) for one in (sums, of_units))
    np.testing.assert_allclose(found.freedom, expected.freedom, atol=1e-9)
    told = found.freedom >= FREEDOM
    assert told.any()
    np.testing.assert_allclose(found.score[told], expected.score[told], rtol=1e-5)
    for penalty in penalties:
        weights = sums.weights(Y.T @ H, classes, penalty)
        oracle = Ridge(alpha=penalty, fit_intercept=False, solver="svd").fit(H, Y).coef_
        np.testing.assert_allclose(weights, oracle, rtol=0, atol=1e-8 * np.abs(oracle).max())


def test_with_fewer_samples_than_units_nothing_of_the_size_of_the_gram_matrix_is_made():
    """A thousand units and forty samples: forty rows are solved for, and G (8 MB) is not formed."""
    X, y = blobs(0, n=40)
    tracemalloc.start()
    head = FlyCLClassifier(expand_dim=1000).fit(X[:20], y[:20]).partial_fit(X[20:], y[20:])
    head.predict(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 1000**2 / 2
    codes = head.codes(X)
    np.testing.assert_allclose(np.triu(head.gram_), np.triu(codes.T @ codes), atol=1e-9)


def test_published_gcv_looks_at_the_last_call_alone():
    X, y = blobs(0)
    X[120:] *= 5
    grid = {"penalties": np.logspace(-2, 6, 33)}
    task = FlyCLClassifier(gcv="task", **grid).partial_fit(X[:120], y[:120]).partial_fit(X[120:], y[120:])
    assert task.penalty_ == FlyCLClassifier(**grid).fit(X[120:], y[120:]).penalty_
    assert task.penalty_ != FlyCLClassifier(**grid).fit(X, y).penalty_
    assert_same_weights(task, FlyCLClassifier(penalty=task.penalty_).fit(X, y))


# -- penalties --


@pytest.mark.parametrize("gcv", ["streaming", "task"])
@pytest.mark.parametrize("samples", [50, 240])
def test_the_penalty_is_the_best_of_those_given(gcv, samples):
    X, y = blobs(0, n=samples)
    penalties = (3.0, 40.0, 500.0)
    head = FlyCLClassifier(gcv=gcv, penalties=penalties).fit(X, y)
    H, Y = head.codes(X), np.eye(6)[y]
    U, S, _ = np.linalg.svd(H, full_matrices=False)
    kept = [S**2 / (S**2 + penalty) for penalty in penalties]
    score = [np.square(Y - U @ (k[:, None] * (U.T @ Y))).sum() / (1 - k.sum() / samples) ** 2 for k in kept]
    assert head.penalty_ == penalties[np.argmin(score)]
    assert FlyCLClassifier(gcv=gcv, penalties=[40]).fit(X, y).penalty_ == 40


def test_published_penalties_have_the_published_floor_in_the_unit_of_the_codes():
    """Codes of the authors' size, from features of variance one, get the authors' 10^6 and more, at any other size."""
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(400, 768)), np.arange(400) % 20
    head = FlyCLClassifier(500, degree=300, gcv="task").fit(X, y)
    assert head.penalty_ > 0.9e6
    activity = np.square(head.codes(X)).mean()
    assert np.isclose(head.penalty_ / activity, PUBLISHED, rtol=1e-9).sum() == 1
    np.testing.assert_allclose(
        FlyCLClassifier(500, degree=300, gcv="task").fit(X / 28, y).penalty_, head.penalty_ / 784
    )


def test_the_published_floor_keeps_small_tasks_from_being_met_exactly():
    """Ten tasks, fewer samples than units: without the floor, GCV on one task picks penalties that cost the rest."""
    generator = np.random.default_rng(0)
    means = 0.3 * generator.normal(size=(30, 96))
    y, yt = np.arange(600) % 30, np.arange(1200) % 30
    X, Xt = (means[labels] + generator.normal(size=(len(labels), 96)) for labels in (y, yt))

    def final(**settings):
        head = FlyCLClassifier(600, **settings)
        for task in range(10):
            mine = y // 3 == task
            head.partial_fit(X[mine], y[mine])
        return head.score(Xt, yt)

    low = final(gcv="task", penalties=PENALTIES * np.square(FlyCLClassifier(600).fit(X, y).codes(X)).sum() / 6000)
    published = final(gcv="task")
    assert published > low + 0.05
    assert published > final() - 0.02


# -- codes --


@pytest.mark.parametrize("level", [0.01, 0.07, 0.3, 1.0])
def test_exactly_k_units_win_and_keep_the_largest_signed_drive(level):
    X, y = blobs(0)
    head = FlyCLClassifier(expand_dim=100, coding_level=level).fit(X, y)
    codes, drive = head.codes(X), X @ head.projection_.T
    k = round(100 * level)
    assert ((codes != 0).sum(1) == k).all()
    np.testing.assert_array_equal(codes[codes != 0], drive[codes != 0])
    np.testing.assert_allclose(np.sort(codes.sum(1)), np.sort(np.sort(drive, 1)[:, -k:].sum(1)))


def test_of_equal_units_the_first_win():
    drive = np.array([[1.0, 2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    np.testing.assert_array_equal(_classifier.winners(drive, 3), expected)


def test_wiring_has_its_degree_and_comes_from_the_seed():
    X, y = blobs(0)
    head = FlyCLClassifier(expand_dim=200, degree=5, random_state=3).fit(X, y)
    assert ((head.projection_ != 0).sum(1) == 5).all()
    np.testing.assert_array_equal(head.projection_, clone(head).fit(X, y).projection_)
    assert not np.array_equal(head.projection_, clone(head).set_params(random_state=4).fit(X, y).projection_)
    default = FlyCLClassifier().fit(X, y).projection_
    assert default.shape == (120, 12)
    assert ((default != 0).sum(1) == 5).all()


# -- classes --


def test_classes_without_samples_never_win():
    X, y = blobs(0)
    few = FlyCLClassifier().partial_fit(-X[y < 2] - 5, y[y < 2], classes=range(6))
    assert set(few.predict(10 * X)) <= {0, 1}
    scores = few.decision_function(X)
    assert scores.shape == (240, 6)
    assert np.isneginf(scores[:, 2:]).all() and np.isfinite(scores[:, :2]).all()
    few.partial_fit(X[y == 4], y[y == 4])
    assert set(few.predict(X)) == {0, 1, 4}


def test_new_labels_may_sort_before_old_ones():
    X, y = blobs(1)
    names = np.array(["tulip", "rose", "lily", "aster", "iris", "poppy tree"])[y]
    head = FlyCLClassifier()
    for label in range(6):
        head.partial_fit(X[y == label], names[y == label])
    assert list(head.classes_) == sorted(set(names))
    np.testing.assert_array_equal(head.predict(X), FlyCLClassifier().fit(X, names).predict(X))
    assert head.score(X, names) > 0.8
    np.testing.assert_array_equal(head.class_count_, 40)


def test_features_without_any_activity_are_survived():
    head = FlyCLClassifier().fit(np.zeros((4, 3)), [0, 1, 0, 1])
    assert not head.decision_function(np.ones((2, 3))).any()


def test_memory_does_not_grow_with_the_samples():
    X, y = blobs(0, n=16 * _classifier.BLOCK)
    peaks = []
    for count in (2 * _classifier.BLOCK, len(y)):
        head = FlyCLClassifier(expand_dim=256)
        tracemalloc.start()
        head.partial_fit(X[:count], y[:count])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    codes_of_a_block = 8 * 256 * _classifier.BLOCK
    assert peaks[1] - peaks[0] < codes_of_a_block / 2 < peaks[0]
    before = sum(value.nbytes for value in vars(head).values() if isinstance(value, np.ndarray))
    head.partial_fit(X, y)
    assert sum(value.nbytes for value in vars(head).values() if isinstance(value, np.ndarray)) == before


# -- input --


def test_tensors_and_arrays_give_the_same():
    X, y = blobs(0)
    X = np.float64(np.float32(X))
    expected = FlyCLClassifier().fit(X, y)
    tensor = torch.tensor(X, requires_grad=True)
    found = FlyCLClassifier().partial_fit(tensor, torch.tensor(y), classes=torch.arange(6))
    np.testing.assert_array_equal(found.decision_function(tensor), expected.decision_function(X))
    half = torch.tensor(X).bfloat16()
    np.testing.assert_array_equal(expected.decision_function(half), expected.decision_function(half.float().numpy()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"expand_dim": 0}, "expand_dim must be an integer from 1, got 0"),
        ({"expand_dim": 10.0}, "expand_dim must be an integer"),
        ({"degree": 13}, "degree must be at most the number of features, 12, got 13"),
        ({"coding_level": 0.0}, "coding_level must be a number above 0 to 1, got 0.0"),
        ({"coding_level": float("nan")}, "coding_level"),
        ({"penalty": 0}, "penalty must be a number above 0, got 0"),
        ({"penalty": "gvc"}, "penalty must be one of gcv, got 'gvc'; did you mean 'gcv'"),
        ({"gcv": "stream"}, "did you mean 'streaming'"),
        ({"gcv": "tasks"}, "did you mean 'task'"),
        ({"penalties": ()}, "penalties must be a sequence of numbers above 0, or None"),
        ({"penalties": 3.0}, "penalties must be a sequence of numbers above 0, or None, got 3.0"),
        ({"penalties": [1.0, 0.0]}, "each of penalties must be a number above 0, got 0.0"),
        ({"penalties": [1.0, np.nan]}, "each of penalties"),
        ({"penalties": [1.0], "penalty": 2.0}, "penalties are what penalty='gcv' chooses from"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        FlyCLClassifier(**settings).fit(*blobs(0))


def test_a_penalty_that_rounding_swallows_is_refused():
    X, y = blobs(0, n=20)
    X, y = np.tile(np.float64(X > 0), (2, 1)), np.tile(y, 2)
    for settings in ({"penalty": 1e-300}, {"penalties": [1e-300]}):
        for units in (30, 120):
            with pytest.raises(ValueError, match="penalty=1e-300 is too small"):
                FlyCLClassifier(units, **settings).fit(X, y)


def test_bad_labels_and_features_leave_what_was_learned():
    X, y = blobs(0)
    head = FlyCLClassifier().fit(X, y)
    weights = head.coef_.copy()
    with pytest.raises(ValueError, match="all numbers or all strings, got numbers and strings"):
        head.partial_fit(X[:2], ["a", "b"])
    with pytest.raises(ValueError, match="11 features"):
        head.partial_fit(X[:2, :11], y[:2])
    with pytest.raises(ValueError, match="NaN"):
        head.partial_fit(np.full((2, 12), np.nan), y[:2])
    np.testing.assert_array_equal(head.coef_, weights)
    np.testing.assert_array_equal(head.classes_, range(6))


def test_a_large_gram_matrix_is_warned_about(monkeypatch):
    monkeypatch.setattr("bioadapt.circuits.fly_cl.LARGE", 8 * 99**2)
    with pytest.warns(UserWarning, match="expand_dim=100: G alone takes"):
        FlyCLClassifier(expand_dim=100).fit(*blobs(0))


# -- files --


@pytest.mark.rounding
@pytest.mark.parametrize(
    "settings", [{}, {"gcv": "task"}, {"penalty": 2.0, "standardize": True}, {"penalties": [1.0, 9.0]}]
)
@pytest.mark.parametrize("labels", ["numbers", "strings", "objects"])
def test_loaded_predicts_the_same_bit_for_bit_and_learns_on(tmp_path, settings, labels):
    X, y = blobs(0)
    y = {"numbers": y, "strings": np.array([*"abcdef"])[y], "objects": np.array([*"abcdef"], dtype=object)[y]}[labels]
    head = FlyCLClassifier(random_state=np.int64(5), **settings).fit(X[:100], y[:100])
    head.save(tmp_path / "head.safetensors")
    loaded = FlyCLClassifier.load(tmp_path / "head.safetensors")
    assert loaded.get_params() == head.get_params()
    np.testing.assert_array_equal(loaded.decision_function(X), head.decision_function(X))
    np.testing.assert_array_equal(loaded.predict(X), head.predict(X))
    for one in (head, loaded):
        one.partial_fit(X[100:], y[100:])
    np.testing.assert_array_equal(loaded.coef_, head.coef_)
    assert loaded.penalty_ == head.penalty_


def test_a_save_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch):
    X, y = blobs(0)
    head = FlyCLClassifier().fit(X, y)
    path = tmp_path / "head.safetensors"
    head.save(path)
    old = path.read_bytes()

    def half(tensors, target, metadata):
        target.write_bytes(old[:100])
        raise OSError("no space left")

    monkeypatch.setattr(_classifier, "save_file", half)
    with pytest.raises(OSError, match="no space"):
        head.partial_fit(X, y).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    X, y = blobs(0)
    path = tmp_path / "head.safetensors"
    with pytest.raises(FileNotFoundError, match="head.safetensors"):
        FlyCLClassifier.load(path)
    FlyCLClassifier().fit(X, y).save(path)
    content = path.read_bytes()
    for damaged in (content[:-8], content[:50], b"", b"PK" + content):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be loaded as a FlyCLClassifier"):
            FlyCLClassifier.load(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="something unknown"):
        FlyCLClassifier.load(path)
    FlyModelClassifier().fit(X, y).save(path)
    with pytest.raises(ValueError, match="holds 'FlyModelClassifier', not a FlyCLClassifier"):
        FlyCLClassifier.load(path)


def test_a_file_whose_parts_do_not_fit_is_refused(tmp_path, monkeypatch):
    head = FlyCLClassifier().fit(*blobs(0))
    path = tmp_path / "head.safetensors"
    tensors = head._tensors()
    changes = {
        "weights": np.zeros((6, 119)),
        "moment_": np.zeros((5, 120)),
        "gram_": np.zeros(3),
        "class_count_": np.zeros(7, dtype=np.int64),
        "penalties": np.array([0.0, np.nan]),
        "projection_": np.full((120, 12), np.inf),
    }
    for name, values in changes.items():
        monkeypatch.setattr(head, "_tensors", lambda name=name, values=values: {**tensors, name: values})
        head.save(path)
        with pytest.raises(ValueError, match="cannot be loaded"):
            FlyCLClassifier.load(path)
    monkeypatch.setattr(head, "_tensors", lambda: {k: v for k, v in tensors.items() if k != "class_count_"})
    head.save(path)
    with pytest.raises(ValueError, match="should hold class_count_"):
        FlyCLClassifier.load(path)


@pytest.mark.parametrize("module", ["fly_cl", "fly_model"])
@pytest.mark.parametrize("missing", ["scipy", "sklearn"])
def test_a_missing_extra_is_named(monkeypatch, module, missing):
    # Without scipy, scikit-learn is there but cannot be imported.
    for name in [*sys.modules]:
        if name.startswith("bioadapt.circuits.") or name.split(".")[0] in ("scipy", "sklearn"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtra, match=r"pip install bioadapt\[circuits\]"):
        import_module(f"bioadapt.circuits.{module}")


# -- on a torch module --


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Dropout(0.5).eval()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Tanh())

    def forward(self, x):
        return self.body(self.frozen(x))


def test_a_module_gives_features_without_gradients_and_stays_as_it_is():
    torch.manual_seed(0)
    X, y = blobs(0)
    inputs, model = torch.tensor(X, dtype=torch.float32), Encoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = attach_continual_head(model, lambda module, batch: module(batch))
    for rows in (slice(0, 100), slice(100, 240)):
        head.learn(inputs[rows], torch.tensor(y[rows]))
    features = model.eval()(inputs)
    model.train()
    model.frozen.eval()
    oracle = FlyCLClassifier().fit(features, y)
    np.testing.assert_array_equal(head.predict(inputs), oracle.predict(features))
    assert not head.features(inputs).requires_grad
    torch.testing.assert_close(head(inputs), torch.from_numpy(oracle.decision_function(features)))
    assert [module.training for module in model.modules()] == [True, False, True, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_with_an_adapter_gives_the_adapted_features():
    torch.manual_seed(0)
    host = HOSTS["bert"]
    model = get_peft_model(host.model(), BioConfig(primitives=["k_winners_take_all"], init_weights=False))
    ids = torch.arange(24).reshape(6, 4)

    def first(module, batch):
        return module(input_ids=batch).last_hidden_state[:, 0]

    head = attach_continual_head(model, first, FlyModelClassifier(rule="depression"))
    head.learn(ids, [*"aabbcc"])
    assert set(head.predict(ids)) <= {*"abc"}
    adapted = head.features(ids)
    with model.disable_adapter():
        assert (head.features(ids) - adapted).abs().max() > 1e-3


def test_what_is_no_module_or_no_feature_matrix_is_refused():
    with pytest.raises(TypeError, match="torch module, got str"):
        attach_continual_head("bert", lambda model, batch: batch)
    with pytest.raises(ValueError, match=r"\(samples, features\), got \(2, 3, 4\)"):
        attach_continual_head(nn.Identity(), lambda model, batch: model(batch)).predict(torch.zeros(2, 3, 4))


# -- gates --


def digits(seed: int):
    X, y = load_digits(return_X_y=True)
    return train_test_split(X / 16, y, test_size=0.4, stratify=y, random_state=seed)


def in_tasks(learner, X, y):
    """Five tasks of two classes, one after the other."""
    for first in range(0, 10, 2):
        rows = (y == first) | (y == first + 1)
        learner.partial_fit(X[rows], y[rows], classes=np.arange(10))
    return learner


def test_descent_forgets_and_means_are_below_ridge_which_is_below_fly_cl():
    scores = []
    for seed in SEEDS:
        X, Xt, y, yt = digits(seed)
        descent = in_tasks(SGDClassifier(loss="log_loss", random_state=seed), X, y)
        ridge = Ridge(alpha=1.0, fit_intercept=False).fit(X, np.eye(10)[y])
        fly = in_tasks(FlyCLClassifier(1000, degree=16, random_state=seed), X, y)
        linear = (ridge.predict(Xt).argmax(1) == yt).mean()
        scores.append([descent.score(Xt, yt), NearestCentroid().fit(X, y).score(Xt, yt), linear, fly.score(Xt, yt)])
    descent, means, linear, fly = np.mean(scores, 0)
    assert descent < means - 0.5
    assert means < linear - 0.02
    assert linear < fly - 0.02


def test_winners_make_units_less_alike_and_a_linear_expansion_adds_nothing():
    alike, gains = [], []
    for seed in SEEDS:
        X, Xt, y, yt = digits(seed)
        ridge = Ridge(alpha=1.0, fit_intercept=False).fit(X, np.eye(10)[y])
        row = []
        for level in (1.0, 0.3, 0.1):
            head = FlyCLClassifier(600, degree=16, coding_level=level, random_state=seed).fit(X, y)
            codes = head.codes(Xt)
            row.append(np.abs(np.corrcoef(codes[:, codes.std(0) > 0].T)).mean())
            if level == 1.0:
                gains.append(head.score(Xt, yt) - (ridge.predict(Xt).argmax(1) == yt).mean())
        alike.append(row)
    none, much, little = np.mean(alike, 0)
    assert none > 1.5 * much and much > 1.5 * little
    assert abs(np.mean(gains)) < 0.02
