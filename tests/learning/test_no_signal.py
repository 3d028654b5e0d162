"""vla_rl/learning/no_signal.py: a run without a success says so, and why perhaps, and ends if it is told to."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.trainers import make_trainer, settings
from vla_rl.learning.no_signal import FIRST_EPISODES, SignalWatch
from vla_rl.run.checkpoint import find_checkpoint
from vla_rl.run.failures import explain
from vla_rl.run.logs import WARNINGS_FILE, warnings_kept
from vla_rl.types import NoSignal


def watch(**run) -> SignalWatch:
    return SignalWatch(settings(run=run, rollout={"temperature": 1.6}))


def see(watched: SignalWatch, episodes: int, mean_return: float | None) -> None:
    watched.see({"rollout/episodes": episodes, "rollout/return": mean_return})


def test_the_first_episodes_without_a_reward_are_warned_of_once_with_the_causes_in_order(caplog):
    watched = watch()
    for _ in range(3):
        see(watched, FIRST_EPISODES // 3, 0.0)  # 99
        see(watched, 0, None)  # no episode ended
    assert caplog.text == ""
    see(watched, 5, 0.0)
    see(watched, 5, 0.0)
    (record,) = caplog.records
    said = record.getMessage()
    assert record.levelno == logging.WARNING and said.startswith("NO SUCCESS in the first 104 training episodes")
    order = ["1. policy.checkpoint=tiny-openvla acts by an L1 head", "2. policy.unnorm_key=libero_spatial"]
    order += ["3. it was trained on other images: env.image_size=256", "4. rollout.temperature=1.6", "5. the gripper"]
    places = [said.index(words) for words in order]
    assert places == sorted(places) and "run.stop_without_signal=N" in said


@pytest.mark.parametrize("rewards", [[0.01, 0.0], [0.0, -0.2, 0.0]])  # 1 of 100 succeeds; shaping alone
def test_any_reward_in_the_beginning_is_a_signal(rewards, caplog):
    watched = watch()
    for mean_return in rewards:
        see(watched, FIRST_EPISODES - 1, mean_return)
    see(watched, 10 * FIRST_EPISODES, 0.0)
    assert caplog.text == ""


def test_a_run_stops_after_so_many_episodes_in_a_row_without_a_reward(caplog):
    watched = watch(stop_without_signal=20)
    for mean_return in (0.0, 0.1, 0.0):
        see(watched, 19, mean_return)
        watched.check()
    see(watched, 1, 0.0)
    with pytest.raises(NoSignal, match=r"no reward in the last 20 training episodes \(run.stop_without_signal=20\)"):
        watched.check()
    assert "There were rewards before" in caplog.text and "L1 head" not in caplog.text
    never = watch(stop_without_signal=20)
    see(never, 20, 0.0)
    with pytest.raises(NoSignal):
        never.check()
    assert "1. policy.checkpoint=tiny-openvla acts by an L1 head" in caplog.text
    unlimited = watch()
    see(unlimited, 10**6, 0.0)
    unlimited.check()


def test_the_count_survives_a_checkpoint_and_older_ones_begin_anew(caplog):
    before, after = watch(), watch(stop_without_signal=50)
    see(before, 60, 0.0)
    after.load(before.state())
    with pytest.raises(NoSignal):
        after.check()
    see(after, 40, 0.0)
    assert caplog.text.count("NO SUCCESS in the first 100 ") == 1
    after.load(None)
    after.check()
    see(after, 49, 0.0)
    after.check()
    see(after, 200, 0.0)
    assert caplog.text.count("NO SUCCESS") == 1  # they are not the run's first ones


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_a_run_that_nobody_succeeds_in_warns_saves_and_stops_and_a_resume_knows(tmp_path, estimator, monkeypatch):
    monkeypatch.setattr("vla_rl.learning.no_signal.FIRST_EPISODES", 16)
    changes = {"algorithm": {"estimator": estimator}, "run": {"timesteps": 2000, "stop_without_signal": 40}}
    trainer = make_trainer(tmp_path, needed=99, **changes)
    with warnings_kept(tmp_path), pytest.raises(NoSignal) as stopped:
        trainer.train()
    assert "run.stop_without_signal=null" in explain(stopped.value)  # its exit status is 1
    said = (tmp_path / WARNINGS_FILE).read_text().splitlines()
    for words in ("NO SUCCESS in the first", "stopped: no reward in the last"):
        assert len([line for line in said if words in line and "5. the gripper" in line]) == 1

    resumed = make_trainer(tmp_path, needed=99, **changes)
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    assert resumed.iteration == trainer.iteration > 1
    assert resumed.signal_watch.state() == trainer.signal_watch.state() and resumed.signal_watch.episodes >= 40
    with pytest.raises(NoSignal):
        resumed.train()
    assert resumed.iteration == trainer.iteration  # not one more
    changes["run"] = {"timesteps": resumed.timesteps + 1, "stop_without_signal": None}
    longer = make_trainer(tmp_path, needed=99, **changes)
    longer.load_checkpoint(find_checkpoint(tmp_path))
    longer.train()
    assert longer.iteration == trainer.iteration + 1


def test_grpo_with_an_informative_group_goes_on(tmp_path):
    changes = {"algorithm": {"estimator": "grpo"}, "run": {"stop_without_signal": 8}}
    trainer = make_trainer(tmp_path, needed=2, **changes)
    trainer.train()
    assert trainer.signal_watch.episodes == 0 and trainer.signal_watch.rewarded


def test_a_checkpoint_of_before_is_loaded(tmp_path):
    trainer = make_trainer(tmp_path)
    del trainer.boundary.values["signal_watch"]
    folder = trainer.save_checkpoint()
    assert "signal_watch" not in torch.load(folder / "trainer.pt")
    resumed = make_trainer(tmp_path)
    resumed.load_checkpoint(folder)
    assert resumed.signal_watch.episodes == 0
