"""LiberoEnv: chunks, ends, restored episodes, and environments that share a simulator.

That its simulator is stock LIBERO's is shown in test_simulator.py. A process has one current GL context: the stock
environment runs first and is closed.
"""

import dataclasses
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.simulation import stock_libero
from vla_rl.simulation import libero_env
from vla_rl.simulation.libero_env import LiberoEnv, Simulators, quat_to_axis_angle
from vla_rl.simulation.suites import load_benchmark, task_languages
from vla_rl.types import ACTION_DIM, Episode

libero = pytest.mark.libero
SIZE, CHUNK = stock_libero.SIZE, 8
FIXED = Episode(task_id=4, initial_state=7, seed=3)
RANDOM = Episode(task_id=4, initial_state=None, seed=11)
OTHER_TASK = Episode(task_id=2, initial_state=None, seed=12)
REST = np.tile(np.float32([0, 0, 0, 0, 0, 0, -1]), (CHUNK, 1))


def random_actions(seed, chunks=2):
    """[chunks, C, 7]; the gripper closes and opens."""
    return np.random.default_rng(seed).uniform(-1, 1, (chunks, CHUNK, ACTION_DIM)).astype(np.float32)


def physics(env):
    """Everything that the next step depends on."""
    state = env._state
    arrays = [np.ravel(value) for value in (*state.arrays.values(), state.finger_command, state.goal_ori)]
    return np.concatenate([*arrays, [state.time, state.outdated, *state.clock]])


def run(env, episode, actions):
    """(physics, images, proprio) after the reset and after each chunk."""
    obs, _ = env.reset(options={"episode": episode})
    rows = [(physics(env), obs["images"], obs["proprio"])]
    for chunk in actions:
        obs, *_ = env.step(chunk)
        rows.append((physics(env), obs["images"], obs["proprio"]))
    return rows


def assert_equal_rows(rows, expected):
    assert len(rows) == len(expected)
    for t, (row, other) in enumerate(zip(rows, expected, strict=True)):
        for name, value, wanted in zip(("physics", "images", "proprio"), row, other, strict=True):
            np.testing.assert_array_equal(value, wanted, err_msg=f"{name} after {t} chunks")


@pytest.fixture(scope="module")
def stock():
    """Observations of FIXED in the stock environment, after the reset and after each of two chunks."""
    from robosuite.utils.transform_utils import quat2axisangle

    env = stock_libero.make("libero_spatial", 4)
    actions = random_actions(0).reshape(-1, ACTION_DIM).astype(np.float64)
    rows = stock_libero.play(env, "libero_spatial", FIXED, actions, render_every=CHUNK)
    env.close()
    observations = []
    for row in rows[::CHUNK]:
        proprio = np.concatenate([row.eef_pos, quat2axisangle(row.eef_quat.copy()), row.gripper_qpos])
        observations.append({"images": np.rot90(row.images, 2, axes=(1, 2)), "proprio": proprio.astype(np.float32)})
    return observations


@pytest.fixture(scope="module")
def env(stock):
    env = LiberoEnv("libero_spatial", (4, 2), chunk_size=CHUNK, num_images=2, image_size=SIZE)
    yield env
    env.close()


@pytest.fixture
def renders(env, monkeypatch):
    """Names of the cameras rendered since the fixture was made."""
    env.reset(options={"episode": FIXED})
    env._simulators.get("libero_spatial", 4, env.cameras, SIZE, False).settled.clear()
    renderer = env.simulator.renderer
    names, render = [], renderer.render
    monkeypatch.setattr(renderer, "render", lambda camera: names.append(camera) or render(camera))
    return names


@libero
def test_observations_equal_those_of_the_stock_environment(env, stock):
    rows = run(env, FIXED, random_actions(0))
    for (_, images, proprio), expected in zip(rows, stock, strict=True):
        np.testing.assert_array_equal(images, expected["images"])
        np.testing.assert_array_equal(proprio, expected["proprio"])


