"""How many rows a forward of the update has and what it recomputes backward: less where memory runs out, with equal results.

The gradient stays the same but for the order of float32 sums. Not here: what fits, measured before the training
(vla_rl.learning.memory); the recomputing itself, which is the policy's (set_gradient_checkpointing).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from vla_rl.learning.rollout_buffer import Minibatch
from vla_rl.run.distributed import Ranks
from vla_rl.run.failures import is_out_of_memory, one_line
from vla_rl.run.settings import Config
from vla_rl.types import OutOfMemory, Policy

log = logging.getLogger(__name__)

T = TypeVar("T")

MODES = ("none", "selective", "full")  # of policy.gradient_checkpointing, from the fastest to the one that needs least
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # of rows; few, as each is compiled by itself
CPU_ROWS = 64  # of algorithm.micro_batch_size: auto without a GPU, where nothing is measured
SMALLER_MODEL = "policy.quantization=nf4, policy.lora.target_modules=language-model or a larger card"


@dataclass(frozen=True)
class Choice:
    """How the update runs."""

    mode: str  # of MODES
    rows: int  # of a forward

    def __str__(self) -> str:
        return f"policy.gradient_checkpointing={self.mode} with algorithm.micro_batch_size={self.rows}"


class MicroBatches:
    """The rows of a forward of the update and the policy's checkpointing; less where memory runs out.

    algorithm.micro_batch_size: auto is a minibatch of at most 64 rows, until fit_to_card has measured.
    """

    def __init__(self, config: Config, policy: Policy):
        asked = config.algorithm.micro_batch_size
        self.policy, self.sharded = policy, config.distributed.shard
        self.rows = min(config.algorithm.minibatch_size, CPU_ROWS) if asked == "auto" else asked

    @property
    def choice(self) -> Choice:
        return Choice(self.policy.gradient_checkpointing, self.rows)

    def use(self, choice: Choice) -> None:
        self.rows = choice.rows
        if choice.mode != self.policy.gradient_checkpointing:
            self.policy.set_gradient_checkpointing(choice.mode)

    def metrics(self) -> dict[str, Any]:
        return {
            "system/micro_batch_size": self.rows,
            "system/gradient_checkpointing": self.policy.gradient_checkpointing,
        }

    def run(self, step: Callable[..., T], batch: Minibatch, *args: Any, **kwargs: Any) -> T:
        """step(batch, ...), which splits the batch by `rows`; again with fewer where memory runs out, and so from there on.

        Args:
            step: does the same when it is done again; what it leaves of gradients it drops at its start.

        Raises:
            OutOfMemory: one row does not fit with full checkpointing; or the base is in parts (vla_rl.learning.sharding), where
                processes that did other numbers of forwards would wait for each other.
        """
        while True:
            try:
                return step(batch, *args, **kwargs)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                said = what_ran_out(error)
            if self.sharded:
                raise OutOfMemory(f"{said} Resume with algorithm.micro_batch_size={max(1, self.rows // 2)}")
            # here, since the error's stack holds what the step had made
            for parameter in self.policy.trainable_parameters():
                parameter.grad = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.use(self.smaller(min(self.rows, len(batch)), said))
            log.warning("%s The update goes on with %s", said, self.choice)

    def score(self, batch: Minibatch, logprobs: Callable[..., Tensor], temperature: float, ranks: Ranks) -> Tensor:
        """Log-probabilities [R, A] of the rows' tokens, on the CPU, by a method of the policy; each process scores its share."""

        @torch.no_grad()
        def of_share(share: Minibatch) -> Tensor:
            parts = share.split(self.rows)
            return torch.cat([logprobs(m.inputs, m.action_tokens, temperature=temperature).cpu() for m in parts])

        shares = ranks.gather(self.run(of_share, batch.share(torch.arange(len(batch)), ranks)))
        return torch.stack(shares, dim=1).flatten(0, 1)[: len(batch)]

    def smaller(self, rows: int, said: str) -> Choice:
        """Half the rows; of one row more checkpointing.

        Args:
            rows: of the forward that did not fit.
            said: the error.
        """
        mode = self.policy.gradient_checkpointing
        if rows > 1:
            return Choice(mode, max(size for size in SIZES if size <= max(1, rows // 2)))
        if mode == MODES[-1]:
            raise OutOfMemory(
                f"{said} One row of the update does not fit with full checkpointing: what else uses the card (nvidia-smi)? Or take "
                f"{SMALLER_MODEL}, in a new run"
            )
        return Choice(MODES[MODES.index(mode) + 1], 1)


def what_ran_out(error: RuntimeError) -> str:
    """CUDA's message without its advice, which is about the allocator."""
    return one_line(error).partition(" Of the allocated memory")[0]


def rows_of_a_decision(config: Config, section: str) -> int:
    """Of one forward of a rollout or an evaluation ("eval")."""
    if section == "eval":
        return config.eval.num_envs
    return -(-config.rollout.num_envs // (2 if config.rollout.overlap else 1))


def fewer_rows(config: Config, section: str, rows: int, processes: int = 1) -> str:
    """Settings with which a forward of the section, in each of the processes, has at most so many rows."""
    if section == "eval":
        return f"eval.num_envs={rows * processes}"
    settings, overlap = config.rollout, "rollout.overlap=true, which halves the rows of a forward, or "
    environments = rows * (2 if settings.overlap else 1) * processes
    ways = overlap if not settings.overlap and rows * processes >= -(-settings.num_envs // 2) else ""
    return f"{ways}in a new run rollout.num_envs={environments} with more rollout.n_steps"


@contextmanager
def naming_what_fits(config: Config, section: str, processes: int = 1) -> Iterator[None]:
    """Where the policy acts: memory that runs out there is told with the settings that need less.

    Args:
        section: "rollout" or "eval".
        processes: that share its environments.

    Raises:
        OutOfMemory: instead of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        rows = -(-rows_of_a_decision(config, section) // processes)
        way = (
            f"Resume with {fewer_rows(config, section, -(-rows // 2), processes)}"
            if rows > 1
            else f"Take {SMALLER_MODEL}, in a new run"
        )
        raise OutOfMemory(
            f"{what_ran_out(error)} A forward of {rows} rows did not fit, {section}.num_envs={getattr(config, section).num_envs}: "
            f"what else uses the card (nvidia-smi)? {way}"
        ) from None
