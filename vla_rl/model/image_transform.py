"""From a rendered image to the image the model was trained on: JPEG, lanczos3 resize, centre crop.

Not here: the model's normalisation (processor), rendering (libero_env). OpenVLA's data pipeline runs in TensorFlow;
each step below gives TensorFlow's result without it (checked against official images in tests/model/test_image_transform.py).
Source of the chain: openvla@c8f03f4 experiments/robot/libero/libero_utils.py#get_libero_image and
experiments/robot/openvla_utils.py#get_vla_action, crop_and_resize.

H, W: sides of the input in pixels; S: side of the model's image.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import simplejpeg
from PIL import Image
from scipy import sparse

JPEG_QUALITY = 95  # TensorFlow's tf.image.encode_jpeg default, which the official evaluation uses
CROP_AREA = 0.9  # share of the image's area that random-crop augmentation kept in training (openvla finetune.py)
LANCZOS_RADIUS = np.float32(3)  # lanczos3


@dataclass(frozen=True)
class OpenVLAImageTransform:
    """`preprocess` with its settings; can be pickled, so that the simulators' processes do it (a vla_rl.types.ImageTransform)."""

    size: int  # S
    center_crop: bool

    def __call__(self, image_uint8: np.ndarray) -> np.ndarray:
        return preprocess(image_uint8, self.center_crop, self.size)


def preprocess(image_uint8: np.ndarray, center_crop: bool, size: int = 224) -> np.ndarray:
    """The model's image: JPEG at quality 95 -> lanczos3 resize -> (centre crop of 90 % of its area, resized back).

    The first step of the official chain, turning LIBERO's upside-down render by 180 degrees, is not in here: the environment
    does it. It cannot come later, since JPEG and rotation do not commute exactly.

    Args:
        image_uint8: uint8 [H, W, 3], RGB, right way up.
        center_crop: True for checkpoints that were trained with image augmentation (all official LIBERO ones).
        size: S, the model's image side in pixels.

    Returns:
        uint8 [S, S, 3]; at most 1 grey level from TensorFlow's, on < 0.01 % of the values.

    Raises:
        ValueError: the image is not uint8 [H, W, 3], or size is below 1.
    """
    check_image(image_uint8)
    if size < 1:
        raise ValueError(f"size={size}: expected a side of at least 1 pixel, such as 224")
    image = resize_lanczos3(jpeg_round_trip(image_uint8), size)
    return crop_center(image) if center_crop else image


