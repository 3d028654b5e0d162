"""What a person sees: right numbers, and a dash where there is none."""

import math
from pathlib import Path

import pytest
import torch

from vla_rl.run.progress import (
    FinishedEpisode,
    Pace,
    accumulate,
    episodes_text,
    evaluation_text,
    peak_memory_gib,
    rollout_metrics,
    summary_line,
    to_numbers,
    update_metrics,
    update_text,
)

EPISODES = [FinishedEpisode(1.0, 100, True), FinishedEpisode(0.0, 220, False), FinishedEpisode(0.0, 220, False)]
TIMES = {"time/rollout_s": 12.34, "time/update_s": 56.78, "system/peak_memory_gib": 38.21}


def test_rollout_metrics_by_hand():
    metrics = rollout_metrics(EPISODES, env_steps=4096)
    assert metrics == {
        "rollout/episodes": 3,
        "rollout/episodes_dropped": 0,
        "rollout/success_rate": pytest.approx(1 / 3),
        "rollout/return": pytest.approx(1 / 3),
        "rollout/length": 180,  # (100 + 220 + 220) / 3
        "rollout/env_steps": 4096,
    }


def test_a_rollout_in_which_no_episode_ended_has_no_rate():
    metrics = rollout_metrics([], env_steps=64)
    assert metrics["rollout/episodes"] == 0 and metrics["rollout/env_steps"] == 64
    assert metrics["rollout/success_rate"] is metrics["rollout/return"] is metrics["rollout/length"] is None


def test_the_summary_line_has_step_success_kl_clip_times_and_memory():
    metrics = rollout_metrics(EPISODES, 4096) | TIMES
    metrics |= {"actor/approx_kl": 0.0123, "actor/clip_fraction": 0.087, "critic/explained_variance": 0.456}
    line = summary_line(7, 28672, 100000, metrics)
    for text in (
        "iteration 7",
        "28672/100000",
        "success 33.3% of 3",
        "kl 1.23e-02",
        "clip 8.7%",
        "ev 0.46",
        "rollout 12.3 s",
        "update 56.8 s",
        "38.2 GiB",
    ):
        assert text in line, text
    assert "\n" not in line


def test_an_update_has_the_means_of_its_minibatches_and_the_errors_of_the_first():
    minibatches = [
        {"actor/approx_kl": 0.0, "actor/ratio_error": 0.07, "actor/ratio_error_mean": 0.015, "critic/value_loss": 2.0},
        {"actor/approx_kl": 0.02, "actor/ratio_error": 0.9, "actor/ratio_error_mean": 0.2, "critic/value_loss": 1.0},
    ]
    assert update_metrics(minibatches, [{"critic/value_loss": 0.5}, {"critic/value_loss": 0.25}]) == {
        "actor/approx_kl": 0.01,
        "critic/value_loss": 1.5,
        "critic/passes_value_loss": 0.375,
        "actor/first_minibatch_ratio_error": 0.07,
        "actor/first_minibatch_ratio_error_mean": 0.015,
        "actor/first_minibatch_kl": 0.0,
    }


def test_of_micro_batches_the_largest_error_counts_and_shares_of_a_mean_add_up():
    totals: dict[str, torch.Tensor] = {}
    assert to_numbers(totals) == {}
    for error, share in ((0.03, 0.01), (0.07, 0.002), (0.01, 0.004)):
        accumulate(totals, {"actor/ratio_error": torch.tensor(error), "actor/ratio_error_mean": torch.tensor(share)})
    expected = {"actor/ratio_error": pytest.approx(0.07), "actor/ratio_error_mean": pytest.approx(0.016)}
    assert to_numbers(totals) == expected
    accumulate(totals, {"actor/ratio_error": torch.tensor(math.nan)})
    assert math.isnan(to_numbers(totals)["actor/ratio_error"])


def test_the_summary_line_says_why_the_actor_took_no_step():
    metrics = rollout_metrics([], 64) | TIMES | {"actor/optimizer_steps": 0}
    assert summary_line(1, 64, 100, metrics | {"actor/waits_for_reward": 0.0}).endswith("critic warm-up: no actor step")
    assert summary_line(1, 64, 100, metrics | {"actor/waits_for_reward": 1.0}).endswith("no reward yet: no actor step")
    assert "no actor step" not in summary_line(1, 64, 100, metrics | {"actor/optimizer_steps": 8})


def test_the_summary_line_shows_a_dash_for_what_is_not_known():
    line = summary_line(1, 64, 100, rollout_metrics([], 64) | TIMES | {"critic/explained_variance": None})
    for text in ("success - of 0", "kl -", "clip -", "ev -", "v -"):
        assert text in line, text


def test_the_rollout_bar_counts_episodes_and_successes():
    assert episodes_text(EPISODES) == "eps=3, succ=33.3%, len=180"
    assert episodes_text([]) == "eps=0"


def test_the_update_bar_shows_the_sides_that_are_trained():
    assert update_text({"critic/value_loss": 0.25, "critic/grad_norm": 2.0}) == "v=0.25, |g_c|=2"
    both = {"actor/policy_loss": -0.0123, "actor/grad_norm": 1.0, "critic/value_loss": 0.5, "critic/grad_norm": 3.0}
    assert update_text(both) == "pi=-0.0123, v=0.5, |g_a|=1, |g_c|=3"


def test_the_evaluation_line_has_rates_counts_and_intervals():
    metrics = {
        "eval/success_rate_greedy": 0.8,
        "eval/success_rate_greedy_low": 0.49016,
        "eval/success_rate_greedy_high": 0.94332,
        "eval/episodes_greedy": 10,
        "eval/render": "exact",
    }
    assert evaluation_text(metrics) == "greedy success 80.0% of 10 (95% interval 49.0% to 94.3%) (render exact)"
    sampled = {name.replace("greedy", "sampled"): value for name, value in metrics.items()}
    assert evaluation_text(metrics | sampled).count("80.0% of 10") == 2


def test_peak_memory_is_the_kernels_high_water_mark_in_gib():
    shown = peak_memory_gib(torch.device("cpu"))
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    assert shown == pytest.approx(kib / 1024 / 1024, rel=0.05)


def test_the_pace_of_a_run_tells_how_long_it_will_still_take(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("vla_rl.run.progress.time.monotonic", lambda: now[0])
    pace = Pace()
    assert pace.left_s(10, 100) is None
    pace.begin(10)  # of a run that was resumed there
    assert pace.left_s(10, 100) is None
    now[0] = 120.0
    assert pace.left_s(20, 100) == 160  # 10 steps took 20 s, 80 are left
    assert pace.left_s(110, 100) == 0
    line = summary_line(1, 20, 100, rollout_metrics([], 64) | TIMES, left_s=160)
    assert "GiB | 2.7 min left" in line and "left" not in summary_line(1, 20, 100, rollout_metrics([], 64) | TIMES)
