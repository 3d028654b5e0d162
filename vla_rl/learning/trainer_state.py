"""The trainer between two iterations, as one thing: copied to the CPU, written as a checkpoint, read back.

Everything that the next iteration depends on is in it, so a run that was stopped or killed goes on as if it had not been, on
the CPU bit for bit. Not here: files written whole or not at all (vla_rl.run.checkpoint).
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from pydantic import Field
from torch import Tensor

from vla_rl.learning.episodes import EpisodeStreams, RunningEpisodes
from vla_rl.learning.no_signal import SignalWatch
from vla_rl.learning.optimizer import is_floats, load_optimizer
from vla_rl.learning.schedule import ActorSchedule
from vla_rl.model.value_head import ValueHead
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run.checkpoint import (
    CheckpointError,
    cpu_copy,
    load_tensors,
    load_trainer_state,
    loading,
    save_tensors,
    save_torch,
    set_aside_later_checkpoints,
    verify,
    write_checkpoint,
)
from vla_rl.run.distributed import Ranks
from vla_rl.run.files import Count, Finite, Strict, checked
from vla_rl.run.load_settings import save_config
from vla_rl.run.settings import Config
from vla_rl.types import ACTION_DIM, Episode, Observation, Policy

# of what a checkpoint holds; 2: a sampling generator for each environment; 3: the actor's schedule
STATE_VERSION = 3


class EpisodeValues(Strict):
    """vla_rl.types.Episode."""

    task_id: Count
    initial_state: Count | None
    seed: Count
    resets: Annotated[int, Field(ge=1, le=100)] = 1  # each draws a scene anew


class UnderWay(Strict):
    episode: EpisodeValues
    actions: Tensor


class Schedule(Strict):
    reward_seen: bool
    settings_learning_rate: Finite
    learning_rate: Finite


class Watch(Strict):
    episodes: Count
    rewarded: bool
    warned: bool


class Values(Strict):
    """trainer.pt but for what is of torch, which knows its own: generators, optimizers."""

    iteration: Count
    timesteps: Count
    groups_played: Count
    evaluated_iteration: Annotated[int, Field(ge=-1, lt=2**53)]
    episodes_played: list[Count]
    running_returns: Tensor
    running_lengths: Tensor
    episodes_under_way: list[UnderWay]
    sampling_generators: list[Tensor]
    order_generator: Tensor
    schedule: Schedule
    signal_watch: Watch | None = None


# of trainer.pt, but for what earlier ones have not
STATE = Values.model_fields.keys() - {"signal_watch"} | {"actor_optimizer", "critic_optimizer"}


def check_values(values: dict[str, Any], config: Config) -> None:
    """Raises ValueError or TypeError where trainer.pt has not what `take` puts into it in a run of these settings."""
    num_envs, max_steps = config.rollout.num_envs, config.max_episode_steps()
    found = checked(Values, values)
    lengths = {
        "episodes_played": len(found.episodes_played),
        "sampling_generators": len(found.sampling_generators),
        **{name: list(getattr(found, name).shape) for name in ("running_returns", "running_lengths")},
        "episodes_under_way": len(found.episodes_under_way) or num_envs,
    }
    for name, length in lengths.items():
        if length not in (num_envs, [num_envs]):
            raise ValueError(f"{name} has {length} entries, expected {num_envs}")
    if not is_floats(found.running_returns) or found.running_lengths.is_floating_point():
        raise ValueError("running_returns and running_lengths: expected floats and whole numbers")
    for state in values["episodes_under_way"]:
        Episode(**state["episode"])  # TypeError of a name that it has not
    for under_way in found.episodes_under_way:
        actions, episode = under_way.actions, under_way.episode
        if episode.task_id not in config.env.task_ids or len(actions) > max_steps:
            raise ValueError(f"an episode of task {episode.task_id} with {len(actions)} actions is none of this run's")
        if actions.dtype != torch.float32 or actions.dim() != 2 or actions.shape[1] != ACTION_DIM:
            raise ValueError(f"actions are {actions.dtype} {list(actions.shape)}, expected float32 [*, {ACTION_DIM}]")
        if not bool((actions.abs() <= 1e3).all()):  # false of NaN, too
            raise ValueError("actions of an episode under way are no actions: expected -1 to 1")


class Trainer(Protocol):
    """What of OpenVLA_PPO.OpenVLAPPO lasts longer than an iteration."""

    config: Config
    ranks: Ranks
    policy: Policy
    value_head: ValueHead | None
    envs: VectorEnv
    logger: MetricsLogger
    uses_critic: bool
    actor_parameters: list[torch.nn.Parameter]
    critic_parameters: list[torch.nn.Parameter]
    actor_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer | None
    schedule: ActorSchedule
    signal_watch: SignalWatch
    order_generator: torch.Generator
    streams: EpisodeStreams
    running: RunningEpisodes
    iteration: int
    timesteps: int
    groups_played: int
    evaluated_iteration: int
    obs: Observation | None


class TrainerState:
    """The state after the trainer's last finished iteration: an unfinished one leaves no trace in it.

    Being a copy on the CPU, it can be written when the present state is half updated or the GPU has failed. Of several processes
    rank 0 has the copy, of the environments of all, and writes it.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        # what must be equal for a checkpoint to fit
        head = [list(parameter.shape) for parameter in trainer.critic_parameters]
        parts = [
            f"policy {trainer.policy.fingerprint()}",
            f"value head {head}",
            f"{trainer.config.rollout.num_envs} environments",
        ]
        self.saving = threading.Lock()  # a stop that nothing else obeys is saved by a thread (vla_rl.run.interruption)
        self.loaded: tuple[int, bytes] | None = None  # iteration and config.yaml of the checkpoint that was loaded
        self.fingerprint = ", ".join([*parts, trainer.config.algorithm.estimator, f"state {STATE_VERSION}"])
        self.take()

    @property
    def timesteps(self) -> int:
        return self.values["timesteps"]

    def take(self) -> None:
        """Copies the trainer as it is now, between two iterations: tensors and plain values."""
        trainer = self.trainer
        between_rollouts = trainer.obs is not None and trainer.uses_critic  # GRPO's rollouts start with fresh episodes
        parts = trainer.ranks.gather(
            {
                "episodes_played": trainer.streams.played,
                "running_returns": trainer.running.returns,
                "running_lengths": trainer.running.lengths,
                "episodes_under_way": trainer.envs.episode_states() if between_rollouts else [],
                "sampling_generators": [generator.get_state() for generator in trainer.streams.generators],
            }
        )
        counters = {
            "iteration": trainer.iteration,
            "timesteps": trainer.timesteps,
            "groups_played": trainer.groups_played,
            "evaluated_iteration": trainer.evaluated_iteration,
        }
        if not trainer.ranks.first:
            self.values: dict[str, Any] = counters
            return
        self.values = cpu_copy(
            {
                **counters,
                "episodes_played": [count for part in parts for count in part["episodes_played"]],
                "running_returns": torch.from_numpy(np.concatenate([part["running_returns"] for part in parts])),
                "running_lengths": torch.from_numpy(np.concatenate([part["running_lengths"] for part in parts])),
                "episodes_under_way": [
                    {"episode": state["episode"], "actions": torch.from_numpy(state["actions"])}
                    for part in parts
                    for state in part["episodes_under_way"]
                ],
                "sampling_generators": [state for part in parts for state in part["sampling_generators"]],
                "order_generator": trainer.order_generator.get_state(),
                "adapter": list(trainer.actor_parameters),
                "value_head": dict(trainer.value_head.state_dict()) if trainer.value_head is not None else None,
                "actor_optimizer": trainer.actor_optimizer.state_dict(),
                "critic_optimizer": trainer.critic_optimizer.state_dict() if trainer.critic_optimizer else None,
                "schedule": trainer.schedule.state(),
                "signal_watch": trainer.signal_watch.state(),
            }
        )

    def set_evaluated(self) -> None:
        """The evaluation of this state is done; it changed nothing else."""
        self.values["evaluated_iteration"] = self.trainer.evaluated_iteration

    def save(self) -> Path:
        """Writes the state, on rank 0, and the metrics that wait before it; returns the checkpoint's folder.

        Raises:
            OSError: the disk does not take it.
        """
        trainer, values = self.trainer, self.values
        root, name = trainer.logger.folder / "checkpoints", f"iteration-{values['iteration']:06d}"
        if not trainer.ranks.first:
            return root / name

        def write_files(folder: Path) -> None:
            trainer.policy.save_adapter(folder / "adapter", values["adapter"])
            rest = {name: value for name, value in values.items() if name not in ("adapter", "value_head")}
            save_torch(rest, folder / "trainer.pt")
            if values["value_head"] is not None:
                save_tensors(values["value_head"], folder / "value_head.safetensors")
            if (
                self.loaded is not None and self.loaded[0] == values["iteration"]
            ):  # settings that have trained nothing yet
                (folder / "config.yaml").write_bytes(self.loaded[1])
            else:
                save_config(trainer.config, folder / "config.yaml")

        with self.saving:
            trainer.logger.write_waiting()
            kept = trainer.config.logging.keep_checkpoints, trainer.config.logging.keep_every
            return write_checkpoint(root, name, self.fingerprint, write_files, *kept)

    def load(self, folder: Path) -> None:
        """Puts the trainer into the state of a checkpoint: the simulators replay their episodes.

        What came after the checkpoint is set aside last, when nothing can be refused any more.

        Raises:
            CheckpointError: the checkpoint is torn or of another model.
        """
        trainer = self.trainer
        verify(folder, self.fingerprint)
        values = load_trainer_state(folder)
        if missing := sorted(STATE - values.keys()):
            raise CheckpointError(f"checkpoint {folder} is torn: trainer.pt lacks {', '.join(missing)}")
        with loading(folder / "trainer.pt"):
            check_values(values, trainer.config)
        if trainer.value_head is not None:
            with loading(folder / "value_head.safetensors"):
                trainer.value_head.load_state_dict(load_tensors(folder / "value_head.safetensors"))
            with loading(folder / "trainer.pt"):
                load_optimizer(trainer.critic_optimizer, values["critic_optimizer"], trainer.config.critic)
        with loading(folder / "adapter"):
            trainer.policy.load_adapter(folder / "adapter")
        with loading(folder / "trainer.pt"):
            load_optimizer(trainer.actor_optimizer, values["actor_optimizer"], trainer.config.actor)
        trainer.schedule.load(values["schedule"])
        trainer.signal_watch.load(values.get("signal_watch"))
        trainer.iteration, trainer.timesteps = values["iteration"], values["timesteps"]
        trainer.groups_played, trainer.evaluated_iteration = values["groups_played"], values["evaluated_iteration"]
        own = slice(trainer.streams.own.start, trainer.streams.own.stop)  # environments of this process
        trainer.streams.played = list(values["episodes_played"][own])
        trainer.running.returns = values["running_returns"].numpy()[own].copy()
        trainer.running.lengths = values["running_lengths"].numpy()[own].copy()
        with loading(folder / "trainer.pt"):  # a generator knows itself what a state of it is
            for generator, state in zip(trainer.streams.generators, values["sampling_generators"][own], strict=True):
                generator.set_state(state)
            trainer.order_generator.set_state(values["order_generator"])
        under_way = values["episodes_under_way"][own]
        episodes = [{"episode": e["episode"], "actions": e["actions"].numpy()} for e in under_way]
        if episodes:
            trainer.obs = Observation.from_vector_env(trainer.envs.restore_episodes(episodes))
        self.loaded = trainer.iteration, (folder / "config.yaml").read_bytes()
        self.take()
        evaluated = trainer.evaluated_iteration == trainer.iteration
        trainer.ranks.by_first(lambda: set_aside_later_checkpoints(folder))
        trainer.ranks.by_first(lambda: trainer.logger.continue_from(trainer.iteration, evaluated=evaluated))
