"""Success over the fixed states of the policy whose weight change is the mean of several runs'.

    python docs/experiments/mean.py runs/ppo_seed0 runs/ppo_seed1 runs/ppo_seed2
    python docs/experiments/mean.py runs/ppo_seed0                one run alone: its newest checkpoint
    python docs/experiments/mean.py runs/ppo_seed0 --scale 0.6    its weight change times 0.6
    python docs/experiments/mean.py runs/ppo_seed0 --mode sampled          at the temperature of training
    python docs/experiments/mean.py runs/ppo_seed0 --ema 0.75     of its checkpoints, an exponential moving average

The mean is that of python -m vla_rl.export --average, an adapter of the summed rank.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from vla_rl.evaluation.play import evaluate_policy, evaluation_episodes
from vla_rl.learning.parts import build_policy
from vla_rl.model.adapter import ADAPTER_FILES, read_adapter, write_mean
from vla_rl.run.checkpoint import find_adapter, list_checkpoints, save_tensors
from vla_rl.run.command_line import end_of
from vla_rl.run.load_settings import load_config
from vla_rl.run.section import Mode
from vla_rl.simulation.vector_env import make_vector_env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--scale", type=float, default=1.0, help="of the mean weight change (default: 1)")
    parser.add_argument(
        "--ema", type=float, metavar="BETA", help="of one run: weights beta^i, i = 0 for the newest checkpoint"
    )
    parser.add_argument("--mode", choices=get_args(Mode), default="greedy", help="as eval.modes (default: greedy)")
    parser.add_argument("--temperature", type=float, help="of mean_action and sampled (default: rollout.temperature)")
    args = parser.parse_args()
    if args.ema is not None and len(args.runs) > 1:
        parser.error("--ema is of one run")
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        parser.error(f"--temperature {args.temperature:g}: expected a number above 0")
    sys.exit(end_of(lambda: play(args)))


def play(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = [find_adapter(run, "") for run in args.runs]
        rank = write_mean(found, Path(folder)) if args.ema is None else write_ema(args.runs[0], args.ema, Path(folder))
        config = load_config(args.runs[0] / "config.yaml")
        lora = config.policy.lora
        lora = lora.model_copy(update={"rank": rank, "alpha": lora.alpha / lora.rank * rank})
        policy = config.policy.model_copy(update={"lora": lora, "adapter": folder})
        policy = build_policy(config.model_copy(update={"policy": policy}))
    with torch.no_grad():
        for name, tensor in policy.adapter_tensors().items():
            tensor.mul_(args.scale if "lora_B" in name else 1)
    with closing(make_vector_env(config, config.eval.num_envs, evaluation=True)) as envs:
        episodes = evaluation_episodes(config.env.task_ids, range(50))
        temperature = args.temperature or config.rollout.temperature
        results = evaluate_policy(policy, envs, episodes, mode=args.mode, temperature=temperature, seed=0)
    print(f"{sum(r.success for r in results)} of {len(results)}")


def write_ema(run: Path, beta: float, out: Path) -> int:
    """Writes the moving average of A and B, each by itself, as one that is kept during training; returns the rank."""
    adapters = [read_adapter(folder / "adapter") for folder in reversed(list_checkpoints(run / "checkpoints"))]
    weights = torch.tensor([beta**i for i in range(len(adapters))])
    weights /= weights.sum()
    shutil.copytree(adapters[0].folder, out, dirs_exist_ok=True)
    tensors = {
        name: sum(weight * adapter.tensors[name] for weight, adapter in zip(weights, adapters, strict=True))
        for name in adapters[0].tensors
    }
    save_tensors(tensors, out / ADAPTER_FILES[1], format="pt")
    return adapters[0].rank


if __name__ == "__main__":
    main()
