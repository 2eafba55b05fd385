"""The command ``bioadapt``: list and show primitives, run the demo, evaluate, search, report.

Everything heavy is imported by the command that needs it. A user's mistake is one line on stderr and exit code 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .registry import PrimitiveInfo

EXAMPLE_WIDTH = 384
_USAGE_ERROR = 2
_INTERRUPTED = 130  # as a shell has it

app = typer.Typer(
    name="bioadapt",
    help="Mechanisms from neuroscience as PEFT adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the command ``bioadapt``."""
    app()


@app.command("list")
def list_command(
    stage: Annotated[str | None, typer.Option(help="Only primitives of this stage.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only primitives of this kind.")] = None,
) -> None:
    """List the primitives."""
    from .registry import list_primitives, primitive_info

    try:
        names = list_primitives(stage=stage, kind=kind)
    except ValueError as error:
        _fail(error)
    table = Table(box=None, pad_edge=False)
    for column in ("name", "stage", "kind", "merges"):
        table.add_column(column, no_wrap=True)
    table.add_column(f"parameters at {EXAMPLE_WIDTH}x{EXAMPLE_WIDTH}", justify="right")
    table.add_column("summary")
    for name in names:
        info = primitive_info(name)
        count = info.parameter_count(EXAMPLE_WIDTH, EXAMPLE_WIDTH)
        table.add_row(name, info.stage, info.kind, "yes" if info.mergeable else "no", f"{count:,}", info.summary)
    _console().print(table, highlight=False)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a primitive; `bioadapt list` shows them.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw what the mechanism does into this file (.png, .svg, .pdf).")
    ] = None,
) -> None:
    """Show all about one primitive."""
    from .registry import primitive_info

    try:
        info = primitive_info(name)
        if plot is not None:
            from .portrait import portrait

            portrait(name, plot)
    except (ValueError, ImportError, OSError) as error:
        _fail(error)
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
        console.print(f"\nPicture: {plot}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def demo(
    task: Annotated[str, typer.Option(help="api-search, stsb, or a task of --data-dir.")] = "api-search",
    data_dir: Annotated[
        str | None, typer.Option(help="Folder of NAME/{train,dev,test}.tsv.gz files; the hub, if not given.")
    ] = None,
    model: Annotated[str, typer.Option(help="Sentence encoder: a name on the hub or a path.")] = "all-MiniLM-L6-v2",
    output: Annotated[str, typer.Option(help="Where adapters, results and picture go.")] = "demo_output",
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.", min=0)] = 0,
    epochs: Annotated[float | None, typer.Option(help="Epochs that every arm is trained for.")] = None,
    primitives: Annotated[str | None, typer.Option(help="Names of primitives, parted by commas.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the LoRAs; chosen if not given.")] = None,
    bio_learning_rate: Annotated[float | None, typer.Option(help="Of LoRA + bio; chosen if not given.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows per training step.", min=2)] = 64,
    limit: Annotated[int | None, typer.Option(help="About so many rows per split, for a quick look.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the fastest there is, if not given.")] = None,
) -> None:
    """Train a LoRA and a bio adapter over it on real data, compare them fairly, and reload both."""
    try:
        from .demo import Demo, DemoSettings, ReloadError

        chosen = {"epochs": epochs, "learning_rate": learning_rate, "bio_learning_rate": bio_learning_rate}
        settings: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
        if primitives is not None:
            settings["primitives"] = tuple(name.strip() for name in primitives.split(",") if name.strip())
        job = Demo(
            DemoSettings(
                task=task, data_dir=data_dir, model=model, output=output, seed=seed, batch_size=batch_size,
                limit=limit, device=device, **settings,
            ),
            _console(),
        )  # fmt: skip
    except (ValueError, ImportError, OSError) as error:
        _fail(error)
    try:
        job.run()
    except ReloadError as error:
        typer.echo(f"bioadapt: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def evaluate(
    task: Annotated[str, typer.Option(help="Names of tasks, parted by commas, or all of --data-dir.")] = "api-search",
    data_dir: Annotated[
        str | None, typer.Option(help="Folder of NAME/{train,dev,test}.tsv.gz or .npz files; the hub, if not given.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="minilm, a name on the hub, a path, or small-vit, small-convnet, small-lm.")
    ] = "minilm",
    arms: Annotated[
        str, typer.Option(help="What is compared, parted by commas.")
    ] = "zero-shot,lora,lora-equal,lora+bio,lora+placebo",
    seeds: Annotated[int, typer.Option(help="Seeds of training on which every arm is tested.")] = 5,
    primitives: Annotated[
        str, typer.Option(help="Of the bio adapter, parted by commas.")
    ] = "lateral_inhibition,predictive_coding",
    bio_rank: Annotated[int | None, typer.Option(help="Rank of its population; full width, if not given.")] = None,
    bio_config: Annotated[
        str | None, typer.Option(help="Folder of an adapter_config.json, in place of --primitives.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(help="Of the LoRA that is not of equal size.")] = 8,
    layers: Annotated[int | None, typer.Option(help="Adapt so many upper blocks alone; all, if not given.")] = None,
    adapters: Annotated[
        str | None,
        typer.Option(help="Folders of saved adapters to load first, parted by commas, the lowest first."),
    ] = None,
    rates: Annotated[
        str, typer.Option(help="Learning rates that each arm's is chosen from, parted by commas.")
    ] = "5e-4,2e-3,8e-3",
    epochs: Annotated[float, typer.Option(help="Passes through the training rows.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows per training step.", min=2)] = 32,
    train_rows: Annotated[int | None, typer.Option(help="At most so many training rows.")] = None,
    train_on: Annotated[
        str | None, typer.Option(help="A set whose training and validation rows serve tasks that have none.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="About so many rows per split, for a quick look.")] = None,
    output: Annotated[str, typer.Option(help="Where cells and results go.")] = "evaluation_output",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the fastest there is, if not given.")] = None,
) -> None:
    """Compare adapters fairly on tasks: same rows, steps, tuning and seeds for all. The same command goes on."""

    def parts(text: str | None) -> tuple[str, ...]:
        return tuple(part.strip() for part in (text or "").split(",") if part.strip())

    try:
        from .evaluation.protocol import Evaluate, EvaluationSettings

        job = Evaluate(
            EvaluationSettings(
                task=parts(task), data_dir=data_dir, model=model, arms=parts(arms), seeds=seeds,
                primitives=parts(primitives), bio_rank=bio_rank, bio_config=bio_config, lora_rank=lora_rank,
                layers=layers, adapters=parts(adapters), rates=tuple(map(float, parts(rates))), epochs=epochs,
                batch_size=batch_size, train_rows=train_rows, train_on=train_on, limit=limit, output=output,
                device=device,
            ),
            _console(),
        )  # fmt: skip
        job.run()
    except (ValueError, ImportError, OSError) as error:
        _fail(error)
    except RuntimeError as error:
        typer.echo(f"bioadapt: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("bioadapt: stopped; what has ended is kept, and the same command goes on from there", err=True)
        raise typer.Exit(_INTERRUPTED) from None


@app.command()
def search(
    task: Annotated[str, typer.Option(help="api-search, stsb, or a task of --data-dir.")] = "api-search",
    data_dir: Annotated[
        str | None, typer.Option(help="Folder of NAME/{train,dev,test}.tsv.gz files; the hub, if not given.")
    ] = None,
    model: Annotated[str, typer.Option(help="Sentence encoder: a name on the hub or a path.")] = "all-MiniLM-L6-v2",
    lora: Annotated[
        str, typer.Option(help="auto: tuned with as many trials; none; or the folder of a trained one.")
    ] = "auto",
    trials: Annotated[int, typer.Option(help="How many configurations are tried; give more to go on.")] = 40,
    budget_params: Annotated[str, typer.Option(help="Most trainable numbers: 200000, or 1% of the model.")] = "1%",
    storage: Annotated[
        str | None,
        typer.Option(help="PATH.journal, sqlite:///PATH, postgresql://..., grpc://...; a journal, if not given."),
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name of the study; task and model, if not given.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that train at the same time.")] = 1,
    output: Annotated[str, typer.Option(help="Where adapters and report go.")] = "search_output",
    seed: Annotated[int, typer.Option(help="Seed of the search.", min=0)] = 0,
    epochs: Annotated[float, typer.Option(help="Of the LoRA and of the bio adapter each.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Rows per training step.", min=2)] = 64,
    rungs: Annotated[int, typer.Option(help="How often a trial is validated, the end included.")] = 2,
    limit: Annotated[int | None, typer.Option(help="About so many rows per split, for a quick look.")] = None,
    primitives: Annotated[str | None, typer.Option(help="Names to choose from, parted by commas; else all.")] = None,
    slots: Annotated[int, typer.Option(help="Most primitives of a configuration.")] = 6,
    confirm: Annotated[int, typer.Option(help="How many of the best are trained again on fresh seeds.")] = 3,
    confirm_seeds: Annotated[int, typer.Option(help="On how many.")] = 2,
    test_seeds: Annotated[int, typer.Option(help="On how many the winner and its rivals are tested.")] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds that a trial may take.")] = 3600.0,
    max_step_time: Annotated[float | None, typer.Option(help="Seconds that a training step may take.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; the fastest there is, if not given.")] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Only take trials of a search that is running, until none is left.")
    ] = False,
) -> None:
    """Search bio adapters over a tuned LoRA, test the best once, and write a report. The same command goes on."""
    try:
        from .search.contest import Search
        from .search.settings import SearchSettings

        names = None if primitives is None else tuple(n.strip() for n in primitives.split(",") if n.strip())
        job = Search(
            SearchSettings(
                task=task, data_dir=data_dir, model=model, lora=lora, trials=trials, budget_params=budget_params,
                output=output, storage=storage, study=study, workers=workers, seed=seed, epochs=epochs,
                batch_size=batch_size, rungs=rungs, limit=limit, primitives=names, slots=slots, confirm=confirm,
                confirm_seeds=confirm_seeds, test_seeds=test_seeds, timeout=timeout, max_step_time=max_step_time,
                device=device,
            ),
            _console(),
        )  # fmt: skip
    except (ValueError, ImportError, OSError) as error:
        _fail(error)
    try:
        if join:
            job.join()
        else:
            job.run()
    except ValueError as error:
        _fail(error)
    except RuntimeError as error:
        typer.echo(f"bioadapt: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("bioadapt: stopped; what has ended is kept, and the same command goes on from there", err=True)
        raise typer.Exit(_INTERRUPTED) from None


@app.command()
def report(
    study: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Annotated[
        str, typer.Option(help="Where it is, as for `bioadapt search`.")
    ] = "search_output/study.journal",
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
) -> None:
    """Write the report of a study, finished or not, as one HTML file."""
    try:
        from .search.report import write_report

        path = write_report(study, storage, output)
    except (ValueError, ImportError, OSError) as error:
        _fail(error)
    _console().print(f"Report: {path}", highlight=False, markup=False, soft_wrap=True)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(metavar="TOOL [ARGUMENTS]", help="A program, or a Python file.")],
) -> None:
    """Run another program with the method registered: `bioadapt run lm_eval --model hf ...`."""
    from .environment import run as become

    try:
        become(command)
    except (ValueError, OSError) as error:
        _fail(error)


@app.command()
def enable() -> None:
    """Have every Python of this environment know the method, without `import bioadapt`."""
    from . import environment

    try:
        path = environment.enable()
    except OSError as error:
        _fail(error)
    _say(f"Enabled: {path} has PEFT taught the method wherever it is imported. `bioadapt disable` removes it.")


@app.command()
def disable() -> None:
    """Take `bioadapt enable` back."""
    from . import environment

    try:
        path = environment.disable()
    except OSError as error:
        _fail(error)
    _say("It was not enabled." if path is None else f"Disabled: {path} is removed.")


def _say(text: str) -> None:
    _console().print(text, highlight=False, markup=False, soft_wrap=True)


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"bioadapt: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(_USAGE_ERROR)


def _console() -> Console:
    """A console on today's stdout; what goes to a file or a pipe is not folded to a terminal's width."""
    console = Console(soft_wrap=False)
    return console if console.is_terminal else Console(width=max(console.width, 160))


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


def _example(info: PrimitiveInfo) -> str:
    first = next(((name, setting.default) for name, setting in info.settings.items()), None)
    entry = f'"{info.name}"' if first is None else f'{{"name": "{info.name}", "{first[0]}": {first[1]!r}}}'
    return (
        "from peft import get_peft_model\n"
        "from bioadapt import BioConfig\n\n"
        f"model = get_peft_model(model, BioConfig(primitives=[{entry}]))"
    )


if __name__ == "__main__":
    main()
