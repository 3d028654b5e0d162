"""ArmControl against robosuite's own controller and gripper, on states it has never seen, bit for bit."""

import mujoco
import numpy as np
import pytest

from vla_rl.simulation import arm_control
from vla_rl.simulation.arm_control import consecutive
from vla_rl.simulation.libero_env import build_simulator

pytestmark = pytest.mark.libero


@pytest.fixture(scope="module")
def sim():
    sim = build_simulator("libero_object", 0, (), 16, fast=False, cache_gb=3)
    sim.reset(0, None, render=False)
    yield sim
    sim.close()


@pytest.fixture(params=range(6))
def posed(sim, request):
    """The arm in a random pose, moving; robosuite's controller with the measurements of the start."""
    rng = np.random.default_rng(request.param)
    sim.reset(0, None, render=False)
    data, arm = sim.data, sim.arm
    data.qpos[arm.qpos_index] += rng.uniform(-0.5, 0.5, 7)
    data.qvel[arm.dof_index] = rng.normal(size=7)
    mujoco.mj_forward(sim.model, data)
    return sim, rng


def robosuite_torques(sim, action):
    """One sub-step of robosuite.SingleArm.control, as it stands there."""
    osc, robot = sim.arm.osc, sim.robot
    osc.new_update = True
    osc.set_goal(action[:6])
    torques = np.clip(osc.run_controller(), *robot.torque_limits)
    return torques, (osc.goal_pos.copy(), osc.goal_ori.copy())


@pytest.mark.parametrize("turns", [True, False])
def test_torques_and_goals_are_robosuites(posed, turns):
    sim, rng = posed
    action = rng.uniform(-1.5, 1.5, 7)
    if not turns:
        action[3:6] = 0  # the orientation goal stays the start's
    expected, goals = robosuite_torques(sim, action)
    sim.arm.osc.goal_ori = sim.arm.start["goal_ori"]
    sim.arm.measure()
    sim.arm.set_goal(action[:6])
    sim.arm.apply(action[6])
    np.testing.assert_array_equal(sim.data.ctrl[sim.arm.motor_index], expected)
    np.testing.assert_array_equal(sim.arm.osc.goal_pos, goals[0])
    np.testing.assert_array_equal(sim.arm.osc.goal_ori, goals[1])
    assert np.abs(expected).max() > 1  # Nm


def test_fast_torques_are_the_exact_ones_to_rounding(posed):
    sim, rng = posed
    sim.arm.measure()
    sim.arm.set_goal(rng.uniform(-1.5, 1.5, 6))
    np.testing.assert_allclose(sim.arm.torques_to_rounding(), sim.arm.exact_torques(), rtol=1e-9, atol=1e-9)


def test_what_goes_to_blas_is_aligned_as_numpys_own_arrays_are(sim):
    """On some processors (a Xeon with AMX) memory between multiples of 16 bytes is added up in another order."""
    arm = sim.arm
    arm.measure()
    measured = [getattr(arm, name) for name in arm_control.MEASURED]
    assert {array.ctypes.data % 16 for array in (*arm.scene_jacobian, arm.scene_mass, *measured)} == {0}


def test_a_stretched_arm_has_the_exact_torques(sim):
    """All joints at 0, as after MuJoCo has put back a scene that blew up: the Jacobian has lost a rank."""
    sim.reset(0, None, render=False)
    sim.data.qpos[sim.arm.qpos_index] = 0
    mujoco.mj_forward(sim.model, sim.data)
    sim.arm.measure()
    sim.arm.set_goal(np.full(6, 0.5))
    with pytest.raises(np.linalg.LinAlgError):
        arm_control.operational_space_torques(*sim.arm.goal_and_pose(), sim.arm.mass, sim.arm.J)
    np.testing.assert_array_equal(sim.arm.torques_to_rounding(), sim.arm.exact_torques())


def test_fingers_follow_robosuites_gripper(sim):
    sim.reset(0, None, render=False)
    gripper = sim.robot.gripper
    gripper.current_action = np.zeros(gripper.dof)
    for action in [1.0] * 130 + [-0.3] * 260 + [0.0] * 3 + [2.0] * 7:
        sim.robot.grip_action(gripper, np.array([action]))
        expected = sim.data.ctrl[sim.arm.finger_index].copy()
        sim.data.ctrl[sim.arm.finger_index] = 0
        sim.arm.apply(action)
        np.testing.assert_array_equal(sim.data.ctrl[sim.arm.finger_index], expected)
        np.testing.assert_array_equal(sim.arm.finger_command, gripper.current_action)


def test_restart_forgets_goal_command_and_measurements(sim):
    sim.reset(0, None, render=False)
    start = {name: np.array(getattr(sim.arm, name)) for name in ("ee_pos", "J", "mass", "joint_pos")}
    assert not sim.arm.outdated
    for _ in range(3):
        sim.step(np.ones(7), render=False)
    assert sim.arm.outdated and np.abs(sim.arm.J - start["J"]).max() > 1e-3
    sim.arm.restart()
    for name, value in start.items():
        np.testing.assert_array_equal(getattr(sim.arm, name), value)
    assert sim.arm.J.flags.f_contiguous and sim.arm.mass.flags.f_contiguous
    assert sim.arm.finger_command == (0.0, 0.0) and not sim.arm.outdated


def test_indices_that_follow_each_other_become_a_slice():
    assert consecutive([3, 4, 5]) == slice(3, 6)
    with pytest.raises(AssertionError):
        consecutive([3, 5])
