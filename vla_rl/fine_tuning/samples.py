"""Demonstrations as supervised fine-tuning reads them: one sample a step, and the statistics of all.

R samples, C actions of a chunk, S model image side, K images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_rl.fine_tuning.demonstration_file import Demonstration
from vla_rl.model.image_transform import preprocess
from vla_rl.run.logs import progress_bar
from vla_rl.run.settings import ConfigError

GRIPPER_MASK = [True] * 6 + [False]  # the gripper is 0 or 1 and stays as it is


@dataclass(frozen=True)
class Samples:
    """One sample a step: what was seen, and the C actions that followed."""

    images: np.ndarray  # uint8 [R, K, S, S, 3], resized, not yet cropped
    proprio: np.ndarray  # float32 [R, 8]
    instructions: list[str]  # R
    chunks: np.ndarray  # float64 [R, C, 7], data set's units: gripper 0 closes, 1 opens
    steps_to_go: np.ndarray  # int64 [R], to the end of the demonstration, which is its success; 0 in the last step

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def digest(self) -> str:
        """Hex digits; of the images one in 64 counts."""
        digest = hashlib.sha256("\n".join(self.instructions).encode())
        for array in (self.images[::64], self.proprio, self.chunks, self.steps_to_go):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()[:16]


def data_units(actions: np.ndarray) -> np.ndarray:
    """Environment's actions [..., 7] in the data set's units: the gripper 1 (closes) becomes 0, -1 (opens) 1.

    clip((1 - a) / 2, 0, 1) (openvla c8f03f4, prismatic/vla/datasets/rlds/oxe/transforms.py, libero_dataset_transform).
    """
    actions = actions.copy()
    actions[..., -1] = np.clip((1 - actions[..., -1]) / 2, 0, 1)
    return actions


def chunks_of(actions: np.ndarray, chunk_size: int) -> np.ndarray:
    """[T, 7] -> [T, C, 7]: row t has actions t .. t+C-1; after the end the last one is repeated."""
    steps = np.arange(len(actions))[:, None] + np.arange(chunk_size)  # [T, C]
    return actions[np.minimum(steps, len(actions) - 1)]


def make_samples(demonstrations: Sequence[Demonstration], chunk_size: int, size: int, progress: bool) -> Samples:
    """Preprocesses every image once."""
    rows, cameras = sum(map(len, demonstrations)), demonstrations[0].images.shape[1]
    resized = np.empty((rows, cameras, size, size, 3), np.uint8)
    images = (image for d in demonstrations for image in d.images)  # [K, H, W, 3]
    with progress_bar("images", rows, "step", progress) as bar:
        for row, image in enumerate(images):
            for camera in range(cameras):
                resized[row, camera] = preprocess(image[camera], center_crop=False, size=size)
            bar.update()
    return Samples(
        images=resized,
        proprio=np.concatenate([d.proprio for d in demonstrations]),
        instructions=[d.instruction for d in demonstrations for _ in range(len(d))],
        chunks=np.concatenate([chunks_of(data_units(d.actions), chunk_size) for d in demonstrations]),
        steps_to_go=np.concatenate([np.arange(len(d))[::-1] for d in demonstrations]),
    )


def split(demonstrations: Sequence[Demonstration], fraction: float) -> tuple[list[Demonstration], list[Demonstration]]:
    """Training and held-out episodes: of each task the last ones, at least one unless the fraction is 0.

    Raises:
        ConfigError: a task has only one episode.
    """
    training, held_out = [], []
    for instruction in dict.fromkeys(d.instruction for d in demonstrations):
        episodes = [d for d in demonstrations if d.instruction == instruction]
        count = max(1, round(fraction * len(episodes))) if fraction > 0 else 0
        if count == len(episodes):
            raise ConfigError(
                f"{instruction!r} has {len(episodes)} demonstration, which leaves none to train on; give more, or set "
                "data.validation_fraction=0"
            )
        training += episodes[: len(episodes) - count]
        held_out += episodes[len(episodes) - count :]
    return training, held_out


def data_statistics(demonstrations: Sequence[Demonstration]) -> dict[str, Any]:
    """One entry of dataset_statistics.json: actions in the data set's units, and proprio."""
    actions = np.concatenate([data_units(d.actions) for d in demonstrations])
    proprio = np.concatenate([d.proprio for d in demonstrations]).astype(np.float64)

    def describe(values: np.ndarray) -> dict[str, list[float]]:
        low, high = np.quantile(values, [0.01, 0.99], axis=0)
        numbers = {"mean": values.mean(0), "std": values.std(0), "max": values.max(0), "min": values.min(0)}
        return {name: number.tolist() for name, number in (numbers | {"q01": low, "q99": high}).items()}

    return {
        "action": describe(actions) | {"mask": GRIPPER_MASK},
        "proprio": describe(proprio),
        "num_transitions": len(actions),
        "num_trajectories": len(demonstrations),
    }


def batch_rows(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Rows of optimizer step `step` (from 0), int64 [batch_size]: each row once an epoch, in an order of the epoch's own."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in set(positions // count)}
    return np.array([orders[position // count][position % count] for position in positions])
