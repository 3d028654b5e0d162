"""LiberoEnv against stock LIBERO (OffScreenRenderEnv with hard resets), and the vector of worker processes.

A process has one GL context: the stock environment runs first and is closed, and tests that build a second simulator
close the shared one, which then rebuilds itself at its next reset.
"""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from vla_rl import libero_env
from vla_rl.config import NUM_FIXED_STATES, TASK_SUITES, config_from_dict
from vla_rl.libero_env import LiberoEnv, make_vector_env, num_tasks, quat_to_axis_angle, task_languages
from vla_rl.types import ACTION_DIM, Episode, Observation

libero = pytest.mark.libero
SIZE, CHUNK = 64, 8
# Task 4 starts with a bowl in the drawer of a cabinet that moves: a soft reset that does not put the cabinet back first
# leaves the bowl 26 cm off. In task 2 this seed shows the warm start: without its two forward passes 8e-13 off.
FIXED = Episode(task_id=4, initial_state=7, seed=3)
RANDOM = Episode(task_id=4, initial_state=None, seed=11)
OTHER_TASK = Episode(task_id=2, initial_state=None, seed=12)
REST = np.tile(np.float32([0, 0, 0, 0, 0, 0, -1]), (CHUNK, 1))


def random_actions(seed, chunks=2):
    """[chunks, C, 7]; the gripper closes and opens."""
    return np.random.default_rng(seed).uniform(-1, 1, (chunks, CHUNK, ACTION_DIM)).astype(np.float32)


def physics(env):
    """Everything that the next step depends on: position, velocity, warm start, gripper command, fixtures."""
    sim = env.sim
    gripper = env.robots[0].gripper.current_action
    parts = sim.data.qpos, sim.data.qvel, sim.data.qacc_warmstart, gripper, sim.model.body_pos, sim.model.site_rgba
    return np.concatenate([np.ravel(part) for part in parts])


def run(env, episode, actions):
    """(physics, images, proprio) after the reset and after each chunk."""
    obs, _ = env.reset(options={"episode": episode})
    rows = [(physics(env._simulator), obs["images"], obs["proprio"])]
    for chunk in actions:
        obs, *_ = env.step(chunk)
        rows.append((physics(env._simulator), obs["images"], obs["proprio"]))
    return rows


def assert_equal_rows(rows, expected):
    assert len(rows) == len(expected)
    for t, (row, other) in enumerate(zip(rows, expected, strict=True)):
        for name, value, wanted in zip(("physics", "images", "proprio"), row, other, strict=True):
            np.testing.assert_array_equal(value, wanted, err_msg=f"{name} after {t} chunks")


@pytest.fixture(scope="module")
def stock():
    """The same episodes in the stock environment: it rebuilds itself at each reset and renders each step."""
    libero_env.prepare_environment()
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    benchmark = libero_env.load_benchmark("libero_spatial")

    def row(env, obs):
        images = np.stack([np.rot90(obs[f"{name}_image"], 2) for name in ("agentview", "robot0_eye_in_hand")])
        angle = quat2axisangle(obs["robot0_eef_quat"].copy())
        proprio = np.concatenate([obs["robot0_eef_pos"], angle, obs["robot0_gripper_qpos"]])
        return physics(env.env), images, proprio.astype(np.float32)

    def play(env, episode, actions):
        # Stock adds the drawer's sampler once more at each hard reset, and so draws other places each time. Once is meant.
        env.env.object_property_initializers.clear()
        env.seed(episode.seed)
        obs = env.reset()
        if episode.initial_state is not None:
            obs = env.set_init_state(benchmark.get_task_init_states(episode.task_id)[episode.initial_state])
        for _ in range(10):
            obs, *_ = env.step([0, 0, 0, 0, 0, 0, -1])
        rows = [row(env, obs)]
        for chunk in actions:
            for action in chunk:
                obs, *_ = env.step(action.tolist())
            rows.append(row(env, obs))
        return rows

    plays = {FIXED: random_actions(0), RANDOM: random_actions(1, chunks=1), OTHER_TASK: []}
    rows = {}
    for task_id in (4, 2):
        env = OffScreenRenderEnv(
            bddl_file_name=benchmark.get_task_bddl_file_path(task_id), camera_heights=SIZE, camera_widths=SIZE
        )
        rows |= {episode: play(env, episode, plays[episode]) for episode in plays if episode.task_id == task_id}
        env.close()
    return rows


