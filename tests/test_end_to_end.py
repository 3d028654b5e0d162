"""The whole program on the real simulator: the command a user types, killed and resumed, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.browser import check_in_browser, needs_chromium
from tests.fakes import last_of_each
from tests.trainers import training_lines
from vla_rl.reports.records import read_metrics
from vla_rl.run.checkpoint import list_checkpoints, verify
from vla_rl.run.command_line import ROOT
from vla_rl.run.interruption import STOPPED

pytestmark = pytest.mark.libero

# 2 environments x 2 decisions; an episode is truncated after 20 steps, in the middle of its third decision, that is in
# the second iteration: 2 x (8 + 8), 2 x (4 + 8), 2 x (8 + 4) steps
SETTINGS = [
    "rollout.num_envs=2",
    "rollout.n_steps=2",
    "algorithm.critic_warmup_iterations=0",
    "algorithm.wait_for_reward=false",  # nobody succeeds in so few steps
    "algorithm.critic_epochs=2",
    "eval.num_envs=2",
    "env.max_steps=20",
    "eval.max_steps=20",
    "algorithm.minibatch_size=3",
    "algorithm.micro_batch_size=2",
    "eval.states=0-1",
    "env.image_size=64",
    "policy.as_trained=false",  # the small images are for speed
    "run.torch_threads=1",
    "logging.checkpoint_interval=1",
    "logging.keep_checkpoints=9",
]


def command(folder: Path, *args: str) -> list[str]:
    return [sys.executable, str(ROOT / "start_gae_ppo_training.py"), "--no-wandb", f"run.output_dir={folder}", *args]


def start(folder: Path, *args: str, **variables: str) -> subprocess.Popen:
    fresh = ["--config", "configs/tiny_gae_ppo.yaml", *SETTINGS]
    args = args if "--resume" in args else (*fresh, *args)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = os.environ | variables
    return subprocess.Popen(command(folder, *args), cwd=folder, env=env, start_new_session=True, **output)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A run of three iterations that nobody stops: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, "--timesteps", "70", "run.name=whole", MPLCONFIGDIR=str(folder / "fresh"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return folder / "whole", output


@pytest.mark.slow
def test_overlap_and_another_number_of_workers_give_the_same_run(whole, tmp_path):
    """The same episodes, actions and rewards; losses but for the rounding of smaller batches."""
    process = start(
        tmp_path,
        "--timesteps",
        "70",
        "run.name=overlap",
        "rollout.overlap=true",
        "env.num_workers=1",
        "eval.modes=[sampled]",
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    ours, expected = (
        [line for line in training_lines(folder) if "actor/policy_loss" in line]
        for folder in (tmp_path / "overlap", whole[0])
    )
    assert len(ours) == len(expected) == 3
    for line, other in zip(ours, expected, strict=True):
        assert {k: v for k, v in line.items() if k.startswith(("rollout/", "timesteps", "iteration"))} == {
            k: v for k, v in other.items() if k.startswith(("rollout/", "timesteps", "iteration"))
        }
        assert line["actor/entropy"] == pytest.approx(other["actor/entropy"], rel=1e-4)
        assert line["critic/value_mean"] == pytest.approx(other["critic/value_mean"], rel=1e-3, abs=1e-5)


@needs_chromium
def test_the_report_of_a_real_run_shows_curves_and_plays_a_video_in_a_browser(whole):
    check_in_browser(whole[0] / "report.html", curves=10)


def test_training_run_leaves_what_the_readme_promises(whole):
    run, output = whole
    lines = read_metrics(run / "metrics.jsonl")
    training = [line for line in lines if "actor/policy_loss" in line]
    assert [line["iteration"] for line in training] == [1, 2, 3]
    assert [line["timesteps"] for line in training] == [32, 56, 80]
    for line in training:
        assert line["actor/first_minibatch_ratio_error"] < 1e-4
        assert abs(line["actor/first_minibatch_kl"]) < 1e-6
    assert training[1]["rollout/length"] == 20  # both episodes were truncated, in the middle of a chunk
    evaluations = [line for line in lines if "eval/success_rate_greedy" in line]
    assert [line["iteration"] for line in evaluations] == [0, 3]
    assert all(line["eval/episodes_sampled"] == 2 for line in evaluations)
    assert (
        "iteration 3 | 80/70 steps | success 0.0% of 2 |" in output and "evaluation at 80 timesteps: greedy" in output
    )
    assert "%|" not in output and "\r" not in output  # no bar where no terminal shows it
    for noise in ("fontManager", "font cache", "WARN:"):  # matplotlib's first picture on a machine, gymnasium
        assert noise not in output
    assert (run / "curves.png").exists()
    assert list((run / "videos").glob("*_failure.mp4"))
    newest = list_checkpoints(run / "checkpoints")[-1]
    verify(newest)
    assert {p.name for p in newest.iterdir()} >= {"adapter", "value_head.safetensors", "trainer.pt", "config.yaml"}


def test_no_worker_survives_the_run(whole):
    run, _ = whole
    mine = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(run.parent).encode() in read_bytes(p)]
    assert mine == []


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just ended
        return b""


@pytest.mark.parametrize(
    ("how", "after"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 0, marks=pytest.mark.slow),
    ],
)
def test_run_that_is_killed_and_resumed_equals_one_that_was_not(whole, tmp_path, how, after):
    """Killed when `after` iterations are saved or later and the first evaluation is over, without which the folder would be removed,
    while episodes are under way; the metrics and the weights are the same."""
    process = start(tmp_path, "--timesteps", "70", "run.name=killed")
    run = tmp_path / "killed"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        saved = any(path.name >= f"iteration-{after:06d}" for path in list_checkpoints(run / "checkpoints"))
        if saved and read_metrics(run / "metrics.jsonl"):
            break
        time.sleep(0.05)
    # a cluster's SIGTERM and a closed terminal reach the simulators too; the out-of-memory killer takes the trainer alone
    os.kill(process.pid, how) if how == signal.SIGKILL else os.killpg(process.pid, how)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else STOPPED), output
    assert len([line for line in read_metrics(run / "metrics.jsonl") if "actor/policy_loss" in line]) < 3

    resumed = start(tmp_path, "--resume", str(run))
    output, _ = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, output
    assert training_lines(run) == training_lines(whole[0])
    final, expected = (list_checkpoints(folder / "checkpoints")[-1] for folder in (run, whole[0]))
    for name in ("adapter/adapter_model.safetensors", "value_head.safetensors"):
        weights, wanted = load_file(final / name), load_file(expected / name)
        assert all(torch.equal(weights[key], wanted[key]) for key in wanted)


@pytest.mark.slow
def test_evaluation_that_is_ended_in_its_second_mode_and_resumed_equals_one_that_was_not(tmp_path):
    """The first one of a run, in its second mode by SIGTERM and by SIGKILL in turn; of 8 episodes none is played twice."""
    more = ("--timesteps", "0", "run.name=r", *last_of_each(*SETTINGS, "eval.states=0-3"))
    folders = {how: tmp_path / how for how in ("whole", "SIGTERM", "SIGKILL")}
    for how, folder in folders.items():
        folder.mkdir()
        run = folder / "r"
        parts = command(folder, "--config", "configs/tiny_gae_ppo.yaml", *more)
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(parts, cwd=folder, start_new_session=True, **output)
        if how == "whole":
            said, _ = process.communicate(timeout=900)
            assert process.returncode == 0, said
            continue
        deadline, kept = time.monotonic() + 900, run / "evaluation.jsonl"
        while time.monotonic() < deadline and process.poll() is None:
            if b'"mode": "sampled"' in read_bytes(kept).partition(b"\n")[2]:
                break
            time.sleep(0.02)
        number = getattr(signal, how)
        os.kill(process.pid, number) if how == "SIGKILL" else os.killpg(process.pid, number)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == (-number if how == "SIGKILL" else STOPPED), said
        episodes = kept.read_bytes().count(b"\n") - 1
        assert 4 < episodes < 8 and read_metrics(run / "metrics.jsonl") == []
        resumed = start(folder, "--resume", str(run))
        said, _ = resumed.communicate(timeout=900)
        assert resumed.returncode == 0, said
        assert f"{episodes} of its 8 episodes were played before" in said and not kept.exists()
        assert training_lines(run) == training_lines(folders["whole"] / "r")
        videos, expected = (
            {p.name: p.read_bytes() for p in (f / "r/videos").iterdir()} for f in (folder, folders["whole"])
        )
        assert videos == expected


def test_grpo_runs_by_a_change_of_settings_alone_and_wandb_offline_without_network(tmp_path):
    args = ["--config", "configs/tiny_grpo.yaml", "--timesteps", "60", "--task-ids", "0", "1"]
    changes = [s for s in SETTINGS if "n_steps" not in s]
    changes += [
        "eval.states=0",  # one a task, so that each worker keeps its task
        "rollout.group_size=2",
        "rollout.n_episodes=4",
        "algorithm.drop_uniform_groups=false",
        "run.name=grpo",
        "logging.wandb=true",
        "logging.wandb_mode=offline",
    ]
    parts = [part for part in command(tmp_path, *args, *last_of_each(*changes)) if part != "--no-wandb"]
    done = subprocess.run(parts, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "grpo" / "metrics.jsonl")
    training = [line for line in lines if "actor/policy_loss" in line]
    assert training[0]["rollout/episodes"] == 4
    assert training[0]["rollout/env_steps"] == 80
    assert training[0]["rollout/uniform_groups"] == 2  # nobody succeeds: no signal
    assert training[0]["actor/grad_norm"] == 0
    assert not any("critic/value_loss" in line for line in lines)
    assert "eval/success_rate_greedy/task_1" in lines[0]
    assert list((tmp_path / "grpo").rglob("*.wandb"))
    assert not (list_checkpoints(tmp_path / "grpo" / "checkpoints")[-1] / "value_head.safetensors").exists()
