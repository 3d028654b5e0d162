"""Whether a run has anything to learn from: episodes in a row without a reward, the warning of them, and the end.

Without a success PPO's advantages are the value head's errors, and GRPO's groups have equal returns: whatever the cause, nothing
is learned, and a night is lost on it. Not here: that PPO's actor waits for the first reward (vla_rl.learning.schedule).
"""

from __future__ import annotations

import logging
from typing import Any

from vla_rl.run.settings import Config
from vla_rl.types import NoSignal

log = logging.getLogger(__name__)

# a policy that succeeds in 3 % of its episodes has a success among so many with 95 % probability: 1 - 0.97^100
FIRST_EPISODES = 100


class SignalWatch:
    """Counts training episodes since the last one with a reward other than 0; in the beginning since the start.

    A reward is all that either estimator needs to see: a GRPO group with unequal returns has one, too. A group of successes
    alone teaches nothing either, but no night is lost on it.
    """

    def __init__(self, config: Config):
        self.config = config
        self.episodes = 0  # in a row, without a reward
        self.rewarded = False  # whether there ever was one
        self.warned = False

    def see(self, metrics: dict[str, Any]) -> None:
        """After a rollout. Warns once, when the run's first FIRST_EPISODES or more are without a reward.

        Args:
            metrics: rollout/episodes and rollout/return of all processes.
        """
        if metrics["rollout/return"]:
            self.episodes, self.rewarded = 0, True
            return
        self.episodes += metrics["rollout/episodes"]
        if self.episodes >= FIRST_EPISODES and not self.rewarded and not self.warned:
            self.warned = True
            log.warning("%s", warning(self.episodes, self.config))

    def check(self) -> None:
        """Before an iteration.

        Raises:
            NoSignal: run.stop_without_signal or more episodes in a row were without a reward.
        """
        most = self.config.run.stop_without_signal
        if most is not None and self.episodes >= most:
            stopped = (
                f"stopped: no reward in the last {self.episodes} training episodes (run.stop_without_signal={most}); to go on all the "
                "same: --resume with run.stop_without_signal=null"
            )
            lost = "There were rewards before: look at actor/approx_kl and actor/entropy; checkpoints/best is of before, perhaps"
            log.warning(
                "%s. %s", stopped, lost if self.rewarded else likely_causes(self.config)
            )  # into the report, too
            raise NoSignal(stopped)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"episodes": self.episodes, "rewarded": self.rewarded, "warned": self.warned}

    def load(self, state: dict[str, Any] | None) -> None:
        """None: of a checkpoint that is older than this watch; the count begins anew, and nothing is said of first episodes."""
        state = {"episodes": 0, "rewarded": True, "warned": False} if state is None else state
        self.episodes, self.rewarded, self.warned = state["episodes"], state["rewarded"], state["warned"]


def warning(episodes: int, config: Config) -> str:
    """Many lines on a screen; warnings.log puts them on one."""
    stop = "" if config.run.stop_without_signal else " (run.stop_without_signal=N stops a run after N of them)"
    return f"NO SUCCESS in the first {episodes} training episodes: nothing to learn from{stop}. {likely_causes(config)}"


def likely_causes(config: Config) -> str:
    """What to look at, the likeliest first."""
    policy, env, rollout = config.policy, config.env, config.rollout
    crop = str(policy.center_crop).lower()
    causes = (
        f"policy.checkpoint={policy.checkpoint} acts by an L1 head (action_head--* among its files), so the token head that is "
        "sampled from was never trained",
        f"policy.unnorm_key={config.unnorm_key()} is not the entry of dataset_statistics.json that it was trained with",
        f"it was trained on other images: env.image_size={env.image_size}, env.render={env.render}, "
        f"policy.num_images={policy.num_images}, policy.center_crop={crop}",
        f"rollout.temperature={rollout.temperature:g} is too high, if greedy evaluations succeed",
        "the gripper closes where it should open: the last entry of the action's mask must be false, 0 close and 1 open",
    )
    return "Likely causes, in this order:" + "".join(f"\n  {n}. {cause}" for n, cause in enumerate(causes, 1))
