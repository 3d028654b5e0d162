"""vla_rl/fine_tuning/supervised_fine_tuning.py: labels, loss, learning rate."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vla_rl.fine_tuning.supervised_fine_tuning import cross_entropy, label_tokens, learning_rate, soft_labels
from vla_rl.model.policy import OpenVLAPolicy


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
