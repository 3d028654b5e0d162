"""Whether a run has room: memory of the host, of its shared memory and of the card, positions of the model, disk.

Each check returns what it found, in words, or raises a ConfigError with the remedy and, where it is a number, the one that fits. All else
that a run needs is in vla_rl.preflight.needs.
"""

from __future__ import annotations

import math
import shutil
from itertools import pairwise
from pathlib import Path

import torch

from vla_rl.learning.memory import check_weights
from vla_rl.model.checkpoint_folder import tensor_shapes
from vla_rl.model.prismatic_config import PrismaticConfig
from vla_rl.run.machine import available_memory
from vla_rl.run.settings import Config, ConfigError
from vla_rl.simulation.vector_env import SIMULATOR_GB, WORKER_GB, simulators_kept, worker_count
from vla_rl.types import ACTION_DIM, PROPRIO_DIM

MB = 10**6
IMAGE_SIDE = 224  # px, of the 7B model
PATCH_SIDE = 14  # px, of both ViTs
LEAST_PROMPT = 24  # tokens: "In: What action should the robot take to ...?\nOut:" of a short task
SHARED_RESERVE = 8 * MB  # Python hands shared memory out in pieces of up to 4 MiB


def shared_memory_bytes(config: Config) -> int:
    """What the observations of all workers take of /dev/shm, at most."""
    side, total = max(config.env.image_size, IMAGE_SIDE), SHARED_RESERVE
    for evaluation, (num_envs, workers) in zip((False, True), vectors(config), strict=True):
        pixels = config.policy.num_images * side**2
        pixels += config.env.image_size**2 if evaluation and config.eval.video else 0
        total += -(-num_envs // workers) * workers * (3 * pixels + 4 * PROPRIO_DIM)
    return total


def check_shared_memory(config: Config, folder: Path = Path("/dev/shm")) -> str:
    """Raises ConfigError if the workers' observations do not fit: Python would then keep them in files."""
    needed, free = shared_memory_bytes(config), shutil.disk_usage(folder).free if folder.is_dir() else 0
    figures = f"{free / MB:.0f} MB free in {folder}, at most {needed / MB:.0f} needed for the simulators' images"
    if free < needed:
        size = -(-needed // (64 * MB)) * 64
        raise ConfigError(
            f"{figures}; start the container with --shm-size={size}m (docker; of Kubernetes an emptyDir of medium Memory), or "
            f"mount -o remount,size={size}m {folder}"
        )
    return figures


def vectors(config: Config) -> list[tuple[int, int]]:
    """(environments, workers) of training and of evaluation."""
    rollout, num_evaluations = config.rollout, len(config.env.task_ids) * len(config.eval.states)
    num_eval_envs = min(config.eval.num_envs, num_evaluations)
    training = worker_count(config, rollout.num_envs, rollout.overlap)
    return [(rollout.num_envs, training), (num_eval_envs, worker_count(config, num_eval_envs))]


def simulator_memory(config: Config, available: int) -> int:
    """Bytes of host memory of all workers once each has built the tasks that it keeps, of so many that are available."""
    gigabytes = 0.0
    for (num_envs, workers), evaluation in zip(vectors(config), (False, True), strict=True):
        kept = simulators_kept(config, num_envs, workers, available, evaluation)
        gigabytes += workers * (WORKER_GB + kept * SIMULATOR_GB)
    return int(gigabytes * 1e9)


def check_host_memory(config: Config, available: int | None = None) -> str:
    """Raises ConfigError if the simulators of training and evaluation do not fit.

    Args:
        available: bytes; None asks the machine.
    """
    available = available_memory() if available is None else available
    needed = simulator_memory(config, available)
    workers = " and ".join(str(workers) for _, workers in vectors(config))
    figures = f"{needed / 1e9:.1f} GB for the simulators in {workers} workers of {available / 1e9:.1f} GB that are free"
    if needed > available:
        raise ConfigError(
            f"{figures}; lower env.num_workers, env.simulators_per_worker (a worker keeps so many tasks) or the number of tasks, or "
            "give the job more memory"
        )
    return figures


def check_sizes(config: Config, model: PrismaticConfig, available: int | None = None) -> str:
    """What a run holds at the least, whatever is measured later: raises ConfigError, with the size that fits, if it does not.

    Args:
        model: config.json of the checkpoint.
        available: bytes of host memory; None asks the machine.
    """
    available = available_memory() if available is None else available
    rollout, env, policy = config.rollout, config.env, config.policy
    patches = policy.num_images * (model.image_size // PATCH_SIDE) ** 2
    room = model.llama["max_position_embeddings"] - patches - policy.use_proprio - LEAST_PROMPT
    if ACTION_DIM * policy.chunk_size + 1 > room:
        raise ConfigError(
            f"policy.chunk_size={policy.chunk_size} with policy.num_images={policy.num_images} needs "
            f"{patches + ACTION_DIM * policy.chunk_size + 1} positions and those of the prompt, the model has "
            f"{model.llama['max_position_embeddings']}; at most policy.chunk_size={max((room - 1) // ACTION_DIM, 0)} fits"
        )
    decisions = rollout.num_envs * rollout.n_steps
    if config.algorithm.estimator == "grpo":
        decisions = rollout.n_episodes or rollout.num_envs  # of one decision, at least
    image = policy.num_images * 3 * model.image_size**2
    widths = [model.llama["hidden_size"], *config.value_head.hidden_sizes, 1]
    head = 16 * sum(a * b for a, b in pairwise(widths))  # float32: weight, gradient, two moments
    (num_envs, workers), _ = vectors(config)
    rendered = num_envs * policy.num_images * 3 * env.image_size**2
    parts = (
        (decisions * image, "rollout.num_envs x rollout.n_steps (the rollout's images)", decisions),
        (rendered, "rollout.num_envs (its images)", num_envs),
        (workers * int((WORKER_GB + SIMULATOR_GB) * 1e9), "env.num_workers (a simulator in each)", workers),
        (head, "the widths in value_head.hidden_sizes, multiplied in pairs", head // 16),
    )
    for part in parts:
        check_fits(*part, available)
    return f"{sum(needed for needed, *_ in parts) / 1e9:.1f} GB at the least of {available / 1e9:.1f} GB that are free"


def check_fits(needed: int, name: str, number: int, available: int) -> None:
    """Raises ConfigError, with the number that fits, if so many bytes are not available."""
    if needed > available:
        raise ConfigError(
            f"{name} = {number:,} needs {needed / 1e9:,.1f} GB of memory, {available / 1e9:.1f} GB are free; at most "
            f"{number * available // needed:,} fits"
        )


def check_disk(
    config: Config, checkpoints: int, checkpoint_bytes: int, other_bytes: int, free: int | None = None
) -> str:
    """Raises ConfigError if what the run keeps does not fit where runs are kept.

    Args:
        checkpoints: that are kept at the end.
        checkpoint_bytes: of one.
        other_bytes: videos and the like.
        free: bytes; None asks the disk.
    """
    output_dir = Path(config.run.output_dir)
    nearest = next(path for path in (output_dir, *output_dir.parents) if path.exists())
    free = shutil.disk_usage(nearest).free if free is None else free
    count = checkpoints + 1  # one more while it is written
    needed = count * checkpoint_bytes + other_bytes
    figures = (
        f"{size_text(needed)} for {count} checkpoints of {size_text(checkpoint_bytes)} and {size_text(other_bytes)} of videos and "
        f"logs, {size_text(free)} free in {nearest}"
    )
    if needed > free:
        raise ConfigError(
            f"{figures}; make room, lower logging.keep_checkpoints, raise logging.keep_every, or give another run.output_dir"
        )
    return figures


def size_text(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size, 1e5) / MB:.1f} MB"


def check_card(config: Config, model: Path) -> str:
    """Raises ConfigError if the weights alone are more than the GPU has free; those in 4 bit count as a quarter."""
    dtype, numbers = config.policy.dtype, 0.0
    for name, shape in tensor_shapes(model, config.policy.use_proprio):
        packed = config.policy.quantization != "none" and "language_model.model.layers." in name and len(shape) == 2
        numbers += math.prod(shape) / (4 if packed else 1)
    weights = int(numbers * getattr(torch, dtype).itemsize)
    if config.run.device == "cuda":
        check_weights(weights, *torch.cuda.mem_get_info(), dtype)
    elif weights > (free := available_memory()):
        raise ConfigError(
            f"the weights of {model} need {size_text(weights)} in {dtype}, {size_text(free)} of memory are free; set "
            "policy.dtype=bfloat16, or take a machine with more"
        )
    return f"{size_text(weights)} in {dtype}"
