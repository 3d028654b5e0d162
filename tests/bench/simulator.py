"""How fast LIBERO runs here against stock LIBERO, both in turn on the same machine.

    python tests/bench/simulator.py [--suite S] [--task-id I] [--rounds R] [--workers 1 2 4] [--ours] [--json FILE]

Stock is OffScreenRenderEnv in LIBERO's own SubprocVectorEnv as the official OpenVLA evaluation runs it: both default
cameras rendered in every step at 256 pixels, a hard reset an episode. A second column gives stock our cameras. Each
measurement runs in a fresh process; figures are medians over the rounds. "Fast" is render: fast, "fastest" physics: fast too; the floor is what MuJoCo alone takes: one mj_step
a sub-step, and one rendering.

An episode is a reset, 10 settle steps and 110 steps in chunks of 8 with random actions; each from another fixed state.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vla_rl.simulation import suites
from vla_rl.simulation.libero_env import CAMERAS, REST, build_simulator
from vla_rl.simulation.libraries import prepare_simulator
from vla_rl.simulation.suites import fixed_state
from vla_rl.simulation.vector_env import LiberoVectorEnv
from vla_rl.types import Episode

CHUNK, STEPS, SETTLE = 8, 110, 10
KINDS = {"exact": ("exact", "exact"), "fast": ("fast", "exact"), "fastest": ("fast", "fast")}  # render, physics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--task-id", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ours", action="store_true", help="without stock and memory, which take most of the time")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, *rest = json.loads(args.measure)
        print(json.dumps(MEASUREMENTS[name](args.suite, args.task_id, *rest)))
        return
    figures = measure_all(args)
    print(f"{args.suite} task {args.task_id}, {os.cpu_count()} CPUs, median of {args.rounds} rounds")
    print_table(figures, args.workers)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure_all(args: argparse.Namespace) -> dict[str, float]:
    """Every measurement in turn, round after round -> "measurement/figure" -> median."""
    one, two = [CAMERAS[0]], list(CAMERAS)
    measurements: dict[str, list] = {"floor": ["floor"]}
    for label, cameras, size in (("none", [], 0), ("one128", one, 128), ("two256", two, 256)):
        measurements[f"stock_{label}"] = ["stock", cameras, size]
        for kind in KINDS if cameras else ("exact", "fastest"):
            measurements[f"{kind}_{label}"] = ["ours", cameras, size, *KINDS[kind]]
    for workers in args.workers:
        measurements[f"stock_episodes{workers}"] = ["stock_episodes", two, 256, workers]
        measurements[f"equal_episodes{workers}"] = ["stock_episodes", one, 128, workers]
        for kind in KINDS:
            measurements[f"{kind}_episodes{workers}"] = ["episodes", one, 128, *KINDS[kind], workers]
    measurements |= {f"memory{tasks}": ["memory", tasks] for tasks in (1, 4, 10)}
    if args.ours:
        measurements = {k: v for k, v in measurements.items() if not k.startswith(("stock", "equal", "memory"))}
    results: dict[str, list[float]] = {}
    for number in range(args.rounds):
        for name, measurement in measurements.items():
            print(f"round {number + 1}/{args.rounds}: {name}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--suite", args.suite, "--task-id", str(args.task_id)]
            done = subprocess.run([*command, "--measure", json.dumps(measurement)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr}")
            for figure, value in json.loads(done.stdout.splitlines()[-1]).items():
                results.setdefault(f"{name}/{figure}", []).append(value)
    return {name: statistics.median(values) for name, values in results.items()}


def print_table(figures: dict[str, float], workers: list[int]) -> None:
    def row(name: str, unit: str, figure: str, *keys: str, higher: bool = False) -> None:
        """keys: stock as evaluated, stock with our cameras, exact, fast, fastest, floor; "" where there is none."""
        values = [figures.get(f"{key}/{figure}") for key in keys]
        cells = ["-" if value is None else f"{value:.4g}" for value in values]
        for ours in values[2:5]:
            for stock in values[:2]:
                known = ours is not None and stock is not None
                cells.append(f"{(ours / stock if higher else stock / ours):.1f}x" if known else "-")
        print("| " + " | ".join([f"{name}, {unit}", *cells]) + " |")

    ratios = " | ".join(f"{kind}: stock | our cameras" for kind in KINDS)
    print(f"| | stock | stock, our cameras | {' | '.join(KINDS)} | floor | {ratios} |")
    print("|" + "---|" * 13)
    keys = "", "stock_none", "exact_none", "", "fastest_none", "floor"
    row("control step, no camera", "ms", "step_ms", *keys)
    row("control steps, no camera", "1/s", "steps_per_s", *keys, higher=True)
    for label, text in (("one128", "one 128 px camera"), ("two256", "two 256 px cameras")):
        keys = "stock_two256", f"stock_{label}", *(f"{kind}_{label}" for kind in KINDS), ""
        row(f"control steps, {text} a decision", "1/s", "steps_per_s", *keys, higher=True)
    keys = "stock_two256", "stock_one128", *(f"{kind}_one128" for kind in KINDS), ""
    row("reset, without settling", "ms", "reset_ms", *keys)
    row("construct", "s", "construct_s", *keys)
    row("construct, model in the cache", "s", "construct_cached_s", "", "", *keys[2:])
    row("memory of the first environment", "GiB", "memory_gib", *keys)
    for count in workers:
        keys = [f"{kind}_episodes{count}" for kind in ("stock", "equal", *KINDS)]
        row(f"whole episodes, {count} workers", "steps/s", "steps_per_s", *keys, "", higher=True)
    for name in ("exact", "fast"):
        print(f"memory of one more environment in a worker ({name}), MiB: {figures[f'{name}_one128/more_mib']:.2f}")
    for tasks in (1, 4, 10) if "memory1/gib" in figures else ():
        print(f"memory of 16 environments, {tasks} tasks, 2 workers (exact), GiB: {figures[f'memory{tasks}/gib']:.1f}")
    for name in ("render_exact_ms", "render_fast_ms"):
        print(f"floor, {name.split('_')[1]} rendering of 128 px by MuJoCo: {figures[f'floor/{name}']:.1f} ms; ", end="")
        ours = figures[f"{name.split('_')[1]}_one128/render_ms"]
        print(f"ours {ours:.1f} ms")


# ------------------------------------------------------------------------------------ measurements, each in a process


def actions(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (STEPS, 7))


def seconds(function, times: int = 1) -> float:
    """Median seconds of a call."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def resident_gib(pid: int | str = "self") -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 2**20


