"""The command line: what a user types becomes settings, or a clear error before anything heavy loads."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from start_gae_ppo_training import (
    FIXED_ON_RESUME,
    FREE_ON_RESUME,
    main,
    parse_args,
    settings_from,
)
from tests.fakes import FakePolicy, make_envs
from tests.trainers import make_trainer
from vla_rl.learning import memory
from vla_rl.learning.parts import build_policy
from vla_rl.model.tiny_openvla import TRAINED
from vla_rl.model.trained_as import write_trained_as
from vla_rl.preflight.needs import check_start
from vla_rl.run.checkpoint import locked, write_manifest
from vla_rl.run.command_line import ROOT
from vla_rl.run.failures import explain
from vla_rl.run.interruption import STOPPED, Stopped
from vla_rl.run.load_settings import list_settings, load_config, save_config
from vla_rl.run.run_folder import changed_settings
from vla_rl.run.settings import ConfigError
from vla_rl.types import SimulatorDied

TINY = "configs/tiny_gae_ppo.yaml"


def config_of(*argv: str):
    return settings_from(parse_args(list(argv)))[0]


def test_documented_calls_become_the_settings_they_promise():
    config = config_of("--task-id", "0", "--timesteps", "100000", "--wandb-project", "P", "--wandb-entity", "E")
    assert (config.env.task_ids, config.run.timesteps, config.run.device) == ([0], 100_000, "cuda")
    assert (config.logging.wandb, config.logging.wandb_project, config.logging.wandb_entity) == (True, "P", "E")
    assert config_of("--config", "configs/grpo_config.yaml").algorithm.estimator == "grpo"
    assert config_of("--task-ids", "0", "1", "2", "3").env.task_ids == [0, 1, 2, 3]
    assert config_of("--task-ids", "0", "1", "run.seed=5", "--timesteps", "7").run.seed == 5
    assert config_of("--task-ids", "0", "1", "actor.beta1=0.8").actor.beta1 == 0.8
    assert config_of("--task-suite", "libero_object").env.task_suite == "libero_object"
    assert config_of("actor.learning_rate=1e-4", "--task-id", "2", "env.render=fast").actor.learning_rate == 1e-4
    assert not config_of("--wandb-project", "P", "--no-wandb").logging.wandb
    assert not config_of("--config", TINY, "--no-wandb").logging.wandb


def test_flags_and_overrides_win_over_the_file():
    config = config_of("--config", TINY, "run.timesteps=5", "--seed", "8")
    assert (config.run.timesteps, config.run.seed, config.rollout.num_envs) == (5, 8, 8)


def test_settings_file_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_of("--config", TINY).run.device == "cpu"


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"{name}=" in text or f"{name}:" in text for name in list_settings())
    assert "actor.learning_rate=1e-05" in text
    assert "simulator steps" in text


def test_help_and_bad_settings_do_not_load_torch():
    code = (
        "import sys; from start_gae_ppo_training import main\n"
        "assert main(['--config', 'configs/tiny_gae_ppo.yaml', 'actor.learning_rat=1']) == 2\n"
        "assert 'torch' not in sys.modules and 'mujoco' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["actor.learnin_rate=1"], "did you mean actor.learning_rate?"),
        (["actor.learning_rate=fast"], "actor.learning_rate: input should be a valid number"),
        (["algorithm.gamma=1.5"], "algorithm.gamma: input should be less than or equal to 1, got 1.5"),
        (["run.timesteps=-1"], "run.timesteps"),
        (["--seed", "99999999999999999999"], "run.seed"),
        (["actor.learning_rate=.inf"], "actor.learning_rate"),
        (["--config", "."], "is a folder"),
        (["timesteps=5"], "'timesteps=5' is not a setting"),
        (["--config", "configs/tiny_grpo.yaml", "rollout.num_envs=10"], "use 8 or 16"),
        (["--task-id", "10"], "libero_spatial, which has tasks 0 to 9"),
        (["--config", "configs/missing.yaml"], "no settings file"),
        (["--config", TINY, "--checkpoint", "no/such/folder"], "no checkpoint folder no/such/folder"),
        (["--resume", "runs/none"], "runs/none; --resume takes a folder such as"),
        (["policy.unnorm_key=bridge_orig"], "unnorm_key=bridge_orig: the statistics of"),
        (["env.initial_states=0-9", "eval.states=5-20"], "make them disjoint"),
    ],
)
def test_mistakes_get_a_clear_error_exit_code_2_and_leave_nothing(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--config" not in argv and "--resume" not in argv:
        argv = ["--config", TINY, *argv]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_settings_on_a_machine_without_one_name_the_tiny_config(capsys, tmp_path):
    assert main(["--task-id", "0", "--output-dir", str(tmp_path)]) == 2
    assert "configs/tiny_gae_ppo.yaml" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unknown_rendering_back_end_is_named_with_those_that_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    assert main(["--config", TINY, "--output-dir", str(tmp_path)]) == 2
    assert "MUJOCO_GL=nonsense" in (error := capsys.readouterr().err) and "osmesa" in error
    assert not list(tmp_path.iterdir())


def test_rendering_library_that_is_missing_is_told_with_its_package(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("vla_rl.preflight.needs.can_load", lambda library: library != "OSMesa")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert main(["--config", TINY, "--output-dir", str(tmp_path)]) == 2
    assert "the library OSMesa" in (error := capsys.readouterr().err) and "apt-get install -y libosmesa6" in error
    assert len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_hub_checkpoint_that_cannot_be_had_says_where_it_looked_and_how_to_get_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["--config", TINY, "--checkpoint", "openvla/no-such-model", "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "Hugging Face cache" in error
    assert "hf download openvla/no-such-model" in error


# --------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder of the small trainer with two checkpoints."""
    trainer = make_trainer(tmp_path / "run")
    save_config(trainer.config, tmp_path / "run" / "config.yaml")
    trainer.train_iteration()
    trainer.save_checkpoint()
    trainer.train_iteration()
    trainer.save_checkpoint()
    return tmp_path / "run"


