"""Success over the fixed states of the policy whose weight change is the mean of several runs', greedy or sampled.

    python docs/experiments/mean.py runs/ppo_seed0 runs/ppo_seed1 runs/ppo_seed2
    python docs/experiments/mean.py runs/ppo_seed0                one run alone: its newest checkpoint
    python docs/experiments/mean.py runs/ppo_seed0 --scale 0.6    its weight change times 0.6
    python docs/experiments/mean.py runs/ppo_seed0 --sampled      at the temperature of training

The mean of k adapters of rank r is an adapter of rank k r: their A below each other, their B beside each other, over k.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file

from vla_rl.evaluation.play import evaluate_policy, evaluation_episodes
from vla_rl.learning.parts import build_policy
from vla_rl.run.checkpoint import list_checkpoints
from vla_rl.run.load_settings import load_config
from vla_rl.simulation.vector_env import make_vector_env


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--scale", type=float, default=1.0, help="of the mean weight change (default: 1)")
    parser.add_argument("--sampled", action="store_true", help="instead of greedy")
    args = parser.parse_args()
    runs = args.runs
    missing = [str(run) for run in runs if not list_checkpoints(run / "checkpoints")]
    if missing:
        raise SystemExit(f"no checkpoint in {', '.join(missing)}")
    adapters = [list_checkpoints(run / "checkpoints")[-1] / "adapter" / "adapter_model.safetensors" for run in runs]
    config = load_config(runs[0] / "config.yaml")
    lora = config.policy.lora
    lora = lora.model_copy(update={"rank": lora.rank * len(runs), "alpha": lora.alpha * len(runs)})
    config = config.model_copy(update={"policy": config.policy.model_copy(update={"lora": lora})})
    policy = build_policy(config)
    saved = [load_file(adapter) for adapter in adapters]
    with torch.no_grad():
        for name, tensor in policy.adapter_tensors().items():
            parts = [tensors[name] for tensors in saved]
            tensor.copy_(torch.cat(parts) if "lora_A" in name else torch.cat(parts, dim=1) * args.scale / len(runs))
    with closing(make_vector_env(config, config.eval.num_envs, evaluation=True)) as envs:
        episodes = evaluation_episodes(config.env.task_ids, range(50))
        temperature = config.rollout.temperature
        results = evaluate_policy(policy, envs, episodes, greedy=not args.sampled, temperature=temperature, seed=0)
    print(f"{sum(r.success for r in results)} of {len(results)}")


if __name__ == "__main__":
    main()
