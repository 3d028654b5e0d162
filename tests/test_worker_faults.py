"""Workers that are killed, stopped and that raise, under the commands that a person types, on the real simulator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes import last_of_each
from tests.test_end_to_end import SETTINGS
from tests.trainers import training_lines
from vla_rl.run.command_line import ROOT

pytestmark = [pytest.mark.libero, pytest.mark.slow]

FAULTS = [f"{phase}:{how}" for how in ("kill", "stop", "raise") for phase in ("reset", "step", "render")]
QUICK = ["env.step_timeout_s=10", "env.build_timeout_s=90", "env.worker_replacements=9"]
TRAIN = ["start_gae_ppo_training.py", "--no-wandb", *SETTINGS, *QUICK, "logging.progress=false"]


def run(folder: Path, *command: str, faults=FAULTS) -> str:
    (folder / "faults").mkdir(parents=True, exist_ok=True)
    start = [sys.executable, "-m", "tests.break_workers", str(folder / "faults"), ",".join(faults), *command]
    process = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert process.returncode == 0, process.stderr[-5000:]
    assert len(os.listdir(folder / "faults")) == len(faults), "not every fault came"
    for phase_and_how in faults:
        phase, how = phase_and_how.split(":")
        words = {"kill": "died (SIGKILL", "stop": "hung for", "raise": f"raised RuntimeError: broken in {phase}"}[how]
        assert any(
            words in line and "replaced" in line and (how == "raise" or f" in {phase} of" in line or phase == "render")
            for line in process.stderr.splitlines()
        ), phase_and_how
    print(process.stderr)
    return process.stderr


@pytest.mark.parametrize("kind", ["gae", "grpo"])
def test_training_survives_every_fault_in_every_phase(tmp_path, kind):
    config = {"gae": "configs/tiny_gae_ppo.yaml", "grpo": "configs/tiny_grpo.yaml"}[kind]
    settings = [s for s in TRAIN if kind == "gae" or "n_steps" not in s]
    settings += ["rollout.group_size=2", "rollout.n_episodes=4"] if kind == "grpo" else ["rollout.n_steps=4"]
    run(
        tmp_path,
        settings[0],
        "--config",
        config,
        settings[1],
        *last_of_each(*settings[2:]),
        f"run.output_dir={tmp_path}",
        "run.name=r",
        "--timesteps",
        "300",
    )
    lines = [line for line in training_lines(tmp_path / "r") if "rollout/episodes" in line]
    assert sum(line["rollout/episodes_dropped"] for line in lines) >= 1 and lines[-1]["timesteps"] >= 300


def evaluate(folder: Path, faults: list[str]) -> list[dict]:
    command = ["vla_rl.evaluate", "--checkpoint", "tiny-openvla", "--task-suite", "libero_spatial", "--task-ids", "0"]
    command += [
        "--states",
        "0-5",
        "--out",
        str(folder / "out"),
        "--videos",
        "none",
        "--no-progress",
        "eval.max_steps=40",
    ]
    run(folder, *command, "eval.num_envs=2", "run.device=cpu", "policy.dtype=float32", *QUICK, faults=faults)
    return sorted(
        json.loads((folder / "out" / "results.json").read_text())["episodes"],
        key=lambda e: (e["mode"], e["initial_state"]),
    )


def test_an_evaluation_gives_the_same_results(tmp_path):
    assert evaluate(tmp_path / "broken", FAULTS) == evaluate(tmp_path / "whole", [])


def test_demonstrations_are_the_same(tmp_path):
    import h5py
    import numpy as np

    files = []
    for name, faults in (("broken", FAULTS), ("whole", [])):
        path = tmp_path / name / "d.hdf5"
        command = [
            "vla_rl.demonstrations",
            "--out",
            str(path),
            "--episodes",
            "5",  # one worker plays them all: each fault in a reset is in the second one of a process
            "--image-size",
            "32",
            "--render",
            "fast",
        ]
        run(tmp_path / name, *command, "--workers", "1", "--no-progress", "--step-timeout-s", "10", faults=faults)
        assert sorted(p.name for p in path.parent.iterdir()) == ["d.hdf5", "faults"]
        files.append(path)
    with h5py.File(files[0]) as broken, h5py.File(files[1]) as whole:
        assert len(broken["data"]) == len(whole["data"]) == 5
        for name in whole["data"]:
            for part in ("actions", "states", "obs/agentview_rgb"):
                np.testing.assert_array_equal(broken["data"][name][part], whole["data"][name][part])


def children(pid: int) -> list[int]:
    """Of a process, those that are left of it too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def started(folder: Path, *command: str) -> tuple[subprocess.Popen, list[int]]:
    """A program that is at work, and its worker processes."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        workers = [pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        if len(workers) >= 2 and ("built " in (folder / "log").read_text() or "demonstrations" in command[1]):
            break
        time.sleep(0.3)
    assert process.poll() is None, (folder / "log").read_text()
    return process, workers


def gone(pids, timeout_s=10) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def train(folder: Path) -> list[str]:
    settings = ["--config", "configs/tiny_gae_ppo.yaml", *TRAIN[1:], f"run.output_dir={folder}", "run.name=r"]
    return [TRAIN[0], *settings, "--timesteps", "100000"]


def test_a_killed_trainer_leaves_no_process_and_nothing_shared(tmp_path):
    shared = set(os.listdir("/dev/shm"))
    process, workers = started(tmp_path, *train(tmp_path))
    family = children(process.pid)
    os.kill(workers[0], signal.SIGSTOP)
    process.kill()
    process.wait()
    assert gone(family) and set(os.listdir("/dev/shm")) <= shared
    said = (tmp_path / "log").read_text()
    assert "leaked" not in said and "BrokenPipe" not in said and "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_whose_worker_is_stopped(tmp_path, number):
    process, workers = started(tmp_path, *train(tmp_path))
    deadline = time.monotonic() + 120
    while "evaluation at 0" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)  # a folder in which nothing was measured is removed
    os.kill(workers[0], signal.SIGSTOP)
    os.kill(workers[1], signal.SIGSTOP)
    time.sleep(3)
    start = time.monotonic()
    process.send_signal(number)
    process.wait(timeout=60)
    print(f"ended {time.monotonic() - start:.1f} s after {number!r}, status {process.returncode}")
    assert time.monotonic() - start < 30 and gone(workers)
    assert list((tmp_path / "r" / "checkpoints").iterdir())


def test_a_killed_recorder_leaves_no_process_and_no_file(tmp_path):
    (tmp_path / "out").mkdir()
    command = [
        "-m",
        "vla_rl.demonstrations",
        "--out",
        str(tmp_path / "out" / "d.hdf5"),
        "--no-progress",
        "--workers",
        "2",
    ]
    process, workers = started(tmp_path, *command)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".d.hdf5.tmp"]
    time.sleep(5)
    process.kill()
    process.wait()
    assert gone(workers)
    time.sleep(1)
    assert not list((tmp_path / "out").iterdir()) and "Traceback" not in (tmp_path / "log").read_text()
