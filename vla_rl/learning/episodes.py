"""Which episode an environment plays next, as a function of the seed and of how many it has played.

No state but counters: a resumed run draws the same episodes, and one environment's episodes do not depend on how fast
the others are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from vla_rl.run.distributed import ONE, Ranks
from vla_rl.run.progress import FinishedEpisode
from vla_rl.types import Episode, Observation, place_in_round

log = logging.getLogger(__name__)

NOT_DEMONSTRATED = 1  # in the seeds: vla_rl.demonstrations draws without it, so no placement is seen there and here


class EpisodeSource(Protocol):
    playing: dict[int, int]  # env index -> number of its episode, -1 where episodes are endless

    def next(self, env_index: int) -> Episode | None: ...  # None: nothing left to play

    def again(self, env_index: int) -> Episode | None: ...  # in place of one that was broken off

    def coming(self, envs: Sequence[int]) -> dict[int, Episode]: ...  # what `next` will give them, where that is known

    def task_of(self, env_index: int) -> int: ...  # of the episode that it plays

    def generator_of(self, env_index: int) -> torch.Generator: ...  # that the episode's actions are sampled with


class Held(Protocol):
    """Which worker has which task's simulator; vla_rl.simulation.held_tasks.HeldTasks."""

    def choose(self, env_index: int, waiting: Mapping[int, int]) -> int | None: ...


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
    """Endless episodes for each of N environments (PPO), or some of them, and the generator that each samples from.

    The T tasks lie around a ring. The environment at place p of the round begins p T / N tasks along it and goes on by one task
    every IN_A_ROW episodes, again and again. So each environment plays all tasks equally often, whatever N is and however long
    their episodes are; at any time the environments are spread evenly over the ring, and neighbours have neighbouring tasks, so
    that a worker builds a simulator seldom where it cannot keep all. None of it depends on how many workers or processes there are.

    Args:
        num_envs: N.
        own: those of this process, its environments 0, 1, ...; all if None.
    """

    IN_A_ROW = 4  # of one task: a simulator takes as long to build as 1 to 4 episodes to play

    def __init__(self, sampler: EpisodeSampler, num_envs: int, own: range | None = None):
        self.sampler, self.num_envs = sampler, num_envs
        self.own = range(num_envs) if own is None else own
        self.played = [0] * len(self.own)  # episodes handed out to each environment
        self.playing = dict.fromkeys(range(len(self.own)), -1)
        seeds = np.random.SeedSequence(sampler.seed).generate_state(num_envs, np.uint64)
        self.generators = [torch.Generator().manual_seed(int(seeds[number])) for number in self.own]

    def next(self, env_index: int) -> Episode:
        episode = self.coming([env_index])[env_index]
        self.played[env_index] += 1
        return episode

    def again(self, env_index: int) -> Episode:
        return self.next(env_index)

    def coming(self, envs: Sequence[int]) -> dict[int, Episode]:
        played = self.played
        return {i: self.sampler.draw(self.own[i], played[i], self.task_of(i, played[i])) for i in envs}

    def task_of(self, env_index: int, number: int | None = None) -> int:
        """Of the environment's episode `number`; of the one that it plays without."""
        number = self.played[env_index] - 1 if number is None else number
        tasks, num_envs = self.sampler.task_ids, self.num_envs
        place = place_in_round(self.own[env_index], num_envs)
        begun = place * len(tasks) * self.IN_A_ROW  # in tasks, times N x IN_A_ROW
        return tasks[(begun + number * num_envs) // (num_envs * self.IN_A_ROW) % len(tasks)]

    def generator_of(self, env_index: int) -> torch.Generator:
        return self.generators[env_index]


class RunningEpisodes:
    """Returns and lengths of the episodes under way, which may have begun in an earlier iteration."""

    def __init__(self, num_envs: int):
        self.returns = np.zeros(num_envs)  # undiscounted
        self.lengths = np.zeros(num_envs, dtype=np.int64)  # simulator steps

    def add(
        self,
        source: EpisodeSource,
        playing: Sequence[int],
        rewards: np.ndarray,
        steps: np.ndarray,
        terminated: np.ndarray,
        done: np.ndarray,
    ) -> list[FinishedEpisode]:
        """Counts a decision of the environments that play, arrays [N] in their order; returns the episodes that it ended."""
        self.returns[playing] += rewards
        self.lengths[playing] += steps
        finished = []
        for row, index in enumerate(playing):
            if done[row]:
                ret, length = float(self.returns[index]), int(self.lengths[index])
                task = source.task_of(index)
                finished.append(FinishedEpisode(ret, length, success=bool(terminated[row]), task_id=task))
                self.forget([index])
        return finished

    def forget(self, playing: Sequence[int]) -> None:
        """Their episodes were broken off, or have ended."""
        self.returns[playing] = self.lengths[playing] = 0


class EpisodeQueue:
    """A list of episodes for whichever environment is free (GRPO, evaluation): in order, or of the tasks that its worker has.

    Of several processes each has the list, and they take from it together; each begins with other tasks.

    Args:
        episodes: E of them.
        held: says which task an environment takes; None takes the list's order.
        generators: E, one an episode: what it samples depends on the episode alone, not on who plays it.
        tries: how often an episode is begun, before one that is broken off each time is left out; None: until it has ended.

    Attributes:
        left_out: numbers of those episodes.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        held: Held | None = None,
        generators: Sequence[torch.Generator] = (),
        ranks: Ranks = ONE,
        tries: int | None = None,
    ):
        self.episodes, self.held, self.generators = list(episodes), held, generators
        self.tries, self.broken = tries, [0] * len(self.episodes)  # how often each was broken off
        self.left_out: list[int] = []
        self.claim = ranks.claims()
        of_task: dict[int, list[int]] = {}
        for number, episode in enumerate(self.episodes):
            of_task.setdefault(episode.task_id, []).append(number)
        first = len(of_task) * ranks.rank // ranks.size
        tasks = [*list(of_task)[first:], *list(of_task)[:first]]
        self.of_task = {task: of_task[task] for task in tasks}  # indices of a task's episodes, in order
        # of each task that is not known to be used up: those before this one are taken
        self.waiting = dict.fromkeys(tasks, 0)
        self.playing: dict[int, int] = {}  # env index -> index of the episode in the list

    def next(self, env_index: int) -> Episode | None:
        while self.waiting and (task := self._choose(env_index)) is not None:
            numbers, taken = self.of_task[task], self.claim(task)
            self.waiting[task] = taken + 1
            if taken + 1 >= len(numbers):
                del self.waiting[task]
            if taken < len(numbers):
                self.playing[env_index] = numbers[taken]
                return self.episodes[numbers[taken]]
        self.playing.pop(env_index, None)
        return None

    def again(self, env_index: int) -> Episode | None:
        """The same episode, which samples the same; where that was broken off, too, and it must end once, something else."""
        number = self.playing[env_index]
        self.broken[number] += 1
        if self.tries is not None and self.broken[number] >= self.tries:
            self.left_out.append(number)
            log.warning("%s is left out: broken off %d times", self.episodes[number], self.broken[number])
            return self.next(env_index)
        if self.generators and (self.tries is not None or self.broken[number] == 1):
            self.generators[number].manual_seed(self.generators[number].initial_seed())
        return self.episodes[number]

    def _choose(self, env_index: int) -> int | None:
        if self.held is None:
            return min(self.waiting, key=lambda task: self.of_task[task][self.waiting[task]])
        return self.held.choose(env_index, {i: len(self.of_task[i]) - taken for i, taken in self.waiting.items()})

    def coming(self, envs: Sequence[int]) -> dict[int, Episode]:
        return {}  # who ends first takes the next one

    def task_of(self, env_index: int) -> int:
        return self.episodes[self.playing[env_index]].task_id

    def generator_of(self, env_index: int) -> torch.Generator:
        return self.generators[self.playing[env_index]]


def group_episodes(sampler: EpisodeSampler, first_group: int, num_groups: int, group_size: int) -> list[Episode]:
    """Groups of episodes that share task, initial state and seed; groups take the tasks in turn (GRPO)."""
    tasks = sampler.task_ids
    groups = range(first_group, first_group + num_groups)
    return [e for g in groups for e in [sampler.draw(0, g, tasks[g % len(tasks)])] * group_size]


def group_queue(
    sampler: EpisodeSampler,
    first_group: int,
    num_groups: int,
    group_size: int,
    held: Held | None,
    ranks: Ranks = ONE,
) -> EpisodeQueue:
    """The episodes of `group_episodes`, each with a generator of its own: whoever plays it samples the same."""
    episodes = group_episodes(sampler, first_group, num_groups, group_size)
    first = first_group * group_size
    generators = episode_generators(sampler.seed, range(first, first + len(episodes)))
    return EpisodeQueue(episodes, held, generators, ranks)


def episode_generators(seed: int, numbers: Iterable[int]) -> list[torch.Generator]:
    """One for each episode, of the seed and of the episode's number in the run."""
    seeds = [np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] for number in numbers]
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def step_arguments(
    actions: np.ndarray, playing: Sequence[int], shape: tuple[int, ...], idle: Iterable[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Of a vector's step_async: actions float32 [N, C, 7] of all environments, and which of them take it, bool [N].

    Args:
        actions: of the environments that play, in their order.
        shape: of the first result.
        idle: those of them that do not take it.
    """
    every, active = np.zeros(shape, np.float32), np.zeros(shape[0], bool)
    every[list(playing)], active[list(playing)] = actions, True
    active[list(idle)] = False
    return every, active


def reset_finished(
    envs: VectorEnv, finished: np.ndarray, source: EpisodeSource, begun: np.ndarray | None = None
) -> tuple[Observation | None, list[int]]:
    """Gives each finished environment its next episode, as far as there are any, and those another one whose was broken off by the
    loss of a simulator, in the last step or in this very reset.

    Args:
        finished: [N] bool.
        begun: [N] bool, those that began what `source.coming` had told in the step that ended their last one; none if None.

    Returns:
        The observation of all environments after the resets, None when none was reset; and whose episodes were broken off.
    """
    started: dict[int, Episode] = {}
    for index in np.flatnonzero(finished):
        episode = source.next(int(index))
        if episode is not None and not (begun is not None and begun[index]):
            started[int(index)] = episode
    obs, broken = None, []
    while True:
        lost = [i for i in np.flatnonzero(envs.dropped).tolist() if i in source.playing and i not in started]
        broken += lost
        started |= {i: episode for i in lost if (episode := source.again(i)) is not None}
        if not started:
            return obs, broken
        mask = np.zeros(len(finished), dtype=np.bool_)
        mask[list(started)] = True
        raw_obs, _ = envs.reset(options={"reset_mask": mask, "episodes": started})
        obs, started = Observation.from_vector_env(raw_obs), {}


class BrokenOff:
    """Episodes that were broken off by the loss of their simulator, in a rollout.

    Attributes:
        count: of them.
        idle: environments that began another episode after the policy had decided for the last one's state: that decision is
            not carried out, and its row is of the broken one.
    """

    def __init__(self) -> None:
        self.count, self.idle = 0, set()

    def rows(self, broken: Sequence[int], envs: Sequence[int], done: torch.Tensor) -> torch.Tensor:
        """Which rows of a decision are of an episode that was broken off, bool [N].

        Args:
            broken: environments, now, while the decision of `envs` was carried out or what followed it began.
            envs: N.
            done: bool [N], whose episode has ended in it; what was broken off is the next one then.
        """
        self.count += len(broken)
        rows = torch.tensor([i in broken or i in self.idle for i in envs]) & ~done
        self.idle = (self.idle | set(broken)) - set(envs)
        return rows
