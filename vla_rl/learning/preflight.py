"""What a run needs, told before a run folder is made and anything heavy begins: device, renderer, checkpoint, memory.

Each check is silent or raises a ConfigError with the remedy. Not here: the settings' own rules (vla_rl.run.settings).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import logging
import math
import os
from contextlib import suppress
from pathlib import Path

import torch

from vla_rl.learning.memory import check_weights
from vla_rl.model.checkpoint_folder import read_statistics, read_tokenizer, tensor_shapes
from vla_rl.model.execution import compiles
from vla_rl.model.find_checkpoint import check_checkpoint
from vla_rl.model.quantization import check_quantization
from vla_rl.model.trained_as import differences
from vla_rl.run.run_folder import check_run_folder, if_moved, setting
from vla_rl.run.settings import Config, ConfigError
from vla_rl.run.weights_and_biases import check_wandb
from vla_rl.simulation.suites import check_dense_reward

log = logging.getLogger(__name__)

TINY_CONFIG = "configs/tiny_gae_ppo.yaml"

# MUJOCO_GL -> the library that it needs, and Debian's packages of it
RENDERERS = {
    "egl": ("EGL", "libegl1 libgl1 libgl1-mesa-dri libglib2.0-0"),
    "osmesa": ("OSMesa", "libosmesa6"),
}

# what trained_as.json beside a checkpoint may tell of its training
TRAINED_AS = (
    *("policy.decoder", "policy.num_images", "policy.use_proprio", "policy.chunk_size", "policy.center_crop"),
    *("env.image_size", "env.render"),
)


def check_device(config: Config) -> None:
    if config.run.device == "cuda" and not torch.cuda.is_available():
        built = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "no CUDA build"
        )
        raise ConfigError(
            f"run.device=cuda, but torch finds no CUDA GPU that it can use ({built}; nvidia-smi shows which CUDA the driver "
            "supports: an older driver needs another build of torch). Use a machine with one (24 GB or more for the 7B model), or "
            f"train the small model on the CPU: --config {TINY_CONFIG}"
        )


def check_rendering() -> None:
    backend = os.environ.get("MUJOCO_GL") or "egl"
    if backend not in RENDERERS:
        raise ConfigError(
            f"MUJOCO_GL={backend}: the simulators render without a screen, with egl (the default, on a GPU or in software) "
            "or osmesa (software); unset MUJOCO_GL or set it to one of them"
        )
    library, packages = RENDERERS[backend]
    if not can_load(library):
        raise ConfigError(
            f"MUJOCO_GL={backend}: the library {library}, with which the simulators render, is not there; install it "
            f"(apt-get install -y {packages}), or set MUJOCO_GL={'osmesa' if backend == 'egl' else 'egl'} if that is there"
        )


def can_load(library: str) -> bool:
    names = (f"lib{library}.so.1", f"lib{library}.so.8", ctypes.util.find_library(library), f"lib{library}.so")
    for name in filter(None, names):
        with suppress(OSError):
            return bool(ctypes.CDLL(name))
    return False


def check_trained_as(config: Config, model: Path, resumed: bool) -> None:
    """Used otherwise than it was trained, a checkpoint solves nothing; a run that has begun so goes on, warned.

    Raises:
        ConfigError: a setting differs, unless policy.as_trained is false or the run is resumed.
    """
    other = differences(model, {name: setting(config, name) for name in TRAINED_AS})
    if other and config.policy.as_trained and not resumed:
        raise ConfigError(f"{'; '.join(other)}; or policy.as_trained=false to train it otherwise all the same")
    for difference in [*other, *differences(model, {"eval.render": config.eval.render})]:
        log.warning("%s", difference)


def check_start(config: Config, resumed: bool) -> None:
    """All that can be told before a run folder is made and anything heavy begins, quick things first.

    Raises:
        ConfigError: what the settings need is not there.
    """
    check_device(config)
    check_rendering()
    if not resumed:
        check_run_folder(config)
    if config.env.reward == "dense":
        check_dense_reward(config.env.task_suite, config.env.task_ids)

    check_wandb(config)
    settings = config.policy
    if settings.compile == "true":
        compiles(settings.compile, config.run.device)
    check_quantization(settings.quantization)
    try:
        model = check_checkpoint(settings.checkpoint, settings.use_proprio)
    except ConfigError as error:
        raise (if_moved(error, "policy.checkpoint") if resumed else error) from None
    check_card(config, model)
    read_statistics(model, settings.unnorm_key or config.env.task_suite, settings.use_proprio)
    read_tokenizer(model)
    check_trained_as(config, model, resumed)


def check_card(config: Config, model: Path) -> None:
    """Raises ConfigError if the weights alone are more than the GPU has free; those in 4 bit count as a quarter."""
    if config.run.device == "cuda":
        dtype, numbers = config.policy.dtype, 0.0
        for name, shape in tensor_shapes(model, config.policy.use_proprio):
            packed = config.policy.quantization != "none" and "language_model.model.layers." in name and len(shape) == 2
            numbers += math.prod(shape) / (4 if packed else 1)
        check_weights(int(numbers * getattr(torch, dtype).itemsize), *torch.cuda.mem_get_info(), dtype)
