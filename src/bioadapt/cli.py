"""The command ``bioadapt``. Options, defaults and help of the long commands come from their settings' classes.

Everything heavy is imported by the command that needs it, so that help and typing errors are answered at once. A user's
mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ._commands import FAILED, answered, new_console, options_of, say, say_json, stop
from ._version import __version__
from ._words import suggest as suggest_names
from .primitives.names import ENTRY_POINT_GROUP, check_filter
from .settings import DemoSettings, EvaluationSettings, SearchSettings

if TYPE_CHECKING:
    from .registry import PrimitiveInfo

EXAMPLE_WIDTH = 384

app = typer.Typer(
    name="bioadapt",
    help="Mechanisms from neuroscience as PEFT adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the command ``bioadapt``."""
    from . import _quiet  # noqa: F401

    app()


def _built_in(pattern: str = r"^def (\w+)") -> list[str]:
    """The names of the built-in primitives, where it is too early to import the registry, and torch with it."""
    stub = Path(__file__).with_name("catalogue.pyi").read_text(encoding="utf-8")
    return re.findall(pattern, stub, re.MULTILINE)


def _names(incomplete: str) -> list[str]:
    """For a shell that completes them."""
    return [name for name in _built_in() if name.startswith(incomplete)]


def _check_name(name: str) -> None:
    """Answer a misspelt name at once, unless a package may have brought it."""
    known = _built_in(r"^(?:def )?(\w+)(?= = |\()")  # further spellings, too
    if name not in known and "bioadapt.registry" not in sys.modules and not entry_points(group=ENTRY_POINT_GROUP):
        raise ValueError(f"unknown primitive {name!r}; {suggest_names(name, known)}")


_Json = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bioadapt {__version__}")
        raise typer.Exit()


# -- the commands --


@app.callback()
def bioadapt(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Mechanisms from neuroscience as PEFT adapters."""


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Only names like this, such as '*lora'.")] = "*",
    stage: Annotated[str | None, typer.Option(help="Only primitives of this stage.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only primitives of this kind.")] = None,
    as_json: _Json = False,
) -> None:
    """List the primitives."""
    with answered():
        check_filter(pattern, stage, kind)
    from .registry import list_primitives, primitive_info

    infos = [primitive_info(name) for name in list_primitives(pattern, stage, kind)]
    if as_json:
        say_json([_summary(info) for info in infos])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "stage", "kind", "merges"):
        table.add_column(column, no_wrap=True)
    table.add_column(f"parameters at {EXAMPLE_WIDTH}x{EXAMPLE_WIDTH}", justify="right")
    table.add_column("summary")
    for info in infos:
        count = info.parameter_count(EXAMPLE_WIDTH, EXAMPLE_WIDTH)
        table.add_row(info.name, info.stage, info.kind, "yes" if info.mergeable else "no", f"{count:,}", info.summary)
    new_console().print(table, highlight=False)


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="Name of a primitive; `bioadapt list` shows them.", autocompletion=_names)
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Draw what the mechanism does into this file (.png, .svg, .pdf).")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Show all about one primitive."""
    with answered():
        _check_name(name)
    from .registry import primitive_info

    with answered():
        info = primitive_info(name)
        if plot is not None:
            from .portrait import portrait

            portrait(name, plot)
    if as_json:
        say_json(_record(info))
        return
    console = new_console()
    count = info.parameter_count(EXAMPLE_WIDTH, EXAMPLE_WIDTH)
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for label, value in (
        ("biology", info.biology),
        ("equation", info.equation),
        ("reference", info.reference),
        ("stage", info.stage),
        ("kind", info.kind),
        ("merges", _merging(info)),
        ("parameters", f"{count:,} on a layer from {EXAMPLE_WIDTH} to {EXAMPLE_WIDTH} features"),
        ("also", ", ".join(_traits(info)) or "-"),
        ("at birth", f"zero is the {info.zero_at}; a new adapter takes zero_scale={info.fresh_zero_scale:g}"),
        ("record", "\n".join(map(str, info.record)) or "not measured"),
    ):
        facts.add_row(label, _plain(value))
    console.print(info.name, style="bold", highlight=False)
    console.print(_plain(info.summary), highlight=False)
    console.print()
    console.print(facts, highlight=False)
    console.print()
    console.print(_settings(info) if info.settings else "no settings", highlight=False)
    console.print()
    console.print(_example(info), highlight=False, markup=False, soft_wrap=True)
    if plot is not None:
        say(f"\nPicture: {plot}")


@app.command()
def suggest(
    task: Annotated[str | None, typer.Option(help="A task of the record or a family of tasks, such as sts.")] = None,
    merges: Annotated[bool, typer.Option("--merges", help="Only what can become part of a weight.")] = False,
    causal: Annotated[bool, typer.Option("--causal", help="Only what a language model can have.")] = False,
    cheap: Annotated[bool, typer.Option("--cheap", help="Only gains: a few numbers for each channel.")] = False,
    as_json: _Json = False,
) -> None:
    """Rank the mechanisms by what was measured of them, over a LoRA of their size and over a placebo."""
    with answered():
        from dataclasses import asdict

        from .record import suggest as suggested

        ranking = suggested(task, merges=merges, causal=causal, cheap=cheap)
    if as_json:
        say_json([asdict(suggestion) for suggestion in ranking])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "over a LoRA of its size", "over a placebo", "x the LoRA's rate", "tasks"):
        table.add_column(column, no_wrap=True)
    for one in ranking:
        tasks = ", ".join(f"{finding.task} ({finding.stage})" for finding in one.findings)
        table.add_row(one.primitive, f"{one.over_equal:+.2f}", f"{one.over_placebo:+.2f}", f"{one.factor:g}", tasks)
    new_console().print(table, highlight=False)


