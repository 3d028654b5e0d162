"""Drawing tokens from distributions, and their log-probabilities. B rows, A action tokens, 256 action ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from vla_rl.run.section import Mode
from vla_rl.types import NonFiniteError


def draw_noise(
    shape: tuple[int, ...], generator: torch.Generator | Sequence[torch.Generator] | None, rows: int
) -> Tensor:
    """Exponential noise, float32 [B, *shape], for `pick`, on the generator's device.

    It is drawn before the distribution is known, so that a GPU need not wait between tokens, and row by row, so that what a
    row draws depends on nothing but its generator.

    Args:
        generator: one for all rows, or one a row; None takes torch's global one of the CPU.
        rows: B.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.empty(rows, *shape, device=device).exponential_(generator=generator)
    if len(generator) != rows:
        raise ValueError(f"{len(generator)} generators for {rows} rows; give one a row")
    return torch.stack([torch.empty(shape, device=g.device).exponential_(generator=g) for g in generator])


def pick(probs: Tensor, noise: Tensor | None) -> Tensor:
    """An index [...] of each distribution [..., 256], drawn by noise of the same shape; without noise that nearest to its mean.

    Of independent exponential times with rates p, the first is i with probability p_i; torch.multinomial draws so too, and
    gives the same index for the same generator on the CPU (aten/src/ATen/native/Distributions.cpp#multinomial_out).
    """
    return mean_index(probs) if noise is None else (probs / noise).argmax(dim=-1)


def mean_index(probs: Tensor) -> Tensor:
    """The index [...] nearest to the mean of each distribution [..., 256]: of bins of equal width, that of the mean action."""
    return (probs * torch.arange(probs.shape[-1], device=probs.device)).sum(dim=-1).round().long()


def gather(logprobs: Tensor, index: Tensor) -> Tensor:
    """logprobs [B, A, 256] at index [B, A] -> [B, A]."""
    return logprobs.gather(-1, index[..., None]).squeeze(-1)


def check_finite(finite: Tensor) -> None:
    """Raises NonFiniteError unless the bool tensor, of a distribution's entries, is all True."""
    if not finite.all():
        raise NonFiniteError(
            "the policy's action distribution is not finite: its weights or inputs have a NaN or infinity"
        )


def tempered(logits: Tensor, temperatures: Tensor) -> Tensor:
    """logits [B, ..., 256] / T. T is a tensor, [B] or [1], as a number would be a constant of a CUDA graph, and CUDA would
    multiply by its inverse, which rounds otherwise."""
    return logits / temperatures.view(-1, *[1] * (logits.ndim - 1))


def check_sampling(temperature: float, mode: Mode = "sampled") -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}; expected one of {', '.join(get_args(Mode))}")
    if not temperature > 0:
        raise ValueError(f'temperature={temperature}; expected above 0 (for the most likely token use mode="greedy")')


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.int64 or tensor.shape != shape:
        raise ValueError(f"{name}: expected int64 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
