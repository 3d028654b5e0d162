"""vla_rl/fine_tuning/two_heads.py: what the token head learns moves it, and never the L1 head."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.model.policies import make_obs
from vla_rl.fine_tuning.supervised_fine_tuning import cross_entropy, soft_labels
from vla_rl.fine_tuning.two_heads import ROWS_FILE, L1Teacher, TokenStudent
from vla_rl.model.action_head import ActionHead, save_action_head
from vla_rl.model.checkpoint_folder import find_l1_head
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.tiny_openvla import TRAINED
from vla_rl.model.trained_as import read_trained_as
from vla_rl.run.settings import ConfigError, LoraConfig


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("l1") / "model"
    shutil.copytree(TRAINED, folder)
    torch.manual_seed(0)
    save_action_head(ActionHead(128), folder, 7)
    return folder


def make(checkpoint, train_head=True, label_sigma=0.0) -> tuple[L1Teacher, TokenStudent]:
    torch.manual_seed(0)
    policy = OpenVLAPolicy.from_checkpoint(
        checkpoint, "parallel", use_proprio=True, chunk_size=1, head="l1", lora=LoraConfig(rank=2, alpha=4)
    )
    return L1Teacher(policy), TokenStudent(policy, train_head, label_sigma)


def learn(student: TokenStudent, label, steps: int = 6) -> list[float]:
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=0.01), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = student.loss(label.inputs, label.action_tokens)
        loss.backward()
        optimizer.step()
        student.stepped()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("train_head", [True, False])
def test_the_token_head_learns_the_l1_head_s_actions_and_does_not_move_it(checkpoint, train_head):
    teacher, student = make(checkpoint, train_head)
    obs = make_obs(4)
    label = teacher.act(obs)
    others = {n: p.detach().clone() for n, p in student.policy.network.named_parameters() if not p.requires_grad}
    losses = learn(student, label)
    assert losses[-1] < 0.8 * losses[0]
    again = teacher.act(obs)
    np.testing.assert_array_equal(again.actions, label.actions)  # to the bit
    assert torch.equal(again.action_tokens, label.action_tokens) and torch.equal(again.hidden, label.hidden)
    moved = {n for n, p in student.policy.network.named_parameters() if n in others and not torch.equal(p, others[n])}
    assert moved == ({"language_model.lm_head.weight"} if train_head else set())
    head = student.policy.network.language_model.lm_head.weight
    if train_head:  # of the action ids alone
        before = others["language_model.lm_head.weight"]
        assert torch.equal(head[: student.ids.start], before[: student.ids.start])
        assert torch.equal(head[student.ids.stop :], before[student.ids.stop :])
        assert torch.equal(head[student.ids], student.rows)
    sampled = student.act(obs, generator=torch.Generator().manual_seed(0))
    scored = student.policy.network.action_logits(student.policy.action_hidden(sampled.inputs, sampled.action_tokens))
    index = (sampled.action_tokens - student.ids.start)[..., None]
    expected = torch.log_softmax(scored, dim=-1).gather(-1, index).squeeze(-1)
    torch.testing.assert_close(sampled.logprobs, expected.detach(), atol=1e-5, rtol=1e-5)  # it acts as it has learned


def test_the_loss_is_that_of_fine_tuning_over_the_whole_vocabulary(checkpoint):
    teacher, student = make(checkpoint, label_sigma=2.0)
    label = teacher.act(make_obs(2))
    policy = student.policy
    logits = policy.network.vocabulary_logits(policy.action_hidden(label.inputs, label.action_tokens))
    index = label.action_tokens - student.ids.start
    expected = cross_entropy(logits, soft_labels(index, 256, 2.0, student.spread), student.ids.start)
    torch.testing.assert_close(student.loss(label.inputs, label.action_tokens), expected)


def test_a_checkpoint_brings_both_parts_back_and_one_of_another_kind_is_refused(checkpoint, tmp_path):
    teacher, student = make(checkpoint)
    learn(student, teacher.act(make_obs(2)), steps=2)
    student.save(tmp_path / "c", [p.detach().clone() for p in student.parameters()])
    _, again = make(checkpoint)
    assert again.fingerprint() == student.fingerprint() != make(checkpoint, train_head=False)[1].fingerprint()
    again.load(tmp_path / "c")
    for obs in (make_obs(2), make_obs(2, seed=1)):
        ours, theirs = student.act(obs, mode="greedy"), again.act(obs, mode="greedy")
        assert torch.equal(ours.action_tokens, theirs.action_tokens) and torch.equal(ours.logprobs, theirs.logprobs)
    (tmp_path / "c" / ROWS_FILE).write_bytes(b"torn")
    with pytest.raises(ConfigError, match=ROWS_FILE):
        again.load(tmp_path / "c")


def test_the_model_acts_by_tokens_as_the_student_did_and_has_no_l1_head(checkpoint, tmp_path):
    teacher, student = make(checkpoint)
    obs = make_obs(3)
    learn(student, teacher.act(obs), steps=3)
    student.save_model(tmp_path / "model", {"image_size": 128, "render": "fast"})
    names = [path.name for path in (tmp_path / "model").iterdir()]
    assert find_l1_head(names) is None and "proprio_projector.safetensors" in names
    assert {t.dtype for t in load_file(tmp_path / "model/model.safetensors").values()} == {torch.float32}
    trained_as = read_trained_as(tmp_path / "model")
    assert (trained_as["head"], trained_as["use_proprio"], trained_as["render"]) == ("tokens", True, "fast")
    model = OpenVLAPolicy.from_checkpoint(tmp_path / "model", "parallel", use_proprio=True, chunk_size=1)
    ours, theirs = student.act(obs, mode="greedy"), model.act(obs, mode="greedy")
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=2e-4, rtol=0)
    assert (ours.action_tokens == theirs.action_tokens).float().mean() > 0.95  # ties aside
