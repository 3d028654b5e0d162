"""A tiny update of the real trainer: what it shows of PPO's parts, and how long and large its pieces are.

The trainer is the run's own, on the run's model and simulators, with a few decisions a rollout (`trial_settings`) and with
rewards that are made up, since nobody succeeds in so few. Each step here is done once, in order; each check reads what a
step has left, says what it found or raises a ConfigError with the remedy. Not here: what a whole run takes, calculated from
the pieces (vla_rl.preflight.estimate).

T decisions of the trial, N environments, B rows of a minibatch, A action tokens, D hidden size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_rl.learning.advantages import normalize
from vla_rl.learning.rollout_buffer import Minibatch, RolloutBuffer
from vla_rl.preflight.checklist import BUG
from vla_rl.run.checkpoint import verify
from vla_rl.run.distributed import ONE
from vla_rl.run.progress import peak_memory_gib
from vla_rl.run.settings import Config, ConfigError

DECISIONS = 4  # T
EPOCHS = 2  # LoRA begins with one factor at 0: the other one's gradient is 0 in the first step
CRITIC_EPOCHS = 2
TIMED_S = 4.0  # of passes of one micro-batch, at least three
GAE_TOLERANCE = 1e-4  # float32 sums in another order


def trial_settings(config: Config) -> Config:
    """The settings with rollouts and evaluations of T decisions, the actor stepping at once, no bars and nothing sent.

    Networks, environments, rows of a forward and of a minibatch and both optimizers stay what they are.
    """
    num_eval_envs = min(config.eval.num_envs, len(config.env.task_ids) * len(config.eval.states))
    steps = DECISIONS * config.policy.chunk_size
    states = config.eval.states[: -(-2 * num_eval_envs // len(config.env.task_ids))]  # two episodes an environment
    whole_episodes = {"max_steps": steps} if config.algorithm.estimator == "grpo" else {}
    changes = {
        "run": {"timesteps": max(1, config.run.timesteps)},
        "env": whole_episodes,
        "rollout": {"n_steps": DECISIONS, "n_episodes": config.rollout.num_envs},
        "algorithm": {
            **{"n_epochs": EPOCHS, "critic_epochs": min(CRITIC_EPOCHS, config.algorithm.critic_epochs)},
            **{"critic_warmup_iterations": 0, "wait_for_reward": False, "target_kl": None},
        },
        "eval": {"interval": 0, "states": states, "modes": ["greedy"], "max_steps": steps},
        "logging": {"progress": False, "wandb": False},
    }
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update=sections)


# -------------------------------------------------------------------------------------------------------------- watching


@dataclass(frozen=True)
class Call:
    """Of a method of the policy."""

    name: str
    start: float  # seconds of time.perf_counter
    rows: int
    has_hidden: bool  # act: its output has the hidden state


class Watch:
    """Notes the policy's calls from now on, and the network's forwards where it has one that can be seen."""

    METHODS = ("act", "compute_hidden", "evaluate_actions", "logprobs", "reference_logprobs")

    def __init__(self, policy: Any):
        self.calls: list[Call] = []
        self.forwards = 0
        for name in self.METHODS:
            setattr(policy, name, self.noting(name, getattr(policy, name)))
        network = getattr(policy, "network", None)
        # CUDA graphs are replayed without Python
        self.sees_forwards = network is not None and not getattr(policy, "compiled", False)
        if self.sees_forwards:
            network.embed = self.counting(network.embed)

    def noting(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(first: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(first, *args, **kwargs)
            self.calls.append(Call(name, start, len(first), getattr(result, "hidden", None) is not None))
            return result

        return noted

    def counting(self, embed: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.forwards += 1
            return embed(*args, **kwargs)

        return counted

    def restart(self) -> None:
        self.calls, self.forwards = [], 0

    def of(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]


def give_rewards(envs: Any, seed: int = 0) -> None:
    """From now on each environment has a reward in 0..1 at each decision that nothing has earned: no advantage is 0."""
    step_wait, rng = envs.step_wait, np.random.default_rng(seed)

    def rewarded() -> tuple:
        obs, rewards, *rest = step_wait()
        return obs, rng.random(len(rewards)), *rest

    envs.step_wait = rewarded


def digest(tensor: Tensor, part: int = 2**24) -> tuple[int, int]:
    """Of all bits of a tensor, on its device and without a copy of it: a sum and a sum weighted by position, modulo 2^64."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    plain = torch.zeros((), dtype=torch.int64, device=tensor.device)
    weighted = plain.clone()
    for number, values in enumerate(tensor.detach().reshape(-1).view(integers).split(part)):
        values = values.to(torch.int64) + 1  # so that zeros count by their place, too
        places = torch.arange(number * part, number * part + len(values), device=tensor.device)
        plain += values.sum()
        weighted += (values * (2 * places + 1) * 0x1E3779B97F4A7C15).sum()
    return int(plain), int(weighted)


