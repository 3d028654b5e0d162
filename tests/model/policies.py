"""Small policies and observations that the tests of this wing share."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.run.settings import LoraConfig
from vla_rl.types import Observation

DATA = Path(__file__).parents[1] / "data"
RECORDED = DATA / "tiny_openvla"  # the official layout, with the official code's numbers, without a tokenizer
DECODERS = ("autoregressive", "parallel")
TASKS = (
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "open the drawer",
    "Lift",
)


def make_policy(decoder: str = "parallel", path="tiny-openvla-random", seed: int = 0, **settings) -> OpenVLAPolicy:
    settings = {"lora": LoraConfig(rank=4, alpha=8), "unnorm_key": "libero_spatial"} | settings
    torch.manual_seed(seed)
    return OpenVLAPolicy.from_checkpoint(path, decoder=decoder, **settings)


def make_obs(n: int = 3, num_images: int = 1, seed: int = 0) -> Observation:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, num_images, 128, 128, 3), dtype=np.uint8)
    proprio = rng.normal([0, 0, 1.1, 3, 0, 0, 0.02, -0.02], 0.05, (n, 8)).astype(np.float32)
    return Observation(images, proprio, tuple(TASKS[i % 3] for i in range(n)))


def move_adapters(policy: OpenVLAPolicy, size: float = 0.05) -> None:
    """Adapters start at B = 0, where the adapted model is the base; this makes it another one."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def copy_recorded(folder: Path, leave_out: str = "") -> Path:
    shutil.copytree(RECORDED, folder, ignore=shutil.ignore_patterns(leave_out))
    return folder
