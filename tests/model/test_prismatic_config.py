"""vla_rl/model/prismatic_config.py: what config.json says is followed or refused in one line, whatever stands in it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from vla_rl.model.checkpoint_folder import check_folder, read_statistics
from vla_rl.model.prismatic import build_network, load_network
from vla_rl.model.prismatic_config import read_config, read_json
from vla_rl.run.settings import ConfigError


def change_config(checkpoint, text=None, drop=(), **changes):
    raw = json.loads((checkpoint / "config.json").read_text()) | changes
    raw["text_config"] = {k: v for k, v in (raw["text_config"] | (text or {})).items() if k not in drop}
    (checkpoint / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "text", [{"rope_theta": 5000.0}, {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}}]
)
def test_rotary_frequencies_follow_either_spelling_of_their_base(checkpoint, text):
    change_config(checkpoint, text, drop=() if "rope_theta" in text else ("rope_theta",))
    frequencies = load_network(checkpoint).language_model.model.rotary_emb.inv_freq
    # theta^(-2i / head size), head size 16 / 2 = 8
    torch.testing.assert_close(frequencies, 5000.0 ** (-torch.arange(0, 8, 2) / 8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"rope_parameters": {"rope_theta": 5000.0}}, "rope_theta 10000.0 and 5000.0; keep the one"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}}, "rope_parameters rope_type='llama3'"),
        ({"rope_parameters": {"factor": 2.0}}, r"rope_parameters \{'factor': 2.0\} is not implemented"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling .* is not implemented"),
        ({"rope_parameters": {"rope_theta": "5000"}}, "rope_theta='5000', expected a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented"),
        ({"model_type": "mistral"}, "model_type='mistral' is not implemented"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"hidden_size": 18, "num_attention_heads": 4}, "do not go together"),
        ({"hidden_size": "16"}, "hidden_size='16', expected a whole number"),
    ],
)
def test_another_language_model_is_refused(checkpoint, text, message):
    change_config(checkpoint, text)
    with pytest.raises(ConfigError, match=message):
        read_config(checkpoint)


def test_settings_that_change_nothing_are_accepted(checkpoint):
    default = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": None}
    before = read_config(checkpoint)
    change_config(checkpoint, {"rope_parameters": default, "head_dim": 8, "pruned_heads": {}, "sliding_window": None})
    assert replace(read_config(checkpoint), raw={}) == replace(before, raw={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": []}, "text_config is list"),
        ({"n_action_bins": -1}, "n_action_bins=-1, expected a whole number from 2"),
        ({"pad_to_multiple_of": 10**6}, "pad_to_multiple_of=1000000"),
        ({"timm_override_act_layers": ["gelu"]}, "expected timm_override_act_layers of 2"),
        ({"timm_override_act_layers": ["no_such", None]}, "each null, gelu or quick_gelu, got"),
        (
            {"timm_model_ids": ["hf-hub:a/b", "vit_so400m_patch14_siglip_224"]},
            "timm_model_ids has 'hf-hub:a/b', expected vit_l",
        ),
        (
            {"timm_model_ids": ["local-dir:/etc", "vit_so400m_patch14_siglip_224"]},
            "expected vit_large_patch14_reg4_dinov2",
        ),
        (
            {"timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "resnet18"]},
            "'resnet18', expected vit_so400m_patch14_siglip_224 or vit_so400m_patch14_siglip_384",
        ),
        (
            {"_tiny_timm_overrides": {"vit_so400m_patch14_siglip_224": {"checkpoint_path": "/etc/passwd"}}},
            "expected _tiny_timm_overrides of embed_dim, depth, num_heads, mlp_ratio",
        ),
        ({"image_sizes": ["224", "224"]}, "expected one image size"),
        ({"use_fused_vision_backbone": "false"}, "expected the fused"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not implemented"),
    ],
)
def test_a_mistake_in_config_json_is_named(checkpoint, change, message):
    raw = json.loads((checkpoint / "config.json").read_text()) | change
    (checkpoint / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=message):
        build_network(checkpoint, use_proprio=False)


def test_unknown_activation_is_named(checkpoint):
    change_config(checkpoint, {"hidden_act": "no_such"})
    with pytest.raises(ConfigError, match=r"describes no network that can be built .*no_such"):
        build_network(checkpoint, use_proprio=False)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json.*download it again") as error:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)


def nodes(value, at=()):
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from nodes(value[key], (*at, key))


def replaced(value, at, new):
    """A copy with another value at a place; without the place if `new` is Ellipsis."""
    if not at:
        return new
    value = copy.deepcopy(value)
    parent = value
    for key in at[:-1]:
        parent = parent[key]
    if new is ...:
        del parent[at[-1]]
    else:
        parent[at[-1]] = new
    return value


@pytest.mark.slow  # some of them, and others: tests/test_files_of_strangers.py
@pytest.mark.parametrize("name", ["config.json", "dataset_statistics.json", "preprocessor_config.json"])
def test_any_wrong_value_anywhere_is_accepted_or_told_in_one_line(checkpoint, name):
    path, plain = checkpoint / name, replace(read_config(checkpoint), raw={})
    value, refused = json.loads(path.read_text()), 0
    for at in nodes(value):
        for new in (None, "x", -1, 10**400, [], {}, True, float("nan"), ...) if at else ([], "x", {}, 3):
            path.write_text(json.dumps(replaced(value, at, new)))
            try:
                check_folder(checkpoint, use_proprio=True)
                read_statistics(checkpoint, "libero_spatial", use_proprio=True)
                if replace(read_config(checkpoint), raw={}) != plain:
                    build_network(checkpoint, use_proprio=True)
            except ConfigError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 700
    assert refused > 50


def test_a_run_or_an_adapter_in_place_of_a_checkpoint_is_recognised(tmp_path):
    for made, words in [
        ("run/checkpoints/iteration-000010/adapter/adapter_config.json", {"run": "a run of PPO or GRPO"}),
        (
            "run/checkpoints/iteration-000010/manifest.json",
            {"run/checkpoints/iteration-000010": "a run of PPO or GRPO"},
        ),
        ("run/checkpoints/iteration-000010/x", {"run/checkpoints/iteration-000010/adapter": "it is LoRA weights"}),
        ("sft/model/config.json", {"sft": "it is a run whose fine-tuned model lies in"}),
        ("other/x", {"other": "give a checkpoint folder in the official OpenVLA layout"}),
    ]:
        (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / made).write_text("{}")
        for folder, said in words.items():
            with pytest.raises(ConfigError, match=f"no config.json in .*{folder}; .*{said}") as error:
                read_config(tmp_path / folder)
            assert "\n" not in str(error.value)
            assert ("policy.adapter=" in str(error.value)) == folder.startswith("run")


def test_json_with_strange_names_of_data_sets_is_told_in_one_line(checkpoint):
    (checkpoint / "dataset_statistics.json").write_text(json.dumps({"a\nb": {}, "c": {}}))
    with pytest.raises(ConfigError, match=r"dataset_statistics.json has the name 'a\\nb', expected printable"):
        read_statistics(checkpoint, "c")
