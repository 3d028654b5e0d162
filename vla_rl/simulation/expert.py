"""A scripted hand that solves pick-and-place tasks, for demonstrations: it sees what a policy does not.

Each action is a proportional controller's, from the present state towards where the phase wants the hand: disturbed
execution is corrected in the next step, and a grasp that failed is tried again. Several placements are done one after another, in
the goal's order. It chooses by fixed rules, so that a policy can copy it: the same scene gives the same grasp.

Not here: where things are (vla_rl.simulation.goals), who executes and records the actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vla_rl.simulation.goals import (
    PickAndPlace,
    goal_position,
    grip_position,
    holds,
    is_grasped,
    object_points,
    object_position,
    only_placements,
)

if TYPE_CHECKING:
    from vla_rl.simulation.simulator import Simulator

# of robosuite's OSC_POSE: what an action of 1 asks for
METRES, RADIANS = 0.05, 0.5
POSITION_GAIN, ROTATION_GAIN = 2.0, 1.0
OPEN, CLOSED = -1.0, 1.0
# the hand, metres, from the point between its pads: fingers open by 8 cm, and the palm above them
MAX_GRASP = 0.07  # of an object's width
FINGERS = np.array([[-0.012, -0.05, -0.006], [0.012, 0.05, 0.06]])  # [low, high] x [across, along the fingers, up]
PALM = np.array([[-0.037, -0.108, 0.03], [0.037, 0.108, 0.2]])
RIM_DEPTH, RIM_INSET = 0.018, 0.003  # how far the pads go below a rim, and its middle inside the outer edge
GRASP_DEPTH = 0.03  # at most, below the top of an object: there the palm touches it
FLOOR_GAP = 0.008  # of the pads' middle from the bottom of a flat object
ROOM = 0.002  # metres around the hand that are enough
GOAL_SLACK = 0.015  # of which less is enough where it lets go
REACH = 0.75  # m from the arm's base: beyond, the elbow is soon straight and the arm locked
LIFT = 0.06  # straight up after a grasp
OVER = 0.05  # what a carried thing and the open fingers pass obstacles by
NEAR = 0.11  # aside of the way, where an obstacle counts: half a palm
FUNNEL = 0.035  # aside of the goal, where going down begins
MOVE_STEPS, CLOSE_STEPS, MISS_STEPS, OPEN_STEPS, LEAVE_STEPS = 80, 8, 12, 6, 15


@dataclass(frozen=True)
class Grasp:
    """Where the hand closes, relative to the object's origin."""

    offset: np.ndarray  # float64 [3], metres, world axes
    turn: float  # rad, of the fingers' axis about the vertical from its start