def test_resume_takes_the_newest_checkpoint_and_its_settings(run):
    config, checkpoint = settings_from(parse_args(["--resume", str(run), "--timesteps", "999"]))
    assert checkpoint.name == "iteration-000002"
    assert (config.run.timesteps, config.rollout.n_steps) == (999, 8)


def test_resume_of_a_run_that_was_copied_goes_on_in_the_copy(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "elsewhere" / "copy")
    monkeypatch.chdir(tmp_path / "elsewhere")
    config, checkpoint = settings_from(parse_args(["--resume", "copy"]))
    assert checkpoint == tmp_path / "elsewhere/copy/checkpoints/iteration-000002"
    assert (config.run.output_dir, config.run.name) == (str(tmp_path / "elsewhere"), "copy")


def recorded(run: Path, **policy: str) -> None:
    """The run as if its policy settings had been these."""
    for checkpoint in (run / "checkpoints").iterdir():
        values = yaml.safe_load((checkpoint / "config.yaml").read_text())
        values["policy"] |= policy
        (checkpoint / "config.yaml").write_text(yaml.safe_dump(values))
        fingerprint = json.loads((checkpoint / "manifest.json").read_text())["fingerprint"]
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint, fingerprint)


def test_resume_takes_the_base_model_from_where_it_is_now(run, tmp_path, capsys, monkeypatch):
    """Its fingerprint, not its path, tells whether it is the same: here it is another one than the tests' small policy."""
    recorded(run, checkpoint="base/of/old")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    assert main(["--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert (
        "no checkpoint folder base/of/old" in error and "tell --resume where it is now with policy.checkpoint=" in error
    )
    shutil.copytree(TRAINED, tmp_path / "base")
    config, _ = settings_from(parse_args(["--resume", "../run", "--checkpoint", "../base"]))
    assert config.policy.checkpoint == str(tmp_path / "base")
    assert main(["--resume", "../run", "--checkpoint", "../base"]) == 2
    assert "does not fit this run: it was made with policy" in capsys.readouterr().err


def test_resume_from_inside_the_run_folder_still_means_that_run(run, monkeypatch):
    monkeypatch.chdir(run / "checkpoints")
    assert settings_from(parse_args(["--resume", "iteration-000001"]))[1] == run / "checkpoints" / "iteration-000001"
    monkeypatch.chdir(run)
    assert settings_from(parse_args(["--resume", "."]))[1] == run / "checkpoints" / "iteration-000002"


def test_run_that_another_process_works_on_is_refused(run, capsys):
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["--resume", str(run)]) == 2
    assert "another process" in capsys.readouterr().err


