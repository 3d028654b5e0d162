"""Supervised fine-tuning: the whole program on a small file."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fakes import last_of_each
from tests.fine_tuning.test_demonstration_file import arrays
from vla_rl.fine_tuning.augmentation import augment
from vla_rl.fine_tuning.demonstration_file import DemonstrationFile
from vla_rl.fine_tuning.samples import Samples
from vla_rl.fine_tuning.supervised_fine_tuning import (
    SupervisedFineTuning,
)
from vla_rl.model.image_transform import crop_center
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.trained_as import read_trained_as
from vla_rl.reports.records import read_metrics
from vla_rl.run.interruption import STOPPED
from vla_rl.run.load_settings import load_config, read_yaml
from vla_rl.run.sft_settings import SftConfig
from vla_rl.sft import main
from vla_rl.types import Observation

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two tasks whose actions are told by the picture's brightness and by the instruction."""
    path = tmp_path_factory.mktemp("data") / "d.hdf5"
    rng = np.random.default_rng(0)
    with DemonstrationFile(path, {}) as file:
        for number in range(8):
            task, steps = number % 2, 10
            bright = rng.integers(0, 2, steps)
            rows = arrays(steps, seed=number)
            rows["obs/agentview_rgb"] = (np.full((steps, 16, 16, 3), 60) + 120 * bright[:, None, None, None]).astype(
                np.uint8
            )
            rows["actions"] = np.tile(0.4 * (2 * bright - 1)[:, None] + 0.3 * task, (1, 7))
            rows["actions"][:, 6] = 2 * task - 1
            text = f"{['close', 'open'][task]} the box"
            file.add(rows, {"problem_info": json.dumps({"language_instruction": text})})
    return path


def arguments(data, folder, *more, steps=6, interval=3):
    config = [] if "--config" in more else ["--config", str(ROOT / "configs/tiny_sft.yaml")]
    flags = [part for place, part in enumerate(more) if part == "--config" or more[place - 1] == "--config"]
    settings = [
        *(f"data.files=[{data}]", "data.validation_fraction=0.25", f"run.output_dir={folder}", "run.name=r"),
        *("run.torch_threads=1", "logging.progress=false", "logging.interval=1", "policy.chunk_size=1"),
        *(f"training.steps={steps}", "training.batch_size=8", "training.micro_batch_size=8", "training.warmup_steps=2"),
        *(f"training.evaluation_interval={interval}", f"training.checkpoint_interval={interval}"),
        *(part for part in more if part not in flags),
    ]
    return [*config, *flags, *last_of_each(*settings)]


def test_it_learns_what_the_picture_and_the_instruction_tell(data, tmp_path):
    changes = ("optimizer.learning_rate=1e-3", "training.label_sigma=1")
    assert main(arguments(data, tmp_path, *changes, steps=120, interval=60)) == 0
    first, last = [r for r in read_metrics(tmp_path / "r/metrics.jsonl") if "validation/loss" in r]
    assert last["validation/l1"] < 0.08  # 0.15 without the instruction, 0.4 without the picture
    assert last["validation/gripper_accuracy"] == 1.0
    assert last["validation/loss"] < first["validation/loss"]
    assert (tmp_path / "r/curves.png").stat().st_size > 10_000


def test_the_result_is_a_checkpoint_in_the_official_layout_with_the_data_s_statistics(data, tmp_path):
    assert main(arguments(data, tmp_path)) == 0
    model = tmp_path / "r/model"
    policy = OpenVLAPolicy.from_checkpoint(model, "parallel", use_proprio=True, chunk_size=1)
    assert policy.unnorm_key == "libero_spatial_no_noops"
    statistics = json.loads((model / "dataset_statistics.json").read_text())["libero_spatial_no_noops"]
    assert statistics["action"]["q99"][0] == pytest.approx(0.7) and statistics["num_trajectories"] == 6
    assert {t.dtype for t in load_file(model / "model.safetensors").values()} == {torch.bfloat16}


