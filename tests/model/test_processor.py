"""vla_rl/model/processor.py: the prompt, images and proprioception that the network reads."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.model.policies import DATA, TASKS, make_obs, make_policy
from vla_rl.model.image_transform import OpenVLAImageTransform, preprocess
from vla_rl.model.processor import Processor, append_space, prompt_text
from vla_rl.run.settings import ConfigError


def test_prompt_is_the_official_text():
    cases = json.loads((DATA / "prompts.json").read_text())["cases"]
    assert len(cases) == 14
    for case in cases:
        assert prompt_text(case["task"]) == case["prompt"]
        assert append_space(case["input_ids"], 29871) == case["input_ids_with_29871"]
        assert append_space(case["input_ids_with_29871"], 29871) == case["input_ids_with_29871"]


def test_pixel_values_are_normalised_for_dino_then_siglip_image_by_image():
    policy = make_policy(num_images=2, lora=None)
    assert isinstance(policy.processor, Processor)
    images = torch.randint(0, 256, (1, 2, 112, 112, 3), dtype=torch.uint8)
    pixels = policy.processor.pixel_values(images)
    assert pixels.shape == (1, 12, 112, 112)
    value = images[0, 1, 5, 6, 2].item() / 255  # blue of the second image
    assert pixels[0, 6 + 2, 5, 6].item() == pytest.approx((value - 0.406) / 0.225, abs=1e-5)
    assert pixels[0, 6 + 5, 5, 6].item() == pytest.approx((value - 0.5) / 0.5, abs=1e-5)


def test_prompt_ids_are_bos_text_and_one_space_padded_on_the_left(parallel):
    ids, mask = parallel.processor.tokenize(TASKS)
    space = parallel.processor.tokenizer.token_to_id("▁")
    for task, row, valid in zip(TASKS, ids, mask, strict=True):
        kept = row[valid.bool()].tolist()
        assert kept[0] == 1 and kept[-1] == space and kept[-2] != space
        assert parallel.processor.tokenizer.decode(kept[1:-1]) == prompt_text(task)
        assert valid.tolist() == sorted(valid.tolist())
        assert set(row[~valid.bool()].tolist()) <= {960}


def test_checkpoint_without_a_tokenizer_fails_only_when_a_prompt_is_needed(recorded):
    with pytest.raises(ConfigError, match=r"no tokenizer\.json in .*tiny_openvla"):
        recorded.act(make_obs())


def test_prompt_that_does_not_fit_is_an_error(parallel):
    with pytest.raises(ValueError, match="the model has room for"):
        parallel.processor.tokenize(("字" * 700,))


def test_images_are_preprocessed_at_the_models_size_with_or_without_crop():
    obs = make_obs(2)
    for center_crop in (True, False):
        images = make_policy(center_crop=center_crop, lora=None).prepare(obs).images
        assert images.shape == (2, 1, 112, 112, 3) and images.dtype == torch.uint8
        np.testing.assert_array_equal(images[1, 0], preprocess(obs.images[1, 0], center_crop, 112))


def test_images_that_the_environments_prepared_pass_through_and_are_told_by_their_mark():
    policy, obs = make_policy(num_images=2, lora=None), make_obs(2, num_images=2)
    transform = policy.processor.image_transform
    images = np.stack([[transform(image) for image in row] for row in obs.images])
    prepared = replace(obs, images=images, image_transform=transform)
    ours, expected = policy.prepare(prepared), policy.prepare(obs)
    assert ours.images.equal(expected.images) and ours.proprio.equal(expected.proprio)
    assert ours.instructions == expected.instructions
    images[:] = 0  # an environment's array, which it may reuse
    assert ours.images.equal(expected.images)
    # rendered images that happen to have the model's size are not taken for prepared ones
    small = replace(obs, images=obs.images[:, :, :112, :112])
    np.testing.assert_array_equal(policy.prepare(small).images[1, 1], transform(small.images[1, 1]))


def test_images_prepared_for_another_policy_are_refused():
    policy, other = make_policy(lora=None), OpenVLAImageTransform(112, center_crop=False)
    obs = replace(make_obs(1), image_transform=other)
    with pytest.raises(
        ValueError, match=r"center_crop=False.*this policy reads.*center_crop=True.*image_transform=policy"
    ):
        policy.prepare(obs)


def test_prompts_are_padded_to_the_longest_of_those_told_until_others_are(parallel):
    processor = Processor.__new__(Processor)
    processor.__dict__ |= vars(parallel.processor) | {"prompt_ids": {}}
    lengths = [processor.tokenize((text,))[0].shape[1] for text in TASKS]
    assert len(set(lengths)) > 1
    processor.pad_to(TASKS)
    assert {processor.tokenize((text,))[0].shape[1] for text in TASKS} == {max(lengths)}
    processor.pad_to(TASKS[:1])
    assert [processor.tokenize((text,))[0].shape[1] for text in TASKS] == [max(n, lengths[0]) for n in lengths]


def test_in_batches_of_one_shape_a_rows_numbers_depend_on_no_other_row():
    """In float32 on a CPU. What an evaluation's outcomes do not depend on: which episodes end first, how many workers there are."""
    policy = make_policy(lora=None)
    policy.processor.pad_to(TASKS)
    obs = make_obs(8)
    alone = {}
    for rows in ([0, 1, 2, 3], [3, 0, 7, 1], [2, 2, 2, 2], [5, 4, 0, 3], [1, 6, 7, 5]):
        tensors = policy.tensors(policy.prepare(obs.rows(rows)))
        logits, hidden = policy.forward_logits(*tensors[:3], proprio=tensors[3])
        for place, row in enumerate(rows):
            for name, value in (("logits", logits[place]), ("hidden", hidden[place])):
                assert torch.equal(alone.setdefault((name, row), value), value), f"{name} of row {row} in place {place}"