@libero
def test_placement_depends_on_the_seed_and_repeats_with_it(env):
    first = run(env, Episode(4, None, 1), [])
    other = run(env, Episode(4, None, 2), [])
    assert_equal_rows(run(env, Episode(4, None, 1), []), first)
    assert np.abs(first[0][0] - other[0][0]).max() > 0.005  # metres: another place, not rounding
    env.reset(seed=1)  # no episode: a random placement of the first task with this seed
    np.testing.assert_array_equal(physics(env), first[0][0])
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
    file = load_benchmark("libero_spatial").get_task_bddl_file_path(4)
    assert os.path.basename(file) == obs["instruction"].replace(" ", "_") + ".bddl"
    # right way up: the wooden table in the lower half is brighter than the robot's wall in the upper
    agentview = obs["images"][0].astype(float)
    assert agentview[SIZE // 2 :].mean() > agentview[: SIZE // 2].mean() + 20


@libero
def test_step_limit_inside_a_chunk_executes_the_remaining_steps_only(env, renders, monkeypatch):
    monkeypatch.setattr(env, "max_steps", 11)
    env.reset(options={"episode": FIXED})
    start = env.simulator.data.time
    _, _, terminated, truncated, info = env.step(REST)
    assert (terminated, truncated, info) == (False, False, {"steps": 8, "success": False})
    del renders[:]
    obs, reward, terminated, truncated, info = env.step(REST)
    assert (reward, terminated, truncated, info) == (0.0, False, True, {"steps": 3, "success": False})
    assert env.simulator.data.time - start == pytest.approx(11 * 0.05)  # 20 Hz
    assert renders == ["agentview", "robot0_eye_in_hand"]

    before = physics(env)
    again, reward, terminated, truncated, info = env.step(random_actions(5)[0])
    assert (reward, terminated, truncated, info) == (0.0, False, True, {"steps": 0, "success": False})
    np.testing.assert_array_equal(physics(env), before)
    np.testing.assert_array_equal(again["images"], obs["images"])
    assert len(renders) == 2


def drop_bowl_on_plate(env):
    """Puts the bowl 10 cm above the plate: it lands, and so the task succeeds, some steps later (free fall: 0.14 s)."""
    env.reset(options={"episode": FIXED})
    sim = env.simulator.env.sim
    plate = sim.data.body_xpos[sim.model.body_name2id("plate_1_main")]
    bowl = sim.data.get_joint_qpos("akita_black_bowl_1_joint0").copy()
    bowl[:3] = np.add(plate, [0, 0, 0.1])
    sim.data.set_joint_qpos("akita_black_bowl_1_joint0", bowl)


@libero
def test_success_inside_a_chunk_ends_it(env, renders, monkeypatch):
    drop_bowl_on_plate(env)
    start = env.simulator.data.time
    del renders[:]
    obs, reward, terminated, truncated, info = env.step(REST)
    steps = info["steps"]
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    assert 0.14 / 0.05 <= steps < CHUNK
    assert env.simulator.data.time - start == pytest.approx(steps * 0.05)
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
    restored = env.restore_episode(state)
    assert renders == ["agentview", "robot0_eye_in_hand"]
    np.testing.assert_array_equal(restored["images"], obs["images"])
    np.testing.assert_array_equal(restored["proprio"], obs["proprio"])
    obs, *_ = env.step(actions[2])
    assert_equal_rows([(physics(env), obs["images"], obs["proprio"])], expected[-1:])


@libero
def test_restored_start_and_end_equal_the_original(env, monkeypatch):
    obs, _ = env.reset(options={"episode": FIXED})
    np.testing.assert_array_equal(env.restore_episode(env.episode_state())["images"], obs["images"])

    # success at the third step of a chunk, by decree: a dropped bowl is not part of an episode's state
    env.reset(options={"episode": FIXED})
    end = env._state.time + 2.5 * 0.05
    monkeypatch.setattr(type(env.simulator.env), "_check_success", lambda self: self.sim.data.time > end)
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
def test_fast_rendering_changes_pixels_only(env):
    exact = run(env, FIXED, random_actions(0))
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
@pytest.mark.parametrize(("limit", "decisions"), [(2, 4), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_environments_that_share_simulators_play_as_if_alone(env, limit, decisions):
    """Also where one simulator fewer is kept than there are tasks, so that each change of task builds one anew."""
    actions, episodes = random_actions(8, chunks=4)[:decisions], [FIXED, OTHER_TASK, RANDOM]
    alone = [run(env, episode, actions) for episode in episodes]
    assert env.reset(options={"episode": OTHER_TASK})[0]["instruction"] == task_languages("libero_spatial")[2]
    env.close()
    shared = Simulators(limit, cache_gb=3)
    settings = {"chunk_size": CHUNK, "num_images": 2, "image_size": SIZE, "simulators": shared}
    envs = [LiberoEnv("libero_spatial", **settings) for _ in episodes]
    rows = [[row] for one, episode in zip(envs, episodes, strict=True) for row in run(one, episode, [])]
    for chunk in actions:
        for one, seen in zip(envs, rows, strict=True):
            obs, *_ = one.step(chunk)
            seen.append((physics(one), obs["images"], obs["proprio"]))
    assert len(shared.kept) == limit
    for seen, expected in zip(rows, alone, strict=True):
        assert_equal_rows(seen, expected[: len(seen)])
    shared.close()


@libero
def test_a_reset_that_fails_leaves_the_others_their_episodes(env, monkeypatch):
    """It has spoilt the simulator that they share: nobody's state is in it."""
    actions = random_actions(9, chunks=2)
    expected = run(env, RANDOM, actions)
    shared = env._simulators.get("libero_spatial", 4, env.cameras, SIZE, False)
    other = LiberoEnv(
        "libero_spatial", (4,), chunk_size=CHUNK, num_images=2, image_size=SIZE, simulators=env._simulators
    )
    env.reset(options={"episode": RANDOM})
    env.step(actions[0])

    def spoil(*_):
        shared.simulator.data.qpos[:] += 0.1
        raise RuntimeError("no placement")

    with monkeypatch.context() as patch:
        patch.setattr(shared.simulator, "reset", spoil)
        with pytest.raises(RuntimeError, match="no placement"):
            other.reset(seed=77)
    obs, *_ = env.step(actions[1])
    assert_equal_rows([(physics(env), obs["images"], obs["proprio"])], expected[-1:])


@libero
def test_actions_are_executed_as_they_are_recorded(env):
    actions = np.random.default_rng(1).uniform(-1, 1, (CHUNK, ACTION_DIM))  # float64
    env.reset(options={"episode": RANDOM})
    env.step(actions)
    first = physics(env)
    env.restore_episode(env.episode_state())
    np.testing.assert_array_equal(physics(env), first)


@libero
def test_a_start_that_was_settled_before_is_not_settled_again(env, renders, monkeypatch):
    first = run(env, RANDOM, random_actions(0))
    del renders[:]
    monkeypatch.setattr(env.simulator, "reset", None)  # a call would fail
    again = run(env, RANDOM, random_actions(0))
    assert_equal_rows(again, first)
    assert renders == ["agentview", "robot0_eye_in_hand"] * 2  # of the two chunks
    kept = env._simulators.get("libero_spatial", 4, env.cameras, SIZE, False).settled
    assert len(kept) <= libero_env.SETTLED_STARTS
    monkeypatch.undo()
    monkeypatch.setattr(env, "settle_steps", 3)  # another start
    assert np.abs(run(env, RANDOM, [])[0][0] - first[0][0]).max() > 0


def test_axis_angle_of_known_rotations():
    half = math.sqrt(0.5)
    np.testing.assert_allclose(quat_to_axis_angle(np.array([0, 0, half, half])), [0, 0, math.pi / 2])
    np.testing.assert_allclose(quat_to_axis_angle(np.array([1.0, 0, 0, 0])), [math.pi, 0, 0])
    np.testing.assert_allclose(quat_to_axis_angle(np.array([0, 0, 0, 1.0])), [0, 0, 0])


def test_import_and_construction_load_no_torch_and_no_simulator():
    code = (
        "import sys; from vla_rl.simulation.libero_env import LiberoEnv; LiberoEnv('libero_goal', chunk_size=1);"
        "print([m for m in ('torch', 'mujoco', 'robosuite', 'libero') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_step_before_reset_is_refused():
    import gymnasium

    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        LiberoEnv("libero_goal", chunk_size=8).step(REST)


@libero
def test_a_replay_shows_every_step_and_ends_as_the_episode_did(env):
    actions = random_actions(0)
    rows = run(env, FIXED, actions)
    before = physics(env)
    frames, success, instruction = env.replay(FIXED, np.concatenate(actions))
    assert frames.shape == (len(actions) * CHUNK + 1, SIZE, SIZE, 3) and frames.dtype == np.uint8 and success is False
    for frame, (_, images, _) in zip(frames[::CHUNK], rows, strict=True):
        np.testing.assert_array_equal(frame, images[0])  # of the agent's camera, where a chunk ends
    np.testing.assert_array_equal(physics(env), before)
    assert instruction == task_languages("libero_spatial")[4]
    assert (frames[1:] != frames[:-1]).any(axis=(1, 2, 3)).all()


@libero
def test_a_replay_ends_where_its_episode_does(env, monkeypatch):
    monkeypatch.setattr(env, "max_steps", 3)
    frames, success, _ = env.replay(FIXED, np.zeros((5, ACTION_DIM)))
    assert len(frames) == 4 and not success
    with pytest.raises(ValueError, match="actions have shape"):
        env.replay(FIXED, np.zeros((5, 6)))
