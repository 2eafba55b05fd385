"""Pictures of what a mechanism does, drawn by running it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._extras import require
from .primitives.base import Context, Host, LocalRule, Primitive
from .registry import build_primitive, primitive_info

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, TOKENS = 32, 96
# Distinct in grey and to readers who confuse red and green.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")


def portrait(name: str, path: str | Path | None = None, **settings: Any) -> Figure:
    """Draw a primitive: how it answers to strength, over time, across channels, and how its local rule moves.

    Every panel runs the primitive itself, woken with seed 0 and with a gate of one, on a layer of 32 features.

    Args:
        name: of a registered primitive.
        path: where a picture is written, in the format of its suffix; nowhere if None.
        settings: of the primitive.

    Raises:
        ValueError: an unknown name or a wrong setting.
        MissingExtra: matplotlib is not installed.
    """
    info = primitive_info(name)
    panels = [_PANELS[panel] for panel in panels_of(name)]
    figures = require("matplotlib.figure")  # pyplot would want a display
    figure = figures.Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, lambda: specimen(name, **settings))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(info.name)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def panels_of(name: str) -> tuple[str, ...]:
    """The panels that suit a primitive's nature."""
    info = primitive_info(name)
    panels = {"weight": ("weight",), "pointwise": ("strength", "channels")}
    chosen = panels.get(info.kind, ("time", "channels"))
    if info.kind == "pointwise" and _reads_position(specimen(name)):
        chosen = ("positions", "channels")
    return (*chosen, "learning") if info.learns else chosen


def specimen(name: str, **settings: Any) -> Primitive:
    """The primitive as it is drawn: woken, in eval mode, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
        primitive = build_primitive(name, WIDTH, WIDTH, host=Host(weight), **settings)
        primitive.wake()
        if "gate" in dict(primitive.named_parameters()):
            primitive.gate.data.fill_(1.0)
        for _ in range(20 if primitive.learns else 0):
            _learn_once(primitive)
    return primitive.eval()


def _learn_once(primitive: Primitive) -> None:
    primitive.train()
    features = torch.randn(4, 16, WIDTH) * torch.linspace(0.5, 2.0, WIDTH)
    with torch.no_grad():
        primitive(features, Context(x_in=torch.randn(4, 16, WIDTH)))
    if isinstance(primitive, LocalRule):
        primitive.commit()


def _background(tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def _reads_position(primitive: Primitive) -> bool:
    change = _run(primitive, _background(1).expand(1, 8, WIDTH))[0]
    return not torch.allclose(change, change[:1].expand_as(change), atol=1e-5)


@torch.no_grad()
def _run(primitive: Primitive, x: Tensor, x_in: Tensor | None = None) -> Tensor:
    positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    return primitive(x, Context(x_in=x if x_in is None else x_in, positions=positions))


def _strength(axes: Axes, make: Callable[[], Primitive]) -> None:
    """What becomes of one channel when it alone is driven, on backgrounds of different strength."""
    primitive, drive, unit = make(), torch.linspace(-4, 4, 161), WIDTH // 3
    for colour, level in zip(COLOURS, (0.3, 1.0, 3.0), strict=False):
        x = (level * _background(1)).expand(len(drive), 1, WIDTH).clone()
        x[:, 0, unit] = drive
        out = x[:, 0, unit] + _run(primitive, x)[:, 0, unit]
        axes.plot(drive.numpy(), out.numpy(), color=colour, label=f"others at {level:g}")
    axes.plot(drive.numpy(), drive.numpy(), color="0.6", linewidth=0.8, linestyle=":", label="unchanged")
    axes.set(xlabel="feature", ylabel="feature + change", title="strength")
    axes.legend(frameon=False, fontsize="small")


def _time(axes: Axes, make: Callable[[], Primitive]) -> None:
    """The change that a step of activity and a single pulse cause over tokens."""
    primitive, unit = make(), WIDTH // 3
    pattern = _background(1)[0, 0]
    courses = {"a step": torch.zeros(TOKENS), "a pulse": torch.zeros(TOKENS)}
    courses["a step"][16:56] = 1.0
    courses["a pulse"][16] = 3.0
    for colour, (label, course) in zip(COLOURS, courses.items(), strict=False):
        x = 0.05 * _background(TOKENS) + course[None, :, None] * pattern
        axes.plot((_run(primitive, x)[0, :, unit] * pattern[unit].sign()).numpy(), color=colour, label=label)
    axes.axvspan(16, 56, color="0.93", zorder=0)
    axes.set(xlabel="token (grey: the step)", ylabel="change of one channel", title="time")
    axes.legend(frameon=False, fontsize="small")


def _positions(axes: Axes, make: Callable[[], Primitive]) -> None:
    """The change of the same features at every position of a document."""
    x = _background(1).expand(1, TOKENS, WIDTH)
    change = _run(make(), x)[0]
    for colour, unit in zip(COLOURS, range(0, WIDTH, WIDTH // 4), strict=False):
        axes.plot(change[:, unit].numpy(), color=colour, label=f"channel {unit}")
    axes.set(xlabel="position", ylabel="change", title="the same features everywhere")
    axes.legend(frameon=False, fontsize="small")


def _channels(axes: Axes, make: Callable[[], Primitive]) -> None:
    """How the change of each channel at the last token moves when another one grows a little at all tokens."""
    primitive, x = make(), _background(16)
    base = _run(primitive, x)[0, -1]
    grown = x + 0.2 * torch.eye(WIDTH)[:, None]
    response = (_run(primitive, grown)[:, -1] - base).T / 0.2
    _image(axes, response, "channel that grows", "channel that changes", "channels")


def _weight(axes: Axes, make: Callable[[], Primitive]) -> None:
    """The change of the layer's output for each of its inputs alone."""
    primitive = make()
    v = torch.eye(WIDTH)[None] * WIDTH**0.5
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / WIDTH**0.5
    response = _run(primitive, v @ weight.T, v)[0].T / WIDTH**0.5
    _image(axes, response, "input", "output", "change of the weight")


