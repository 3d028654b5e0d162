"""Goals: what a BDDL file's goal becomes, where it points, and that the hand's grasp is seen."""

import numpy as np
import pytest

from vla_rl.simulation import goals
from vla_rl.simulation.goals import PickAndPlace
from vla_rl.simulation.libero_env import REST, build_simulator, fixed_state

pytestmark = pytest.mark.libero


def settled(suite: str, task: int):
    """The task's simulator at the start of fixed state 0."""
    sim = build_simulator(suite, task, (), 16, fast=True)
    sim.reset(0, fixed_state(suite, task, 0), render=False)
    for _ in range(10):
        sim.step(REST, render=False)
    return sim


@pytest.mark.parametrize(
    "suite, task, goal",
    [
        ("libero_spatial", 0, PickAndPlace("akita_black_bowl_1", "plate_1", "on")),
        ("libero_object", 3, PickAndPlace("bbq_sauce_1", "basket_1_contain_region", "in")),
        ("libero_goal", 4, PickAndPlace("akita_black_bowl_1", "wooden_cabinet_1_top_side", "on")),
    ],
)
def test_the_goal_is_read_from_the_task_and_holds_where_it_points(suite, task, goal):
    sim = settled(suite, task)
    assert goals.only_placements(sim) == [goal]
    joint = sim.data.joint(sim.env.objects_dict[goal.object].joints[0])
    joint.qpos[:3] += goals.goal_position(sim, goal) - goals.object_position(sim, goal)
    assert any(sim.step(REST, render=False) for _ in range(20)), "LIBERO's predicate never held there"
    assert np.linalg.norm(goals.object_position(sim, goal) - goals.goal_position(sim, goal)) < 0.06  # m
    sim.close()


def test_other_tasks_are_refused_by_name():
    sim = settled("libero_goal", 7)
    assert goals.placements(sim) == []
    with pytest.raises(ValueError, match=r"turn on the stove.*turnon flat_stove_1"):
        goals.only_placements(sim)
    sim.close()


def test_several_placements_are_listed_and_refused_where_something_else_is_asked_too():
    sim = settled("libero_10", 4)
    mugs = [PickAndPlace("porcelain_mug_1", "plate_1", "on"), PickAndPlace("white_yellow_mug_1", "plate_2", "on")]
    assert goals.only_placements(sim) == goals.placements(sim) == mugs
    assert not any(goals.holds(sim, goal) for goal in mugs)
    sim.env.parsed_problem["goal_state"].append(["turnon", "flat_stove_1"])
    with pytest.raises(ValueError, match=r"not pick-and-place alone.*turnon flat_stove_1"):
        goals.only_placements(sim)
    sim.close()


def test_points_of_an_object_surround_its_origin_and_have_its_size():
    sim = settled("libero_spatial", 0)
    points = goals.object_points(sim, "akita_black_bowl_1")
    low, high = points.min(0), points.max(0)
    origin = goals.object_position(sim, goals.only_placements(sim)[0])
    assert (low[:2] < origin[:2]).all() and (origin[:2] < high[:2]).all()
    np.testing.assert_allclose(high - low, [0.107, 0.107, 0.05], atol=0.004)  # m, of LIBERO's akita bowl
    sim.close()
