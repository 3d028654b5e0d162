"""A run in one process and in several, one after the other: seconds of a rollout and of an update, and what is exchanged.

    python tests/bench/scaling.py [--processes 2] [--config YAML] [--iterations N] [--json FILE] [section.key=value ...]

The settings are of all processes together, so each has a part of the environments, of the workers and of a minibatch. On the CPU a
process has one thread of torch. Rollout and update are medians without the first iteration. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from OpenVLA_PPO import OpenVLAPPO
from tests.fakes import last_of_each
from vla_rl.learning.parts import build_trainer
from vla_rl.reports.metrics import SilentLogger
from vla_rl.reports.records import read_metrics
from vla_rl.run.command_line import ROOT, TINY_CONFIG, find_config
from vla_rl.run.load_settings import load_config

SMALL = [
    *(
        "run.torch_threads=1",
        "env.num_workers=2",
        "rollout.n_steps=32",
        "eval.interval=0",
        "eval.states=0-1",
        "eval.video=false",
    ),
    *(
        "algorithm.critic_warmup_iterations=0",
        "algorithm.wait_for_reward=false",
        "logging.progress=false",
        "logging.wandb=false",
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--config", default=TINY_CONFIG)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=5, help="the first is not counted")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--gather-mb", type=int, help=argparse.SUPPRESS)  # what the processes of `gathering` are told
    args = parser.parse_intermixed_args()
    if args.gather_mb is not None:
        return gather(args.gather_mb)
    overrides = last_of_each(*SMALL, *args.overrides)
    config = load_config(find_config(args.config), overrides)
    decisions = config.rollout.n_steps * config.rollout.num_envs
    overrides.append(f"run.timesteps={args.iterations * decisions * config.policy.chunk_size * 9 // 10}")
    figures = exchanged(config) | gathering(args.processes)
    for count in (1, args.processes):
        for name, seconds in measure(args.config, overrides, count).items():
            figures[f"{name}, {count} process{'es' if count > 1 else ''}"] = seconds
    for name in ("rollout, s", "update, s"):
        one, several = (figures[f"{name}, {count} process{'es' if count > 1 else ''}"] for count in (1, args.processes))
        figures[f"{name}: one / {args.processes}"] = one / several
    for name, value in figures.items():
        print(f"{name:50} {value:12.3f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def exchanged(config) -> dict[str, float]:
    """MB that a process gives the others: its rows of a rollout once an iteration, its gradients each step."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as cleanup:
        trainer = build_trainer(OpenVLAPPO, config, SilentLogger(Path(folder)), cleanup)
        size = len(pickle.dumps(trainer.play()))
        gradients = 4 * sum(p.numel() for p in trainer.actor_parameters + trainer.critic_parameters)
    rows = config.rollout.n_steps * config.rollout.num_envs
    return {
        "rollout of all, MB": size / 1e6,
        "row of it, KB": size / rows / 1e3,
        "gradients, MB a step": gradients / 1e6,
    }


GATHERED_MB = 200


def gathering(processes: int) -> dict[str, float]:
    """How fast rollouts are gathered."""
    command = [sys.executable, *launcher(processes), __file__, "--gather-mb", str(GATHERED_MB)]
    said = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    return {f"gathering {GATHERED_MB} MB of each of {processes}, s": float(said.split()[-1])}


def gather(megabytes: int) -> int:
    from vla_rl.run.distributed import joined

    with joined("cpu") as ranks:
        value, seconds = bytes(megabytes * 10**6), []
        for _ in range(4):
            ranks.any(False)
            start = time.perf_counter()
            ranks.gather(value)
            seconds.append(time.perf_counter() - start)
        if ranks.first:
            print(statistics.median(seconds[1:]))
    return 0


def launcher(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []


def measure(config: str, overrides: list[str], processes: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", config, *overrides, f"run.output_dir={folder}", "run.name=run"]
        subprocess.run(
            [sys.executable, *launcher(processes), str(ROOT / "start_gae_ppo_training.py"), *arguments],
            check=True,
            cwd=ROOT,
        )
        lines = [line for line in read_metrics(Path(folder) / "run" / "metrics.jsonl") if "time/update_s" in line]
    return {
        f"{part}, s": statistics.median(line[f"time/{part}_s"] for line in lines[1:]) for part in ("rollout", "update")
    }


if __name__ == "__main__":
    sys.exit(main())
