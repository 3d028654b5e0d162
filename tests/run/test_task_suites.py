"""The table of task suites: names, what belongs to what, and what is said of a name that is none."""

import subprocess
import sys

import pytest

from vla_rl.run import settings
from vla_rl.run.task_suites import (
    BASE_SUITES,
    NUM_FIXED_STATES,
    TASK_SUITES,
    UNUSABLE,
    base_suite,
    check_states,
    check_suite,
    list_suites,
    num_fixed_states,
    perturbation,
    suites_of,
)


def test_each_suite_is_one_of_libero_s_or_a_perturbation_of_one_with_its_tasks_and_limit():
    assert len(TASK_SUITES) == 5 + 16 + 9 and not set(TASK_SUITES) & set(UNUSABLE)
    for name, numbers in TASK_SUITES.items():
        assert numbers == BASE_SUITES[base_suite(name)]
        assert name == base_suite(name) + (f"_{perturbation(name)}" if perturbation(name) else "")
    assert settings.TASK_SUITES is TASK_SUITES and NUM_FIXED_STATES == 50


@pytest.mark.parametrize(
    ("name", "base", "suffix"),
    [
        ("libero_object_object", "libero_object", "object"),
        ("libero_10_swap", "libero_10", "swap"),
        ("libero_goal_with_yellow_book", "libero_goal", "with_yellow_book"),
        ("libero_90", "libero_90", None),
    ],
)
def test_base_and_perturbation_are_told_from_the_name(name, base, suffix):
    assert (base_suite(name), perturbation(name)) == (base, suffix)


def test_a_family_begins_with_its_base_and_the_four_perturbations():
    base = "libero_spatial"
    assert suites_of(base)[:5] == [base, *(f"{base}_{suffix}" for suffix in ("lan", "object", "swap", "task"))]
    assert suites_of("libero_90") == ["libero_90"]


def test_the_list_in_messages_is_what_a_shell_makes_all_names_of():
    said = subprocess.run(["bash", "-c", f"echo {list_suites().replace(', ', ' ')}"], capture_output=True)
    assert sorted(said.stdout.decode().split()) == sorted(TASK_SUITES)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("libero_spatal", "libero_spatial"),
        ("LIBERO-Object", "libero_object"),
        ("libero_long", "libero_10"),
        ("libero_goal_lang", "libero_goal_lan"),
    ],
)
def test_a_misspelt_suite_is_named_with_what_was_meant_and_all_there_are(name, meant):
    with pytest.raises(ValueError) as error:
        check_suite(name)
    assert f"no task suite '{name}'; did you mean {meant}? There are libero_{{spatial," in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_near_nothing_is_shown_what_there_is():
    with pytest.raises(ValueError, match=r"no task suite 'x'; there are libero_\{spatial,object,goal,10,90\}, "):
        check_suite("x")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("libero_spatial_env", "lacks its task files and initial states"),
        ("libero_10_with_milk", "lacks the initial states of two tasks"),
        ("libero_goal_with_red_stick", "lacks the model of an object"),
        ("libero_study_table", "belongs to no suite"),
    ],
)
def test_a_suite_that_the_package_has_in_part_is_refused_with_the_whole_ones(name, why):
    for function in (check_suite, base_suite):
        with pytest.raises(ValueError, match=rf"{name} {why}.*; choose one of libero_\{{spatial,"):
            function(name)


def test_fixed_states_are_those_of_the_suite():
    assert (num_fixed_states("libero_goal_lan"), num_fixed_states("libero_goal_with_milk")) == (50, 10)
    check_states("libero_goal_with_milk", [9, 0], "--states")
    with pytest.raises(ValueError) as error:
        check_states("libero_goal_with_milk", list(range(7, 50)), "--states")
    assert str(error.value) == (
        "--states has [10, 11, 12, 13, ...], but the fixed states of libero_goal_with_milk are 0 to 9; set --states=0-9"
    )


def test_the_table_is_known_without_the_benchmark():
    code = "import sys; import vla_rl.run.task_suites; print({'libero', 'gymnasium', 'numpy', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
