"""Expert: it solves tasks, also disturbed, by rules that always choose the same; where it grasps."""

import itertools

import numpy as np
import pytest

from tests.simulation.test_goals import settled
from vla_rl.run.task_suites import TASK_SUITES
from vla_rl.simulation import goals
from vla_rl.simulation.expert import Expert, clearance, grasps
from vla_rl.simulation.libero_env import REST


def play(sim, expert: Expert, steps: int, noise: float = 0.0) -> list[np.ndarray]:
    """The expert's actions until success."""
    random, actions = np.random.default_rng(0), []
    for _ in range(steps):
        actions.append(expert.act())
        disturbed = actions[-1] + np.append(noise * random.standard_normal(6), 0)
        if sim.step(np.clip(disturbed, -1, 1), render=False):
            return actions
    raise AssertionError(f"no success in {steps} steps; it is in phase {expert.phase}")


@pytest.mark.libero
@pytest.mark.parametrize("suite, task", [("libero_spatial", 6), ("libero_object", 1), ("libero_goal", 4)])
def test_solves_a_task_of_each_suite_the_same_way_each_time(suite, task):
    sim = settled(suite, task)
    start = sim.state()
    sim.set_state(start)  # body positions are then the same both times
    expert = Expert(sim)
    actions = play(sim, expert, TASK_SUITES[suite][1] * 2 // 3)
    away = goals.object_position(sim, expert.goal) - goals.goal_position(sim, expert.goal)
    assert np.linalg.norm(away[:2]) < 0.06, "LIBERO calls it a success elsewhere than where the goal is"  # m
    assert np.abs(actions).max() <= 1
    still = [np.abs(a[:6]).max() < 1e-4 and a[6] == b[6] for b, a in itertools.pairwise(actions)]
    assert not any(still), "openvla's filter of demonstrations would drop these steps"
    sim.set_state(start)
    expert.reset()
    np.testing.assert_allclose(play(sim, expert, len(actions)), actions, atol=1e-9)
    sim.close()


@pytest.mark.libero
def test_places_one_object_after_another_and_one_again_that_is_lost():
    sim = settled("libero_10", 4)
    expert = Expert(sim)
    first, second = expert.goals
    assert expert.goal == first
    while expert.goal == first:
        sim.step(expert.act(), render=False)
    assert expert.goal == second and goals.holds(sim, first) and not goals.holds(sim, second)
    start = sim.state()
    play(sim, expert, 150)  # 165 steps from the start in the mean
    sim.set_state(start)
    joint = sim.data.joint(sim.env.objects_dict[first.object].joints[0])
    joint.qpos[:2] += (0.03, -0.13)  # off its plate
    for _ in range(10):
        sim.step(REST, render=False)
    expert.reset()
    assert expert.goal == first
    play(sim, expert, TASK_SUITES["libero_10"][1])
    sim.close()


@pytest.mark.libero
def test_lets_go_as_soon_as_the_basket_holds_the_object():
    """The rim stops the hand above the basket's floor. To press on until patience ends, 30 steps later, is what no policy can copy."""
    sim = settled("libero_10", 0)
    expert = Expert(sim)
    first = expert.goal
    pressed = 0
    while expert.phase not in ("release", "leave"):  # it leaves when its patience ends
        sim.step(expert.act(), render=False)
        pressed += expert.phase == "place" and goals.holds(sim, first)
    assert pressed <= 1 and goals.is_grasped(sim, first)
    while expert.goal == first:
        sim.step(expert.act(), render=False)
    assert goals.holds(sim, first) and not goals.is_grasped(sim, first)
    sim.close()


@pytest.mark.libero
def test_recovers_from_disturbed_execution_and_from_a_lost_object():
    sim = settled("libero_spatial", 0)
    expert = Expert(sim)
    while expert.phase != "place":
        sim.step(expert.act(), render=False)
    assert goals.is_grasped(sim, expert.goal)
    for _ in range(15):
        sim.step(REST, render=False)  # lets go
    assert not goals.is_grasped(sim, expert.goal)
    play(sim, expert, TASK_SUITES["libero_spatial"][1], noise=0.15)
    sim.close()


@pytest.mark.libero
def test_a_task_that_is_no_pick_and_place_is_refused_by_name():
    sim = settled("libero_goal", 0)
    with pytest.raises(ValueError, match="open the middle"):
        Expert(sim)
    sim.close()


def box(*size: float) -> np.ndarray:
    """The corners [8, 3] of a box of this size, metres."""
    return np.array(np.meshgrid(*[(-side / 2, side / 2) for side in size])).reshape(3, -1).T


def test_takes_a_narrow_box_across_and_a_wide_one_by_its_rim():
    # at turn 0 the fingers' axis is y
    assert {grasp.turn for grasp in grasps(box(0.08, 0.04, 0.02))} == {0}
    assert {grasp.turn for grasp in grasps(box(0.04, 0.08, 0.02))} == {np.pi / 2}
    rim = grasps(box(0.11, 0.11, 0.05))[0]
    assert rim.turn == 0 and abs(abs(rim.offset[1]) - 0.055) < 0.01


def test_clearance_is_the_distance_to_the_nearest_part_of_the_hand():
    above, beside = np.array([[0, 0, 0.21]]), np.array([[0, 0.07, 0.0]])
    assert clearance(above, 0) == pytest.approx(0.01)  # the palm ends 20 cm up
    assert clearance(beside, 0) == pytest.approx(0.02)  # from fingers that reach 5 cm along y
    assert clearance(beside, np.pi / 2) == pytest.approx(0.033)  # their axis is x now; the palm is 3.7 cm wide there
