"""What a run takes, from pieces: numbers by hand."""

import pytest

from vla_rl.preflight.estimate import Pieces, count_evaluations, estimate
from vla_rl.run.load_settings import config_from_dict

PIECES = Pieces(
    start_s=10,
    decision_s=0.5,
    reset_s=1.0,
    row_s=0.01,
    step_s=0.1,
    score_s=0.002,
    critic_step_s=0.003,
    eval_decision_s=0.25,
    video_s=0.125,
    save_s=2.0,
    checkpoint_bytes=1000,
    video_bytes=10.0,
    row_bytes=2**20,
    rows=32,
    peak_gib=3.0,
    host_peak_gib=1.0,
    workers_gib=2.5,
)


def make_config(**changes):
    values = {
        "run": {"timesteps": 20_000, "device": "cpu"},
        "policy": {"chunk_size": 8},
        "env": {"max_steps": 100},
        "rollout": {"num_envs": 8, "n_steps": 128},
        "algorithm": {"minibatch_size": 256, "n_epochs": 2, "critic_epochs": 40},
        "eval": {"interval": 2, "states": "0-9", "num_envs": 4, "max_steps": 200},
        "logging": {"checkpoint_interval": 2, "keep_checkpoints": 3},
    }
    return config_from_dict({name: part | changes.get(name, {}) for name, part in values.items()}, "the test")


def test_ppo_by_hand():
    """13 decisions an episode of 100 steps, so 7.69 steps a decision and 1024 x 100 / 13 = 7876.9 an iteration: 3 of them."""
    found = estimate(make_config(), PIECES)
    assert found.decisions == 1024 and found.iterations == 3
    assert found.rollout_s == pytest.approx(128 * 0.5 + 128 / 13 * 1.0)
    assert found.update_s == pytest.approx(2 * (1024 * 0.01 + 4 * 0.1) + 40 * 4 * 0.003)
    # 10 episodes of 25 decisions, 4 at a time, two modes with videos
    assert found.eval_s == pytest.approx(3 * (2 * 25 * 0.25 + 0.5) + 2 * 25 * 0.125)
    assert found.evaluations == 3  # before, after the second and after the third iteration
    # saved before and after each evaluation, and at most once more; the three newest and the best stay
    assert found.total_s == pytest.approx(10 + 3 * (found.rollout_s + found.update_s) + 3 * found.eval_s + 7 * 2.0)
    assert found.gpu_peak_gib is None and found.trainer_host_gib == pytest.approx(1 + 2 * 992 / 1024)
    assert found.host_peak_gib == pytest.approx(found.trainer_host_gib + 2.5)
    assert found.other_bytes == 3 * 2 * 2 * 25 * 10 + 500_000 + 3 * 2000
    assert found.disk_bytes == 4000 + found.other_bytes and found.checkpoints == 4


def test_grpo_plays_whole_episodes_and_has_no_critic():
    grpo = {
        "rollout": {"group_size": 8, "n_episodes": 24},
        "algorithm": {"estimator": "grpo", "kl_coef": 0.1, "n_epochs": 1},
    }
    found = estimate(make_config(**grpo), PIECES)
    assert found.decisions == 24 * 13 and found.iterations == 9  # 2400 steps each
    assert found.rollout_s == pytest.approx(3 * (13 * 0.5 + 1.0))
    assert found.update_s == pytest.approx(312 * 0.01 + 2 * 0.1 + 312 * 0.002)
    assert found.trainer_host_gib > 1


def test_on_a_gpu_the_peak_is_the_cards_and_rows_stay_on_the_host():
    found = estimate(make_config(run={"device": "cuda"}), PIECES)
    assert found.gpu_peak_gib == found.trainer_peak_gib == 3.0
    assert found.host_peak_gib == pytest.approx(1 + 2 * 992 / 1024 + 2.5)


@pytest.mark.parametrize(
    ("interval", "iterations", "count"), [(0, 0, 1), (0, 5, 2), (2, 0, 1), (2, 4, 3), (2, 5, 4), (10, 3, 2)]
)
def test_evaluations_are_at_the_start_every_interval_and_at_the_end(interval, iterations, count):
    assert count_evaluations(make_config(eval={"interval": interval}), iterations) == count
