"""Worker processes that play whole episodes, in the order in which they are asked for; again where a process was replaced.

Not here: what is recorded of an episode (vla_rl.demonstrations), what becomes of a process that dies, hangs or raises
(vla_rl.simulation.worker_processes).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vla_rl.simulation.worker_processes import Fault, Patience, WorkerProcesses
from vla_rl.types import Episode


class Recorders:
    """W processes. Close them.

    Args:
        make: called in each; gives an object with `record(episode, *arguments)`.
        count: W.
        task_suite: of the episodes, for messages.
        draw_in_one_thread: see vla_rl.simulation.worker_processes.lean_workers.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        count: int,
        patience: Patience | None = None,
        task_suite: str = "",
        draw_in_one_thread: bool = False,
    ):
        self.playing: dict[int, Job] = {}  # worker -> its job
        self.waiting: deque[Job] = deque()
        self.task_suite = task_suite
        self.workers = WorkerProcesses(
            [make] * count,
            patience,
            name="worker",
            describe=self.describe,
            hint="often out of memory: lower --workers",
            draw_in_one_thread=draw_in_one_thread,
        )

    def describe(self, fault: Fault) -> str:
        if fault.worker not in self.playing:
            return fault.phase
        return f"{fault.phase} of {self.task_suite}, {self.playing[fault.worker].episode}, which is recorded again"

    def submit(self, episode: Episode, *arguments: Any) -> Job:
        job = Job(self, episode, arguments)
        self.waiting.append(job)
        self.hand_out()
        return job

    def hand_out(self) -> None:
        for worker in set(range(len(self.workers.makers))) - self.playing.keys():
            if self.waiting:
                self.playing[worker] = job = self.waiting.popleft()
                self.workers.ask(worker, "record", job.episode, *job.arguments)

    def wait(self) -> None:
        """Until one of them has an outcome.

        Raises:
            SimulatorDied, or a worker's own error: see WorkerProcesses.wait.
        """
        for worker, answer in self.workers.wait(first=True).items():
            job = self.playing.pop(worker)
            if isinstance(answer, Fault):
                self.waiting.appendleft(job)
            else:
                job.outcome = answer
                self.workers.episode_ended(worker)
        self.hand_out()

    def close(self) -> None:
        self.workers.close()


@dataclass(eq=False)
class Job:
    """An episode that is recorded, or will be."""

    recorders: Recorders
    episode: Episode
    arguments: tuple[Any, ...]
    outcome: Any = None  # of `record`

    def result(self) -> Any:
        """Waits for it."""
        while self.outcome is None:
            self.recorders.wait()
        return self.outcome

    def cancel(self) -> None:
        """Unless it has begun."""
        with contextlib.suppress(ValueError):
            self.recorders.waiting.remove(self)
