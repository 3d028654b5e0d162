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
    """The moments of the checkpoint with the settings of this run: a resumed run may have another learning rate.

    Raises:
        ValueError: the state is not of moments of the optimizer's parameters.
    """
    moments = state.get("state") if isinstance(state, dict) else None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(moments, dict) or not moments.keys() <= set(range(len(parameters))):
        raise ValueError(f"an optimizer's state is {state!r:.60}, expected the moments of {len(parameters)} parameters")
    for number, entry in moments.items():
        shapes = {"step": torch.Size(), "exp_avg": parameters[number].shape, "exp_avg_sq": parameters[number].shape}
        found = {name: t.shape for name, t in entry.items() if is_floats(t)} if isinstance(entry, dict) else {}
        if found != shapes or entry.keys() != shapes.keys():
            raise ValueError(
                f"an optimizer's moments of parameter {number} are not {list(shapes['exp_avg'])}: {entry!r:.60}"
            )
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": copy.deepcopy(moments), "param_groups": groups})
    for group in optimizer.param_groups:
        group.update(adamw_settings(settings))


def is_floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