def named_tensors(policy: Any) -> dict[str, Tensor]:
    """All weights and buffers of a policy."""
    network = getattr(policy, "network", None)
    if network is None:
        return {name: value for name, value in vars(policy).items() if isinstance(value, Tensor)}
    return dict(network.named_parameters()) | dict(network.named_buffers())


def plain_advantages(rewards: Tensor, done: Tensor, factor: float) -> Tensor:
    """A_t = sum over k >= t of factor^(k - t) r_k, up to the end of the episode: GAE where every value is 0; [T, N].

    Args:
        factor: gamma x lambda.
    """
    advantages = torch.zeros_like(rewards)
    for t in range(len(rewards)):
        going_on = torch.ones_like(rewards[0])
        for k in range(t, len(rewards)):
            advantages[t] += factor ** (k - t) * rewards[k] * going_on
            going_on = going_on * (~done[k])
    return advantages


# ------------------------------------------------------------------------------------------------------------- the trial


class Trial:
    """The steps, and what they left.

    Args:
        trainer: OpenVLA_PPO.OpenVLAPPO with `trial_settings`, fresh. It is of no use afterwards.
        config: the run's own settings.
    """

    def __init__(self, trainer: Any, config: Config):
        self.trainer, self.config = trainer, config
        self.watch = Watch(trainer.policy)
        give_rewards(trainer.envs)
        self.turns = 2 if config.rollout.overlap else 1  # forwards of a decision of all environments

    @property
    def has_critic(self) -> bool:
        return self.trainer.value_head is not None

    def collect(self) -> None:
        """Two rollouts: the first builds the simulators and compiles, the second is kept."""
        trainer, watch = self.trainer, self.watch
        start = time.perf_counter()
        trainer.collect_rollout()
        self.build_s = time.perf_counter() - start
        trainer.obs = None  # the next one begins with resets, too, of the same tasks: a round on
        num_tasks = len(trainer.config.env.task_ids)
        trainer.groups_played = num_tasks
        trainer.streams.played = [num_tasks * trainer.streams.IN_A_ROW] * trainer.envs.num_envs
        watch.restart()
        start = time.perf_counter()
        self.rollout: RolloutBuffer = trainer.collect_rollout()[0]
        acts = watch.of("act")
        self.reset_s = acts[0].start - start
        self.decision_s = self.turns * (acts[-1].start - acts[0].start) / (len(acts) - 1)
        self.acts = acts
        self.forwards = watch.forwards, len(watch.calls), len(watch.of("compute_hidden"))

    def learn(self) -> None:
        """Advantages and one update, of two epochs.

        Raises:
            InvariantError: the policy scores its actions otherwise than it sampled them.
            NonFiniteError: a loss or gradient is not finite.
        """
        trainer, watch = self.trainer, self.watch
        self.batch: Minibatch = trainer.compute_advantages(self.rollout)[0]
        if len(self.batch) == 0:
            raise ConfigError(f"the advantages of random rewards are all 0; {BUG}")
        self.before = self.digests()
        self.values_before = trainer.predict_values(self.batch.hidden)
        watch.restart()
        self.metrics: dict[str, Any] = trainer.update(self.batch)
        self.second_forwards = len(watch.of("compute_hidden"))
        self.after = self.digests()
        self.values_after = trainer.predict_values(self.batch.hidden)

    def digests(self) -> dict[str, tuple[int, int]]:
        head = self.trainer.value_head
        tensors = named_tensors(self.trainer.policy)
        tensors |= {f"value_head.{name}": p for name, p in head.named_parameters()} if head is not None else {}
        return {name: digest(tensor) for name, tensor in tensors.items()}

    def save(self) -> None:
        """A checkpoint in the trainer's folder.

        Raises:
            CheckpointError: it is not whole.
        """
        trainer = self.trainer
        start = time.perf_counter()
        trainer.boundary.take()
        folder = trainer.save_checkpoint()
        self.save_s = time.perf_counter() - start
        verify(folder)
        self.checkpoint_files = sorted(path for path in folder.rglob("*") if path.is_file())
        self.checkpoint_bytes = sum(path.stat().st_size for path in self.checkpoint_files)

    def evaluate(self) -> None:
        """Episodes of T decisions from fixed states, with videos if the settings have them."""
        trainer, watch = self.trainer, self.watch
        watch.restart()
        played: list[float] = []  # when
        log_evaluation = trainer.logger.log_evaluation
        trainer.logger.log_evaluation = lambda *args: (played.append(time.perf_counter()), log_evaluation(*args))
        start = time.perf_counter()
        trainer.evaluate()
        acts = [call.start for call in watch.of("act")]
        self.eval_build_s = acts[0] - start
        played_s = played[0] - acts[-1]  # the last decision, and the replays of the videos
        self.eval_decision_s = statistics.median(np.diff(acts)) if len(acts) > 1 else played_s
        self.video_s = max(0.0, played_s - self.eval_decision_s) / DECISIONS if trainer.config.eval.video else 0.0
        videos = [path.stat().st_size for path in Path(trainer.logger.folder).glob("videos/*")]
        self.video_bytes = max(videos, default=0) / DECISIONS

    def measure(self) -> None:
        """Seconds of an update's pieces at the run's own sizes, and the memory that all of it took. Steps once more."""
        trainer, config = self.trainer, self.config
        minibatch = self.repeated(min(config.algorithm.minibatch_size, trainer.micro_batches.rows))
        if trainer.device.type == "cuda":  # compiled and cached for this many rows
            trainer.micro_batches.run(trainer.minibatch_gradients, minibatch, True, True)
        passes: list[float] = []
        while len(passes) < 3 or sum(passes) < TIMED_S:
            passes.append(
                self.seconds(lambda: trainer.micro_batches.run(trainer.minibatch_gradients, minibatch, True, True))
            )
        self.row_s = statistics.mean(passes) / len(minibatch)
        self.step_s = self.seconds(lambda: trainer.optimizer_steps(train_actor=True))
        self.score_s = 0.0
        if config.algorithm.kl_coef > 0 or config.algorithm.recompute_logprobs:
            scored_s = self.seconds(
                lambda: trainer.micro_batches.score(minibatch, trainer.policy.logprobs, trainer.temperature, ONE)
            )
            self.score_s = scored_s / len(minibatch)
        self.critic_step_s = 0.0
        if self.has_critic and config.algorithm.critic_epochs > 0:
            wide = self.repeated(config.algorithm.minibatch_size)
            self.critic_step_s = (
                self.seconds(lambda: list(trainer.critic_passes(wide))) / trainer.config.algorithm.critic_epochs
            )
        self.row_bytes = bytes_of(self.batch) / len(self.batch)
        self.peak_gib = peak_memory_gib(trainer.device)
        self.host_peak_gib = peak_memory_gib(torch.device("cpu"))
        vectors = filter(None, (trainer.envs, trainer.eval_envs))
        pids = [process.pid for envs in vectors for process in getattr(envs, "processes", ())]
        self.workers_gib = sum(map(private_gib, pids))

    def repeated(self, rows: int) -> Minibatch:
        """So many rows, those of the trial over and over."""
        minibatch = self.batch.rows(torch.arange(rows) % len(self.batch))
        kl = self.config.algorithm.kl_coef > 0
        return replace(minibatch, reference_logprobs=minibatch.old_logprobs) if kl else minibatch

    def seconds(self, work: Callable[[], Any]) -> float:
        device = self.trainer.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start


