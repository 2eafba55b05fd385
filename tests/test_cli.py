"""The command line: what it prints, and that a mistake is one clear line with exit code 2."""

import dataclasses
import json
import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import bioadapt
from bioadapt import list_primitives, primitive_info
from bioadapt.cli import _names, app
from bioadapt.settings import DemoSettings, EvaluationSettings, SearchSettings

runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, list(arguments))


def names_in(output):
    return [line.split()[0] for line in output.splitlines()[1:] if line and not line.startswith(" ")]


def test_list_shows_every_primitive_with_what_matters():
    result = run("list")
    assert result.exit_code == 0
    assert names_in(result.output) == list_primitives()
    head = result.output.splitlines()[0]
    assert all(column in head for column in ("name", "stage", "kind", "merges", "parameters at 384x384", "summary"))
    row = next(line for line in result.output.splitlines() if line.startswith("lateral_inhibition"))
    assert {"competition", "pointwise", "no", "3,456"} <= set(row.split())


def test_list_filters_by_stage_and_kind():
    assert names_in(run("list", "--stage", "memory").output) == list_primitives(stage="memory")
    assert names_in(run("list", "--kind", "weight").output) == list_primitives(kind="weight")
    both = run("list", "--kind", "causal", "--stage", "dynamics")
    assert names_in(both.output) == list_primitives(stage="dynamics", kind="causal")


def test_list_finds_names_like_a_pattern():
    assert names_in(run("list", "*lora").output) == list_primitives("*lora")
    assert names_in(run("list", "nothing*").output) == []


def test_list_and_show_as_json():
    listed = json.loads(run("list", "--stage", "memory", "--json").output)
    assert [entry["name"] for entry in listed] == list_primitives(stage="memory")
    for entry in listed:
        info = primitive_info(entry["name"])
        assert (entry["kind"], entry["mergeable"], entry["summary"]) == (info.kind, info.mergeable, info.summary)
        assert entry["parameters"] == info.parameter_count(384, 384)
    shown = json.loads(run("show", "fly_lora", "--json").output)
    info = primitive_info("fly_lora")
    assert (shown["equation"], shown["reference"], shown["learns"]) == (info.equation, info.reference, info.learns)
    assert list(shown["settings"]) == list(info.settings)
    assert shown["settings"]["rho"]["default"] is None and shown["settings"]["rho"]["type"] == "float | None"


@pytest.mark.parametrize(
    ("command", "settings"), [("demo", DemoSettings), ("evaluate", EvaluationSettings), ("search", SearchSettings)]
)
def test_options_defaults_and_help_are_the_settings(command, settings, monkeypatch):
    options = {option.name: option for option in get_command(app).commands[command].params}
    assert list(options)[: len(dataclasses.fields(settings))] == [spec.name for spec in dataclasses.fields(settings)]
    assert all(spec.metadata["help"] in options[spec.name].help for spec in dataclasses.fields(settings))
    # Without options the command gets what the class is by itself, and with them what they say.
    homes = {"demo": ("bioadapt.demo", "Demo"), "evaluate": ("bioadapt.evaluation.protocol", "Evaluate")}
    home, name = homes.get(command, ("bioadapt.search.contest", "Search"))
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("optuna")
    given = []

    class Job:
        def __init__(self, chosen, console):
            given.append(chosen)

        def run(self):
            pass

    monkeypatch.setattr(f"{home}.{name}", Job)
    assert run(command).exit_code == 0
    assert run(command, "--primitives", "neuro_ada, kv_lif", "--epochs", "2", "--data-dir", "here").exit_code == 0
    assert given[0] == settings()
    assert given[1] == settings(primitives=("neuro_ada", "kv_lif"), epochs=2.0, data_dir="here")


@pytest.mark.parametrize("name", list_primitives())
def test_show_tells_all_that_the_registry_knows(name):
    info = primitive_info(name)
    result = run("show", name)
    assert result.exit_code == 0
    shown = "".join(result.output.split())  # as the terminal folds it
    for text in (info.summary, info.biology, info.equation, info.reference, info.stage, info.kind):
        assert "".join(text.split()) in shown
    for setting, declared in info.settings.items():
        assert setting in shown
        assert "".join(declared.accepted.split()) in shown
        assert repr(declared.default) in shown
    assert f"{info.parameter_count(384, 384):,}on" in shown