def test_the_result_says_how_it_was_trained_and_has_one_truth_of_its_statistics(data, tmp_path):
    assert main(arguments(data, tmp_path, "policy.use_proprio=true", "policy.chunk_size=2", steps=1)) == 0
    model = tmp_path / "r/model"
    trained_as = read_trained_as(model)
    assert (trained_as["chunk_size"], trained_as["use_proprio"], trained_as["decoder"]) == (2, True, "parallel")
    assert trained_as["image_size"] == 16 and trained_as["render"] is None  # the file does not tell
    statistics = json.loads((model / "dataset_statistics.json").read_text())
    assert json.loads((model / "config.json").read_text())["norm_stats"] == statistics


L1 = ("training.head=l1", "training.label_sigma=0", "training.value_coef=0")


def test_an_l1_head_learns_what_the_picture_and_the_instruction_tell_and_is_the_official_file(data, tmp_path):
    assert main(arguments(data, tmp_path, *L1, "optimizer.learning_rate=1e-3", steps=60, interval=30)) == 0
    first, last = [r for r in read_metrics(tmp_path / "r/metrics.jsonl") if "validation/loss" in r]
    assert last["validation/l1"] < 0.1 and last["validation/loss"] < first["validation/loss"]
    assert last["validation/gripper_accuracy"] == 1.0 and "validation/token_accuracy" not in last
    model = tmp_path / "r/model"
    heads = {path.name: torch.load(path, weights_only=True) for path in model.glob("*--*.pt")}
    assert heads.keys() == {"action_head--60_checkpoint.pt", "proprio_projector--60_checkpoint.pt"}
    assert all(name.startswith("module.") for tensors in heads.values() for name in tensors)
    assert read_trained_as(model)["head"] == "l1"
    # what was learned is what acts: the picture tells the first six numbers, the instruction one more
    policy = OpenVLAPolicy.from_checkpoint(model, "parallel", use_proprio=True, chunk_size=1, head="l1")
    images = np.stack([np.full((1, 16, 16, 3), grey, np.uint8) for grey in (60, 180)] * 2)
    texts = ("close the box", "close the box", "open the box", "open the box")
    proprio = np.tile(np.array(policy.statistics["proprio"]["mean"], np.float32), (4, 1))
    actions = policy.act(Observation(images, proprio, texts), mode="greedy").actions[:, 0]
    np.testing.assert_allclose(actions[:, 0], [-0.4, 0.4, -0.1, 0.7], atol=0.25)
    assert actions[:, 6].tolist() == [-1, -1, 1, 1]
    # a further fine-tuning goes on from that head
    more = (f"policy.checkpoint={model}", "run.name=s", "optimizer.learning_rate=1e-6")
    assert main(arguments(data, tmp_path, *L1, *more, steps=1)) == 0
    again = read_metrics(tmp_path / "s/metrics.jsonl")[0]
    assert again["validation/l1"] == pytest.approx(last["validation/l1"], abs=0.02)


def test_images_are_augmented_in_training_and_cropped_in_the_middle_otherwise():
    policy = OpenVLAPolicy.from_checkpoint("tiny-openvla-random", "parallel", unnorm_key="libero_spatial", chunk_size=1)
    image = np.random.default_rng(0).integers(0, 256, (1, 1, policy.image_size, policy.image_size, 3), np.uint8)
    samples = Samples(image, np.zeros((1, 8), np.float32), ["do it"], np.zeros((1, 1, 7)), np.zeros(1, np.int64))
    config = load_config(ROOT / "configs/tiny_sft.yaml", kind=SftConfig)
    trainer = SupervisedFineTuning(config, policy, samples, None, None)
    rows = np.array([0])
    trained, evaluated = trainer.inputs(samples, rows, np.random.default_rng(5)), trainer.inputs(samples, rows, None)
    np.testing.assert_array_equal(trained.images[0, 0], augment(image[0, 0], np.random.default_rng(5)))
    np.testing.assert_array_equal(evaluated.images[0, 0], crop_center(image[0, 0]))


@pytest.mark.parametrize(("setting", "changes"), [("true", True), ("false", False)])
def test_the_setting_decides_whether_images_are_augmented(data, tmp_path, monkeypatch, setting, changes):
    calls = []
    monkeypatch.setattr(
        "vla_rl.fine_tuning.supervised_fine_tuning.augment", lambda image, rng: calls.append(1) or image
    )
    assert main(arguments(data, tmp_path, f"data.augment={setting}", f"policy.center_crop={setting}", steps=1)) == 0
    assert bool(calls) is changes


