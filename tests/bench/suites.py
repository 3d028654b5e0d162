"""Whether every task of a suite can be played: it builds, its fixed states fit, it settles, it renders, it is not solved yet.

    python tests/bench/suites.py                                       all of LIBERO-PRO's suites, 10 s a task on a CPU core
    python tests/bench/suites.py --suites libero_goal_task --task-ids 0,7

A row a suite; what is wrong with a task is named in it. Nothing is written but the table.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from vla_rl.run.section import parse_indices
from vla_rl.run.task_suites import BASE_SUITES, TASK_SUITES, check_suite, suite_size
from vla_rl.simulation.libero_env import CAMERAS, REST, build_simulator
from vla_rl.simulation.suites import fixed_states, written_instruction

SETTLED = 0.1  # m/s, of the fastest object after the settle steps


def problems(suite: str, task_id: int) -> list[str]:
    """What is wrong with a task: of all its fixed states, after settling of the first two and the last and two placements."""
    sim, states = build_simulator(suite, task_id, CAMERAS, image_size=64, fast=False), fixed_states(suite, task_id)
    found = []
    if states.shape[1] != 1 + sim.model.nq + sim.model.nv:
        return [f"states of {states.shape[1]} numbers, not {1 + sim.model.nq + sim.model.nv}"]
    if " ".join(sim.env.parsed_problem["language_instruction"]) != written_instruction(suite, task_id):
        found.append("another instruction in the simulator")
    joints = [thing.joints[0] for thing in sim.env.objects_dict.values()]
    last = len(states) - 1
    for start, state in [*enumerate(states), ("placement 1", None), ("placement 2", None)]:
        sim.reset(int(state is None), state, render=False)
        solved = bool(sim.env._check_success())
        if start in (0, 1, last) or state is None:
            solved |= any([sim.step(REST, render=n == 9) for n in range(10)])
            speed = max(np.abs(sim.data.joint(name).qvel[:3]).max() for name in joints)
            found += [f"{start} does not settle"] if not speed < SETTLED else []
            found += [f"{start} renders black"] if sim.images.max(axis=(1, 2, 3)).min() < 50 else []
        found += [f"{start} is solved at its start"] if solved else []
    sim.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--suites", nargs="+", type=check_suite, default=[s for s in TASK_SUITES if s not in BASE_SUITES]
    )
    parser.add_argument("--task-ids", type=parse_indices, help="default all of a suite")
    args = parser.parse_args()
    print("| suite | tasks that can be played | problems |\n|---|---|---|", flush=True)
    for suite in args.suites:
        tasks = args.task_ids or range(suite_size(suite)[0])
        found = {task_id: problems(suite, task_id) for task_id in tasks}
        wrong = "; ".join(f"task {i}: {', '.join(what)}" for i, what in found.items() if what)
        print(f"| {suite} | {sum(not what for what in found.values())} of {len(found)} | {wrong} |", flush=True)


if __name__ == "__main__":
    main()
