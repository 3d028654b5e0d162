"""What a pick-and-place task asks for, read from the goal of its BDDL file, and where things stand towards it.

Positions are float64 [3] in metres, in the world frame. Not here: whether the whole goal holds (the simulator's step says
that), how a hand gets there (vla_rl.simulation.expert).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vla_rl.simulation.simulator import Simulator

BOX, MESH = 6, 7  # mujoco.mjtGeom


@dataclass(frozen=True)
class PickAndPlace:
    """One placement: `object` is to be `relation` ("on" or "in") `target`, an object or a region of one."""

    object: str
    target: str
    relation: str


def placements(sim: Simulator) -> list[PickAndPlace]:
    """Every placement that the task's goal asks for, in the goal's order; empty for "turn on the stove"."""
    goals = [predicate for predicate in sim.env.parsed_problem["goal_state"] if predicate[0] in ("on", "in")]
    return [PickAndPlace(what, target, relation) for relation, what, target in goals if what in sim.env.objects_dict]


def only_placements(sim: Simulator) -> list[PickAndPlace]:
    """The placements that the task's goal asks for, where it asks for nothing else.

    Raises:
        ValueError: it does.
    """
    found, asked = placements(sim), sim.env.parsed_problem["goal_state"]
    if not found or len(found) != len(asked):
        goal = " and ".join(" ".join(predicate) for predicate in asked)
        raise ValueError(
            f"the task {task_name(sim)!r} is not pick-and-place alone: its goal is {goal}; "
            "take one whose goal is to put objects on or in something"
        )
    return found


def holds(sim: Simulator, goal: PickAndPlace) -> bool:
    """Whether LIBERO calls it done; also of an object that is still in the hand."""
    return bool(sim.env._eval_predicate([goal.relation, goal.object, goal.target]))


def task_name(sim: Simulator) -> str:
    return " ".join(sim.env.parsed_problem["language_instruction"])


def object_position(sim: Simulator, goal: PickAndPlace) -> np.ndarray:
    """Of the origin of the object's body, which is what LIBERO's predicates look at."""
    return sim.data.xpos[sim.env.obj_body_id[goal.object]].copy()


def goal_position(sim: Simulator, goal: PickAndPlace) -> np.ndarray:
    """Where `object_position` should end, within some cm: in the middle of the target, with the object's bottom on it."""
    if goal.target in sim.env.obj_body_id:
        place = sim.data.xpos[sim.env.obj_body_id[goal.target]].copy()
    else:
        place = sim.data.site(goal.target).xpos.copy()
    if goal.relation == "on":
        origin, points = object_position(sim, goal), object_points(sim, goal.object)
        place[2] += origin[2] - points[:, 2].min()
    return place


def grip_position(sim: Simulator) -> np.ndarray:
    """Between the finger pads."""
    return sim.data.site_xpos[sim.eef_site].copy()


def is_grasped(sim: Simulator, goal: PickAndPlace) -> bool:
    """Whether both fingers touch the object; of the last forward pass, so step once after `set_state`."""
    return bool(sim.env._check_grasp(sim.robot.gripper, sim.env.objects_dict[goal.object]))


# Shapes


def object_points(sim: Simulator, name: str) -> np.ndarray:
    """Points [P, 3] on an object's or fixture's collision geometry: mesh vertices, and a grid over each box or cylinder."""
    model, root = sim.model, sim.env.obj_body_id[name]
    geoms = [g for g in range(model.ngeom) if model.geom_contype[g] and is_part_of(sim, model.geom_bodyid[g], root)]
    return np.concatenate([geom_points(sim, geom) for geom in geoms])


def is_part_of(sim: Simulator, body: int, root: int) -> bool:
    while body not in (0, root):
        body = sim.model.body_parentid[body]
    return body == root


def geom_points(sim: Simulator, geom: int) -> np.ndarray:
    """Points [P, 3] of a geom, at most GRID apart in a box."""
    model, data, shape, size = sim.model, sim.data, sim.model.geom_type[geom], sim.model.geom_size[geom]
    if shape == MESH:
        mesh = model.geom_dataid[geom]
        start = model.mesh_vertadr[mesh]
        local = model.mesh_vert[start : start + model.mesh_vertnum[mesh]]
    else:
        half = size if shape == BOX else [size[0], size[0], size[1] or size[0]]  # the box around a cylinder or sphere
        axes = [np.linspace(-h, h, 2 + int(2 * h / GRID)) for h in half]
        local = np.stack(np.meshgrid(*axes), -1).reshape(-1, 3)
    return local @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]


GRID = 0.015  # m
