"""Several processes that train one run together, started by torchrun: who is who, and what they tell each other.

Each of them, a rank, has a replica of the policy and its share of the environments. All ranks go through the same iterations, so
each calls the methods below in the same order: a rank that left one out would make the others wait. Whatever may happen on one
rank alone, a request to stop say, is first told to all (`any`), then done by all.

One process: torch.distributed is not initialised, and every method answers at once.

Host data go by gloo, what is on a GPU by NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vla_rl.run.failures import is_out_of_memory, one_line
from vla_rl.run.machine import launched, processes_here, restarts
from vla_rl.run.settings import Config, ConfigError
from vla_rl.types import ProcessLost, StopTraining

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)  # of one exchange: a rank waits while another builds simulators, or plays longer episodes
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


class Ranks:
    """This process among those that train one run.

    Args:
        rank: 0..size-1.
        size: how many there are.
        store: of key and value, that all reach; None for one process.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None):
        self.rank, self.size, self.store = rank, size, store
        self.lists = 0  # that were claimed from
        # a forward of no use, where forwards are exchanges (vla_rl.learning.sharding)
        self.idle: Callable[[], Any] | None = None

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and tells."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's of `count` environments: contiguous, as many as every other one has."""
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    # -------------------------------------------------------------------------------------------------- of host data

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order. Values can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with exchanging():
            dist.all_gather_object(values, value)
        return values

    def all_of(self, work: Callable[[], T]) -> list[T]:
        """What every rank gets by its own work; StopTraining on all of them where one was stopped in it."""
        if self.size == 1:
            return [work()]
        try:
            done = True, work()
        except StopTraining:
            done = False, None
        while self.idle is not None and self.any(False):
            self.idle()
        parts = self.gather(done)
        if not all(finished for finished, _ in parts):
            raise StopTraining
        return [result for _, result in parts]

    def announce(self) -> None:
        """Before a forward, where others that are done with their work (`all_of`) must run one, too."""
        self.any(True)

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return flag if self.size == 1 else bool(self.largest(float(flag)))

    def largest(self, number: float) -> float:
        if self.size > 1:
            tensor = torch.tensor(number, dtype=torch.float64)
            with exchanging():
                dist.all_reduce(tensor, dist.ReduceOp.MAX)
            number = tensor.item()
        return number

    def by_first(self, work: Callable[[], T]) -> T:
        """What rank 0 gets by doing it; where it fails, its error on every rank."""
        outcome: tuple[Any, BaseException | None] = None, None
        if self.first:
            try:
                outcome = work(), None
            except Exception as error:
                outcome = None, error
        if self.size > 1:
            box = [outcome]
            with exchanging():
                dist.broadcast_object_list(box, src=0)
            outcome = box[0]
        result, error = outcome
        if error is not None:
            raise error
        return result

    def claims(self) -> Callable[[int], int]:
        """For one list of tasks' episodes: task -> how many of it were claimed before, by whichever rank."""
        self.lists += 1
        if self.size == 1:
            taken: dict[int, int] = {}

            def claim(task: int) -> int:
                taken[task] = taken.get(task, -1) + 1
                return taken[task]

            return claim
        return lambda task, number=self.lists: self.store.add(f"list {number} task {task}", 1) - 1

    def stop_asked(self, here: bool) -> bool:
        """Whether a stop was asked for: here, which all will soon know, or on another rank."""
        if self.size == 1:
            return here
        if here:
            self.store.set("stop", "1")
        return here or self.store.check(["stop"])

    # ------------------------------------------------------------------------------------------------ of an update

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Puts the sum over the ranks into each tensor; all of one dtype and device, with the same shapes everywhere."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with exchanging():
            dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Those that have one; a parameter that no loss reads has none on any rank."""
        self.add([parameter.grad for parameter in parameters if parameter.grad is not None])

    def add_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Of a minibatch, whose ranks' shares add up; an error keeps its maximum (vla_rl.run.progress.accumulate)."""
        if self.size == 1:
            return dict(metrics)
        sums = {name: value for name, value in metrics.items() if not name.endswith("_error")}
        largest = {name: value for name, value in metrics.items() if name.endswith("_error")}
        for part, operation in ((sums, dist.ReduceOp.SUM), (largest, dist.ReduceOp.MAX)):
            values = torch.tensor(list(part.values()), dtype=torch.float64)
            with exchanging():
                dist.all_reduce(values, operation)
            part.update(zip(part, values.tolist(), strict=True))
        return {name: (sums | largest)[name] for name in metrics}

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Makes replicas equal to the bit where every rank has calculated the same."""
        if self.size > 1:
            with torch.no_grad(), exchanging():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)


ONE = Ranks()


@contextmanager
def exchanging() -> Iterator[None]:
    """Around what waits for the other ranks.

    Raises:
        ProcessLost: one of them has ended, or has not answered within TIMEOUT.
    """
    try:
        yield
    except RuntimeError as error:  # of gloo, NCCL and the store
        if is_out_of_memory(error):
            raise
        raise ProcessLost(
            f"another process of this run has ended or does not answer, which its own message explains ({one_line(error)})"
        ) from error


def share_of(config: Config, processes: int) -> Config:
    """The settings of each of several processes that train together: its environments, workers and rows of a minibatch.

    Raises:
        ConfigError: the environments cannot be shared evenly.
    """
    num_envs, least = config.rollout.num_envs, 2 if config.rollout.overlap else 1
    if num_envs % processes or num_envs // processes < least:
        fitting = max(least, -(-num_envs // processes)) * processes
        raise ConfigError(
            f"rollout.num_envs={num_envs} are the environments of all {processes} processes, which share them evenly"
            f"{', two or more each for rollout.overlap' if least > 1 else ''}; set rollout.num_envs={fitting}"
        )
    workers = config.env.num_workers
    changes = {
        "rollout": {"num_envs": num_envs // processes},
        "env": {"num_workers": None if workers is None else -(-workers // processes)},
        "eval": {"num_envs": -(-config.eval.num_envs // processes)},
        "algorithm": {"minibatch_size": -(-config.algorithm.minibatch_size // processes)},
    }
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    )


def take_one_gpu() -> None:
    """Makes the rank's GPU the only one that this process sees, torch and EGL alike; before CUDA is initialised.

    Raises:
        ConfigError: there are fewer GPUs than ranks on this machine.
    """
    local = int(os.environ["LOCAL_RANK"])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible is not None else list(map(str, range(torch.cuda.device_count())))
    if processes_here() > len(gpus):
        raise ConfigError(
            f"torchrun started {processes_here()} processes on this machine, which has {len(gpus)} GPUs; give "
            f"--nproc-per-node {len(gpus)}, or run.device=cpu"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local]


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Joins the other ranks, if there are any, for as long as the block lasts.

    Args:
        device: cpu or cuda, where the policy runs.
    """
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ONE
        return
    if device == "cuda":
        take_one_gpu()
    store, rank, size = next(dist.rendezvous("env://"))
    # else a restarted process may read where one of before was to be reached (seen with torch 2.15)
    store = dist.PrefixStore(f"start {restarts()[0]}", store)
    dist.init_process_group(BACKENDS[device], store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Ranks(rank, size, dist.PrefixStore("vla_rl", store))
    finally:
        dist.destroy_process_group()
