"""V(s) from the hidden state of the last prompt token. B rows, D hidden size of the language model."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """A float32 MLP, whatever precision the policy runs in.

    The last prompt token has seen image and instruction but, in a causal model, no action: the best input of those
    compared by RL4VLA (arXiv:2505.19789). With [1024] on D = 4096 it has 4,196,353 parameters.

    The last layer starts at 0, so every value does: before the first return is seen, advantages are returns. From N(0, 0.02),
    as RL4VLA and RLinf have it, values begin at +-1 at D = 4096 (measured), as large as the reward of a success. The first
    step moves the last layer alone, every later one all of them.
    """

    def __init__(self, hidden_size: int, hidden_sizes: list[int], generator: torch.Generator | None = None):
        super().__init__()
        sizes = [hidden_size, *hidden_sizes]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain=2**0.5, generator=generator)
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.mlp[-1].weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, D] of any float dtype -> [B] float32."""
        return self.mlp(hidden.float()).squeeze(-1)
