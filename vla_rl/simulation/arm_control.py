"""LIBERO's control of the Panda arm and its gripper: robosuite's numbers, bit for bit, without its waste.

robosuite 1.4.0 (controllers/osc.py, base_controller.py; Khatib 1987) looks up names, allocates arrays and computes each
Jacobian twice in every one of the 25 sub-steps of a control step. Here the same numbers go through the same compiled
functions, in the same memory layout: BLAS adds in another order where a matrix lies otherwise in memory. With `exact` off they
are the same numbers to rounding, from one compiled function.

Not here: when the dynamics are computed (vla_rl.simulation.simulator).
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from robosuite.controllers.osc import OperationalSpaceController
from robosuite.models.grippers.panda_gripper import PandaGripper
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error
from robosuite.utils.numba import jit_decorator

JOINTS = 7
MEASURED = ("ee_pos", "ee_ori", "ee_pos_vel", "ee_ori_vel", "joint_pos", "joint_vel", "J_pos", "J_ori", "J", "mass")


class ArmControl:
    """Writes the arm's torques and the fingers' positions to data.ctrl.

    Args:
        robot: robosuite's; it stands in its start pose and its OSC_POSE controller has just been made there.
    """

    exact = True

    def __init__(self, robot: Any, model: mujoco.MjModel, data: mujoco.MjData):
        osc, gripper = robot.controller, robot.gripper
        assert type(osc) is OperationalSpaceController and osc.impedance_mode == "fixed" and osc.uncoupling
        assert osc.interpolator_pos is None and osc.interpolator_ori is None
        assert type(gripper) is PandaGripper, f"control of {type(gripper).__name__} is not implemented"
        self.osc, self.model, self.data = osc, model, data
        self.site = model.site(osc.eef_name).id
        self.qpos_index, self.dof_index = consecutive(osc.qpos_index), consecutive(osc.qvel_index)
        self.motor_index = consecutive(robot._ref_joint_actuator_indexes)
        self.torque_low, self.torque_high = (limit.copy() for limit in robot.torque_limits)
        self.finger_index = [model.actuator(name).id for name in gripper.actuators]
        low, high = model.actuator_ctrlrange[self.finger_index].T
        self.finger_centre, self.finger_range = 0.5 * (high + low), 0.5 * (high - low)
        self.finger_speed = gripper.speed  # of the command, per sub-step

        # of every joint of the scene: position, orientation. Two arrays: on some processors BLAS adds in another order where
        # memory is not aligned to 16 bytes, as that of every array of NumPy's own is and the second half of one need not be
        self.scene_jacobian = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        self.scene_mass = np.zeros((model.nv, model.nv))
        self.J_pos, self.J_ori = np.zeros((3, JOINTS), order="F"), np.zeros((3, JOINTS), order="F")
        self.J, self.mass = np.zeros((6, JOINTS), order="F"), np.zeros((JOINTS, JOINTS), order="F")
        self.measure()
        self.start = {name: getattr(self, name) for name in MEASURED} | {"goal_ori": np.array(osc.goal_ori)}
        self.restart()

    def restart(self) -> None:
        """As a new controller, which has measured in the start pose and does so again after the first sub-step only."""
        for name in MEASURED:
            setattr(self, name, self.start[name].copy(order="K"))
        self.osc.goal_ori = self.start["goal_ori"]
        self.outdated = False  # robosuite: controller.new_update
        self.finger_command = (0.0, 0.0)

    def measure(self) -> None:
        """Reads the arm's pose, velocity, Jacobians and masses from MuJoCo's data (robosuite: Controller.update)."""
        data, dofs = self.data, self.dof_index
        jacobian_pos, jacobian_ori = self.scene_jacobian
        self.ee_pos = data.site_xpos[self.site].copy()
        self.ee_ori = data.site_xmat[self.site].reshape(3, 3).copy()
        mujoco.mj_jacSite(self.model, data, jacobian_pos, jacobian_ori, self.site)
        self.ee_pos_vel = np.dot(jacobian_pos, data.qvel)
        self.ee_ori_vel = np.dot(jacobian_ori, data.qvel)
        self.joint_pos, self.joint_vel = data.qpos[self.qpos_index].copy(), data.qvel[dofs].copy()
        self.J_pos[:] = self.J[:3] = jacobian_pos[:, dofs]
        self.J_ori[:] = self.J[3:] = jacobian_ori[:, dofs]
        mujoco.mj_fullM(self.model, self.scene_mass, data.qM)
        self.mass[:] = self.scene_mass[dofs, dofs]
        self.outdated = False

    def set_goal(self, arm_action: np.ndarray) -> None:
        """The goal of a control step: float64 [6], -1..1 for -5 cm..5 cm and -0.5 rad..0.5 rad from the measured pose."""
        self.osc.ee_pos, self.osc.ee_ori_mat, self.osc.new_update = self.ee_pos, self.ee_ori, False
        self.osc.set_goal(arm_action)

    def apply(self, gripper_action: float) -> None:
        """Commands of one sub-step. gripper_action: its sign opens (-1), holds (0) or closes (1)."""
        data = self.data
        torques = self.exact_torques() if self.exact else self.torques_to_rounding()
        data.ctrl[self.motor_index] = np.minimum(np.maximum(torques, self.torque_low), self.torque_high)

        step = self.finger_speed * float(np.sign(gripper_action))
        left, right = self.finger_command
        self.finger_command = (clip(left - step), clip(right + step))
        data.ctrl[self.finger_index] = self.finger_centre + self.finger_range * self.finger_command

    def exact_torques(self) -> np.ndarray:
        """[7], Nm, before the motors' limits."""
        force, torque, lambda_pos, lambda_ori, nullspace = operational_space(
            *self.goal_and_pose(), self.mass, self.J, self.J_pos, self.J_ori
        )
        # products that robosuite leaves to NumPy stay with it: numba's go to SciPy's BLAS
        wrench = np.concatenate([np.dot(lambda_pos, force), np.dot(lambda_ori, torque)])
        torques = np.dot(self.J.T, wrench) + self.data.qfrc_bias[self.dof_index]
        torques += nullspace
        return torques

    def torques_to_rounding(self) -> np.ndarray:
        """The same to rounding."""
        try:
            torques = operational_space_torques(*self.goal_and_pose(), self.mass, self.J)
        except np.linalg.LinAlgError:  # a stretched arm: only a pseudo-inverse is left
            return self.exact_torques()
        return torques + self.data.qfrc_bias[self.dof_index]

    def goal_and_pose(self) -> tuple[np.ndarray, ...]:
        osc = self.osc
        return (
            osc.goal_pos, osc.goal_ori, osc.kp, osc.kd, osc.initial_joint,
            self.ee_pos, self.ee_ori, self.ee_pos_vel, self.ee_ori_vel, self.joint_pos, self.joint_vel,
        )  # fmt: skip