def _learning(axes: Axes, make: Callable[[], Primitive]) -> None:
    """What the local rule does to its buffers, step after step of the same activity."""
    primitive = make()
    buffers = dict(primitive.named_buffers())
    state = primitive.state_dict()
    names = [name for name in state if name in buffers and state[name].dim() and state[name].is_floating_point()]
    # A law on updates may have no buffer of its own: then what it acts on is shown.
    names = names or [name for name, _ in primitive.named_parameters()]
    paths: dict[str, list[float]] = {name: [] for name in names}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for _ in range(100):
            for name in names:
                paths[name].append(primitive.state_dict()[name].square().mean().sqrt().item())
            with torch.no_grad():
                for parameter in primitive.parameters():  # as an optimiser's step would, for laws of the update
                    parameter.add_(0.01 * torch.randn_like(parameter))
            _learn_once(primitive)
    moving = {name: path for name, path in paths.items() if max(path) - min(path) > 1e-6}
    for colour, (name, path) in zip(COLOURS, moving.items(), strict=False):
        axes.plot(path, color=colour, label=name)
    axes.set(xlabel="commits", ylabel="root mean square", title="local rule")
    axes.legend(frameon=False, fontsize="small")


def _image(axes: Axes, values: Tensor, x: str, y: str, title: str) -> None:
    reach = values.abs().quantile(0.99).clamp(min=1e-6).item()
    shown = axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach)
    axes.figure.colorbar(shown, ax=axes, shrink=0.85)
    axes.set(xlabel=x, ylabel=y, title=title)


_PANELS = {
    "strength": _strength,
    "time": _time,
    "positions": _positions,
    "channels": _channels,
    "weight": _weight,
    "learning": _learning,
}
