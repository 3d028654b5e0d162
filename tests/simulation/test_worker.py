"""A worker's environments, played in this process: which images are prepared, which episodes begin."""

import numpy as np
from gymnasium.spaces import Box, Dict

from vla_rl.simulation.libero_env import Simulators
from vla_rl.simulation.worker import MakeWorker, Shown, Stepped, Worker, views_of
from vla_rl.types import ACTION_DIM, Episode, SimulationUnstable

SIZE, CHUNK = 64, 8
SETTINGS = {"task_suite": "libero_spatial", "chunk_size": CHUNK, "num_images": 2, "image_size": SIZE}


class CountingTransform:
    size, calls = 4, 0

    def __call__(self, image):
        self.calls += 1
        return image[:4, :4]


def played(worker, obs, **ends):
    """The worker's environments do nothing but show this, and end as told."""
    flags = {"terminated": False, "truncated": False} | ends
    for env in worker.envs.values():
        env.reset = lambda **kwargs: (obs, {})
        env.episode_state = lambda: {"episode": {"task_id": 3}}
        env.step = lambda actions: (obs, 0.5, *flags.values(), {"steps": CHUNK, "success": False})
    return worker


OBS = {"images": np.ones((2, SIZE, SIZE, 3), np.uint8), "proprio": np.zeros(8), "instruction": "lift"}
ACTIONS = np.zeros((CHUNK, ACTION_DIM), np.float32)


def test_an_image_that_nobody_reads_is_not_prepared():
    """One a camera for each environment that steps or is reset; none for those that wait."""
    transform = CountingTransform()
    worker = played(Worker(SETTINGS, [0, 2], Simulators(), Shown(transform)), OBS)
    assert worker.reset({2: {}}) == {2: ("lift", {"task_id": 3})}
    assert transform.calls == 2 and worker.observations["images"].shape == (2, 2, 4, 4, 3)
    assert worker.observations["images"].any((1, 2, 3, 4)).tolist() == [False, True]
    assert worker.step({0: ACTIONS}, {}) == {0: Stepped(reward=0.5, steps=CHUNK)}
    assert transform.calls == 4


def test_a_next_episode_begins_where_one_ends_and_a_truncated_one_tells_what_it_reached():
    worker = played(Worker(SETTINGS, [0, 2], Simulators()), OBS, truncated=True)
    stepped = worker.step({0: ACTIONS, 2: ACTIONS}, {2: Episode(1, None, 5)})
    assert stepped[0] == Stepped(0.5, truncated=True, steps=CHUNK)
    assert stepped[2].begun == "lift" and set(stepped[2].reached) == {"images", "proprio"}


def test_a_simulation_that_blows_up_is_told_and_ends_nothing_else():
    worker = played(Worker(SETTINGS, [0, 2], Simulators()), OBS)

    def blow_up(actions):
        raise SimulationUnstable("MuJoCo counts mjWARN_BADQACC")

    worker.envs[0].step = blow_up
    stepped = worker.step({0: ACTIONS, 2: ACTIONS}, {})
    assert stepped == {0: Stepped(unstable="MuJoCo counts mjWARN_BADQACC"), 2: Stepped(0.5, steps=CHUNK)}


def test_a_worker_writes_into_its_part_of_the_arrays_of_all():
    layout = {"images": ((2, 1, 2, SIZE, SIZE, 3), "|u1"), "proprio": ((2, 1, 8), "<f4")}
    memory = tuple(bytearray(int(np.prod(shape)) * np.dtype(kind).itemsize) for shape, kind in layout.values())
    worker = played(MakeWorker(1, [4], SETTINGS, 1, 0, Shown(), None, layout)(*memory), OBS)
    worker.reset({4: {}})
    assert views_of(memory, layout)["images"].any((1, 2, 3, 4, 5)).tolist() == [False, True]


def test_shown_arrays_are_those_of_the_space():
    rendered = Dict(images=Box(0, 255, (2, 8, 6, 3), np.uint8), proprio=Box(-1, 1, (8,), np.float32))
    obs = {"images": rendered["images"].sample(), "proprio": rendered["proprio"].sample(), "instruction": "lift"}
    for shown in (Shown(), Shown(CountingTransform())):
        assert shown.space(rendered).contains(shown(obs))
        assert tuple(shown(obs)) == ("images", "proprio")
