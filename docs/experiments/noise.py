"""Training with one thing changed that may lower the noise of an update, and that the trainer itself does not have.

    python docs/experiments/noise.py VARIANT ...       what follows are the flags of start_gae_ppo_training.py

first_actions  only the tokens of a chunk's first half are trained
pairs          environments 2k and 2k+1 play the same placements, and an advantage loses what the other's episode says of the placement

run.py has their runs (noise_*), beside those of settings that the trainer has. Only noise_base has been run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import OpenVLA_PPO
import start_gae_ppo_training
from vla_rl.learning import estimators, losses
from vla_rl.learning.advantages import compute_gae

Trainer = OpenVLA_PPO.OpenVLAPPO


def of_first_actions(mask: Tensor, action_dims: list[int], action_dim: int) -> Tensor:
    chosen = OF_DIMS(mask, action_dims, action_dim)
    chosen[:, mask.shape[-1] // 2 :] = False
    return chosen


OF_DIMS = losses.of_dims


class Pairs(Trainer):
    """A_t loses c lambda^(k - t) (R' - V'): R' the return of the partner's episode of the same placement, V' the value of its first
    row in this rollout, k the last decision of the own episode. R' - V' does not depend on what the own episode does, so the gradient stays
    unbiased; c = 1/3 is the share of the variance of success that the placement decides.
    """

    SHARE = 1 / 3

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        draw = self.sampler.draw
        self.sampler.draw = lambda stream, number, task: draw(stream // 2, number, task)

    def play(self):
        self.first_numbers = [max(0, played - 1) for played in self.streams.played]
        return super().play()

    def compute_advantages(self, rollout):
        ended = rollout.stack("terminated") | rollout.stack("truncated")
        told = surprises_of_partners(ended, rollout.stack("rewards"), rollout.stack("values"), self.first_numbers)

        def gae(*arguments):
            advantages, returns = compute_gae(*arguments)
            left = decisions_left(ended)
            return advantages - self.SHARE * self.config.algorithm.gae_lambda**left * told, returns

        estimators.compute_gae = gae
        try:
            return super().compute_advantages(rollout)
        finally:
            estimators.compute_gae = compute_gae


def decisions_left(ended: Tensor) -> Tensor:
    """Decisions that follow in the same episode (and rollout): bool [T, N] -> float32 [T, N]."""
    left, after = torch.zeros(ended.shape), torch.full(ended.shape[1:], -1.0)
    for t in reversed(range(len(ended))):
        left[t] = after = torch.where(ended[t], 0.0, after + 1)
    return left


def surprises_of_partners(ended: Tensor, rewards: Tensor, values: Tensor, first_numbers: list[int]) -> Tensor:
    """R' - V' [T, N] of the partner's episode of the same number; 0 where it does not end in the rollout.

    Args:
        ended: bool [T, N]; rewards, values: [T, N]; columns 2k and 2k + 1 are partners.
        first_numbers: N, of the episodes that are under way in the first row.
    """
    numbers = torch.cat([torch.zeros_like(ended[:1]), ended[:-1]]).long().cumsum(0) + torch.tensor(
        first_numbers
    )  # [T, N]
    surprises: list[dict[int, float]] = []
    for column in range(ended.shape[1]):
        own = numbers[:, column]
        of_number = {}
        for number in own[ended[:, column]].tolist():
            rows = own == number
            of_number[number] = (rewards[rows, column].sum() - values[rows, column][0]).item()
        surprises.append(of_number)
    told = torch.zeros(ended.shape)
    for column in range(ended.shape[1]):
        partner = surprises[column ^ 1]
        told[:, column] = torch.tensor([partner.get(number, 0.0) for number in numbers[:, column].tolist()])
    return told


def main() -> int:
    variants = {"first_actions": Trainer, "pairs": Pairs}
    if len(sys.argv) < 2 or sys.argv[1] not in variants:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    OpenVLA_PPO.OpenVLAPPO = variants[sys.argv[1]]
    if sys.argv[1] == "first_actions":
        losses.of_dims = of_first_actions
    return start_gae_ppo_training.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