@pytest.mark.parametrize(
    ("method", "head"), [pytest.param("full", (), marks=pytest.mark.slow), ("lora", ()), ("lora", L1)]
)
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(data, tmp_path, method, head):
    more = (f"training.method={method}", *head)
    assert main(arguments(data, tmp_path / "whole", *more)) == 0
    # as if it had been killed after step 3, before step 6: only that checkpoint is there
    assert main(arguments(data, tmp_path / "early", *more, "training.keep_checkpoints=9")) == 0
    early = tmp_path / "early/r/checkpoints"
    before = load_file(tmp_path / "early/r/model/model.safetensors")
    assert main(["--resume", str(early / "iteration-000003")]) == 0
    whole = load_file(tmp_path / "whole/r/model/model.safetensors")
    after = load_file(tmp_path / "early/r/model/model.safetensors")
    assert all(torch.equal(whole[name], after[name]) for name in whole) and before.keys() == after.keys()
    assert sorted(p.name for p in early.iterdir()) == [
        "iteration-000003",
        "iteration-000006",
        "superseded-iteration-000006",
    ]
    if head:
        names = "r/model/action_head--6_checkpoint.pt"
        whole, after = (torch.load(tmp_path / run / names, weights_only=True) for run in ("whole", "early"))
        assert all(torch.equal(whole[name], after[name]) for name in whole)
    losses = [[r["sft/loss"] for r in read_metrics(tmp_path / run / "r/metrics.jsonl")] for run in ("early", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_the_last_prompt_token_learns_how_far_the_task_is(tmp_path):
    """Where the proprio tells it: the held-out error falls below that of the best constant."""
    with DemonstrationFile(tmp_path / "d.hdf5", {"problem_info": '{"language_instruction": "do it"}'}) as file:
        for seed in range(8):
            rows = arrays(10, seed=seed)
            rows["obs/ee_states"] = np.zeros((10, 6))
            rows["obs/ee_states"][:, 2] = np.arange(10)
            file.add(rows, {})
    more = ("training.value_coef=1", "training.value_discount=0.7", "optimizer.learning_rate=1e-3")
    assert main(arguments(tmp_path / "d.hdf5", tmp_path, *more, steps=60, interval=30)) == 0
    errors = [r["validation/value_loss"] for r in read_metrics(tmp_path / "r/metrics.jsonl") if "validation/loss" in r]
    assert errors[-1] < np.var(0.7 ** np.arange(10)) / 3
    assert "value_map" not in load_file(tmp_path / "r/model/model.safetensors")


def test_micro_batches_add_up_to_the_batch(data, tmp_path):
    assert main(arguments(data, tmp_path / "a", "data.augment=false", "policy.center_crop=false", steps=1)) == 0
    small = ("training.micro_batch_size=2", "data.augment=false", "policy.center_crop=false")
    assert main(arguments(data, tmp_path / "b", *small, steps=1)) == 0
    first, second = (read_metrics(tmp_path / run / "r/metrics.jsonl")[0] for run in "ab")
    assert first["sft/loss"] == pytest.approx(second["sft/loss"], rel=1e-5)
    assert first["sft/grad_norm"] == pytest.approx(second["sft/grad_norm"], rel=1e-3)


def test_a_resume_refuses_other_data_or_another_policy(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path, steps=1)) == 0
    assert main(["--resume", str(tmp_path / "r"), "policy.lora.alpha=3", "data.filter_no_ops=false"]) == 2
    words = "policy.lora.alpha (16.0 -> 3.0), data.filter_no_ops (True -> False) cannot change within a run"
    assert words in capsys.readouterr().err


def test_a_run_goes_on_from_another_folder_with_its_data_and_itself_moved(data, tmp_path, capsys, monkeypatch):
    own, run = tmp_path / "d.hdf5", tmp_path / "r"
    shutil.copy(data, own)
    monkeypatch.chdir(tmp_path)
    assert main(arguments("d.hdf5", ".", "training.keep_checkpoints=9", steps=6)) == 0
    expected = load_file(run / "model/model.safetensors")
    (tmp_path / "elsewhere").mkdir()
    own, run = own.rename(tmp_path / "elsewhere/e.hdf5"), run.rename(tmp_path / "elsewhere/s")
    monkeypatch.chdir(tmp_path.parent)
    early = str(run / "checkpoints/iteration-000003")
    assert main(["--resume", early]) == 2
    assert "tell --resume where it is now with data.files=..." in capsys.readouterr().err
    assert main(["--resume", early, f"data.files=[{own}]"]) == 0
    again = load_file(run / "model/model.safetensors")
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(data, tmp_path, monkeypatch):
    monkeypatch.setattr("vla_rl.sft.time.strftime", lambda form: "now")
    for _ in range(2):
        assert main(arguments(data, tmp_path, "run.name=null", steps=1)) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"sft_libero_spatial_no_noops_seed0_now{n}" for n in ("", "-2")}


