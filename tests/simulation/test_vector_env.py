"""LiberoVectorEnv: environments in worker processes, several in each, in order, restored, and what a dead worker says."""

import logging
import os
import signal
import sys
import time
from contextlib import closing

import numpy as np
import pytest

from tests.model.policies import make_policy
from tests.simulation.tasks import wait_until_gone
from vla_rl.model.image_transform import OpenVLAImageTransform
from vla_rl.run.load_settings import config_from_dict
from vla_rl.simulation.libero_env import LiberoEnv
from vla_rl.simulation.suites import task_languages
from vla_rl.simulation.vector_env import LiberoVectorEnv, make_vector_env, simulators_kept
from vla_rl.simulation.worker import Shown
from vla_rl.simulation.worker_processes import Patience
from vla_rl.types import ACTION_DIM, Episode, Observation

libero = pytest.mark.libero
SIZE, CHUNK = 64, 8
SETTINGS = {"task_suite": "libero_spatial", "chunk_size": CHUNK, "num_images": 2, "image_size": SIZE, "max_steps": 12}
# three environments in two workers: the second worker has an empty place; two tasks
EPISODES = {0: Episode(4, 7, 3), 1: Episode(1, 4, 0), 2: Episode(4, None, 11)}


def random_actions(seed, num_envs=3):
    return np.random.default_rng(seed).uniform(-1, 1, (num_envs, CHUNK, ACTION_DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def alone():
    """Each episode by itself in a LiberoEnv: observations after the reset and after two chunks."""
    env = LiberoEnv(**SETTINGS)
    observations = {}
    for i, episode in EPISODES.items():
        observations[i] = [env.reset(options={"episode": episode})[0]]
        observations[i] += [env.step(random_actions(seed)[i])[0] for seed in (0, 1)]
    env.close()
    return observations


def assert_shows(obs, row, expected):
    np.testing.assert_array_equal(obs["images"][row], expected["images"])
    np.testing.assert_array_equal(obs["proprio"][row], expected["proprio"])
    assert obs["instruction"][row] == expected["instruction"]


@libero
def test_the_vector_plays_restores_and_names_a_killed_worker(alone, caplog):
    envs = LiberoVectorEnv(SETTINGS, num_envs=3, num_workers=2, patience=Patience(replacements=0))
    pids = [process.pid for process in envs.processes]
    assert len(pids) == 2
    with caplog.at_level(logging.INFO):
        obs, _ = envs.reset(options={"episodes": EPISODES})
    assert "built 2 simulators" in caplog.text and "libero_spatial task 1, libero_spatial task 4" in caplog.text
    assert [list(kept) for kept in envs.held.kept] == [[4], [1]]  # environments 0 and 2, and 1
    languages = task_languages("libero_spatial")
    assert Observation.from_vector_env(obs).instructions == (languages[4], languages[1], languages[4])
    assert obs["images"].shape == (3, 2, SIZE, SIZE, 3) and envs.observation_space.contains(obs)
    for i in EPISODES:
        assert_shows(obs, i, alone[i][0])
    for pid in pids:
        with open(f"/proc/{pid}/maps") as maps:
            assert "libtorch" not in maps.read()

    with pytest.raises(ValueError, match="not finite"):  # refused here: the workers live on
        envs.step(np.full_like(random_actions(0), np.nan))
    first, *_ = envs.step(random_actions(0))
    states = envs.episode_states()
    second, rewards, terminated, truncated, infos = envs.step(random_actions(1))
    for i in EPISODES:
        assert_shows(first, i, alone[i][1])  # and a later step does not write into an earlier observation
        assert_shows(second, i, alone[i][2])
    assert infos["steps"].tolist() == [4, 4, 4] and truncated.all() and not terminated.any() and not rewards.any()

    restored = envs.restore_episodes(states)
    for i in EPISODES:
        assert_shows(restored, i, alone[i][1])
    again, _, _, truncated, _ = envs.step(random_actions(1))
    np.testing.assert_array_equal(again["images"], second["images"])

    mask = np.array([False, True, False])
    obs, _ = envs.reset(options={"reset_mask": mask, "episodes": {1: EPISODES[0]}})
    assert_shows(obs, 0, alone[0][2])  # left alone
    assert_shows(obs, 1, alone[0][0])
    _, _, _, truncated, infos = envs.step(random_actions(0))
    assert infos["steps"].tolist() == [0, 8, 0] and truncated.tolist() == [True, False, True]

    # Ctrl-C and a cluster's signals reach the workers too, and are the parent's to handle
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(pids[0], number)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker 1 died \(SIGKILL; often out of memory.*lower env.num_workers"):
        envs.step(random_actions(0))
    assert envs.workers.closed and wait_until_gone(pids) == []
    envs.close()


@libero
def test_a_step_of_some_environments_leaves_the_others_as_they_are(alone):
    """What overlapping needs: halves that step in turns give what they give together."""
    envs = LiberoVectorEnv(SETTINGS, num_envs=3, num_workers=2)
    envs.reset(options={"episodes": EPISODES})
    for active in ([True, False, True], [False, True, False]):
        envs.step_async(random_actions(0), np.array(active))
        obs, _, _, _, infos = envs.step_wait()
        assert infos["steps"].tolist() == [8 if playing else 0 for playing in active]
        for i in EPISODES:
            assert_shows(obs, i, alone[i][1 if active[i] or i != 1 else 0])
    envs.close()


@libero
def test_the_next_episode_begins_in_the_step_that_ends_one(alone):
    """As a reset after the step, which shows the same: observations, what ended, states, and how episodes go on."""
    envs = LiberoVectorEnv(SETTINGS, num_envs=3, num_workers=2)
    envs.reset(options={"episodes": EPISODES})
    both, following = np.array([True, True, False]), {0: EPISODES[1], 2: EPISODES[0]}
    envs.step_async(random_actions(0), both, following)
    obs, _, _, _, infos = envs.step_wait()
    assert not infos["begun"].any() and "truncated_obs" not in infos  # nothing has ended
    envs.step_async(random_actions(1), both, following)
    obs, _, _, truncated, infos = envs.step_wait()
    assert infos["begun"].tolist() == [True, False, False] and infos["steps"].tolist() == [4, 4, 0]
    assert truncated.tolist() == [True, True, False]
    for i, shown in enumerate(
        [alone[1][0], alone[1][2], alone[2][0]]
    ):  # another task, nothing named for 1, 2 has waited
        assert_shows(obs, i, shown)
    for i, shown in enumerate([alone[0][2], alone[1][2], alone[2][0]]):
        assert_shows(infos["truncated_obs"], i, shown)
    states = envs.episode_states()
    assert [len(state["actions"]) for state in states] == [0, 12, 0] and Episode(**states[0]["episode"]) == EPISODES[1]
    actions = random_actions(0)
    actions[0] = actions[1]
    obs, *_ = envs.step(actions)
    assert_shows(obs, 0, alone[1][1])
    assert_shows(obs, 2, alone[2][1])
    envs.close()


@libero
def test_workers_prepare_the_policys_images_bit_for_bit(alone):
    policy = make_policy(num_images=2, lora=None)
    envs = LiberoVectorEnv(SETTINGS, 3, 2, image_transform=policy.processor.image_transform)
    obs, _ = envs.reset(options={"episodes": EPISODES})
    shown = [obs, envs.step(random_actions(0))[0]]
    shown.append(envs.restore_episodes(envs.episode_states()))
    assert envs.single_observation_space["images"].shape == obs["images"].shape[1:] == (2, 112, 112, 3)
    for process in envs.processes:
        with open(f"/proc/{process.pid}/maps") as maps:
            assert "libtorch" not in maps.read()
    envs.close()
    for obs, chunk in zip(shown, (0, 1, 1), strict=True):
        rows = [alone[i][chunk] for i in EPISODES]
        raw = {name: np.stack([row[name] for row in rows]) for name in ("images", "proprio")}
        raw = Observation.from_vector_env(raw | {"instruction": [row["instruction"] for row in rows]})
        prepared = Observation.from_vector_env(obs)
        ours, expected = policy.prepare(prepared), policy.prepare(raw)
        assert ours.images.equal(expected.images) and ours.proprio.equal(expected.proprio)
        assert ours.instructions == expected.instructions


@libero
def test_recordings_are_replayed_in_their_order_and_the_environments_stay_where_they_are(alone):
    envs = LiberoVectorEnv(SETTINGS, num_envs=2, num_workers=2)
    assert envs.renderer_name() is None
    episodes = {i: EPISODES[i] for i in range(2)}
    envs.reset(options={"episodes": episodes})
    envs.step(random_actions(0, num_envs=2))
    states = envs.episode_states()
    recordings = [(EPISODES[i], states[i]["actions"]) for i in (1, 0)] + [(EPISODES[0], states[0]["actions"][:3])]
    played = list(envs.replay(recordings))
    assert [len(frames) for frames, *_ in played] == [CHUNK + 1, CHUNK + 1, 4]
    for (frames, success, _), i in zip(played, (1, 0), strict=False):
        assert not success
        np.testing.assert_array_equal(frames[-1], alone[i][1]["images"][0])
    np.testing.assert_array_equal(played[2][0], played[1][0][:4])
    obs, *_ = envs.step(random_actions(1, num_envs=2))
    for i in range(2):
        np.testing.assert_array_equal(obs["images"][i], alone[i][2]["images"])
    assert "OpenGL" in envs.renderer_name()
    assert list(envs.replay([])) == []
    envs.close()


@libero
def test_seeds_without_episodes_are_one_an_environment():
    envs = LiberoVectorEnv(SETTINGS | {"settle_steps": 0}, num_envs=2, num_workers=1)
    obs, _ = envs.reset(seed=5)
    states = envs.episode_states()
    assert [state["episode"]["seed"] for state in states] == [5, 6]
    again, _ = envs.reset(seed=[6, 5])
    np.testing.assert_array_equal(again["images"], obs["images"][::-1])
    envs.close()


@libero
def test_workers_do_not_run_the_main_script_and_close_leaves_nothing(capfd, tmp_path, monkeypatch):
    marker, script = tmp_path / "marker", tmp_path / "script.py"
    script.write_text(f"open({str(marker)!r}, 'w')")  # stands for a script that imports torch
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    envs = make_vector_env(config_from_dict({"env": {"image_size": SIZE, "settle_steps": 0}}, "test"), 1)
    envs.reset(seed=[0])
    pids = [process.pid for process in envs.processes]
    envs.close()
    assert wait_until_gone(pids) == [] and not marker.exists()
    captured = capfd.readouterr()
    assert "EGL" not in captured.err and "robosuite" not in captured.err and "[info]" not in captured.out


def test_closing_while_answers_are_awaited_does_not_wait_for_them():
    """As Ctrl-C in the middle of a step leaves it: one worker's answer has come, the other's has not."""
    envs = LiberoVectorEnv(SETTINGS, num_envs=2, num_workers=2)
    for worker in range(2):
        envs.workers.ask(worker, "renderer_name")
    envs.workers.wait(first=True)
    start = time.monotonic()
    envs.close()
    assert time.monotonic() - start < 5 and not any(process.is_alive() for process in envs.processes)


def test_wrong_numbers_are_refused():
    envs = LiberoVectorEnv(SETTINGS, num_envs=3, num_workers=8)
    assert len(envs.processes) == 3  # no worker without an environment
    with pytest.raises(ValueError, match=r"shape \[2, 8, 7\], expected \[3, 8, 7\]"):
        envs.step(random_actions(0, num_envs=2))
    with pytest.raises(ValueError, match="2 episode states for 3 environments"):
        envs.restore_episodes([None, None])
    envs.close()


def test_settings_reach_the_environments():
    values = {"task_suite": "libero_goal", "task_ids": [3, 1], "image_size": 72, "settle_steps": 4, "render": "fast"}
    values |= {"max_steps": 77, "num_workers": 2, "simulators_per_worker": 3, "model_cache_gb": 1.5}
    values |= {"physics": "fast", "step_timeout_s": 7, "build_timeout_s": 70, "worker_replacements": 2}
    config = config_from_dict(
        {
            "env": values,
            "policy": {"chunk_size": 5, "num_images": 2},
            "algorithm": {"gamma": 0.9, "bootstrap_truncated": False},
        },
        "test",
    )
    for evaluation, quality, max_steps in ((False, "fast", 77), (True, "exact", 300)):
        envs = make_vector_env(config, 5, evaluation=evaluation)
        assert envs.num_workers == len(envs.processes) == 2
        assert envs.workers.patience == Patience(step_s=7, build_s=70, replacements=2)
        worker = envs.workers.makers[1]()
        assert list(worker.envs) == [4, 2]  # the end of the round 0 3 1 4 2
        assert (worker.simulators.limit, worker.simulators.cache_gb) == (2, 1.5)  # no more than there are tasks
        env = worker.envs[4]
        assert envs.single_observation_space["images"].shape == (2, 72, 72, 3)
        assert envs.single_action_space.shape == (5, 7)
        assert (env.task_suite, env.default_task_id, env.settle_steps) == ("libero_goal", 3, 4)
        assert (env.max_steps, env.gamma, env.bootstrap_truncated) == (max_steps, 0.9, False)
        assert (env.render_quality, env.physics) == (quality, quality) and envs.shown == Shown()
        envs.close()
    transform = OpenVLAImageTransform(56, center_crop=False)
    envs = make_vector_env(config, 2, image_transform=transform)
    assert envs.workers.makers[0]().shown == envs.shown == Shown(transform)
    assert envs.single_observation_space["images"].shape == (2, 56, 56, 3)
    envs.close()


@pytest.mark.parametrize(
    ("cores", "num_envs", "overlap", "num_workers"), [(8, 4, False, 4), (8, 4, True, 2), (2, 5, True, 2)]
)
def test_there_are_as_many_workers_as_can_work(monkeypatch, cores, num_envs, overlap, num_workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    envs = make_vector_env(config_from_dict({}, "test"), num_envs, overlap=overlap)
    assert len(envs.processes) == num_workers
    assert envs.workers.makers[0]().simulators.limit == envs.simulators_per_worker == envs.held.limit == 1  # one task
    envs.close()


@pytest.mark.parametrize(
    ("num_envs", "num_workers", "num_tasks", "gigabytes", "kept"),
    [
        (8, 2, 1, 64, 1),  # no more than there are
        (8, 2, 10, 64, 10),  # (64 / 3 / 2 - 0.4) / 0.6 = 17
        (8, 2, 10, 24, 6),  # (8 / 2 - 0.4) / 0.6 = 6
        (8, 2, 10, 2, 4),  # less than its environments can play at once would build at every turn
        (16, 16, 90, 192, 6),  # (64 / 16 - 0.4) / 0.6
    ],
)
def test_simulators_are_kept_where_a_third_of_the_memory_has_room(num_envs, num_workers, num_tasks, gigabytes, kept):
    config = config_from_dict({"env": {"task_suite": "libero_90", "task_ids": list(range(num_tasks))}}, "test")
    assert simulators_kept(config, num_envs, num_workers, gigabytes * 10**9) == kept
    at_once = min(num_tasks, num_envs // num_workers)  # a task of an evaluation is played to its end
    assert simulators_kept(config, num_envs, num_workers, gigabytes * 10**9, evaluation=True) == at_once


@pytest.mark.parametrize(("evaluation", "kept"), [(False, 10), (True, 2)])
def test_an_evaluation_keeps_fewer_simulators_than_the_training(monkeypatch, evaluation, kept):
    monkeypatch.setattr("vla_rl.simulation.vector_env.available_memory", lambda: 64 * 10**9)
    config = config_from_dict({"env": {"task_ids": list(range(10)), "num_workers": 2}}, "test")
    with closing(make_vector_env(config, 4, evaluation=evaluation)) as envs:
        assert envs.workers.makers[0]().simulators.limit == envs.simulators_per_worker == envs.held.limit == kept


@pytest.mark.parametrize(("render", "cores", "given", "seen"), [
    ("fast", 1, None, "0"), ("fast", 2, None, None), ("exact", 1, None, None), ("fast", 1, "3", "3"),
])  # fmt: skip
def test_fast_images_are_drawn_in_one_thread_where_workers_fill_the_cores(monkeypatch, render, cores, given, seen):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("LP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("LP_NUM_THREADS", given)
    envs = LiberoVectorEnv(SETTINGS | {"render": render}, num_envs=1, num_workers=1)
    assert envs.renderer_name() is None  # it has started
    with open(f"/proc/{envs.processes[0].pid}/environ", "rb") as file:
        environment = dict(entry.split(b"=", 1) for entry in file.read().split(b"\0") if entry)
    value = environment.get(b"LP_NUM_THREADS")
    assert (value and value.decode()) == seen and environment[b"OMP_NUM_THREADS"] == b"1"
    assert os.environ.get("LP_NUM_THREADS") == given
    envs.close()
