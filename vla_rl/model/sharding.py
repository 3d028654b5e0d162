"""The frozen base in parts: each of N processes keeps 1/N of every transformer block and gathers a block while it runs (FSDP2).

LoRA's weights, embeddings, projector and LM head stay whole in each process. Gathering is an exchange, so all processes must run
the same number of forwards. Where each is on its own (a rollout, an evaluation) a forward is announced, and a process that is
done runs forwards of no use until the last one is (`Ranks.announce`, `Ranks.idle`).

Not measured on GPUs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.distributed.fsdp import fully_shard

from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.run.distributed import Ranks
from vla_rl.types import PROPRIO_DIM, PolicyInputs


def shard(policy: OpenVLAPolicy, ranks: Ranks) -> None:
    """Keeps 1/N of the frozen weights of each block here, and all forwards of the processes in step.

    What a block computes stays the same to the bit: it runs with whole weights.
    """
    policy.base_digest  # noqa: B018  cached: it reads whole weights
    for block in policy.network.blocks():
        fully_shard(block, ignored_params={p for p in block.parameters() if p.requires_grad})
    policy.before_forward = ranks.announce
    inputs = nothing(policy)
    ranks.idle = lambda: policy.read_hidden(*policy.arrange(*policy.tensors(inputs)))


def nothing(policy: OpenVLAPolicy) -> PolicyInputs:
    """One row of a black image and an empty instruction."""
    images = torch.zeros(1, policy.num_images, policy.image_size, policy.image_size, 3, dtype=torch.uint8)
    return PolicyInputs(images, torch.from_numpy(np.zeros((1, PROPRIO_DIM), np.float32)), ("",))
