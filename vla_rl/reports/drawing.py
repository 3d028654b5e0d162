"""Draws curves: a run's panels as a PNG or as SVG for a page, and runs of several seeds on one axis.

Not here: what is drawn (vla_rl.reports.curves). matplotlib takes a second to import: not before the first picture.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vla_rl.reports.curves import PANELS, DrawnPanel, fill, mean_and_interval
from vla_rl.reports.records import Records
from vla_rl.run.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
INK = "#010203"  # in an SVG, the colour of the page's text
MAX_POINTS = 500  # of a raw line in an SVG


def plot_curves(records: Records, path: Path, x_name: str = "timesteps") -> None:
    """A PNG of the panels that have a metric, whole or not at all; nothing where none has."""
    from matplotlib.figure import Figure

    shown = filled(records, x_name)
    if not shown:
        return
    rows = -(-len(shown) // COLUMNS)
    height = 3 * rows  # inches
    figure = Figure(figsize=(5 * COLUMNS, height))
    # fixed margins: to measure the texts would take half of the time
    figure.subplots_adjust(0.045, 0.5 / height, 0.985, 1 - 0.3 / height, wspace=0.18, hspace=0.42)
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis, drawn in zip(axes.flat, shown, strict=False):
        draw_panel(axis, drawn, x_name)
        axis.set_title(drawn.panel.title, fontsize=10)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    save(figure, path)


def panels_as_svg(records: Records, x_name: str = "timesteps") -> list[tuple[str, str]]:
    """Title and SVG element of each panel that has a metric; text and axes take the colour of the page's text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    pictures = []
    # text stays text; ids are of the contents, so that pages of equal curves are equal
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves", "path.simplify_threshold": 0.3}):
        for drawn in filled(records, x_name):
            figure = Figure(figsize=(4, 2.4))
            figure.subplots_adjust(0.13, 0.17, 0.98, 0.96)
            figure.patch.set_visible(False)
            draw_panel(figure.subplots(), drawn, x_name, INK, MAX_POINTS)
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None})
            title = drawn.panel.title
            pictures.append((title, for_a_page(file.getvalue(), title)))
    return pictures


def for_a_page(svg: str, title: str) -> str:
    """The element alone, as wide as its place, named for those who do not see it."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'<svg (?:width|height)="[^"]*" ?', "<svg ", re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2))
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def filled(records: Records, x_name: str) -> list[DrawnPanel]:
    """The panels that the run has a metric of."""
    drawn = [fill(panel, records, x_name) for panel in PANELS[x_name]]
    return [panel for panel in drawn if panel is not None]


def draw_panel(axis: Axes, drawn: DrawnPanel, x_name: str, ink: str = "black", max_points: int | None = None) -> None:
    """Thin as logged, bold smoothed, with the intervals of evaluations; values beyond the axis are triangles at its edge."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

    if drawn.panel.log:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
    for number, line in enumerate(drawn.curves):
        color = f"C{number}"
        marker = "." if len(line.x) < 30 else None
        smoothed = not np.array_equal(line.y, line.smooth)
        if smoothed:
            step = -(-len(line.x) // max_points) if max_points else 1
            axis.plot(
                line.x[::step], line.y[::step], color=color, alpha=0.35, linewidth=0.6 if len(line.x) > 200 else 1
            )
        axis.plot(line.x, line.smooth, color=color, label=line.name, marker=marker, linewidth=1.8 if smoothed else 1.2)
        if line.band is not None:
            axis.fill_between(line.x, *line.band, color=color, alpha=0.15, linewidth=0)
        for beyond, edge, shape in ((line.y > drawn.high, drawn.high, "^"), (line.y < drawn.low, drawn.low, "v")):
            if beyond.any():
                axis.plot(line.x[beyond], np.full(beyond.sum(), edge), shape, color=color, markersize=4, clip_on=False)
    axis.set_ylim(drawn.low, drawn.high)
    axis.set_xlabel(x_name, fontsize=8, color=ink)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.tick_params(labelsize=8, which="both", color=ink, labelcolor=ink)
    axis.spines[:].set_color(ink)
    axis.grid(alpha=0.25)
    axis.set_facecolor("none")
    if len(drawn.curves) > 1:
        axis.legend(fontsize=7, labelcolor=ink, framealpha=0)


def draw_seeds(
    axis: Axes,
    label: str,
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
    bounds: tuple[float, float] = (0, 1),
    color: Any = None,
) -> str:
    """Curves (x, y) of one setting's seeds, thin, and their mean, thick, with a 95 % t interval from 3 seeds on; one point is
    a dot.

    Args:
        color: None takes the next one of the axis.

    Returns:
        Their colour.
    """
    x, mean, half = mean_and_interval(curves)
    name = f"{label} ({len(curves)} seed{'s' * (len(curves) > 1)})"
    (line,) = axis.plot(x, mean, linewidth=2.2, label=name, color=color)
    for one in curves:
        dot = "o" if len(one[0]) == 1 else None
        axis.plot(*one, linewidth=0.8, alpha=0.5, color=line.get_color(), marker=dot, markersize=5)
    ends = np.clip(mean - half, *bounds), np.clip(mean + half, *bounds)
    axis.fill_between(x, *ends, alpha=0.15, color=line.get_color())
    axis.grid(alpha=0.3)
    return line.get_color()


def plot_comparison(groups: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]], path: Path) -> None:
    """A PNG or SVG: a row of panels for each quantity, against timesteps and against minutes, and a legend of all settings.

    Args:
        groups: quantity -> setting -> of each seed, timesteps, minutes and values. A setting may lack a quantity.
    """
    from matplotlib.figure import Figure

    colors = colors_of(list(dict.fromkeys(label for settings in groups.values() for label in settings)))
    figure = Figure(figsize=(11, 3.4 * len(groups) + 0.2 * len(colors)), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False, sharey=True, sharex="col")
    for row, (quantity, settings) in zip(axes, groups.items(), strict=True):
        for column, axis in enumerate(row):
            for label, seeds in settings.items():
                draw_seeds(axis, label, [(seed[column], seed[2]) for seed in seeds], color=colors[label])
            axis.set_ylim(-0.03, 1.03)
        row[0].set_ylabel(quantity)
    add_legend(figure, colors)
    for axis, text in zip(axes[-1], ("timesteps", "minutes of rollouts and updates"), strict=True):
        axis.set_xlabel(text)
    save(figure, path)


def colors_of(labels: Sequence[str]) -> dict[str, Any]:
    """Label -> its colour, each another one."""
    from matplotlib import colormaps

    many = colormaps["turbo"](np.linspace(0.05, 0.95, len(labels)))
    return {label: f"C{number}" if len(labels) <= 10 else many[number] for number, label in enumerate(labels)}


def add_legend(figure: Figure, colors: dict[str, Any]) -> None:
    """Above all axes; labels as they are, where matplotlib takes $ for a formula and leaves out what begins with _."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=color, linewidth=2.2) for color in colors.values()]
    legend = figure.legend(
        lines, list(map(str, range(len(lines)))), loc="outside upper left", fontsize=8, frameon=False
    )
    for text, label in zip(legend.get_texts(), colors, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Whole or not at all; the format is that of the name."""
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=100, format=path.suffix.removeprefix("."), **options)
