"""Training and evaluation where workers are lost: nothing of it is learned from, nothing else changes."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from tests.fakes import CHUNK, FakePolicy, make_envs, make_flaky
from tests.trainers import final_state, make_trainer, training_lines
from vla_rl.evaluation.play import TRIES, evaluate_policy, evaluation_episodes
from vla_rl.run.checkpoint import list_checkpoints
from vla_rl.types import SimulatorDied


def flaky(folder, breaks, **changes):
    trainer = make_trainer(folder, **changes)
    make_flaky(trainer.envs, breaks)
    return trainer


@pytest.mark.parametrize("overlap", [False, True])
def test_ppo_learns_from_all_rows_but_those_of_broken_episodes(tmp_path, overlap):
    """Steps take 6 sub-steps of 2: an episode has 3 decisions at most. Environments 0 and 1 are of one half, 2 and 3 of the
    other; each step of a half counts as one where they overlap."""
    lost = {("step", 9 if overlap else 4): [0, 2], ("step", 14 if overlap else 7): [3]}
    trainer = flaky(tmp_path, lost, rollout={"overlap": overlap}, run={"seed": 4})
    rollout, metrics = trainer.collect_rollout()
    broken, ended = rollout.stack("broken"), rollout.stack("terminated") | rollout.stack("truncated")  # [T, N]
    assert metrics["rollout/episodes_dropped"] == 3 and broken.any() and rollout.stack("rewards").shape == (8, 4)
    assert not rollout.stack("steps")[broken].any() and not (broken & ended).any()
    expected = []  # row by row, by going on from each decision to what ends its episode
    for t in range(8):
        for n in range(4):
            last = next((u for u in range(t, 8) if ended[u, n] or broken[u, n]), None)
            expected.append(last is None or bool(ended[last, n]))
    batch, metrics = trainer.compute_advantages(rollout)
    assert len(batch) == sum(expected) < 32
    assert torch.equal(batch.old_logprobs, rollout.rows("logprobs")[torch.tensor(expected)])
    assert batch.advantages.mean().abs() < 1e-6 and abs(batch.advantages.std(unbiased=False) - 1) < 1e-5
    assert np.isfinite([metrics["critic/value_mean"], metrics["critic/return_mean"]]).all()
    assert torch.isfinite(batch.returns).all()
    # nothing but fresh episodes follows, which are counted as all others are
    states = trainer.envs.episode_states()
    assert all(len(state["actions"]) <= 3 * CHUNK for state in states) and not trainer.envs.dropped.any()
    assert trainer.running.lengths.tolist() == [len(state["actions"]) for state in states]


def test_an_episode_broken_off_between_the_decision_and_its_step_is_not_stepped_with_it(tmp_path):
    """While half 0, 1 steps, 2 and 3 have decided already: that decision is for an episode which is gone."""
    trainer = flaky(tmp_path, {("step", 2): [2]}, rollout={"overlap": True}, run={"seed": 4})
    steps, step_async = [], trainer.envs.step_async
    trainer.envs.step_async = lambda actions, active, coming: (
        steps.append(active.copy()), step_async(actions, active, coming)
    )  # fmt: skip
    rollout, _ = trainer.collect_rollout()
    assert [active.tolist() for active in steps[2:4]] == [[True, True, False, False], [False, False, False, True]]
    assert rollout.stack("broken").nonzero().tolist() == [[1, 2]]


def test_an_environment_lost_in_the_reset_of_another_begins_anew(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5 * CHUNK, needed=1)
    step_async = trainer.envs.step_async
    trainer.envs.step_async = lambda actions, active, episodes: step_async(actions, active)  # so that there are resets
    make_flaky(trainer.envs, {("reset", 1): [0, 1, 2, 3]})
    rollout, metrics = trainer.collect_rollout()
    ended, broken = rollout.stack("terminated") | rollout.stack("truncated"), rollout.stack("broken")
    assert broken.sum() == metrics["rollout/episodes_dropped"] > 0 and not (broken & ended).any()
    assert all(ended[t].any() for t in broken.any(dim=1).nonzero().flatten())


def test_all_episodes_lost_is_an_iteration_without_an_update(tmp_path, caplog):
    lost = {("step", n): [0, 1, 2, 3] for n in range(8)}
    trainer = flaky(tmp_path, lost, run={"timesteps": 1})
    before = final_state(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train_iteration()
    assert "no update in this iteration" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(before, final_state(trainer), strict=True))
    (line,) = training_lines(tmp_path)
    assert line["rollout/episodes_dropped"] == 32 and line["rollout/episodes"] == 0
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("overlap", [False, True])
def test_grpo_trains_on_what_it_would_have_played_without_the_faults(tmp_path, overlap):
    """The same episodes with the same samples: to the bit where decisions are of the same rows."""
    changes = {"algorithm": {"estimator": "grpo"}, "rollout": {"overlap": overlap}, "run": {"seed": 4}}
    lost = {("step", 1): [0, 3], ("reset", 1): [1], ("step", 5): [2]}
    batches = []
    for name, breaks in (("whole", {}), ("flaky", lost)):
        trainer = flaky(tmp_path / name, breaks, **changes)
        rollout, metrics = trainer.collect_rollout()
        assert metrics["rollout/episodes"] == 8 and bool(metrics["rollout/episodes_dropped"]) == bool(breaks)
        batches.append((trainer.compute_advantages(rollout), metrics["rollout/success_rate"]))
    ((whole, _), rate), ((other, _), other_rate) = batches
    assert len(whole) == len(other) > 0 and rate == other_rate
    for name in ("action_tokens", "steps", "advantages"):
        assert torch.equal(getattr(whole, name), getattr(other, name)), name
    torch.testing.assert_close(whole.old_logprobs, other.old_logprobs)


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_an_evaluation_gives_the_results_that_it_gives_without_the_faults(mode):
    episodes, policy = evaluation_episodes([0, 1], range(4)), FakePolicy()
    results = []
    for breaks in ({}, {("step", 0): [0], ("step", 2): [0, 1], ("reset", 2): [0, 1]}):
        envs = make_envs(2)
        make_flaky(envs, breaks)
        results.append(evaluate_policy(policy, envs, episodes, mode=mode, temperature=1.0, seed=1, progress=False))
    assert len(results[1]) == 8
    for whole, other in zip(*results, strict=True):
        assert (whole.episode, whole.success, whole.length) == (other.episode, other.success, other.length)
        np.testing.assert_array_equal(whole.actions, other.actions)


def test_an_episode_that_always_loses_its_simulator_is_left_out_of_an_evaluation(caplog):
    episodes, envs = evaluation_episodes([0], range(3)), make_envs(1)
    make_flaky(envs, {("step", n): [0] for n in range(TRIES)})
    settings = {"mode": "greedy", "temperature": 1.0, "seed": 1, "progress": False}
    results = evaluate_policy(FakePolicy(), envs, episodes, **settings)
    assert [result.episode.initial_state for result in results] == [1, 2]
    assert "initial_state=0" in caplog.text and f"left out: broken off {TRIES} times" in caplog.text
    make_flaky(envs, {("step", n): [0] for n in range(3 * TRIES)})
    with pytest.raises(SimulatorDied, match="none of 3 episodes could be played"):
        evaluate_policy(FakePolicy(), envs, episodes, **settings)


def test_a_run_with_faults_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path):
    lost = {("step", 4): [0, 2], ("step", 7): [1]}  # the last of the first iteration too
    whole = flaky(tmp_path / "whole", lost, run={"timesteps": 2 * 4 * 8 * CHUNK - 20})
    whole.train()
    assert [line["rollout/episodes_dropped"] for line in training_lines(tmp_path / "whole")][:2] == [3, 0]
    resumed = make_trainer(tmp_path / "whole", run={"timesteps": 2 * 4 * 8 * CHUNK - 20})
    resumed.load_checkpoint(list_checkpoints(tmp_path / "whole" / "checkpoints")[1])
    assert resumed.iteration == 1
    resumed.train()
    for ours, expected in zip(final_state(resumed), final_state(whole), strict=True):
        assert torch.equal(ours, expected)
