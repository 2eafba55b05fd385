"""The benchmark of Fly-CL's head: both sides solve one problem, its bars judge the right numbers, and it runs."""

import csv

import numpy as np
import pytest
from helpers.scripts import loaded, run

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def bench():
    with loaded("fly_cl") as module:
        yield module


def rows_that_pass(bench):
    return [
        bench.Row("FlyCLClassifier.fit", 0.5, ratio=0.5, test_accuracy=0.8, penalty=1.0),
        bench.Row("RidgeCV.fit on its codes", 1.0, test_accuracy=0.804, penalty=1.0),
        bench.Row("task 1 of 10", 0.1),
        bench.Row("task 10 of 10", 0.12, ratio=1.2),
    ]


def test_classes_are_alike_and_keep_their_means_from_draw_to_draw(bench):
    (X, y), (Xt, yt) = bench.samples(200, 1), bench.samples(200, 2)
    assert X.shape == (200, bench.FEATURES) and (np.bincount(y) == 2).all() and np.array_equal(y, yt)
    # Means have variance SPREAD^2 and the noise 1: draws share the means alone.
    assert np.cov(X.ravel(), Xt.ravel())[0, 1] == pytest.approx(bench.SPREAD**2, abs=0.015)


def test_both_solve_the_same_problem(bench):
    own, rival = bench.fits(60, 200)
    assert own.test_accuracy == pytest.approx(rival.test_accuracy, abs=1e-3)
    assert own.test_accuracy > 1.5 / bench.CLASSES
    assert own.penalty == pytest.approx(rival.penalty)
    assert own.ratio == pytest.approx(own.seconds / rival.seconds)


def test_it_runs_and_leaves_the_results_of_the_full_size_alone(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    status = run(bench, monkeypatch, "--units", "60", "--samples", "200")
    said = capsys.readouterr().out
    assert all(row.what in said for row in rows_that_pass(bench))
    assert status == ("MISSED" in said)
    assert not list(tmp_path.iterdir())


def test_the_full_size_is_written_down(bench, monkeypatch, tmp_path, capsys):
    rows = rows_that_pass(bench)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "fits", lambda units, count: rows[:2])
    monkeypatch.setattr(bench, "tasks", lambda units, count: rows[2:])
    assert run(bench, monkeypatch, "--machine", "here") == 0
    with (tmp_path / "fly-cl-here.csv").open(encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert [line["what"] for line in written] == [row.what for row in rows]
    assert [float(line["ratio"]) for line in written] == [0.5, 1.0, 1.0, 1.2]


@pytest.mark.parametrize(
    ("place", "number", "value", "said"),
    [
        (0, "ratio", 1.0, "fit takes 1.00 of RidgeCV's time"),
        (0, "test_accuracy", 0.798, "accuracy differs by -0.60 points"),
        (0, "test_accuracy", 0.81, "accuracy differs by +0.60 points"),
        (3, "ratio", 1.26, "the last task takes 1.26 of the first's time"),
    ],
)
def test_each_bar_fails_for_its_own_number(bench, capsys, place, number, value, said):
    rows = rows_that_pass(bench)
    assert bench.bars(rows) == 0
    assert "MISSED" not in capsys.readouterr().out
    setattr(rows[place], number, value)
    assert bench.bars(rows) == 1
    missed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISSED")]
    assert len(missed) == 1 and said in missed[0]
