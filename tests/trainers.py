"""Trainers on small environments and policies, that several test files share."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from OpenVLA_PPO import OpenVLAPPO
from tests.fakes import CHUNK, FakePolicy, make_envs
from vla_rl.model.value_head import ValueHead
from vla_rl.reports.metrics import MetricsLogger, SilentLogger
from vla_rl.run.distributed import ONE, share_of
from vla_rl.run.load_settings import config_from_dict

SETTINGS = {
    "run": {"timesteps": 3 * 4 * 8 * CHUNK, "seed": 3, "device": "cpu"},  # three iterations
    "policy": {"dtype": "float32", "chunk_size": CHUNK},
    "value_head": {"hidden_sizes": [32]},
    "rollout": {"num_envs": 4, "n_steps": 8, "group_size": 4, "n_episodes": 8},
    # whether a rollout this small has a success is chance
    "algorithm": {"n_epochs": 2, "minibatch_size": 16, "micro_batch_size": 8, "wait_for_reward": False},
    "actor": {"learning_rate": 0.01},
    "critic": {"learning_rate": 0.003},
    "eval": {"interval": 0, "states": "0-3", "num_envs": 2, "video": False},
    "env": {},
    "distributed": {},
    "logging": {"checkpoint_interval": 1, "keep_checkpoints": 10, "progress": False},
}


def settings(**changes):
    """SETTINGS with changes such as algorithm={"n_epochs": 1}."""
    return config_from_dict(
        {section: values | changes.get(section, {}) for section, values in SETTINGS.items()}, "the test"
    )


def make_trainer(
    folder: Path,
    policy=None,
    evaluate=False,
    max_steps=3 * CHUNK,
    needed=3,
    policy_settings=None,
    report=False,
    ranks=ONE,
    **changes,
):
    """report: also write report.html, which takes half a second each time."""
    config = settings(policy=policy_settings or {}, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    policy = policy or FakePolicy()
    generator = torch.Generator().manual_seed(config.run.seed)
    head = None
    if config.algorithm.estimator == "gae":
        head = ValueHead(policy.hidden_size, config.value_head.hidden_sizes, generator)
    # what is drawn does not hang on how long it takes
    logger = MetricsLogger(folder, config, clock=lambda: 0.0) if ranks.first else SilentLogger(folder)
    if not report:
        logger.write_report = lambda: None
    return OpenVLAPPO(
        config,
        policy,
        head,
        make_envs(share_of(config, ranks.size).rollout.num_envs, max_steps=max_steps, needed=needed),
        make_envs(share_of(config, ranks.size).eval.num_envs, max_steps=max_steps, needed=needed) if evaluate else None,
        logger,
        ranks,
    )


def with_values(trainer: OpenVLAPPO) -> OpenVLAPPO:
    """The trainer with a value head that says something, as after some training; it starts at 0."""
    torch.nn.init.normal_(trainer.value_head.mlp[-1].weight, std=0.1, generator=torch.Generator().manual_seed(9))
    return trainer


def training_lines(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock or on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    machine = ("time/", "system/", "rollout/env_steps_per_s")
    return [{k: v for k, v in line.items() if not k.startswith(machine)} for line in lines]


def final_state(trainer):
    return [p.detach().clone() for p in [*trainer.actor_parameters, *trainer.critic_parameters]]
