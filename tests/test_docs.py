"""What the docs tell a reader to type: every command parses, and the worked examples of docs/extending.md do what they say."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import start_gae_ppo_training as start
from vla_rl.run.command_line import new_run_settings

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTENDING = ROOT / "docs" / "extending.md"
PLACEHOLDERS = {"S": "0", "I": "0", "N": "1"}  # a number in some commands


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """Words of each line of the shell's blocks, without comments and what a pipe or an operator adds."""
    lines = [line for block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    ends = [next((i for i, word in enumerate(w) if word in ("|", ">", "&&", "&", ";")), len(w)) for w in words]
    return [w[:end] for w, end in zip(words, ends, strict=True) if end]


def arguments_of(command: list[str]) -> tuple[str, list[str]] | None:
    """ "start" or "vla_rl.NAME", and its arguments; None of other programs."""
    for i, word in enumerate(command):
        if re.search(r"start_gae_ppo_training\.(py|sh)$|slurm\.sh$", word):
            program, rest = "start", command[i + 1 :]
        elif word == "-m" and command[i + 1].startswith("vla_rl."):
            program, rest = command[i + 1], command[i + 2 :]
        else:
            continue
        if "--gpus" in rest:  # the shell script's own
            del rest[rest.index("--gpus") : rest.index("--gpus") + 2]
        return program, [PLACEHOLDERS.get(word, word) for word in rest if word != "..."]
    return None


TYPED = [(path.name, *found) for path in DOCS for command in commands(path) if (found := arguments_of(command))]


@pytest.fixture
def plate_suite(tmp_path, monkeypatch):
    """As make_suite.py leaves it, to whoever does not look into the files."""
    monkeypatch.setenv("VLA_RL_SUITES", str(tmp_path))
    (tmp_path / "libero_spatial_plate").mkdir()
    (tmp_path / "libero_spatial_plate" / "task.bddl").write_text("(define)")
    np.save(tmp_path / "libero_spatial_plate" / "task.npy", np.zeros((10, 92)))


def test_the_docs_have_commands_of_each_kind():
    assert {program for _, program, _ in TYPED} >= {"start", "vla_rl.evaluate", "vla_rl.sft", "vla_rl.export"}
    assert len(TYPED) > 50


@pytest.mark.parametrize(("doc", "program", "arguments"), TYPED, ids=[f"{d} {' '.join(a)}"[:80] for d, _, a in TYPED])
def test_a_command_in_the_docs_parses(doc, program, arguments, plate_suite, capsys):
    arguments = [a for a in arguments if a != "env.reward=careful"]  # of the example's diff, below
    module = start if program == "start" else importlib.import_module(program)
    if "--help" in arguments:
        return
    if not hasattr(module, "parse_args"):
        assert program == "vla_rl.replay"
        return
    args = module.parse_args(arguments)
    if program in ("start", "vla_rl.check") and getattr(args, "resume", None) is None:
        new_run_settings(args)


# ---------------------------------------------------------------------------------------------------------- extending.md


@pytest.fixture
def copy(tmp_path) -> Path:
    """The programs in a folder of their own, as a reader has them."""
    folder = tmp_path / "copy"
    without = shutil.ignore_patterns("__pycache__", "no_suites", "data")
    for name in ("vla_rl", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    for name in ("OpenVLA_PPO.py", "start_gae_ppo_training.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "careful.diff").write_text(blocks(EXTENDING, "diff")[0])
    (folder / "make_suite.py").write_text(blocks(EXTENDING, "python")[0])
    return folder


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent), "PYTHONPATH": str(folder)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment.pop("VLA_RL_SUITES")  # as a reader has it: the suites beside the package
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def test_the_reward_s_diff_applies_and_its_test_passes(copy):
    run(copy, "git", "apply", "careful.diff")
    test = "tests/simulation/test_careful_reward.py"
    assert "1 passed" in run(copy, sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", test)
    settings = "from vla_rl.run.load_settings import load_config as load; print(load(None, ['env.reward=careful']).env)"
    assert "reward='careful'" in run(copy, sys.executable, "-c", settings)


@pytest.mark.slow
@pytest.mark.libero
def test_every_command_of_the_examples_runs_as_it_stands(copy):
    typed = commands(EXTENDING)
    assert [" ".join(words)[:9] for words in typed[:2]] == ["git apply", "python -m"] and len(typed) == 8
    said = [run(copy, *words) for words in typed]
    assert "| libero_spatial_plate | 1 of 1 |  |" in said[4]
    assert (copy / "demonstrations" / "plate.hdf5").exists()
    for text in (said[2], said[7]):
        assert "iteration 1 |" in text and "evaluation at" in text
