"""One LIBERO task, compiled once: its physics, resets and cameras are stock LIBERO's bit for bit, at a fraction of the time.
Or, asked for it, the same physics to rounding in half of that.

Stock is libero's OffScreenRenderEnv with a hard reset an episode, on robosuite 1.4.0 and MuJoCo 2.3.7. LIBERO's own code
still builds the scene, draws the placements and judges success; what is replaced is robosuite's control loop and reset.
docs/performance.md says what is left out and why the bits stay.

Not here: episodes, chunks of actions, step limits (vla_rl.simulation.libero_env).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
import robosuite
from libero.libero.envs import TASK_MAPPING, bddl_utils
from robosuite.utils.binding_utils import MjSim
from robosuite.utils.errors import RandomizationError

from vla_rl.simulation.arm_control import ArmControl
from vla_rl.simulation.building import doing
from vla_rl.simulation.model_cache import load_model
from vla_rl.simulation.rendering import Renderer
from vla_rl.types import SimulationUnstable

log = logging.getLogger(__name__)

# else MuJoCo writes to stdout, and to MUJOCO_LOG.TXT in the folder where the command is given
mujoco.set_mju_user_warning(lambda message: log.warning("MuJoCo: %s", message))

MAX_PLACEMENT_TRIES = 100  # each try already draws 5,000 positions an object
CONTROL_HZ = 20
# what an episode changes in MuJoCo's data and model; everything else follows from it in the first forward pass
DATA_STATE = ("qpos", "qvel", "qacc_warmstart", "ctrl")
MODEL_STATE = ("body_pos", "body_quat", "site_rgba")  # fixtures are placed, burners switched on
NO_SKIP = mujoco.mjtStage.mjSTAGE_NONE
# MuJoCo counts positions, velocities, accelerations and controls that are not finite or beyond 1e10, and starts the model anew
UNSTABLE = {
    int(getattr(mujoco.mjtWarning, name)): name
    for name in ("mjWARN_BADQPOS", "mjWARN_BADQVEL", "mjWARN_BADQACC", "mjWARN_BADCTRL")
}
MAX_SPEED = 1000.0  # m/s or rad/s of a joint; 7 in 900 steps of random actions, the arm in the table among them


@dataclass(frozen=True)
class SimulatorState:
    """All that the next step depends on, and what was observed last."""

    arrays: dict[str, np.ndarray]  # DATA_STATE and MODEL_STATE
    time: float  # s
    goal_ori: np.ndarray  # [3, 3], of the arm
    outdated: bool  # the arm's measurements
    finger_command: tuple[float, float]
    clock: tuple[float, bool]
    eef_pos: np.ndarray  # float64 [3], metres
    eef_quat: np.ndarray  # float64 [4], x, y, z, w
    gripper_qpos: np.ndarray  # float64 [2], metres
    images: np.ndarray  # uint8 [K, H, W, 3], upside down


class SampleClock:
    """When robosuite's observables read their values: once a control step, in a sub-step that depends on how often they
    were forced to before (1.4.0, utils/observables.py, Observable.update). Rounding is part of it."""

    def __init__(self, period: float, timestep: float):
        self.period, self.timestep = period, timestep
        self.restart()

    def restart(self) -> None:
        self.elapsed, self.sampled = 0.0, False

    def update(self, force: bool = False) -> bool:
        """Counts a sub-step; whether the values are read in it."""
        self.elapsed += self.timestep
        read = force or (not self.sampled and self.period >= self.elapsed)
        self.sampled = self.sampled or read
        if self.elapsed >= self.period:
            self.elapsed %= self.period
            self.sampled = False
        return read


class Simulator:
    """A task of LIBERO with an arm, a reset and cameras. `state()` has the observation, as stock's has it; the images keep
    their old value where a reset or a step is not to render.

    Args:
        bddl_file: the task.
        cameras: names, K; with none there is no OpenGL either.
        image_size: H = W.
        fast: leave out reflections and multi-sampling.
        physics: "exact" is stock's to the bit; "fast" solves for the contacts once a sub-step in place of three times, with sparse
            matrices, and for the arm's torques without pseudo-inverses.
        cache_gb: disk for compiled models (vla_rl.simulation.model_cache); 0 for none.
    """

    def __init__(
        self,
        bddl_file: str,
        cameras: Sequence[str],
        image_size: int,
        fast: bool,
        physics: str = "exact",
        cache_gb: float = 0,
    ):
        problem = TASK_MAPPING[bddl_utils.get_problem_info(bddl_file)["problem_name"]]
        task = type(problem.__name__, (QuickReset, problem), {"cache_gb": cache_gb})

        def build(seed: int) -> Any:
            np.random.seed(seed)
            return task(
                bddl_file,
                robots=["Panda"],
                controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
                initialization_noise=None,
                use_camera_obs=False,
                has_offscreen_renderer=False,
                control_freq=CONTROL_HZ,
                ignore_done=True,
                hard_reset=False,
            )

        self.env = until_placed(build)  # it places the objects, here too
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.robot = self.env.robots[0]
        self.cameras = list(cameras)
        self.renderer = Renderer(self.model, self.data, image_size, fast) if cameras else None
        self.images = np.zeros((len(self.cameras), image_size, image_size, 3), np.uint8)
        # nobody reads the force sensors, and nothing in the dynamics depends on them
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_SENSOR
        self.physics = physics
        if physics == "fast":
            self.model.opt.jacobian = mujoco.mjtJacobian.mjJAC_SPARSE
        self.substeps = int(self.env.control_timestep / self.env.model_timestep)
        self.clock = SampleClock(1.0 / CONTROL_HZ, self.env.model_timestep)
        self.eef_site = self.robot.eef_site_id
        self.eef_body = self.model.body(self.robot.robot_model.eef_name).id
        self.finger_joints = self.robot._ref_gripper_joint_pos_indexes
        self.unit_qpos = np.empty_like(self.data.qpos)
        self.arm = self.env.prepare_start()
        self.arm.exact = physics == "exact"

    # ----------------------------------------------------------------------------------------------------------- reset

    def reset(self, seed: int, state: np.ndarray | None, render: bool, resets: int = 1) -> None:
        """As stock's `seed(seed); reset()` and, with a state, `set_init_state(state)`. Seeds NumPy's global generator.

        In tasks that begin with something open or on, stock draws for it once more at each reset; here it is drawn once.

        Args:
            seed: of the placements; with a state it still places the fixtures, which a state does not hold.
            state: float64 [1 + nq + nv], a fixed initial state of the benchmark.
            resets: how often stock resets after it was seeded.

        Raises:
            RuntimeError: no placement of the objects was found.
        """
        np.random.seed(seed)
        for _ in range(resets):
            until_placed(lambda _: self.env.reset())
        self.clock.restart()
        self.clock.update(force=True)
        if state is not None:
            self.env.sim.set_state_from_flattened(state)
            mujoco.mj_forward(self.model, self.data)
            self.env._check_success()
            self.env._post_process()
            self.clock.update(force=True)
        self.observe(render)

    # ------------------------------------------------------------------------------------------------------------ step

    def step(self, action: np.ndarray, render: bool) -> bool:
        """One control step of 50 ms; whether LIBERO's goal holds after it.

        Args:
            action: float64 [7], arm (clipped to -1..1) and gripper.

        Raises:
            SimulationUnstable: the physics has blown up.
        """
        for number in UNSTABLE:
            self.data.warning[number].number = 0
        advance = self.advance_exactly if self.physics == "exact" else self.advance_fast
        for i in range(self.substeps):
            advance(action[6], action[:6] if i == 0 else None)
            self.arm.outdated = True
            if self.clock.update():
                self.observe(render)
        self.check_stable()
        success = self.env._check_success()
        self.env._post_process()
        return bool(success)

    def advance_exactly(self, gripper_action: float, arm_action: np.ndarray | None) -> None:
        """A sub-step of 2 ms.

        robosuite makes three forward passes: of the new state, of the same state again for the controller, and with the
        controller's torques. Each ends in a solve that starts from the last one's result, so all three solves are needed for
        the bits; kinematics, collisions and velocities are computed once, for they give the same again, unless the
        quaternions changed in being normalised once more.

        Args:
            gripper_action: see ArmControl.apply.
            arm_action: of a new control step, see ArmControl.set_goal.
        """
        model, data, arm = self.model, self.data, self.arm
        mujoco.mj_forwardSkip(model, data, NO_SKIP, True)
        if arm.outdated:
            if self.quaternions_stay():
                mujoco.mj_fwdConstraint(model, data)
            else:
                mujoco.mj_forwardSkip(model, data, NO_SKIP, True)
            arm.measure()
        if arm_action is not None:
            arm.set_goal(arm_action)
        arm.apply(gripper_action)
        if not self.quaternions_stay():
            mujoco.mj_step1(model, data)
        mujoco.mj_step2(model, data)

    def advance_fast(self, gripper_action: float, arm_action: np.ndarray | None) -> None:
        """The same with the one solve that moves the scene: the controller reads positions and velocities, which no solve changes."""
        arm = self.arm
        mujoco.mj_step1(self.model, self.data)
        if arm.outdated:
            arm.measure()
        if arm_action is not None:
            arm.set_goal(arm_action)
        arm.apply(gripper_action)
        mujoco.mj_step2(self.model, self.data)

    def check_stable(self) -> None:
        """Raises SimulationUnstable if the step has blown up."""
        counted = [name for number, name in UNSTABLE.items() if self.data.warning[number].number]
        speed = np.abs(self.data.qvel).max()
        if counted or not speed < MAX_SPEED:
            why = f"MuJoCo counts {', '.join(counted)}" if counted else f"a joint moves at {speed:.3g} m/s or rad/s"
            raise SimulationUnstable(f"the simulation is unstable: {why}")

    def quaternions_stay(self) -> bool:
        """Whether a forward pass, which first normalises the quaternions in qpos, would leave them as they are."""
        self.unit_qpos[:] = self.data.qpos
        mujoco.mj_normalizeQuat(self.model, self.unit_qpos)
        return self.unit_qpos.tobytes() == self.data.qpos.tobytes()

    # --------------------------------------------------------------------------------------------------------- observe

    def observe(self, render: bool) -> None:
        """Reads the robot's sensors, and the cameras if `render`, from what the last forward pass computed."""
        self.eef_pos = self.data.site_xpos[self.eef_site].copy()
        self.eef_quat = self.data.xquat[self.eef_body][[1, 2, 3, 0]]
        self.gripper_qpos = self.data.qpos[self.finger_joints]
        if render:
            self.render()

    def render(self) -> None:
        """New images, never changed later: states share them."""
        if self.renderer is not None:
            with doing("render"):
                self.images = np.stack([self.renderer.render(camera) for camera in self.cameras])

    def check_states(self, states: np.ndarray) -> None:
        """Raises ValueError where fixed initial states [S, 1 + nq + nv] or the goal are not this task's."""
        expected = 1 + self.model.nq + self.model.nv
        if states.shape[1] != expected:
            raise ValueError(f"its initial states have {states.shape[1]} numbers, the task {expected}")
        self.env._check_success()  # a goal of words that LIBERO does not know

    def object_positions(self) -> np.ndarray:
        """Of everything that can be moved, float64 [J, 3] in metres."""
        free = np.flatnonzero(self.model.jnt_type == mujoco.mjtJoint.mjJNT_FREE)  # [J]
        return self.data.qpos[self.model.jnt_qposadr[free, None] + np.arange(3)]

    # ----------------------------------------------------------------------------------------------------------- state

    def arrays(self) -> dict[str, np.ndarray]:
        """Views of MuJoCo's memory."""
        owners = ((self.data, DATA_STATE), (self.model, MODEL_STATE))
        return {name: getattr(owner, name) for owner, names in owners for name in names}

    def state(self) -> SimulatorState:
        return SimulatorState(
            arrays={name: view.copy() for name, view in self.arrays().items()},
            time=self.data.time,
            goal_ori=self.arm.osc.goal_ori,
            outdated=self.arm.outdated,
            finger_command=self.arm.finger_command,
            clock=(self.clock.elapsed, self.clock.sampled),
            eef_pos=self.eef_pos,
            eef_quat=self.eef_quat,
            gripper_qpos=self.gripper_qpos,
            images=self.images,
        )

    def set_state(self, state: SimulatorState) -> None:
        """The next step is the one that would have followed `state()`; to render or to ask for contacts needs a step first."""
        for name, view in self.arrays().items():
            view[:] = state.arrays[name]
        mujoco.mj_kinematics(self.model, self.data)  # positions of bodies and sites, for whoever reads them
        self.data.qpos[:] = state.arrays["qpos"]  # which it has normalised
        self.data.time = state.time
        if not state.outdated:
            self.arm.restart()
        self.arm.outdated, self.arm.finger_command = state.outdated, state.finger_command
        self.arm.osc.goal_ori = state.goal_ori
        self.clock.elapsed, self.clock.sampled = state.clock
        self.eef_pos, self.eef_quat, self.gripper_qpos = state.eef_pos, state.eef_quat, state.gripper_qpos
        self.images = state.images

    def close(self) -> None:
        """Frees the OpenGL context."""
        if self.renderer is not None:
            self.renderer.close()