@pytest.fixture(scope="module")
def env(stock):
    env = LiberoEnv("libero_spatial", (4, 2), chunk_size=CHUNK, num_images=2, image_size=SIZE)
    yield env
    env.close()


@pytest.fixture
def renders(env, monkeypatch):
    """Names of the cameras rendered since the fixture was made."""
    env.reset(options={"episode": FIXED})
    names, render = [], env._simulator.sim.render
    monkeypatch.setattr(
        env._simulator.sim, "render", lambda **kwargs: names.append(kwargs["camera_name"]) or render(**kwargs)
    )
    return names


@libero
def test_fixed_state_and_chunks_equal_the_stock_environment(env, stock):
    assert_equal_rows(run(env, FIXED, random_actions(0)), stock[FIXED])


@libero
def test_random_placement_and_chunk_equal_the_stock_environment(env, stock):
    assert_equal_rows(run(env, RANDOM, random_actions(1, chunks=1)), stock[RANDOM])


@libero
def test_reset_forgets_earlier_episodes(env, stock):
    for seed in range(3):
        env.reset(seed=100 + seed)
        env._simulator.sim.data.set_joint_qpos("flat_stove_1_button", 1.0)  # turned on: LIBERO shows the burner
        for chunk in random_actions(seed):
            env.step(chunk)
    assert_equal_rows(run(env, FIXED, random_actions(0)), stock[FIXED])


@libero
def test_placement_depends_on_the_seed_and_repeats_with_it(env):
    first = run(env, Episode(4, None, 1), [])
    other = run(env, Episode(4, None, 2), [])
    assert_equal_rows(run(env, Episode(4, None, 1), []), first)
    assert np.abs(first[0][0] - other[0][0]).max() > 0.005  # metres: another place, not rounding
    env.reset(seed=1)  # no episode: a random placement of the first task with this seed
    np.testing.assert_array_equal(physics(env._simulator), first[0][0])
    env.reset()
    assert env.episode_state()["episode"]["initial_state"] is None
    assert env.episode_state()["episode"]["seed"] != 1


