"""Advantage estimators as pure functions.

T decisions, N environments, E episodes, G groups. Row t belongs to decision t; tensors are float32, flags bool.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with time limits.

        delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
        A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1},   done_t = terminated_t or truncated_t

    A terminated episode has no future. A truncated one has: its value is bootstrapped from the state it reached, but
    nothing flows in from the next row, which belongs to another episode.

    Source: Schulman et al. 2016, arXiv:1506.02438, equations 11, 12 and 16; time limits: Pardo et al. 2018,
    arXiv:1712.00378, section 3.

    Args:
        rewards: [T, N], of decision t.
        values: [T, N], V of the state in which decision t was taken.
        next_values: [T, N], V of the state that decision t reached: the next row's, or the final observation's where
            the episode was truncated or the rollout ended. Ignored where terminated; must not be NaN there.
        terminated: [T, N], the task ended (success).
        truncated: [T, N], the step limit ended the episode.
        gamma: discount per decision, 0..1.
        gae_lambda: 0 is one-step TD, 1 is Monte Carlo.

    Returns:
        advantages [T, N] and returns [T, N] = advantages + values, the value head's targets.

    Raises:
        ValueError: a tensor is not [T, N] or a flag is not bool.
    """
    for name, tensor in (("values", values), ("next_values", next_values), ("truncated", truncated)):
        if tensor.shape != rewards.shape or rewards.dim() != 2:
            raise ValueError(f"{name} is {list(tensor.shape)}, rewards {list(rewards.shape)}; both must be [T, N]")
    if terminated.shape != rewards.shape or terminated.dtype != torch.bool or truncated.dtype != torch.bool:
        raise ValueError(
            f"terminated and truncated must be bool {list(rewards.shape)}, got {terminated.dtype} "
            f"{list(terminated.shape)} and {truncated.dtype}"
        )
    bootstrapped = torch.where(terminated, 0.0, next_values)
    deltas = rewards + gamma * bootstrapped - values  # [T, N]
    carry = gamma * gae_lambda * (~(terminated | truncated)).float()  # [T, N]
    advantages = torch.zeros_like(deltas)
    advantage = torch.zeros_like(deltas[0])  # [N]
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + carry[t] * advantage
        advantages[t] = advantage
    return advantages, advantages + values


def compute_grpo_advantages(returns: Tensor, group_size: int, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Group-relative advantages: how much better an episode was than the others from the same start.

        A_i = (R_i - mean(R_group)) / (std(R_group) + eps),   std with Bessel's correction

    Source: Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300, section 4.1.2. A group whose returns are all equal says
    nothing (DAPO, arXiv:2503.14476, section 3.2): its advantages are 0 and it is marked.

    Args:
        returns: [E] float32, undiscounted return of each episode; group g is rows g*group_size to (g+1)*group_size-1.
        group_size: episodes in a group, at least 2.

    Returns:
        advantages [E] float32, informative [E] bool: False where the episode's group is uniform.

    Raises:
        ValueError: E is not a multiple of group_size.
    """
    if returns.dim() != 1 or group_size < 2 or len(returns) % group_size:
        raise ValueError(f"returns {list(returns.shape)} cannot be split into groups of {group_size} (at least 2)")
    groups = returns.view(-1, group_size)  # [G, group_size]
    centred = groups - groups.mean(dim=1, keepdim=True)
    informative = (groups != groups[:, :1]).any(dim=1, keepdim=True)  # [G, 1]
    advantages = torch.where(informative, centred / (groups.std(dim=1, keepdim=True) + eps), 0.0)
    return advantages.flatten(), informative.expand_as(groups).flatten()


def unbroken(ended: Tensor, broken: Tensor) -> Tensor:
    """Which decisions count where episodes were broken off by the loss of their simulator: those of the other episodes.

        c_t = not broken_t and (ended_t or c_{t+1}),   c_T = true

    Of an episode that is broken off nothing is known but how it began, and it is no failure: none of its rows in the rollout is
    learned from. The next row is of another episode.

    Args:
        ended: bool [T, N], the episode ended with decision t, terminated or truncated.
        broken: bool [T, N], it was broken off in decision t; not where it ended.

    Returns:
        bool [T, N].
    """
    if ended.dtype != torch.bool or broken.dtype != torch.bool or ended.shape != broken.shape or (ended & broken).any():
        raise ValueError(
            f"ended and broken must be bool [T, N] and not both true, got {ended.shape} and {broken.shape}"
        )
    counts = torch.ones_like(ended)
    following = torch.ones_like(ended[0])  # [N]
    for t in reversed(range(len(ended))):
        counts[t] = following = ~broken[t] & (ended[t] | following)
    return counts


def normalize(x: Tensor, counts: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Zero mean and unit variance (CleanRL c38f4d3 ppo.py, advantage normalisation; here over the whole rollout).

    Args:
        counts: bool, like x: entries that mean and variance are of; None: all.
    """
    counted = x if counts is None else x[counts]
    return (x - counted.mean()) / (counted.std(unbiased=False) + eps)