def until_placed(attempt: Callable[[int], Any]) -> Any:
    """The first attempt (of number 0, 1, ...) in which LIBERO finds a place for every object.

    Raises:
        RuntimeError: there is none; LIBERO itself would hide every error and try for ever.
    """
    for number in range(MAX_PLACEMENT_TRIES):
        with contextlib.suppress(RandomizationError):
            return attempt(number)
    raise RuntimeError(f"no placement of the objects found in {MAX_PLACEMENT_TRIES} tries; use another seed")


class QuickReset:
    """Put in front of LIBERO's problem class: its reset, without what has not changed since the task was built.

    A stock hard reset makes a new model, robot and simulation. What an episode leaves behind in them is undone here:
    the fixtures' positions and the sites' visibility in the model, the gripper's command, and the warm start of the
    constraint solver, whose history begins with passes at the model's default pose.
    """

    cache_gb = 0.0
    arm: ArmControl | None = None

    def _initialize_sim(self, xml_string: str | None = None) -> None:
        self.sim = MjSim(load_model(self.model.get_xml(), self.cache_gb))
        self.sim.forward()
        self.initialize_time(self.control_freq)
        self.fresh = {name: getattr(self.sim.model, name).copy() for name in MODEL_STATE}

    def _setup_observables(self) -> dict[str, Any]:
        return {}  # 31 of them cost Python time in every sub-step; Simulator.observe reads the three that are used

    def _setup_references(self) -> None:
        if self.arm is None:  # names and indices of the model, which stays
            super()._setup_references()

    def prepare_start(self) -> ArmControl:
        """Keeps what stock has before it places the objects: robot at its start, solver warm from four passes.

        Two passes are robosuite's own, of the new simulation and of the new OpenGL context (environments/base.py
        _initialize_sim, utils/binding_utils.py MjRenderContext), two are the new controller's.
        """
        model, data, robot = self.sim.model._model, self.sim.data._data, self.robots[0]
        mujoco.mj_resetData(model, data)
        for name, value in self.fresh.items():
            getattr(model, name)[:] = value
        mujoco.mj_forward(model, data)
        mujoco.mj_forward(model, data)
        robot.reset()
        self.arm = ArmControl(robot, model, data)
        self.start = {name: getattr(data, name).copy() for name in ("qpos", "qacc_warmstart")}
        robot.reset = self.reset_robot
        return self.arm

    def reset_robot(self, deterministic: bool = False) -> None:
        """What robosuite's SingleArm.reset leaves; called by its reset after the data are reset to the default pose."""
        np.random.randn(len(self.robots[0].init_qpos))  # robosuite draws noise of magnitude 0
        model, data = self.sim.model, self.sim.data
        for name, value in self.fresh.items():
            getattr(model, name)[:] = value
        for name, value in self.start.items():
            getattr(data, name)[:] = value
        self.arm.restart()
