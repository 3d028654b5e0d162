"""From an L1 head to PPO at the small size, end to end on the real simulator: the figures of docs/l1.md.

    python docs/experiments/l1.py                       all steps, one after another; what is there is not made again
    python docs/experiments/l1.py --steps warmstart     some of them
    python docs/experiments/l1.py --print               only the commands

Step `start` takes tiny-openvla and gives its LM head the action rows of tiny-openvla-random, so that its token head knows
nothing, as that of an official L1 checkpoint; the rest are commands that anybody types.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from steps import run_steps

START, L1, WARM = "runs/l1_start", "runs/l1_sft/model", "runs/l1_warmstart/model"
SUITE = "--task-suite libero_spatial --task-ids 0 --videos none --no-progress eval.num_envs=4 run.torch_threads=1"

# step -> what it leaves, its command
COMMANDS: dict[str, tuple[str, str]] = {
    "demonstrations": (
        "demonstrations/l1.hdf5",
        "-m vla_rl.demonstrations --task-suite libero_spatial --task-ids 0 --episodes 60 --num-images 1 --render fast "
        "--no-progress --out demonstrations/l1.hdf5",
    ),
    "sft": (
        L1,
        f"-m vla_rl.sft --config configs/tiny_sft.yaml run.name=l1_sft policy.checkpoint={START} data.files=[demonstrations/l1.hdf5] "
        "training.head=l1 training.label_sigma=0 training.value_coef=1 training.steps=400 training.warmup_steps=40 training.micro_batch_size=8 "
        "training.evaluation_interval=100 optimizer.learning_rate=5e-4 run.torch_threads=1 logging.progress=false",
    ),
    "evaluate_l1": (
        "runs/l1_eval_l1/results.json",
        f"-m vla_rl.evaluate --checkpoint {L1} {SUITE} --out runs/l1_eval_l1",
    ),
    "evaluate_tokens": (
        "runs/l1_eval_tokens/results.json",
        f"-m vla_rl.evaluate --checkpoint {L1} {SUITE} --modes greedy --episodes 10 --out runs/l1_eval_tokens policy.head=tokens "
        "policy.as_trained=false",
    ),
    "warmstart": (
        WARM,
        f"-m vla_rl.warmstart --config configs/tiny_warmstart.yaml --checkpoint {L1} run.name=l1_warmstart run.torch_threads=1 "
        "logging.progress=false",
    ),
    "evaluate_warm": (
        "runs/l1_eval_warm/results.json",
        f"-m vla_rl.evaluate --checkpoint {WARM} {SUITE} --out runs/l1_eval_warm",
    ),
    "ppo": (
        "runs/l1_ppo/videos",
        f"start_gae_ppo_training.py --config configs/tiny_gae_ppo.yaml --checkpoint {WARM} --no-wandb --timesteps 40000 run.name=l1_ppo "
        "eval.interval=0 run.torch_threads=1 logging.progress=false",
    ),
    "evaluate_ppo": (
        "runs/l1_eval_ppo/results.json",
        f"-m vla_rl.evaluate --run runs/l1_ppo {SUITE} --states 0-49 --modes greedy sampled --out runs/l1_eval_ppo "
        "--baseline runs/l1_eval_warm/results.json",
    ),
}


def make_start(folder: Path) -> None:
    from vla_rl.model.checkpoint_folder import save_checkpoint
    from vla_rl.model.find_checkpoint import check_checkpoint
    from vla_rl.model.prismatic import load_network

    tiny, random = check_checkpoint("tiny-openvla", True), check_checkpoint("tiny-openvla-random", True)
    network, other = load_network(tiny, use_proprio=True), load_network(random, use_proprio=True)
    last = network.config.vocab_size
    rows = slice(last - network.config.num_action_ids, last)
    network.language_model.lm_head.weight[rows] = other.language_model.lm_head.weight[rows]
    save_checkpoint(folder, network.named_parameters(), tiny, network.proprio_file)


if __name__ == "__main__":
    raise SystemExit(run_steps(__doc__, {"start": (START, make_start), **COMMANDS}))
