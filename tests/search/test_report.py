"""The report: everything a study knows, on one page that needs nothing else; half a study and no study, too."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("optuna")
pytest.importorskip("scipy")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState, create_trial
from typer.testing import CliRunner

from bioadapt import BioConfig
from bioadapt.cli import app
from bioadapt.search.report import render, write_report
from bioadapt.search.report.wording import as_code, in_words
from bioadapt.search.space import describe
from bioadapt.search.space.model import SearchedModel, SearchedModule
from bioadapt.search.space.space import SearchSpace
from bioadapt.search.study.storage import open_storage

PRIMITIVES = (
    "divisive_normalization",
    "homeostatic_scaling",
    "k_winners_take_all",
    "lateral_inhibition",
    "predictive_coding",
    "hebbian_fast_weights",
)


@pytest.fixture(scope="module")
def space():
    from bioadapt import list_primitives

    known = [name for name in PRIMITIVES if name in list_primitives()]
    kinds = {"attention.output.dense": 384, "output.dense": 1536}
    sites = tuple(
        SearchedModule(f"encoder.layer.{layer}.{kind}", layer, kind, width, 384)
        for layer in range(6)
        for kind, width in kinds.items()
    )
    return SearchSpace(SearchedModel(sites, 22_713_216, tuple(known)), budget=227_132, slots=3)


def searched(space, name="minilm-stsb", storage=None, trials=60, scale=1.0):
    """A search as the runner leaves it: finished, with every kind of trial and everything recorded."""
    generator = np.random.default_rng(0)
    study = optuna.create_study(
        study_name=name, storage=storage, direction="maximize", sampler=RandomSampler(seed=0), load_if_exists=True
    )
    for number in range(trials):
        trial = study.ask()
        params = space.suggest(trial)
        for key, value in describe(space, params).items():
            trial.set_user_attr(key, value)
        names = {slot["primitive"] for slot in trial.user_attrs["configuration"]["slots"]}
        score = 83 + 0.6 * ("lateral_inhibition" in names) - 0.5 * ("homeostatic_scaling" in names)
        score += 0.5 * (names >= {"lateral_inhibition", "predictive_coding"}) + 0.15 * generator.normal()
        trial.set_user_attr("seconds", 40 + 5 * generator.random())
        score *= scale
        trial.report(score - 0.5, 1)
        if number % 10 == 7:
            trial.set_user_attr("failure", ["out of memory: <tensor>", "the score is nan"][number // 10 % 2])
            study.tell(trial, state=TrialState.FAIL)
        elif number % 6 == 5 and number > 20:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            trial.report(score, 2)
            study.tell(trial, score)
    marks = {"failed_trial": 7, "retry_history": [7]}
    study.add_trial(
        create_trial(
            value=83.0 * scale,
            params=study.trials[7].params,
            distributions=study.trials[7].distributions,
            system_attrs=marks,
        )
    )
    return study


def finished(space, study):
    """The final comparison and the settings, in the form in which the runner records them."""
    best = study.best_trial
    study.set_user_attr("space", space.record())
    study.set_user_attr("task", {"name": "stsb", "rows": {"train": 5749, "test": 1379}, "metrics": ["spearman"]})
    settings = {"model": "all-MiniLM-L6-v2", "task": "stsb", "trials": 60, "budget": "1%", "limit": None}
    settings |= {"versions": {"torch": "2.9.0", "peft": "0.21.2"}, "machine": {"processor": "2 cores", "threads": 2}}
    study.set_user_attr("settings", settings)
    study.set_user_attr(
        "lora",
        {"study": "minilm-stsb-lora", "trials": 60, "params": {"rank": 8}, "validation": 83.4, "parameters": 73728},
    )
    study.set_user_attr("confirmation", [{"number": best.number, "scores": [83.9, 84.1], "mean": 84.0}])
    contenders = [("model as it comes", 0, [82.03]), ("tuned LoRA", 73728, [83.9, 84.0, 83.8])]
    contenders += [("LoRA + bio", 120000, [84.4, 84.3, 84.6]), ("LoRA, same size", 120320, [84.1, 84.4, 84.0])]
    study.set_user_attr(
        "final",
        {
            "metric": "spearman",
            "contenders": [
                {"name": name, "parameters": count, "epochs": 2.0, "seconds": 81.5, "scores": scores}
                for name, count, scores in contenders
            ],
            "differences": [
                {"name": "LoRA + bio - tuned LoRA", "estimate": 0.53, "low": 0.2, "high": 0.88, "level": 0.95},
                {"name": "LoRA + bio - LoRA, same size", "estimate": 0.27, "low": -0.11, "high": 0.64, "level": 0.95},
                {"name": "LoRA + bio - model as it comes", "estimate": 2.4, "low": 1.7, "high": 3.1, "level": 0.95},
            ],
            "winner": {"number": best.number, "configs": best.user_attrs["configs"], "learning_rate": 0.005},
            "shrinkage": {"observed": best.value, "posterior": 84.02, "sd": 0.21},
            "configurations_tried": 60,
            "test_accesses": 10,
            "verdict": "Undecided: LoRA + bio is 0.27 points above the LoRA of the same size, the interval includes 0.",
        },
    )
    return study


def tuned(storage=None, trials=30):
    """The study of the LoRA below."""
    study = optuna.create_study(
        study_name="minilm-stsb-lora", storage=storage, direction="maximize", sampler=RandomSampler(seed=1)
    )
    study.optimize(
        lambda trial: 83.5 - 0.05 * abs(trial.suggest_categorical("rank", [2, 4, 8, 16, 32]) - 8), n_trials=trials
    )
    return study


class Page(HTMLParser):
    """What a reader meets: text, tables, and whatever would be fetched."""

    VOID = frozenset(("meta", "br", "img", "link", "hr", "input", "path", "use", "line", "rect"))

    def __init__(self, source):
        super().__init__()
        self.html, self.words, self.fetched, self.open = source, [], [], []
        self.ids, self.rows = [], []
        self.feed(source)
        assert self.open == [], "every element is closed"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.fetched += [attributes[key] for key in ("src", "href", "action", "xlink:href") if key in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self.open and {"td", "th"} & set(self.open) and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def row(self, first):
        """The cells of the table row that begins with a text."""
        return next([cell.strip() for cell in row] for row in self.rows if row and row[0].strip() == first)


@pytest.fixture(scope="module")
def study(space):
    return finished(space, searched(space))


@pytest.fixture(scope="module")
def page(study):
    return Page(render(study, tuned()))


def test_the_page_needs_nothing_else(page):
    assert all(address.startswith("#") for address in page.fetched)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<img", page.html)
    assert page.html.count("http") == page.html.count("http-equiv") + page.html.count('xmlns:xlink="http:')
    assert len(set(page.ids)) == len(page.ids)


def test_it_says_what_was_compared_and_how_it_ended(page, study, space):
    assert "Undecided: LoRA + bio is 0.27 points above" in page.text
    assert page.row("LoRA + bio") == ["LoRA + bio", "84.43", "84.40, 84.30, 84.60", "120,000", "2", "82"]
    assert page.row("LoRA + bio - tuned LoRA")[1] == "+0.53 [+0.20, +0.88]"
    assert "The test split was opened 10 times." in page.text
    assert "60 configurations were tried" in page.text and "expects 84.02 ± 0.21" in page.text
    assert "60 trials" in page.text
    size = str(space.size())
    assert size in page.text and f"about {size[0]}.{size[1]} × 10 {len(size) - 1} configurations" in page.text
    assert page.row("versions: peft") == ["versions: peft", "0.21.2"] and page.row("rows: test")[1] == "1379"


def test_it_ranks_the_trials_with_what_is_believed_of_them(page, study):
    best = study.best_trial
    cells = next(row for row in page.rows if len(row) == 7 and row[1].strip() == str(best.number))
    assert cells[0] == "1" and cells[2] == f"{best.value:.2f}" and cells[4] == in_words(best)
    believed, sd = map(float, cells[3].split(" ± "))
    assert believed < best.value and 0 < sd < 1


def test_it_names_what_helps_and_says_untested_where_nothing_is_known(page):
    helping = re.search(r"Surely helping: ([^.]*)\. Surely harming: ([^.]*)\.", page.html)
    assert "lateral_inhibition" in helping[1] and helping[2] == "homeostatic_scaling"
    assert 0.3 < float(page.row("lateral_inhibition")[1]) < 1.2
    assert "lateral_inhibition with predictive_coding: +" in page.html


def test_it_tells_why_trials_have_no_score(page):
    rows = {row[0]: row[2] for row in page.rows if len(row) == 3}
    assert rows["7"] == "out of memory: <tensor>; repeated as trial 60" and rows["17"] == "the score is nan"
    assert rows["23"].startswith("at step 1 with 8")


def test_the_config_can_be_copied(page, study):
    configs = study.best_trial.user_attrs["configs"]
    code, record = re.findall(r"<pre><code>(.*?)</code>", page.html, flags=re.DOTALL)
    calls = re.findall(r"BioConfig\(\n.*?\n\)", html.unescape(code), flags=re.DOTALL)
    made = [eval(call, {"BioConfig": BioConfig}).to_dict() for call in calls]
    assert [{name: config[name] for name in configs[0]} for config in made] == configs
    assert "# trained with learning rate 0.005" in code and code.count("add_adapter(") == len(configs) - 1
    assert json.loads(html.unescape(record)) == study.user_attrs["final"]["winner"]


def test_code_says_what_is_no_default_and_no_more():
    plain, chosen = BioConfig(primitives=["lateral_inhibition"]), {"name": "predictive_coding", "rank": 2}
    other = BioConfig(primitives=["lateral_inhibition", chosen], rank=8, target_modules=["a", "b"])
    code = as_code([plain.to_dict(), other.to_dict()], 0.01, {"lateral_inhibition": 3.0})
    assert code.splitlines()[3:] == [
        "# model: the base, or the LoRA over it",
        "model = get_peft_model(model, BioConfig(",
        '    primitives=["lateral_inhibition"],',
        '), adapter_name="bio")',
        'model.add_adapter("bio_2", BioConfig(',
        "    primitives=[\"lateral_inhibition\", {'name': 'predictive_coding', 'rank': 2}],",
        "    target_modules=['a', 'b'],",
        "    rank=8,",
        "))",
        'model.base_model.set_adapter(["bio", "bio_2"])',
        "# trained with learning rate 0.01",
        "# lateral_inhibition: the tensor that starts at zero with 0.03",
    ]
    assert as_code([]) == ""


def test_half_a_search_is_a_report(space):
    study = searched(space, name="half", trials=12)
    study.set_user_attr("space", space.record())
    study.set_user_attr("settings", {"model": "m", "task": "stsb"})
    study.enqueue_trial({})
    study.ask()
    study.enqueue_trial({})
    page = Page(render(study))
    assert "2 of 14 trials have not ended: 1 running, 1 waiting." in page.text
    assert "Nothing has been tested yet" in page.text and "The best so far, to copy" in page.text
    assert "final comparison" not in page.text


def test_a_pair_that_no_trial_has_shown_is_untested_and_not_without_effect(space):
    study = optuna.create_study(study_name="pairs", direction="maximize", sampler=RandomSampler(seed=0))
    study.set_user_attr("space", space.record())
    pairs = [("lateral_inhibition", "predictive_coding"), ("predictive_coding", "homeostatic_scaling")] * 4
    for number, (first, second) in enumerate(pairs):
        places = {"slot1.layers": "0", "slot2.layers": "1", "rank": 4, "slot3.primitive": "none"}
        study.enqueue_trial({"slot1.primitive": first, "slot2.primitive": second, **places})
        trial = study.ask()
        space.suggest(trial)
        study.tell(trial, 80 + number % 3)
    page = Page(render(study))
    # Each pair has two fields of the map.
    assert "untested: 1 pair here" in page.text and page.html.count('aria-label="untested"') == 2
    assert "lateral_inhibition with homeostatic_scaling: untested" in page.html
    assert "predictive_coding with homeostatic_scaling: " in page.html and "4 trials" in page.html


def test_equal_scores_say_nothing_of_what_to_expect(space):
    study = searched(space, name="equal", trials=12, scale=0.0)
    study.set_user_attr("space", space.record())
    page = Page(render(study))
    assert "Expected:" not in page.text and "Surely helping: none. Surely harming: none." in page.html


def test_an_empty_study_is_a_report():
    page = Page(render(optuna.create_study(study_name="empty")))
    assert "This study has no trials yet." in page.text and "0 trials" in page.text


def test_a_study_of_something_else_is_a_report_and_its_names_are_text():
    study = optuna.create_study(study_name="<script>alert(1)</script> & $x$", sampler=RandomSampler(seed=0))

    def objective(trial):
        x = trial.suggest_float("x", -1, 1)
        kind = trial.suggest_categorical("a<b>", ["$plain$", "<i>"])
        if trial.number == 3:
            raise ValueError
        return x * x + (kind == "<i>")

    study.optimize(objective, n_trials=30, catch=(ValueError,))
    page = Page(render(study))
    assert "<script>alert(1)</script> & $x$" in page.text and "<script" not in page.html
    assert f"trial {study.best_trial.number} with {study.best_value:.4g}" in page.text
    assert "a<b>=<i>" in page.text and "no reason given" in page.text
    assert "Surely harming: a&lt;b&gt;=&lt;i&gt;" in page.html.replace("&#34;", '"')


def test_a_study_whose_trials_all_failed_is_a_report():
    study = optuna.create_study(study_name="failed")
    study.enqueue_trial({})
    study.tell(study.ask(), state=TrialState.FAIL)
    page = Page(render(study))
    assert "No trial of this study has ended with a score yet." in page.text and "no reason given" in page.text


def test_a_space_with_a_primitive_that_is_not_known_here_falls_back(space):
    study = searched(space, name="other", trials=12)
    record = space.record()
    record["host"]["primitives"] = [*record["host"]["primitives"], "from_another_package"]
    study.set_user_attr("space", record)
    assert "slot1.primitive=" in Page(render(study)).text


def test_from_a_storage_to_a_file(space, tmp_path):
    url = f"{tmp_path}/s.journal"
    study = searched(space, storage=open_storage(url), trials=9)
    study.set_user_attr("lora", {"study": "minilm-stsb-lora", "trials": 30})
    tuned(open_storage(url), trials=5)
    path = write_report("minilm-stsb", url, tmp_path / "new" / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert "Tuned in 30 trials" in page.text and "LoRA: best so far" in page.text
    with pytest.raises(ValueError, match="study 'minilm-stbs' is not in .*did you mean 'minilm-stsb"):
        write_report("minilm-stbs", url, tmp_path / "report.html")


def test_the_study_as_json(space, tmp_path):
    url = f"{tmp_path}/s.journal"
    study = searched(space, storage=open_storage(url), trials=9)
    done = CliRunner().invoke(app, ["report", "minilm-stsb", "--storage", url, "--json"])
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.output)
    assert (record["study"], record["direction"]) == ("minilm-stsb", "MAXIMIZE")
    assert [trial["number"] for trial in record["trials"]] == [trial.number for trial in study.trials]
    for told, trial in zip(record["trials"], study.trials, strict=True):
        assert (told["state"], told["params"]) == (trial.state.name, trial.params)
        assert told["value"] == trial.value
    assert not list(tmp_path.glob("*.html"))


def test_what_cannot_be_reported_is_refused_and_nothing_is_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.journal: there is no such file"):
        write_report("s", f"{tmp_path}/none.journal", tmp_path / "report.html")
    url = f"{tmp_path}/two.journal"
    optuna.create_study(study_name="two", storage=open_storage(url), directions=["minimize", "maximize"])
    with pytest.raises(ValueError, match="2 objectives"):
        write_report("two", url, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["two.journal"]


# -- other people's studies ------------------------------------------------------------------------------------------


STRANGE = ("mnist", 3, [1, 2], None, {"a": 1}, True, {"name": 5, "metrics": "acc"}, [{"number": "x"}])


def theirs(values=(0.5, 0.25, 1.0), **attributes):
    study = optuna.create_study(study_name="theirs", sampler=RandomSampler(seed=0))
    for name, value in attributes.items():
        study.set_user_attr(name, value)
    study.optimize(lambda trial: values[trial.number % len(values)] * (1 + 0 * trial.suggest_float("x", 0, 1)), 12)
    return study


@pytest.mark.parametrize("turn", range(len(STRANGE)))
def test_attributes_that_another_program_gave_a_study_are_not_taken_for_ours(turn):
    """Each name has every value once."""
    names = ("settings", "space", "task", "lora", "confirmation", "final", "best", "tickets")
    given = {name: STRANGE[(turn + place) % len(STRANGE)] for place, name in enumerate(names)}
    page = Page(render(theirs(**given)))
    assert "An Optuna study." in page.text and "12 trials" in page.text
    assert "the best of 12 complete trials is trial 1 with 0.25" in page.text


@pytest.mark.parametrize("name", ["configuration", "configs", "parameters", "seconds", "failure", "standard_error"])
@pytest.mark.filterwarnings("ignore:.*standard_error")
def test_attributes_that_another_program_gave_a_trial_are_not_taken_for_ours(name):
    study = theirs()
    there = {"params": {"x": 0.5}, "distributions": {"x": optuna.distributions.FloatDistribution(0, 1)}}
    for value in (*STRANGE, {"slots": [1]}, {"slots": "abc"}, {"slots": [{"primitive": "nowhere"}]}):
        study.add_trial(create_trial(value=0.125, user_attrs={name: value}, **there))
        study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={name: value}))
    page = Page(render(study))
    assert "is trial 12 with 0.125" in page.text and "x=0.5" in page.text


def test_a_standard_error_that_is_no_number_is_ignored_with_a_warning():
    study = theirs()
    study.add_trial(create_trial(value=0.5, user_attrs={"standard_error": "small"}))
    with pytest.warns(UserWarning, match="trial 12: its user attribute standard_error='small' is no finite number"):
        render(study)


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ((1e308, -1e308), "-1e+308"),
        ((1e308,), "1e+308"),
        ((1.7e308, 1.0), "1.00"),
        ((float("inf"), 2.0), "2.00"),
        ((1e-320, 1.0), "1e-320"),
    ],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_values_at_the_end_of_the_numbers_are_shown(values, best):
    study = theirs(values)
    study.add_trial(create_trial(value=values[0], intermediate_values={0: 1e308, 1: -1e308}))
    page = Page(render(study))
    assert f"with {best}." in page.text and len(page.text) < 20_000
    assert "nan" not in page.html.replace("nano", "")


def test_a_winner_of_a_primitive_that_is_not_installed_can_be_copied():
    entries = [{"name": "from_another_package", "pools": 3, "zero_scale": 2.0}, {"name": "lateral_inhibition"}]
    code = as_code([{"primitives": entries, "target_modules": "x", "rank": None, "composition": "staged"}], 0.01)
    assert code.splitlines()[0] == (
        "# needs the package that registers 'from_another_package', which is not installed here"
    )
    assert "{'name': 'from_another_package', 'pools': 3, 'zero_scale': 2.0}" in code
    # An entry of a time without that setting has trained without a factor.
    assert "{'name': 'lateral_inhibition', 'zero_scale': 1.0}" in code


def test_a_search_whose_primitives_are_not_installed_is_a_report(space, monkeypatch):
    study = finished(space, searched(space, name="absent", trials=12))
    text = json.dumps(study.user_attrs).replace("lateral_inhibition", "from_another_package")
    for name, value in json.loads(text).items():
        study.set_user_attr(name, value)
    final = json.loads(text)["final"]
    final["winner"]["configs"] = [
        {"primitives": [{"name": "from_another_package"}], "target_modules": "x", "rank": None, "composition": "staged"}
    ]
    study.set_user_attr("final", final)
    page = Page(render(study))
    assert "needs the package that registers 'from_another_package'" in page.text
    assert "Undecided: LoRA + bio is 0.27 points above" in page.text


def test_a_password_is_not_shown_where_a_study_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "bioadapt.search.report.page.open_storage", lambda url, create: open_storage(f"{tmp_path}/s.journal")
    )
    for url in ("postgresql://me:se#c/r?et@h/db", "postgresql://h/db?user=me&password=se%23cret"):
        with pytest.raises(ValueError, match=r"study 's' is not in postgresql://.*\*\*\*") as error:
            write_report("s", url, tmp_path / "report.html")
        assert "et@" not in str(error.value) and "cret" not in str(error.value)
