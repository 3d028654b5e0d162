"""Smoothing, axis limits and means over seeds."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vla_rl.reports.curves import (
    PANELS,
    Panel,
    evaluations,
    fill,
    half_width,
    limits,
    mean_and_interval,
    success_of_last_episodes,
    success_of_task,
    t_half_width,
    windowed_mean,
)

ROOT = Path(__file__).parents[2]


def test_a_panel_shows_only_metrics_that_the_documentation_explains():
    text = (ROOT / "docs" / "metrics.md").read_text()
    names = [name for panels in PANELS.values() for panel in panels for name in panel.names]
    assert len(names) > 20 and [name for name in names if f"`{name}`" not in text] == []


# smoothing


def test_a_windowed_mean_is_weighted_and_shorter_at_the_ends():
    y, weights = np.array([0.0, 1.0, 0.0, 1.0]), np.array([1.0, 3.0, 1.0, 1.0])
    # (0 + 3) / 4, (0 + 3 + 0) / 5, (3 + 0 + 1) / 5, (0 + 1) / 2
    assert windowed_mean(y, weights, 1) == pytest.approx([0.75, 0.6, 0.8, 0.5])
    assert windowed_mean(y, weights, 0) == pytest.approx(y)


@pytest.mark.parametrize(("n", "half"), [(1, 0), (2, 0), (30, 2), (2000, 22)])
def test_the_window_grows_with_the_number_of_points(n, half):
    assert half_width(n) == half
    assert len(windowed_mean(np.ones(n), np.ones(n), half)) == n


def test_success_is_weighted_by_episodes_and_a_loss_is_not():
    records = [
        {
            "timesteps": i,
            "rollout/success_rate": i / 3,
            "rollout/episodes": 1 + 9 * (i == 0),
            "actor/policy_loss": i / 3,
        }
        for i in range(4)
    ]
    success = fill(Panel("", ("rollout/success_rate",), span=1, bounds=(0, 1)), records, "timesteps").curves[0]
    loss = fill(Panel("", ("actor/policy_loss",)), records, "timesteps").curves[0]
    assert success.smooth[0] == pytest.approx((10 * 0 + 1 / 3) / 11)
    assert loss.smooth[0] == pytest.approx((0 + 1 / 3) / 2)


def test_few_evaluations_are_drawn_as_they_are_with_their_interval():
    name = "eval/success_rate_greedy"
    records = [{"timesteps": i, name: i / 9, f"{name}_low": 0.0, f"{name}_high": 1.0} for i in range(9)]
    curve = fill(PANELS["timesteps"][0], records, "timesteps").curves[0]
    assert curve.smooth is curve.y and len(curve.band) == 2


def test_values_that_are_missing_or_null_are_left_out():
    records = [{"timesteps": 0}, {"timesteps": 1, "a": None}, {"timesteps": 2, "a": 0.5}]
    assert fill(Panel("", ("a", "b")), records, "timesteps").curves[0].x.tolist() == [2]
    assert fill(Panel("", ("b",)), records, "timesteps") is None


# axes


def test_noise_of_entropy_does_not_fill_its_panel():
    rng = np.random.default_rng(0)
    (panel,) = (panel for panel in PANELS["timesteps"] if panel.names == ("actor/entropy",))
    low, high = limits(3 + 1e-4 * rng.normal(size=2000), panel)
    assert low < 2.91 and high > 3.09


@pytest.mark.parametrize("n", [15, 2000])
def test_a_peak_does_not_flatten_the_rest(n):
    values = np.linspace(0.3, 0.1, n)
    values[n // 2] = 1000
    low, high = limits(values, Panel("", ()))
    assert 0 < low < 0.1 and 0.3 < high < 0.6
    curve = fill(Panel("", ("a",)), [{"x": i, "a": y} for i, y in enumerate(values)], "x").curves[0]
    assert curve.y.max() == 1000 and curve.smooth.max() < 0.5


def test_without_a_peak_everything_is_within_the_axis():
    for values in (np.linspace(0, 1, 2000), np.array([2.0, 5.0]), np.random.default_rng(0).uniform(size=30)):
        low, high = limits(values, Panel("", ()))
        assert low < values.min() and high > values.max() and high - low < 1.2 * np.ptp(values)


@pytest.mark.parametrize(
    ("values", "panel", "expected"),
    [
        ([0.8, 0.9], Panel("", (), span=1, bounds=(0, 1)), (-0.05, 1.05)),
        ([-40.0, 0.5, 0.6], Panel("", (), span=0.5, bounds=(-1, 1)), None),
        ([3.0, 4.0], Panel("", (), zero=True), (0, 4.2)),
        ([0.0, 0.0], Panel("", (), zero=True), (0, 1.05)),
        ([7.0], Panel("", ()), (6.45, 7.55)),
    ],
)
def test_limits_hold_bounds_zero_and_single_values(values, panel, expected):
    low, high = limits(np.array(values), panel)
    assert low < high and (expected is None or (low, high) == pytest.approx(expected))
    if panel.bounds[0] == -1:
        assert low >= -1.15 and high > 0.6


def test_a_logarithmic_panel_leaves_out_0_and_averages_logarithms():
    records = [{"x": i, "norm": y} for i, y in enumerate([0.0, 1.0, 100.0, 1.0, 100.0, 1.0])]
    panel = fill(Panel("", ("norm",), span=2, log=True), records, "x")
    assert panel.curves[0].x.tolist() == [1, 2, 3, 4, 5]
    assert panel.curves[0].smooth[0] == pytest.approx(10)  # of 1 and 100
    assert 0 < panel.low < 1 and panel.high > 100
    assert fill(Panel("", ("norm",), log=True), records[:1], "x") is None


# seeds


def line(timesteps: int, episodes: int, rate: float | None) -> dict:
    return {
        "timesteps": timesteps,
        "rollout/episodes": episodes,
        "rollout/success_rate": rate,
        "time/rollout_s": 90.0,
        "time/update_s": 30.0,
    }


def test_success_of_the_last_episodes_takes_the_oldest_iteration_in_part():
    records = [{"timesteps": 0, "eval/success_rate_greedy": 0.2}, line(10, 4, 0.0), line(20, 0, None), line(30, 8, 1.0)]
    timesteps, minutes, success = success_of_last_episodes(records, window=10)
    assert timesteps.tolist() == [10, 30] and minutes.tolist() == [2, 6]
    assert success.tolist() == [0, 0.8]  # 8 of 8, and 0 of 2 of the 4
    assert [a.tolist() for a in evaluations(records, "eval/success_rate_greedy")] == [[0], [0], [0.2]]
    assert [len(a) for a in success_of_last_episodes(records[:1], 10)] == [0, 0, 0]


def test_success_of_a_task_is_of_its_own_episodes():
    def of_task(episodes: int, rate: float | None) -> dict:
        return {"rollout/episodes/task_3": episodes, "rollout/success_rate/task_3": rate, "rollout/success_rate": 0.9}

    records = [{"timesteps": 0}, of_task(4, 0.0), of_task(0, None), of_task(8, 1.0)]
    assert success_of_task(records, 3, window=10) == (0.8, 10)  # 8 of 8, and 0 of 2 of the 4
    assert success_of_task(records, 3, window=50) == (pytest.approx(8 / 12), 12)
    assert success_of_task(records, 4, window=50) is None


def test_a_line_without_a_success_rate_is_left_out():
    records = [{"timesteps": 10, "rollout/episodes": 4}, line(20, 4, 0.5)]
    assert success_of_last_episodes(records, 10)[2].tolist() == [0.5]


def test_the_interval_over_seeds_is_students():
    y = np.array([0.84, 0.92, 0.94])
    low, high = stats.t.interval(0.95, 2, loc=y.mean(), scale=stats.sem(y))
    assert t_half_width(y) == pytest.approx((high - low) / 2) == pytest.approx(0.1315, abs=1e-4)
    assert t_half_width(y[:2]) == 0


def test_the_mean_is_where_all_seeds_are():
    a, b = (np.array([0.0, 10.0]), np.array([0.0, 1.0])), (np.array([5.0, 20.0]), np.array([0.5, 0.5]))
    x, mean, half = mean_and_interval([a, b])
    assert (x[0], x[-1]) == (5, 10) and mean[0] == 0.5 and mean[-1] == 0.75 and not half.any()
    assert len(mean_and_interval([a, (np.array([30.0]), np.array([1.0]))])[0]) == 0
