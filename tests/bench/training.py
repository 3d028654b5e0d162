"""Where the time of a training goes: simulator, rendering, policy, update; and the memory it takes.

    python tests/bench/training.py [--config YAML] [--rollouts N] [--wait SECONDS] [--json FILE] [section.key=value ...]

Measures the real trainer on the real simulator. Shares of a rollout are of the wall clock of the main process: waiting for
the simulators (split into physics and rendering by timing one environment alone), the policy's forward and the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from OpenVLA_PPO import OpenVLAPPO
from vla_rl.learning.memory import fit_to_card
from vla_rl.learning.parts import build_policy, build_value_head
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run.command_line import find_config
from vla_rl.run.load_settings import load_config
from vla_rl.run.progress import peak_memory_gib
from vla_rl.run.settings import Config
from vla_rl.simulation.suites import task_languages
from vla_rl.simulation.vector_env import LiberoVectorEnv, make_vector_env
from vla_rl.types import Episode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--config", default="configs/tiny_gae_ppo.yaml")
    parser.add_argument("--rollouts", type=int, default=3, help="rollouts timed, after one that is not")
    parser.add_argument(
        "--wait", type=float, default=0, help="seconds a row that the policy also sleeps, as if it were on a GPU"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_intermixed_args()
    flags = {"logging.progress": False, "algorithm.wait_for_reward": False}  # an update has all its steps
    config = load_config(find_config(args.config), args.overrides, flags)
    figures = measure_simulator(config) | measure_training(config, args.rollouts, args.wait)
    waiting = figures.pop("simulator_share")
    physics = figures["physics_share_of_a_chunk"]
    figures |= {"share_physics": waiting * physics, "share_rendering": waiting * (1 - physics)}
    figures["share_other"] = 1 - waiting - figures["share_policy"]
    print(
        f"{args.config}, {config.rollout.num_envs} environments, render {config.env.render}, overlap {config.rollout.overlap}, {os.cpu_count()} CPUs"
    )
    for name, value in figures.items():
        text = f"{value:.1%}" if "share" in name else f"{value:.2f}"
        print(f"  {name:<28} {text}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure_simulator(config: Config, chunks: int = 12) -> dict[str, float]:
    """Seconds of a simulator alone, and the share of a chunk in its steps, the rest being its one image; one worker.

    A chunk of C actions is C steps and one image; a chunk of 1 is one step and one image. From the two times follow both.
    """
    size = config.policy.chunk_size
    if size == 1:
        raise SystemExit("policy.chunk_size=1: a chunk has one step and one image, whose times cannot be told apart")
    times, figures = {}, {}
    for chunk_size in (1, size):
        changed = config.model_copy(update={"policy": config.policy.model_copy(update={"chunk_size": chunk_size})})
        envs = make_vector_env(changed, 1)
        for seed, name in enumerate(("seconds_to_build", "seconds_of_a_reset")):  # the first builds the simulator
            start = time.perf_counter()
            envs.reset(options={"episodes": {0: Episode(config.env.task_ids[0], None, seed=seed)}})
            figures[name] = time.perf_counter() - start
        actions = np.zeros(envs.action_space.shape, dtype=np.float32)
        envs.step(actions)
        start = time.perf_counter()
        for _ in range(chunks):
            envs.step(actions)
        times[chunk_size] = (time.perf_counter() - start) / chunks
        envs.close()
    step = (times[size] - times[1]) / (size - 1)
    return figures | {"seconds_of_a_chunk": times[size], "physics_share_of_a_chunk": step * size / times[size]}


def measure_training(config: Config, rollouts: int, wait: float) -> dict[str, float]:
    policy = build_policy(config)
    act, seconds_in_policy = policy.act, []

    def timed_act(*args, **kwargs):
        start = time.perf_counter()
        output = act(*args, **kwargs)
        time.sleep(wait * len(output.inputs))
        seconds_in_policy.append(time.perf_counter() - start)
        return output

    policy.act = timed_act
    overlap, image_transform = config.rollout.overlap, policy.processor.image_transform
    envs = make_vector_env(config, config.rollout.num_envs, overlap=overlap, image_transform=image_transform)
    seconds_in_simulator = time_waiting(envs)
    with tempfile.TemporaryDirectory() as folder:
        head = build_value_head(config, policy.hidden_size)
        trainer = OpenVLAPPO(config, policy, head, envs, None, MetricsLogger(Path(folder), config))
        languages = task_languages(config.env.task_suite)
        fit_to_card(trainer, [languages[task_id] for task_id in config.env.task_ids])
        trainer.collect_rollout()  # builds the simulators
        seconds_in_policy.clear()
        seconds_in_simulator.clear()
        steps, rows, rollout_s, update_s = 0, 0, 0.0, 0.0
        for _ in range(rollouts):
            start = time.perf_counter()
            rollout, metrics = trainer.collect_rollout()
            middle = time.perf_counter()
            trainer.update(trainer.compute_advantages(rollout)[0])
            rollout_s, update_s = rollout_s + middle - start, update_s + time.perf_counter() - middle
            steps += metrics["rollout/env_steps"]
            rows += len(rollout.rows("steps")) * config.algorithm.n_epochs
        workers_gib = sum(peak_resident_gib(process.pid) for process in envs.processes)
        envs.close()
    return {
        "env_steps_per_s": steps / rollout_s,
        "simulator_share": sum(seconds_in_simulator) / rollout_s,
        "share_policy": sum(seconds_in_policy) / rollout_s,
        "update_samples_per_s": rows / update_s,
        "peak_memory_trainer_gib": peak_memory_gib(torch.device(config.run.device)),
        "peak_memory_workers_gib": workers_gib,
    }


def time_waiting(envs: LiberoVectorEnv) -> list[float]:
    """Seconds of every wait for the simulators from now on."""
    seconds: list[float] = []
    for name in ("step_wait", "reset"):
        method = getattr(envs, name)

        def timed(*args, method=method, **kwargs):
            start = time.perf_counter()
            result = method(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            return result

        setattr(envs, name, timed)
    return seconds


def peak_resident_gib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


if __name__ == "__main__":
    main()
