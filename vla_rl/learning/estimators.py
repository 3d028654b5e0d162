"""How good each decision of a rollout was, by PPO's estimator or GRPO's: the rows that an update learns from.

Not here: the equations (vla_rl.learning.advantages), what is done with the rows (OpenVLA_PPO).

T decisions, N environments, R rows, E episodes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vla_rl.learning.advantages import compute_gae, compute_grpo_advantages, normalize, unbroken
from vla_rl.learning.losses import explained_variance
from vla_rl.learning.rollout_buffer import Minibatch, RolloutBuffer
from vla_rl.run.settings import AlgorithmConfig


def gae_rows(rollout: RolloutBuffer, algorithm: AlgorithmConfig) -> tuple[Minibatch, dict[str, Any], Tensor]:
    """Every environment's decisions, but for those of episodes that were broken off.

    Returns:
        The rows; critic/* metrics, none where no row counts; the rewards of the rows, float32 [R].
    """
    values, critic_lambda = rollout.stack("values"), algorithm.critic_gae_lambda  # [T, N]
    terminated, truncated = rollout.stack("terminated"), rollout.stack("truncated")
    arguments = (rollout.stack("rewards"), values, rollout.next_values(), terminated, truncated, algorithm.gamma)
    advantages, returns = compute_gae(*arguments, algorithm.gae_lambda)
    if critic_lambda is not None:  # the targets can do with more variance and less bias than the advantages
        _, returns = compute_gae(*arguments, critic_lambda)
    counts = unbroken(terminated | truncated, rollout.stack("broken"))  # [T, N]
    metrics: dict[str, Any] = {}
    if counts.any():
        seen, targets = values[counts], returns[counts]  # [R]
        metrics = {
            "critic/explained_variance": explained_variance(seen, targets),
            "critic/value_mean": seen.mean().item(),
            "critic/return_mean": targets.mean().item(),
        }
        if algorithm.normalize_advantages:
            advantages = normalize(advantages, counts)
    rows = None if counts.all() else counts.flatten().nonzero().flatten()
    return rollout.flatten(advantages.flatten(), returns.flatten(), rows), metrics, arguments[0][counts]


def grpo_rows(rollout: RolloutBuffer, algorithm: AlgorithmConfig, group_size: int) -> tuple[Minibatch, dict[str, Any]]:
    """Whole episodes' decisions, each with its episode's advantage.

    Returns:
        The rows, by episode and then by time, and rollout/uniform_groups.
    """
    episode = rollout.rows("episode")  # [R]
    returns = torch.zeros(int(episode.max()) + 1).index_add(0, episode, rollout.rows("rewards"))  # [E]
    advantages, informative = compute_grpo_advantages(returns, group_size)
    rows = episode.argsort(stable=True)  # the same whoever played what
    rows = rows[informative[episode[rows]]] if algorithm.drop_uniform_groups else rows
    num_groups = len(returns) // group_size
    metrics = {"rollout/uniform_groups": num_groups - informative.sum().item() / group_size}
    return rollout.flatten(advantages[episode], None, rows), metrics
