"""Stock LIBERO, the OffScreenRenderEnv that everybody uses, played as the official evaluation plays it, and our Simulator
played alike.

N = 1 environment, K = 2 images, H = W = SIZE.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vla_rl.simulation import suites
from vla_rl.simulation.libraries import prepare_simulator
from vla_rl.simulation.suites import fixed_state
from vla_rl.types import Episode

SIZE = 64
CAMERAS = ("agentview", "robot0_eye_in_hand")
REST = np.array([0, 0, 0, 0, 0, 0, -1.0])


@dataclass
class Row:
    """What there is after a step."""

    qpos: np.ndarray
    qvel: np.ndarray
    qacc_warmstart: np.ndarray  # where the solver starts from next: shows a solve too many or too few
    body_pos: np.ndarray  # of the model: fixtures
    site_rgba: np.ndarray  # of the model: burners
    gripper: np.ndarray  # [2], the command
    reward: float
    success: bool
    eef_pos: np.ndarray
    eef_quat: np.ndarray
    gripper_qpos: np.ndarray
    images: np.ndarray | None  # [K, H, W, 3], upside down


def assert_equal(row: Row, expected: Row, when: str) -> None:
    """Bit for bit."""
    for name, value in vars(expected).items():
        if value is not None:
            np.testing.assert_array_equal(getattr(row, name), value, err_msg=f"{name} {when}")


def make(suite: str, task_id: int):
    prepare_simulator()
    from libero.libero.envs import OffScreenRenderEnv

    bddl_file = suites.load_benchmark(suite).get_task_bddl_file_path(task_id)
    return OffScreenRenderEnv(bddl_file_name=bddl_file, camera_heights=SIZE, camera_widths=SIZE)


def play(env, suite: str, episode: Episode, actions: np.ndarray, render_every: int = 1) -> list[Row]:
    """A hard reset, 10 settle steps, then the actions; what begins open or on is drawn once (docs/libero.md, departures).

    Args:
        actions: float64 [T, 7].
        render_every: 1 is stock; above it the cameras' observables keep their value in the steps between, as an image is
            not part of the dynamics (test_rendering_each_step_changes_nothing).

    Returns:
        T + 1 rows, the first one after the settle steps.
    """
    # Stock adds the drawer's sampler once more at each hard reset, and so draws other places each time. Once is meant.
    env.seed(episode.seed)
    for _ in range(episode.resets):
        env.env.object_property_initializers.clear()
        env.reset()
    if episode.initial_state is not None:
        states = suites.load_benchmark(suite).get_task_init_states(episode.task_id)
        env.set_init_state(states[episode.initial_state])
    cameras_on = switch_cameras(env)
    rows = []
    for t, action in enumerate([*[REST] * 10, *actions], start=-9):
        cameras_on[0] = t % render_every == 0
        obs, reward, done, _ = env.step(action.tolist())
        if t >= 0:
            images = np.stack([obs[f"{name}_image"] for name in CAMERAS]) if cameras_on[0] else None
            rows.append(stock_row(env, obs, reward, done, images))
    return rows


def switch_cameras(env) -> list[bool]:
    """A switch for the cameras of `env`, which is on."""
    switch = [True]
    for name in CAMERAS:
        observable = env.env._observables[f"{name}_image"]

        def sensor(cache, observable=observable, real=observable._sensor):
            return real(cache) if switch[0] else observable.obs

        sensor.__modality__ = "image"
        observable._sensor = sensor
    return switch


def stock_row(env, obs, reward, done, images) -> Row:
    data, model = env.sim.data, env.sim.model
    return Row(
        qpos=data.qpos.copy(),
        qvel=data.qvel.copy(),
        qacc_warmstart=data.qacc_warmstart.copy(),
        body_pos=model.body_pos.copy(),
        site_rgba=model.site_rgba.copy(),
        gripper=np.array(env.robots[0].gripper.current_action),
        reward=reward,
        success=bool(done),
        eef_pos=obs["robot0_eef_pos"].copy(),
        eef_quat=obs["robot0_eef_quat"].copy(),
        gripper_qpos=obs["robot0_gripper_qpos"].copy(),
        images=images,
    )


def random_actions(seed: int, steps: int = 60) -> np.ndarray:
    """float64 [T, 7]; some are larger than 1, which the controller clips; the gripper opens, closes and holds."""
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1.2, 1.2, (steps, 7))
    actions[::7, 6] = 0
    actions[::5, 3:6] = 0  # keeps the last orientation goal
    return actions


def reset(sim, suite: str, episode: Episode, render: bool = False) -> None:
    state = None if episode.initial_state is None else fixed_state(suite, episode.task_id, episode.initial_state)
    sim.reset(episode.seed, state, render=False, resets=episode.resets)
    for i in range(10):
        sim.step(REST, render=render and i == 9)


def row(sim, success: bool = False, rendered: bool = False) -> Row:
    return Row(
        qpos=sim.data.qpos,
        qvel=sim.data.qvel,
        qacc_warmstart=sim.data.qacc_warmstart,
        body_pos=sim.model.body_pos,
        site_rgba=sim.model.site_rgba,
        gripper=np.array(sim.arm.finger_command),
        reward=float(success),
        success=success,
        eef_pos=sim.eef_pos,
        eef_quat=sim.eef_quat,
        gripper_qpos=sim.gripper_qpos,
        images=sim.images if rendered else None,
    )
