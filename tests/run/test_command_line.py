"""Flags and overrides become the settings of a run (the rest is in tests/test_start_gae_ppo_training.py)."""

import os
import subprocess
import sys

import pytest

from vla_rl.run.command_line import ROOT, TINY_CONFIG, end_of, find_config, new_run_settings, parse, settings_parser
from vla_rl.run.interruption import STOPPED
from vla_rl.run.settings import ConfigError
from vla_rl.types import SimulatorDied


def config_of(*argv: str):
    return new_run_settings(parse(settings_parser("a command", "what it does"), list(argv)))


def test_a_setting_may_stand_anywhere_also_behind_a_list_of_tasks():
    config = config_of("--config", TINY_CONFIG, "--task-ids", "0", "1", "run.seed=5", "--timesteps", "7")
    assert (config.env.task_ids, config.run.seed, config.run.timesteps) == ([0, 1], 5, 7)


def test_a_flag_wins_over_the_file_and_wandb_follows_its_flags():
    argv = ("--config", TINY_CONFIG, "--seed", "8")
    assert config_of(*argv).run.seed == 8 and not config_of(*argv).logging.wandb
    assert config_of(*argv, "--wandb-project", "P").logging.wandb
    assert not config_of(*argv, "--wandb-project", "P", "--no-wandb").logging.wandb


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--seed", "8", "run.seed=7"), "run.seed is given twice: run.seed=7, and 8 of a flag"),
        (("--no-wandb", "logging.wandb=true"), "logging.wandb is given twice: logging.wandb=True, and False of a flag"),
        (("--task-id", "1", "env.task_ids=0"), r"env.task_ids is given twice: env.task_ids=0, and \[1\] of a flag"),
    ],
)
def test_a_flag_against_a_setting_is_refused(argv, words):
    with pytest.raises(ConfigError, match=words):
        config_of(*argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--seed", "1", "--seed=2"), "argument --seed: given twice, with 1 and 2; give it once"),
        (("--task-ids", "0", "1", "--task-ids", "1"), "argument --task-ids: given twice, with [0, 1] and [1]"),
        (("--config", "a", "run.seed=1", "--config", "b"), "argument --config: given twice, with a and b"),
    ],
)
def test_a_flag_that_is_given_twice_with_different_values_is_refused(capsys, argv, words):
    with pytest.raises(SystemExit) as ended:
        config_of(*argv)
    assert ended.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_what_is_given_twice_with_the_same_value_is_fine():
    argv = ("--config", TINY_CONFIG, "--seed", "8", "--seed", "8", "run.seed=8", "--no-wandb", "--no-wandb")
    assert config_of(*argv).run.seed == 8


def test_settings_files_are_found_beside_the_programs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(TINY_CONFIG) == ROOT / TINY_CONFIG
    assert config_of("--config", TINY_CONFIG).run.output_dir == str(tmp_path / "runs")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("run.seed=-1: expected 0 or more"), 2, "error: run.seed=-1: expected 0 or more"),
        (KeyboardInterrupt(), 130, "kept"),
        (SimulatorDied("worker 0 died"), 1, "error: worker 0 died"),
    ],
)
def test_how_a_command_ended_is_its_exit_status_and_one_line(capsys, error, status, said):
    def work():
        raise error

    assert end_of(work, interrupted="kept") == status
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_work_that_ends_well_is_0_or_what_it_says_and_a_bug_keeps_its_stack():
    assert (end_of(lambda: None), end_of(lambda: 1)) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        end_of(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ("return None", 0),
        ("raise ConfigError('run.seed')", 2),
        ("raise Stopped", STOPPED),
        ("raise SimulatorDied('of it')", 1),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_a_reader_that_has_gone_changes_neither_the_work_nor_its_status(tmp_path, ends, status):
    """`| head` has read enough; a `tee` got the signal that stops the run, before a scheduler asks for its status."""
    code = f"""
import logging, pathlib
from vla_rl.run.command_line import end_of
from vla_rl.run.failures import say
from vla_rl.run.interruption import Stopped
from vla_rl.run.settings import ConfigError
from vla_rl.types import SimulatorDied

def work():
    for i in range(3):
        say(f"line {{i}}")
        logging.getLogger("vla_rl").info("a line of the log")
    pathlib.Path({str(tmp_path / "done")!r}).touch()
    {ends}

raise SystemExit(end_of(work))
"""
    read, written = os.pipe()
    os.close(read)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=written, stderr=written)
    os.close(written)
    assert process.wait(60) == status
    assert (tmp_path / "done").exists()
