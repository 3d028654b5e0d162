"""The parts that settings name: the policy on its device, the value head.

Not here: environments (vla_rl.simulation.vector_env.make_vector_env), the trainer that takes them (OpenVLA_PPO).
"""

from __future__ import annotations

import logging

import torch

from vla_rl.model.execution import compiles
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.quantization import count_weights
from vla_rl.model.value_head import ValueHead
from vla_rl.run.settings import Config

log = logging.getLogger(__name__)


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
        unnorm_key=settings.unnorm_key or config.env.task_suite,
        gradient_checkpointing="none" if settings.gradient_checkpointing == "auto" else settings.gradient_checkpointing,
        compiled=compiles(settings.compile, config.run.device),
        quantization=settings.quantization,
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
