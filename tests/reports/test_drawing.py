"""Pictures hold what was logged."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vla_rl.reports.curves import PANELS
from vla_rl.reports.drawing import COLUMNS, colors_of, panels_as_svg, plot_comparison, plot_curves


def run_of(x_name: str, n: int = 5) -> list[dict]:
    names = [name for panel in PANELS[x_name] for name in panel.names]
    return [{x_name: i, **{name: 0.1 * (i + 1) for name in names}} for i in range(n)]


def panels_with_ink(path: Path, rows: int) -> int:
    """Cells of the grid in which a line of matplotlib's first colour (31, 119, 180) is drawn."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    blue = np.abs(pixels - [31, 119, 180]).sum(axis=-1) < 30
    cells = [cell for row in np.array_split(blue, rows, axis=0) for cell in np.array_split(row, COLUMNS, axis=1)]
    return sum(cell.sum() > 20 for cell in cells)


@pytest.mark.parametrize("x_name", ["timesteps", "step"])
def test_every_metric_that_was_logged_is_drawn(tmp_path, x_name):
    plot_curves(run_of(x_name), tmp_path / "curves.png", x_name)
    image = Image.open(tmp_path / "curves.png")
    rows = -(-len(PANELS[x_name]) // COLUMNS)
    assert image.format == "PNG" and image.width == 1500 and image.height == 300 * rows
    assert panels_with_ink(tmp_path / "curves.png", rows) == len(PANELS[x_name])
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_metrics_that_are_missing_or_null_now_and_then_are_drawn(tmp_path):
    records = [
        {"timesteps": 0, "eval/success_rate_greedy": 0.5},
        {"timesteps": 1, "rollout/success_rate": None, "actor/entropy": 1.0},
        {"timesteps": 2, "rollout/success_rate": 0.25, "actor/entropy": None},
    ]
    plot_curves(records, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").height == 300  # two panels: one row


@pytest.mark.parametrize("records", [[], [{"timesteps": 1, "of/another": 1.0}]])
def test_without_a_known_metric_nothing_is_drawn(tmp_path, records):
    plot_curves(records, tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == [] and panels_as_svg(records) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("norm", [0.0, 0.5])
def test_gradients_of_0_are_drawn_without_a_word(tmp_path, norm):
    """As they are until a run's first reward."""
    records = [{"timesteps": step, "actor/grad_norm": norm, "actor/entropy": 1.0} for step in (1, 2)]
    plot_curves(records, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_an_svg_is_an_element_whose_text_takes_the_colour_of_the_page():
    pictures = panels_as_svg(run_of("timesteps", 40))
    assert [title for title, _ in pictures] == [panel.title for panel in PANELS["timesteps"]]
    for title, svg in pictures:
        element = ElementTree.fromstring(svg)
        assert element.tag.endswith("svg") and "viewBox" in element.attrib and "width" not in element.attrib
        assert element.attrib["aria-label"] == title
        assert "currentColor" in svg and "#010203" not in svg and "timesteps" in svg
        assert not re.search(r"(href|src)=.https?:", svg)


def test_an_svg_of_2000_points_is_small():
    rng = np.random.default_rng(0)
    records = [{"timesteps": 8192 * i, "actor/entropy": rng.normal()} for i in range(2000)]
    ((_, svg),) = panels_as_svg(records)
    assert len(svg) < 100_000


def test_a_value_beyond_the_axis_is_a_triangle_at_its_edge():
    calm = [{"timesteps": i, "actor/policy_loss": 0.01 * (i % 3)} for i in range(20)]
    peak = [{**record, "actor/policy_loss": 9.0} if i == 7 else record for i, record in enumerate(calm)]
    ((_, without),), ((_, with_peak),) = panels_as_svg(calm), panels_as_svg(peak)
    assert with_peak.count("<use ") == without.count("<use ") + 1


def test_a_comparison_has_a_row_for_each_quantity(tmp_path):
    seed = (np.array([0.0, 10.0]), np.array([0.0, 1.0]), np.array([0.1, 0.9]))
    for name in ("a.png", "a.svg"):
        plot_comparison({"greedy": {"ppo": [seed, seed], "grpo": [seed]}, "sampled": {"ppo": [seed]}}, tmp_path / name)
    assert Image.open(tmp_path / "a.png").size == (1100, 720)
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def compared(monkeypatch, groups) -> Figure:
    figures = []
    monkeypatch.setattr("vla_rl.reports.drawing.save", lambda figure, path: figures.append(figure))
    plot_comparison(groups, Path("a.png"))
    return figures[0]


@pytest.mark.filterwarnings("error")
def test_a_setting_has_one_colour_in_all_rows_and_one_line_of_the_legend(monkeypatch):
    seed = (np.array([0.0, 10.0]), np.array([0.0, 1.0]), np.array([0.1, 0.9]))
    labels = ["_first", "$\\alpha", "c"]
    rows = {"training": {label: [seed] for label in labels}, "greedy": {"c": [seed, seed]}}
    figure = compared(monkeypatch, rows)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == labels
    colors = [line.get_color() for line in legend.get_lines()]
    assert len(set(colors)) == 3
    training, _, greedy, _ = figure.axes
    assert [line.get_color() for line in training.lines[::2]] == colors
    assert {line.get_color() for line in greedy.lines} == {colors[2]}


def test_more_settings_than_matplotlib_has_colours_have_one_each(monkeypatch):
    assert len({tuple(color) for color in colors_of([str(i) for i in range(15)]).values()}) == 15
    assert list(colors_of(["a", "b"]).values()) == ["C0", "C1"]


def test_a_curve_of_one_point_is_seen(tmp_path):
    point = (np.array([5.0]), np.array([0.5]), np.array([0.4]))
    plot_comparison({"greedy": {"ppo": [point]}}, tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)[60:]  # below the legend
    assert ((pixels[..., 2] - pixels[..., 0]) > 50).sum() > 40  # blue
