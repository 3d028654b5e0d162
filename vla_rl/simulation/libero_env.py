"""One LIBERO task as a gymnasium.Env that executes action chunks.

Not here: which episodes are run (the trainer's), how images are preprocessed (vla_rl.model.image_transform), worker processes
(vla_rl.simulation.vector_env), the physics (vla_rl.simulation.simulator), what the benchmark says of a task
(vla_rl.simulation.suites). No torch, and no simulator before the first reset, so that worker
processes start fast and the main process has no GL.

K images, H = W image side in pixels, C steps in a chunk. One simulator step is 50 ms (20 Hz).
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import string
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Text

from vla_rl.run.failures import one_line
from vla_rl.run.settings import ConfigError
from vla_rl.run.task_suites import own_suites, suite_size
from vla_rl.simulation.building import doing, telling
from vla_rl.simulation.libraries import import_simulator, naming_missing_modules
from vla_rl.simulation.rewards import REWARDS, Step
from vla_rl.simulation.suites import check_task, fixed_state, fixed_states, load_benchmark, task_languages
from vla_rl.types import ACTION_DIM, PROPRIO_DIM, Episode, RenderingError

if TYPE_CHECKING:
    from vla_rl.simulation.simulator import Simulator, SimulatorState

CAMERAS = ("agentview", "robot0_eye_in_hand")  # in the order of OpenVLA-OFT's images
MAX_INSTRUCTION = 200  # characters; the longest of all suites has 90
REST = np.array(
    [0, 0, 0, 0, 0, 0, -1], np.float64
)  # arm at rest, gripper open (openvla run_libero_eval.py, dummy action)
SETTLED_STARTS = 64  # kept of each task: its 50 fixed states and some


class LiberoEnv(gymnasium.Env):
    """Episodes of one suite's tasks; a step executes a chunk of actions and renders once.

    The state after `reset` is a function of the episode (and settle_steps) alone, and equal bit for bit to that of a
    freshly built stock environment, without its 4-second rebuild; docs/libero.md has the three departures. Seeds NumPy's
    global generator, as LIBERO does.

    Args:
        task_suite: one of vla_rl.run.task_suites.
        task_ids: the first one is used when `reset` is given no episode.
        chunk_size: C, actions a step.
        num_images: K, 1 is the agent view, 2 adds the wrist camera.
        image_size: H = W, pixels.
        render: "exact" are stock LIBERO's images; "fast" leaves out reflections and multi-sampling.
        physics: "exact" is stock LIBERO's to the bit; "fast" is the same to rounding.
        max_steps: simulator steps until truncation; None takes the suite's own limit.
        settle_steps: steps with a resting arm in `reset`; they do not count.
        reward: a key of vla_rl.simulation.rewards.REWARDS.
        gamma: for the reward, per call of `step`; the trainer's own.
        bootstrap_truncated: for the reward, whether the value of a truncated episode's last state counts; the trainer's own.
        index: which of `options["episodes"]` is this environment's.
        simulators: shared with other environments of the process; None for its own.
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
        physics: str = "exact",
        max_steps: int | None = None,
        settle_steps: int = 10,
        reward: str = "sparse",
        gamma: float = 1.0,
        bootstrap_truncated: bool = True,
        index: int = 0,
        simulators: Simulators | None = None,
    ):
        _, suite_limit = suite_size(task_suite)
        for name, value in (("render", render), ("physics", physics)):
            if value not in ("exact", "fast"):
                raise ValueError(f"{name}={value!r} is unknown; choose exact or fast")
        if reward not in REWARDS:
            raise ValueError(f"reward={reward!r} is unknown; choose {' or '.join(REWARDS)}")
        self.reward, self.gamma, self.bootstrap_truncated = reward, gamma, bootstrap_truncated
        self.task_suite, self.default_task_id = task_suite, task_ids[0]
        self.chunk_size, self.cameras, self.image_size = chunk_size, CAMERAS[:num_images], image_size
        self.render_quality, self.physics, self.settle_steps, self.index = render, physics, settle_steps, index
        self.max_steps = max_steps or suite_limit
        self.observation_space = Dict(
            images=Box(0, 255, (num_images, image_size, image_size, 3), np.uint8),
            proprio=Box(-np.inf, np.inf, (PROPRIO_DIM,), np.float32),
            instruction=Text(MAX_INSTRUCTION, min_length=0, charset=string.ascii_letters + string.digits + " .,_-'’"),
        )
        self.action_space = Box(-1, 1, (chunk_size, ACTION_DIM), np.float32)
        self._simulators = simulators or Simulators()
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
            RuntimeError: no placement of the objects could be found.
            RenderingError, ModuleNotFoundError: OpenGL or a package is missing; says what to install.
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
            episode = as_dict(Episode(self.default_task_id, None, seed=placement))
        self._start(episode, render=True)
        return self._observe(), {"instruction": self._instruction}

    def step(self, actions: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Executes a chunk until success or the step limit; later actions of the chunk are then left out.

        After the end of the episode nothing is executed: the same observation and flags come back with reward 0.

        Args:
            actions: float [C, 7], end-effector delta (the controller clips to -1..1), gripper -1 open, 1 closed.

        Returns:
            observation, reward (of REWARDS; 0.0 after the end), terminated (success), truncated (step limit without success),
            info: {"steps": simulator steps executed, "success": bool}.

        Raises:
            ValueError: the actions have another shape or are not finite.
            SimulationUnstable: the physics has blown up; only a reset helps.
            gymnasium.error.ResetNeeded: before the first reset.
        """
        actions = check_actions(actions, self.action_space.shape)
        if self._episode is None:
            raise gymnasium.error.ResetNeeded("step() before reset(); call reset() first")
        steps_before = len(self._actions)
        reward = 0.0
        if not (self._terminated or self._truncated):
            before = self._measured
            with doing("step", self.index):
                self._execute(actions[: self.max_steps - steps_before])
            ended = self._terminated or (self._truncated and not self.bootstrap_truncated)
            executed = actions[: len(self._actions) - steps_before]
            reward = REWARDS[self.reward].of(
                Step(self._terminated, ended, executed, before, self._measured, self.gamma)
            )
        steps = len(self._actions) - steps_before
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
        actions = state["actions"]
        self._start(as_dict(state["episode"]), render=len(actions) == 0)
        if len(actions):
            # after no step nothing is measured again: kinematics put back are measured otherwise than those stepped into
            with doing("reset", self.index):
                self._execute(actions)
        return self._observe()

    def restore_episodes(self, states: Sequence[dict[str, Any] | None]) -> dict | None:
        """`restore_episode(states[index])`, for VectorEnv.call, which gives all environments the same arguments."""
        state = states[self.index]
        return None if state is None else self.restore_episode(state)

    def replay(self, episode: Episode | Mapping[str, Any], actions: np.ndarray) -> tuple[np.ndarray, bool, str]:
        """Plays recorded actions again, bit for bit, and renders every step: what a video shows.

        Args:
            actions: float [steps, 7], those executed (`episode_state`).

        Returns:
            The agent view uint8 [steps + 1, H, W, 3], fewer if the episode ends before its actions do; whether it
            succeeded; its instruction.
        """
        self._start(as_dict(episode), render=True)
        frames, simulator = [self._observe()["images"][0]], self.simulator
        cameras, simulator.cameras = simulator.cameras, simulator.cameras[:1]  # what no video shows is not drawn
        try:
            for action in check_actions(actions, (len(actions), ACTION_DIM)):
                if self._terminated or self._truncated:
                    break
                with doing("step", self.index):
                    self._execute(action[None])
                frames.append(self._observe()["images"][0])
        finally:
            simulator.cameras = cameras
        return np.stack(frames), self._terminated, self._instruction

    def close(self) -> None:
        """Frees the simulators and their OpenGL contexts."""
        self._simulators.close()
        self._episode = None

    @property
    def simulator(self) -> Simulator:
        """The episode's simulator, in the state where this environment left it."""
        shared = self._shared(self._episode["task_id"])
        if shared.holder is not self:
            shared.simulator.set_state(self._state)
            shared.holder = self
        return shared.simulator

    def _shared(self, task_id: int) -> Shared:
        fast = self.render_quality == "fast"
        return self._simulators.get(self.task_suite, task_id, self.cameras, self.image_size, fast, self.physics)

    def _start(self, episode: dict[str, Any], render: bool) -> None:
        with doing("reset", self.index):
            self._start_in(episode, render)

    def _start_in(self, episode: dict[str, Any], render: bool) -> None:
        """Resets and settles the simulator, or puts it into that state if it has been there before."""
        task_id, state_index, seed, resets = (episode[key] for key in ("task_id", "initial_state", "seed", "resets"))
        shared = self._shared(task_id)
        simulator, start = shared.simulator, (state_index, seed, resets, self.settle_steps, self.reward)
        shared.holder = None  # whatever goes wrong from here on, nobody's state is in it
        if start not in shared.settled:
            state = None if state_index is None else fixed_state(self.task_suite, task_id, state_index)
            simulator.reset(seed, state, render and self.settle_steps == 0, resets)
            for i in range(self.settle_steps):
                simulator.step(REST, render=render and i == self.settle_steps - 1)
        self._state, self._measured = shared.settled.get(start) or (simulator.state(), self._measure(simulator))
        if render:
            shared.settled[start] = self._state, self._measured
            shared.settled.move_to_end(start)
            if len(shared.settled) > SETTLED_STARTS:
                shared.settled.popitem(last=False)
        simulator.set_state(self._state)  # also where it is in it: body positions are then the same either way
        shared.holder = self
        self._episode, self._actions = episode, []
        self._terminated = self._truncated = False
        self._instruction = task_languages(self.task_suite)[task_id]

    def _execute(self, actions: np.ndarray) -> None:
        """Steps until success or the end of the chunk [<= C, 7]; renders once."""
        simulator = self.simulator
        executed = []
        for i, action in enumerate(actions):
            last = i == len(actions) - 1
            # done is success only: LIBERO's own has no time limit
            self._terminated = simulator.step(np.asarray(action, np.float64), render=last)
            executed.append(action)
            if self._terminated:
                # Success cannot be foreseen, so this image is taken after the step, 2 ms later than robosuite takes it.
                # No decision follows from it.
                simulator.render()
                break
        self._actions += executed
        self._truncated = not self._terminated and len(self._actions) >= self.max_steps
        self._state, self._measured = simulator.state(), self._measure(simulator)

    def _measure(self, simulator: Simulator) -> float:
        """What the reward wants to know of the state that the simulator has just stepped into."""
        measure = REWARDS[self.reward].measure
        return 0.0 if measure is None else measure(simulator)

    def _observe(self) -> dict[str, Any]:
        state = self._state
        images = np.ascontiguousarray(state.images[:, ::-1, ::-1])  # LIBERO's are upside down and mirrored
        proprio = np.concatenate([state.eef_pos, quat_to_axis_angle(state.eef_quat), state.gripper_qpos])
        return {"images": images, "proprio": proprio.astype(np.float32), "instruction": self._instruction}


def as_dict(episode: Episode | Mapping[str, Any]) -> dict[str, Any]:
    return dataclasses.asdict(Episode(**episode) if isinstance(episode, Mapping) else episode)


def check_actions(actions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    actions = np.asarray(actions, np.float32)  # what an episode's record holds is what is executed
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


# The simulators


class Simulators:
    """The simulators of one process, one a task, shared by its environments: 0.6 GB each, however many play in it.

    Args:
        limit: how many are kept; beyond it, the one that was used longest ago is closed.
        cache_gb: disk for compiled models (vla_rl.simulation.model_cache); 0 for none.
        told: file that is told of each that is built (vla_rl.simulation.building).
    """

    def __init__(self, limit: int = 1, cache_gb: float = 0, told: str | None = None):
        self.limit, self.cache_gb, self.told = limit, cache_gb, told
        self.kept: OrderedDict[tuple, Shared] = OrderedDict()

    def get(
        self,
        task_suite: str,
        task_id: int,
        cameras: Sequence[str],
        image_size: int,
        fast: bool,
        physics: str = "exact",
    ) -> Shared:
        """The simulator of a task; builds it if it is not there, which takes 2 to 5 s.

        Raises:
            ValueError: the task does not exist.
            RenderingError: a system library or an OpenGL device is missing; says what to install.
            ModuleNotFoundError: a package is missing or not whole; says what to run.
            ConfigError: the task is of a suite of one's own, and its files are wrong.
        """
        key = (task_suite, task_id, tuple(cameras), image_size, fast, physics)
        if key not in self.kept:
            while len(self.kept) >= self.limit:
                self.kept.popitem(last=False)[1].simulator.close()
                gc.collect()  # robosuite's objects refer to each other
            with telling(self.told, f"{task_suite} task {task_id}"), doing("build"):
                self.kept[key] = Shared(build_simulator(*key, cache_gb=self.cache_gb))
            atexit.unregister(self.close)
            atexit.register(self.close)  # PyOpenGL complains at interpreter exit about contexts that are still there
        self.kept.move_to_end(key)
        return self.kept[key]

    def close(self) -> None:
        """Frees the simulators and their OpenGL contexts; an environment's next reset or step builds its own again."""
        while self.kept:
            self.kept.popitem()[1].simulator.close()
        gc.collect()
        atexit.unregister(self.close)


@dataclasses.dataclass
class Shared:
    """A simulator and which environment's state it is in."""

    simulator: Simulator
    holder: LiberoEnv | None = None
    settled: OrderedDict[tuple, tuple[SimulatorState, float]] = dataclasses.field(
        default_factory=OrderedDict
    )  # start -> state, the reward's measure


def build_simulator(
    task_suite: str,
    task_id: int,
    cameras: Sequence[str],
    image_size: int,
    fast: bool,
    physics: str = "exact",
    cache_gb: float = 0,
) -> Simulator:
    """As Simulators.get, without sharing."""
    benchmark = load_benchmark(task_suite)
    check_task(task_suite, task_id)
    simulator = import_simulator()
    with naming_missing_modules(), blaming_own_task(task_suite, task_id):
        built = simulator(benchmark.get_task_bddl_file_path(task_id), cameras, image_size, fast, physics, cache_gb)
        if task_suite in own_suites():
            built.check_states(fixed_states(task_suite, task_id))
    return built


@contextlib.contextmanager
def blaming_own_task(task_suite: str, task_id: int) -> Iterator[None]:
    """What LIBERO says of a task file of one's own, in whatever kind of exception, as one line that names the file.

    Raises:
        ConfigError: the file cannot be built.
    """
    try:
        yield
    except (ConfigError, ModuleNotFoundError, RenderingError, OSError, MemoryError):
        raise
    except Exception as error:  # of the parser KeyError, AssertionError, Exception itself, ...
        if task_suite not in own_suites():
            raise
        file = load_benchmark(task_suite).get_task_bddl_file_path(task_id)
        raise ConfigError(f"{file} cannot be built ({type(error).__name__}: {one_line(error)}); mend it") from error
