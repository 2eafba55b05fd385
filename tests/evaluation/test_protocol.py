"""The protocol on tiny data and a tiny encoder: what is trained on, chosen by, opened and written down."""

import csv
import io
import json
from contextlib import nullcontext

import numpy as np
import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("sklearn")

from rich.console import Console

from bioadapt.evaluation import EvaluationSettings, StsTask, evaluate, load_task
from bioadapt.evaluation import protocol as module
from bioadapt.evaluation.cells import Cells, SealedTest, TakenElsewhere
from bioadapt.evaluation.protocol import Evaluate
from bioadapt.evaluation.tasks import Overlap
from bioadapt.evaluation.training import History

HEADER = ["task", "arm", "seed", "params", "dev", "test", "test_clean", "seconds"]
ARMS = ("zero-shot", "lora", "lora-equal", "lora+bio", "lora+placebo")


def quiet():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def settings(encoder_folder, data_dir, tmp_path):
    def make(**changes):
        chosen = {
            "task": ("near",), "data_dir": str(data_dir), "model": encoder_folder, "arms": ARMS, "seeds": 2,
            "rates": (1e-3, 1e-2), "batch_size": 8, "output": str(tmp_path / "output"), "device": "cpu",
        }  # fmt: skip
        return EvaluationSettings(**{**chosen, **changes})

    return make


