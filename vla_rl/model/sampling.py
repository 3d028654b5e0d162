"""Drawing tokens from distributions, and their log-probabilities. B rows, A action tokens, 256 action ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vla_rl.types import NonFiniteError


def draw(probs: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """An index [B, ...] of each distribution [B, ..., 256]; see vla_rl.model.policy.OpenVLAPolicy.act for the generator."""
    if generator is None or isinstance(generator, torch.Generator):
        at = probs.device if generator is None else generator.device
        drawn = torch.multinomial(probs.flatten(0, -2).to(at), 1, generator=generator)
        return drawn.to(probs.device).view(probs.shape[:-1])
    rows = probs.to(generator[0].device)
    return torch.stack([draw(row[None], g)[0] for row, g in zip(rows, generator, strict=True)]).to(probs.device)


def gather(logprobs: Tensor, index: Tensor) -> Tensor:
    """logprobs [B, A, 256] at index [B, A] -> [B, A]."""
    return logprobs.gather(-1, index[..., None]).squeeze(-1)


def check_finite(distribution: Tensor) -> None:
    if not torch.isfinite(distribution).all():
        raise NonFiniteError(
            "the policy's action distribution is not finite: its weights or inputs have a NaN or infinity"
        )


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; expected above 0 (for the most likely token use greedy=True)")