@libero
def test_observation_fits_its_space_and_names_the_task(env):
    obs, info = env.reset(options={"episode": dataclasses.asdict(FIXED)})
    assert env.observation_space.contains(obs)
    assert obs["images"].flags.c_contiguous
    # the BDDL file's name, which is not what the code reads
    assert obs["instruction"] == info["instruction"]
    file = libero_env.load_benchmark("libero_spatial").get_task_bddl_file_path(4)
    assert os.path.basename(file) == obs["instruction"].replace(" ", "_") + ".bddl"
    # right way up: the wooden table in the lower half is brighter than the robot's wall in the upper
    agentview = obs["images"][0].astype(float)
    assert agentview[SIZE // 2 :].mean() > agentview[: SIZE // 2].mean() + 20


@libero
def test_step_limit_inside_a_chunk_executes_the_remaining_steps_only(env, renders, monkeypatch):
    monkeypatch.setattr(env, "max_steps", 11)
    env.reset(options={"episode": FIXED})
    start = env._simulator.sim.data.time
    _, _, terminated, truncated, info = env.step(REST)
    assert (terminated, truncated, info) == (False, False, {"steps": 8, "success": False})
    del renders[:]
    obs, reward, terminated, truncated, info = env.step(REST)
    assert (reward, terminated, truncated, info) == (0.0, False, True, {"steps": 3, "success": False})
    assert env._simulator.sim.data.time - start == pytest.approx(11 * 0.05)  # 20 Hz
    assert renders == ["agentview", "robot0_eye_in_hand"]

    before = physics(env._simulator)
    again, reward, terminated, truncated, info = env.step(random_actions(5)[0])
    assert (reward, terminated, truncated, info) == (0.0, False, True, {"steps": 0, "success": False})
    np.testing.assert_array_equal(physics(env._simulator), before)
    np.testing.assert_array_equal(again["images"], obs["images"])
    assert len(renders) == 2


def drop_bowl_on_plate(env):
    """Puts the bowl 10 cm above the plate: it lands, and so the task succeeds, some steps later (free fall: 0.14 s)."""
    env.reset(options={"episode": FIXED})
    sim = env._simulator.sim
    plate = sim.data.body_xpos[sim.model.body_name2id("plate_1_main")]
    bowl = sim.data.get_joint_qpos("akita_black_bowl_1_joint0").copy()
    bowl[:3] = np.add(plate, [0, 0, 0.1])
    sim.data.set_joint_qpos("akita_black_bowl_1_joint0", bowl)


@libero
def test_success_inside_a_chunk_ends_it(env, renders, monkeypatch):
    drop_bowl_on_plate(env)
    start = env._simulator.sim.data.time
    del renders[:]
    obs, reward, terminated, truncated, info = env.step(REST)
    steps = info["steps"]
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    assert 0.14 / 0.05 <= steps < CHUNK
    assert env._simulator.sim.data.time - start == pytest.approx(steps * 0.05)
    assert renders == ["agentview", "robot0_eye_in_hand"]
    assert np.abs(obs["images"][0].astype(int) - run(env, FIXED, [])[0][1][0]).max() > 50  # not the image of the start

    drop_bowl_on_plate(env)
    env.step(REST)
    again, reward, terminated, truncated, info = env.step(REST)
    assert (reward, terminated, truncated, info) == (0.0, True, False, {"steps": 0, "success": True})
    np.testing.assert_array_equal(again["images"], obs["images"])

    monkeypatch.setattr(env, "max_steps", steps)  # success on the very last step is success
    drop_bowl_on_plate(env)
    _, reward, terminated, truncated, info = env.step(REST)
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"steps": steps, "success": True})


@libero
def test_reset_and_chunk_render_each_camera_once(env, renders):
    env.reset(options={"episode": RANDOM})
    assert renders == ["agentview", "robot0_eye_in_hand"]
    env.step(REST)
    assert renders == ["agentview", "robot0_eye_in_hand"] * 2


@libero
def test_restored_episode_continues_bit_for_bit(env, renders):
    actions = random_actions(2, chunks=3)
    expected = run(env, RANDOM, actions)
    obs, _ = env.reset(options={"episode": RANDOM})
    for chunk in actions[:2]:
        obs, *_ = env.step(chunk)
    state = env.episode_state()
    assert state["actions"].shape == (16, 7) and state["actions"].dtype == np.float32
    run(env, FIXED, actions[2:])

    del renders[:]
    restored = env.restore_episodes([state])
    assert renders == ["agentview", "robot0_eye_in_hand"]
    np.testing.assert_array_equal(restored["images"], obs["images"])
    np.testing.assert_array_equal(restored["proprio"], obs["proprio"])
    obs, *_ = env.step(actions[2])
    assert_equal_rows([(physics(env._simulator), obs["images"], obs["proprio"])], expected[-1:])


@libero
def test_restored_start_and_end_equal_the_original(env, monkeypatch):
    obs, _ = env.reset(options={"episode": FIXED})
    np.testing.assert_array_equal(env.restore_episode(env.episode_state())["images"], obs["images"])

    # success at the third step of a chunk, by decree: a dropped bowl is not part of an episode's state
    check, calls = env._simulator._check_success, []
    monkeypatch.setattr(
        type(env._simulator), "_check_success", lambda self: check() or calls.append(0) or len(env._actions) >= 2
    )
    env.reset(options={"episode": FIXED})
    obs, _, terminated, *_ = env.step(random_actions(4)[0])
    state = env.episode_state()
    assert terminated and len(state["actions"]) == 3
    env.reset(options={"episode": RANDOM})
    np.testing.assert_array_equal(env.restore_episode(state)["images"], obs["images"])
    assert env.step(REST)[1:] == (0.0, True, False, {"steps": 0, "success": True})


