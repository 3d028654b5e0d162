"""PPO and GRPO on a task of two placements, libero_10 0, from the same fine-tuned start.

    python docs/experiments/long.py                  demonstrations, fine-tuning, success of the start
    python docs/experiments/run.py long_ppo long_grpo
    python docs/experiments/long.py halves runs/long_ppo_seed1 [--mode sampled]      which objects are placed, over the 50 fixed states

What was found: docs/experiments.md, "Two placements in one task".
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from steps import REPOSITORY, Steps, run_steps

from vla_rl.evaluation.play import evaluation_episodes
from vla_rl.learning.parts import build_policy
from vla_rl.run.checkpoint import find_adapter
from vla_rl.run.command_line import end_of
from vla_rl.run.load_settings import load_config
from vla_rl.run.section import Mode
from vla_rl.simulation.goals import holds, only_placements
from vla_rl.simulation.libero_env import LiberoEnv
from vla_rl.types import Episode, Observation

MODEL = "runs/long_sft/model"
STEPS: Steps = {
    "demonstrations": (
        "demonstrations/long.hdf5",
        "-m vla_rl.demonstrations --task-suite libero_10 --task-ids 0 --episodes 100 --num-images 1 --render fast --no-progress "
        "--out demonstrations/long.hdf5",
    ),
    "sft": (
        MODEL,
        "-m vla_rl.sft --config configs/tiny_sft.yaml run.name=long_sft policy.checkpoint=tiny-openvla "
        "data.files=[demonstrations/long.hdf5] data.name=libero_10_no_noops training.steps=3000 "
        "run.torch_threads=2 logging.progress=false",
    ),
    "evaluate_start": (
        "runs/long_start/results.json",
        f"-m vla_rl.evaluate --checkpoint {MODEL} --task-suite libero_10 --task-ids 0 --videos none --no-progress eval.num_envs=8 "
        "env.num_workers=2 --modes greedy mean_action sampled --out runs/long_start",
    ),
}


def halves(args: argparse.Namespace) -> None:
    """Plays each fixed state, and looks after each decision at which placements hold."""
    overrides = [f"policy.checkpoint={MODEL}", "env.task_suite=libero_10", "run.torch_threads=1"]
    overrides += [] if args.run is None else [f"policy.adapter={find_adapter(args.run, '')}"]
    config = load_config(REPOSITORY / "configs/tiny_gae_ppo.yaml", overrides)
    policy = build_policy(config)
    shown = {"num_images": config.policy.num_images, "image_size": config.env.image_size, "render": config.eval.render}
    with closing(LiberoEnv("libero_10", chunk_size=config.policy.chunk_size, **shown)) as env:
        placed = [play(env, policy, episode, args.mode) for episode in evaluation_episodes([0], range(args.states))]
    first, both = sum(any(held) for held in placed), sum(all(held) for held in placed)
    print(f"one object placed at some time: {first}, both in the end: {both}, of {len(placed)}")


def play(env: LiberoEnv, policy, episode: Episode, mode: Mode) -> list[bool]:
    """Which placements held after some decision; all after a success."""
    obs, _ = env.reset(options={"episode": episode})
    goals, generator = only_placements(env.simulator), torch.Generator().manual_seed(episode.initial_state)
    held, over = [False] * len(goals), False
    while not over:
        seen = Observation(obs["images"][None], obs["proprio"][None], (obs["instruction"],))
        actions = policy.act(seen, mode=mode, generator=[generator]).actions[0]
        obs, _, terminated, truncated, _ = env.step(actions)
        held = [before or holds(env.simulator, goal) for before, goal in zip(held, goals, strict=True)]
        over = terminated or truncated
    return [True] * len(goals) if terminated else held


def main() -> int:
    if sys.argv[1:2] != ["halves"]:
        return run_steps(__doc__, STEPS)
    parser = argparse.ArgumentParser(prog="long.py halves")
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="without one, the start")
    parser.add_argument("--states", type=int, default=50)
    parser.add_argument("--mode", choices=get_args(Mode), default="greedy", help="at temperature 1, if that matters")
    return end_of(lambda: halves(parser.parse_args(sys.argv[2:])))


if __name__ == "__main__":
    sys.exit(main())
