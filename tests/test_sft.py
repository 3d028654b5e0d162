"""Supervised fine-tuning: samples, labels, loss, and the whole program on a small file."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.learning.test_demonstration_file import arrays
from vla_rl.learning.augmentation import augment
from vla_rl.learning.demonstration_file import Demonstration, DemonstrationFile
from vla_rl.model.image_transform import crop_center
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.run.load_settings import load_config, read_yaml
from vla_rl.run.metrics import read_metrics
from vla_rl.run.settings import ConfigError, SftConfig
from vla_rl.sft import (
    Samples,
    SupervisedFineTuning,
    batch_rows,
    chunks_of,
    cross_entropy,
    data_statistics,
    data_units,
    label_tokens,
    learning_rate,
    main,
    make_samples,
    soft_labels,
    split,
)

ROOT = Path(__file__).parent.parent


def demonstration(actions, instruction="do it"):
    steps = len(actions)
    images = np.zeros((steps, 1, 16, 16, 3), np.uint8)
    return Demonstration("demo_0", instruction, images, np.zeros((steps, 8), np.float32), np.asarray(actions, float))


# ---------------------------------------------------------------------------------------------------------------- data


def test_a_chunk_repeats_the_last_action_after_the_end():
    actions = np.arange(4)[:, None] * np.ones(7)
    assert chunks_of(actions, 3)[..., 0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 3], [3, 3, 3]]


def test_samples_know_how_many_steps_are_left():
    samples = make_samples([demonstration([[0] * 7] * 3), demonstration([[0] * 7] * 2)], 2, 14, progress=False)
    assert samples.steps_to_go.tolist() == [2, 1, 0, 1, 0]
    assert samples.images.shape == (5, 1, 14, 14, 3) and samples.chunks.shape == (5, 2, 7)


def test_the_gripper_is_turned_into_the_data_set_s_units():
    actions = np.zeros((3, 7))
    actions[:, 6] = [-1, 1, 0]
    assert data_units(actions)[:, 6].tolist() == [1, 0, 0.5]  # opens, closes, holds
    assert actions[:, 6].tolist() == [-1, 1, 0]  # a copy


def test_statistics_are_quantiles_and_leave_the_gripper_alone():
    actions = np.zeros((101, 7))
    actions[:, 0] = np.linspace(-1, 1, 101)  # 1 % is one step of 0.02
    actions[:, 6] = 1
    stats = data_statistics([demonstration(actions)])
    assert stats["action"]["q01"][0] == pytest.approx(-0.98) and stats["action"]["q99"][0] == pytest.approx(0.98)
    assert stats["action"]["mask"] == [True] * 6 + [False]
    assert stats["action"]["max"][6] == 0 and (stats["num_transitions"], stats["num_trajectories"]) == (101, 1)
    json.dumps(stats)


def test_the_last_episodes_of_each_task_are_held_out():
    demos = [demonstration([[i] * 7], instruction) for instruction in "ab" for i in range(10)]
    training, held_out = split(demos, 0.2)
    assert [(d.instruction, d.actions[0, 0]) for d in held_out] == [("a", 8), ("a", 9), ("b", 8), ("b", 9)]
    assert len(training) == 16 and not {id(d) for d in training} & {id(d) for d in held_out}
    assert len(split(demos, 0.01)[1]) == 2 and split(demos, 0)[1] == []  # at least one of each, or none
    with pytest.raises(ConfigError, match="'a' has 1 demonstration, which leaves none to train on"):
        split(demos[:1], 0.1)


def test_every_row_is_seen_once_an_epoch_in_another_order_each_time():
    rows = np.concatenate([batch_rows(10, 4, step, seed=3) for step in range(5)])  # 20 rows: 2 epochs
    assert sorted(rows[:10]) == list(range(10)) == sorted(rows[10:])
    assert rows[:10].tolist() != rows[10:].tolist()
    np.testing.assert_array_equal(batch_rows(10, 4, 2, 3), rows[8:12])  # across the epochs' border, of the step alone


# -------------------------------------------------------------------------------------------------------------- labels


def test_a_label_s_tokens_are_decoded_to_its_actions():
    policy = OpenVLAPolicy.from_checkpoint("tiny-openvla-random", "parallel", unnorm_key="libero_spatial", chunk_size=2)
    rng = np.random.default_rng(0)
    chunks = rng.uniform(-0.1, 0.1, (5, 2, 7))
    chunks[..., 6] = rng.integers(0, 2, (5, 2))
    tokens = label_tokens(policy.action_tokenizer, chunks, policy.statistics["action"])
    decoded = policy.dataset_actions(tokens)
    np.testing.assert_allclose(decoded[..., :6], chunks[..., :6], atol=1.9 / 255)  # half a bin of the widest range
    np.testing.assert_array_equal(decoded[..., 6] > 0.5, chunks[..., 6] > 0.5)


def test_soft_labels_are_a_gaussian_cut_at_the_ends():
    labels = soft_labels(torch.tensor([[3, 0]]), 6, 1.0, torch.tensor([True, True]))
    weights = np.exp(-0.5 * np.array([9, 4, 1, 0, 1, 4]))
    np.testing.assert_allclose(labels[0, 0], weights / weights.sum(), rtol=1e-5)
    assert labels[0, 1].argmax() == 0 and labels[0, 1].sum() == pytest.approx(1)


def test_labels_are_one_hot_without_sigma_and_for_the_gripper():
    index = torch.tensor([[3, 1]])
    assert soft_labels(index, 5, 0.0, torch.tensor([True, True])).argmax(-1).tolist() == [[3, 1]]
    mixed = soft_labels(index, 5, 2.0, torch.tensor([True, False]))
    assert mixed[0, 0].max() < 0.5 and mixed[0, 1].tolist() == [0, 1, 0, 0, 0]


def test_cross_entropy_is_torch_s_for_one_hot_labels_and_counts_the_other_ids():
    logits = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[10, 11, 19]] * 4)
    labels = soft_labels(tokens - 10, 10, 0.0, torch.ones(3, dtype=torch.bool))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(cross_entropy(logits, labels, 10), expected)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    training = SimpleNamespace(steps=110, warmup_steps=10, final_learning_rate_fraction=0.1)
    rate = [learning_rate(SimpleNamespace(learning_rate=2.0), training, step) for step in (0, 4, 9, 10, 60, 110)]
    assert rate == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0 * 0.55, 0.2])


# ----------------------------------------------------------------------------------------------------------- the whole


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


def arguments(data, folder, *more, steps=6):
    return [
        *("--config", str(ROOT / "configs/tiny_sft.yaml"), f"data.files=[{data}]", "data.validation_fraction=0.25"),
        *(
            f"run.output_dir={folder}",
            "run.name=r",
            "run.torch_threads=1",
            "logging.progress=false",
            "policy.chunk_size=1",
        ),
        *(f"training.steps={steps}", "training.batch_size=8", "training.micro_batch_size=8", "training.warmup_steps=2"),
        *("training.evaluation_interval=3", "training.checkpoint_interval=3", "logging.interval=1", *more),
    ]


def test_it_learns_what_the_picture_and_the_instruction_tell(data, tmp_path):
    assert main(arguments(data, tmp_path, "optimizer.learning_rate=1e-3", "training.label_sigma=1", steps=120)) == 0
    records = [r for r in read_metrics(tmp_path / "r/metrics.jsonl") if "validation/loss" in r]
    assert records[0]["validation/l1"] > 0.2 and records[-1]["validation/l1"] < 0.08
    assert records[-1]["validation/gripper_accuracy"] == 1.0
    assert records[-1]["validation/token_accuracy"] > records[0]["validation/token_accuracy"]
    assert (tmp_path / "r/curves.png").stat().st_size > 10_000


def test_the_result_is_a_checkpoint_in_the_official_layout_with_the_data_s_statistics(data, tmp_path):
    assert main(arguments(data, tmp_path)) == 0
    model = tmp_path / "r/model"
    policy = OpenVLAPolicy.from_checkpoint(model, "parallel", use_proprio=True, chunk_size=1)
    assert policy.unnorm_key == "libero_spatial_no_noops"
    statistics = json.loads((model / "dataset_statistics.json").read_text())["libero_spatial_no_noops"]
    assert statistics["action"]["q99"][0] == pytest.approx(0.7) and statistics["num_trajectories"] == 6
    assert {t.dtype for t in load_file(model / "model.safetensors").values()} == {torch.bfloat16}


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
    monkeypatch.setattr("vla_rl.sft.augment", lambda image, rng: calls.append(1) or image)
    assert main(arguments(data, tmp_path, f"data.augment={setting}", f"policy.center_crop={setting}", steps=1)) == 0
    assert bool(calls) is changes


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(data, tmp_path, method):
    more = (f"training.method={method}",)
    assert main(arguments(data, tmp_path / "whole", *more)) == 0
    assert main(arguments(data, tmp_path / "parts", *more)) == 0
    parts = tmp_path / "parts/r"
    # as if it had been killed after step 3, before step 6: only that checkpoint is there
    assert main(arguments(data, tmp_path / "early", *more, "training.keep_checkpoints=9")) == 0
    early = tmp_path / "early/r/checkpoints"
    before = load_file(tmp_path / "early/r/model/model.safetensors")
    assert main(["--resume", str(early / "iteration-000003")]) == 0
    whole = load_file(tmp_path / "whole/r/model/model.safetensors")
    after = load_file(tmp_path / "early/r/model/model.safetensors")
    assert all(torch.equal(whole[name], after[name]) for name in whole) and before.keys() == after.keys()
    losses = [[r["sft/loss"] for r in read_metrics(run / "metrics.jsonl")] for run in (tmp_path / "early/r", parts)]
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
    assert main(arguments(tmp_path / "d.hdf5", tmp_path, *more, steps=60)) == 0
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
    assert "settings of policy, data cannot change within a run" in capsys.readouterr().err


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
    assert process.wait(timeout=30) == 0 and "--resume continues" in process.stderr.read()
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
