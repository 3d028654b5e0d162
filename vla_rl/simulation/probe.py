"""A look at this machine's simulator from a process of its own: what draws, a frame, where a settled task's objects are.

A separate process because the one that trains has no OpenGL, and because a driver that crashes takes only this one along.

Not here: whether what is found is good (vla_rl.preflight.needs). No torch.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from vla_rl.run.settings import Config
from vla_rl.run.task_suites import num_fixed_states
from vla_rl.simulation.libero_env import CAMERAS, REST, build_simulator
from vla_rl.simulation.opengl import EglDevice, egl_devices
from vla_rl.simulation.suites import fixed_state
from vla_rl.simulation.worker import end_with_parent
from vla_rl.simulation.worker_processes import lean_workers
from vla_rl.types import SimulatorDied

FRAMES = 5  # timed; the median is told
SETTLED_STATES = 5  # of each task, spread over its fixed states
SETTLE_STEPS = 10  # as the benchmark's evaluations have
PROBED_TASKS = 10  # at most; each is compiled, seconds the first time


@dataclass(frozen=True)
class Rendered:
    """What draws, and what it has drawn."""

    backend: str  # MUJOCO_GL
    renderer: str  # GL_RENDERER
    frame: np.ndarray  # uint8 [H, W, 3]
    frame_s: float  # seconds a frame
    devices: tuple[EglDevice, ...] = ()  # that EGL shows, in its order; none with another back-end
    device: int = 0  # of them, the one that draws

    @property
    def in_software(self) -> bool:
        return is_software(self.renderer) or self.backend == "osmesa"


@dataclass(frozen=True)
class Settled:
    """How far the objects of a task's fixed state have moved while the arm rested."""

    task_id: int
    state: int
    moved: tuple[float, float, float]  # metres sideways, down and up, each of the object that moved furthest so


def is_software(renderer: str) -> bool:
    """Of a GL_RENDERER: Mesa's and others' rasterisers on the CPU."""
    return any(name in renderer.lower() for name in ("llvmpipe", "softpipe", "swrast", "software", "swiftshader"))


def render_first_task(config: Config) -> Rendered:
    """A frame of the first task's first fixed state, by the agent's camera as the training has it."""
    env, task_id = config.env, config.env.task_ids[0]
    fast, cache_gb = env.render == "fast", env.model_cache_gb
    cameras = CAMERAS[: config.policy.num_images]
    sim = build_simulator(env.task_suite, task_id, cameras, env.image_size, fast, cache_gb=cache_gb)
    try:
        sim.reset(0, fixed_state(env.task_suite, task_id, 0), render=True)
        seconds = []
        for _ in range(FRAMES):
            start = time.perf_counter()
            frame = sim.renderer.render(cameras[0])
            seconds.append(time.perf_counter() - start)
        backend = os.environ["MUJOCO_GL"]
        devices = tuple(egl_devices()) if backend == "egl" else ()
        index = int(os.environ.get("MUJOCO_EGL_DEVICE_ID") or 0)
        return Rendered(backend, sim.renderer.name(), frame, float(np.median(seconds)), devices, index)
    finally:
        sim.close()


def settle_tasks(config: Config) -> list[Settled]:
    """Of the run's tasks, at most PROBED_TASKS, after the settle steps of five fixed states each; nothing is drawn."""
    env, found = config.env, []
    for task_id in env.task_ids[:PROBED_TASKS]:
        sim = build_simulator(env.task_suite, task_id, (), env.image_size, fast=False, cache_gb=env.model_cache_gb)
        last = num_fixed_states(env.task_suite) - 1
        for state in [k * last // (SETTLED_STATES - 1) for k in range(SETTLED_STATES)]:  # 0, 12, 24, 36, 49
            sim.reset(0, fixed_state(env.task_suite, task_id, state), render=False)
            before = sim.object_positions()
            for _ in range(SETTLE_STEPS):
                sim.step(REST, render=False)
            found.append(movement(task_id, state, before, sim.object_positions()))
        sim.close()
    return found


def movement(task_id: int, state: int, before: np.ndarray, after: np.ndarray) -> Settled:
    """Args: before, after: [J, 3], metres, z up."""
    moved = after - before
    sideways = np.linalg.norm(moved[:, :2], axis=1)
    ways = (sideways, -moved[:, 2], moved[:, 2])
    return Settled(task_id, state, tuple(float(way.max(initial=0)) for way in ways))


class Probe:
    """A process in which the functions above run, one after the other. Use it with `with`: it ends with it.

    Args:
        timeout_s: of each; a driver that hangs is one that fails.
    """

    def __init__(self, timeout_s: float = 300):
        self.timeout_s = timeout_s

    def __enter__(self) -> Probe:
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, initializer=end_with_parent, initargs=(os.getpid(),))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; again does nothing."""
        processes = list((getattr(self.pool, "_processes", None) or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.join(1)
            if process.is_alive():
                process.kill()

    def __call__(self, look, *arguments):
        """What `look(*arguments)` returns or raises there.

        Raises:
            SimulatorDied: the process has crashed, or takes too long.
        """
        with lean_workers(draw_in_one_thread=False):
            future = self.pool.submit(look, *arguments)  # which starts the process
        try:
            return future.result(self.timeout_s)
        except BrokenProcessPool:
            raise SimulatorDied(
                "the process that tries the simulator crashed, which drivers of OpenGL do; its own message is above. Try "
                "MUJOCO_GL=osmesa (apt-get install -y libosmesa6), or another MUJOCO_EGL_DEVICE_ID"
            ) from None
        except TimeoutError:
            raise SimulatorDied(
                f"the simulator has not answered in {self.timeout_s:.0f} s; try MUJOCO_GL=osmesa, or another machine"
            ) from None


def egl_problem(devices: Sequence[EglDevice], index: int, cuda_uuid: str | None) -> str | None:
    """Where images are drawn on another GPU than the policy runs on: what is wrong; None if it is the same, or not known.

    Args:
        index: of the device that draws.
        cuda_uuid: of the GPU that torch calls 0, "1a2b3c4d-..."; None where it is not known.
    """
    if not devices or index >= len(devices):
        return None
    drawing = devices[index]
    if cuda_uuid is not None and drawing.uuid is not None:
        if drawing.uuid.lower() == cuda_uuid.lower():
            return None
        wanted = [i for i, device in enumerate(devices) if device.uuid and device.uuid.lower() == cuda_uuid.lower()]
        return f"EGL device {index} draws, another GPU than CUDA's" + (
            f", which is EGL device {wanted[0]}" if wanted else ""
        )
    if drawing.cuda not in (None, 0):
        wanted = [i for i, device in enumerate(devices) if device.cuda == 0]
        return f"EGL device {index} is CUDA device {drawing.cuda}, the policy is on 0" + (
            f", which is EGL device {wanted[0]}" if wanted else ""
        )
    return None