def test_run_that_ends_before_it_begins_leaves_no_folder(tmp_path, monkeypatch):
    def interrupted(config, **kind):
        raise KeyboardInterrupt

    monkeypatch.setattr("vla_rl.learning.parts.build_policy", interrupted)
    assert main(["--config", TINY, "--output-dir", str(tmp_path), "run.name=x"]) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "left", [[], ["report.html", "wandb_id", "wandb/x", "checkpoints/iteration-000000/trainer.pt"]]
)
def test_start_that_fails_leaves_no_run_of_nothing(left, tmp_path, monkeypatch):
    def fails(config, checkpoint, folder, *rest):
        write(folder, *left)
        raise SimulatorDied("no rendering")

    monkeypatch.setattr("start_gae_ppo_training.build_and_train", fails)
    assert main(["--config", TINY, "--output-dir", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


@pytest.mark.parametrize(
    "left", ["metrics.jsonl", "checkpoints/iteration-000001/trainer.pt", "nonfinite_iteration_1.pt"]
)
def test_run_that_fails_later_keeps_what_it_has(left, tmp_path, monkeypatch):
    def fails(config, checkpoint, folder, *rest):
        write(folder, left, "checkpoints/iteration-000000/trainer.pt")
        raise SimulatorDied("killed")

    monkeypatch.setattr("start_gae_ppo_training.build_and_train", fails)
    assert main(["--config", TINY, "--output-dir", str(tmp_path), "run.name=r"]) == 1
    assert (tmp_path / "r" / left).exists() and (tmp_path / "r/checkpoints/iteration-000000").exists()


def test_resume_that_fails_leaves_the_run(run, monkeypatch):
    written = (".lock", "warnings.log", "report.html")
    before = sorted(path.name for path in run.rglob("*") if path.name not in written)
    monkeypatch.setattr("start_gae_ppo_training.is_untouched", lambda folder: True)
    assert main(["--resume", str(run)]) == 2  # another model
    assert sorted(path.name for path in run.rglob("*") if path.name not in written) == before


def test_wandb_is_finished_when_the_start_fails(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr("vla_rl.reports.metrics.MetricsLogger.close", lambda logger: closed.append(logger))

    def fails(config, **kind):
        raise ConfigError("no such thing")

    monkeypatch.setattr("vla_rl.learning.parts.build_policy", fails)
    assert main(["--config", TINY, "--output-dir", str(tmp_path)]) == 2
    assert len(closed) == 1 and list(tmp_path.iterdir()) == []


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the small OpenVLA that says how it was trained."""
    shutil.copytree(TRAINED, tmp_path / "model")
    write_trained_as(
        tmp_path / "model",
        {
            **{"decoder": "parallel", "num_images": 1, "use_proprio": True, "chunk_size": 8, "center_crop": True},
            **{"image_size": 128, "render": "fast"},
        },
    )
    return tmp_path / "model"


def keep_statistics(model: Path, name: str) -> None:
    path = model / "dataset_statistics.json"
    path.write_text(json.dumps({name: json.loads(path.read_text())[name]}))


@pytest.fixture
def started(monkeypatch) -> list[Path]:
    """The run folders of starts that passed all checks; nothing is built."""
    folders = []
    monkeypatch.setattr("start_gae_ppo_training.build_and_train", lambda c, _, folder, *rest: folders.append(folder))
    return folders


def test_the_grace_time_is_that_of_the_settings(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr("start_gae_ppo_training.build_and_train", lambda *args: given.append(args[-1].grace_s))
    argv = ["--config", "configs/tiny_gae_ppo.yaml", "--no-wandb", f"run.output_dir={tmp_path}", "run.grace_s=7"]
    assert main(argv) == 0 and given == [7]


@pytest.mark.parametrize(
    ("breaks", "argv", "words"),
    [
        (lambda model: (model / "tokenizer.json").unlink(), [], "no tokenizer.json"),
        (lambda model: (model / "tokenizer.json").write_text("{"), [], "tokenizer.json cannot be read"),
        (lambda model: (model / "dataset_statistics.json").write_text("{"), [], "is not JSON"),
        (lambda model: (model / "trained_as.json").write_text("[]"), [], "expected a JSON object"),
        (lambda model: (model / "model.safetensors").write_bytes(b"x"), [], "cut off"),
        (lambda model: None, ["policy.unnorm_key=x"], "unnorm_key=x"),
        (
            lambda model: keep_statistics(model, "libero_spatial_no_noops"),
            ["--task-suite", "libero_goal_lan"],
            "unnorm_key=libero_goal: the statistics of",
        ),
        (lambda model: None, ["run.output_dir=/proc/1/runs"], "run.output_dir=/proc/1/runs"),
        (
            lambda model: None,
            ["env.reward=dense", "env.task_suite=libero_goal", "env.task_ids=7"],
            "use env.reward=sparse",
        ),
    ],
)
def test_what_is_missing_is_told_before_a_run_folder_is_made(breaks, argv, words, model, started, tmp_path, capsys):
    breaks(model)
    output_dir = [f"run.output_dir={tmp_path / 'runs'}"]
    assert main(["--config", TINY, "--checkpoint", str(model), *output_dir, *argv]) == 2
    assert words in (error := capsys.readouterr().err) and len(error.splitlines()) == 1
    assert started == [] and not (tmp_path / "runs").exists()


def test_wandb_without_a_login_is_told_before_the_model_is_looked_for(started, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wandb.login", lambda **_: False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    argv = ["--config", TINY, "--output-dir", str(tmp_path / "runs"), "--wandb-project", "p", "--checkpoint", "no/such"]
    assert main(argv) == 2 and "run `wandb login`" in capsys.readouterr().err
    assert started == [] and not (tmp_path / "runs").exists()


OTHERWISE = [
    ("policy.use_proprio=false", "set policy.use_proprio=true"),
    ("policy.chunk_size=4", "set policy.chunk_size=8"),
    ("policy.center_crop=false", "set policy.center_crop=true"),
    ("policy.num_images=2", "set policy.num_images=1"),
    ("env.image_size=64", "set env.image_size=128"),
    ("env.render=exact", "set env.render=fast"),
]


@pytest.mark.parametrize(("override", "way_out"), OTHERWISE)
def test_a_checkpoint_is_used_as_it_was_trained_unless_that_is_meant(
    override, way_out, model, started, tmp_path, capsys, caplog
):
    argv = ["--config", TINY, "--checkpoint", str(model), "--output-dir", str(tmp_path / "runs"), override]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert f"{override}, but model was trained with" in error and way_out in error
    assert "policy.as_trained=false" in error and len(error.splitlines()) == 1
    assert started == [] and not (tmp_path / "runs").exists()
    assert main([*argv, "policy.as_trained=false"]) == 0 and len(started) == 1
    assert way_out in caplog.text


@pytest.mark.parametrize("config", [TINY, "configs/tiny_grpo.yaml"])
def test_a_training_through_an_l1_head_is_refused_in_one_line_with_the_way_out(
    config, model, started, tmp_path, capsys
):
    argv = ["--config", config, "--checkpoint", str(model), "--output-dir", str(tmp_path / "runs"), "policy.head=l1"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert f"python -m vla_rl.warmstart --checkpoint {model}" in error and len(error.splitlines()) == 1
    assert started == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("known_by", ["file", "trained_as.json"])
def test_an_l1_checkpoint_is_not_sampled_from_unless_that_is_meant(known_by, model, started, tmp_path, capsys):
    if known_by == "file":
        (model / "action_head--150000_checkpoint.pt").touch()
        (model / "trained_as.json").unlink()
    else:
        write_trained_as(model, json.loads((model / "trained_as.json").read_text()) | {"head": "l1"})
    argv = ["--config", TINY, "--checkpoint", str(model), "--output-dir", str(tmp_path / "runs")]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "has an L1 action head" in error and "python -m vla_rl.warmstart" in error and "Haozhan72" in error
    assert "policy.as_trained=false" in error and len(error.splitlines()) == 1 and started == []
    assert main([*argv, "policy.as_trained=false"]) == 0 and len(started) == 1


def test_all_differences_are_told_at_once(model, started, tmp_path, capsys):
    argv = ["--config", TINY, "--checkpoint", str(model), "--output-dir", str(tmp_path / "runs")]
    autoregressive = ["policy.decoder=autoregressive", "policy.chunk_size=1"]
    assert main([*argv, *autoregressive, *(override for override, _ in OTHERWISE if "chunk" not in override)]) == 2
    error = capsys.readouterr().err
    ways = [way for _, way in OTHERWISE] + ["set policy.decoder=parallel"]
    assert all(way in error for way in ways) and len(error.splitlines()) == 1


def test_evaluation_on_other_images_than_those_of_the_training_is_a_warning(model, started, tmp_path, caplog):
    argv = ["--config", TINY, "--checkpoint", str(model), "--output-dir", str(tmp_path / "runs")]
    assert main(argv) == 0 and "was trained with" not in caplog.text
    assert main([*argv, "eval.render=exact", "run.name=x"]) == 0
    assert "eval.render=exact, but model was trained with fast" in caplog.text and len(started) == 2


def test_a_resumed_run_that_differs_from_the_training_goes_on_with_a_warning(run, model, started, caplog):
    assert main(["--resume", str(run), "--checkpoint", str(model)]) == 0
    assert started == [run] and "policy.chunk_size=2, but model was trained with 8" in caplog.text
    assert main(["--resume", str(run), "--checkpoint", str(model), "policy.as_trained=false"]) == 0


def test_a_checkpoint_of_which_nothing_is_known_is_used_as_the_settings_say(model, started, tmp_path, caplog):
    (model / "trained_as.json").unlink()
    argv = ["--config", TINY, "--checkpoint", str(model), "--output-dir", str(tmp_path / "runs"), "env.image_size=64"]
    assert main(argv) == 0 and len(started) == 1 and "was trained with" not in caplog.text


@pytest.fixture
def other_run(tmp_path) -> Path:
    """With LoRA weights of rank 2."""
    checkpoint = tmp_path / "other/checkpoints/iteration-000007"
    build_policy(load_config(TINY, ["policy.lora.rank=2"])).save_adapter(checkpoint / "adapter")
    write_manifest(checkpoint, "model")
    return tmp_path / "other"


def test_lora_weights_to_begin_with_are_found_once_and_for_all(other_run, started, tmp_path, caplog):
    argv = ["--config", TINY, "--output-dir", str(tmp_path / "runs"), f"policy.adapter={other_run}"]
    config, _ = settings_from(parse_args([*argv, "policy.lora.rank=2"]))
    assert config.policy.adapter == str(other_run / "checkpoints/iteration-000007/adapter")
    check_start(config, resumed=False)
    assert "kl_coef" not in caplog.text
    check_start(settings_from(parse_args([*argv, "policy.lora.rank=2", "algorithm.kl_coef=0.1"]))[0], resumed=False)
    assert "algorithm.kl_coef=0.1 holds the policy near policy.checkpoint alone, without policy.adapter" in caplog.text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "made with other policy.lora than the settings' rank=8, alpha=16.0"),
        (["policy.lora.rank=2", "policy.lora.alpha=3"], "set policy.lora.alpha=16"),
        (
            ["policy.lora.rank=2", "policy.lora.target_modules=language-model"],
            "set policy.lora.target_modules=all-linear",
        ),
    ],
)
def test_lora_weights_of_other_settings_are_refused_with_those_to_set(
    argv, words, other_run, started, tmp_path, capsys
):
    argv = ["--config", TINY, "--output-dir", str(tmp_path / "runs"), f"policy.adapter={other_run}", *argv]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and not (tmp_path / "runs").exists() and started == []


def test_lora_weights_that_are_not_there_are_told_before_anything_heavy(tmp_path, started, capsys):
    argv = ["--config", TINY, "--output-dir", str(tmp_path / "runs")]
    (tmp_path / "empty").mkdir()
    for name, words in (("none", "no such folder"), ("empty", "has no adapter_config.json; give a run")):
        assert main([*argv, f"policy.adapter={tmp_path / name}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: policy.adapter={tmp_path / name}") and words in error
    assert not (tmp_path / "runs").exists()


def test_torn_checkpoint_is_refused_and_the_earlier_one_named(run, capsys):
    torn = run / "checkpoints" / "iteration-000002" / "trainer.pt"
    torn.write_bytes(torn.read_bytes()[:-10])
    before = sorted(p.name for p in run.rglob("*"))
    assert main(["--resume", str(run)]) == 2
    error = capsys.readouterr().err
    assert "trainer.pt" in error
    assert "--resume" in error
    assert "iteration-000001" in error
    assert sorted(p.name for p in run.rglob("*")) == before


def test_resume_refuses_settings_that_do_not_fit_the_run(run, capsys):
    assert main(["--resume", str(run), "policy.chunk_size=4", "--task-id", "3"]) == 2
    assert "policy.chunk_size (2 -> 4), env.task_ids ([0] -> [3]) cannot change within a run" in capsys.readouterr().err
    assert main(["--resume", str(run), "--config", TINY]) == 2
    assert main(["--resume", str(run), "--output-dir", "elsewhere"]) == 2


def test_resume_may_take_another_number_of_workers(run):
    """What a simulator that ran out of memory asks for."""
    config, _ = settings_from(parse_args(["--resume", str(run), "env.num_workers=3", "env.simulators_per_worker=1"]))
    assert (config.env.num_workers, config.env.simulators_per_worker) == (3, 1)


def test_resume_of_another_model_is_refused_before_the_run_is_touched(run, capsys, monkeypatch):
    """The settings fit, but the model behind them does not: here the checkpoint is of the tests' small policy."""
    config = (run / "checkpoints/iteration-000002/config.yaml").read_text()
    manifest = run / "checkpoints/iteration-000002/manifest.json"
    files = json.loads(manifest.read_text())
    assert "tiny-openvla" in config
    before = (run / "metrics.jsonl").read_text()
    assert main(["--resume", str(run)]) == 2
    assert "does not fit this run" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == before
    assert json.loads(manifest.read_text()) == files


def test_settings_of_a_new_run_say_where_it_is_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "mine.yaml").write_text("run: {seed: 3}\n")
    assert config_of("--config", TINY).run.output_dir == str(tmp_path / "runs")
    assert config_of("--config", "mine.yaml", "--output-dir", "~/r").run.output_dir == str(tmp_path / "home/r")
    monkeypatch.setenv("HERE", str(tmp_path))
    assert config_of("--config", "$HERE/mine.yaml").run.seed == 3


@pytest.mark.parametrize(
    "given", [("--config", ""), ("--config", "$NO/a.yaml"), ("--output-dir", ""), ("--resume", "")]
)
def test_an_empty_path_is_refused_not_taken_for_none(given, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(list(given)) == 2
    assert given[0].strip("-").replace("-", "_") in (error := capsys.readouterr().err) and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr("start_gae_ppo_training.time.strftime", lambda _: "20240101-000000")
    monkeypatch.setattr(
        "start_gae_ppo_training.build_and_train", lambda c, _, folder, *rest: folders.append(folder) or mark(folder)
    )
    for _ in range(3):
        assert main(["--config", TINY, "--output-dir", str(tmp_path)]) == 0
    name = "libero_spatial_task0_gae_seed0_20240101-000000"
    assert [folder.name for folder in folders] == [name, f"{name}-2", f"{name}-3"]


def mark(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("{}\n")


def test_existing_run_folder_is_not_written_into(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.jsonl").write_text("{}\n")
    assert main(["--config", TINY, "--output-dir", str(tmp_path), "run.name=mine"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "mine" / "metrics.jsonl").read_text() == "{}\n"
    shutil.rmtree(tmp_path / "mine")


def test_resume_auto_starts_a_run_and_then_continues_it_with_the_same_command(tmp_path, monkeypatch, capsys):
    begun = []

    def train(config, checkpoint, folder, *rest):
        begun.append((checkpoint, folder))
        (folder / "metrics.jsonl").touch()
        saved = folder / f"checkpoints/iteration-{len(begun):06d}"
        saved.mkdir(parents=True)
        save_config(config, saved / "config.yaml")
        write_manifest(saved, "model")
        raise Stopped

    monkeypatch.setattr("start_gae_ppo_training.build_and_train", train)
    argv = ["--config", TINY, "--output-dir", str(tmp_path), "--resume", "auto"]
    for _ in range(2):
        assert main(argv) == STOPPED
    assert main([*argv, "--seed", "3", "run.name=other"]) == STOPPED
    (_, folder), again, other = begun
    assert begun[0][0] is None and again == (folder / "checkpoints/iteration-000001", folder)
    assert other == (None, tmp_path / "other")
    torchrun(monkeypatch, restarts=0, most=3)  # which would need a name otherwise; and restarts after any status but 0
    assert main(argv) == 0 and begun[3] == (folder / "checkpoints/iteration-000002", folder)
    assert main([*argv, "--seed", "4", "run.name=other"]) == 2
    assert "run.name=other has other settings: run.seed (3 -> 4)" in capsys.readouterr().err


def test_what_the_out_of_memory_hint_proposes_is_accepted_by_a_resume():
    from vla_rl import sft

    hint = explain(torch.OutOfMemoryError("CUDA out of memory."))
    assert "micro_batch_size" in hint and "policy.gradient_checkpointing=full" in hint
    before = config_of("--config", TINY)
    after = config_of("--config", TINY, "policy.gradient_checkpointing=full", "algorithm.micro_batch_size=1")
    assert before != after and changed_settings(before, after, FIXED_ON_RESUME, FREE_ON_RESUME) == []
    assert "policy.gradient_checkpointing" in sft.FREE_ON_RESUME
    assert not "training.micro_batch_size".startswith(sft.FIXED_ON_RESUME)


def test_weights_that_are_more_than_the_card_has_free_are_refused_before_they_are_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free, 10**8))
    passed = []
    monkeypatch.setattr("start_gae_ppo_training.build_and_train", lambda *args: passed.append(args))
    argv = ["--config", TINY, "run.device=cuda", "policy.dtype=float32", "--output-dir", str(tmp_path / "runs")]
    files = [TRAINED / name for name in ("model.safetensors", "proprio_projector.safetensors")]
    weights = sum(tensor.numel() for path in files for tensor in load_file(path).values())
    free = 4 * weights - 1
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "the checkpoint's weights take" in error and "nvidia-smi" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists() and not passed
    free = 4 * weights
    assert main(argv) == 0 and passed


def test_settings_too_large_for_the_card_are_refused_before_training_and_leave_nothing(tmp_path, capsys, monkeypatch):
    class SmallCard(memory.Meter):
        def available(self):
            return self.at_rest() + memory.moment_bytes(self.trainer)

        def at_rest(self):
            return 20

        def peak_of(self, run):
            run()
            return 10 + self.trainer.micro_batches.rows

    def measured(trainer, instructions):
        assert instructions == ["pick up the black bowl between the plate and the ramekin and place it on the plate"]
        trainer.micro_batches.use(memory.Choice("none", 8))  # while it measures how much acting takes
        fit(trainer, instructions, SmallCard(trainer, instructions))

    def envs(config, num_envs, **options):
        made = make_envs(num_envs)
        made.num_workers = 1
        return made

    fit = memory.fit_to_card
    monkeypatch.setattr("vla_rl.learning.memory.fit_to_card", measured)
    monkeypatch.setattr("vla_rl.learning.parts.make_vector_env", envs)
    policy = FakePolicy()
    policy.processor = SimpleNamespace(image_transform=None, tokenize=lambda instructions: None)
    monkeypatch.setattr("vla_rl.learning.parts.build_policy", lambda config, **kind: policy)
    monkeypatch.setattr("vla_rl.learning.parts.log_sizes", lambda policy, head: None)
    argv = ["--config", TINY, "--output-dir", str(tmp_path / "runs"), "--no-wandb"]
    assert main([*argv, "algorithm.micro_batch_size=32", "policy.gradient_checkpointing=none"]) == 2
    error = capsys.readouterr().err
    assert "policy.gradient_checkpointing=none with algorithm.micro_batch_size=32 needs" in error
    assert "what fits: algorithm.micro_batch_size=8" in error and "Traceback" not in error
    assert list((tmp_path / "runs").iterdir()) == []


# ------------------------------------------------------------------------------------------------ started by torchrun


def torchrun(monkeypatch, restarts: int, most: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(most))


def test_a_restart_of_torchrun_continues_the_run_of_the_same_command(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "mine", policy_settings={"checkpoint": "tiny-openvla"})
    trainer.save_checkpoint()
    save_config(trainer.config, tmp_path / "mine/config.yaml")
    args = parse_args(["--config", TINY, "--output-dir", str(tmp_path), "run.name=mine", "run.seed=4"])
    torchrun(monkeypatch, restarts=1, most=3)
    with pytest.raises(ConfigError, match="cannot change within a run"):  # so it is that run; its settings are others
        settings_from(args)
    torchrun(monkeypatch, restarts=0, most=3)
    assert settings_from(args)[1] is None
    torchrun(monkeypatch, restarts=1, most=3)
    shutil.rmtree(tmp_path / "mine/checkpoints")
    assert settings_from(args)[1] is None  # it died before its first checkpoint
    with pytest.raises(ConfigError, match=r"--max-restarts=3 .* finds its run by name; give it one with run.name="):
        settings_from(parse_args(["--config", TINY]))


@pytest.mark.parametrize("argv", [["--config", TINY, "run.name=mine"], ["--resume", "mine"]])
def test_what_a_start_left_that_was_killed_is_begun_anew(argv, tmp_path, monkeypatch, caplog):
    """Neither its name nor its folder is lost: with the settings that it had, and those given now."""
    write(tmp_path / "mine", "config.yaml", "warnings.log", "checkpoints/.iteration-000000.tmp/x")
    save_config(config_of("--config", TINY, "run.seed=7"), tmp_path / "mine/config.yaml")
    write(tmp_path / "other", "config.yaml")
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(
        "start_gae_ppo_training.build_and_train", lambda c, _, folder, *rest: begun.append((c.run.seed, folder))
    )
    assert main([*argv, *([] if "--resume" in argv else ["--output-dir", "."]), "run.timesteps=5"]) == 0
    assert begun == [(7 if "--resume" in argv else 0, tmp_path / "mine")] and "it is begun anew" in caplog.text
    assert not (tmp_path / "mine/warnings.log").exists() and (tmp_path / "other/config.yaml").exists()
    assert load_config(tmp_path / "mine/config.yaml").run.timesteps == 5
    with locked(tmp_path / "mine"):
        assert main([*argv, *([] if "--resume" in argv else ["--output-dir", "."])]) == 2 and len(begun) == 1


def test_a_folder_with_results_stays_where_a_restart_finds_no_checkpoint(tmp_path, monkeypatch, capsys):
    write(tmp_path / "mine", "config.yaml", "metrics.jsonl")
    torchrun(monkeypatch, restarts=1, most=1)
    assert main(["--config", TINY, "--output-dir", str(tmp_path), "run.name=mine"]) == 2
    error = capsys.readouterr().err
    assert "exists and ended before its first checkpoint; remove or rename it" in error and len(error.splitlines()) == 1
    assert (tmp_path / "mine/metrics.jsonl").exists()


def test_checks_are_of_one_process(monkeypatch, capsys):
    torchrun(monkeypatch, restarts=0, most=0)
    assert main(["--config", TINY, "--check"]) == 2
    assert "give it without torchrun" in capsys.readouterr().err


def test_a_process_beside_the_first_one_says_who_it_is(monkeypatch, capsys):
    torchrun(monkeypatch, restarts=0, most=0)
    monkeypatch.setenv("RANK", "3")
    assert main(["--config", "no.yaml"]) == 2
    assert capsys.readouterr().err.startswith("rank 3: error: ")
