"""Which episode an environment plays next, as a function of the seed and of how many it has played.

No state but counters: a resumed run draws the same episodes, and one environment's episodes do not depend on how fast
the others are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
from gymnasium.vector import VectorEnv

from vla_rl.run.progress import FinishedEpisode
from vla_rl.types import Episode, Observation

NOT_DEMONSTRATED = 1  # in the seeds: vla_rl.demonstrations draws without it, so no placement is seen there and here


class EpisodeSource(Protocol):
    playing: dict[int, int]  # env index -> number of its episode, -1 where episodes are endless

    def next(self, env_index: int) -> Episode | None: ...  # None: nothing left to play

    def coming(self, envs: Sequence[int]) -> dict[int, Episode]: ...  # what `next` will give them, where that is known


class EpisodeSampler:
    """Training episodes: fresh random placements, or a named subset of the benchmark's fixed states."""

    def __init__(self, task_ids: Sequence[int], initial_states: Literal["random"] | Sequence[int], seed: int):
        self.task_ids = list(task_ids)
        self.initial_states = initial_states
        self.seed = seed

    def draw(self, stream: int, number: int, task_id: int) -> Episode:
        """Episode `number` of a stream; equal arguments give equal episodes."""
        rng = np.random.default_rng([self.seed, stream, number, NOT_DEMONSTRATED])
        state = None if self.initial_states == "random" else int(rng.choice(self.initial_states))
        return Episode(task_id, state, seed=int(rng.integers(2**31)))


class EpisodeStreams:
    """Endless episodes for each of num_envs environments (PPO).

    With at most as many tasks as environments, environment i always plays task i mod the number of tasks: no simulator is
    ever rebuilt, and if the division has a rest some tasks are played by one environment more than others. With more
    tasks than environments, all tasks together get equal turns.
    """

    def __init__(self, sampler: EpisodeSampler, num_envs: int):
        self.sampler = sampler
        self.played = [0] * num_envs  # episodes handed out to each environment
        self.playing = dict.fromkeys(range(num_envs), -1)

    def next(self, env_index: int) -> Episode:
        episode = self.coming([env_index])[env_index]
        self.played[env_index] += 1
        return episode

    def coming(self, envs: Sequence[int]) -> dict[int, Episode]:
        tasks, num_envs, episodes = self.sampler.task_ids, len(self.played), {}
        for index in envs:
            number = self.played[index]
            turn = index if len(tasks) <= num_envs else index + number * num_envs
            episodes[index] = self.sampler.draw(index, number, tasks[turn % len(tasks)])
        return episodes


class RunningEpisodes:
    """Returns and lengths of the episodes under way, which may have begun in an earlier iteration."""

    def __init__(self, num_envs: int):
        self.returns = np.zeros(num_envs)  # undiscounted
        self.lengths = np.zeros(num_envs, dtype=np.int64)  # simulator steps

    def add(
        self, playing: Sequence[int], rewards: np.ndarray, steps: np.ndarray, terminated: np.ndarray, done: np.ndarray
    ) -> list[FinishedEpisode]:
        """Counts a decision of the environments that play, arrays [N] in their order; returns the episodes that it ended."""
        self.returns[playing] += rewards
        self.lengths[playing] += steps
        finished = []
        for row, index in enumerate(playing):
            if done[row]:
                ret, length = float(self.returns[index]), int(self.lengths[index])
                finished.append(FinishedEpisode(ret, length, success=bool(terminated[row])))
                self.returns[index] = self.lengths[index] = 0
        return finished


class EpisodeQueue:
    """A list of episodes, handed out in order to whichever environment is free (GRPO, evaluation)."""

    def __init__(self, episodes: Iterable[Episode]):
        self.waiting = deque(enumerate(episodes))
        self.playing: dict[int, int] = {}  # env index -> index of the episode in the list

    def next(self, env_index: int) -> Episode | None:
        if not self.waiting:
            self.playing.pop(env_index, None)
            return None
        self.playing[env_index], episode = self.waiting.popleft()
        return episode

    def coming(self, envs: Sequence[int]) -> dict[int, Episode]:
        return {}  # who ends first takes the next one


def group_episodes(sampler: EpisodeSampler, first_group: int, num_groups: int, group_size: int) -> list[Episode]:
    """Groups of episodes that share task, initial state and seed; groups take the tasks in turn (GRPO)."""
    tasks = sampler.task_ids
    groups = range(first_group, first_group + num_groups)
    return [e for g in groups for e in [sampler.draw(0, g, tasks[g % len(tasks)])] * group_size]


def step_arguments(
    actions: np.ndarray, playing: Sequence[int], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Of a vector's step_async: actions float32 [N, C, 7] of all environments, and which of them take it, bool [N].

    Args:
        actions: of the environments that play, in their order.
        shape: of the first result.
    """
    every, active = np.zeros(shape, np.float32), np.zeros(shape[0], bool)
    every[list(playing)], active[list(playing)] = actions, True
    return every, active


def reset_finished(
    envs: VectorEnv, finished: np.ndarray, source: EpisodeSource, begun: np.ndarray | None = None
) -> Observation | None:
    """Gives each finished environment its next episode, as far as there are any.

    Args:
        finished: [N] bool.
        begun: [N] bool, those that began what `source.coming` had told in the step that ended their last one; none if None.

    Returns:
        The observation of all environments after the resets; None when none was reset.
    """
    started: dict[int, Episode] = {}
    for index in np.flatnonzero(finished):
        episode = source.next(int(index))
        if episode is not None and not (begun is not None and begun[index]):
            started[int(index)] = episode
    if not started:
        return None
    mask = np.zeros(len(finished), dtype=np.bool_)
    mask[list(started)] = True
    obs, _ = envs.reset(options={"reset_mask": mask, "episodes": started})
    return Observation.from_vector_env(obs)
