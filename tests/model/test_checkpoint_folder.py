"""vla_rl/model/checkpoint_folder.py: the official layout, and what is told of files that are missing, torn or of another kind."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
import weakref
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.model.policies import DATA, RECORDED, copy_recorded, make_policy
from vla_rl.model.checkpoint_folder import HUB_FILES, read_statistics, save_checkpoint
from vla_rl.model.find_checkpoint import check_checkpoint
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.prismatic import load_network
from vla_rl.model.prismatic_config import read_config
from vla_rl.model.tiny_openvla import TRAINED
from vla_rl.run.settings import ConfigError


def test_unnorm_key_is_found_with_and_without_suffix_and_alone(recorded):
    assert recorded.unnorm_key == "libero_spatial_no_noops"  # the only one there is
    assert make_policy(unnorm_key="libero_10_no_noops", lora=None).unnorm_key == "libero_10_no_noops"


def test_dataset_statistics_are_preferred_over_the_pretraining_ones(tmp_path):
    folder = copy_recorded(tmp_path / "c")
    raw = json.loads((folder / "config.json").read_text())
    raw["norm_stats"] = {"bridge_orig": raw["norm_stats"]["libero_spatial_no_noops"]}
    (folder / "config.json").write_text(json.dumps(raw))
    assert OpenVLAPolicy.from_checkpoint(folder).unnorm_key == "libero_spatial_no_noops"
    (folder / "dataset_statistics.json").unlink()
    assert OpenVLAPolicy.from_checkpoint(folder).unnorm_key == "bridge_orig"


def test_missing_checkpoint_says_where_it_looked_and_how_to_get_it(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"no checkpoint folder /no/such/folder; give a folder, a Hugging Face id"):
        check_checkpoint("/no/such/folder")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"not a local folder, not in the Hugging Face cache \(.*\).*hf download no-org/no-model"
    ):
        check_checkpoint("no-org/no-model")
    with pytest.raises(ConfigError, match=r"no config\.json in"):
        check_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"no preprocessor_config\.json"):
        check_checkpoint(copy_recorded(tmp_path / "c", leave_out="preprocessor*"))


def test_proprio_without_a_projector_is_refused(tmp_path):
    folder = copy_recorded(tmp_path / "c", leave_out="proprio*")
    with pytest.raises(ConfigError, match="has no proprio projector; set use_proprio=false"):
        OpenVLAPolicy.from_checkpoint(folder, use_proprio=True)


def test_film_checkpoint_is_refused(tmp_path):
    folder = copy_recorded(tmp_path / "c")
    (folder / "vision_backbone--150000_checkpoint.pt").touch()
    with pytest.raises(ConfigError, match="FiLM"):
        check_checkpoint(folder)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 300_000])
def test_saved_checkpoint_loads_back_equal(network_with_proprio, tmp_path, max_shard_bytes):
    network = network_with_proprio
    save_checkpoint(tmp_path, network.named_parameters(), RECORDED, network.proprio_file, max_shard_bytes)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes < 10**9) == (tmp_path / "model.safetensors.index.json").exists()
    assert network.proprio_file == "proprio_projector--150000_checkpoint.pt"
    again = load_network(tmp_path, use_proprio=True)
    pairs = zip(network.named_parameters(), again.named_parameters(), strict=True)
    assert all(a == b and x.equal(y) for (a, x), (b, y) in pairs)
    recorded = json.loads((RECORDED / "config.json").read_text()) | {"torch_dtype": "float32"}  # as they are saved
    assert json.loads((tmp_path / "config.json").read_text()) == recorded
    assert (tmp_path / "dataset_statistics.json").exists()


def test_saved_names_are_those_of_the_official_checkpoint(network, tmp_path):
    save_checkpoint(tmp_path, ((n, p.bfloat16()) for n, p in network.named_parameters()))
    with (
        safe_open(tmp_path / "model.safetensors", "pt") as ours,
        safe_open(RECORDED / "model.safetensors", "pt") as theirs,
    ):
        assert set(ours.keys()) == set(theirs.keys())
        assert all(ours.get_tensor(name).equal(theirs.get_tensor(name)) for name in ours.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "expected model_type 'openvla', got 'llama'"),
        ({"use_fused_vision_backbone": False}, "expected the fused DINOv2"),
        ({"image_sizes": [224, 384]}, "expected one image size"),
    ],
)
def test_other_models_are_refused(checkpoint, change, message):
    raw = json.loads((checkpoint / "config.json").read_text()) | change
    (checkpoint / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=message):
        read_config(checkpoint)


# ---------------------------------------------------------------------- from the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that lists hub.files, or raises them, and gives hub.folder; hub.asked tells what was asked of it."""
    hub = SimpleNamespace(files=[], folder=RECORDED, asked=[])

    def list_repo_files(repo):
        hub.asked.append("list")
        if isinstance(hub.files, Exception):
            raise hub.files
        return hub.files

    def snapshot_download(repo, **kwargs):
        hub.asked.append("download")
        return str(hub.folder)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


