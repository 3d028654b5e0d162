"""vla_rl/model/action_head.py: the L1 head against the official code's numbers, its files, and what a policy does with it.

tests/data/action_head.npz was recorded with the official classes (openvla-oft@213c5ff prismatic/models/action_heads.py,
un-normalisation of modeling_prismatic.py, gripper of robot_utils.py) on the recorded tiny head.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.model.policies import DATA, RECORDED, copy_recorded, make_obs, move_adapters
from vla_rl.model.action_head import (
    ActionHead,
    keep_action_head,
    l1_output,
    load_action_head,
    save_action_head,
    with_plain_gripper,
)
from vla_rl.model.action_tokenizer import ActionTokenizer
from vla_rl.model.checkpoint_folder import find_l1_head, read_statistics
from vla_rl.model.find_checkpoint import check_checkpoint
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.tiny_openvla import TRAINED
from vla_rl.model.trained_as import read_trained_as, write_trained_as
from vla_rl.run.settings import ConfigError, LoraConfig
from vla_rl.types import NonFiniteError, PolicyInputs

HEAD = "action_head--150000_checkpoint.pt"


@pytest.fixture(scope="module")
def numbers():
    return np.load(DATA / "action_head.npz")


@pytest.fixture
def l1_checkpoint(tmp_path):
    """The recorded checkpoint with its head, and a tokenizer to read prompts with."""
    folder = copy_recorded(tmp_path / "c")
    shutil.copyfile(DATA / HEAD, folder / HEAD)
    shutil.copyfile(TRAINED / "tokenizer.json", folder / "tokenizer.json")
    return folder


def make_l1(folder, **settings) -> OpenVLAPolicy:
    return OpenVLAPolicy.from_checkpoint(folder, "parallel", use_proprio=True, head="l1", **settings)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.07)])
def test_the_head_gives_the_official_numbers_in_the_model_s_precision(l1_checkpoint, numbers, dtype, tolerance):
    head = load_action_head(l1_checkpoint, dtype=dtype)
    got = head(torch.from_numpy(numbers["hidden"]).to(dtype))
    assert got.dtype == dtype
    got = got.float()
    expected = numbers[f"normalized_{str(dtype).removeprefix('torch.')}"]
    assert got.shape == (3, 8, 7)
    np.testing.assert_allclose(got, expected, atol=tolerance, rtol=0)


def test_actions_are_the_official_ones_in_the_environment_s_units(numbers):
    _, statistics = read_statistics(RECORDED, None)
    normalized = torch.from_numpy(numbers["normalized_float32"])
    inputs = PolicyInputs(torch.zeros(3, 1, 2, 2, 3, dtype=torch.uint8), torch.zeros(3, 8), ("a",) * 3)
    tokenizer = ActionTokenizer(32000)
    output = l1_output(normalized, torch.zeros(3, 16), inputs, tokenizer, statistics["action"])
    np.testing.assert_allclose(output.actions, np.clip(numbers["environment"], -1, 1), atol=1e-6)  # robosuite clips too
    assert set(np.unique(output.actions[..., 6])) == {-1.0, 1.0} and output.logprobs.isnan().all()
    # the tokens say the same, as far as tokens can
    said = tokenizer.decode(output.action_tokens.numpy()).reshape(3, 8, 7)
    np.testing.assert_allclose(said[..., :6], np.clip(normalized[..., :6], -1, 1), atol=1.01 / 255)
    np.testing.assert_array_equal(said[..., 6] > 0.5, normalized[..., 6] > 0.5)


def test_a_gripper_in_between_is_what_is_carried_out():
    normalized = np.zeros((5, 7))
    normalized[:, 6] = [-0.3, 0.5, 0.51, 0.9, 1.7]
    assert with_plain_gripper(normalized)[:, 6].tolist() == [0, 0, 1, 1, 1]


def test_a_head_that_is_not_finite_ends_it(numbers):
    _, statistics = read_statistics(RECORDED, None)
    normalized = torch.full((1, 8, 7), torch.nan)
    with pytest.raises(NonFiniteError):
        l1_output(normalized, torch.zeros(1, 16), None, ActionTokenizer(32000), statistics["action"])


def test_its_parameters_have_the_official_names_and_sizes():
    expected = json.loads((DATA / "state_dict_keys_7b.json").read_text())["oft_action_head_l1.pt"]
    with torch.device("meta"):
        head = ActionHead(4096)
    assert {name: list(tensor.shape) for name, tensor in head.state_dict().items()} == expected


# ---------------------------------------------------------------------- a policy with it


def test_a_policy_acts_by_the_head_on_the_hidden_states_that_predict_the_tokens(l1_checkpoint):
    policy = make_l1(l1_checkpoint)
    inputs = policy.prepare(make_obs(3))
    tensors = policy.tensors(inputs)
    with torch.no_grad():
        hidden = policy.action_hidden(inputs, torch.zeros(3, 56, dtype=torch.int64))
        expected = policy.action_head(hidden)
        torch.testing.assert_close(policy.forward_l1(*tensors), expected)
    output = policy.act(make_obs(3), mode="greedy")
    assert policy.head == "l1" and output.actions.shape == (3, 8, 7)
    wanted = l1_output(
        expected, hidden[:, 0], inputs, policy.action_tokenizer, policy.statistics["action"]
    )  # un-normalised as above
    np.testing.assert_allclose(output.actions, wanted.actions, atol=1e-5)
    torch.testing.assert_close(output.hidden, hidden[:, 0])


def test_a_row_does_not_depend_on_the_rows_beside_it(l1_checkpoint):
    policy = make_l1(l1_checkpoint)
    together, alone = policy.act(make_obs(3), mode="greedy"), policy.act(make_obs(3).rows([1]), mode="greedy")
    np.testing.assert_allclose(together.actions[1], alone.actions[0], atol=1e-5)  # prompts of three lengths


def test_an_l1_policy_neither_samples_nor_scores(l1_checkpoint):
    policy = make_l1(l1_checkpoint)
    output = policy.act(make_obs(1), mode="greedy")
    for call in (
        lambda: policy.act(make_obs(1)),
        lambda: policy.evaluate_actions(output.inputs, output.action_tokens, temperature=1.0),
    ):
        with pytest.raises(ConfigError, match=r"python -m vla_rl\.warmstart"):
            call()


def test_the_fingerprint_tells_heads_apart(l1_checkpoint):
    policy = make_l1(l1_checkpoint)
    first, tokens = policy.fingerprint(), OpenVLAPolicy.from_checkpoint(l1_checkpoint, "parallel", use_proprio=True)
    assert first != tokens.fingerprint()
    policy.action_head.model["fc2"].bias += 0.01
    assert policy.fingerprint() != first


def test_wrong_uses_are_told():
    with pytest.raises(ConfigError, match="head=l1 with decoder=autoregressive"):
        OpenVLAPolicy.from_checkpoint(RECORDED, head="l1")
    with pytest.raises(ConfigError, match="expected tokens or l1"):
        OpenVLAPolicy.from_checkpoint(RECORDED, head="L1")
    with pytest.raises(ConfigError, match=r"has no L1 head.*give a checkpoint with one.*policy\.head=tokens"):
        OpenVLAPolicy.from_checkpoint(RECORDED, "parallel", head="l1")
    with pytest.raises(ConfigError, match="no L1 head"):
        OpenVLAPolicy.from_checkpoint(RECORDED, "parallel").forward_l1(None, None, None)


def test_an_l1_checkpoint_used_as_such_is_not_warned_about(l1_checkpoint, caplog):
    make_l1(l1_checkpoint)
    assert caplog.text == ""


# ---------------------------------------------------------------------- files


def test_what_is_saved_is_the_official_file_and_loads_back(l1_checkpoint, tmp_path):
    head = load_action_head(l1_checkpoint)
    path = save_action_head(head, tmp_path, 150000)
    ours, theirs = torch.load(path, weights_only=True), torch.load(DATA / HEAD, weights_only=True)
    assert path.name == HEAD and ours.keys() == theirs.keys() and all(name.startswith("module.") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_plain_file_is_read_and_recognised_too(l1_checkpoint):
    head = load_action_head(l1_checkpoint)
    (l1_checkpoint / HEAD).unlink()
    save_file(head.state_dict(), l1_checkpoint / "action_head.safetensors")
    assert load_action_head(l1_checkpoint).digest() == head.digest()
    assert find_l1_head(["config.json", "action_head.safetensors"]) == "action_head.safetensors"


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "is cut off"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda path: torch.save({"module.noise_predictor.fc1.bias": torch.zeros(1)}, path), "is a diffusion head"),
        (
            lambda path: torch.save({"module.model.fc1.bias": torch.zeros(3)}, path),
            "16 tensors, such as model.fc1.bias",
        ),
        (lambda path: shutil.copyfile(path, path.with_name("action_head--1_checkpoint.pt")), "2 action heads"),
    ],
)
def test_a_file_that_is_none_is_named_in_one_line_before_the_weights_load(l1_checkpoint, breaks, words, monkeypatch):
    breaks(l1_checkpoint / HEAD)
    monkeypatch.setattr("vla_rl.model.policy.load_network", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(ConfigError, match=words) as error:
        make_l1(l1_checkpoint)
    assert "\n" not in str(error.value)
    check_checkpoint(l1_checkpoint)  # whose token head is not this file's


def test_merged_weights_keep_the_head_only_where_it_is_of_them(l1_checkpoint, tmp_path):
    write_trained_as(l1_checkpoint, {"decoder": "parallel", "head": "l1"})
    make_l1(l1_checkpoint).save_merged(tmp_path / "l1")
    same = make_l1(tmp_path / "l1").act(make_obs(2), mode="greedy")
    np.testing.assert_array_equal(same.actions, make_l1(l1_checkpoint).act(make_obs(2), mode="greedy").actions)
    assert read_trained_as(tmp_path / "l1")["head"] == "l1"
    adapted = OpenVLAPolicy.from_checkpoint(
        l1_checkpoint, "parallel", use_proprio=True, lora=LoraConfig(rank=2, alpha=4)
    )
    move_adapters(adapted)
    adapted.save_merged(tmp_path / "tokens")
    assert find_l1_head(path.name for path in (tmp_path / "tokens").iterdir()) is None
    assert read_trained_as(tmp_path / "tokens") == {"decoder": "parallel", "head": "tokens"}


def test_nothing_is_kept_of_a_checkpoint_without_a_head(tmp_path):
    keep_action_head(RECORDED, tmp_path, fits=True)
    keep_action_head(RECORDED, tmp_path, fits=False)
    assert list(tmp_path.iterdir()) == []
