"""AdamW from its settings, and from a checkpoint: the moments of before with the settings of now."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

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


def clip_gradient(optimizer: torch.optim.Optimizer, settings: OptimizerConfig) -> Tensor:
    """Scales the gradient of what the optimizer trains down to settings.max_grad_norm; returns its norm before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)


def load_optimizer(optimizer: torch.optim.AdamW, state: dict[str, Any], settings: OptimizerConfig) -> None:
    """The moments of the checkpoint with the settings of this run: a resumed run may have another learning rate."""
    optimizer.load_state_dict(copy.deepcopy(state))
    for group in optimizer.param_groups:
        group.update(adamw_settings(settings))
