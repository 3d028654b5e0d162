"""What an evaluation is of: the protocol, and the weights. Results of equal ones are of one kind, and go on with each other.

Not here: what is read and written of them (vla_rl.evaluation.results, vla_rl.evaluation.kept).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vla_rl.run.settings import Config


def suite_settings(config: Config, suite: str) -> Config:
    """The same settings with another suite; its own step limit unless eval.max_steps is set."""
    return config.model_copy(update={"env": config.env.model_copy(update={"task_suite": suite})})


def measured(config: Config, temperature: float, suites: Sequence[str], num_envs: int) -> dict[str, Any]:
    """The protocol: all that the outcome of an episode depends on, but for the policy's weights.

    Args:
        temperature: of the modes TEMPERED.
        num_envs: rows of a forward.
    """
    env, policy, evaluation = config.env, config.policy, config.eval
    return {
        "max_steps": {suite: suite_settings(config, suite).max_episode_steps(evaluation=True) for suite in suites},
        "task_ids": env.task_ids,
        "states": evaluation.states,
        "modes": evaluation.modes,
        "placements": "seed 0, state i after i + 1 resets",  # of the fixtures, which a state does not hold
        "settle_steps": env.settle_steps,
        "image_size": env.image_size,
        "render": evaluation.render,
        "temperature": temperature,
        "seed": config.run.seed,
        **{
            name: getattr(policy, name)
            for name in ("decoder", "chunk_size", "num_images", "use_proprio", "center_crop")
        },
        "unnorm_key": config.unnorm_key(),
        "dtype": policy.dtype,
        "quantization": policy.quantization,
        **({} if policy.head == "tokens" else {"head": policy.head}),  # evaluations from before the setting go on
        "device": config.run.device,
        "num_envs": num_envs,  # rows of a forward
    }


def digest(base: str, tensors: Mapping[str, Tensor]) -> str:
    """Hex digits, equal for equal texts, names and values."""
    found = hashlib.sha256(base.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:32]
