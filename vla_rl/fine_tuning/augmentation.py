"""OpenVLA's image augmentation for training: a random crop of 90 % of the area, then brightness, contrast, saturation, hue.

The operations are those of TensorFlow, which OpenVLA's data pipeline uses (openvla c8f03f4,
prismatic/vla/datasets/datasets.py, image_augment_kwargs, by way of dlimp): brightness is added, contrast is about each
channel's mean, saturation and hue are changed in HSV. OpenCV interpolates the crop at 1/32 of a pixel.

S: image side.
"""

from __future__ import annotations

import cv2
import numpy as np

from vla_rl.model.image_transform import CROP_AREA

BRIGHTNESS = 0.2  # added: -0.2..0.2 of the range 0..1
CONTRAST = SATURATION = (0.8, 1.2)  # factors
HUE = 0.05  # added: -0.05..0.05 of the colour circle


def augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random changes in OpenVLA's order, each clipped to the range of colours. uint8 [S, S, 3] in and out."""
    colours = crop(image.astype(np.float32) / 255, *rng.uniform(-1, 1, size=2))
    colours = np.clip(colours + np.float32(rng.uniform(-BRIGHTNESS, BRIGHTNESS)), 0, 1)
    colours = np.clip(adjust_contrast(colours, rng.uniform(*CONTRAST)), 0, 1)
    colours = adjust_hue_and_saturation(colours, rng.uniform(-HUE, HUE), rng.uniform(*SATURATION))
    return (np.clip(colours, 0, 1) * np.float32(255.5)).astype(np.uint8)  # as tf.image.convert_image_dtype


def crop(colours: np.ndarray, right: float, down: float) -> np.ndarray:
    """A square of 90 % of the area, resized back with bilinear weights. float32 [S, S, 3] in and out.

    Args:
        right, down: -1 is the left or upper edge, 0 the middle, 1 the right or lower edge.
    """
    side, last = np.sqrt(CROP_AREA), len(colours) - 1
    offset = (1 - side) / 2 * last * (1 + np.array([right, down]))  # pixels
    matrix = np.array([[side, 0, offset[0]], [0, side, offset[1]]])
    return cv2.warpAffine(colours, matrix, colours.shape[:2], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def adjust_contrast(colours: np.ndarray, factor: float) -> np.ndarray:
    """(x - mean) factor + mean, with the mean of each channel (tf.image.adjust_contrast)."""
    mean = colours.mean(axis=(0, 1))
    return (colours - mean) * np.float32(factor) + mean


def adjust_hue_and_saturation(colours: np.ndarray, shift: float, factor: float) -> np.ndarray:
    """In HSV: adds to the hue, a number on the circle 0..1, and multiplies the saturation, at most to 1."""
    hsv = cv2.cvtColor(colours, cv2.COLOR_RGB2HSV)  # hue in degrees
    hsv[..., 0] = (hsv[..., 0] + np.float32(360 * shift)) % 360
    hsv[..., 1] = np.minimum(hsv[..., 1] * np.float32(factor), 1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
