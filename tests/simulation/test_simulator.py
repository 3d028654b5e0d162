"""Simulator: states that are left and found again, success, rest after settling, errors, the observables' clock.

That it equals stock LIBERO bit for bit is shown in test_equal_to_stock.py.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.simulation.stock_libero import CAMERAS, REST, SIZE, random_actions, reset
from vla_rl.simulation import simulator
from vla_rl.simulation.libero_env import build_simulator
from vla_rl.simulation.simulator import SampleClock
from vla_rl.simulation.suites import fixed_state
from vla_rl.types import Episode, SimulationUnstable

pytestmark = pytest.mark.libero


SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


@pytest.mark.parametrize(
    ("suite", "tasks"),
    [("libero_spatial", [5]), *(pytest.param(suite, range(10), marks=pytest.mark.slow) for suite in SUITES)],
)
def test_everything_comes_to_rest(suite, tasks):
    """The fixed states hold objects above where they belong; with a MuJoCo that is too new a bowl slides off its ramekin."""
    for task in tasks:
        sim = build_simulator(suite, task, (), SIZE, fast=False)
        free = np.flatnonzero(sim.model.jnt_type == 0)  # [J], of movable objects
        places = sim.model.jnt_qposadr[free, None] + np.arange(3)
        velocities = sim.model.jnt_dofadr[free, None] + np.arange(3)
        for state in (0, 49):
            sim.reset(0, fixed_state(suite, task, state), render=False)
            before = sim.data.qpos[places]  # [J, 3]
            for _ in range(10):
                sim.step(REST, render=False)
            moved = sim.data.qpos[places] - before
            what = f"{suite} task {task} state {state}"
            assert np.linalg.norm(sim.data.qvel[velocities], axis=1).max() < 1e-3, f"{what}: still moving"  # m/s
            assert np.linalg.norm(moved[:, :2], axis=1).max() < 0.03, f"{what}: slid"  # m, sideways
            assert moved[:, 2].min() > -0.2 and moved[:, 2].max() < 0.06, f"{what}: fell off or rose"
        sim.close()


@pytest.fixture(scope="module")
def stove():
    """libero_goal 7, "turn on the stove": its goal is a joint, and the burner's site changes with it."""
    sim = build_simulator("libero_goal", 7, CAMERAS[:1], SIZE, fast=False)
    yield sim
    sim.close()


def test_success_is_liberos_and_the_burner_lights_up(stove):
    reset(stove, "libero_goal", Episode(7, 0, seed=0))
    assert not stove.step(REST, render=False)
    off = stove.model.site_rgba.copy()
    knob = stove.data.joint("flat_stove_1_button")
    knob.qpos = stove.model.joint("flat_stove_1_button").range[1]
    assert stove.step(REST, render=False)
    assert (stove.model.site_rgba != off).any()
    reset(stove, "libero_goal", Episode(7, 0, seed=0))
    np.testing.assert_array_equal(stove.model.site_rgba, off)


@pytest.mark.parametrize(
    ("suite", "task"), [("libero_spatial", 5), ("libero_object", 3), ("libero_goal", 7), ("libero_10", 2)]
)
def test_fast_physics_is_the_exact_one_to_rounding(suite, task):
    """After two seconds of a moving arm; stock's three solves a sub-step end a solver's tolerance apart from one."""
    actions, found = 0.5 * random_actions(9, 40), []
    for physics in ("exact", "fast"):
        sim = build_simulator(suite, task, (), SIZE, fast=True, physics=physics, cache_gb=3)
        reset(sim, suite, Episode(task, 3, seed=1))
        successes = [sim.step(action, render=False) for action in actions]
        found.append((sim.data.qpos.copy(), sim.eef_pos, sim.gripper_qpos, successes))
        sim.close()
    (exact, *observed, successes), (fast, *observed_fast, successes_fast) = found
    assert 0 < np.abs(exact - fast).max() < 1e-4  # m, rad
    np.testing.assert_allclose(np.concatenate(observed_fast), np.concatenate(observed), rtol=0, atol=1e-6)
    assert successes == successes_fast


@pytest.mark.parametrize("physics", ["exact", "fast"])
def test_every_part_of_a_state_counts_where_objects_tremble(physics):
    """In libero_object the last bits of qpos, of the solver's start and of the old torques show in the next step."""
    sim = build_simulator("libero_object", 3, (), SIZE, fast=False, physics=physics)
    actions = random_actions(5, 12)
    states = []
    reset(sim, "libero_object", Episode(3, 3, seed=1))
    for action in actions:
        states.append(sim.state())
        sim.step(action, render=False)
    states.append(sim.state())
    for seed, (state, action, wanted) in enumerate(zip(states, actions, states[1:], strict=False)):
        sim.reset(seed, None, render=False)  # another scene, another solver's start
        sim.step(-action, render=False)
        sim.set_state(state)
        for name, view in sim.arrays().items():
            np.testing.assert_array_equal(view, state.arrays[name], err_msg=name)
        sim.step(action, render=False)
        for name in ("qpos", "qvel"):
            np.testing.assert_array_equal(getattr(sim.data, name), wanted.arrays[name], err_msg=name)
    sim.close()


