"""The warm start as a command: from a checkpoint with an L1 head to one that a training takes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from start_gae_ppo_training import main as train
from tests.fakes import CHUNK, last_of_each, make_envs
from vla_rl import warmstart
from vla_rl.evaluation.subject import of_checkpoint
from vla_rl.model.action_head import ActionHead, save_action_head
from vla_rl.model.tiny_openvla import TRAINED
from vla_rl.model.trained_as import write_trained_as
from vla_rl.reports.records import read_metrics
from vla_rl.run.command_line import ROOT
from vla_rl.run.interruption import STOPPED
from vla_rl.warmstart import main

SMALL = [
    *("collection.episodes=4", "collection.num_envs=2", "collection.mixed_iterations=1", "policy.lora.rank=2"),
    *(
        "training.iterations=2",
        "training.steps_per_iteration=2",
        "training.batch_size=4",
        "training.micro_batch_size=2",
    ),
    *("training.warmup_steps=0", "eval.states=0-1", "eval.num_envs=2", "logging.progress=false", "run.torch_threads=1"),
]


def with_l1_head(folder: Path, **known) -> Path:
    shutil.copytree(TRAINED, folder)
    torch.manual_seed(0)
    head = ActionHead(128)
    with torch.no_grad():
        head.model["fc2"].weight.mul_(0.2)
    save_action_head(head, folder, 7)
    write_trained_as(folder, json.loads((TRAINED / "trained_as.json").read_text()) | {"head": "l1"} | known)
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return with_l1_head(tmp_path / "l1", chunk_size=CHUNK)


@pytest.fixture
def small(monkeypatch):
    """Made environments instead of simulators."""

    def make(config, num_envs, **kind):
        return make_envs(num_envs, needed=2)

    monkeypatch.setattr(warmstart, "make_vector_env", make)
    monkeypatch.setattr("vla_rl.reports.metrics.MetricsLogger.draw_curves", lambda logger: logger.write_report())


def arguments(checkpoint: Path, output_dir: Path, *more: str, name: str = "w") -> list[str]:
    config = ["--config", str(ROOT / "configs/tiny_warmstart.yaml"), "--checkpoint", str(checkpoint)]
    named = (f"run.output_dir={output_dir}", f"run.name={name}", f"policy.chunk_size={CHUNK}")
    return [*config, *last_of_each(*named, *SMALL, *more)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


def test_it_ends_with_a_model_that_a_training_takes_and_resumes_bit_for_bit(
    small, checkpoint, tmp_path, monkeypatch, capsys
):
    argv = arguments(checkpoint, tmp_path, "training.keep_checkpoints=9", "training.margin=0")
    monkeypatch.setattr("vla_rl.fine_tuning.warm_start.WarmStart.reached", lambda trainer: False)
    assert main(argv) == 0
    run = tmp_path / "w"
    lines = read_metrics(run / "metrics.jsonl")
    evaluations = [line for line in lines if "eval/success_rate_l1" in line]
    assert [line["iteration"] for line in evaluations] == [0, 2]
    assert "eval/success_rate_greedy" in evaluations[1]
    page = (run / "report.html").read_text()
    assert "warm start of the token head of" in page and "At 4 steps" in page and "L1 head&#39;s success" in page
    assert [line["warmstart/token_share"] for line in lines if "warmstart/loss" in line] == [0, 1]
    # a training takes it as it is: no L1 head, the same use
    taken = []
    monkeypatch.setattr("start_gae_ppo_training.build_and_train", lambda config, _, folder, *rest: taken.append(config))
    use = [f"policy.chunk_size={CHUNK}", f"run.output_dir={tmp_path / 'ppo'}"]
    start = ["--config", str(ROOT / "configs/tiny_gae_ppo.yaml"), "--checkpoint"]
    assert train([*start, str(run / "model"), *use]) == 0 and taken[0].policy.head == "tokens"
    capsys.readouterr()
    assert train([*start, str(checkpoint), *use]) == 2  # as its base is not
    assert "python -m vla_rl.warmstart" in capsys.readouterr().err
    assert (
        of_checkpoint(str(run / "model"), None, [], {"env.task_suite": "libero_spatial"}).config.policy.head == "tokens"
    )
    # from the first iteration's checkpoint again
    whole = weights(run)
    assert main(["--resume", str(run / "checkpoints/iteration-000001")]) == 0
    again = weights(run)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_signal_ends_it_between_two_steps_and_it_goes_on(small, checkpoint, tmp_path, monkeypatch, caplog):
    learned = warmstart.WarmStart.train_step

    def signalled(trainer, rows):
        if trainer.step == 2:  # the first step of the second iteration
            os.kill(os.getpid(), signal.SIGTERM)
        return learned(trainer, rows)

    monkeypatch.setattr(warmstart.WarmStart, "reached", lambda trainer: False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmstart.WarmStart, "train_step", signalled)
        assert main(arguments(checkpoint, tmp_path)) == STOPPED
    run = tmp_path / "w"
    assert "--resume" in caplog.text and not (run / "model").exists()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["iteration-000001"]
    assert main(["--resume", str(run)]) == 0 and (run / "model/model.safetensors").is_file()


def test_a_checkpoint_without_an_l1_head_and_other_mistakes_are_told_before_a_folder_is_made(
    checkpoint, tmp_path, capsys
):
    runs = tmp_path / "runs"
    kept = ("collection.keep=10000000", "training.iterations=1000000", "collection.episodes=1000000")
    for argv, words in (
        (arguments(TRAINED, runs, "policy.chunk_size=8"), "has no L1 head"),
        (arguments(checkpoint, runs, "policy.use_proprio=false"), "was trained with true: set policy.use_proprio=true"),
        (arguments(checkpoint, runs, "training.batch_size=3"), "not a multiple"),
        (["--resume", str(runs / "none")], "--resume takes a folder"),
        (arguments(checkpoint, runs, *kept), "collection.keep (its images) = 10,000,000 needs"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error and not runs.exists()


def test_a_resume_refuses_another_policy(small, checkpoint, tmp_path, capsys):
    assert main(arguments(checkpoint, tmp_path, "training.iterations=1")) == 0
    assert main(["--resume", str(tmp_path / "w"), "policy.lora.alpha=3", "training.train_head=false"]) == 2
    assert "policy.lora.alpha (32.0 -> 3.0), training.train_head (True -> False) cannot" in capsys.readouterr().err


@pytest.mark.libero
@pytest.mark.slow
def test_on_the_real_simulator_it_is_killed_resumed_and_its_model_trained(tmp_path):
    """The commands as a user types them, but that an L1 head of random weights, which solves nothing, may teach."""
    checkpoint = with_l1_head(tmp_path / "l1")
    short = ["env.max_steps=20", "eval.max_steps=20", "eval.states=0-1", "policy.chunk_size=8"]
    program = "import sys; from vla_rl import warmstart; warmstart.WarmStart.check_teacher = lambda trainer: None; sys.exit(warmstart.main())"
    command = [sys.executable, "-c", program, *arguments(checkpoint, tmp_path, *short)]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **options)
    run = tmp_path / "w"
    for line in process.stdout:
        if "iteration 1/2" in line:
            os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == STOPPED and not (run / "model").exists()
    resumed = subprocess.run([sys.executable, "-c", program, "--resume", str(run)], timeout=300, **options)
    assert resumed.returncode == 0 and (run / "model").is_dir(), resumed.stdout
    start = [sys.executable, "start_gae_ppo_training.py", "--config", "configs/tiny_gae_ppo.yaml", "--no-wandb"]
    small = [
        "rollout.num_envs=2",
        "rollout.n_steps=2",
        "algorithm.minibatch_size=2",
        "algorithm.micro_batch_size=2",
        "env.max_steps=20",
    ]
    small += [
        "eval.max_steps=20",
        "eval.states=0-1",
        "eval.num_envs=2",
        "--timesteps",
        "30",
        f"run.output_dir={tmp_path}",
    ]
    trained = subprocess.run([*start, "--checkpoint", str(run / "model"), *small], timeout=300, **options)
    assert trained.returncode == 0, trained.stdout
