"""Experiments on one sentence task: rates are chosen on validation rows, test rows are scored once per arm and seed."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("matplotlib")

from bioadapt.evaluation import ClassificationTask
from experiments import sentence_task as shared

RATES = (1e-3, 1e-2)
BEST = {"slow": 1e-3, "fast": 1e-2}


@pytest.fixture
def rows(monkeypatch):
    """Two arms, each best at another rate; test scores depend on the arm and the seed. ``calls``: what was scored."""
    calls = []

    def train(task, wrap, rate, seed, epochs=1.0):
        return SimpleNamespace(arm=wrap, rate=rate, seed=seed)

    def score(encoder, task, split="test"):
        calls.append((encoder.arm, encoder.rate, encoder.seed, split))
        if split == "validation":
            return 50.0 + 10 * (encoder.rate == BEST[encoder.arm])
        return {"slow": 60.0, "fast": 63.0, None: 40.0}[encoder.arm] + encoder.seed

    monkeypatch.setattr(shared, "train_adapter", train)
    monkeypatch.setattr(shared, "score", score)
    monkeypatch.setattr(shared, "fresh_encoder", lambda: SimpleNamespace(arm=None, rate=0.0, seed=0))
    monkeypatch.setattr(shared, "trained_count", lambda wrap: {"slow": 7, "fast": 8}[wrap])
    arms = {name: (lambda seed, name=name: name) for name in BEST}
    return SimpleNamespace(found=shared.run(None, arms, RATES, seeds=3), calls=calls)


def test_a_sample_keeps_rows_whole_and_is_always_the_same():
    table = {"text": [f"t{n}" for n in range(40)], "label": [f"c{n}" for n in range(40)]}
    task = ClassificationTask("toy", {"train": table})
    drawn = shared.sample(task, "train", 10).rows("train")
    assert [text[1:] for text in drawn["text"]] == [label[1:] for label in drawn["label"]]
    assert drawn == shared.sample(task, "train", 10).rows("train") and drawn["text"] != table["text"][:10]


def test_each_arm_is_tested_at_its_own_best_rate_on_seeds_that_chose_nothing(rows):
    tested = [(arm, rate, seed) for arm, rate, seed, split in rows.calls if split == "test" and arm]
    assert tested == [(arm, BEST[arm], seed) for seed in (1, 2, 3) for arm in BEST]
    chosen = {(arm, rate, seed) for arm, rate, seed, split in rows.calls if split == "validation"}
    assert chosen == {(arm, rate, 0) for arm in BEST for rate in RATES}


def test_differences_are_paired_by_seed(rows):
    np.testing.assert_allclose(shared.scores_of(rows.found, "slow"), [61, 62, 63])
    assert shared.differences(rows.found, "fast", "slow") == [3.0, 3.0, 3.0]
    assert shared.differences(rows.found, "slow", shared.ZERO_SHOT) == [21.0, 22.0, 23.0]


def test_the_table_states_what_was_chosen_by_what(rows, tmp_path):
    text = shared.tables(rows.found)
    assert "| slow | 7 | 60.00 | 50.00 | 0.001 | 62.00 [" in text
    assert "| fast | 8 | 50.00 | 60.00 | 0.01 | 65.00 [" in text
    assert "Zero-shot test score: 40.00" in text
    shared.draw(rows.found, "score").savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