def test_film_on_the_hub_is_refused_before_anything_is_downloaded(hub):
    hub.files = ["config.json", "vision_backbone--150000_checkpoint.pt"]
    with pytest.raises(ConfigError, match="org/model has a FiLM vision backbone"):
        check_checkpoint("org/model")
    assert hub.asked == ["list"]


def test_l1_head_on_the_hub_is_warned_about_and_listed_once(hub, caplog):
    hub.files = ["config.json", "action_head--150000_checkpoint.pt"]
    OpenVLAPolicy.from_checkpoint("org/model", decoder="parallel", use_proprio=True)
    assert "org/model has an L1 action head (action_head--150000_checkpoint.pt)" in caplog.text
    assert hub.asked == ["list", "download"]


def test_the_head_on_the_hub_is_downloaded_and_acts(hub, tmp_path, monkeypatch):
    hub.folder = copy_recorded(tmp_path / "c")
    shutil.copyfile(DATA / "action_head--150000_checkpoint.pt", hub.folder / "action_head--150000_checkpoint.pt")
    hub.files = [path.name for path in hub.folder.iterdir()]
    assert all(any(fnmatch(name, pattern) for pattern in HUB_FILES) for name in hub.files)
    policy = OpenVLAPolicy.from_checkpoint("org/model", decoder="parallel", use_proprio=True, head="l1")
    assert policy.head == "l1" and hub.asked == ["list", "download"]


def test_files_in_sub_folders_of_the_repository_do_not_count(hub, caplog):
    hub.files = ["other/action_head--1_checkpoint.pt", "vision_backbone--1/model.pt", "action_head--1/model.pt"]
    OpenVLAPolicy.from_checkpoint("org/model", decoder="parallel", use_proprio=True)
    assert caplog.text == ""


def test_without_network_the_cached_copy_is_used_and_it_is_said_what_cannot_be_known(hub, caplog, tmp_path):
    hub.files = OSError("no network")
    assert check_checkpoint("org/model") == RECORDED
    assert "the files of org/model could not be listed (OSError: no network)" in caplog.text
    hub.folder = copy_recorded(tmp_path / "c")
    (hub.folder / "vision_backbone--1_checkpoint.pt").touch()  # what the copy itself tells
    with pytest.raises(ConfigError, match="org/model has a FiLM vision backbone"):
        check_checkpoint("org/model")


def test_a_hub_that_does_not_answer_is_not_waited_for(hub, caplog, monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: answered.wait(60))
    monkeypatch.setattr("vla_rl.model.checkpoint_folder.LISTING_TIMEOUT_S", 0.05)
    before = time.monotonic()
    assert check_checkpoint("org/model") == RECORDED
    assert time.monotonic() - before < 2
    answered.set()
    assert "could not be listed (TimeoutError" in caplog.text


# ---------------------------------------------------------------------- files of others


def refused(folder, use_proprio=False):
    with pytest.raises(ConfigError) as error:
        check_checkpoint(folder, use_proprio)
        read_statistics(folder, "libero_spatial", use_proprio)
    assert "\n" not in str(error.value)
    return str(error.value)