def make_stock(suite: str, task_id: int, cameras: list[str], size: int):
    prepare_simulator()
    from libero.libero.envs.env_wrapper import ControlEnv  # OffScreenRenderEnv is this with cameras

    return ControlEnv(
        bddl_file_name=suites.load_benchmark(suite).get_task_bddl_file_path(task_id),
        has_offscreen_renderer=bool(cameras),
        use_camera_obs=bool(cameras),
        camera_names=cameras or ["agentview"],
        camera_heights=size or 128,
        camera_widths=size or 128,
    )


def stock(suite: str, task_id: int, cameras: list[str], size: int) -> dict[str, float]:
    """One stock environment in this process."""
    prepare_simulator()
    from libero.libero import envs  # noqa: F401 (imports do not count)

    before = resident_gib()
    kept = []
    construct_s = seconds(lambda: kept.append(make_stock(suite, task_id, cameras, size)))
    env = kept[0]
    states = suites.load_benchmark(suite).get_task_init_states(task_id)

    def reset():
        env.seed(0)
        env.reset()
        env.set_init_state(states[0])

    reset_s = seconds(reset, times=2)
    for _ in range(SETTLE):
        env.step(REST.tolist())
    steps = actions()[: 6 * CHUNK].tolist()
    step_s = seconds(lambda: [env.step(action) for action in steps]) / len(steps)
    memory_gib = resident_gib() - before
    env.close()
    return {
        "construct_s": construct_s,
        "reset_ms": reset_s * 1e3,
        "step_ms": step_s * 1e3,
        "steps_per_s": 1 / step_s,
        "memory_gib": memory_gib,
    }


def ours(suite: str, task_id: int, cameras: list[str], size: int, render: str, physics: str) -> dict[str, float]:
    """One Simulator in this process."""
    prepare_simulator()
    import robosuite  # noqa: F401 (imports do not count)

    from vla_rl.simulation import simulator  # noqa: F401

    before = resident_gib()
    kept = []
    build = partial(build_simulator, suite, task_id, cameras, size or 16, render == "fast", physics)
    construct_s = seconds(lambda: kept.append(build()))
    sim = kept[0]
    state = fixed_state(suite, task_id, 0)
    sim.reset(0, state, render=False)
    reset_s = seconds(lambda: sim.reset(0, state, render=False), times=20)
    for _ in range(SETTLE):
        sim.step(REST, render=False)
    steps = actions()[: 6 * CHUNK]
    step_s = seconds(lambda: [sim.step(a, render=i % CHUNK == CHUNK - 1) for i, a in enumerate(steps)]) / len(steps)
    figures = {
        "construct_s": construct_s,
        "reset_ms": reset_s * 1e3,
        "step_ms": step_s * 1e3,
        "steps_per_s": 1 / step_s,
        "memory_gib": resident_gib() - before,
        "more_mib": state_mib(sim),
    }
    if cameras:
        figures["render_ms"] = seconds(lambda: sim.renderer.render(cameras[0]), times=10) * 1e3
    sim.close()
    build(cache_gb=3).close()
    figures["construct_cached_s"] = seconds(lambda: build(cache_gb=3).close())
    return figures


