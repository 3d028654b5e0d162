"""The estimate of --check against a real run of the same settings, one after the other.

    python tests/bench/check.py [--config YAML] [--iterations N] [--json FILE] [section.key=value ...]

Episodes are cut at 40 steps, before one succeeds (that takes 80 on average), since the estimate assumes that each goes to its
step limit. Rollout, update and evaluation of the run are medians without the first of each, which builds the simulators; the
estimate has that in the time to start. Exit status 1 if a figure is more than 25 % off. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.fakes import last_of_each
from vla_rl.check import CHECKS, Visit
from vla_rl.preflight.checklist import lines_of
from vla_rl.preflight.estimate import Estimate, Pieces
from vla_rl.preflight.trial import private_gib
from vla_rl.reports.records import read_metrics
from vla_rl.run.command_line import ROOT, TINY_CONFIG, find_config
from vla_rl.run.load_settings import load_config
from vla_rl.run.settings import Config

SMALL = [
    *("env.max_steps=40", "eval.max_steps=40", "eval.states=0-15", "eval.interval=1", "rollout.n_steps=32"),
    *("algorithm.minibatch_size=128", "algorithm.critic_warmup_iterations=0", "algorithm.wait_for_reward=false"),
    *("logging.progress=false", "logging.wandb=false"),
    "logging.keep_checkpoints=2",  # the first one has no moments of the optimizers yet
]
TOLERANCE = 0.25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--config", default=TINY_CONFIG)
    parser.add_argument("--iterations", type=int, default=4, help="of the real run; the first is not compared")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*last_of_each(*SMALL, *args.overrides), f"run.output_dir={folder}", "run.name=run"]
        config = load_config(find_config(args.config), overrides)
        timesteps = args.iterations * config.rollout.n_steps * config.rollout.num_envs * config.policy.chunk_size
        if config.algorithm.estimator == "grpo":
            timesteps = args.iterations * (config.rollout.n_episodes or config.rollout.num_envs) * config.env.max_steps
        overrides.append(f"run.timesteps={timesteps}")
        expected, pieces = check(load_config(find_config(args.config), overrides))
        real = train(args.config, overrides, Path(folder) / "run")
    figures = compare(expected, pieces, real)
    print(f"{'':24} {'estimate':>10} {'real run':>10} {'ratio':>7}")
    for name, (ours, theirs) in figures.items():
        ratio = ours / theirs
        print(f"{name:24} {ours:10.2f} {theirs:10.2f} {ratio:7.2f}{'' if is_close(ratio) else '   more than 25 % off'}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if all(is_close(ours / theirs) for ours, theirs in figures.values()) else 1


def is_close(ratio: float) -> bool:
    return abs(ratio - 1) <= TOLERANCE


def check(config: Config) -> tuple[Estimate, Pieces]:
    with Visit(config) as visit:
        for result in CHECKS.run(visit):
            print("\n".join(lines_of(result, sys.stdout.encoding)), flush=True)
        if visit.estimate is None:
            raise SystemExit("there is no estimate; mend what is crossed")
        return visit.estimate, visit.pieces


def train(config: str, overrides: list[str], run: Path) -> dict[str, float]:
    """A run by the command line: its own metrics, and what is seen from outside."""
    start, workers_gib = time.perf_counter(), 0.0
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "start_gae_ppo_training.py"), "--config", config, *overrides], cwd=run.parent
    )
    while process.poll() is None:
        time.sleep(0.5)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = map(int, children.read_text().split()) if children.exists() else ()
        workers_gib = max(workers_gib, sum(map(private_gib, pids)))
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}")
    lines = read_metrics(run / "metrics.jsonl")
    updates, evaluations = ([line for line in lines if name in line] for name in ("time/update_s", "time/eval_s"))
    return {
        "total_s": time.perf_counter() - start,
        "workers_gib": workers_gib,
        "rollout_s": statistics.median(line["time/rollout_s"] for line in updates[1:]),
        "update_s": statistics.median(line["time/update_s"] for line in updates[1:]),
        "eval_s": statistics.median(line["time/eval_s"] for line in evaluations[1:]),
        "trainer_gib": updates[-1]["system/peak_memory_gib"],
        "disk_mb": sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 1e6,
    }


def compare(expected: Estimate, pieces: Pieces, real: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Figure -> (estimate, real run)."""
    return {
        "rollout, s": (expected.rollout_s, real["rollout_s"]),
        "update, s": (expected.update_s, real["update_s"]),
        "evaluation, s": (expected.eval_s, real["eval_s"]),
        "whole run, s": (expected.total_s, real["total_s"]),
        "peak of the trainer, GiB": (expected.trainer_peak_gib, real["trainer_gib"]),
        "simulators, GiB": (pieces.workers_gib, real["workers_gib"]),
        "disk, MB": (expected.disk_bytes / 1e6, real["disk_mb"]),
    }


if __name__ == "__main__":
    sys.exit(main())
