"""A worker's environments, played in this process: which images are prepared, which episodes begin."""

import dataclasses

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

from vla_rl.simulation.libero_env import Simulators
from vla_rl.simulation.worker import Shown, Worker, episode_of, episode_row
from vla_rl.types import ACTION_DIM, Episode

SIZE, CHUNK = 64, 8
SETTINGS = {"task_suite": "libero_spatial", "chunk_size": CHUNK, "num_images": 2, "image_size": SIZE}


class CountingTransform:
    size, calls = 4, 0

    def __call__(self, image):
        self.calls += 1
        return image[:4, :4]


def test_an_image_that_nobody_reads_is_not_prepared():
    """One a camera for each environment that steps or is reset; none for those that wait."""
    transform = CountingTransform()
    worker = Worker(SETTINGS, [0, 2], 2, Simulators(), Shown(transform))
    obs = {"images": np.ones((2, SIZE, SIZE, 3), np.uint8), "proprio": np.zeros(8), "instruction": ""}
    for env in worker.envs.values():
        env.reset = lambda **kwargs: (obs, {})
        env.step = lambda actions: (obs, 0.0, False, False, {"steps": CHUNK, "success": False})
    worker.reset(options={"starts": {2: {}}})
    assert transform.calls == 2 and worker.observations["images"].shape == (2, 2, 4, 4, 3)
    assert worker.observations["images"].any((1, 2, 3, 4)).tolist() == [False, True]
    episodes = np.zeros((2, 5), np.int64)
    actions = np.zeros((2, CHUNK, ACTION_DIM), np.float32)
    worker.step({"actions": actions, "active": np.array([True, False]), "episodes": episodes})
    assert transform.calls == 4


@pytest.mark.parametrize("episode", [Episode(3, None, 2**31 - 1), Episode(0, 0, 0, resets=4), Episode(9, 49, 7, 50)])
def test_an_episode_comes_back_from_its_row(episode):
    row = np.array(episode_row(episode))
    assert row.dtype == np.int64 and episode_of(row) == episode
    assert episode_row(dataclasses.asdict(episode)) == row.tolist()
    assert episode_of(np.zeros_like(row)) is None


def test_shown_arrays_are_those_of_the_space():
    rendered = Dict(images=Box(0, 255, (2, 8, 6, 3), np.uint8), proprio=Box(-1, 1, (8,), np.float32))
    obs = {"images": rendered["images"].sample(), "proprio": rendered["proprio"].sample(), "instruction": "lift"}
    for shown in (Shown(), Shown(CountingTransform())):
        assert shown.space(rendered).contains(shown(obs))
        assert tuple(shown(obs)) == ("images", "proprio")