FILES = [
    "config.json",
    "dataset_statistics.json",
    "preprocessor_config.json",
    "model.safetensors",
    "tokenizer.json",
    "proprio_projector--150000_checkpoint.pt",
]


@pytest.fixture
def whole(checkpoint):
    shutil.copyfile(TRAINED / "tokenizer.json", checkpoint / "tokenizer.json")
    check_checkpoint(checkpoint, use_proprio=True)
    return checkpoint


@pytest.mark.parametrize("name", FILES)
def test_pointers_cut_off_empty_and_unreadable_files_are_named(whole, name, monkeypatch):
    path = whole / name
    content = path.read_bytes()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert f"{name} is a Git LFS pointer" in refused(whole, use_proprio=True)
    for end in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:end])
        assert name in refused(whole, use_proprio=True)
    path.unlink()
    path.mkdir()
    assert f"{name} cannot be read (Is a directory)" in refused(whole, use_proprio=True)
    path.rmdir()
    path.write_bytes(content)

    def refuse(self, *args, **kwargs):
        if self.name == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(self, *args, **kwargs)

    opened = Path.open
    monkeypatch.setattr(Path, "open", refuse)  # not chmod, which does not stop root
    assert f"{name} cannot be read (Permission denied)" in refused(whole, use_proprio=True)


def test_a_folder_that_may_not_be_entered_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "is_dir", lambda self: exec("raise PermissionError(13, 'Permission denied')"))
    with pytest.raises(ConfigError, match=r"cannot be read \(.*Permission denied"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("action", "q01", None, "expected 7 finite numbers as action's q01, got None"),
        ("action", "q99", [1.0] * 14, "expected 7 finite numbers as action's q99, got 14 values"),
        ("action", "q99", [float("nan")] * 7, "expected 7 finite numbers"),
        ("action", "q99", [-9.0] * 7, "action's q01 is above its q99"),
        ("action", "mask", [True] * 6, "expected 7 times true or false as action's mask"),
        ("proprio", "q01", [0.0] * 7, "expected 8 finite numbers as proprio's q01, got 7 values"),
    ],
)
def test_statistics_of_another_robot_or_torn_are_named(checkpoint, part, key, value, words):
    path = checkpoint / "dataset_statistics.json"
    statistics = json.loads(path.read_text())
    statistics["libero_spatial_no_noops"][part][key] = value
    path.write_text(json.dumps(statistics))
    with pytest.raises(ConfigError, match=words):
        check_checkpoint(checkpoint, use_proprio=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"means": ...}, "expected means of 2 backbones"),
        ({"stds": [[0.5, 0.5, 0.0]] * 2}, "expected stds above 0"),
        ({"stds": [[0.5, 0.5, float("nan")]] * 2}, "expected stds of 2 backbones with 3 finite"),
        ({"means": [["a", "b", "c"]] * 2}, "expected means of 2 backbones"),
    ],
)
def test_image_statistics_that_cannot_be_are_named(checkpoint, change, words):
    path = checkpoint / "preprocessor_config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | change).items() if v is not ...}
    path.write_text(json.dumps(config))
    assert words in refused(checkpoint)


@pytest.mark.parametrize("file", [3, "../model.safetensors", "sub/model.safetensors", None, "..", ""])
def test_an_index_names_files_beside_it(checkpoint, file):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    assert "expected weight_map with a file beside it" in refused(checkpoint)