def check_image(image: np.ndarray) -> None:
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", type(image).__name__)
    if not isinstance(image, np.ndarray) or dtype != np.uint8 or image.ndim != 3 or shape[2] != 3 or 0 in shape:
        hint = "" if dtype == np.uint8 else "; give the rendered RGB values 0-255 as np.uint8"
        hint = "; give one image at a time" if shape is not None and len(shape) == 4 else hint
        raise ValueError(f"expected one RGB image, a numpy array uint8 [H, W, 3]; got {dtype} of shape {shape}{hint}")


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """Encodes and decodes as tf.io does, bit-exactly; the training data was stored as JPEG. uint8 [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=JPEG_QUALITY, subsampling=2)  # 2 is 4:2:0
    # TensorFlow decodes with the fast integer DCT and smooth chroma; Pillow's own decode is up to 15 grey levels off
    return simplejpeg.decode_jpeg(file.getvalue(), colorspace="RGB", fastdct=True, fastupsample=False)


def resize_lanczos3(image: np.ndarray, size: int) -> np.ndarray:
    """tf.image.resize(method="lanczos3", antialias=True), rounded and clipped. uint8 [H, W, 3] -> uint8 [S, S, 3]."""
    height, width, _ = image.shape
    rows, columns = lanczos3_weights(height, size), lanczos3_weights(width, size)  # [S, H], [S, W]
    tall = rows @ image.astype(np.float32).reshape(height, width * 3)  # [S, 3 W]
    tall = tall.reshape(size, width, 3).transpose(1, 0, 2).reshape(width, size * 3)  # [W, 3 S]
    resized = (columns @ tall).reshape(size, size, 3).transpose(1, 0, 2)  # [S, S, 3]
    return np.ascontiguousarray(np.clip(np.rint(resized), 0, 255).astype(np.uint8))  # rint: ties to even, as tf.round


def crop_center(image: np.ndarray) -> np.ndarray:
    """The middle 90 % of the area, resized back with bilinear weights. uint8 [S, S, 3] in and out.

    tf.image.crop_and_resize on values in 0..1, then convert_image_dtype(uint8, saturate=True), which multiplies
    by 255.5 and cuts off. Same operations in the same order and precision, hence bit-equal to TensorFlow.
    """
    side = image.shape[0]
    low, high, weight = crop_samples(side)
    pixels = (image.astype(np.float32) * np.float32(1 / 255)).reshape(side, side * 3)
    # flat [S, 3 S], since indexing pixels of 3 values is 3 times slower
    left, right = (pixels[:, (at[:, None] * 3 + np.arange(3)).ravel()] for at in (low, high))
    across = blend(left, right, np.repeat(weight, 3))  # [S, 3 S]
    cropped = blend(across[low], across[high], weight[:, None])  # [S, 3 S]
    np.clip(cropped, 0, 1, out=cropped)
    cropped *= np.float32(255.5)
    return cropped.astype(np.uint8).reshape(side, side, 3)


def blend(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """low + (high - low) weight, in place of `high`: fresh arrays would cost more than the arithmetic."""
    high -= low
    high *= weight
    high += low
    return high


@lru_cache(maxsize=16)
def lanczos3_weights(source: int, target: int) -> sparse.csr_array:
    """float32 [target, source]: each row weighs the source pixels under a lanczos3 kernel, stretched when shrinking.

    w(x) = sinc(x) sinc(x/3) for |x| < 3, normalised to sum 1 over the pixels inside the image
    (tensorflow v2.21 core/kernels/image/scale_and_translate_op.cc#ComputeSpansCore). In float32, since TensorFlow's
    rounding errors of 1e-5 move values that lie half-way between two grey levels.
    """
    one, pi = np.float32(1), np.float32(np.pi)
    scale = one / (np.float32(target) / np.float32(source))  # source pixels per target pixel
    centres = (np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale  # [target], source coordinates
    distance = np.abs(np.arange(source, dtype=np.float32) + np.float32(0.5) - centres[:, None])  # [target, source]
    x = distance * (one / max(scale, one))  # the kernel stretches with the scale: antialias
    near = np.maximum(x, np.float32(1e-3))  # no division by zero; TensorFlow's weight is 1 up to here
    kernel = LANCZOS_RADIUS * np.sin(pi * near) * np.sin(pi * near / LANCZOS_RADIUS) / (pi * pi * near * near)
    kernel = np.where(x > LANCZOS_RADIUS, np.float32(0), np.where(x <= np.float32(1e-3), one, kernel))
    return sparse.csr_array(kernel * (one / kernel.sum(axis=1, keepdims=True)))


@lru_cache(maxsize=16)
def crop_samples(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the crop samples one axis: pixel below, pixel above, weight of the one above; int64, int64, float32 [S].

    The samples run from the first to the last pixel of the box (tf.image.crop_and_resize), in TensorFlow's float32.
    """
    one, last = np.float32(1), np.float32(side - 1)
    crop = np.sqrt(np.float32(CROP_AREA))
    start = (one - crop) / np.float32(2)
    step = ((start + crop) - start) * last / max(last, one)
    at = start * last + np.arange(side, dtype=np.float32) * step
    low = np.floor(at).astype(np.int64)
    return low, np.ceil(at).astype(np.int64), at - low.astype(np.float32)