def test_a_resume_notices_that_the_data_or_the_base_have_changed(data, tmp_path, capsys):
    own = tmp_path / "d.hdf5"
    shutil.copy(data, own)
    assert main(arguments(own, tmp_path, steps=1)) == 0
    with h5py.File(own, "a") as file:
        file["data/demo_0/actions"][0] *= 0.5
    assert main(["--resume", str(tmp_path / "r")]) == 2
    assert "does not fit this run" in capsys.readouterr().err

    base = tmp_path / "r/model"
    lora = ["training.method=lora", f"policy.checkpoint={base}", "run.name=l"]
    assert main(arguments(data, tmp_path, *lora, steps=1)) == 0
    tensors = load_file(base / "model.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    assert main(["--resume", str(tmp_path / "l")]) == 2
    assert "does not fit this run" in capsys.readouterr().err


def test_sigterm_saves_and_ends(data, tmp_path):
    command = [sys.executable, "-m", "vla_rl.sft", *arguments(data, tmp_path, steps=100_000)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "r/metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == STOPPED and "--resume continues" in process.stderr.read()
    assert list((tmp_path / "r/checkpoints").iterdir()) and not (tmp_path / "r/model").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.files=[nowhere.hdf5]"], "no file nowhere.hdf5"),
        (["training.batch_size=7", "training.micro_batch_size=2"], "not a multiple"),
        (["data.augment=false"], "random crops in training need the centre crop afterwards"),
        (["policy.dtype=bfloat16"], "rounds small steps away"),
        (["policy.decoder=autoregressive", "policy.chunk_size=8"], "which decodes one action"),
        (["trainning.steps=3"], "unknown setting"),
        (["training.step=3"], "did you mean training.steps?"),
        (["--config", "configs/nothing.yaml"], "no settings file configs/nothing.yaml"),
        (["policy.checkpoint=nowhere/at/all"], "no checkpoint folder nowhere/at/all"),
    ],
)
def test_mistakes_are_told_before_the_heavy_part(data, tmp_path, capsys, more, message):
    assert main(arguments(data, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_exists_is_told_before_the_data_are_read(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    assert main(arguments(tmp_path / "nowhere.hdf5", tmp_path)) == 2
    assert f"run folder {tmp_path / 'r'} exists" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sft", "tiny_sft"])
def test_the_shipped_settings_are_sound(name):
    path = ROOT / f"configs/{name}.yaml"
    config = load_config(path, kind=SftConfig)
    assert config.data.name == "libero_spatial_no_noops" and read_yaml(path)["training"]["steps"] > 1000


def test_a_full_disk_is_told_in_words_and_leaves_no_torn_model(data, tmp_path, monkeypatch, capsys):
    def write_shard(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vla_rl.model.checkpoint_folder.save_tensors", write_shard)
    assert main(arguments(data, tmp_path, steps=1)) == 1
    assert "the disk is full" in capsys.readouterr().err and not (tmp_path / "r/model").exists()
    monkeypatch.undo()
    assert main(["--resume", str(tmp_path / "r")]) == 0 and (tmp_path / "r/model/model.safetensors").is_file()
