"""What the commands share: options made from a settings' class, answers to mistakes, and the console."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import typer
from rich.console import Console

FAILED, USAGE_ERROR = 1, 2
INTERRUPTED = 130  # as a shell has it
MISTAKES = (ValueError, ImportError, OSError)


@contextmanager
def answered(mistakes: tuple[type[Exception], ...] = MISTAKES) -> Iterator[None]:
    """One line on stderr for a mistake, for what failed on the way, and for what was stopped, each with its code."""
    try:
        yield
    except mistakes as error:
        stop(error, USAGE_ERROR)
    except RuntimeError as error:
        stop(error, FAILED)
    except KeyboardInterrupt:
        stop("stopped; what has ended is kept, and the same command goes on from there", INTERRUPTED)


def stop(words: object, code: int) -> NoReturn:
    typer.echo(f"bioadapt: {' '.join(str(words).split())}", err=True)
    raise typer.Exit(code) from None


def say(text: str) -> None:
    new_console().print(text, highlight=False, markup=False, soft_wrap=True)


def say_json(record: Any) -> None:
    typer.echo(json.dumps(_finite(record), indent=1, default=str))


def _finite(value: Any) -> Any:
    """The same with words for the numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def new_console() -> Console:
    """A console on today's stdout; what goes to a file or a pipe is not folded to a terminal's width."""
    console = Console(soft_wrap=False)
    return console if console.is_terminal else Console(width=max(console.width, 160))


def options_of(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
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
            with answered():
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