def test_the_example_that_show_prints_is_valid():
    from bioadapt import BioConfig

    for name in list_primitives():
        line = next(line for line in run("show", name).output.splitlines() if "get_peft_model(model" in line)
        call = line.partition("get_peft_model(model, ")[2].removesuffix(")")
        assert eval(call, {"BioConfig": BioConfig}).primitives[0]["name"] == name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "--stage", "memry"], "unknown stage 'memry'; did you mean 'memory'?"),
        (["list", "--kind", "gobal"], "unknown kind 'gobal'; did you mean 'global'?"),
        (["show", "latral_inhibition"], "unknown primitive 'latral_inhibition'; did you mean 'lateral_inhibition'"),
        (["demo", "--primitives", "latral_inhibition"], "did you mean 'lateral_inhibition'"),
        (["demo", "--task", "api-serch"], "did you mean 'api-search'?"),
        (["demo", "--task", "stsb", "--data-dir", "no/such/folder"], "no/such/folder is not a folder"),
        (["demo", "--epochs", "0"], "--epochs 0.0: a number above zero is needed"),
        (["demo", "--bio-learning-rate", "nan"], "--bio-learning-rate nan: a number above zero is needed"),
        (["demo", "--limit", "0"], "limit=0: at least 1"),
        (["demo", "--model", "no/such/model"], "model 'no/such/model' could not be loaded"),
        (["search", "--task", "api-serch"], "did you mean 'api-search'?"),
        (["evaluate", "--rates", "1e-3,fast"], "--rates 1e-3,fast: numbers parted by commas are needed"),
        (["list", "memory"], "no primitive is called 'memory', which is a stage: stage='memory'"),
        (["search", "--trials", "0"], "trials 0: a whole number above zero is needed"),
        (["search", "--epochs", "0"], "epochs 0.0: a number above zero is needed"),
        (["search", "--budget-params", "1 percent"], "budget of parameters '1 percent': a whole number or a share"),
        (["search", "--lora-params", "few"], "lora_params 'few': a whole number or a share"),
        (["search", "--lora-params", "1%", "--lora", "none"], "only a LoRA that is tuned has a bound"),
        (["search", "--lora-params", "100"], "lora_params 100: the smallest LoRA of this model has 9,216 numbers"),
        (["search", "--lora", "no/such/folder"], "lora 'no/such/folder': no adapter_config.json is there"),
        (["report", "anything", "--storage", "postgre://here"], "unknown kind 'postgre'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, said, tmp_path, monkeypatch):
    if arguments[0] in ("demo", "search", "report"):
        pytest.importorskip("sentence_transformers")
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("bioadapt: ")
    assert said in lines[0]
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["sentence_transformers", "matplotlib", "scipy"])
def test_a_missing_package_is_named_with_its_extra(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    result = run("demo")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"bioadapt: {module} cannot be imported")
    assert "pip install bioadapt[demo]" in result.stderr


def test_the_help_lists_the_commands():
    result = run("--help")
    assert result.exit_code == 0
    commands = ("list", "show", "demo", "evaluate", "search", "report", "run", "enable", "disable")
    assert all(command in result.output for command in commands)


def test_the_version():
    assert run("--version").output == f"bioadapt {bioadapt.__version__}\n"


def test_a_shell_completes_the_names():
    assert _names("") == [n for n in list_primitives() if primitive_info(n).factory.__module__.startswith("bioadapt.")]
    assert _names("neuro_") == ["neuro_ada", "neuro_lora"]


def test_help_and_typing_errors_load_nothing_heavy():
    """Which is why they are answered at once."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom bioadapt.cli import app\n"
        "words = ['--help', '--version', 'search --help', 'search --trails 3', 'list --stage memry', 'serch']\n"
        "for words in (*words, 'suggest --task stsbb', 'show lateral_inhibtion'):\n"
        "    CliRunner().invoke(app, words.split())\n"
        "print([name for name in ('torch', 'numpy', 'peft', 'transformers', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_command_line_brings_nothing_optional():
    code = (
        "import sys, bioadapt; before = set(sys.modules); import bioadapt.cli; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("sentence_transformers", "matplotlib", "datasets", "scipy", "sklearn", "optuna"):
        assert f"'{heavy}'" not in done.stdout