@jit_decorator
def operational_space(
    goal_pos, goal_ori, kp, kd, initial_joint,
    ee_pos, ee_ori, ee_pos_vel, ee_ori_vel, joint_pos, joint_vel,
    mass, J, J_pos, J_ori,
):  # fmt: skip
    """Desired force and torque, the inertia matrices that turn them into wrenches, and the nullspace torques.

    robosuite 1.4.0, OperationalSpaceController.run_controller and its own compiled helpers.
    """
    force, torque = desired_wrench(goal_pos, goal_ori, kp, kd, ee_pos, ee_ori, ee_pos_vel, ee_ori_vel)
    _, lambda_pos, lambda_ori, nullspace = opspace_matrices(mass, J, J_pos, J_ori)
    return (
        force,
        torque,
        lambda_pos,
        lambda_ori,
        nullspace_torques(mass, nullspace, initial_joint, joint_pos, joint_vel),
    )


@jit_decorator
def desired_wrench(goal_pos, goal_ori, kp, kd, ee_pos, ee_ori, ee_pos_vel, ee_ori_vel):
    """Force and torque [3] each: kp e - kd v."""
    ori_error = orientation_error(goal_ori, ee_ori)
    force, torque = np.empty(3), np.empty(3)
    for i in range(3):
        force[i] = (goal_pos[i] - ee_pos[i]) * kp[i] + -ee_pos_vel[i] * kd[i]
        torque[i] = ori_error[i] * kp[i + 3] + -ee_ori_vel[i] * kd[i + 3]
    return force, torque


@jit_decorator
def operational_space_torques(
    goal_pos, goal_ori, kp, kd, initial_joint,
    ee_pos, ee_ori, ee_pos_vel, ee_ori_vel, joint_pos, joint_vel,
    mass, J,
):  # fmt: skip
    """Torques [7] of the arm without gravity: J^T Lambda F + (1 - J^T Lambda J M^-1) M a, where Lambda^-1 = J M^-1 J^T.

    Lambda is that of position and orientation apart for F, the full one in the nullspace (Khatib 1987, eq. 51 ff.). robosuite
    takes pseudo-inverses; where they are inverses, which is where J has its full rank, this is the same. Elsewhere it raises
    LinAlgError.

    a: of a spring to the initial joints with critical damping (robosuite 1.4.0, nullspace_torques, whose stiffness is 10).
    """
    force, torque = desired_wrench(goal_pos, goal_ori, kp, kd, ee_pos, ee_ori, ee_pos_vel, ee_ori_vel)
    lambda_inverse = J @ np.linalg.solve(mass, J.T)
    wrench = np.empty(6)
    wrench[:3] = np.linalg.solve(lambda_inverse[:3, :3], force)
    wrench[3:] = np.linalg.solve(lambda_inverse[3:, 3:], torque)
    acceleration = 10 * (initial_joint - joint_pos) - 2 * np.sqrt(10.0) * joint_vel
    wrench -= np.linalg.solve(lambda_inverse, J @ acceleration)
    return J.T @ wrench + mass @ acceleration


def consecutive(indices: list[int]) -> slice:
    """A slice for indices that follow each other: a view instead of a copy."""
    assert list(indices) == list(range(indices[0], indices[0] + len(indices))), indices
    return slice(indices[0], indices[-1] + 1)


def clip(value: float) -> float:
    return min(max(value, -1.0), 1.0)