def bytes_of(batch: Minibatch) -> int:
    values = [getattr(batch, field.name) for field in fields(batch)] + [batch.inputs.images, batch.inputs.proprio]
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def private_gib(pid: int) -> float:
    """Memory of a process that no other one shares and no file backs; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0) / 2**20


# ------------------------------------------------------------------------------------------------------------ the checks

NO_CRITIC = "no critic (grpo)"


def check_learning_rates(trial: Trial) -> str:
    """Before the update: both optimizers have the settings' step sizes, and nothing but what they are to train."""
    trainer, config = trial.trainer, trial.config
    sides = {"actor": (trainer.actor_optimizer, config.actor, trainer.policy.trainable_parameters())}
    if trial.has_critic:
        sides["critic"] = (trainer.critic_optimizer, config.critic, list(trainer.value_head.parameters()))
    found = []
    for name, (optimizer, settings, parameters) in sides.items():
        rates = {group["lr"] for group in optimizer.param_groups}
        if rates != {settings.learning_rate}:
            raise ConfigError(
                f"{name}: {sorted(rates)} in the optimizer, {name}.learning_rate={settings.learning_rate}; {BUG}"
            )
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if {id(p) for p in held} != {id(p) for p in parameters}:
            raise ConfigError(
                f"the {name}'s optimizer has {len(held)} tensors, not the {len(parameters)} it is to train; {BUG}"
            )
        found.append(f"{name} {settings.learning_rate:g}")
    return ", ".join(found) + ("" if trial.has_critic else f", {NO_CRITIC}")


def check_value_head(trial: Trial) -> str:
    if not trial.has_critic:
        return NO_CRITIC
    head = trial.trainer.value_head
    values = trial.values_before
    count = sum(parameter.numel() for parameter in head.parameters())
    if len(values) != len(trial.batch) or values.abs().max() != 0:
        raise ConfigError(f"values begin at up to {values.abs().max():.2e}, expected 0; {BUG}")
    return f"{count:,} parameters on a hidden state of {trial.batch.hidden.shape[1]}; values begin at 0"


