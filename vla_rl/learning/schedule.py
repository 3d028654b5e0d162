"""Whether the actor steps, how far and how hot: its learning rate and temperature over a run, its waiting for the first reward.

Not here: what the gradient is (vla_rl.learning.losses); when an update ends early (algorithm.target_kl, OpenVLA_PPO).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from vla_rl.run.settings import Config

log = logging.getLogger(__name__)

KL_BAND, RATE_FACTOR = 2.0, 1.5  # rsl_rl 010cd22, rsl_rl/algorithms/ppo.py, update


def linear(learning_rate: float, timesteps: int, total: int) -> float:
    """learning_rate (1 - t / T): whole at the start, 0 at the end, so above 0 in the last iteration, which starts before it.

    Args:
        timesteps: t, before the iteration.
        total: T, run.timesteps.
    """
    return learning_rate * (1 - timesteps / total)


def cooled(temperature: float, final: float, timesteps: int, total: int) -> float:
    """T until two thirds of the timesteps, then linearly in them to T_end: T + (T_end - T) max(0, 3 t / total - 2).

    Args:
        temperature, final: T, T_end.
        timesteps: t, before the iteration.
        total: run.timesteps.
    """
    return temperature + (final - temperature) * min(1.0, max(0.0, 3 * timesteps / total - 2))


def adapted_to_kl(learning_rate: float, kl: float, target: float, lowest: float, highest: float) -> float:
    """The next step's rate: smaller where the policy has moved too far, larger where it has hardly moved (Schulman's rule).

        rate / 1.5 if kl > 2 target;   rate x 1.5 if 0 < kl < target / 2;   within [lowest, highest]

    Source: Schulman et al. 2017, arXiv:1707.06347, section 4, which so adapts the weight of a KL penalty; of the learning
    rate, with these factors: rsl_rl 010cd22, rsl_rl/algorithms/ppo.py, update, "adaptive".

    Args:
        kl: of the policy that sampled to the present one, in nats a token; 0 where it has not moved or was not measured.
        target: in nats a token.
    """
    if kl > KL_BAND * target:
        return max(lowest, learning_rate / RATE_FACTOR)
    if 0 < kl < target / KL_BAND:
        return min(highest, learning_rate * RATE_FACTOR)
    return learning_rate


class ActorSchedule:
    """Sets the actor's learning rate by actor.schedule, and holds the actor back in a run that has seen no reward yet.

    Args:
        optimizer: the actor's.
        tokens_per_ratio: see vla_rl.learning.losses.tokens_per_ratio.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: Config, tokens_per_ratio: int):
        self.optimizer, self.config, self.tokens_per_ratio = optimizer, config, tokens_per_ratio
        self.learning_rate = config.actor.learning_rate  # of the next step
        self.reward_seen = False  # a reward other than 0 in the whole run

    # -------------------------------------------------------------------------------------------------- learning rate

    def begin_update(self, timesteps: int) -> None:
        """Of an iteration that began at this many timesteps."""
        settings = self.config.actor
        if settings.schedule == "constant":
            self.learning_rate = settings.learning_rate
        elif settings.schedule == "linear":
            self.learning_rate = linear(settings.learning_rate, timesteps, self.config.run.timesteps)
        self.apply()

    def before_step(self, approx_kl: float) -> None:
        """Of a minibatch but the first one, whose KL is 0 but for rounding.

        Args:
            approx_kl: of it, in nats a ratio; 0 if it was not measured, as in the critic's warm-up.
        """
        settings = self.config.actor
        if settings.schedule == "kl":
            bounds = settings.min_learning_rate, settings.max_learning_rate
            kl = approx_kl / self.tokens_per_ratio
            self.learning_rate = adapted_to_kl(self.learning_rate, kl, settings.kl_target, *bounds)
            self.apply()

    def apply(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

    # -------------------------------------------------------------------------------------------------------- waiting

    @property
    def waits(self) -> bool:
        """With no reward yet, every advantage is the value head's error, and a step of the actor noise (PPO)."""
        algorithm = self.config.algorithm
        return algorithm.estimator == "gae" and algorithm.wait_for_reward and not self.reward_seen

    def steps_in(self, iteration: int) -> bool:
        """Whether the actor steps in the iteration after this many: GRPO always, PPO from the first one on that comes after
        critic_warmup_iterations and in which, or before which, there was a reward."""
        algorithm = self.config.algorithm
        return algorithm.estimator == "grpo" or (iteration >= algorithm.critic_warmup_iterations and not self.waits)

    def see_rewards(self, rewards: Tensor, iteration: int) -> None:
        """Of a rollout [T, N], after this many iterations. Says where there are none, and where the waiting ends."""
        waited = self.waits and iteration > 0
        if rewards.any():
            self.reward_seen = True
            if waited and self.steps_in(iteration):
                log.info("first reward of the run: the policy is trained from this iteration on")
            elif waited:
                log.info("first reward of the run: the policy is trained after the critic's warm-up")
        elif self.waits:
            log.warning("no reward in the run yet: only the value head is trained (algorithm.wait_for_reward)")
        else:
            log.warning("no reward in this rollout: its advantages are the value head's errors alone")

    # ---------------------------------------------------------------------------------------------------------- state

    def metrics(self) -> dict[str, float]:
        """After the update."""
        waits = {"actor/waits_for_reward": float(self.waits)} if self.config.algorithm.estimator == "gae" else {}
        return {"actor/learning_rate": self.learning_rate} | waits

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        settings = {"settings_learning_rate": self.config.actor.learning_rate}
        return {"learning_rate": self.learning_rate, "reward_seen": self.reward_seen} | settings

    def load(self, state: dict[str, Any]) -> None:
        """Goes on at the checkpoint's learning rate; at that of the settings if a resume has changed it."""
        settings = self.config.actor
        self.reward_seen = state["reward_seen"]
        if settings.schedule == "kl" and state["settings_learning_rate"] == settings.learning_rate:
            adapted = state["learning_rate"]
            self.learning_rate = min(max(adapted, settings.min_learning_rate), settings.max_learning_rate)
