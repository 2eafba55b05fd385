"""The command ``bioadapt``. Options, defaults and help of the long commands come from their settings' classes.

Everything heavy is imported by the command that needs it, so that help and typing errors are answered at once. A user's
mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_args, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from ._version import __version__
from .primitives.names import check_filter
from .settings import DemoSettings, EvaluationSettings, SearchSettings

if TYPE_CHECKING:
    from .registry import PrimitiveInfo

EXAMPLE_WIDTH = 384
_FAILED, _USAGE_ERROR = 1, 2
_INTERRUPTED = 130  # as a shell has it
_MISTAKES = (ValueError, ImportError, OSError)

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


# -- what the commands share --


@contextmanager
def _answered(mistakes: tuple[type[Exception], ...] = _MISTAKES) -> Iterator[None]:
    """One line on stderr for a mistake, for what failed on the way, and for what was stopped, each with its code."""
    try:
        yield
    except mistakes as error:
        _stop(error, _USAGE_ERROR)
    except RuntimeError as error:
        _stop(error, _FAILED)
    except KeyboardInterrupt:
        _stop("stopped; what has ended is kept, and the same command goes on from there", _INTERRUPTED)


def _stop(words: object, code: int) -> NoReturn:
    typer.echo(f"bioadapt: {' '.join(str(words).split())}", err=True)
    raise typer.Exit(code) from None


def _options_of(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command that gets an instance of a settings' class, whose fields are its options."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(settings)
        own = [
            parameter.replace(kind=parameter.KEYWORD_ONLY)
            for parameter in list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        ]
        options = [_option(spec, hints[spec.name]) for spec in fields(settings)]

        def from_words(**given: Any) -> None:
            more = {parameter.name: given.pop(parameter.name) for parameter in own}
            with _answered():
                chosen = settings(**{name: _read(name, hints[name], value) for name, value in given.items()})
            command(chosen, **more)

        from_words.__name__, from_words.__doc__ = command.__name__, command.__doc__
        from_words.__annotations__ = {parameter.name: parameter.annotation for parameter in (*options, *own)}
        from_words.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]
        return from_words

    return decorate


def _option(spec: Any, hint: Any) -> inspect.Parameter:
    """A field as an option; what holds several values is read as one word, in which commas part them."""
    help, default, kind = spec.metadata["help"], spec.default, hint
    if _is_list(hint):
        help, kind = f"{help} Parted by commas.", str if default is not None else str | None
        default = None if default is None else ",".join(map(str, default))
    elif int in get_args(hint) and str in get_args(hint):
        kind = str
    annotation = Annotated[kind, typer.Option(help=help, min=spec.metadata.get("min"))]  # type: ignore[valid-type]
    return inspect.Parameter(spec.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _is_list(hint: Any) -> bool:
    return any("tuple" in str(part) for part in (hint, *get_args(hint)))


def _read(name: str, hint: Any, value: Any) -> Any:
    if value is None or not _is_list(hint):
        return value
    parts = tuple(part.strip() for part in value.split(",") if part.strip())
    if "float" not in str(hint):
        return parts
    try:
        return tuple(float(part) for part in parts)
    except ValueError:
        raise ValueError(f"--{name.replace('_', '-')} {value}: numbers parted by commas are needed") from None


def _say(text: str) -> None:
    _console().print(text, highlight=False, markup=False, soft_wrap=True)


def _say_json(record: Any) -> None:
    typer.echo(json.dumps(_finite(record), indent=1, default=str))


def _finite(value: Any) -> Any:
    """The same with words for the numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _console() -> Console:
    """A console on today's stdout; what goes to a file or a pipe is not folded to a terminal's width."""
    console = Console(soft_wrap=False)
    return console if console.is_terminal else Console(width=max(console.width, 160))


