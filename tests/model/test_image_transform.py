"""image_transform gives TensorFlow's images: expected arrays come from the official chain (tests/data/images.npz).

`scene` is a rendered-like picture, `noise` random pixels. `*_raw256` is what goes into the JPEG encoder, so it is
the image AFTER the rotation by 180 degrees (a test below shows it).
"""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vla_rl.model.image_transform import (
    OpenVLAImageTransform,
    crop_center,
    jpeg_round_trip,
    lanczos3_weights,
    preprocess,
)

OFFICIAL = np.load(Path(__file__).parents[1] / "data" / "images.npz")


def assert_same_picture(image, official, different_share):
    difference = np.abs(image.astype(int) - official.astype(int))
    assert image.dtype == np.uint8 and image.shape == official.shape
    assert difference.max() <= 1
    assert (difference > 0).mean() <= different_share


@pytest.mark.parametrize("name", ["scene", "noise"])
def test_cropped_image_equals_the_official_one(name):
    image = preprocess(OFFICIAL[f"{name}_raw256"], center_crop=True)
    assert_same_picture(image, OFFICIAL[f"{name}_crop224"], different_share=1e-4)  # measured 1.3e-5


def test_uncropped_image_equals_the_official_one():
    image = preprocess(OFFICIAL["scene_raw256"], center_crop=False)
    assert_same_picture(image, OFFICIAL["scene_resize224"], different_share=1e-4)


@pytest.mark.parametrize("center_crop", [True, False])
def test_the_transform_that_workers_are_given_is_preprocess_and_needs_no_torch(center_crop):
    transform = OpenVLAImageTransform(112, center_crop)
    image = OFFICIAL["scene_raw256"]
    np.testing.assert_array_equal(transform(image), preprocess(image, center_crop, 112))
    sent = pickle.dumps(transform)  # as multiprocessing sends it; below our own bytes are read
    assert pickle.loads(sent) == transform != OpenVLAImageTransform(112, not center_crop)
    code = f"import pickle, sys; pickle.loads({sent!r}); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


def test_jpeg_is_bit_equal_to_the_official_one():
    np.testing.assert_array_equal(jpeg_round_trip(OFFICIAL["scene_raw256"])[::4, ::4], OFFICIAL["scene_jpeg256_sub4"])


def test_crop_is_bit_equal_to_the_official_one():
    np.testing.assert_array_equal(crop_center(OFFICIAL["scene_resize224"]), OFFICIAL["scene_crop224"])


def test_official_raw_images_are_already_rotated():
    raw = OFFICIAL["scene_raw256"]
    wrong = jpeg_round_trip(np.ascontiguousarray(raw[::-1, ::-1]))[::4, ::4]
    assert np.mean(wrong != OFFICIAL["scene_jpeg256_sub4"]) > 0.5


def test_preprocess_does_not_rotate():
    image = np.zeros((256, 256, 3), np.uint8)
    image[:64, :64] = 200  # bright corner at the top left
    small = preprocess(image, center_crop=True)
    assert small[:30, :30].min() > 150 and small[-100:, -100:].max() < 10


@pytest.mark.parametrize(("shape", "size"), [((128, 128), 112), ((100, 160), 112), ((64, 64), 224), ((5, 7), 1)])
def test_any_input_and_model_size_works(shape, size):
    image = preprocess(np.full((*shape, 3), 77, np.uint8), center_crop=True, size=size)
    assert image.shape == (size, size, 3) and (image == 77).all()


@pytest.mark.parametrize(("source", "target"), [(256, 224), (128, 112), (64, 224)])
def test_lanczos_rows_sum_to_one_and_are_symmetric(source, target):
    weights = lanczos3_weights(source, target).toarray()
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=2e-5)


def test_lanczos_weights_by_hand():
    # 6 -> 2: 3 source pixels a target pixel; target 0 has its centre at 1.5, source pixel 1 exactly there, pixel 0 at
    # distance 1, stretched to 1/3: sinc(1/3) sinc(1/9) = 0.826993 * 0.979816 = 0.810301; pixel 4 at 3 / 3 = 1: 0
    weights = lanczos3_weights(6, 2).toarray()[0]
    assert weights[0] / weights[1] == pytest.approx(0.810301, abs=1e-5)
    assert weights[2] == pytest.approx(weights[0], abs=1e-6)
    assert weights[4] == pytest.approx(0, abs=1e-6)


def test_callers_cannot_change_the_cached_result():
    image = OFFICIAL["scene_raw256"]
    first = preprocess(image, center_crop=True)
    expected = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(preprocess(image, center_crop=True), expected)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8, 3), np.float32), "got float32.*np.uint8"),
        (np.zeros((2, 8, 8, 3), np.uint8), "one image at a time"),
        (np.zeros((8, 8, 4), np.uint8), r"shape \(8, 8, 4\)"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        ([[1, 2, 3]], "got list"),
    ],
)
def test_a_wrong_image_is_refused_with_what_came(image, words):
    with pytest.raises(ValueError, match=words):
        preprocess(image, center_crop=True)


def test_a_wrong_size_is_refused():
    with pytest.raises(ValueError, match="size=0"):
        preprocess(OFFICIAL["scene_raw256"], center_crop=True, size=0)
