"""AdamW from its settings, and from a checkpoint: the moments of before with the settings of now."""

from __future__ import annotations

import copy
from typing import Any

import torch

from vla_rl.run.settings import OptimizerConfig


def adamw(parameters: list[torch.nn.Parameter], settings: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, **adamw_settings(settings))


def adamw_settings(settings: OptimizerConfig) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def load_optimizer(optimizer: torch.optim.AdamW, state: dict[str, Any], settings: OptimizerConfig) -> None:
    """The moments of the checkpoint with the settings of this run: a resumed run may have another learning rate."""
    optimizer.load_state_dict(copy.deepcopy(state))
    for group in optimizer.param_groups:
        group.update(adamw_settings(settings))