class Expert:
    """Acts in the present episode of a simulator.

    Raises:
        ValueError: the task asks for something else than placements.
    """

    def __init__(self, sim: Simulator):
        self.sim, self.goals = sim, only_placements(sim)
        self.finger_joint = sim.model.joint(sim.robot.gripper.joints[0]).id
        self.reset()

    def reset(self) -> None:
        """To be called when the simulator is at the start of an episode, settled."""
        self.phase, self.count = "reach", 0  # and its steps so far
        self.plan()

    def act(self) -> np.ndarray:
        """The action for the simulator's next step, float64 [7] in -1..1: translation, rotation, gripper (-1 open)."""
        self.count += 1
        target = getattr(self, self.phase)()
        error = (target - grip_position(self.sim)) * POSITION_GAIN / METRES
        turn = self.rotation_error() * ROTATION_GAIN / RADIANS
        gripper = CLOSED if self.phase in ("close", "lift", "place") else OPEN
        return np.concatenate([limit(error), limit(turn), [gripper]])

    def go(self, phase: str) -> np.ndarray:
        self.phase, self.count = phase, 0
        return getattr(self, phase)()

    # Phases: each gives the hand's target, or goes on to another

    def reach(self) -> np.ndarray:
        """Above the grasp, then down a funnel to it."""
        hand, grasp = grip_position(self.sim), self.grasp_position()
        aside = np.linalg.norm((grasp - hand)[:2])
        if aside < 0.01 and abs(hand[2] - grasp[2]) < 0.008:
            return self.go("close")
        if self.count > MOVE_STEPS:  # something holds the hand
            self.start = hand
            return self.go("leave")
        return hand + self.way(hand, hand, grasp, below=0, turned=abs(self.yaw_error()) < 0.3)

    def close(self) -> np.ndarray:
        if self.count > CLOSE_STEPS:
            self.start = grip_position(self.sim)
            return self.go("lift")
        return self.grasp_position()

    def lift(self) -> np.ndarray:
        """Straight up, once the object is not under anything."""
        hand = grip_position(self.sim)
        if self.count > MISS_STEPS and not is_grasped(self.sim, self.goal):
            return self.retry()
        if hand[2] > self.start[2] + LIFT:
            return self.go("place")
        aside = self.start + self.free - hand
        free = np.linalg.norm(aside[:2]) < 0.006 or self.count > MISS_STEPS / 2
        return hand + aside + up(2 * LIFT if free else 0.005)

    def place(self) -> np.ndarray:
        """The object, not the hand, goes above the goal and down a funnel to it."""
        hand, thing, goal = grip_position(self.sim), object_position(self.sim, self.goal), self.release_position()
        if np.linalg.norm(hand - thing) > self.reach_of_grasp + 0.05:
            return self.retry()
        aside = np.linalg.norm((goal - thing)[:2])
        inside = self.goal.relation == "in" and holds(self.sim, self.goal)  # the rim may stop the hand above the floor
        if inside or (aside < 0.012 and thing[2] - goal[2] < 0.008):
            self.start = hand
            return self.go("release")
        if self.count > MOVE_STEPS:
            self.start = hand
            return self.go("leave")
        return hand + self.way(hand, thing, goal, below=hand[2] - thing[2] + self.depth)

    def release(self) -> np.ndarray:
        if self.count > OPEN_STEPS:
            return self.go("leave")
        return self.start + up(0.01)

    def leave(self) -> np.ndarray:
        if self.count > LEAVE_STEPS:
            return self.retry()
        return self.start + up(0.15)

    def retry(self) -> np.ndarray:
        self.plan()
        return self.go("reach")

    # Where

    def plan(self) -> None:
        """Chooses what to place and the grasp, and looks at what is in the way."""
        sim = self.sim
        self.goal = goal = next((goal for goal in self.goals if not holds(sim, goal)), self.goals[-1])
        origin, points, place = object_position(sim, goal), object_points(sim, goal.object), self.release_position()
        self.depth = origin[2] - points[:, 2].min()
        others = {name: object_points(sim, name) for name in sim.env.obj_body_id if name != goal.object}
        self.obstacles = np.concatenate(list(others.values()))  # [P, 3]
        beside = np.concatenate([points for name, points in others.items() if name != bearer(sim, goal)])
        base = sim.data.body("robot0_base").xpos

        def lack(grasp: Grasp) -> float:
            """How many metres of room, at both ends, and of reach are missing."""
            room = clearance(self.obstacles - origin - grasp.offset, grasp.turn)
            room_at_goal = clearance(beside - place - grasp.offset, grasp.turn) + GOAL_SLACK
            reach = np.linalg.norm((origin + grasp.offset - base)[:2])
            return round(max(ROOM - min(room, room_at_goal), 0) + max(reach - REACH, 0), 3)

        self.grasp = min(grasps(points - origin), key=lack)  # the first of equals
        self.free = from_under(self.obstacles - origin, points - origin)
        self.reach_of_grasp = np.linalg.norm(self.grasp.offset)

    def grasp_position(self) -> np.ndarray:
        return object_position(self.sim, self.goal) + self.grasp.offset

    def release_position(self) -> np.ndarray:
        return goal_position(self.sim, self.goal) + up(0.015)

    def way(
        self, hand: np.ndarray, start: np.ndarray, end: np.ndarray, below: float, turned: bool = True
    ) -> np.ndarray:
        """The hand's next move, [3], to take what is at `start` to `end`.

        Up and over what stands within NEAR of the hand's straight way, then down a funnel.

        Args:
            below: how far what moves hangs below the hand.
            turned: whether it may go down.
        """
        ahead = (end - start)[:2]
        distance = np.linalg.norm(ahead)
        direction = ahead / max(distance, 1e-9)
        obstacles = self.obstacles - hand  # [P, 3]
        along = obstacles[:, :2] @ direction  # [P]
        aside = np.linalg.norm(obstacles[:, :2] - np.clip(along, 0, distance)[:, None] * direction, axis=1)
        climb = (obstacles[:, 2] + below + OVER)[aside < NEAR]
        top = max(climb.max(initial=-1), end[2] + LIFT - start[2])
        if distance < FUNNEL:
            into = np.clip((distance - 0.01) / (FUNNEL - 0.01), 0, 1) if turned else 1
            bottom = end[2] - start[2]
            return np.append(ahead, bottom + into * (top - bottom))
        # as it climbs as fast as it goes, this much may be missing at this distance from an obstacle
        missing = (climb - np.maximum(along[aside < NEAR] - NEAR, 0)).max(initial=0)
        slow = np.clip(1 - (missing - 0.01) / 0.03, 0, 1)
        return np.append(slow * ahead * min(1, METRES / POSITION_GAIN / distance), top)

    # How the hand is turned

    def yaw_error(self) -> float:
        """rad, about the vertical; the fingers' axis points to -y at the start of every task."""
        x, y, _ = self.sim.data.xaxis[self.finger_joint]
        error = self.grasp.turn - np.pi / 2 - np.arctan2(y, x)
        return (error + np.pi) % (2 * np.pi) - np.pi

    def rotation_error(self) -> np.ndarray:
        """Rotation vector [3], rad: the palm down, the fingers' axis turned."""
        down = self.sim.data.site_xmat[self.sim.eef_site].reshape(3, 3)[:, 2]
        error = np.cross(down, [0, 0, -1])
        error[2] = self.yaw_error()
        return error


