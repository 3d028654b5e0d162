"""vla_rl/fine_tuning/samples.py: chunks, units, statistics, held-out episodes, the order of rows."""

import json

import numpy as np
import pytest

from vla_rl.fine_tuning.demonstration_file import Demonstration
from vla_rl.fine_tuning.samples import batch_rows, chunks_of, data_statistics, data_units, make_samples, split
from vla_rl.run.settings import ConfigError


def demonstration(actions, instruction="do it"):
    steps = len(actions)
    images = np.zeros((steps, 1, 16, 16, 3), np.uint8)
    return Demonstration("demo_0", instruction, images, np.zeros((steps, 8), np.float32), np.asarray(actions, float))


def test_a_chunk_repeats_the_last_action_after_the_end():
    actions = np.arange(4)[:, None] * np.ones(7)
    assert chunks_of(actions, 3)[..., 0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 3], [3, 3, 3]]


def test_samples_know_how_many_steps_are_left():
    samples = make_samples([demonstration([[0] * 7] * 3), demonstration([[0] * 7] * 2)], 2, 14, progress=False)
    assert samples.steps_to_go.tolist() == [2, 1, 0, 1, 0]
    assert samples.images.shape == (5, 1, 14, 14, 3) and samples.chunks.shape == (5, 2, 7)


def test_the_gripper_is_turned_into_the_data_set_s_units():
    actions = np.zeros((3, 7))
    actions[:, 6] = [-1, 1, 0]
    assert data_units(actions)[:, 6].tolist() == [1, 0, 0.5]  # opens, closes, holds
    assert actions[:, 6].tolist() == [-1, 1, 0]  # a copy


def test_statistics_are_quantiles_and_leave_the_gripper_alone():
    actions = np.zeros((101, 7))
    actions[:, 0] = np.linspace(-1, 1, 101)  # 1 % is one step of 0.02
    actions[:, 6] = 1
    stats = data_statistics([demonstration(actions)])
    assert stats["action"]["q01"][0] == pytest.approx(-0.98) and stats["action"]["q99"][0] == pytest.approx(0.98)
    assert stats["action"]["mask"] == [True] * 6 + [False]
    assert stats["action"]["max"][6] == 0 and (stats["num_transitions"], stats["num_trajectories"]) == (101, 1)
    json.dumps(stats)


def test_the_last_episodes_of_each_task_are_held_out():
    demos = [demonstration([[i] * 7], instruction) for instruction in "ab" for i in range(10)]
    training, held_out = split(demos, 0.2)
    assert [(d.instruction, d.actions[0, 0]) for d in held_out] == [("a", 8), ("a", 9), ("b", 8), ("b", 9)]
    assert len(training) == 16 and not {id(d) for d in training} & {id(d) for d in held_out}
    assert len(split(demos, 0.01)[1]) == 2 and split(demos, 0)[1] == []  # at least one of each, or none
    with pytest.raises(ConfigError, match="'a' has 1 demonstration, which leaves none to train on"):
        split(demos[:1], 0.1)


def test_every_row_is_seen_once_an_epoch_in_another_order_each_time():
    rows = np.concatenate([batch_rows(10, 4, step, seed=3) for step in range(5)])  # 20 rows: 2 epochs
    assert sorted(rows[:10]) == list(range(10)) == sorted(rows[10:])
    assert rows[:10].tolist() != rows[10:].tolist()
    np.testing.assert_array_equal(batch_rows(10, 4, 2, 3), rows[8:12])  # across the epochs' border, of the step alone
