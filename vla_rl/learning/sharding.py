"""The frozen base in parts: each of N processes keeps 1/N of every transformer block and gathers a block while it runs (FSDP2).

LoRA's weights, embeddings, projector and LM head stay whole in each process. Gathering is an exchange, so all processes must run
the same number of forwards. Where each is on its own (a rollout, an evaluation) a forward is announced, and a process that is
done runs forwards of no use until the last one is (`Ranks.announce`, `Ranks.idle`).

Not measured on GPUs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.run.distributed import Ranks
from vla_rl.run.settings import Config, ConfigError
from vla_rl.types import PROPRIO_DIM, PolicyInputs


def check_sharding(config: Config) -> None:
    """Raises ConfigError if the settings need what a base in parts cannot do."""
    policy, algorithm = config.policy, config.algorithm
    wrong = {
        f"policy.decoder={policy.decoder}, which gathers the base seven times a decision": policy.decoder != "parallel",
        f"policy.quantization={policy.quantization}": policy.quantization != "none",
        f"policy.compile={policy.compile}": policy.compile == "true",
    }
    if config.run.device == "cuda":  # nothing is measured there, since each process would try other sizes
        auto = (policy.gradient_checkpointing, algorithm.micro_batch_size)
        wrong["policy.gradient_checkpointing or algorithm.micro_batch_size=auto"] = "auto" in auto
    for what in (what for what, holds in wrong.items() if holds):
        raise ConfigError(f"distributed.shard=true with {what}; set another value, or distributed.shard=false")


def shard(policy: OpenVLAPolicy, ranks: Ranks, device: torch.device) -> None:
    """Keeps 1/N of the frozen weights of each block here, and all forwards of the processes in step.

    What a block computes stays the same to the bit: it runs with whole weights.

    Args:
        policy: on the CPU; a GPU needs no room for more than its part and one block.
        device: where it then is.
    """
    policy.base_digest  # noqa: B018  cached: it reads whole weights
    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in policy.network.blocks():
        trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
        fully_shard(block, mesh=mesh, ignored_params=trained)
    policy.network.to(device)
    policy.device = device
    policy.processor.to(device)
    policy.before_forward = ranks.announce
    inputs = nothing(policy)
    ranks.idle = lambda: policy.read_hidden(*policy.arrange(*policy.tensors(inputs)))


def nothing(policy: OpenVLAPolicy) -> PolicyInputs:
    """One row of a black image and an empty instruction."""
    images = torch.zeros(1, policy.num_images, policy.image_size, policy.image_size, 3, dtype=torch.uint8)
    return PolicyInputs(images, torch.from_numpy(np.zeros((1, PROPRIO_DIM), np.float32)), ("",))
