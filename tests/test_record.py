"""The record of every mechanism: read, ranked, shown, recommended, and made from cells."""

from __future__ import annotations

import gzip
import importlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    MistralConfig,
    MistralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from bioadapt import BioConfig, list_primitives, primitive_info, registry
from bioadapt.cli import app
from bioadapt.evaluation.models import SMALL_VIT, ImageModel, LanguageModel, _tokenizer
from bioadapt.record import IMAGES, LANGUAGE, PROMISES, record, suggest


@pytest.fixture
def publish(monkeypatch):
    """The script; what it imports registers placebos, which the tests of the catalogue are not to see."""
    list_primitives()
    monkeypatch.setattr(registry, "_infos", dict(registry._infos))
    return importlib.import_module("experiments.record.publish")


def test_every_finding_is_of_a_primitive_and_finite():
    assert {finding.primitive for finding in record()} <= set(list_primitives())
    for finding in record():
        assert all(math.isfinite(value) for value in (finding.over_lora, finding.over_equal, finding.over_placebo))
        assert (finding.low is None) == (finding.seeds == 1)


def test_the_best_comes_first_and_filters_hold():
    ranked = suggest()
    assert not any(
        finding.alone or finding.family in (*PROMISES, IMAGES, LANGUAGE) for one in ranked for finding in one.findings
    )
    alike = [one for one in ranked if [finding.seeds for finding in one.findings] == [1, 1, 1, 1]]
    assert [one.over_equal for one in alike] == sorted((one.over_equal for one in alike), reverse=True)
    assert all(primitive_info(one.primitive).mergeable for one in suggest(merges=True))
    assert all(primitive_info(one.primitive).gain for one in suggest(cheap=True))
    by_task, by_family = suggest("stsb"), suggest("sts")
    assert {one.primitive for one in by_task} <= {one.primitive for one in by_family}
    assert all({finding.task for finding in one.findings} == {"stsb"} for one in by_task)
    assert all({finding.family for finding in one.findings} == {"sts"} for one in by_family)
    with pytest.raises(ValueError, match=r"task='stbs'.*stsb"):
        suggest("stbs")


def test_what_was_hardly_measured_ranks_close_to_the_mean(monkeypatch):
    def finding(primitive, over_equal, seeds):
        return replace(record()[0], primitive=primitive, task="t", over_equal=over_equal, seeds=seeds, alone=False)

    known = [finding("gain_field", 3.0, 1), finding("gap_junction", 2.0, 12), finding("neuro_ada", -2.0, 1)]
    known.append(finding("kv_lif", -1.5, 12))
    monkeypatch.setattr("bioadapt.record.record", lambda: tuple(known))
    assert [one.primitive for one in suggest("t")] == ["gap_junction", "gain_field", "neuro_ada", "kv_lif"]


def test_what_wins_on_most_tasks_comes_before_what_one_task_carries(monkeypatch):
    def finding(primitive, task, over_equal, spread):
        bounds = {"low": over_equal - spread, "high": over_equal + spread, "seeds": 3, "alone": False}
        return replace(record()[0], primitive=primitive, family="t", task=task, over_equal=over_equal, **bounds)

    known = [finding("gain_field", "a", 70.0, 9.0), finding("gain_field", "b", -5.0, 1.0)]
    known += [finding("kv_lif", "a", 3.0, 9.0), finding("kv_lif", "b", 2.0, 1.0), finding("neuro_ada", "a", 20.0, 30.0)]
    monkeypatch.setattr("bioadapt.record.record", lambda: tuple(known))
    assert [one.primitive for one in suggest("t")] == ["kv_lif", "gain_field", "neuro_ada"]


def test_the_recommended_configuration_is_the_first_that_can_act():
    small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=20)
    (entry,) = BioConfig.recommended(BertModel(small), task="sts").primitives
    best = suggest("sts")[0]
    assert (entry["name"], entry["zero_scale"]) == (best.primitive, best.zero_scale)
    (entry,) = BioConfig.recommended(nn.Linear(2, 2)).primitives
    assert primitive_info(entry["name"]).kind != "causal"


def test_what_is_recommended_was_measured_of_models_of_its_kind(monkeypatch):
    """Alone and over a LoRA: images for a vision model, texts for a language model, sentences for all others."""
    kinds = {IMAGES: "gain_field", LANGUAGE: "leaky_integrator", "sts": "neuro_ada"}
    known = [replace(record()[0], primitive=name, family=family, alone=False) for family, name in kinds.items()]
    monkeypatch.setattr("bioadapt.record.record", lambda: tuple(known))
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    models = {
        IMAGES: ViTForImageClassification(ViTConfig(**size, image_size=8, patch_size=4)),
        LANGUAGE: MistralForCausalLM(MistralConfig(**size, num_key_value_heads=2, vocab_size=20)),
        "sts": BertModel(BertConfig(**size, vocab_size=20)),
    }
    for family, model in models.items():
        over_lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        for given in (model, over_lora):
            (entry,) = BioConfig.recommended(given).primitives
            assert entry["name"] == kinds[family]


