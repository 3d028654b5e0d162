"""The parts that settings name: the policy on its device, the value head, the simulators, and a trainer made of them.

Not here: what the trainer does (OpenVLA_PPO), which is handed in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import TypeVar

import torch

from vla_rl.model.execution import compiles
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.quantization import count_weights
from vla_rl.model.value_head import ValueHead
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run.settings import Config
from vla_rl.simulation.suites import task_languages
from vla_rl.simulation.vector_env import make_vector_env

log = logging.getLogger(__name__)

T = TypeVar("T")


def build_trainer(make: Callable[..., T], config: Config, logger: MetricsLogger, cleanup: ExitStack) -> T:
    """A trainer on the real model and the real simulators.

    Args:
        make: OpenVLA_PPO.OpenVLAPPO.
        cleanup: closes the simulators' processes.
    """
    policy = build_policy(config)
    value_head = build_value_head(config, policy.hidden_size)
    logger.instructions = dict(zip(config.env.task_ids, instructions_of(config), strict=True))
    log_sizes(policy, value_head)
    num_evaluations = len(config.env.task_ids) * len(config.eval.states)
    kind = {"image_transform": policy.processor.image_transform}
    overlap = config.rollout.overlap
    envs = cleanup.enter_context(closing(make_vector_env(config, config.rollout.num_envs, overlap=overlap, **kind)))
    num_eval_envs = min(config.eval.num_envs, num_evaluations)
    eval_envs = cleanup.enter_context(closing(make_vector_env(config, num_eval_envs, evaluation=True, **kind)))
    trainer = make(config, policy, value_head, envs, eval_envs, logger)
    policy.processor.tokenize(tuple(instructions_of(config)))  # so that it knows all lengths of prompts
    log.info(
        "simulators: %d training environments in %d workers (render %s), %d for evaluation in %d (render %s)%s",
        *(envs.num_envs, envs.num_workers, config.env.render),
        *(eval_envs.num_envs, eval_envs.num_workers, config.eval.render),
        f"; a worker keeps up to {envs.simulators_per_worker} tasks" if len(config.env.task_ids) > 1 else "",
    )
    return trainer


def instructions_of(config: Config) -> list[str]:
    """Of the run's tasks, in their order."""
    languages = task_languages(config.env.task_suite)
    return [languages[task_id] for task_id in config.env.task_ids]


def build_policy(config: Config, adapted: bool = True) -> OpenVLAPolicy:
    """adapted: with the LoRA weights of the settings, as they begin; else nothing can be trained."""
    if config.run.torch_threads is not None:
        torch.set_num_threads(config.run.torch_threads)
    torch.manual_seed(config.run.seed)  # of the adapter's initial weights
    torch.backends.cudnn.allow_tf32 = False  # convolutions too in true float32, as matrix products are by default
    settings = config.policy
    return OpenVLAPolicy.from_checkpoint(
        settings.checkpoint,
        decoder=settings.decoder,
        num_images=settings.num_images,
        use_proprio=settings.use_proprio,
        lora=settings.lora if adapted else None,
        device=config.run.device,
        dtype=getattr(torch, settings.dtype),
        chunk_size=settings.chunk_size,
        center_crop=settings.center_crop,
        unnorm_key=config.unnorm_key(),
        gradient_checkpointing="none" if settings.gradient_checkpointing == "auto" else settings.gradient_checkpointing,
        compiled=compiles(settings.compile, config.run.device),
        quantization=settings.quantization,
        head=settings.head,
    )


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