def from_under(obstacles: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How an object of `points` is to be moved sideways, [3], before it can be lifted past `obstacles`; at most 2 cm."""
    radius, top = np.linalg.norm(points[:, :2], axis=1).max() + 0.005, points[:, 2].max()
    above = obstacles[(obstacles[:, 2] > top) & (obstacles[:, 2] < top + LIFT)][:, :2]
    distance = np.linalg.norm(above, axis=1)
    if distance.min(initial=radius) >= radius:
        return np.zeros(3)
    nearest = np.argmin(distance)
    if distance[nearest] < 1e-6:  # straight above: no way out sideways is better than another
        return np.zeros(3)
    return np.append(-above[nearest] / distance[nearest] * min(radius - distance[nearest], 0.02), 0)


def bearer(sim: Simulator, goal: PickAndPlace) -> str:
    """The object or fixture that the goal's target is or belongs to."""
    return goal.target if goal.target in sim.env.obj_body_id else sim.env.object_sites_dict[goal.target].parent_name


def grasps(points: np.ndarray) -> list[Grasp]:
    """Candidates for an object of points [P, 3], relative to its origin; the preferred ones first.

    What is narrow is taken across its middle, what is wide by its rim with one finger inside.
    """
    turns = np.deg2rad([0, 22.5, -22.5, 45, -45, 67.5, -67.5, 90])
    low, high = points.min(0), points.max(0)
    found = []
    for turn in turns:
        axis = np.array([np.sin(turn), -np.cos(turn)])  # of the fingers
        width = np.ptp(points[:, :2] @ axis)
        if width < MAX_GRASP:
            height = max(high[2] - GRASP_DEPTH, low[2] + FLOOR_GAP)
            across = np.array([axis[1], -axis[0]])
            spare = max(np.ptp(points[:, :2] @ across) / 2 - 0.02, 0)
            for shift in (0, -spare, spare) if spare else (0,):
                found.append((width, Grasp(np.append((low + high)[:2] / 2 + shift * across, height), turn)))
    if found:
        narrowest = min(width for width, _ in found)
        return [grasp for width, grasp in found if width < narrowest + 0.01]
    for turn in turns:
        axis = np.array([np.sin(turn), -np.cos(turn)])
        along = points[:, :2] @ axis
        for side, edge in ((-1, along.min()), (1, along.max())):
            offset = (low + high)[:2] / 2 + axis * (edge - side * RIM_INSET - (along.min() + along.max()) / 2)
            found.append((0, Grasp(np.append(offset, high[2] - RIM_DEPTH), turn)))
    return [grasp for _, grasp in found]


def clearance(points: np.ndarray, turn: float) -> float:
    """How far points [P, 3], relative to the open hand, are from it; metres, negative inside."""
    axis = np.array([np.sin(turn), -np.cos(turn)])
    across = np.array([axis[1], -axis[0]])
    own = np.column_stack([points[:, :2] @ across, points[:, :2] @ axis, points[:, 2]])
    outside = [np.maximum(low - own, own - high).max(1) for low, high in (FINGERS, PALM)]
    return float(np.min(outside))


def up(height: float) -> np.ndarray:
    return np.array([0, 0, height])


def limit(vector: np.ndarray) -> np.ndarray:
    """Of the same direction, within -1..1."""
    return vector / max(1.0, np.abs(vector).max())
