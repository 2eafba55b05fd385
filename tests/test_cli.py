"""The command line: what it prints, and that a mistake is one clear line with exit code 2."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from bioadapt import list_primitives, primitive_info
from bioadapt.cli import app

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
        (["search", "--trials", "0"], "trials 0: a whole number above zero is needed"),
        (["search", "--epochs", "0"], "epochs 0.0: a number above zero is needed"),
        (["search", "--budget-params", "1 percent"], "budget of parameters '1 percent': a whole number or a share"),
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
    assert all(command in result.output for command in ("list", "show", "demo", "search", "report"))


def test_importing_the_command_line_brings_nothing_optional():
    code = (
        "import sys, bioadapt; before = set(sys.modules); import bioadapt.cli; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("sentence_transformers", "matplotlib", "datasets", "scipy", "sklearn", "optuna"):
        assert f"'{heavy}'" not in done.stdout
