"""Potential-based reward shaping for pick-and-place tasks (Ng, Harada & Russell 1999), from the task's own goal.

    r' = r + gamma phi(s') - phi(s),    phi(terminal) = 0

leaves the optimal policy as it is: over an episode the potentials cancel, whatever they are. They only say earlier what is
promising. Not here: the goal (vla_rl.simulation.goals), the success reward (the simulator's).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vla_rl.simulation.goals import (
    PickAndPlace,
    goal_position,
    grip_position,
    is_grasped,
    object_position,
    placements,
)

if TYPE_CHECKING:
    from vla_rl.simulation.simulator import Simulator

NEARNESS_SCALE = 5.0  # 1/m, of 1 - tanh(5 d)


def potential(sim: Simulator) -> float:
    """phi(s) in 0..1: the mean over the placements that the goal asks for.

    Each is 1 where it holds, else a third each of: the hand near the object, the object grasped (or near its goal), the object near
    its goal.
    Other parts of a goal (something open, switched on) do not count.

    Raises:
        ValueError: the task asks for no placement.
    """
    goals = placements(sim)
    if not goals:
        raise ValueError("env.reward=dense: the task's goal asks for no object to be placed; use env.reward=sparse")
    return float(np.mean([placement_potential(sim, goal) for goal in goals]))


def placement_potential(sim: Simulator, goal: PickAndPlace) -> float:
    if sim.env._eval_predicate([goal.relation, goal.object, goal.target]):
        return 1.0
    thing = object_position(sim, goal)
    reached, carried = nearness(grip_position(sim) - thing), nearness(thing - goal_position(sim, goal))
    held = max(float(is_grasped(sim, goal)), carried)  # at the goal the hand may open
    return (reached + held + carried) / 3


def nearness(difference: np.ndarray) -> float:
    """1 at distance 0, 0.54 at 10 cm, 0.24 at 20 cm, 0 far away."""
    return float(1 - np.tanh(NEARNESS_SCALE * np.linalg.norm(difference)))


def shaped(reward: float, before: float, after: float, ended: bool, gamma: float) -> float:
    """r + gamma phi(s') - phi(s), where a terminal state has no potential.

    Args:
        before, after: phi(s) and phi(s').
        ended: nothing follows s': success, or a step limit that counts as failure. A state whose value is bootstrapped keeps
            its potential.
        gamma: of the step that the reward is of: a decision.
    """
    return reward + gamma * (0.0 if ended else after) - before
