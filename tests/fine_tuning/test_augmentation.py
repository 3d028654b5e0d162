"""Augmentation: each operation against a second source (colorsys, torchvision, numbers by hand), and its ranges."""

import colorsys

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from vla_rl.fine_tuning.augmentation import adjust_contrast, adjust_hue_and_saturation, augment, crop
from vla_rl.model.image_transform import crop_center


def random_colours(side=24, seed=0):
    return np.random.default_rng(seed).random((side, side, 3), dtype=np.float32)


def smooth_image(side=112):
    across, down = np.meshgrid(np.linspace(0, 3, side), np.linspace(0, 2, side))
    return np.stack([np.sin(across), np.cos(down), np.sin(across + down)], -1).astype(np.float32) / 2 + 0.5


def test_hue_and_saturation_are_hsv_s():
    colours = random_colours()
    changed = adjust_hue_and_saturation(colours, 0.04, 1.15)
    for at in ((0, 0), (3, 17), (23, 5)):
        hue, saturation, value = colorsys.rgb_to_hsv(*colours[at].tolist())
        expected = colorsys.hsv_to_rgb((hue + 0.04) % 1, min(1, saturation * 1.15), value)
        np.testing.assert_allclose(changed[at], expected, atol=1e-5)


def test_hue_agrees_with_torchvision():
    colours = random_colours(seed=1)
    expected = tv.adjust_hue(torch.from_numpy(colours).permute(2, 0, 1), -0.05).permute(1, 2, 0)
    np.testing.assert_allclose(adjust_hue_and_saturation(colours, -0.05, 1.0), expected, atol=1e-5)


def test_contrast_is_about_each_channel_s_mean():
    colours = np.array([[[0.2, 0.5, 0.0]], [[0.6, 0.5, 1.0]]], np.float32)  # means 0.4, 0.5, 0.5
    expected = [[[0.16, 0.5, -0.1]], [[0.64, 0.5, 1.1]]]
    np.testing.assert_allclose(adjust_contrast(colours, 1.2), expected, atol=1e-6)


def test_the_middle_crop_is_the_evaluation_s_centre_crop():
    image = smooth_image()
    expected = crop_center((image * 255).astype(np.uint8)) / 255
    np.testing.assert_allclose(crop(image, 0, 0), expected, atol=0.01)


@pytest.mark.parametrize(("place", "kept"), [((-1, -1), np.s_[0, 0]), ((1, -1), np.s_[0, -1]), ((1, 1), np.s_[-1, -1])])
def test_a_crop_at_a_corner_keeps_the_corner_s_pixel(place, kept):
    colours = random_colours()
    np.testing.assert_allclose(crop(colours, *place)[kept], colours[kept], atol=0.02)


def test_a_crop_is_90_percent_of_the_area():
    side = 101
    ramp = np.broadcast_to(np.linspace(0, 1, side, dtype=np.float32)[None, :, None], (side, side, 3)).copy()
    row = crop(ramp, -1, 0)[50, :, 0]
    assert row[-1] - row[0] == pytest.approx(np.sqrt(0.9), abs=0.002)


def test_augmentation_is_of_the_generator_alone_and_changes_the_image():
    image = (smooth_image() * 255).astype(np.uint8)
    first, again, other = (augment(image, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.dtype == np.uint8 and first.shape == image.shape
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - other).mean() > 3
    assert np.abs(first.astype(int) - image).mean() > 3


def test_the_brightness_of_a_grey_image_moves_by_at_most_a_fifth():
    grey = np.full((32, 32, 3), 128, np.uint8)
    values = [int(augment(grey, np.random.default_rng(seed))[16, 16, 0]) for seed in range(300)]
    assert 128 - 52 <= min(values) < 128 - 45 and 128 + 45 < max(values) <= 128 + 52