def check_advantages(trial: Trial) -> str:
    """PPO: GAE of the rewards, against the sum that it is where all values are 0. GRPO: relative to a group."""
    batch, algorithm = trial.batch, trial.config.algorithm
    if not trial.has_critic:
        low, high = batch.advantages.min().item(), batch.advantages.max().item()
        if not low < 0 < high:
            raise ConfigError(f"advantages from {low:.2f} to {high:.2f} within groups, expected both signs; {BUG}")
        return f"grpo: {low:.2f} to {high:.2f}, relative to groups of {trial.config.rollout.group_size}"
    rewards = trial.rollout.stack("rewards")  # [T, N]
    done = trial.rollout.stack("terminated") | trial.rollout.stack("truncated")
    critic_lambda = algorithm.gae_lambda if algorithm.critic_gae_lambda is None else algorithm.critic_gae_lambda
    expected = plain_advantages(rewards, done, algorithm.gamma * algorithm.gae_lambda).flatten()
    returns = plain_advantages(rewards, done, algorithm.gamma * critic_lambda).flatten()
    if algorithm.normalize_advantages:
        expected = normalize(expected)
    error = max((batch.advantages - expected).abs().max().item(), (batch.returns - returns).abs().max().item())
    if not error < GAE_TOLERANCE:
        raise ConfigError(f"GAE differs from the sum of discounted rewards by {error:.1e}; {BUG}")
    return f"GAE, gamma {algorithm.gamma:g}, lambda {algorithm.gae_lambda:g}: off by {error:.0e} from the plain sum"


def check_hidden(trial: Trial) -> str:
    """One forward a decision gives actions and hidden state; one a micro-batch gives log-probabilities and value."""
    decisions, (forwards, calls, extra) = len(trial.acts), trial.forwards
    if trial.has_critic and not all(act.has_hidden for act in trial.acts):
        raise ConfigError(
            "the policy's output has no hidden state, so each value costs a second forward; return it in PolicyOutput.hidden"
        )
    if trial.watch.sees_forwards and forwards != calls:
        raise ConfigError(f"{forwards} forwards of the network in {calls} calls of the policy; {BUG}")
    if trial.second_forwards:
        raise ConfigError(
            f"{trial.second_forwards} forwards for hidden states in the update; return them in ActionEvaluation.hidden"
        )
    after = f", {extra} more for the values after the last" if trial.has_critic else ""
    return f"{decisions} forwards for {decisions} decisions{after}; no second one in the update"


def check_ratio(trial: Trial) -> str:
    """What the update's own guard has let pass."""
    error, kl = trial.metrics["actor/first_minibatch_ratio_error"], trial.metrics["actor/first_minibatch_kl"]
    return f"first minibatch: largest |ratio - 1| {error:.1e}, KL {kl:.1e}"


def check_values(trial: Trial) -> str:
    if not trial.has_critic:
        return NO_CRITIC
    values = trial.values_after
    if not (torch.isfinite(values).all() and (values != 0).all()):
        raise ConfigError(f"{int((values == 0).sum())} of {len(values)} values are still 0 after the update; {BUG}")
    return f"{values.min():.2g} to {values.max():.2g} after the update"


def check_gradients(trial: Trial) -> str:
    """The LoRA weights and the value head have moved, and no bit of anything else."""
    policy = trial.trainer.policy
    trained = {id(parameter) for parameter in policy.trainable_parameters()}
    tensors = named_tensors(policy)
    lora = {name for name, tensor in tensors.items() if id(tensor) in trained}
    head = {name for name in trial.before if name.startswith("value_head.")} if trial.has_critic else set()
    moved = {name for name in trial.before if trial.before[name] != trial.after[name]}
    if others := sorted(moved - lora - head):
        raise ConfigError(f"{len(others)} frozen tensors have changed, such as {others[0]}; {BUG}")
    stuck = [n for n in lora - moved if tensors[n].grad is not None and tensors[n].grad.any()] + sorted(head - moved)
    if stuck or not moved & lora:
        raise ConfigError(
            f"{len(moved & lora)} of {len(lora)} LoRA tensors and {len(moved & head)} of {len(head)} of the value head moved"
            f"{', not ' + sorted(stuck)[0] if stuck else ''}; {BUG}"
        )
    unread = f" ({len(lora - moved)} lie behind the last layer that is read)" if lora - moved else ""
    critic = f", {len(head)} of {len(head)} of the value head" if head else f", {NO_CRITIC}"
    return (
        f"{len(moved & lora)} of {len(lora)} LoRA tensors moved{unread}{critic}; "
        f"{len(trial.before) - len(lora) - len(head)} others the same to the bit"
    )
