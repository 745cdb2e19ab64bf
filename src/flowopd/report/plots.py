"""Plots that say one thing each: names stand at the ends of the lines, not in a legend."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from flowopd.report.runs import Curve

INK, MUTED, FAINT = "#26323c", "#6b7783", "#e4e2dc"
COLOURS: tuple[str, ...] = ("#0f6e6a", "#b4532a", "#5b4b9a", "#b08a1e", "#2f6fb0", "#a23b6b", "#5c7d2e", "#7a5c48")
COLOURS += ("#4fa39f", "#d98c68", "#9488c6", "#d3b55b", "#78a6d6", "#cb7da2", "#95b268", "#ad9382")  # for many
STYLE: Any = {
    "font.size": 9.5,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": "#b9bec3",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
FEW = 15
"""Points that are each marked."""


@dataclass(frozen=True)
class Line:
    """A curve with its name.

    Args:
        name: written at its end.
        points: (x, y).
        colour: of line and name.
        level: a constant, drawn dashed over the whole width.
    """

    name: str
    points: Curve
    colour: str
    level: bool = False


@dataclass(frozen=True)
class Path2D:
    """The way of a policy through two scores, by iteration."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str


def lines(title: str, drawn: Sequence[Line], x: str = "iteration", smooth: bool = False) -> Figure:
    """Curves over the iterations, named at their ends.

    Args:
        title: what is drawn.
        drawn: the curves.
        x: what runs along.
        smooth: draw running means over a twentieth of the points, and the points faintly behind them.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _empty(title, names=any(line.name for line in drawn))
        ends: list[tuple[float, str, str]] = []
        last = max((line.points[-1][0] for line in drawn if line.points), default=0)
        for line in drawn:
            if line.level:
                axes.axhline(line.points[0][1], color=line.colour, linestyle=(0, (4, 3)), linewidth=1.1)
                ends.append((line.points[0][1], line.name, line.colour))
                continue
            xs, ys = [point[0] for point in line.points], [point[1] for point in line.points]
            window = max(len(ys) // 20, 1) if smooth else 1
            if window > 1:
                axes.plot(xs, ys, color=line.colour, alpha=0.25, linewidth=0.8)
                ys = running_mean(ys, window)
            axes.plot(xs, ys, color=line.colour, marker="o" if len(xs) <= FEW else "", markersize=3.6, label=line.name)
            if xs[-1] < 0.75 * last:
                _beside(axes, line.name, xs[-1], ys[-1], line.colour)
            else:
                ends.append((ys[-1], line.name, line.colour))
        axes.set_xlabel(x)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        axes.margins(x=0.03, y=0.1)
        _name_ends(axes, ends)
        return figure


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Means over the last ``window`` values, or as many as there are.

    >>> running_mean([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    parts = [values[max(i + 1 - window, 0) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def seesaw(
    scores: tuple[str, str], paths: Sequence[Path2D], points: Mapping[str, tuple[float, float]], title: str = ""
) -> Figure:
    """One score against another along training; open circles are starts, full ones ends, the rest is known by name."""
    with mpl.rc_context(STYLE):
        figure, axes = _empty(title or f"{scores[1]} against {scores[0]}", names=len(paths) > 1, height=3.6)
        across = [x for x, _ in [*points.values(), *(point for path in paths for point in path.points)]]
        middle = (min(across) + 2 * max(across)) / 3  # names at the right end stand left of their points
        for name, (x, y) in points.items():
            axes.plot(x, y, marker="s", markersize=5, color=MUTED, linestyle="none")
            _beside(axes, name, x, y, MUTED, x > middle)
        for path in paths:
            xs, ys = [point[0] for point in path.points], [point[1] for point in path.points]
            few = "o" if len(xs) <= FEW else ""
            axes.plot(xs, ys, color=path.colour, linewidth=1.4, marker=few, markersize=2.6, label=path.name)
            axes.plot(xs[0], ys[0], marker="o", markersize=6, color=path.colour, markerfacecolor="white")
            axes.plot(xs[-1], ys[-1], marker="o", markersize=7, color=path.colour)
            if len(paths) == 1:
                _beside(axes, path.name, xs[-1], ys[-1], path.colour, xs[-1] > middle)
        axes.set(xlabel=scores[0], ylabel=scores[1])
        axes.margins(0.08, 0.12)
        if len(paths) > 1:
            _name_ends(axes, [(path.points[-1][1], path.name, path.colour) for path in paths])
        return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG of two pixels a point."""
    drawn, file = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names may be in any script
        figure.savefig(drawn, format="png", dpi=144, pil_kwargs={"compress_level": 1})
    Image.open(drawn).convert("RGB").quantize(128).save(
        file, "PNG", optimize=True
    )  # a third of the size, and nobody sees it
    return file.getvalue()


def _empty(title: str, names: bool = True, width: float = 5.2, height: float = 3.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.subplots_adjust(left=0.125, right=0.745 if names else 0.96, bottom=0.46 / height, top=1 - 0.36 / height)
    axes = figure.subplots()
    axes.set_title(_short(title, 56), pad=9)
    return figure, axes


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write names at the right, at the heights of their lines but apart from one another."""
    low, high = axes.get_ylim()
    gap = min(0.085, 1.1 / max(len(ends), 1))
    placed = sorted([((y - low) / ((high - low) or 1), name, colour) for y, name, colour in ends])
    for height, (_, name, colour) in zip(apart([place[0] for place in placed], gap), placed, strict=True):
        axes.annotate(
            _short(name, 26),
            (1.02, height),
            xycoords="axes fraction",
            va="center",
            color=colour,
            fontsize=100 * gap,
            annotation_clip=False,
        )


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights, in order, moved as little as it takes for ``gap`` to be between them.

    >>> apart([0.0, 1.0, 1.0], 0.5)
    [0.0, 0.75, 1.25]
    """
    up, down = list(heights), list(heights)
    for i, j in pairwise(range(len(heights))):
        up[j] = max(up[j], up[i] + gap)
    for j, i in pairwise(reversed(range(len(heights)))):
        down[i] = min(down[i], down[j] - gap)
    return [(above + below) / 2 for above, below in zip(up, down, strict=True)]


def _beside(axes: Axes, name: str, x: float, y: float, colour: str, left: bool = False) -> None:
    side: dict[str, Any] = {"xytext": (-6, 5), "ha": "right"} if left else {"xytext": (6, 5), "ha": "left"}
    axes.annotate(_short(name, 22), (x, y), textcoords="offset points", color=colour, fontsize=8.5, **side)


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
