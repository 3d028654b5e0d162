"""vla_rl/model/checkpoint_folder.py: the official layout, and what is told of files that are missing, torn or of another kind."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
from safetensors import safe_open

from tests.model.policies import RECORDED, copy_recorded, make_policy
from vla_rl.model.checkpoint_folder import read_config, save_checkpoint
from vla_rl.model.policy import OpenVLAPolicy, check_checkpoint
from vla_rl.model.prismatic import load_network
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
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((RECORDED / "config.json").read_text())
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
