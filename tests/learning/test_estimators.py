"""The rows that an update learns from; the estimators themselves are tested in test_advantages and in the trainer's tests."""

import torch

from tests.learning.test_rollout_buffer import add, transition
from tests.trainers import settings
from vla_rl.learning.estimators import gae_rows, grpo_rows
from vla_rl.learning.rollout_buffer import RolloutBuffer


def rollout_of(broken: list[list[bool]]) -> RolloutBuffer:
    """Two environments, whose rows are numbered 1, 2 and 3, 4 and so on; nothing ends."""
    buffer = RolloutBuffer()
    for t, flags in enumerate(broken):
        add(buffer, transition([2 * t + 1, 2 * t + 2]), [])
        buffer.transitions[-1].broken[:] = torch.tensor(flags)
    buffer.bootstrap(lambda inputs: torch.zeros(len(inputs)), 8)
    return buffer


def test_rows_of_a_broken_episode_are_no_part_of_batch_metrics_or_rewards():
    algorithm = settings(algorithm={"normalize_advantages": True}).algorithm
    batch, metrics, rewards = gae_rows(rollout_of([[0, 0], [1, 0], [0, 0]]), algorithm)
    assert batch.steps.tolist() == rewards.tolist() == [2, 4, 5, 6]
    assert metrics["critic/value_mean"] == (2 + 4 + 5 + 6) / 4
    assert abs(batch.advantages.mean()) < 1e-6 and abs(batch.advantages.std(unbiased=False) - 1) < 1e-5
    nothing, metrics, rewards = gae_rows(rollout_of([[1, 1]]), algorithm)
    assert len(nothing) == len(rewards) == 0 and metrics == {}


def test_rows_of_groups_are_in_the_order_of_the_episodes():
    buffer = RolloutBuffer()
    for numbers in ([3, 0], [2, 1], [3, 1]):
        add(buffer, transition(numbers), [])
    batch, metrics = grpo_rows(buffer, settings().algorithm, 2)  # returns 0, 2, 2, 6
    assert batch.steps.tolist() == [0, 1, 1, 2, 3, 3] and metrics == {"rollout/uniform_groups": 0}
