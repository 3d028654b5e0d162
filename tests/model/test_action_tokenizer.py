"""action_tokenizer gives the official code's numbers, exactly (tests/data/action_tokenizer.npz)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vla_rl.model.action_tokenizer import ActionTokenizer, normalize_proprio, to_environment, unnormalize

OFFICIAL = np.load(Path(__file__).parents[1] / "data" / "action_tokenizer.npz")
# "action" of the statistics the official arrays were made with (shared tiny_openvla, dataset_statistics.json)
STATS = {
    "q01": [-0.353416, -0.845943, -0.606886, -0.806426, -0.984593, -0.676947, 0.0],
    "q99": [0.257641, 0.414751, 0.599906, 0.743384, 0.842991, 0.504753, 1.0],
    "mask": [True] * 6 + [False],
}


@pytest.fixture
def tokenizer():
    return ActionTokenizer(vocab_size=32000)


def test_first_id_is_the_first_of_the_last_256(tokenizer):
    assert tokenizer.first_id == 31744


def test_encoding_equals_the_official_one(tokenizer):
    ids = tokenizer.encode(OFFICIAL["actions"])
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, OFFICIAL["token_ids"])


def test_decoding_equals_the_official_one_also_outside_the_action_ids(tokenizer):
    np.testing.assert_array_equal(tokenizer.decode(OFFICIAL["decode_token_ids"]), OFFICIAL["decode_normalized"])


def test_edges_and_centres_equal_the_official_ones(tokenizer):
    np.testing.assert_array_equal(tokenizer.edges, OFFICIAL["bins"])
    np.testing.assert_array_equal(tokenizer.centres, OFFICIAL["bin_centers"])


def test_each_id_decodes_to_an_action_that_encodes_to_it(tokenizer):
    ids = np.arange(tokenizer.first_id + 1, 32000).reshape(5, 51)
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)


def test_the_two_lowest_ids_decode_alike(tokenizer):
    low, next_low = tokenizer.decode(np.array([31744, 31745]))
    assert low == next_low == pytest.approx(254 / 255)


def test_decoding_takes_tensors_of_any_shape(tokenizer):
    ids = torch.randint(31744, 32000, (3, 8, 7))
    actions = tokenizer.decode(ids)
    assert actions.shape == (3, 8, 7) and actions.dtype == np.float64


def test_another_vocabulary_and_number_of_bins():
    tokenizer = ActionTokenizer(vocab_size=20, n_bins=5)  # edges -1 -0.5 0 0.5 1; ids 15..19
    assert tokenizer.first_id == 15
    assert tokenizer.encode(np.array([-1, -0.6, 0.1, 0.9, 1])).tolist() == [19, 19, 17, 16, 15]
    assert tokenizer.decode(np.array([19, 18, 17, 16, 15])).tolist() == [-0.75, -0.25, 0.25, 0.75, 0.75]


@pytest.mark.parametrize(("oft", "key"), [(False, "unnormalized_openvla"), (True, "unnormalized_oft")])
def test_unnormalizing_equals_the_official_one(oft, key):
    np.testing.assert_array_equal(unnormalize(OFFICIAL["normalized"], STATS, oft=oft), OFFICIAL[key])


def test_without_a_mask_every_dimension_is_unnormalized():
    actions = unnormalize(np.array([-1.0, 0.0, 1.0]), {"q01": [0, 0, 0], "q99": [2, 4, 6]}, oft=False)
    assert actions.tolist() == [0, 2, 6]


def test_a_chunk_is_unnormalized_step_by_step():
    chunk = np.linspace(-1, 1, 2 * 8 * 7).reshape(2, 8, 7)
    np.testing.assert_array_equal(unnormalize(chunk, STATS, oft=True)[1, 3], unnormalize(chunk[1, 3], STATS, oft=True))


def test_gripper_closes_at_zero_and_opens_at_one():
    gripper = np.array([0.0, 0.49, 0.51, 1.0, -0.99])
    actions = to_environment(np.stack([np.zeros(5)] * 6 + [gripper], axis=1))
    assert actions[:, -1].tolist() == [1, 1, -1, -1, 1]  # robosuite: +1 closes


def test_gripper_half_way_holds_the_fingers_and_is_no_negative_zero():
    gripper = to_environment(np.full((1, 7), 0.5))[0, -1]
    assert gripper == 0 and not np.signbit(gripper)


def test_actions_reach_the_environment_in_its_range_and_type():
    actions = np.array([[1.5, -1.5, 0.25, 0, 0, 0, 1]])
    result = to_environment(actions)
    assert result.dtype == np.float32 and result.tolist() == [[1, -1, 0.25, 0, 0, 0, -1]]
    assert actions[0, -1] == 1  # the argument is left alone


def test_proprio_bounds_map_to_minus_one_and_one():
    stats = {"q01": [0.0] * 8, "q99": [2.0] * 8}
    proprio = np.array([0, 1, 2, 3, -1, 0.5, 1.5, 1], np.float32)
    scaled = normalize_proprio(proprio, stats)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, [-1, 0, 1, 1, -1, -0.5, 0.5, 0], atol=1e-7)


def test_a_constant_proprio_dimension_stays_finite():
    stats = {"q01": [0.3] * 8, "q99": [0.3] * 8}
    assert normalize_proprio(np.full((2, 8), 0.3), stats).tolist() == [[-1.0] * 8] * 2


def test_masked_proprio_passes_through():
    stats = {"q01": [0.0, 0.0], "q99": [4.0, 4.0], "mask": [True, False]}
    np.testing.assert_allclose(normalize_proprio(np.array([1.0, 0.4]), stats), [-0.5, 0.4], atol=1e-6)


def test_wrong_statistics_are_named():
    with pytest.raises(ValueError, match=r"lack q01 and q99, they have .'action', 'proprio'."):
        unnormalize(np.zeros(7), {"action": {}, "proprio": {}}, oft=False)
    with pytest.raises(ValueError, match=r"shape \(2, 8\) with statistics of shapes q01 \(7,\)"):
        unnormalize(np.zeros((2, 8)), STATS, oft=False)
    with pytest.raises(ValueError, match="proprio of shape"):
        normalize_proprio(np.zeros(8), STATS)


def test_wrong_values_are_refused(tokenizer):
    with pytest.raises(ValueError, match="NaN"):
        tokenizer.encode(np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="expected integers, got float64"):
        tokenizer.decode(np.array([0.5]))
    with pytest.raises(ValueError, match="n_bins=256: expected 2 to vocab_size=100"):
        ActionTokenizer(vocab_size=100)
