"""A vector of LiberoEnvs in worker processes, several in each.

A worker steps its environments one after the other, so more workers than CPU cores only cost memory. Environments of one
task share a simulator: 0.6 GB for all of them. gymnasium's AsyncVectorEnv has the processes, pipes and shared memory;
what is an environment to it is a worker here.

N environments, W workers, M = ceil(N / W) places in each (the last may be empty), C steps in a chunk, K images, S side of
the model's image.
A worker has neighbours of vla_rl.types.place_in_round, which play the same or neighbouring tasks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import signal
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
from gymnasium.spaces import Dict
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.vector.async_vector_env import AsyncState, _async_worker
from gymnasium.vector.utils import batch_space

from vla_rl.run.machine import available_memory, cores
from vla_rl.run.settings import Config
from vla_rl.simulation.building import BuildingBar
from vla_rl.simulation.held_tasks import HeldTasks
from vla_rl.simulation.libero_env import LiberoEnv, as_dict, check_actions
from vla_rl.simulation.worker import EPISODE_ROW, MakeWorker, Shown, episode_row
from vla_rl.simulation.worker_errors import WorkerError
from vla_rl.types import Episode, ImageTransform, SimulatorDied, place_in_round

WORKER_GB = 0.4  # resident, of a worker without a simulator (docs/performance.md)
SIMULATOR_GB = 0.6  # of each simulator in it
TELL_TIMEOUT_S = 30  # for the error of a worker that has said that there is one


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

    Attributes:
        held: which worker has which task's simulator.
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
        self.places = -(-num_envs // self.num_workers)  # M
        self._instructions = [""] * num_envs
        in_round = sorted(range(num_envs), key=lambda index: place_in_round(index, num_envs))
        parts = [part.tolist() for part in np.array_split(in_round, self.num_workers)]
        self._worker, self._place = np.zeros((2, num_envs), np.int64)
        for worker, part in enumerate(parts):
            self._worker[part], self._place[part] = worker, range(len(part))
        self.simulators_per_worker = simulators_per_worker or self.places
        self.held = HeldTasks(self._worker.tolist(), self.simulators_per_worker)
        self._building = BuildingBar(progress)
        self.workers = WorkerProcesses(
            [
                MakeWorker(
                    *(env_kwargs, part, self.places, self.simulators_per_worker, cache_gb, self.shown),
                    *(self._building.path, os.getpid()),
                )
                for part in parts
            ],
            self._building,
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
        self._use({i: options["episodes"][i] for i in starts if i in options.get("episodes", {})})
        obs, infos = self.workers.reset(options={"starts": starts})
        self._update_instructions(infos)
        return self._in_order(obs), {}

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
        actions = check_actions(actions, self.action_space.shape)  # here, since an error in a worker ends the workers
        active = np.ones(self.num_envs, dtype=bool) if active is None else active
        following = np.zeros((self.num_envs, len(EPISODE_ROW)), np.int64)
        self._following = episodes or {}
        for i, episode in self._following.items():
            following[i] = episode_row(episode)
        step = {"actions": actions, "active": active, "episodes": following}
        self.workers.step_async({name: self._by_worker(array) for name, array in step.items()})

    def step_wait(self) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """What `step_async` has led to, as LiberoEnv.step, but that an environment that began its next episode shows it.

        Returns:
            observation, rewards, terminated, truncated and infos: "steps", "success", "begun" (bool [N], another episode) and,
            if truncated episodes have made room for others, "truncated_obs": the observation with what those episodes ended in.
        """
        obs, rewards, terminated, truncated, worker_infos = self.workers.step_wait()
        infos = {name: self._in_order(worker_infos[name]) for name in ("steps", "success", "begun")}
        self._use({i: self._following[i] for i in np.flatnonzero(infos["begun"])})
        before = {"instruction": tuple(self._instructions)}
        self._update_instructions(worker_infos)
        ended = [pair for pairs in worker_infos["truncated"] for pair in pairs]
        if ended:
            infos["truncated_obs"] = self._in_order(obs) | before
        for i, arrays in ended:
            for name, array in arrays.items():
                infos["truncated_obs"][name][i] = array
        return self._in_order(obs), *map(self._in_order, (rewards, terminated, truncated)), infos

    def episode_states(self) -> list[dict[str, Any] | None]:
        """What `restore_episodes` needs: each environment's episode and the actions executed in it."""
        states = {i: state for part in self.workers.call("episode_states") for i, state in part.items()}
        return [states[i] for i in range(self.num_envs)]

    def restore_episodes(self, states: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
        """Brings each environment bit for bit to its state, and returns the observations there, as `reset` does."""
        if len(states) != self.num_envs:
            raise ValueError(f"{len(states)} episode states for {self.num_envs} environments")
        starts = {i: {"state": state} for i, state in enumerate(states) if state is not None}
        self._use({i: start["state"]["episode"] for i, start in starts.items()})
        obs, infos = self.workers.reset(options={"starts": starts})
        self._update_instructions(infos)
        return self._in_order(obs)

    def replay(self, recordings: Sequence[tuple[Episode, np.ndarray]]) -> Iterator[tuple[np.ndarray, bool, str]]:
        """LiberoEnv.replay of each recording (an episode, and its actions float [steps, 7]), in their order; every worker plays
        one at a time, if it can be of a task that it has. The environments stay where they are."""
        for first in range(0, len(recordings), self.num_workers):
            part = recordings[first : first + self.num_workers]
            workers = self.held.workers_for([episode.task_id for episode, _ in part])
            given = dict(zip(workers, part, strict=True))
            self.workers.set_attr("recording", [given.get(worker) for worker in range(self.num_workers)])
            played = self.workers.call("replay")
            yield from (played[worker] for worker in workers)

    def renderer_name(self) -> str | None:
        """Which OpenGL draws the images; None before the first episode."""
        return next(filter(None, self.workers.call("renderer_name")), None)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        self.workers.close(timeout=timeout, terminate=terminate)
        self._building.close()  # the file; a second time does nothing

    def _use(self, episodes: Mapping[int, Episode | Mapping[str, Any]]) -> None:
        for i, episode in episodes.items():
            self.held.use(i, as_dict(episode)["task_id"])

    def _update_instructions(self, infos: dict[str, Any]) -> None:
        for texts in infos["instructions"]:
            for i, text in texts:
                self._instructions[i] = text

    def _in_order(self, value: Any) -> Any:
        """[W, M, ...] of the workers -> a copy [N, ...]; observations get their instructions and the transform."""
        if isinstance(value, dict):
            obs = {name: self._in_order(array) for name, array in value.items()}
            obs["instruction"] = tuple(self._instructions)
            mark = self.shown.image_transform
            return obs if mark is None else obs | {"image_transform": mark}
        return value[self._worker, self._place]

    def _by_worker(self, value: np.ndarray) -> np.ndarray:
        """[N, ...] -> [W, M, ...], zeros in empty places."""
        padded = np.zeros((self.num_workers, self.places, *value.shape[1:]), value.dtype)
        padded[self._worker, self._place] = value
        return padded


class WorkerProcesses(AsyncVectorEnv):
    """Workers; one that dies is named in the error, and one that fails ends all of them with its own error."""

    told: BaseException | None = None  # a worker's own error

    def __init__(self, env_fns: Sequence[MakeWorker], building: BuildingBar, draw_in_one_thread: bool):
        self.building = building
        with lean_workers(draw_in_one_thread):
            super().__init__(
                env_fns,
                shared_memory=True,
                copy=False,  # LiberoVectorEnv makes the copy
                worker=run_worker,
                context="spawn",  # never fork: the parent has threads, CUDA and perhaps a GL context
                daemon=True,
                autoreset_mode=AutoresetMode.DISABLED,
            )

    def reset_async(self, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None) -> None:
        with self._naming_dead_workers():
            super().reset_async(seed, options)

    def reset_wait(self, timeout: float | None = None) -> tuple[dict, dict]:
        with self._naming_dead_workers():
            self._show_building()
            return super().reset_wait(timeout)

    def step_async(self, actions: dict[str, np.ndarray]) -> None:
        with self._naming_dead_workers():
            super().step_async(actions)

    def step_wait(self, timeout: float | None = None) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        with self._naming_dead_workers():
            self._show_building()
            return super().step_wait(timeout)

    def set_attr(self, name: str, values: Any) -> None:
        with self._naming_dead_workers():
            super().set_attr(name, values)

    def call_async(self, name: str, /, *args: Any, **kwargs: Any) -> None:
        with self._naming_dead_workers():
            super().call_async(name, *args, **kwargs)

    def call_wait(self, timeout: float | None = None) -> tuple[Any, ...]:
        with self._naming_dead_workers():
            return super().call_wait(timeout)

    def _show_building(self) -> None:
        """Until all workers have answered, or have died, which their pipes tell too."""
        pipes = list(self.parent_pipes)
        while pipes:
            for pipe in wait(pipes, timeout=0.5):
                pipes.remove(pipe)
            self.building.update()
        self.building.finish()

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Ends the workers. One that has died already is no error (a signal to the whole process group), and an answer
        that was not waited for (Ctrl-C in the middle of a step) is not waited for now: it may have been read in part."""
        if self._state != AsyncState.DEFAULT:
            self._state, terminate = AsyncState.DEFAULT, True
        try:
            super().close_extras(timeout, terminate)
        except (EOFError, ConnectionError):
            super().close_extras(timeout, terminate=True)

    def _check_spaces(self) -> None:
        with self._naming_dead_workers():
            super()._check_spaces()

    def _raise_if_errors(self, successes: Sequence[bool]) -> None:
        """gymnasium's would put the traceback through % and the message through the class's constructor."""
        if all(successes):
            return
        try:
            told = dict(self.error_queue.get(timeout=TELL_TIMEOUT_S) for success in successes if not success)
        except queue.Empty:
            told = {}
        self._state = AsyncState.DEFAULT
        self.close(terminate=True)
        if not told:
            raise SimulatorDied("a simulator worker failed and did not say why; its own message is above")
        first, *others = sorted(told)
        self.told = told[first].exception(f"simulator worker {first}")
        for i in others:
            self.told.add_note(f"In simulator worker {i}, too:\n{told[i].trace}")
        raise self.told

    @contextlib.contextmanager
    def _naming_dead_workers(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:  # the pipe's other end is gone
            if error is self.told:
                raise
            for process in self.processes:
                process.join(0.2)
            dead = {i: process.exitcode for i, process in enumerate(self.processes) if process.exitcode is not None}
            self._state = AsyncState.DEFAULT
            self.close(terminate=True)
            raise SimulatorDied(describe_death(dead)) from error


def run_worker(
    index: int, env_fn: Callable, pipe: Connection, parent_pipe: Connection, memory: Any, errors: Queue, *rest: Any
) -> None:
    """gymnasium's worker process, whose errors arrive whatever they are, those of the construction too."""
    try:
        env = env_fn()
    except Exception as error:
        parent_pipe.close()
        errors.put((index, WorkerError.of(error)))
        with contextlib.suppress(EOFError, ConnectionError):
            pipe.recv()  # the first command
            pipe.send((None, False))
        return
    _async_worker(index, lambda: env, pipe, parent_pipe, memory, TellingQueue(errors), *rest)


@dataclasses.dataclass(frozen=True)
class TellingQueue:
    """Takes what gymnasium puts into its queue of errors; an exception that cannot be pickled would never arrive."""

    errors: Queue

    def put(self, item: tuple[int, type, BaseException, str]) -> None:
        index, _, error, _ = item
        self.errors.put((index, WorkerError.of(error)))


def describe_death(exitcodes: dict[int, int]) -> str:
    """exitcodes: worker -> exit code, negative for a signal."""
    workers = ", ".join(str(i) for i in exitcodes) or "(unknown)"
    causes = {signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in exitcodes.values()}
    if "SIGKILL" in causes or not causes:
        hint = (
            f"often out of memory: about {WORKER_GB} GB each and {SIMULATOR_GB} GB for each task in it; lower "
            "env.num_workers or env.simulators_per_worker"
        )
    else:
        hint = "its own message is above"
    return f"simulator worker {workers} died ({', '.join(sorted(causes))}; {hint})"


@contextlib.contextmanager
def lean_workers(draw_in_one_thread: bool) -> Iterator[None]:
    """Workers started inside use one thread a library, and import this module but not the caller's script.

    A spawned process imports the main script again, here one that imports torch: 0.4 GB and seconds a worker.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # read before any of our code runs
    if draw_in_one_thread and "LP_NUM_THREADS" not in os.environ:
        names += ("LP_NUM_THREADS",)
    before = {name: os.environ.get(name) for name in names}
    main = sys.modules["__main__"]
    os.environ.update({name: "0" if name == "LP_NUM_THREADS" else "1" for name in names})  # Mesa's 0: none of its own
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


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
        evaluation: images and length of an episode are eval's, not env's.
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
        "max_steps": config.max_episode_steps(evaluation),
        "settle_steps": env.settle_steps,
        "reward": env.reward,
        "gamma": config.algorithm.gamma,
        "bootstrap_truncated": config.algorithm.bootstrap_truncated,
    }
    num_workers = worker_count(config, num_envs, overlap)
    kept = simulators_kept(config, num_envs, num_workers, available_memory())
    options = (kept, env.model_cache_gb, image_transform, config.logging.progress)
    return LiberoVectorEnv(kwargs, num_envs, num_workers, *options)


def worker_count(config: Config, num_envs: int, overlap: bool = False) -> int:
    """Processes of so many environments: as many as were asked for, or one a CPU core that has something to do."""
    asked = config.env.num_workers or min(cores(), -(-num_envs // (2 if overlap else 1)))
    return min(asked, num_envs)


def simulators_kept(config: Config, num_envs: int, num_workers: int, memory: int) -> int:
    """Tasks that each worker keeps: as many as were asked for, or all where a third of the memory has room for them (training and
    evaluation have a vector each, and the trainer grows), else what has room, but no fewer than its environments can play at once: a simulator built
    anew at each turn is worse.

    Args:
        memory: bytes that are available.
    """
    room = (memory / 3e9 / num_workers - WORKER_GB) / SIMULATOR_GB
    asked = config.env.simulators_per_worker or max(-(-num_envs // num_workers), int(room))
    return min(len(config.env.task_ids), asked)
