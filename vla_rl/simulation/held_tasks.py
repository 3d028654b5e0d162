"""Which tasks' simulators the workers of a vector have, told in the main process, where it is decided who plays what next.

A simulator is built in seconds and an episode played in about one, so a worker goes on with the tasks that it has. Not here:
the simulators (vla_rl.simulation.libero_env.Simulators, whose order of closing this follows).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence


class HeldTasks:
    """The tasks that each worker has built or was promised, the one used longest ago first.

    Args:
        worker_of: the worker of each environment, [N].
        limit: simulators that a worker keeps.
    """

    def __init__(self, worker_of: Sequence[int], limit: int):
        self.worker_of, self.limit = list(worker_of), limit
        self.kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(max(worker_of) + 1)]

    def use(self, env_index: int, task_id: int) -> None:
        """The environment's next episode is of this task."""
        kept = self.kept[self.worker_of[env_index]]
        kept[task_id] = None
        kept.move_to_end(task_id)
        while len(kept) > self.limit:
            kept.popitem(last=False)

    def forget(self, worker: int) -> None:
        """It is another process now, and has none."""
        self.kept[worker].clear()

    def workers_for(self, task_ids: Sequence[int]) -> list[int]:
        """A worker for each task, no worker twice: one that has the task, where one is left. At most as many as there are."""
        chosen: dict[int, int] = {}  # place in task_ids -> worker
        for place, task in enumerate(task_ids):
            holders = [w for w, kept in enumerate(self.kept) if task in kept and w not in chosen.values()]
            if holders:
                chosen[place] = holders[0]
                self.use(self.worker_of.index(holders[0]), task)
        for place, task in enumerate(task_ids):
            if place not in chosen:
                chosen[place] = next(w for w in range(len(self.kept)) if w not in chosen.values())
                self.use(self.worker_of.index(chosen[place]), task)
        return [chosen[place] for place in range(len(task_ids))]

    def choose(self, env_index: int, waiting: Mapping[int, int]) -> int | None:
        """The task of an environment's next episode: one that its worker has, else one that no worker has, else the one of
        which most episodes wait, if they are as many as the worker has environments: fewer are sooner played by those who have
        it than its simulator is built.

        Args:
            waiting: task -> episodes that wait, at least 1 each, in the order in which tasks should be begun.

        Returns:
            None: nothing that is worth it.
        """
        worker = self.worker_of[env_index]
        kept, others = self.kept[worker], set().union(*self.kept)
        own = [task for task in reversed(kept) if task in waiting]
        new = [task for task in waiting if task not in others]
        shared = [task for task in waiting if waiting[task] >= self.worker_of.count(worker)]
        task = next(iter([*own, *new]), None) if own or new else max(shared, key=waiting.get, default=None)
        if task is not None:
            self.use(env_index, task)
        return task
