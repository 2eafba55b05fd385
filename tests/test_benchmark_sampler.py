"""The benchmark of the sampler: its subjects have as many features as it says, it runs, and it counts what is kept."""

import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")

from helpers.scripts import loaded, run

from bioadapt.search.thompson.space_design import SpaceDesign


@pytest.fixture(scope="module")
def bench():
    with loaded("sampler") as module:
        yield module


@pytest.mark.parametrize(
    ("name", "features"), [("pairs", 153), ("wide", 650), ("numbers", 374), ("many numbers", 1400)]
)
def test_a_subject_has_as_many_features_as_its_description_says(bench, name, features):
    subject = bench.subjects()[name]
    study = bench.study_of(subject, 100, bench.RandomSampler(seed=0))
    design = SpaceDesign(subject.space, [trial.params for trial in study.trials])
    assert design.matrix.shape == (100, features) and f"{features:,}" in bench.__doc__


def test_the_command_measures_every_sampler(bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    assert run(bench, monkeypatch, "--quick", "--only", "numbers") == 0
    printed = capsys.readouterr().out
    assert all(sampler in printed for sampler in ("thompson", "tpe", "random"))
    assert not list(tmp_path.iterdir()) and "no CSV is written" in printed


def test_what_a_proposal_keeps_is_counted(bench):
    row = bench.measure("wide", bench.subjects()["wide"], "random", lambda: bench.RandomSampler(seed=0), 10, 8)
    assert row.kept_kib > 1 and row.peak_mib > 0 and row.proposals == 8  # 150 parameters each