@app.command()
@options_of(DemoSettings)
def demo(settings: DemoSettings) -> None:
    """Train a LoRA and a bio adapter over it on real data, compare them fairly, and reload both."""
    with answered():
        from .demo import Demo, ReloadError

        job = Demo(settings, new_console())
    try:
        job.run()
    except ReloadError as error:
        stop(error, FAILED)


@app.command()
@options_of(EvaluationSettings)
def evaluate(settings: EvaluationSettings) -> None:
    """Compare adapters fairly on tasks: same rows, steps, tuning and seeds for all. The same command goes on."""
    with answered():
        from .evaluation.protocol import Evaluate

        Evaluate(settings, new_console()).run()


@app.command()
@options_of(SearchSettings)
def search(
    settings: SearchSettings,
    join: Annotated[
        bool, typer.Option("--join", help="Only take trials of a search that is running, until none is left.")
    ] = False,
) -> None:
    """Search bio adapters over a tuned LoRA, test the best once, and write a report. The same command goes on."""
    with answered():
        from .search import Search

        job = Search(settings, new_console())
    with answered((ValueError,)):
        if join:
            job.join()
        else:
            job.run()


@app.command()
def report(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Annotated[
        str, typer.Option(help="Where it is, as for `bioadapt search`.")
    ] = "search_output/study.journal",
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    as_json: Annotated[bool, typer.Option("--json", help="No file: the study as JSON, for programs.")] = False,
) -> None:
    """Write the report of a study, finished or not, as one HTML file."""
    with answered():
        from .search import as_record, write_report

        if as_json:
            say_json(as_record(study, storage))
        else:
            say(f"Report: {write_report(study, storage, output)}")


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(metavar="TOOL [ARGUMENTS]", help="A program, or a Python file.")],
) -> None:
    """Run another program with the method registered: `bioadapt run lm_eval --model hf ...`."""
    from .environment import run as become

    with answered():
        become(command)


@app.command()
def enable() -> None:
    """Have every Python of this environment know the method, without `import bioadapt`."""
    from . import environment

    with answered():
        path = environment.enable()
    say(f"Enabled: {path} has PEFT taught the method wherever it is imported. `bioadapt disable` removes it.")


@app.command()
def disable() -> None:
    """Take `bioadapt enable` back."""
    from . import environment

    with answered():
        path = environment.disable()
    say("It was not enabled." if path is None else f"Disabled: {path} is removed.")


# -- words about a primitive --


def _plain(text: str) -> str:
    """Square brackets are part of equations, not mark-up."""
    return text.replace("[", r"\[")


def _merging(info: PrimitiveInfo) -> str:
    return {
        "weight": "yes, as a change of the layer's weight",
        "left": "yes, as a linear map of the layer's output",
        None: "no, it depends on its input",
    }[info.merge]


def _traits(info: PrimitiveInfo) -> list[str]:
    traits = {
        "draws random numbers in training": info.stochastic,
        "has buffers that follow a local rule": info.learns,
        "reads the layer's input": info.needs_input,
    }
    return [trait for trait, holds in traits.items() if holds]


def _settings(info: PrimitiveInfo) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("setting", "type", "default", "range", "meaning"):
        table.add_column(column, no_wrap=column != "meaning")
    for name, setting in info.settings.items():
        kind = setting.type.__name__ if setting.default is not None else "-"
        table.add_row(name, kind, repr(setting.default), _plain(setting.accepted), _plain(setting.meaning))
    return table


def _summary(info: PrimitiveInfo) -> dict[str, Any]:
    facts = ("name", "stage", "kind", "mergeable", "stochastic", "stateful", "summary")
    count = info.parameter_count(EXAMPLE_WIDTH, EXAMPLE_WIDTH)
    return {fact: getattr(info, fact) for fact in facts} | {"parameters": count}


def _record(info: PrimitiveInfo) -> dict[str, Any]:
    facts = ("biology", "equation", "reference", "zero_at", "merge", "learns", "needs_input")
    settings = {
        name: {"type": setting.annotation, "default": setting.default, "accepted": setting.accepted}
        | {"meaning": setting.meaning}
        for name, setting in info.settings.items()
    }
    return _summary(info) | {fact: getattr(info, fact) for fact in facts} | {"settings": settings}


def _example(info: PrimitiveInfo) -> str:
    first = next(((name, setting.default) for name, setting in info.settings.items()), None)
    entry = f'"{info.name}"' if first is None else f'{{"name": "{info.name}", "{first[0]}": {first[1]!r}}}'
    return (
        "from peft import get_peft_model\n"
        "from bioadapt import BioConfig\n\n"
        f"model = get_peft_model(model, BioConfig([{entry}]))"
    )


if __name__ == "__main__":
    main()
