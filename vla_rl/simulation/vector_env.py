"""A vector of LiberoEnvs in worker processes, several in each.

A worker steps its environments one after the other, so more workers than CPU cores only cost memory. Environments of one
task share a simulator: 0.6 GB for all of them.

A worker that dies, hangs or raises is replaced (vla_rl.simulation.worker_processes). A reset is then done again; the episodes
that its other environments played are lost, and `dropped` until they are reset.

N environments, W workers, M = ceil(N / W) places in each (the last may be empty), C steps in a chunk, K images, S side of
the model's image.
A worker has neighbours of vla_rl.types.place_in_round, which play the same or neighbouring tasks.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
from gymnasium.spaces import Dict
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from vla_rl.run.machine import available_memory, cores
from vla_rl.run.settings import Config
from vla_rl.simulation.building import BuildingBar
from vla_rl.simulation.held_tasks import HeldTasks
from vla_rl.simulation.libero_env import LiberoEnv, as_dict, check_actions
from vla_rl.simulation.worker import MakeWorker, Shown, Stepped, views_of
from vla_rl.simulation.worker_processes import Fault, Patience, WorkerProcesses
from vla_rl.types import ACTION_DIM, Episode, ImageTransform, SimulationUnstable, place_in_round

log = logging.getLogger(__name__)

WORKER_GB = 0.4  # resident, of a worker without a simulator (docs/performance.md)
SIMULATOR_GB = 0.6  # of each simulator in it
KILLED_HINT = (
    f"often out of memory: about {WORKER_GB} GB each and {SIMULATOR_GB} GB for each task in it; lower env.num_workers or "
    "env.simulators_per_worker"
)


class LiberoVectorEnv(VectorEnv):
    """N LiberoEnvs behind one step.

    The caller resets environments that have ended: `reset(options={"reset_mask": bool [N], "episodes": {i: Episode}})`, or
    names their next episodes with the step, whose workers then begin them where one ends, without another round.

    Observations are LiberoEnv's, stacked. With an image_transform, images are uint8 [N, K, S, S, 3], and the dict also has
    "image_transform" (not in the space), by which a policy knows them.

    Args:
        env_kwargs: of each LiberoEnv.
        num_workers: W, processes.
        simulators_per_worker: tasks that a worker keeps in memory; None: as many as it has environments.
        cache_gb: see vla_rl.simulation.libero_env.Simulators.
        image_transform: see Shown.
        progress: a bar while simulators are built.
        patience: how long a worker may take, and how often it is replaced.

    Attributes:
        held: which worker has which task's simulator.
        dropped: bool [N], whose episode was lost, by a worker that was replaced or a simulation that blew up, and that are not
            reset yet; what is shown of them says nothing.
        on_wait: called every half second while workers reset, step or replay; may raise, and then the vector can only be closed.
    """

    def __init__(
        self,
        env_kwargs: dict[str, Any],
        num_envs: int,
        num_workers: int,
        simulators_per_worker: int | None = None,
        cache_gb: float = 0,
        image_transform: ImageTransform | None = None,
        progress: bool = False,
        patience: Patience | None = None,
    ):
        self.shown = Shown(image_transform)
        self.num_envs, self.num_workers = num_envs, min(num_workers, num_envs)
        single = LiberoEnv(**env_kwargs)
        self.metadata = single.metadata | {"autoreset_mode": AutoresetMode.DISABLED}
        arrays, text = self.shown.space(single.observation_space), single.observation_space["instruction"]
        self.single_observation_space = Dict({**arrays.spaces, "instruction": text})
        self.single_action_space = single.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(single.action_space, num_envs)
        self.task_suite = env_kwargs["task_suite"]
        places = -(-num_envs // self.num_workers)  # M
        in_round = sorted(range(num_envs), key=lambda index: place_in_round(index, num_envs))
        parts = [part.tolist() for part in np.array_split(in_round, self.num_workers)]
        self._worker, self._place = np.zeros((2, num_envs), np.int64)
        for worker, part in enumerate(parts):
            self._worker[part], self._place[part] = worker, range(len(part))
        self.simulators_per_worker = simulators_per_worker or places
        self.held = HeldTasks(self._worker.tolist(), self.simulators_per_worker)
        self._building = BuildingBar(progress)
        layout = {
            name: ((self.num_workers, places, *space.shape), space.dtype.str) for name, space in arrays.spaces.items()
        }
        # without locks, whose semaphores outlive a process that is killed
        memory = tuple(
            RawArray(ctypes.c_ubyte, math.prod(shape) * np.dtype(kind).itemsize) for shape, kind in layout.values()
        )
        self._arrays = views_of(memory, layout)  # [W, M, ...], what the workers' environments show
        self._instructions = [""] * num_envs
        # of each environment the episode that it plays and the actions executed in it; None: it has ended, or none was begun
        self._episodes: list[dict[str, Any] | None] = [None] * num_envs
        self._actions: list[list[np.ndarray]] = [[] for _ in range(num_envs)]
        self._playing, self.dropped = np.zeros((2, num_envs), dtype=bool)
        self._coming: dict[int, Episode] = {}
        self._stepping: dict[int, np.ndarray] = {}
        self.on_wait: Callable[[], None] = lambda: None
        make = (env_kwargs, self.simulators_per_worker, cache_gb, self.shown, self._building.path, layout)
        self.workers = WorkerProcesses(
            [MakeWorker(number, part, *make) for number, part in enumerate(parts)],
            patience,
            memory,
            describe=self._describe,
            hint=KILLED_HINT,
            # 6 to 10 % faster where each core has a worker; exact images, which have four times the samples, are not
            draw_in_one_thread=single.render_quality == "fast" and self.num_workers >= len(os.sched_getaffinity(0)),
        )

    @property
    def processes(self) -> list:
        return self.workers.processes

    def reset(self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """As LiberoEnv.reset for the environments of the mask, all without one.

        Args:
            seed: of environment 0; environment i takes seed + i. Or N seeds.
            options: "reset_mask": bool [N]; "episodes": {i: Episode}, of each environment that is reset.
        """
        options = dict(options or {})
        mask = options.pop("reset_mask", np.ones(self.num_envs, dtype=bool))
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        starts = {int(i): {"seed": seeds[i] if seeds else None, "options": options} for i in np.flatnonzero(mask)}
        self._start(starts, {i: as_dict(options["episodes"][i]) for i in starts if i in options.get("episodes", {})})
        return self._observe(), {}

    def step(self, actions: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """As LiberoEnv.step, float32 [N, C, 7]; infos: "steps", "success" and "begun" [N]."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(
        self,
        actions: np.ndarray,
        active: np.ndarray | None = None,
        episodes: Mapping[int, Episode] | None = None,
    ) -> None:
        """Starts a step that `step_wait` waits for.

        Args:
            active: bool [N], the environments that take it; the others stay as they are, with reward 0 and 0 steps.
            episodes: environment -> what it begins in this same step if its episode ends in it.
        """
        actions = check_actions(actions, self.action_space.shape)  # here, since an error in a worker costs its episodes
        active = np.ones(self.num_envs, dtype=bool) if active is None else active
        self._coming = dict(episodes or {})
        self._stepping = {int(i): actions[i] for i in np.flatnonzero(active)}
        for worker, indices in self._by_worker(self._stepping).items():
            coming = {i: self._coming[i] for i in indices if i in self._coming}
            self.workers.ask(worker, "step", {i: actions[i] for i in indices}, coming)

    def step_wait(self) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """What `step_async` has led to, as LiberoEnv.step, but that an environment that began its next episode shows it, and that
        one which is `dropped` has done nothing.

        Returns:
            observation, rewards, terminated, truncated and infos: "steps", "success", "begun" (bool [N], another episode) and,
            if truncated episodes have made room for others, "truncated_obs": the observation with what those episodes ended in.
        """
        answers = self._wait()
        rewards, steps = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        terminated, truncated, success, begun = np.zeros((4, self.num_envs), dtype=bool)
        texts_before, reached = tuple(self._instructions), {}
        for i, stepped in sorted(pair for worker in answers for pair in answers[worker].items()):
            if stepped.unstable is not None:
                self._drop_unstable(i, stepped.unstable)
                continue
            rewards[i], terminated[i], truncated[i] = stepped.reward, stepped.terminated, stepped.truncated
            steps[i], success[i], begun[i] = stepped.steps, stepped.success, stepped.begun is not None
            self._note_step(i, stepped)
            if stepped.reached is not None:
                reached[i] = stepped.reached
        self._stepping, self._coming = {}, {}
        infos = {"steps": steps, "success": success, "begun": begun}
        obs = self._observe()
        if reached:
            infos["truncated_obs"] = {k: np.array(v) if k in self._arrays else v for k, v in obs.items()}
            infos["truncated_obs"]["instruction"] = texts_before
        for i, arrays in reached.items():
            for name, array in arrays.items():
                infos["truncated_obs"][name][i] = array
        return obs, rewards, terminated, truncated, infos

    def episode_states(self) -> list[dict[str, Any] | None]:
        """What `restore_episodes` needs: each environment's episode and the actions executed in it. No worker is asked."""
        return [
            None
            if episode is None
            else {
                "episode": dict(episode),
                "actions": np.concatenate([np.zeros((0, ACTION_DIM), np.float32), *self._actions[i]]),
            }
            for i, episode in enumerate(self._episodes)
        ]

    def restore_episodes(self, states: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
        """Brings each environment bit for bit to its state, and returns the observations there, as `reset` does."""
        if len(states) != self.num_envs:
            raise ValueError(f"{len(states)} episode states for {self.num_envs} environments")
        starts = {i: {"state": state} for i, state in enumerate(states) if state is not None}
        self._start(starts, {i: as_dict(start["state"]["episode"]) for i, start in starts.items()})
        for i, start in starts.items():
            self._actions[i] = [start["state"]["actions"]]
        return self._observe()

    def replay(self, recordings: Sequence[tuple[Episode, np.ndarray]]) -> Iterator[tuple[np.ndarray, bool, str]]:
        """LiberoEnv.replay of each recording (an episode, and its actions float [steps, 7]), in their order; every worker plays
        one at a time, if it can be of a task that it has. The environments stay where they are."""
        for first in range(0, len(recordings), self.num_workers):
            part = recordings[first : first + self.num_workers]
            workers = self.held.workers_for([episode.task_id for episode, _ in part])
            given, played = dict(zip(workers, part, strict=True)), {}
            while len(played) < len(given):  # again in another process where one was replaced
                for worker in given.keys() - played.keys():
                    self.workers.ask(worker, "replay", *given[worker])
                played |= self._wait()
                for worker in played:
                    self.workers.episode_ended(worker)
            yield from (played[worker] for worker in workers)

    def renderer_name(self) -> str | None:
        """Which OpenGL draws the images; None before the first episode."""
        for worker in range(self.num_workers):
            self.workers.ask(worker, "renderer_name")
        return next(filter(None, self._wait().values()), None)

    def replace_dead(self) -> None:
        """Another process for each that has ended while nothing was asked of it."""
        for fault in self.workers.replace_dead():
            self._lose(fault)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        self.workers.close()
        self._building.close()  # the file; a second time does nothing

    # -------------------------------------------------------------------------------------------------------- episodes

    def _start(self, starts: Mapping[int, dict[str, Any]], episodes: Mapping[int, dict[str, Any]]) -> None:
        """Resets environments, again in another process where one was replaced.

        Args:
            starts: see Worker.reset.
            episodes: of each environment, where they are known.
        """
        waiting = dict(starts)
        for i in waiting:  # what they have played is over, whatever comes
            self._episodes[i], self._actions[i] = episodes.get(i), []
            self._playing[i] = self.dropped[i] = False
        while waiting:
            for i in waiting.keys() & episodes.keys():
                self.held.use(i, episodes[i]["task_id"])
            for worker, indices in self._by_worker(waiting).items():
                self.workers.ask(worker, "reset", {i: starts[i] for i in indices})
            for begun in self._wait().values():
                for i, (instruction, episode) in begun.items():
                    self._instructions[i], self._episodes[i], self._playing[i] = instruction, episode, True
                    del waiting[i]

    def _note_step(self, i: int, stepped: Stepped) -> None:
        if stepped.begun is None:
            self._actions[i].append(self._stepping[i][: stepped.steps])
        else:
            episode = as_dict(self._coming[i])
            self._instructions[i], self._episodes[i], self._actions[i] = stepped.begun, episode, []
            self.held.use(i, episode["task_id"])
        if stepped.terminated or stepped.truncated:
            self._playing[i] = stepped.begun is not None
            self.workers.episode_ended(self._worker[i])

    def _drop(self, i: int) -> None:
        self.dropped[i], self._playing[i], self._episodes[i] = True, False, None

    def _lose(self, fault: Fault) -> None:
        """What a process that was replaced has had."""
        self.held.forget(fault.worker)
        for i in map(int, np.flatnonzero((self._worker == fault.worker) & self._playing)):
            self._drop(i)

    def _drop_unstable(self, i: int, why: str) -> None:
        text = f"{why}, in {self._describe(Fault(self._worker[i], 'step', i))}; that episode is dropped"
        self._drop(i)
        log.warning("%s", text)
        self.workers.count_fault(self._worker[i], SimulationUnstable(f"{text}, as all since one has ended there"))

    def _describe(self, fault: Fault) -> str:
        """ "render of libero_spatial task 3, initial state 7, environment 2"."""
        if not 0 <= fault.who < self.num_envs:
            return {"start": "its start", "wait": "no task"}.get(fault.phase, fault.phase)
        coming = self._coming.get(fault.who)
        begins = fault.who in self._stepping and coming is not None and fault.phase in ("reset", "build")
        episode = as_dict(coming) if begins else self._episodes[fault.who]
        if episode is None:
            return f"{fault.phase} of environment {fault.who}"
        state, seed = episode["initial_state"], episode["seed"]
        start = f"placements of seed {seed}" if state is None else f"initial state {state}"
        return f"{fault.phase} of {self.task_suite} task {episode['task_id']}, {start}, environment {fault.who}"

    # --------------------------------------------------------------------------------------------------------- workers

    def _wait(self) -> dict[int, Any]:
        """Answers of the workers that were asked; those that were replaced have given none, and lose their episodes."""

        def meanwhile() -> None:
            self._building.update()
            self.on_wait()

        self.workers.on_wait = meanwhile
        answers = self.workers.wait()
        self._building.finish()
        for worker in [worker for worker, answer in answers.items() if isinstance(answer, Fault)]:
            self._lose(answers.pop(worker))
        return answers

    def _by_worker(self, indices: Mapping[int, Any]) -> dict[int, list[int]]:
        of: dict[int, list[int]] = {}
        for i in indices:
            of.setdefault(int(self._worker[i]), []).append(i)
        return of

    def _observe(self) -> dict[str, Any]:
        """A copy of what all environments show, [N, ...], with instructions and the image transform."""
        obs: dict[str, Any] = {name: array[self._worker, self._place] for name, array in self._arrays.items()}
        obs["instruction"] = tuple(self._instructions)
        mark = self.shown.image_transform
        return obs if mark is None else obs | {"image_transform": mark}


def make_vector_env(
    config: Config,
    num_envs: int,
    *,
    evaluation: bool = False,
    overlap: bool = False,
    image_transform: ImageTransform | None = None,
) -> LiberoVectorEnv:
    """The configured suite in `num_envs` environments.

    Args:
        evaluation: images and length of an episode are eval's, not env's; the physics is exact.
        overlap: halves of the environments will step in turns; each should fill the workers.
        image_transform: the policy's (`policy.processor.image_transform`), done in the workers; None: images as rendered.
    """
    env = config.env
    kwargs = {
        "task_suite": env.task_suite,
        "task_ids": tuple(env.task_ids),
        "chunk_size": config.policy.chunk_size,
        "num_images": config.policy.num_images,
        "image_size": env.image_size,
        "render": (config.eval if evaluation else env).render,
        "physics": "exact" if evaluation else env.physics,
        "max_steps": config.max_episode_steps(evaluation),
        "settle_steps": env.settle_steps,
        "reward": env.reward,
        "gamma": config.algorithm.gamma,
        "bootstrap_truncated": config.algorithm.bootstrap_truncated,
    }
    num_workers = worker_count(config, num_envs, overlap)
    kept = simulators_kept(config, num_envs, num_workers, available_memory(), evaluation)
    patience = Patience(env.step_timeout_s, env.build_timeout_s, env.worker_replacements)
    options = (kept, env.model_cache_gb, image_transform, config.logging.progress, patience)
    return LiberoVectorEnv(kwargs, num_envs, num_workers, *options)


def worker_count(config: Config, num_envs: int, overlap: bool = False) -> int:
    """Processes of so many environments: as many as were asked for, or one a CPU core that has something to do."""
    asked = config.env.num_workers or min(cores(), -(-num_envs // (2 if overlap else 1)))
    return min(asked, num_envs)


def simulators_kept(config: Config, num_envs: int, num_workers: int, memory: int, evaluation: bool = False) -> int:
    """Tasks that each worker keeps: as many as were asked for, or all where a third of the memory has room for them (training and
    evaluation have a vector each, and the trainer grows), else what has room, but no fewer than its environments can play at once: a simulator built
    anew at each turn is worse. An evaluation plays one task after another, so it keeps no more than those.

    Args:
        memory: bytes that are available.
    """
    room = (memory / 3e9 / num_workers - WORKER_GB) / SIMULATOR_GB
    at_once = -(-num_envs // num_workers)
    asked = config.env.simulators_per_worker or (at_once if evaluation else max(at_once, int(room)))
    return min(len(config.env.task_ids), asked)
