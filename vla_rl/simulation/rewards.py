"""What a step of an environment is worth, by the name that env.reward has: a table of functions (docs/extending.md adds one).

A reward is a function of its Step alone, so that a resumed episode goes on with the same ones. The dense reward is potential-based
shaping for pick-and-place tasks (Ng, Harada & Russell 1999), from the task's own goal:

    r' = r + gamma phi(s') - phi(s),    phi(terminal) = 0

leaves the optimal policy as it is: over an episode the potentials cancel, whatever they are. They only say earlier what is
promising. Not here: the goal (vla_rl.simulation.goals), whether it holds (the simulator's).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vla_rl.simulation.goals import (
    PickAndPlace,
    goal_position,
    grip_position,
    holds,
    is_grasped,
    object_position,
    placements,
)

if TYPE_CHECKING:
    from vla_rl.simulation.simulator import Simulator

NEARNESS_SCALE = 5.0  # 1/m, of 1 - tanh(5 d)


@dataclass(frozen=True)
class Step:
    """One step of an environment: a decision, up to C simulator steps."""

    success: bool  # the goal holds after it, which ends the episode
    ended: bool  # nothing follows: success, or a step limit that counts as failure (algorithm.bootstrap_truncated)
    actions: np.ndarray  # float32 [executed, 7], 1 to C of them; what is beyond -1..1 is clipped by the controller
    before: float  # the reward's measure of the state before the step, and after it; 0 where it has none
    after: float
    gamma: float  # discount of a decision


@dataclass(frozen=True)
class Reward:
    """A row of REWARDS.

    Args:
        of: the reward of a step, finite; of whatever happened in its simulator steps, one number.
        measure: of a state, whatever the reward wants to know of the simulator, as a finite number; taken after the settle steps
            and after each step. It must be a function of the state: no memory, no random numbers, nothing changed.
    """

    of: Callable[[Step], float]
    measure: Callable[[Simulator], float] | None = None


def sparse(step: Step) -> float:
    """1 on success, else 0."""
    return float(step.success)


def dense(step: Step) -> float:
    """`sparse`, shaped by the potential."""
    return shaped(sparse(step), step.before, step.after, step.ended, step.gamma)


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
    if holds(sim, goal):
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


REWARDS = {  # env.reward in vla_rl.run.settings has the same names
    "sparse": Reward(sparse),
    "dense": Reward(dense, measure=potential),
}