def _names(incomplete: str) -> list[str]:
    """The names of the built-in primitives, for a shell that completes them: too early to import the registry."""
    stub = Path(__file__).with_name("catalogue.pyi").read_text(encoding="utf-8")
    return [name for name in re.findall(r"^def (\w+)", stub, re.MULTILINE) if name.startswith(incomplete)]


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
    with _answered():
        check_filter(pattern, stage, kind)
    from .registry import list_primitives, primitive_info

    infos = [primitive_info(name) for name in list_primitives(pattern, stage, kind)]
    if as_json:
        _say_json([_summary(info) for info in infos])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "stage", "kind", "merges"):
        table.add_column(column, no_wrap=True)
    table.add_column(f"parameters at {EXAMPLE_WIDTH}x{EXAMPLE_WIDTH}", justify="right")
    table.add_column("summary")
    for info in infos:
        count = info.parameter_count(EXAMPLE_WIDTH, EXAMPLE_WIDTH)
        table.add_row(info.name, info.stage, info.kind, "yes" if info.mergeable else "no", f"{count:,}", info.summary)
    _console().print(table, highlight=False)


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
    from .registry import primitive_info

    with _answered():
        info = primitive_info(name)
        if plot is not None:
            from .portrait import portrait

            portrait(name, plot)
    if as_json:
        _say_json(_record(info))
        return
    console = _console()
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
        _say(f"\nPicture: {plot}")


@app.command()
def suggest(
    task: Annotated[str | None, typer.Option(help="A task of the record or a family of tasks, such as sts.")] = None,
    merges: Annotated[bool, typer.Option("--merges", help="Only what can become part of a weight.")] = False,
    causal: Annotated[bool, typer.Option("--causal", help="Only what a language model can have.")] = False,
    cheap: Annotated[bool, typer.Option("--cheap", help="Only gains: a few numbers for each channel.")] = False,
    as_json: _Json = False,
) -> None:
    """Rank the mechanisms by what was measured of them, over a LoRA of their size and over a placebo."""
    with _answered():
        from dataclasses import asdict

        from .record import suggest as suggested

        found = suggested(task, merges=merges, causal=causal, cheap=cheap)
    if as_json:
        _say_json([asdict(suggestion) for suggestion in found])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "over a LoRA of its size", "over a placebo", "x the LoRA's rate", "tasks"):
        table.add_column(column, no_wrap=True)
    for one in found:
        tasks = ", ".join(f"{finding.task} ({finding.stage})" for finding in one.findings)
        table.add_row(one.primitive, f"{one.over_equal:+.2f}", f"{one.over_placebo:+.2f}", f"{one.factor:g}", tasks)
    _console().print(table, highlight=False)


@app.command()
@_options_of(DemoSettings)
def demo(settings: DemoSettings) -> None:
    """Train a LoRA and a bio adapter over it on real data, compare them fairly, and reload both."""
    with _answered():
        from .demo import Demo, ReloadError

        job = Demo(settings, _console())
    try:
        job.run()
    except ReloadError as error:
        _stop(error, _FAILED)


@app.command()
@_options_of(EvaluationSettings)
def evaluate(settings: EvaluationSettings) -> None:
    """Compare adapters fairly on tasks: same rows, steps, tuning and seeds for all. The same command goes on."""
    with _answered():
        from .evaluation.protocol import Evaluate

        Evaluate(settings, _console()).run()


@app.command()
@_options_of(SearchSettings)
def search(
    settings: SearchSettings,
    join: Annotated[
        bool, typer.Option("--join", help="Only take trials of a search that is running, until none is left.")
    ] = False,
) -> None:
    """Search bio adapters over a tuned LoRA, test the best once, and write a report. The same command goes on."""
    with _answered():
        from .search import Search

        job = Search(settings, _console())
    with _answered((ValueError,)):
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
    with _answered():
        from .search import as_record, write_report

        if as_json:
            _say_json(as_record(study, storage))
        else:
            _say(f"Report: {write_report(study, storage, output)}")


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(metavar="TOOL [ARGUMENTS]", help="A program, or a Python file.")],
) -> None:
    """Run another program with the method registered: `bioadapt run lm_eval --model hf ...`."""
    from .environment import run as become

    with _answered():
        become(command)


@app.command()
def enable() -> None:
    """Have every Python of this environment know the method, without `import bioadapt`."""
    from . import environment

    with _answered():
        path = environment.enable()
    _say(f"Enabled: {path} has PEFT taught the method wherever it is imported. `bioadapt disable` removes it.")


@app.command()
def disable() -> None:
    """Take `bioadapt enable` back."""
    from . import environment

    with _answered():
        path = environment.disable()
    _say("It was not enabled." if path is None else f"Disabled: {path} is removed.")


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
