"""What runs in a worker process: the environments of one, and the loop of any, which gives back what it is asked for.

It ends with its parent, however that ends; signals to the whole process group are the parent's to handle. Not here: the parent's
side (vla_rl.simulation.worker_processes), the environments (vla_rl.simulation.libero_env). No torch.

M places of a worker, K images, S side of the model's image.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import os
import pickle
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict

from vla_rl.simulation.building import PHASES, doing, rows_of
from vla_rl.simulation.libero_env import LiberoEnv, Simulators
from vla_rl.types import Episode, ImageTransform, SimulationUnstable

STACK_SIGNAL = signal.SIGUSR2
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LENGTH = struct.Struct("!Q")  # of the pickle that follows it in a pipe


@dataclasses.dataclass(frozen=True)
class Shown:
    """What of a LiberoEnv's observation a worker passes on, done there and once an image.

    Args:
        image_transform: gives the policy's images in place of the rendered ones.
    """

    image_transform: ImageTransform | None = None

    def space(self, space: Dict) -> Dict:
        """Of LiberoEnv's observation space: the arrays, without the instruction, which is a text."""
        rendered, size = space["images"], getattr(self.image_transform, "size", None)
        shown = {"images": rendered, "proprio": space["proprio"]}
        if self.image_transform is not None:
            shown["images"] = Box(0, 255, (rendered.shape[0], size, size, 3), np.uint8)
        return Dict(shown)

    def __call__(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        shown = {"images": obs["images"], "proprio": obs["proprio"]}
        if self.image_transform is not None:
            shown["images"] = np.stack([self.image_transform(image) for image in obs["images"]])
        return shown


class Worker:
    """The environments of one process, which are asked together.

    Observations are not given back but left in arrays [M, ...] that the parent has, too.
    """

    def __init__(
        self,
        env_kwargs: dict[str, Any],
        indices: list[int],
        simulators: Simulators,
        shown: Shown = Shown(),
        observations: Mapping[str, np.ndarray] | None = None,
    ):
        self.envs = {i: LiberoEnv(**env_kwargs, index=i, simulators=simulators) for i in indices}
        self.simulators, self.shown, self.env_kwargs = simulators, shown, env_kwargs
        if observations is None:
            arrays = shown.space(LiberoEnv(**env_kwargs).observation_space)
            observations = {k: np.zeros((len(indices), *space.shape), space.dtype) for k, space in arrays.items()}
        self.observations = observations

    def reset(self, starts: Mapping[int, dict[str, Any]]) -> dict[int, tuple[str, dict[str, Any]]]:
        """starts: environment -> arguments of LiberoEnv.reset, or {"state": of LiberoEnv.restore_episode}.

        Returns:
            environment -> its instruction and the episode that it plays, as a dict.
        """
        begun = {}
        for place, (i, env) in enumerate(self.envs.items()):
            if i in starts:
                start = starts[i]
                obs = env.restore_episode(start["state"]) if "state" in start else env.reset(**start)[0]
                begun[i] = obs["instruction"], env.episode_state()["episode"]
                self.keep(place, obs)
        return begun

    def step(self, actions: Mapping[int, np.ndarray], following: Mapping[int, Episode]) -> dict[int, Stepped]:
        """actions: environment -> [C, 7]; following: what it begins if its episode ends in this step."""
        return {
            i: self.step_one(place, env, actions[i], following.get(i))
            for place, (i, env) in enumerate(self.envs.items())
            if i in actions
        }

    def step_one(self, place: int, env: LiberoEnv, actions: np.ndarray, following: Episode | None) -> Stepped:
        try:
            obs, reward, terminated, truncated, info = env.step(actions)
        except SimulationUnstable as error:
            return Stepped(unstable=str(error))
        stepped = Stepped(reward, terminated, truncated, info["steps"], info["success"])
        if following is not None and (terminated or truncated):
            reached = self.shown(obs) if truncated else None
            obs, _ = env.reset(options={"episode": following})
            stepped = dataclasses.replace(stepped, begun=obs["instruction"], reached=reached)
        self.keep(place, obs)
        return stepped

    def keep(self, place: int, obs: dict[str, Any]) -> None:
        for name, array in self.shown(obs).items():
            self.observations[name][place] = array

    def replay(self, episode: Episode, actions: np.ndarray) -> tuple[np.ndarray, bool, str]:
        """As LiberoEnv.replay, in an environment of its own: the others stay where they are."""
        return LiberoEnv(**self.env_kwargs, index=-1, simulators=self.simulators).replay(episode, actions)

    def renderer_name(self) -> str | None:
        """See vla_rl.simulation.rendering.Renderer.name; None before the first episode."""
        renderers = (shared.simulator.renderer for shared in self.simulators.kept.values())
        return next((renderer.name() for renderer in renderers if renderer is not None), None)

    def close(self) -> None:
        self.simulators.close()


@dataclasses.dataclass(frozen=True)
class Stepped:
    """What a step of one environment has led to, but for the observation."""

    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    steps: int = 0
    success: bool = False
    begun: str | None = None  # the instruction of the next episode, where that has begun
    reached: dict[str, np.ndarray] | None = None  # what a truncated one ended in, where the next has begun
    unstable: str | None = None  # why the episode cannot go on: its simulator has blown up


@dataclasses.dataclass(frozen=True)
class MakeWorker:
    """Builds the worker `index` of a vector."""

    index: int
    indices: list[int]
    env_kwargs: dict[str, Any]
    simulators_per_worker: int
    cache_gb: float
    shown: Shown
    told: str | None
    layout: dict[str, tuple[tuple[int, ...], str]]  # of the arrays of all workers: shape [W, M, ...], dtype

    def __call__(self, *memory: Any) -> Worker:
        simulators = Simulators(self.simulators_per_worker, self.cache_gb, self.told)
        views = views_of(memory, self.layout) if memory else {}
        own = {name: view[self.index] for name, view in views.items()}
        return Worker(self.env_kwargs, self.indices, simulators, self.shown, own or None)


def views_of(memory: tuple, layout: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray]:
    """memory: RawArrays of bytes, in the order of the layout."""
    arrays = zip(memory, layout.items(), strict=True)
    return {name: np.frombuffer(raw, dtype).reshape(shape) for raw, (name, (shape, dtype)) in arrays}


# ------------------------------------------------------------------------------------------------------- any worker process


@dataclasses.dataclass(frozen=True)
class WorkerError:
    """What a worker tells of an error; holds nothing but texts and bytes, so it always arrives.

    Not every exception can be pickled, and not every one that can be is built again from that; to unpickle one imports its
    module, here perhaps robosuite with numba and OpenGL.
    """

    pickled: bytes | None  # None where the exception would not come out as it went in
    module: str  # of its class
    kind: str  # the class's name
    message: str
    trace: str  # the traceback, as Python prints it

    @classmethod
    def of(cls, error: BaseException) -> WorkerError:
        kind = type(error)
        try:
            message = str(error)
        except Exception:  # of a __str__ of anybody's
            message = "(its message cannot be read)"
        try:
            pickled = pickle.dumps(error)
            copy = pickle.loads(pickled)  # our own bytes
            if type(copy) is not kind or str(copy) != message:
                pickled = None
        except Exception:  # of anybody's __reduce__ or __init__
            pickled = None
        trace = "".join(traceback.format_exception(error))
        return cls(pickled, kind.__module__, kind.__qualname__, message, trace)

    def exception(self, worker: str) -> BaseException:
        """The exception, with the worker's traceback as a note; a RuntimeError that names it where this process lacks it.

        Args:
            worker: which one, for the note.
        """
        error = RuntimeError(f"{self.kind}: {self.message}")
        if self.pickled is not None and self.module in sys.modules:
            try:
                error = pickle.loads(self.pickled)  # of our own worker
            except Exception as broken:
                error.add_note(f"it could not be built again: {type(broken).__name__}: {broken}")
        error.add_note(f"In {worker}:\n{self.trace}")
        return error


def run_worker(
    make: Callable[..., Any], memory: tuple, pipe: Connection, stacks: Connection, rows: Any, index: int, parent: int
) -> None:
    """A worker process: calls the methods of `make.fn(*memory)` that it is told to.

    Args:
        stacks: where its stack goes when it crashes, or hangs and is asked.
        rows: of all workers' `doing`.
    """
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
    faulthandler.enable(stacks.fileno())
    faulthandler.register(STACK_SIGNAL, stacks.fileno())
    doing.row = rows_of(rows)[index]
    try:
        worker = make.fn(*memory)
    except Exception as error:
        with contextlib.suppress(ConnectionError):
            write(pipe, pickle.dumps((False, WorkerError.of(error))))
        return
    doing.change(PHASES.index("wait"), -1)
    try:
        while (told := read(pipe)) is not None:
            name, arguments = told
            if name is None:
                break
            try:
                answer = pickle.dumps((True, getattr(worker, name)(*arguments)))
                doing.change(PHASES.index("wait"), -1)
                failed = False
            except Exception as error:
                answer, failed = pickle.dumps((False, WorkerError.of(error))), True
            write(pipe, answer)
            if failed:
                break
    except ConnectionError:
        pass  # the parent is gone: it has no use for an answer, and nobody for a stack
    finally:
        if hasattr(worker, "close"):
            worker.close()


def end_with_parent(parent: int) -> None:
    """From now on the kernel kills this process when the one that has started it, or its thread that did so, has ended."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux: the end of the pipe tells it, if it is read
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def write(pipe: Connection, data: bytes) -> None:
    for part in (LENGTH.pack(len(data)), data):
        left = memoryview(part)
        while left:
            left = left[os.write(pipe.fileno(), left) :]


def read(pipe: Connection) -> Any:
    """The next message; None where the other end is closed."""
    parts: list[bytes] = []
    for wanted in (lambda: LENGTH.size, lambda: LENGTH.unpack(parts[0])[0]):
        part = bytearray()
        while len(part) < wanted():
            data = os.read(pipe.fileno(), wanted() - len(part))
            if not data:
                return None
            part += data
        parts.append(bytes(part))
    return pickle.loads(parts[1])  # of our own parent