def lines(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_whole_protocol_is_resumed_where_it_was_ended(settings, tmp_path, monkeypatch):
    folder, chosen = tmp_path / "output", settings()
    trained, fit = [], module.fit

    def counted(encoder, task, schedule):
        if len(trained) == 9:
            raise KeyboardInterrupt
        trained.append((schedule.learning_rate, schedule.seed))
        assert not task.sizes.get("test")
        return fit(encoder, task, schedule)

    monkeypatch.setattr(module, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        Evaluate(chosen, quiet()).run()
    before = lines(folder / "cells.csv")
    monkeypatch.setattr(module, "fit", fit)
    results = Evaluate(chosen, quiet()).run()

    cells = lines(folder / "cells.csv")
    assert list(cells[0])[:8] == HEADER
    assert cells[: len(before)] == before
    expected = [("zero-shot", "0")] + [
        (arm, seed)
        for arm in ("lora", "lora-equal@lora-sites", "lora-equal@bio-sites", "lora+bio", "lora+placebo")
        for seed in ("1", "2")
    ]
    assert [(cell["arm"], cell["seed"]) for cell in cells] == expected
    # Every trained arm had as many trials, all with the seed that is not reported, and took the best of its own.
    tuning = lines(folder / "tuning.csv")
    assert len(tuning) == 5 * 2
    for cell in cells[1:]:
        own = {float(trial["rate"]): float(trial["dev"]) for trial in tuning if trial["arm"] == cell["arm"]}
        assert sorted(own) == [1e-3, 1e-2] and own[float(cell["rate"])] == max(own.values())
    # Opened once for each cell that is there.
    opened = [(line["task"], line["arm"], line["seed"]) for line in lines(folder / "test_log.csv")]
    assert sorted(opened) == sorted((cell["task"], cell["arm"], cell["seed"]) for cell in cells)
    assert {record["against"] for record in results["clean"]["differences"]} == {
        "zero-shot", "lora", "lora-equal", "lora+placebo"
    }  # fmt: skip
    assert results["clean"]["verdict"] and json.loads((folder / "results.json").read_text()) == results
    assert "<td>times opened</td><td>11</td>" in (folder / "report.html").read_text()


def test_a_cell_is_the_same_whenever_it_is_computed(settings, tmp_path):
    chosen = {"arms": ("zero-shot", "lora+bio"), "seeds": 1, "rates": (1e-2,)}
    job = Evaluate(settings(**chosen), quiet())
    _, first = job.run()["cells"]
    _, again = Evaluate(settings(**chosen, output=str(tmp_path / "other")), quiet()).run()["cells"]
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert first["params"] > 0 and first["steps"] == 6 and first["rows"] == 43
    frozen, trained = (job.cells.rows(cell).rows["spearman"] for cell in job.cells.done())
    assert np.abs(frozen - trained).max() > 1e-3


def test_blocks_below_all_that_is_adapted_compute_a_text_once(settings, tmp_path, monkeypatch):
    chosen = {"arms": ("lora+bio",), "seeds": 1, "rates": (1e-2,), "layers": 1}
    (cell,) = Evaluate(settings(**chosen), quiet()).run()["cells"]
    assert list((tmp_path / "output" / "prefix").rglob("*.safetensors"))
    monkeypatch.setattr(module, "cached_prefix", lambda *_: nullcontext())
    (alone,) = Evaluate(settings(**chosen, output=str(tmp_path / "other")), quiet()).run()["cells"]
    assert not (tmp_path / "other" / "prefix").exists()
    assert cell["test"] == pytest.approx(alone["test"], abs=1e-3) and cell["params"] == alone["params"]


def test_a_rate_that_diverges_is_not_taken_and_a_cell_that_does_is_left_out(settings, tmp_path, monkeypatch):
    fit = module.fit

    def diverging(encoder, task, schedule):
        if schedule.learning_rate > 5e-3:
            raise module.Diverged("the loss is nan at step 1")
        return fit(encoder, task, schedule)

    monkeypatch.setattr(module, "fit", diverging)
    (cell,) = Evaluate(settings(arms=("bio",), seeds=1), quiet()).run()["cells"]
    assert cell["rate"] == 1e-3
    console = quiet()
    job = Evaluate(settings(arms=("zero-shot", "bio"), seeds=1, rates=(1e-2,), output=str(tmp_path / "other")), console)
    assert [cell["arm"] for cell in job.run()["cells"]] == ["zero-shot"]
    assert "bio, seed 1: no cell, the loss is nan at step 1." in console.file.getvalue()


def test_a_rate_at_the_edge_of_those_that_were_tried_is_named(settings, tmp_path, monkeypatch):
    """Who reads the results has to know that a rate beyond was not tried, of a rival as of the candidate."""
    best = {"bio": 1e-2, "lora": 1e-3, "placebo": 3e-3}

    def trained(self, task, recipe, arm, rate, seed):
        encoder, params = recipe.build(arm, seed)
        return encoder, params, History(), -abs(rate - best.get(arm, rate))

    monkeypatch.setattr(Evaluate, "_trained", trained)
    console, arms = quiet(), ("zero-shot", "bio", "lora", "placebo")
    job = Evaluate(settings(arms=arms, seeds=1, rates=(1e-3, 3e-3, 1e-2)), console)
    (name,), results = job.names, job.run()
    assert results["best rates at an edge"] == {"0.001": [f"{name}: lora"], "0.01": [f"{name}: bio"]}
    assert f"The lowest rate, 0.001, was the best of those tried for {name}: lora." in console.file.getvalue()
    assert f"The highest rate, 0.01, was the best of those tried for {name}: bio." in console.file.getvalue()
    one = Evaluate(settings(arms=("bio",), seeds=1, rates=(1e-2,), output=str(tmp_path / "one")), quiet()).run()
    assert one["best rates at an edge"] == {}


def test_training_rows_that_stand_in_any_test_set_are_dropped(settings, data_dir):
    job = Evaluate(settings(), quiet())
    prepared = job.prepare("near")
    assert prepared.task.sizes == {"train": 43, "validation": 16}
    assert prepared.notes == ["5 train rows dropped that stand in a test set"]
    far = {tuple(sorted(pair)) for pair in _pairs(load_task("far", data_dir), "test")}
    assert far.isdisjoint(tuple(sorted(pair)) for pair in _pairs(prepared.task, "train"))
    # Of the other set the rows that stand here are not clean; this one's test rows all are.
    assert prepared.test.clean == list(range(20))
    assert job.prepare("far").test.clean == list(range(5, 29))


def _pairs(task, split):
    rows = task.rows(split)
    return [(a.lower(), b.lower()) for a, b in zip(rows["sentence1"], rows["sentence2"], strict=True)]


def test_a_row_that_its_file_lists_as_overlapping_is_not_clean(settings, data_dir):
    import gzip

    text = "split\trow\talso_in\ntest\t3\telsewhere:train\ntrain\t7\telsewhere:test\n"
    (data_dir / "near" / "overlap.tsv.gz").write_bytes(gzip.compress(text.encode()))
    assert Evaluate(settings(), quiet()).prepare("near").test.clean == [n for n in range(20) if n != 3]


def test_without_training_rows_the_model_is_scored_as_it_comes(settings):
    console = quiet()
    cells = Evaluate(settings(task=("far",)), console).run()["cells"]
    assert [cell["arm"] for cell in cells] == ["zero-shot"]
    assert "no rows to train on" in console.file.getvalue()


def test_another_set_s_training_rows_can_serve(settings):
    job = Evaluate(settings(task=("far",), train_on="near"), quiet())
    prepared = job.prepare("far")
    assert prepared.task.sizes == {"train": 43, "validation": 16} and prepared.test.size == 29
    with pytest.raises(ValueError, match=r"train_on='kinds' is of family classification, 'far' of sts"):
        Evaluate(settings(task=("far",), train_on="kinds", output=job.settings.output + "2"), quiet()).prepare("far")


def test_validation_rows_are_cut_from_the_training_rows_where_there_are_none(settings, data_dir):
    (data_dir / "near" / "dev.tsv.gz").unlink()
    prepared = Evaluate(settings(), quiet()).prepare("near")
    assert prepared.task.sizes == {"train": 39, "validation": 4}
    assert set(_pairs(prepared.task, "train")).isdisjoint(_pairs(prepared.task, "validation"))


def test_few_rows_are_few_for_the_probe_too(settings):
    prepared = Evaluate(settings(task=("kinds",), train_rows=20), quiet()).prepare("kinds")
    assert prepared.task.sizes["train"] == 20
    assert prepared.test._task.rows("train") == prepared.task.rows("train")


def test_all_means_every_set_of_the_folder(settings):
    assert Evaluate(settings(task=("all",)), quiet()).names == ("far", "kinds", "near")
    with pytest.raises(ValueError, match="task 'all' needs --data-dir"):
        Evaluate(settings(task=("all",), data_dir=None), quiet())


def test_a_folder_belongs_to_one_way_of_evaluating(settings):
    Evaluate(settings(), quiet())
    Evaluate(settings(seeds=5, arms=("bio",)), quiet())
    with pytest.raises(ValueError, match=r"holds cells of epochs=1\.0, not 2\.0"):
        Evaluate(settings(epochs=2.0), quiet())
    with pytest.raises(ValueError, match=r"holds cells of primitives="):
        Evaluate(settings(primitives=("gain_field",)), quiet())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": ("near", "fra")}, "task 'fra' is not in .*did you mean 'far'"),
        ({"arms": ("lora", "bios")}, "unknown arm 'bios'; did you mean 'bio'"),
        ({"arms": ()}, "at least one is needed"),
        ({"seeds": 0}, "--seeds 0: a number above zero"),
        ({"rates": (1e-3, -1.0)}, "--rates"),
        ({"primitives": ("lateral_inhibitoin",)}, "did you mean 'lateral_inhibition'"),
        ({"adapters": ("x",)}, "PEFT does not stack a LoRA over another adapter"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(settings, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said.replace("+", r"\+")):
        Evaluate(settings(**changes), quiet())
    assert not (tmp_path / "output").exists()


def test_a_task_of_images_is_left_out_for_a_model_of_text(settings, data_dir):
    generator = np.random.default_rng(0)
    (data_dir / "pictures").mkdir()
    for split in ("train", "test"):
        arrays = {"images": generator.integers(0, 255, (6, 8, 8)).astype(np.uint8), "labels": np.arange(6) % 2}
        np.savez(data_dir / "pictures" / f"{split}.npz", **arrays)
    console = quiet()
    job = Evaluate(settings(task=("all",), arms=("zero-shot",)), console)
    assert {cell["task"] for cell in job.run()["cells"]} == {"far", "kinds", "near"}
    assert "pictures: left out, it is for an image model" in console.file.getvalue()


def test_own_rows_as_tasks(encoder_folder, tmp_path, make_pairs):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(make_pairs(24, 0), columns=["sentence1", "sentence2", "score"])
    task = StsTask("mine", {"train": frame, "test": frame.iloc[:8]})
    results = evaluate(
        task, model=encoder_folder, arms=["zero-shot", "bio"], seeds=1, rates=[1e-2], output=str(tmp_path / "o"),
        device="cpu", batch_size=8, console=quiet(),
    )  # fmt: skip
    assert [cell["arm"] for cell in results["cells"]] == ["zero-shot", "bio"]
    assert results["cells"][1]["rows"] == 14  # eight stand in the test rows, two serve as validation rows
    with pytest.raises(TypeError, match="no setting 'seed' .* did you mean 'seeds'"):
        evaluate(task, seed=3)
    with pytest.raises(ValueError, match="mine, mine: of several with one name"):
        evaluate([task, task])


def test_a_table_and_a_file_are_evaluated_as_they_are(encoder_folder, tmp_path, make_pairs):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(make_pairs(40, 0), columns=["sentence1", "sentence2", "score"])
    frame.to_csv(tmp_path / "pairs.csv", index=False)
    chosen = dict(model=encoder_folder, arms=["zero-shot"], device="cpu", console=quiet())
    output = str(tmp_path / "o")
    cells = evaluate([frame, str(tmp_path / "pairs.csv")], output=output, **chosen)["cells"]
    assert [cell["task"] for cell in cells] == ["own", "pairs"] and cells[0]["test"] == cells[1]["test"]
    assert cells[0]["test_rows"] == 8
    with pytest.raises(ValueError, match="holds cells of rows of own="):  # others under the same name
        evaluate(frame.iloc[:20], output=output, **chosen)


# -- the folder --


def test_test_rows_are_not_opened_twice_for_a_known_result(tmp_path, make_pairs):
    columns = dict(zip(("sentence1", "sentence2", "score"), zip(*make_pairs(8, 0), strict=True), strict=True))
    task, cells = StsTask("mine", {"test": columns}), Cells(tmp_path)
    looked = []
    task.evaluate = lambda model, split: looked.append(split)
    sealed = SealedTest(task, [], cells)
    sealed.open(None, "lora", 1)
    sealed.open(None, "lora", 1)  # its process was ended before the result was written
    cells.add(module.Cell("mine", "lora", 1, 5, 1.0, 2.0, float("nan"), 3.0, "spearman", 1e-3, 4, 5, 8, 0))
    with pytest.raises(RuntimeError, match="were opened for 'lora' with seed 1 before"):
        sealed.open(None, "lora", 1)
    assert looked == ["test", "test"]
    assert [(line["arm"], line["seed"]) for line in lines(tmp_path / "test_log.csv")] == [("lora", "1")] * 2


def test_two_processes_do_not_train_the_same_cell(tmp_path):
    cells = Cells(tmp_path)
    (claim,) = [tmp_path / "claims" / "near-lora-1.json"]
    claim.write_text(json.dumps({"machine": "another", "process": 1}))
    with pytest.raises(TakenElsewhere), cells.claimed("near", "lora", 1):
        pass
    import socket

    claim.write_text(json.dumps({"machine": socket.gethostname(), "process": 2**22 + 1}))  # no process has this number
    with cells.claimed("near", "lora", 1):
        assert json.loads(claim.read_text())["process"] != 2**22 + 1
    assert not claim.exists()


def test_a_line_that_lost_its_end_is_no_cell(tmp_path):
    cells = Cells(tmp_path)
    cell = module.Cell("near", "lora", 1, 5, 1.0, 2.0, float("nan"), 3.0, "spearman", 1e-3, 4, 5, 8, 0, '{"f1": 1.5}')
    cells.add(cell)
    with (tmp_path / "cells.csv").open("a") as file:
        file.write("near,lora,2,5,1.0")
    (found,) = cells.done()
    assert found.others == '{"f1": 1.5}' and np.isnan(found.test_clean) and found.rate == 1e-3


def test_the_overlap_of_single_texts_ignores_case_and_punctuation():
    task = load_task(
        "a",
        {
            "train": {"text": ["Red Cat!", "blue dog"], "label": ["x", "y"]},
            "test": {"text": ["red cat"], "label": ["x"]},
        },
    )
    kept, lost = Overlap.of([task]).without_leaks(task)
    assert kept.rows("train")["text"] == ["blue dog"] and lost == {"train": 1}
    assert Overlap.of([task]).clean(task) == []


def test_a_set_that_is_read_as_another_family_does_not_overlap_with_itself(settings):
    assert Evaluate(settings(), quiet()).prepare("kinds:language_modelling").test.clean == list(range(18))