def test_weights_that_do_not_fit_are_told_before_they_load(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    save_file({n: t for n, t in weights.items() if n != "projector.fc1.bias"}, checkpoint / "model.safetensors")
    assert "1 tensors missing, such as projector.fc1.bias" in refused(checkpoint)
    save_file(
        weights | {"projector.fc1.bias": weights["projector.fc1.bias"].to(torch.int8)}, checkpoint / "model.safetensors"
    )
    assert "projector.fc1.bias is I8, expected F64 or F32" in refused(checkpoint)


def test_tokenizer_of_a_larger_model_is_refused(checkpoint):
    tokenizer = json.loads((TRAINED / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zzz"] = 40_000
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "token ids up to 40000, the model 32064 embeddings" in refused(checkpoint)


# ---------------------------------------------------------------------- one truth of the statistics


def truths(folder):
    return [
        json.loads((folder / "config.json").read_text())["norm_stats"],
        json.loads((folder / "dataset_statistics.json").read_text()),
    ]


def test_config_and_statistics_file_of_what_is_shipped_and_written_say_the_same(tmp_path):
    policy = OpenVLAPolicy.from_checkpoint("tiny-openvla", "parallel", use_proprio=True)
    (entry,) = truths(TRAINED)[1].values()
    policy.save_merged(tmp_path / "merged")
    for folder in (TRAINED, tmp_path / "merged"):
        assert truths(folder) == [{"libero_spatial_no_noops": entry}] * 2
    new = {"action": entry["action"] | {"q99": [0.5] * 6 + [1.0]}, "proprio": entry["proprio"]}
    save_checkpoint(tmp_path / "saved", policy.merged_tensors(), TRAINED, statistics={"libero_spatial_no_noops": new})
    assert truths(tmp_path / "saved") == [{"libero_spatial_no_noops": new}] * 2
    policy = OpenVLAPolicy.from_checkpoint(RECORDED, unnorm_key="mine", statistics=new)
    policy.save_merged(tmp_path / "mine")
    assert truths(tmp_path / "mine") == [{"mine": new}] * 2


def test_statistics_that_are_given_are_checked(tmp_path):
    with pytest.raises(ConfigError, match="the statistics given for mine have no 'action'"):
        OpenVLAPolicy.from_checkpoint(RECORDED, unnorm_key="mine", statistics={})


def test_a_checkpoint_is_not_written_over_itself(checkpoint):
    with pytest.raises(ConfigError, match="is the checkpoint that the weights come from"):
        OpenVLAPolicy.from_checkpoint(checkpoint).save_merged(checkpoint)


def test_a_shard_is_written_as_soon_as_it_is_full_and_let_go(tmp_path):
    """20 tensors of 400 bytes, two to a shard: no third one is ever alive, but for the one that is being made."""
    alive: set[int] = set()
    most = []

    def tensors():
        for number in range(20):
            memory = np.full(100, number, np.float32)
            alive.add(number)
            weakref.finalize(memory, alive.remove, number)
            most.append(len(alive))
            yield f"weight_{number:02d}", torch.from_numpy(memory)
            del memory

    save_checkpoint(tmp_path, tensors(), max_shard_bytes=800)
    assert max(most) == 3
    assert len(list(tmp_path.glob("model-*-of-00010.safetensors"))) == 10
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 20 * 400
    assert index["weight_map"]["weight_05"] == "model-00003-of-00010.safetensors"
    with safe_open(tmp_path / "model-00003-of-00010.safetensors", "pt") as file:
        assert file.get_tensor("weight_05").unique().tolist() == [5]


@pytest.mark.parametrize("older", [False, True])
def test_what_ends_the_writing_leaves_no_checkpoint(network, tmp_path, older):
    """Not even of an older and a newer half."""
    if older:
        save_checkpoint(tmp_path, network.named_parameters(), RECORDED)
    weights = (tmp_path / "model.safetensors").read_bytes() if older else b""

    def tensors():
        yield from list(network.named_parameters())[:-1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, tensors(), RECORDED, max_shard_bytes=300_000)
    if older:  # as it was
        assert (tmp_path / "model.safetensors").read_bytes() == weights and check_checkpoint(tmp_path) == tmp_path
    else:
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ConfigError, match=r"no config.json"):
            check_checkpoint(tmp_path)


def test_an_older_sharded_checkpoint_in_the_folder_does_not_hide_the_new_one(network, tmp_path):
    save_checkpoint(tmp_path, ((n, p * 0) for n, p in network.named_parameters()), RECORDED, max_shard_bytes=300_000)
    save_checkpoint(tmp_path, network.named_parameters(), RECORDED)
    assert load_network(tmp_path).projector.fc1.weight.equal(network.projector.fc1.weight)