def test_a_state_is_left_and_found_again_bit_for_bit(stove):
    """What lets environments share a simulator: another episode in between changes nothing."""
    first, second = random_actions(5, 12), random_actions(6, 12)
    reset(stove, "libero_goal", Episode(7, 3, seed=1))
    for action in first[:4]:
        stove.step(action, render=True)
    state = stove.state()
    for action in first[4:]:
        stove.step(action, render=True)
    wanted, images = stove.state(), stove.images

    reset(stove, "libero_goal", Episode(7, None, seed=2))
    for action in second:
        stove.step(action, render=True)
    stove.set_state(state)
    np.testing.assert_array_equal(stove.images, state.images)
    for action in first[4:]:
        stove.step(action, render=True)
    assert_equal_states(stove.state(), wanted)
    np.testing.assert_array_equal(stove.images, images)


def test_a_state_right_after_the_reset_is_found_again(stove):
    """robosuite's new controller goes by its measurements of the start pose for one sub-step: they belong to the state."""
    stove.reset(4, None, render=True)
    state = stove.state()
    actions = random_actions(7, 3)
    for action in actions:
        stove.step(action, render=False)
    wanted = stove.state()
    reset(stove, "libero_goal", Episode(7, 3, seed=1))
    stove.set_state(state)
    for action in actions:
        stove.step(action, render=False)
    assert_equal_states(stove.state(), wanted)


def assert_equal_states(state, wanted):
    for name, value in wanted.arrays.items():
        np.testing.assert_array_equal(state.arrays[name], value, err_msg=name)
    assert (state.time, state.outdated, state.finger_command, state.clock) == (
        wanted.time, wanted.outdated, wanted.finger_command, wanted.clock,
    )  # fmt: skip
    np.testing.assert_array_equal(state.goal_ori, wanted.goal_ori)
    np.testing.assert_array_equal(state.eef_pos, wanted.eef_pos)


def test_quaternions_that_normalising_would_move_are_noticed_and_left_alone(stove):
    reset(stove, "libero_goal", Episode(7, 0, seed=0))
    before = stove.data.qpos.copy()
    for start in stove.model.jnt_qposadr[stove.model.jnt_type == 0] + 3:
        stove.data.qpos[start : start + 4] = [0.6, 0, 0.8, 0]
    assert stove.quaternions_stay()
    free = stove.model.jnt_qposadr[stove.model.jnt_type == 0][0] + 3
    stove.data.qpos[free : free + 4] = [1.0, 1e-3, 0, 0]
    assert not stove.quaternions_stay()
    np.testing.assert_array_equal(stove.data.qpos[free : free + 4], [1.0, 1e-3, 0, 0])  # left as it was
    stove.data.qpos[:] = before


@pytest.mark.parametrize("physics", ["exact", "fast"])
@pytest.mark.parametrize("speed", [1e5, np.inf, np.nan])
def test_physics_that_blows_up_is_told_and_a_reset_mends_it(stove, speed, physics, monkeypatch, capfd, caplog):
    monkeypatch.setattr(stove, "physics", physics)
    monkeypatch.setattr(stove.arm, "exact", physics == "exact")
    episode, actions = Episode(7, 3, seed=1), random_actions(8, 3)
    reset(stove, "libero_goal", episode)
    for action in actions:
        stove.step(action, render=False)
    wanted = stove.state()
    reset(stove, "libero_goal", episode)
    thrown = stove.model.jnt_dofadr[stove.model.jnt_type == 0][0]  # a movable object
    stove.data.qvel[thrown] = speed
    with pytest.raises(SimulationUnstable, match="the simulation is unstable: MuJoCo counts mjWARN_BADQ"):
        stove.step(REST, render=False)
    assert "MuJoCo: Nan, Inf or huge value" in caplog.text
    assert capfd.readouterr() == ("", "") and not Path("MUJOCO_LOG.TXT").exists()
    reset(stove, "libero_goal", episode)
    for action in actions:
        stove.step(action, render=False)
    assert_equal_states(stove.state(), wanted)


def test_a_joint_that_is_too_fast_is_told(stove):
    reset(stove, "libero_goal", Episode(7, 3, seed=1))
    stove.check_stable()
    stove.data.qvel[-1] = -2e3
    with pytest.raises(SimulationUnstable, match=r"a joint moves at 2e\+03 m/s or rad/s"):
        stove.check_stable()


def test_no_placement_is_an_error_that_names_the_way_out(stove, monkeypatch):
    def fail():
        raise simulator.RandomizationError("Cannot place all objects")

    monkeypatch.setattr(stove.env, "reset", fail)
    with pytest.raises(RuntimeError, match="no placement of the objects found in 100 tries; use another seed"):
        stove.reset(0, None, render=False)


def test_a_mistake_inside_the_reset_is_not_hidden(stove, monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr(stove.env, "reset", fail)
    with pytest.raises(ZeroDivisionError):
        stove.reset(0, None, render=False)


def test_clock_reads_once_a_control_step_as_robosuite_observables_do():
    from robosuite.utils.observables import Observable

    def sensor(cache):
        reads.append(step)
        return np.zeros(3)

    sensor.__modality__ = "proprio"
    for forced in (1, 2, 3):
        reads, ours, step = [], [], -1
        observable, clock = Observable("x", sensor, sampling_rate=20), SampleClock(1 / 20, 0.002)
        reads.clear()
        for step, force in enumerate([True] * forced + [False] * 25 * 400):
            observable.update(0.002, {}, force=force)
            if clock.update(force=force):
                ours.append(step)
        assert ours == reads and len(ours) > 400