def test_it_is_shown():
    name = record()[0].primitive
    shown = " ".join(CliRunner().invoke(app, ["show", name]).output.split())
    assert all(str(finding) in shown for finding in primitive_info(name).record)
    listed = json.loads(CliRunner().invoke(app, ["suggest", "--task", "stsb", "--json"]).output)
    assert [one["primitive"] for one in listed] == [one.primitive for one in suggest("stsb")]
    wrong = CliRunner().invoke(app, ["suggest", "--task", "stbs"])
    assert wrong.exit_code == 2 and "stsb" in wrong.output


def test_findings_compare_with_the_best_of_the_rivals(publish):
    def cell(arm, dev, seed=0, factor=1.0, params=100):
        return publish.Result("stsb", arm, seed, 1e-3, factor, 1.0, params, dev, 1.0)

    cells = [
        cell("lora-r8", 80.0),
        cell("lora-r16", 81.0, params=200),
        cell("lora-r32", 90.0, params=400),
        cell("plain_gain", 80.5),
        cell("gelu_bottleneck", 80.2),
        cell("lateral_inhibition", 79.0, params=150),
        cell("lateral_inhibition", 82.0, factor=4.0, params=150),
    ]
    (finding,) = publish.findings(cells)
    # Its size lies below that of rank 16, so that rank 32 is no rival.
    assert (finding.over_lora, finding.over_equal, finding.over_placebo) == (2.0, 1.0, 1.5)
    assert (finding.factor, finding.seeds, finding.low, finding.stage) == (4.0, 1, None, "screen")
    more = [
        *(cell("lora-r8", dev, seed) for seed, dev in ((1, 80.0), (2, 80.0))),
        *(cell("lora-r16", dev, seed, params=200) for seed, dev in ((1, 81.0), (2, 81.0))),
        *(cell("lora-r32", dev, seed, params=400) for seed, dev in ((1, 81.0), (2, 81.0))),
        *(cell("plain_gain", 80.5, seed) for seed in (1, 2)),
        *(cell("gelu_bottleneck", 80.2, seed) for seed in (1, 2)),
        cell("lateral_inhibition", 83.0, 1, 4.0, 150),
        cell("lateral_inhibition", 81.0, 2, 4.0, 150),
    ]
    (finding,) = publish.findings([*cells, *more])
    assert finding.seeds == 3 and finding.over_equal == pytest.approx(1.0)
    assert finding.low == pytest.approx(1 - 4.303 / 3**0.5, abs=1e-3)  # t of 2 degrees of freedom, sd 1
    assert "| lateral_inhibition |  |  | +1.00 [-1.48, +3.48] |" in publish.table([finding])


def test_what_is_alone_is_compared_with_placebos_alone(publish):
    def cell(arm, dev, params):
        return publish.Result("stackoverflow-few", arm, 0, 1e-3, 1.0, 1.0, params, dev, 1.0)

    cells = [cell("lora-r8", 80.0, 100), cell("plain_gain", 90.0, 110), cell("plain_gain alone", 70.0, 10)]
    cells += [cell("gain_field", 85.0, 120), cell("gain_field alone", 75.0, 20)]
    beside, alone = publish.findings(cells)
    assert (beside.alone, beside.over_lora, beside.over_placebo) == (False, 5.0, -5.0)
    assert (alone.alone, alone.over_lora, alone.over_placebo, alone.family) == (True, -5.0, 5.0, "few rows")
    assert {promise.family for promise in publish.PROMISES.values()} == set(PROMISES)


def test_a_delayed_response_is_out_of_reach_of_what_attends_to_the_window(publish):
    """What the promise of memory is measured with: no path leads from the cue to the answer but a memory's."""
    promises = importlib.import_module("experiments.record.promises")
    bench = promises.DelayedResponse(None, 8, 1)
    tokens = bench.tokens["dev"][:1].repeat(2, 1)
    tokens[1, 0] = (tokens[0, 0] + 1) % bench.cues
    with torch.no_grad():
        one, other = bench._answers(bench.model, tokens)
        assert torch.equal(one, other)
    remembering = get_peft_model(bench.model, BioConfig(["leaky_integrator"], init_weights=False))
    with torch.no_grad():
        one, other = bench._answers(remembering.eval(), tokens)
    assert not torch.allclose(one, other)


def test_typing_errors_and_exchanged_words(publish):
    promises = importlib.import_module("experiments.record.promises")
    source = np.random.default_rng(0)
    text = "the quick brown foxes jumped over sleeping hounds"
    wrong = promises.mistyped(text, source)
    pairs = [(a, b) for a, b in zip(text.split(), wrong.split(), strict=True) if a != b]
    assert pairs and all(sorted(a) == sorted(b) and (a[0], a[-1]) == (b[0], b[-1]) for a, b in pairs)
    moved = promises.exchanged(text, source)
    assert moved != text and sorted(moved.split()) == sorted(text.split())
    assert promises.exchanged("alone", source) == "alone"