def state_mib(sim) -> float:
    """What an environment that shares a simulator keeps: a state with its images, and the observation."""
    state = sim.state()
    arrays = [*state.arrays.values(), state.images, state.images]
    return sum(array.nbytes for array in arrays) / 2**20


def floor(suite: str, task_id: int) -> dict[str, float]:
    """MuJoCo alone, in the state after the settle steps."""
    figures = {}
    for render in ("exact", "fast"):
        sim = build_simulator(suite, task_id, [CAMERAS[0]], 128, render == "fast", cache_gb=3)
        import mujoco

        sim.reset(0, fixed_state(suite, task_id, 0), render=False)
        for _ in range(SETTLE):
            sim.step(REST, render=False)
        sim.renderer.culling.possible = False
        figures[f"render_{render}_ms"] = seconds(lambda: sim.renderer.render(CAMERAS[0]), times=10) * 1e3  # noqa: B023
        step_s = seconds(lambda: [mujoco.mj_step(sim.model, sim.data) for _ in range(sim.substeps)], times=20)  # noqa: B023
        sim.close()
    return figures | {"step_ms": step_s * 1e3, "steps_per_s": 1 / step_s}


def stock_episodes(suite: str, task_id: int, cameras: list[str], size: int, workers: int) -> dict[str, float]:
    """A whole episode of each of `workers` stock environments; building them does not count."""
    from libero.libero.envs import SubprocVectorEnv

    envs = SubprocVectorEnv([partial(make_stock, suite, task_id, cameras, size)] * workers)
    states = suites.load_benchmark(suite).get_task_init_states(task_id)
    envs.step(np.tile(REST, (workers, 1)))  # waits until they are built

    def episode():
        envs.seed(0)
        envs.reset()
        envs.set_init_state([states[i] for i in range(workers)])
        for action in [*[REST] * SETTLE, *actions()]:
            envs.step(np.tile(action, (workers, 1)))

    taken = seconds(episode)
    envs.close()
    return {"seconds": taken, "steps_per_s": workers * STEPS / taken}


def episodes(
    suite: str, task_id: int, cameras: list[str], size: int, render: str, physics: str, workers: int
) -> dict[str, float]:
    """The same with LiberoVectorEnv, one environment a worker."""
    kwargs = {
        "task_suite": suite,
        "chunk_size": CHUNK,
        "num_images": len(cameras),
        "image_size": size,
        "render": render,
        "physics": physics,
    }
    envs = LiberoVectorEnv(kwargs | {"max_steps": STEPS}, workers, workers, cache_gb=3)
    envs.reset(options={"episodes": {i: Episode(task_id, 40 + i, 0) for i in range(workers)}})
    decisions = -(-STEPS // CHUNK)
    chunks = np.resize(actions(), (decisions, CHUNK, 7)).astype(np.float32)  # the last one is cut by max_steps

    def episode():
        envs.reset(options={"episodes": {i: Episode(task_id, i, 0) for i in range(workers)}})
        executed = sum(envs.step(np.tile(chunk, (workers, 1, 1)))[4]["steps"].sum() for chunk in chunks)
        assert executed == workers * STEPS, f"{executed} steps: an episode ended early"

    taken = seconds(episode)
    envs.close()
    return {"seconds": taken, "steps_per_s": workers * STEPS / taken}


def memory(suite: str, task_id: int, tasks: int) -> dict[str, float]:
    """Of 16 environments in 2 workers that play the suite's first tasks, two 256 px cameras, exact, after a chunk."""
    kwargs = {"task_suite": suite, "chunk_size": CHUNK, "num_images": 2, "image_size": 256}
    envs = LiberoVectorEnv(kwargs, 16, 2)
    envs.reset(options={"episodes": {i: Episode(i % tasks, i, 0) for i in range(16)}})
    envs.step(np.resize(actions(), (16, CHUNK, 7)).astype(np.float32))
    total = sum(resident_gib(process.pid) for process in envs.processes)
    envs.close()
    return {"gib": total}


MEASUREMENTS = {f.__name__: f for f in (stock, ours, floor, stock_episodes, episodes, memory)}

if __name__ == "__main__":
    main()