@libero
def test_impossible_requests_are_refused(env):
    with pytest.raises(ValueError, match=r"initial_state=50 does not exist.*0 to 49"):
        env.reset(options={"episode": Episode(4, 50, 0)})
    with pytest.raises(ValueError, match="task_id=10 outside libero_spatial"):
        env.reset(options={"episode": Episode(10, 0, 0)})
    with pytest.raises(ValueError, match="no episode for environment 0"):
        env.reset(options={"episodes": {1: FIXED}})
    env.reset(options={"episode": FIXED})
    with pytest.raises(ValueError, match=r"shape \[7\], expected \[8, 7\]"):
        env.step(np.zeros(7))
    with pytest.raises(ValueError, match=r"not finite at \[2, 3\]"):
        actions = REST.copy()
        actions[2, 3] = np.nan
        env.step(actions)


@libero
def test_task_can_be_switched_and_fast_rendering_changes_pixels_only(env, stock):
    exact = run(env, FIXED, random_actions(0))
    assert_equal_rows(run(env, OTHER_TASK, []), stock[OTHER_TASK])
    assert env.reset(options={"episode": OTHER_TASK})[0]["instruction"] == task_languages("libero_spatial")[2]
    env.close()

    fast_env = LiberoEnv("libero_spatial", chunk_size=CHUNK, num_images=1, image_size=SIZE, render="fast")
    fast = run(fast_env, FIXED, random_actions(0))
    fast_env.close()
    for (physics_exact, images, proprio), (physics_fast, images_fast, proprio_fast) in zip(exact, fast, strict=True):
        np.testing.assert_array_equal(physics_exact, physics_fast)
        np.testing.assert_array_equal(proprio, proprio_fast)
        difference = np.abs(images[0].astype(int) - images_fast[0])
        assert 0 < difference.mean() < 10  # grey levels: the same scene


@libero
def test_suites_match_the_package():
    for suite, (tasks, _) in TASK_SUITES.items():
        assert num_tasks(suite) == tasks
        states = libero_env.load_benchmark(suite).get_task_init_states(tasks - 1)
        assert len(states) == NUM_FIXED_STATES
        space = LiberoEnv(suite, chunk_size=1).observation_space["instruction"]
        assert all(text in space for text in task_languages(suite))


def test_axis_angle_of_known_rotations():
    half = math.sqrt(0.5)
    np.testing.assert_allclose(quat_to_axis_angle(np.array([0, 0, half, half])), [0, 0, math.pi / 2])
    np.testing.assert_allclose(quat_to_axis_angle(np.array([1.0, 0, 0, 0])), [math.pi, 0, 0])
    np.testing.assert_allclose(quat_to_axis_angle(np.array([0, 0, 0, 1.0])), [0, 0, 0])