@pytest.mark.parametrize("alone", [False, True])
def test_what_was_confirmed_stands_on_clean_test_rows_against_the_better_rival(publish, tmp_path, alone):
    BioConfig([{"name": "gain_field", "zero_scale": 32.0}]).save_pretrained(tmp_path)
    asked = publish.INSTEAD if alone else publish.BESIDE
    scores = {"lora": 70, asked.equals[0]: 72, asked.equals[1]: 73, asked.placebo: 71, asked.own: 75}
    lines = [
        f"stsb,{arm},{seed},200,0,0,{score + seed},9,{2e-3 if arm == 'lora' else 8e-3}"
        for arm, score in scores.items()
        for seed in (1, 2)
    ]
    lines += ["sst2,lora,1,200,0,0,80,9,0.002"]  # a task that is not done yet
    cells = tmp_path / "cells.csv"
    cells.write_text("\n".join(["task,arm,seed,params,dev,test,test_clean,seconds,rate", *lines]))
    (finding,) = publish.confirmed(tmp_path)
    assert (finding.over_lora, finding.over_equal, finding.over_placebo) == (5.0, 2.0, 4.0)
    assert (finding.zero_scale, finding.factor, finding.seeds, finding.stage) == (32.0, 4.0, 2, "confirmed")
    assert finding.alone is alone


def test_a_perplexity_is_turned_into_points(publish):
    """Lower is better, and one per cent less is about one point more."""
    better, worse = ({"metric": "perplexity", "test_clean": text} for text in ("99.0", "100.0"))
    assert publish.points(better) - publish.points(worse) == pytest.approx(100 * math.log(100 / 99))
    assert publish.points({"metric": "accuracy", "test_clean": "81.5"}) == 81.5


@pytest.fixture
def other_models(publish, monkeypatch):
    """The benches, with models of a few numbers in place of those that are trained for a minute."""
    module = importlib.import_module("experiments.record.other_models")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}

    def load_model(name, task, device, folder, *, steps=None):
        torch.manual_seed(0)
        if name == SMALL_VIT:
            return ImageModel(ViTForImageClassification(ViTConfig(**size, image_size=8, patch_size=4, num_channels=1)))
        tokenizer = _tokenizer(task.texts("train"))
        config = MistralConfig(**size, num_key_value_heads=2, vocab_size=len(tokenizer), pad_token_id=None)
        return LanguageModel(MistralForCausalLM(config), tokenizer)

    monkeypatch.setattr(module, "load_model", load_model)
    return module


@pytest.mark.parametrize("kind", ["images", "language"])
def test_a_bench_trains_what_it_is_given_and_takes_it_out_again(kind, other_models, tmp_path):
    if kind == "images":
        bench = other_models.ImageBench("digits", tmp_path, 64, 2)
    else:
        for split in ("train", "dev", "test"):
            (tmp_path / "mr").mkdir(exist_ok=True)
            lines = ["text\tlabel", *(f"the film number {n} was the best of {n % 7}\tgood" for n in range(64))]
            (tmp_path / "mr" / f"{split}.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        bench = other_models.LanguageBench("mr:language_modelling", tmp_path, 64, 2)
    before, keys = bench.score(bench.model), bench.model.state_dict().keys()
    adapted = get_peft_model(bench.model, LoraConfig(r=2, target_modules=list(bench.lora_targets)))
    ups = [parameter for name, parameter in adapted.named_parameters() if "lora_B" in name]
    _, after, _ = bench.run(adapted, {"lora_": 1e-2, "": 1e-2}, 0)
    assert all(parameter.abs().sum() > 0 for parameter in ups)
    assert after != before and bench.score(bench.model) == before and bench.model.state_dict().keys() == keys
    if kind == "language":
        assert after > before + 1  # a per cent of perplexity


def test_it_is_counted_who_took_a_rate_at_the_edge(publish, tmp_path):
    head = "task,arm,seed,params,dev,test,test_clean,seconds,metric,rate,steps,rows,test_rows,clean_rows,others"
    taken = {
        "lora": 1.0,
        "lora-equal@bio-sites": 3.0,
        "lora+bio": 2.0,
        "bio": 1.0,
        "lora+placebo": 3.0,
        "zero-shot": 0.0,
    }
    cells = [f"sts,{arm},1,9,0,0,0,9,spearman,{rate},9,9,9,9,{{}}" for arm, rate in taken.items()]
    (tmp_path / "cells.csv").write_text("\n".join([head, *cells]))
    trials = [f"sts,{arm},{rate},9,0,9" for arm in (*taken, "linear") if arm != "zero-shot" for rate in (1.0, 2.0, 3.0)]
    (tmp_path / "tuning.csv").write_text("\n".join(["task,arm,rate,params,dev,seconds", *trials]))
    table = publish.table_of_rates([tmp_path]).splitlines()
    assert table[2:] == ["| LoRA | 1 | 0 | 1 |", "| mechanism | 1 | 1 | 0 |", "| placebo | 0 | 0 | 1 |"]
