"""What the benchmark says of its tasks: names, goals and fixed states, all without a simulator."""

import subprocess
import sys

import pytest

from vla_rl.run.settings import NUM_FIXED_STATES, TASK_SUITES, ConfigError
from vla_rl.simulation.libero_env import LiberoEnv
from vla_rl.simulation.suites import (
    check_dense_reward,
    check_task,
    fixed_state,
    fixed_states,
    goal_predicates,
    load_benchmark,
    num_tasks,
    task_instructions,
    task_languages,
)

pytestmark = pytest.mark.libero


def test_suites_match_the_package():
    for suite, (tasks, _) in TASK_SUITES.items():
        assert num_tasks(suite) == tasks
        states = load_benchmark(suite).get_task_init_states(tasks - 1)
        assert len(states) == NUM_FIXED_STATES
        space = LiberoEnv(suite, chunk_size=1).observation_space["instruction"]
        assert all(text in space for text in task_languages(suite))


def test_it_is_known_without_a_simulator_which_tasks_have_placements():
    without = []
    for task_id in range(10):
        try:
            check_dense_reward("libero_goal", [task_id])
        except ConfigError as error:
            without.append(task_id)
            assert f"libero_goal task {task_id} (" in str(error)
    texts = [task_languages("libero_goal")[task_id] for task_id in without]
    assert texts == ["open the middle drawer of the cabinet", "turn on the stove"]
    for suite in ("libero_spatial", "libero_object", "libero_10"):
        check_dense_reward(suite, range(10))


def test_suites_have_their_fixed_states():
    states = fixed_states("libero_goal", 7)
    assert states.shape == (50, 79)
    with pytest.raises(ValueError, match=r"initial_state=50 does not exist.*0 to 49"):
        fixed_state("libero_goal", 7, 50)


def test_a_task_that_is_not_there_is_refused_by_name():
    check_task("libero_goal", 9)
    for task_id in (-1, 10):
        with pytest.raises(ValueError, match=f"task_id={task_id} outside libero_goal, which has tasks 0 to 9"):
            check_task("libero_goal", task_id)


def test_goals_and_instructions_are_the_bddl_files():
    assert goal_predicates("libero_goal", 0) == ["open"] and goal_predicates("libero_spatial", 0) == ["on"]
    assert sorted(goal_predicates("libero_10", 2)) == ["on", "turnon"]
    texts = task_instructions()
    assert len(texts) == sum(tasks for tasks, _ in TASK_SUITES.values()) == 130
    assert texts["turn_on_the_stove"] == "turn on the stove"


def test_no_simulator_is_imported_for_any_of_it():
    code = (
        "import sys; from vla_rl.simulation.suites import *;"
        "fixed_state('libero_goal', 0, 0); goal_predicates('libero_goal', 0); task_instructions();"
        "print([m for m in ('mujoco', 'robosuite') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