def test_import_and_construction_load_no_torch_and_no_simulator():
    code = (
        "import sys; from vla_rl.libero_env import LiberoEnv; LiberoEnv('libero_goal', chunk_size=1);"
        "print([m for m in ('torch', 'mujoco', 'robosuite', 'libero') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_missing_egl_names_the_packages(monkeypatch):
    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(libero_env, "load_benchmark", lambda suite: None)
    monkeypatch.setattr(libero_env.ctypes, "CDLL", no_library)
    with pytest.raises(RuntimeError, match=r"libEGL\.so\.1.*\n.*apt-get install -y libegl1 libgl1 libgl1-mesa-dri"):
        libero_env.build_simulator("libero_spatial", 0, ["agentview"], 64, fast=False)


def test_step_before_reset_is_refused():
    import gymnasium

    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        LiberoEnv("libero_goal", chunk_size=8).step(REST)


def wait_until_gone(pids, timeout_s=10):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.05)
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@libero
def test_vector_env_resets_by_mask_restores_and_names_a_killed_worker(env, stock):
    env.close()
    config = config_from_dict(
        {"env": {"task_ids": [0, 1], "image_size": SIZE, "max_steps": 12}, "policy": {"num_images": 2}}, "test"
    )
    envs = make_vector_env(config, 2)
    pids, languages = [process.pid for process in envs.processes], task_languages("libero_spatial")
    obs, _ = envs.reset(options={"episodes": {0: FIXED, 1: Episode(1, 4, 0)}})
    assert Observation.from_vector_env(obs).instructions == (languages[4], languages[1])
    np.testing.assert_array_equal(obs["images"][0], stock[FIXED][0][1])
    assert obs["images"].shape == (2, 2, SIZE, SIZE, 3) and envs.observation_space.contains(obs)
    for pid in pids:
        with open(f"/proc/{pid}/maps") as maps:
            assert "libtorch" not in maps.read()

    actions = np.stack([random_actions(0)[0]] * 2)
    with pytest.raises(ValueError, match="not finite"):  # refused here: the workers live on
        envs.step(np.full_like(actions, np.nan))
    obs, *_ = envs.step(actions)
    np.testing.assert_array_equal(obs["images"][0], stock[FIXED][1][1])
    states = envs.episode_states()
    after, _, terminated, truncated, infos = envs.step(actions)
    assert infos["steps"].tolist() == [4, 4] and truncated.all() and not terminated.any()

    restored = envs.restore_episodes(states)
    np.testing.assert_array_equal(restored["images"], obs["images"])
    again, _, _, truncated, _ = envs.step(actions)
    np.testing.assert_array_equal(again["images"], after["images"])

    mask = np.array([False, True])
    obs, _ = envs.reset(options={"reset_mask": mask, "episodes": {1: FIXED}})
    np.testing.assert_array_equal(obs["images"][0], after["images"][0])  # left alone
    np.testing.assert_array_equal(obs["images"][1], stock[FIXED][0][1])
    assert obs["instruction"] == (languages[4], languages[4])
    _, _, _, truncated, infos = envs.step(actions)
    assert infos["steps"].tolist() == [0, 8] and truncated.tolist() == [True, False]

    os.kill(pids[0], signal.SIGINT)  # Ctrl-C reaches the workers too, and is the parent's to handle
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker 1 died \(SIGKILL; often out of memory.*lower rollout.num_envs"):
        envs.step(actions)
    assert envs.closed and wait_until_gone(pids) == []


@libero
def test_workers_do_not_run_the_main_script_and_close_leaves_nothing(env, capfd, tmp_path, monkeypatch):
    env.close()
    marker, script = tmp_path / "marker", tmp_path / "script.py"
    script.write_text(f"open({str(marker)!r}, 'w')")  # stands for a script that imports torch
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script))
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    envs = make_vector_env(config_from_dict({"env": {"image_size": SIZE, "settle_steps": 0}}, "test"), 1)
    envs.reset(seed=[0])
    pids = [process.pid for process in envs.processes]
    envs.close()
    assert wait_until_gone(pids) == [] and not marker.exists()
    captured = capfd.readouterr()
    assert "EGL" not in captured.err and "robosuite" not in captured.err and "[info]" not in captured.out


def test_closing_after_an_answer_was_half_read_does_not_wait_for_it():
    """As Ctrl-C in the middle of a step leaves it: one worker's answer has been read, the other's has not."""
    envs = make_vector_env(config_from_dict({}, "test"), 2)
    envs.call_async("episode_state")
    envs.parent_pipes[0].recv()
    closing = threading.Thread(target=envs.close, daemon=True)
    closing.start()
    closing.join(timeout=20)
    assert not closing.is_alive() and not any(process.is_alive() for process in envs.processes)


def test_settings_reach_the_environments():
    values = {"task_suite": "libero_goal", "task_ids": [3, 1], "image_size": 72, "settle_steps": 4, "render": "fast"}
    config = config_from_dict({"env": values, "policy": {"chunk_size": 5, "num_images": 2}}, "test")
    for render, expected in ((None, "fast"), ("exact", "exact")):
        envs = make_vector_env(config, 1, render=render)
        env = envs.env_fns[0]()
        assert envs.single_observation_space["images"].shape == (2, 72, 72, 3)
        assert envs.single_action_space.shape == (5, 7)
        assert (env.task_suite, env.default_task_id, env.settle_steps, env.max_steps) == ("libero_goal", 3, 4, 300)
        assert env.render_quality == expected
        envs.close()
