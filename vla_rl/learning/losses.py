"""Losses and diagnostics as pure functions.

B decisions of a micro-batch, A action tokens of a decision, C actions, L ratios of a decision (A, C or 1). Everything
is float32. A mean over masked entries is a sum divided by `count`, the valid entries of the whole minibatch, so that
the losses of micro-batches add up to the loss of the minibatch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LogprobLevel = Literal["token", "action", "chunk"]


def token_mask(steps: Tensor, chunk_size: int, action_dim: int) -> Tensor:
    """Which tokens were acted on: those of the sub-steps executed before the episode ended inside the chunk.

    Args:
        steps: [B] int64, executed sub-steps, 0..chunk_size.

    Returns:
        [B, A] bool with A = chunk_size * action_dim; token k belongs to sub-step k // action_dim.
    """
    executed = torch.arange(chunk_size, device=steps.device) < steps.unsqueeze(-1)  # [B, C]
    return executed.repeat_interleave(action_dim, dim=-1)


def of_dims(mask: Tensor, action_dims: list[int], action_dim: int) -> Tensor:
    """The part of a token mask bool [B, A] that belongs to these dimensions of an action; token k is of k % action_dim."""
    chosen = torch.zeros(action_dim, dtype=torch.bool, device=mask.device)
    for dim in action_dims:  # one by one: a list of indices would make the CPU wait for a GPU
        chosen[dim] = True
    return mask & chosen.repeat(mask.shape[-1] // action_dim)


def sum_to_level(logprobs: Tensor, mask: Tensor, level: LogprobLevel, action_dim: int) -> tuple[Tensor, Tensor]:
    """Joint log-probabilities of what one ratio is of. Sums, never means: a joint probability is a product.

    Args:
        logprobs: [B, A] per token.
        mask: [B, A] bool.

    Returns:
        logprobs [B, L] and mask [B, L]; L is A (token), A / action_dim (action) or 1 (chunk). Masked tokens add nothing.
    """
    if logprobs.shape != mask.shape:
        raise ValueError(f"logprobs {list(logprobs.shape)} and mask {list(mask.shape)} must have one shape")
    if level == "token":
        return logprobs, mask
    group = action_dim if level == "action" else logprobs.shape[-1]
    summed = torch.where(mask, logprobs, 0.0).unflatten(-1, (-1, group)).sum(-1)
    return summed, mask.unflatten(-1, (-1, group)).any(-1)


def tokens_per_ratio(level: LogprobLevel, num_dims: int, chunk_size: int) -> int:
    """Tokens that one ratio is of; a KL divided by it is one a token (a chunk that the episode's end cut has fewer).

    Args:
        num_dims: dimensions of an action whose tokens count, 1..7.
    """
    return {"token": 1, "action": num_dims, "chunk": num_dims * chunk_size}[level]


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """sum(x[mask]) / count; count defaults to the valid entries of this very mask."""
    if x.shape != mask.shape:
        raise ValueError(f"values {list(x.shape)} and mask {list(mask.shape)} must have one shape")
    return torch.where(mask, x, 0.0).sum() / (mask.sum() if count is None else count)


def ppo_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
    count: Tensor | float | None = None,
) -> Tensor:
    """Clipped surrogate, to be minimised.

        L = -mean min(rho A, clip(rho, 1 - low, 1 + high) A),   rho = pi(a|s) / pi_old(a|s)

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7; two clip ratios: DAPO, arXiv:2503.14476, equation 10.

    Args:
        logprobs, old_logprobs: [B, L]; only the first carries a gradient.
        advantages: [B]; every ratio of a decision has the decision's advantage.
        mask: [B, L] bool.
        count: valid entries of the minibatch, of which this is a part.
    """
    if advantages.shape != logprobs.shape[:1] or old_logprobs.shape != logprobs.shape:
        raise ValueError(
            f"expected logprobs and old_logprobs [B, L] and advantages [B], got {list(logprobs.shape)}, "
            f"{list(old_logprobs.shape)} and {list(advantages.shape)}"
        )
    ratio = log_ratio(logprobs, old_logprobs, mask).exp()  # [B, L]
    clipped = ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    advantages = advantages.unsqueeze(-1)  # [B, 1]
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), mask, count)


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log pi - log pi_old where valid, 0 elsewhere: exp of a masked entry must not overflow, 0 * inf would be NaN."""
    return torch.where(mask, logprobs - old_logprobs, 0.0)


def clip_fraction(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
    count: Tensor | float | None = None,
) -> Tensor:
    """Share of the valid ratios outside [1 - low, 1 + high]; 0..1."""
    ratio = log_ratio(logprobs, old_logprobs, mask).exp()
    return masked_mean(((ratio < 1 - clip_ratio_low) | (ratio > 1 + clip_ratio_high)).float(), mask, count)


def approx_kl(logprobs: Tensor, other_logprobs: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """KL(p || q) from samples of p: mean of (q/p - 1) - log(q/p), never negative, low variance (k3).

    Source: Schulman 2020, "Approximating KL Divergence", joschu.net/blog/kl-approx.html. With p = pi_old (samples come
    from it) and q = pi it is the drift of an update; with p = pi and q = the base model it is the penalty of
    DeepSeekMath, arXiv:2402.03300, equation 4.

    Args:
        logprobs: [B, L] of p.
        other_logprobs: [B, L] of q.
    """
    log_q_over_p = log_ratio(other_logprobs, logprobs, mask)
    return masked_mean(log_q_over_p.exp() - 1 - log_q_over_p, mask, count)


def value_loss(values: Tensor, returns: Tensor, count: float | None = None, mask: Tensor | None = None) -> Tensor:
    """Mean squared error, mean (V(s_t) - R_t)^2: arXiv:1707.06347, equation 9. Not clipped.

    Args:
        values: [B], with gradient.
        returns: [B], the targets.
        count: rows of the minibatch, of which this is a part.
        mask: bool [B], rows that count; None: all.
    """
    if values.shape != returns.shape or values.dim() != 1:
        raise ValueError(f"values {list(values.shape)} and returns {list(returns.shape)} must both be [B]")
    errors = (values - returns).square()
    errors = errors if mask is None else torch.where(mask, errors, 0.0)
    return errors.sum() / (len(values) if count is None else count)


def explained_variance(values: Tensor, returns: Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than a constant; None if returns are constant."""
    variance = returns.var(unbiased=False)
    return None if variance < 1e-12 else (1 - (returns - values).var(unbiased=False) / variance).item()
