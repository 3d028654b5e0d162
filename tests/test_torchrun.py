"""The command of a user in two processes on the real simulator: as one process, killed and restarted, stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_end_to_end import SETTINGS
from tests.trainers import training_lines
from vla_rl.run.checkpoint import list_checkpoints, verify
from vla_rl.run.command_line import ROOT

pytestmark = [pytest.mark.libero, pytest.mark.slow]

GRPO = ["algorithm.estimator=grpo", "rollout.group_size=2", "rollout.n_episodes=4", "env.task_ids=0,1"]
TWICE = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(folder: Path, *args: str, launcher: list[str] = TWICE) -> subprocess.Popen:
    script = [str(ROOT / "start_gae_ppo_training.py"), "--config", "configs/tiny_gae_ppo.yaml", "--no-wandb", *SETTINGS]
    command = [
        sys.executable,
        *launcher,
        *script,
        f"run.output_dir={folder}",
        "run.name=run",
        "eval.video=false",
        *args,
    ]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **output)


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def weights(folder: Path) -> torch.Tensor:
    newest = list_checkpoints(folder / "run" / "checkpoints")[-1]
    verify(newest)
    tensors = load_file(newest / "adapter/adapter_model.safetensors")
    if (newest / "value_head.safetensors").exists():
        tensors |= load_file(newest / "value_head.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_equal(folder: Path, other: Path) -> None:
    torch.testing.assert_close(weights(folder), weights(other), atol=1e-6, rtol=0)
    for line, expected in zip(training_lines(folder / "run"), training_lines(other / "run"), strict=True):
        assert list(line) == list(expected)
        for name, value in line.items():
            near = (
                expected[name] if isinstance(value, str | None) else pytest.approx(expected[name], abs=1e-5, rel=1e-4)
            )
            assert value == near, name


@pytest.fixture(scope="module", params=["gae", "grpo"])
def alone(request, tmp_path_factory) -> tuple[Path, list[str]]:
    """Three iterations of one process, and their settings."""
    folder, settings = tmp_path_factory.mktemp("alone"), GRPO if request.param == "grpo" else []
    finish(start(folder, *settings, "run.timesteps=80", launcher=[]))
    return folder, [*settings, "run.timesteps=80"]


def test_two_processes_equal_one(alone, tmp_path):
    finish(start(tmp_path, *alone[1]))
    assert_equal(tmp_path, alone[0])


def wait_for(process: subprocess.Popen, text: str) -> str:
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(said)


def rank_of(process: subprocess.Popen, rank: int) -> int:
    """The pid of one of torchrun's children."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return next(pid for pid, variables in environments.items() if b"RANK=%d" % rank in variables)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_named_and_a_restart_goes_on_as_if_nothing_had_been(alone, tmp_path, rank):
    process = start(tmp_path, *alone[1], launcher=[*TWICE, "--max-restarts=1"])
    wait_for(process, "iteration 1 |")
    begun = time.monotonic()
    os.kill(rank_of(process, rank), signal.SIGKILL)
    said = wait_for(process, "continuing from")
    assert time.monotonic() - begun < 60
    assert re.search(rf"local_rank: {rank} \(pid: \d+\)", said) and "exitcode: -9" in said
    finish(process)
    assert_equal(tmp_path, alone[0])


def test_without_restarts_a_killed_process_ends_the_job(alone, tmp_path):
    process = start(tmp_path, *alone[1])
    wait_for(process, "iteration 1 |")
    begun = time.monotonic()
    os.kill(rank_of(process, 1), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - begun < 60
    # torchrun names it, and asks the other one to end, unless that has noticed before
    assert re.search(r"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9", said) and "saved in" in said
    verify(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])


def test_sigterm_to_one_process_saves_once_and_ends_all(alone, tmp_path):
    process = start(tmp_path, *alone[1])
    said = wait_for(process, "iteration 1 |")
    os.kill(rank_of(process, 1), signal.SIGTERM)
    said += finish(process)
    assert said.count("saved in") == 1
    resume = [str(ROOT / "start_gae_ppo_training.py"), "--resume", str(tmp_path / "run"), "--no-wandb"]
    subprocess.run([sys.executable, *TWICE, *resume], cwd=ROOT, check=True, timeout=600, capture_output=True)
    assert_equal(tmp_path, alone[0])


def test_restarts_need_a_name():
    command = [
        *TWICE,
        "--max-restarts=1",
        str(ROOT / "start_gae_ppo_training.py"),
        "--config",
        "configs/tiny_gae_ppo.yaml",
    ]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "finds its run by name; give it one with run.name=" in done.stderr
