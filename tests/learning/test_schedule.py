"""The actor's learning rate over a run, by hand and in the trainer; and that it waits for a reward."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from tests.fakes import CHUNK
from tests.trainers import final_state, make_trainer, training_lines, with_values
from vla_rl.learning.schedule import ActorSchedule, adapted_to_kl, cooled, linear
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.run.checkpoint import find_checkpoint
from vla_rl.run.settings import LoraConfig

# the pure functions


def test_linear_goes_from_the_whole_rate_to_nothing():
    assert linear(3e-3, 0, 150_000) == 3e-3
    assert linear(3e-3, 50_000, 150_000) == pytest.approx(2e-3)
    assert linear(3e-3, 150_000, 150_000) == 0
    assert linear(3e-3, 149_000, 150_000) == pytest.approx(2e-5)


def test_cooled_stays_for_two_thirds_and_ends_where_it_should():
    assert [cooled(1.0, 0.5, t, 300) for t in (0, 199, 200, 250, 300, 310)] == [1, 1, 1, 0.75, 0.5, 0.5]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.0201, 2e-4),  # above 2 x 0.01: 3e-4 / 1.5
        (0.02, 3e-4),  # at the edge nothing changes
        (0.01, 3e-4),
        (0.005, 3e-4),
        (0.0049, 4.5e-4),  # below 0.01 / 2: 3e-4 x 1.5
        (1e-12, 4.5e-4),
        (0.0, 3e-4),  # the policy has not moved, or nothing was measured
        (-1e-9, 3e-4),  # rounding of a KL of 0
    ],
)
def test_the_rate_falls_above_twice_the_target_and_rises_below_half_of_it(kl, expected):
    assert adapted_to_kl(3e-4, kl, target=0.01, lowest=1e-7, highest=1e-2) == pytest.approx(expected)


def test_the_rate_stays_within_its_bounds():
    assert adapted_to_kl(1.2e-7, 1.0, 0.01, 1e-7, 1e-2) == 1e-7
    assert adapted_to_kl(9e-3, 1e-4, 0.01, 1e-7, 1e-2) == 1e-2


# in the trainer

# 32 rows in minibatches of 4, twice: 16 steps an update
STEPS = {"minibatch_size": 4, "micro_batch_size": 4}


def kl_per_token(folder, iterations, algorithm=STEPS, policy=None, **actor):
    """Of each iteration, the mean over its minibatches."""
    trainer = make_trainer(folder, policy=policy, algorithm=algorithm, actor={"max_learning_rate": 1.0} | actor)
    for _ in range(iterations):
        trainer.train_iteration()
    return [line["actor/approx_kl"] / trainer.tokens_per_ratio for line in training_lines(folder)]


@pytest.mark.parametrize("times", [1 / 30, 30])
def test_the_kl_of_a_run_comes_to_the_targets_band_from_a_rate_30_times_too_small_or_large(tmp_path, times):
    """With a constant 0.01 it is at 0.001 to 0.003 a token; the target is 0.01."""
    held = kl_per_token(tmp_path / "kl", 7, schedule="kl", learning_rate=0.01 * times)[2:]
    assert 0.005 < sum(held) / 5 < 0.03
    assert all(0.002 < kl < 0.06 for kl in held)  # of one iteration, with 4 rows a minibatch
    (constant,) = kl_per_token(tmp_path / "constant", 1, learning_rate=0.01 * times)
    assert constant < 1e-4 if times < 1 else constant > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("level", ["action", "chunk"])
@pytest.mark.parametrize("times", [1 / 30, 30])
def test_the_kl_is_held_a_token_whatever_a_ratio_is_of(tmp_path, times, level):
    held = kl_per_token(tmp_path, 8, STEPS | {"logprob_level": level}, schedule="kl", learning_rate=0.01 * times)[2:]
    assert 0.005 < sum(held) / 6 < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("times", [1 / 30, 30])
def test_the_kl_of_the_real_network_is_held_too(tmp_path, times):
    """A constant 1e-3 gives 0.14, 0.03, 0.02 a token, 30 times less 0.0005 and below, 30 times more 1.0, 0.13, 0.04."""
    torch.manual_seed(0)
    lora = {"lora": LoraConfig(rank=8), "chunk_size": CHUNK, "unnorm_key": "libero_spatial"}
    policy = OpenVLAPolicy.from_checkpoint("tiny-openvla-random", "parallel", **lora)
    algorithm = STEPS | {"n_epochs": 1}
    held = kl_per_token(tmp_path, 6, algorithm, policy, schedule="kl", learning_rate=1e-3 * times)[2:]
    assert 0.005 < sum(held) / 4 < 0.02


def test_the_rate_changes_before_each_step_but_the_first_of_an_update(tmp_path):
    actor = {"schedule": "kl", "learning_rate": 0.05, "max_learning_rate": 0.1}
    trainer = make_trainer(tmp_path, algorithm=STEPS, actor=actor)
    rates, step = [], trainer.actor_optimizer.step
    trainer.actor_optimizer.step = lambda: (rates.append(trainer.actor_optimizer.param_groups[0]["lr"]), step())
    kls, gradients = [], trainer.minibatch_gradients

    def noted(*args, **kwargs):
        metrics = gradients(*args, **kwargs)
        kls.append(metrics["actor/approx_kl"])
        return metrics

    trainer.minibatch_gradients = noted
    metrics = trainer.update(trainer.compute_advantages(trainer.collect_rollout()[0])[0])
    expected = [0.05]
    for kl in kls[1:]:
        expected.append(min(0.1, expected[-1] * (1.5 if kl < 0.005 else 1 / 1.5 if kl > 0.02 else 1)))
    assert len(rates) == 16 and rates == pytest.approx(expected)
    assert {a < b for a, b in itertools.pairwise(rates) if a != b} == {True, False}  # up and down
    assert metrics["actor/learning_rate"] == rates[-1]


def test_a_minibatch_that_stops_the_update_lowers_the_rate_of_the_next_one(tmp_path):
    actor = {"schedule": "kl", "kl_target": 1e-6}
    trainer = make_trainer(tmp_path, algorithm=STEPS | {"target_kl": 1e-5}, actor=actor)
    metrics = trainer.update(trainer.compute_advantages(trainer.collect_rollout()[0])[0])
    assert metrics["actor/stopped_by_kl"] == metrics["actor/optimizer_steps"] == 1
    assert metrics["actor/learning_rate"] == pytest.approx(0.01 / 1.5)


def test_the_kl_of_an_action_or_chunk_counts_a_token(tmp_path):
    """0.1 nats are too many for one token, too few for the 14 of a chunk, right for 7."""
    for level, expected in (("token", 1e-3 / 1.5), ("action", 1e-3), ("chunk", 1e-3)):
        schedule = make_trainer(
            tmp_path / level, algorithm={"logprob_level": level}, actor={"schedule": "kl", "learning_rate": 1e-3}
        ).schedule
        schedule.before_step(0.1)  # a token: 0.1, 0.0143, 0.0071
        assert schedule.learning_rate == pytest.approx(expected), level
    schedule.before_step(0.06)  # 0.0043
    assert schedule.learning_rate == pytest.approx(1.5e-3)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_other_schedules_do_not_look_at_the_kl(tmp_path, schedule):
    made = make_trainer(tmp_path, actor={"schedule": schedule}).schedule
    made.begin_update(0)
    made.before_step(5.0)
    assert made.learning_rate == 0.01


def test_nothing_changes_where_the_actor_does_not_step(tmp_path):
    trainer = make_trainer(
        tmp_path, algorithm=STEPS | {"critic_warmup_iterations": 1}, actor={"schedule": "kl", "learning_rate": 1e-3}
    )
    trainer.train_iteration()
    assert trainer.schedule.learning_rate == 1e-3
    trainer.train_iteration()
    assert trainer.schedule.learning_rate > 1e-3


# resumed


def resumed(folder, checkpoint, **actor) -> ActorSchedule:
    trainer = make_trainer(folder, algorithm=STEPS, actor=actor)
    trainer.load_checkpoint(checkpoint)
    return trainer.schedule


def test_a_resumed_run_goes_on_at_its_rate_unless_the_settings_have_changed_it(tmp_path):
    trainer = make_trainer(tmp_path, algorithm=STEPS, actor={"schedule": "kl", "learning_rate": 1e-3})
    trainer.train_iteration()
    trainer.save_checkpoint()
    rate, checkpoint = trainer.schedule.learning_rate, find_checkpoint(tmp_path)
    assert rate > 2e-3
    same = {"schedule": "kl", "learning_rate": 1e-3}
    assert resumed(tmp_path, checkpoint, **same).learning_rate == rate
    assert resumed(tmp_path, checkpoint, **same | {"max_learning_rate": 2e-3}).learning_rate == 2e-3
    assert resumed(tmp_path, checkpoint, **same | {"learning_rate": 5e-4}).learning_rate == 5e-4
    assert resumed(tmp_path, checkpoint, **same | {"schedule": "constant"}).learning_rate == 1e-3


def test_a_run_with_a_kl_schedule_that_was_stopped_equals_one_that_was_not(tmp_path):
    changes = {"algorithm": STEPS, "actor": {"schedule": "kl", "learning_rate": 1e-3}}
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.train()
    stopped = make_trainer(tmp_path / "stopped", **changes)
    for _ in range(2):
        stopped.train_iteration()
    stopped.save_checkpoint()
    again = make_trainer(tmp_path / "stopped", **changes)
    again.load_checkpoint(find_checkpoint(tmp_path / "stopped"))
    again.train()
    assert training_lines(tmp_path / "stopped") == training_lines(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(final_state(again), final_state(whole), strict=True))


# waiting for a reward


def waiting_trainer(folder, **algorithm):
    """Nobody succeeds."""
    return make_trainer(folder, needed=99, algorithm={"wait_for_reward": True} | algorithm)


def need(trainer, right_moves: int) -> None:
    for env in trainer.envs.envs:
        env.unwrapped.needed = right_moves


def test_until_the_first_reward_only_the_critic_is_trained_and_each_iteration_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer = waiting_trainer(tmp_path)
    adapter = trainer.policy.adapter.clone()
    for _ in range(2):
        caplog.clear()
        trainer.train_iteration()
        assert caplog.text.count("no reward in the run yet: only the value head is trained") == 1
        assert "no reward yet: no actor step" in caplog.text
    assert torch.equal(trainer.policy.adapter, adapter)
    caplog.clear()
    need(trainer, 1)
    trainer.train_iteration()
    assert "first reward of the run: the policy is trained from this iteration on" in caplog.text
    assert "no actor step" not in caplog.text
    assert not torch.equal(trainer.policy.adapter, adapter)
    lines = training_lines(tmp_path)
    assert [line["actor/waits_for_reward"] for line in lines] == [1, 1, 0]
    assert [line["actor/optimizer_steps"] for line in lines] == [0, 0, 4]
    caplog.clear()
    need(trainer, 99)
    before = trainer.policy.adapter.clone()
    trainer.train_iteration()  # a rollout without reward, of a run that has seen one
    assert not torch.equal(trainer.policy.adapter, before)
    assert "first reward" not in caplog.text and "in the run yet" not in caplog.text


def test_the_value_head_is_trained_while_the_actor_waits(tmp_path):
    trainer = waiting_trainer(tmp_path)
    trainer.train_iteration()
    assert trainer.critic_optimizer.state[trainer.critic_parameters[0]]["step"] == 4
    assert not trainer.actor_optimizer.state


def test_without_waiting_the_actor_steps_on_the_value_heads_errors(tmp_path, caplog):
    trainer = with_values(waiting_trainer(tmp_path, wait_for_reward=False))
    adapter = trainer.policy.adapter.clone()
    trainer.train_iteration()
    assert training_lines(tmp_path)[0]["actor/optimizer_steps"] == 4
    assert training_lines(tmp_path)[0]["actor/waits_for_reward"] == 0
    assert "no reward in this rollout: its advantages are the value head's errors alone" in caplog.text
    assert not torch.equal(trainer.policy.adapter, adapter)


@pytest.mark.parametrize(
    ("iteration", "rewards", "steps"),
    [
        (0, 0.0, False),
        (0, 1.0, False),
        (1, 0.0, False),
        (1, 1.0, False),
        (2, 0.0, False),
        (2, 1.0, True),
        (9, -0.1, True),
    ],
)
def test_the_actor_steps_after_the_warm_up_once_there_was_a_reward(tmp_path, iteration, rewards, steps):
    schedule = waiting_trainer(tmp_path, critic_warmup_iterations=2).schedule
    schedule.see_rewards(torch.full((8, 4), rewards), iteration)
    assert schedule.steps_in(iteration) is steps
    schedule.see_rewards(torch.zeros(8, 4), iteration + 1)
    assert schedule.steps_in(max(2, iteration + 1)) is (rewards != 0)


def test_a_first_reward_within_the_warm_up_is_said_too(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    schedule = waiting_trainer(tmp_path, critic_warmup_iterations=3).schedule
    schedule.see_rewards(torch.zeros(8, 4), 0)
    schedule.see_rewards(torch.ones(8, 4), 1)
    assert "first reward of the run: the policy is trained after the critic's warm-up" in caplog.text


def test_a_run_that_is_rewarded_at_once_says_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    waiting_trainer(tmp_path).schedule.see_rewards(torch.ones(8, 4), 0)
    assert caplog.text == ""


def test_grpo_never_waits(tmp_path):
    schedule = waiting_trainer(tmp_path, estimator="grpo", critic_warmup_iterations=5).schedule
    assert schedule.steps_in(0) and not schedule.waits and set(schedule.metrics()) == {"actor/learning_rate"}


def test_a_checkpoint_knows_whether_there_was_a_reward(tmp_path):
    for seen in (False, True):
        trainer = waiting_trainer(tmp_path / str(seen))
        trainer.schedule.reward_seen = seen
        trainer.boundary.take()
        trainer.save_checkpoint()
        again = waiting_trainer(tmp_path / str(seen))
        again.load_checkpoint(find_checkpoint(tmp_path / str(seen)))
        assert again.schedule.reward_seen is seen
