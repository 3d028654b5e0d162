"""The parts that settings name: the policy on its device, the value head, the simulators, and a trainer made of them.

Not here: what the trainer does (OpenVLA_PPO), which is handed in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TypeVar

import torch

from vla_rl.learning.sharding import shard
from vla_rl.model.execution import compiles
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.quantization import count_weights
from vla_rl.model.value_head import ValueHead
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run.checkpoint import find_adapter, loading
from vla_rl.run.distributed import ONE, Ranks, share_of
from vla_rl.run.logs import slow
from vla_rl.run.settings import Config
from vla_rl.simulation.suites import task_languages
from vla_rl.simulation.vector_env import make_vector_env

log = logging.getLogger(__name__)

T = TypeVar("T")


def build_trainer(
    make: Callable[..., T],
    config: Config,
    logger: MetricsLogger,
    cleanup: ExitStack,
    ranks: Ranks = ONE,
    resumed: bool = False,
) -> T:
    """A trainer on the real model and the real simulators.

    Args:
        make: OpenVLA_PPO.OpenVLAPPO.
        cleanup: closes the simulators' processes.
        ranks: each builds the policy, and simulators for its share of the environments.
        resumed: a checkpoint will be loaded, so policy.adapter, with which the run began, is not read.
    """
    sharded = config.distributed.shard and ranks.size > 1
    own = config.policy.model_copy(update={"adapter": None})
    with slow("loading the policy"):
        policy = build_policy(config.model_copy(update={"policy": own}) if resumed else config, sharded=sharded)
        if sharded:
            shard(policy, ranks, torch.device(config.run.device))
    value_head = build_value_head(config, policy.hidden_size)
    logger.instructions = dict(zip(config.env.task_ids, instructions_of(config), strict=True))
    log_sizes(policy, value_head)
    own = share_of(config, ranks.size)
    num_evaluations = len(config.env.task_ids) * len(config.eval.states)
    kind = {"image_transform": policy.processor.image_transform}
    overlap = config.rollout.overlap
    num_eval_envs = min(own.eval.num_envs, num_evaluations)
    with slow("starting the simulators' processes"):
        envs = cleanup.enter_context(closing(make_vector_env(own, own.rollout.num_envs, overlap=overlap, **kind)))
        eval_envs = cleanup.enter_context(closing(make_vector_env(own, num_eval_envs, evaluation=True, **kind)))
    trainer = make(config, policy, value_head, envs, eval_envs, logger, ranks)
    policy.processor.tokenize(tuple(instructions_of(config)))  # so that it knows all lengths of prompts
    log.info(
        "simulators%s: %d training environments in %d workers (render %s), %d for evaluation in %d (render %s)%s",
        f" of each of {ranks.size} processes" if ranks.size > 1 else "",
        *(envs.num_envs, envs.num_workers, config.env.render),
        *(eval_envs.num_envs, eval_envs.num_workers, config.eval.render),
        f"; a worker keeps up to {envs.simulators_per_worker} tasks" if len(config.env.task_ids) > 1 else "",
    )
    return trainer


def instructions_of(config: Config) -> list[str]:
    """Of the run's tasks, in their order."""
    languages = task_languages(config.env.task_suite)
    return [languages[task_id] for task_id in config.env.task_ids]


def build_policy(config: Config, adapted: bool = True, sharded: bool = False) -> OpenVLAPolicy:
    """The policy of the settings.

    Args:
        adapted: with LoRA weights, those of policy.adapter or as they begin; else nothing can be trained.
        sharded: on the CPU and not compiled, for vla_rl.learning.sharding.

    Raises:
        ConfigError: policy.adapter is torn, or of other settings or another base.
    """
    if config.run.torch_threads is not None:
        torch.set_num_threads(config.run.torch_threads)
    torch.manual_seed(config.run.seed)  # of the adapter's initial weights
    torch.backends.cudnn.allow_tf32 = False  # convolutions too in true float32, as matrix products are by default
    settings = config.policy
    policy = OpenVLAPolicy.from_checkpoint(
        settings.checkpoint,
        decoder=settings.decoder,
        num_images=settings.num_images,
        use_proprio=settings.use_proprio,
        lora=settings.lora if adapted else None,
        device="cpu" if sharded else config.run.device,
        dtype=getattr(torch, settings.dtype),
        chunk_size=settings.chunk_size,
        center_crop=settings.center_crop,
        unnorm_key=config.unnorm_key(),
        gradient_checkpointing="none" if settings.gradient_checkpointing == "auto" else settings.gradient_checkpointing,
        compiled=not sharded and compiles(settings.compile, config.run.device),
        quantization=settings.quantization,
        head=settings.head,
    )
    if adapted and settings.adapter is not None:
        folder = find_adapter(Path(settings.adapter), "policy.adapter=")
        with loading(folder):
            policy.load_adapter(folder)
    return policy


def build_value_head(config: Config, hidden_size: int) -> ValueHead | None:
    """None for GRPO, which has no critic."""
    if config.algorithm.estimator == "grpo":
        return None
    generator = torch.Generator().manual_seed(config.run.seed)
    return ValueHead(hidden_size, config.value_head.hidden_sizes, generator).to(config.run.device)


def log_sizes(policy: OpenVLAPolicy, value_head: ValueHead | None) -> None:
    millions = {
        "policy": count_weights(policy.network),
        "trained (LoRA)": sum(p.numel() for p in policy.trainable_parameters()),
        "value head": sum(p.numel() for p in value_head.parameters()) if value_head is not None else 0,
    }
    log.info("parameters: %s", ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in millions.items()))
