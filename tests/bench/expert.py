"""How often the scripted expert solves each task from the benchmark's fixed states: a table, and what failed.

    python tests/bench/expert.py                                  the tasks that demonstrations are for, 50 states, no noise
    python tests/bench/expert.py --tasks libero_goal:8 --noise 0.5 --states 0-9

Without rendering, as the expert sees no images: about 1 s an episode.
"""

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from vla_rl.demonstrations import Pushes
from vla_rl.run.section import parse_indices
from vla_rl.run.task_suites import TASK_SUITES
from vla_rl.simulation.libero_env import REST, build_simulator
from vla_rl.simulation.suites import fixed_state

# the other tasks of libero_goal and libero_10 ask for a drawer, a push, a knob or a door
TASKS = "libero_spatial:0-9 libero_object:0-9 libero_goal:1,2,4,6,8,9 libero_10:0,1,4"


def play(suite: str, task_id: int, states: list[int], noise: float) -> list[int | None]:
    """Steps to success from each state; None for a failure."""
    from vla_rl.simulation.expert import Expert

    sim = build_simulator(suite, task_id, cameras=(), image_size=16, fast=True, cache_gb=3)
    expert, lengths = Expert(sim), []
    for state in states:
        sim.reset(0, fixed_state(suite, task_id, state), render=False)
        for _ in range(10):
            sim.step(REST, render=False)
        expert.reset()
        pushes = Pushes(noise, seed=state)
        limit = TASK_SUITES[suite][1]
        steps = (n for n in range(1, limit + 1) if sim.step(np.clip(expert.act() + pushes.next(), -1, 1), render=False))
        lengths.append(next(steps, None))
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=TASKS.split(), metavar="SUITE:IDS")
    parser.add_argument("--states", type=parse_indices, default="0-49")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    tasks = [(suite, i) for suite, ids in (t.split(":") for t in args.tasks) for i in parse_indices(ids)]
    print("| suite | task | successes | steps: mean, longest | failed states |\n|---|---|---|---|---|", flush=True)
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = [pool.submit(play, suite, i, args.states, args.noise) for suite, i in tasks]
        for (suite, i), run in zip(tasks, runs, strict=True):
            lengths = dict(zip(args.states, run.result(), strict=True))
            won = [n for n in lengths.values() if n is not None]
            lost = [str(state) for state, n in lengths.items() if n is None]
            steps = f"{np.mean(won):.0f}, {max(won)}" if won else "-"
            print(f"| {suite} | {i} | {len(won)} of {len(lengths)} | {steps} | {', '.join(lost)} |", flush=True)


if __name__ == "__main__":
    main()
