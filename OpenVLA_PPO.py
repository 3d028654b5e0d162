"""PPO with dense advantages (GAE) for OpenVLA on LIBERO; GRPO as the baseline. The algorithm, from top to bottom.

Not here: the network and its prompt (vla_rl.model.policy), the simulators (vla_rl.simulation.vector_env), files and flags
(start_gae_ppo_training.py). The parts are handed in, so tests run this very class on small ones.

T decisions, N environments, C simulator steps of a decision, A = 7C action tokens, D hidden size, R rows of a rollout,
B rows of a minibatch. A timestep is one simulator step; a decision is up to C of them.

Where several processes train (`ranks`), each plays its share of the environments and scores its share of a minibatch; rollouts,
gradients and metrics are of all, so each takes the steps that one process alone would take.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from vla_rl.evaluation.kept import KeptEpisodes
from vla_rl.evaluation.play import evaluate_modes
from vla_rl.learning import losses
from vla_rl.learning.episodes import (
    BrokenOff,
    EpisodeQueue,
    EpisodeSampler,
    EpisodeSource,
    EpisodeStreams,
    RunningEpisodes,
    group_queue,
    reset_finished,
    step_arguments,
)
from vla_rl.learning.estimators import gae_rows, grpo_rows
from vla_rl.learning.finite import FiniteGuard, check_finite
from vla_rl.learning.guards import check_first_minibatch, check_replicas, check_rescored
from vla_rl.learning.micro_batches import MicroBatches, naming_what_fits
from vla_rl.learning.no_signal import SignalWatch
from vla_rl.learning.optimizer import adamw, clip_gradient
from vla_rl.learning.rollout_buffer import Decision, Minibatch, RolloutBuffer, shuffled_rows
from vla_rl.learning.schedule import ActorSchedule, cooled
from vla_rl.learning.trainer_state import TrainerState
from vla_rl.model.value_head import ValueHead
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run import machine, progress
from vla_rl.run.best_checkpoint import evaluation_of, keep_best
from vla_rl.run.distributed import ONE, Ranks, share_of
from vla_rl.run.files import Outage
from vla_rl.run.logs import progress_bar
from vla_rl.run.settings import Config
from vla_rl.types import (
    ACTION_DIM,
    Observation,
    Policy,
    PolicyInputs,
    PolicyOutput,
    ProcessLost,
    SimulatorDied,
    StopTraining,
    to_device,
)

log = logging.getLogger(__name__)


class OpenVLAPPO:
    """Trains the adapter of a policy, and a value head on its hidden state, on a vector of environments.

    Args:
        config: all settings.
        policy: acts, and scores actions with gradients; only its adapter is trainable.
        value_head: V(s) from the policy's hidden state; None for GRPO, which has no critic.
        envs: N training environments (vla_rl.simulation.vector_env.LiberoVectorEnv or alike, autoreset disabled).
        eval_envs: evaluation environments; their fixed initial states are never trained on. None: no evaluation.
        logger: knows the run's folder.
        ranks: the processes that train together; envs and eval_envs are this one's.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        value_head: ValueHead | None,
        envs: VectorEnv,
        eval_envs: VectorEnv | None,
        logger: MetricsLogger,
        ranks: Ranks = ONE,
    ):
        self.config = config
        self.ranks = ranks
        self.policy = policy
        self.value_head = value_head
        self.envs = envs
        self.eval_envs = eval_envs
        self.logger = logger
        self.device = torch.device(config.run.device)
        self.uses_critic = config.algorithm.estimator == "gae"
        if self.uses_critic != (value_head is not None):
            raise ValueError(f"algorithm.estimator={config.algorithm.estimator} with value_head={value_head}")

        self.actor_parameters = policy.trainable_parameters()
        self.critic_parameters = list(value_head.parameters()) if value_head is not None else []
        self.actor_optimizer = adamw(self.actor_parameters, config.actor)
        self.critic_optimizer = adamw(self.critic_parameters, config.critic) if self.uses_critic else None
        self.micro_batches = MicroBatches(self.own_config, policy)
        level, dims = config.algorithm.logprob_level, config.algorithm.action_dims
        self.tokens_per_ratio = losses.tokens_per_ratio(level, len(dims), policy.chunk_size)
        self.schedule = ActorSchedule(self.actor_optimizer, config, self.tokens_per_ratio)
        self.signal_watch = SignalWatch(config)
        self.finite = FiniteGuard(self)
        self.kept = KeptEpisodes(self)

        # one generator per purpose: an evaluation or another minibatch size does not change what is sampled. And one for
        # each environment (PPO) or episode (GRPO): which ones decide together does not either.
        self.order_generator = torch.Generator().manual_seed(config.run.seed + 1)
        self.sampler = EpisodeSampler(config.env.task_ids, config.env.initial_states, config.run.seed)
        self.streams = EpisodeStreams(self.sampler, config.rollout.num_envs, ranks.share(config.rollout.num_envs))

        self.iteration = 0  # finished iterations
        self.timesteps = 0  # simulator steps of all environments
        self.groups_played = 0  # GRPO groups so far, which number the groups' episodes
        self.evaluated_iteration = -1
        self.obs: Observation | None = None  # of episodes under way between iterations (PPO)
        self.running = RunningEpisodes(envs.num_envs)
        self.broken_off = BrokenOff()  # in the present rollout
        self.stop_requested = False
        self.warned_no_hidden = False
        envs.on_wait = self.check_stop
        self.pace = progress.Pace()
        self.boundary = TrainerState(self)  # after the last finished iteration: what a stop goes back to
        self.outage = Outage("checkpoints", "the training goes on, and the next one is tried in its turn")

    @property
    def own_config(self) -> Config:
        """The settings of this process's environments and its part of a minibatch."""
        return share_of(self.config, self.ranks.size)

    @property
    def temperature(self) -> float:
        """Of this iteration's rollout and update."""
        rollout = self.config.rollout
        if rollout.final_temperature is None:
            return rollout.temperature
        done, total = self.boundary.timesteps, self.config.run.timesteps
        return cooled(rollout.temperature, rollout.final_temperature, done, total)

    # ---------------------------------------------------------------------------------------------------------- train

    def train(self) -> bool:
        """Rollout, advantages, update, until the timesteps are used up; evaluates and saves in between.

        Whatever ends it early, the state after the last finished iteration is saved: an unfinished one leaves no trace.

        Returns:
            Whether it has come to its end; False: it was asked to stop.

        Raises:
            OSError: its last state cannot be saved.
            NonFiniteError, InvariantError: what is trained or measured is wrong.
            NoSignal: run.stop_without_signal episodes had no reward.
            RuntimeError: a simulator died, the GPU is out of memory, ...
        """
        try:
            if self.evaluated_iteration < 0 or self.evaluation_due():
                self.evaluate_saved()
            if self.iteration > 0 and self.timesteps >= self.config.run.timesteps:
                log.info("nothing left to train: %d timesteps are done; give --timesteps more", self.timesteps)
            self.pace.begin(self.timesteps)
            while self.timesteps < self.config.run.timesteps:
                self.signal_watch.check()
                self.train_iteration()
                machine.release_memory()
            if self.evaluated_iteration < self.iteration:
                self.evaluate_saved()
            if self.outage.failing:
                self.save_checkpoint()
            self.logger.draw_curves()
            return True
        except BaseException as error:
            if getattr(error, "of_saved_weights", False):  # what came before them is what to go on with
                raise
            try:
                saved = self.save_checkpoint()
                if self.ranks.first:
                    log.warning("ended at %d timesteps, saved in %s", self.boundary.timesteps, saved)
            except Exception as problem:
                log.error("the state at %d timesteps could not be saved: %s", self.boundary.timesteps, problem)
                raise (problem if isinstance(error, StopTraining) else error) from None
            # a signal to the whole process group ends simulators and other processes too: that is no failure
            lost = self.stop_requested and isinstance(error, (SimulatorDied, ProcessLost))
            if not lost and not isinstance(error, StopTraining):
                raise
            return False

    def train_iteration(self) -> None:
        start = time.perf_counter()
        with naming_what_fits(self.config, "rollout", self.ranks.size):
            rollout, metrics = self.collect_rollout()
        rollout_s = time.perf_counter() - start
        batch, advantage_metrics = self.compute_advantages(rollout)
        metrics |= advantage_metrics | self.update(batch)
        self.finite.check_weights()
        self.iteration += 1
        iteration_s = time.perf_counter() - start
        metrics |= {
            "rollout/env_steps_per_s": metrics["rollout/env_steps"] / rollout_s,
            "rollout/render": self.config.env.render,
            "rollout/temperature": self.temperature,
            "time/rollout_s": rollout_s,
            "time/update_s": iteration_s - rollout_s,
            "system/peak_memory_gib": self.ranks.largest(progress.peak_memory_gib(self.device)),
            **self.micro_batches.metrics(),
        }
        self.logger.log({"iteration": self.iteration, "timesteps": self.timesteps, **metrics})
        plan = self.timesteps, self.config.run.timesteps
        log.info(progress.summary_line(self.iteration, *plan, metrics, self.pace.left_s(*plan)))
        self.signal_watch.see(metrics)

        self.boundary.take()
        if self.eval_envs is not None:
            self.eval_envs.replace_dead()
        if self.evaluation_due():
            self.evaluate_saved()
        elif self.iteration % self.config.logging.checkpoint_interval == 0:
            self.outage.survive(self.save_checkpoint)
        if self.iteration % self.config.logging.curves_interval == 0:
            self.logger.draw_curves()

    # -------------------------------------------------------------------------------------------------------- rollout

    def collect_rollout(self) -> tuple[RolloutBuffer, dict[str, Any]]:
        """Acts with the present policy in the environments of all processes; returns the rows and rollout/* metrics."""
        played = self.ranks.all_of(self.play)
        rollout = RolloutBuffer.join([rollout for rollout, _, _ in played])
        finished_episodes = [episode for _, episodes, _ in played for episode in episodes]
        dropped = sum(count for _, _, count in played)
        steps, num_tasks = int(rollout.rows("steps").sum()), len(self.config.env.task_ids)
        self.timesteps += steps
        return rollout, progress.rollout_metrics(finished_episodes, steps, num_tasks, dropped)

    @torch.no_grad()
    def play(self) -> tuple[RolloutBuffer, list[progress.FinishedEpisode], int]:
        """Acts with the present policy in this process's environments.

        PPO: n_steps decisions of every environment; episodes go on across iterations. GRPO: whole episodes from a queue
        of groups; an environment without an episode is idle and adds no rows.

        With rollout.overlap two halves of the environments take turns: the policy decides for one while the other steps,
        and begins the next episodes where one ends (PPO; GRPO's are known once the step is over, and reset then). Each
        environment decides, steps and is reset in the same order either way, and samples from its own generator.

        An episode whose simulator is lost is neither success nor failure: the environment goes on with another one, and its rows
        do not count (PPO), or it is played again and only that counts (GRPO).

        Returns:
            The rows, the episodes that ended, and how many were broken off.
        """
        num_envs, n_steps = self.envs.num_envs, self.config.rollout.n_steps
        source = self.streams if self.uses_critic else self.draw_groups()
        self.broken_off = BrokenOff()
        if not self.uses_critic or self.obs is None:
            self.obs, _ = reset_finished(self.envs, np.ones(num_envs, dtype=bool), source)
        halves = np.array_split(np.arange(num_envs), 2 if self.config.rollout.overlap else 1)
        buffers = [RolloutBuffer() for _ in halves]
        finished_episodes: list[progress.FinishedEpisode] = []
        rounds = 0
        waiting: list[tuple[RolloutBuffer, Decision]] = []  # at most one step is under way
        total = n_steps * num_envs if self.uses_critic else None
        bar = progress_bar("rollout", total, "dec", self.config.logging.progress)

        def finish_step() -> None:
            while waiting:
                buffer, decision = waiting.pop()
                last = self.uses_critic and len(buffer) == n_steps - 1
                finished_episodes.extend(self.finish_step(buffer, decision, source, last))
                bar.update(len(decision.envs))
                bar.set_postfix_str(progress.episodes_text(finished_episodes))

        with bar:
            while rounds < n_steps if self.uses_critic else source.playing:
                for half, buffer in zip(halves, buffers, strict=True):
                    playing = [int(i) for i in half if i in source.playing]
                    decision = self.decide(playing, source) if playing else None
                    finish_step()  # of the other half, which was under way meanwhile
                    if decision is not None:
                        shape, idle = self.envs.action_space.shape, self.broken_off.idle
                        step = step_arguments(decision.output.actions, playing, shape, idle)
                        self.envs.step_async(*step, source.coming(playing))
                        waiting.append((buffer, decision))
                    if len(halves) == 1:
                        finish_step()
                rounds += 1
            finish_step()
        rollout = RolloutBuffer.join(buffers)
        rollout.bootstrap(self.values_of, len(halves[0]))  # as many rows as a decision has
        return rollout, finished_episodes, self.broken_off.count

    def decide(self, playing: list[int], source: EpisodeSource) -> Decision:
        """One forward of the policy for the environments that play, and the values of what they see."""
        self.check_stop()
        seen, generators = self.obs.rows(playing), [source.generator_of(i) for i in playing]
        with self.finite.acting(seen):
            output = self.policy.act(seen, temperature=self.temperature, generator=generators)
            hidden = self.hidden_of(output)  # [N, D]
            values = self.predict_values(hidden)  # [N]
            check_finite("a log-probability of the rollout", output.logprobs)
            check_finite("an action of the rollout", output.actions)
            check_finite("a value of the rollout", values)
        return Decision(playing, output, hidden, values)

    def finish_step(
        self, buffer: RolloutBuffer, decision: Decision, source: EpisodeSource, last: bool
    ) -> list[progress.FinishedEpisode]:
        """Waits for the step of a decision, keeps its row, and starts the next episode where one has ended.

        Args:
            last: it is the last decision of the rollout (PPO).

        Returns:
            The episodes that ended.
        """
        playing, numbers = decision.envs, [source.playing[i] for i in decision.envs]
        raw_obs, *flags, info = self.envs.step_wait()
        next_obs, reached = (Observation.from_vector_env(obs) for obs in (raw_obs, info.get("truncated_obs", raw_obs)))
        rewards, terminated, truncated, steps = (torch.as_tensor(x)[playing] for x in (*flags, info["steps"]))  # [N]
        done = terminated | truncated
        seen = next_obs.rows(playing).proprio, steps, info["begun"][playing]
        self.finite.check_step(playing, decision.output.actions, rewards, *seen)
        finished_episodes = self.running.add(source, playing, *(x.numpy() for x in (rewards, steps, terminated, done)))
        finished = np.zeros(self.envs.num_envs, dtype=bool)
        finished[playing] = done.numpy()
        fresh_obs, lost = reset_finished(self.envs, finished, source, info["begun"])
        self.obs = fresh_obs or next_obs
        self.running.forget(lost)
        broken = self.broken_off.rows(lost, playing, done)  # [N]

        # states that were reached whose value no next row will tell
        ended = terminated if self.config.algorithm.bootstrap_truncated else done
        wanted = ~ended & (truncated | last) & self.uses_critic & ~broken  # [N]
        reached = reached.rows([playing[row] for row in wanted.nonzero().flatten()])
        transition = decision.transition(rewards, terminated, truncated, steps, numbers, broken)
        buffer.add(transition, wanted, self.policy.prepare(reached) if len(reached) else None)
        if not self.uses_critic:
            buffer.drop_episodes(torch.tensor(numbers)[broken])
        return finished_episodes

    def draw_groups(self) -> EpisodeQueue:
        """The iteration's GRPO episodes: groups that share task and initial state."""
        rollout, first = self.config.rollout, self.groups_played
        self.groups_played += (rollout.n_episodes or rollout.num_envs) // rollout.group_size
        held = getattr(self.envs, "held", None)
        return group_queue(self.sampler, first, self.groups_played - first, rollout.group_size, held, self.ranks)

    def hidden_of(self, output: PolicyOutput) -> Tensor:
        """The cached hidden state [N, D] on the CPU; from one more forward, with a warning, if the policy gave none.

        [N, 0] without a critic, which alone needs it.
        """
        if self.value_head is None:
            return torch.zeros(len(output.inputs), 0)
        if output.hidden is not None:
            return output.hidden.cpu()
        if not self.warned_no_hidden:
            self.warned_no_hidden = True
            log.warning(
                "the policy returned no hidden state: one more forward a decision computes it, without gradients"
            )
        return self.policy.compute_hidden(output.inputs).cpu()

    def predict_values(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N] float32 on the CPU; zeros without a critic."""
        if self.value_head is None:
            return torch.zeros(len(hidden))
        return self.value_head(hidden.to(self.device)).cpu()

    def values_of(self, inputs: PolicyInputs) -> Tensor:
        """V [B] of states that were reached but not acted in."""
        with self.finite.valuing(inputs):
            values = self.predict_values(self.policy.compute_hidden(inputs))
            check_finite("a value of the observations reached", values)
        return values

    # ----------------------------------------------------------------------------------------------------- advantages

    def compute_advantages(self, rollout: RolloutBuffer) -> tuple[Minibatch, dict[str, Any]]:
        """The one branch between PPO and GRPO: how good each decision was. Both give rows to the same update."""
        if not self.uses_critic:
            return grpo_rows(rollout, self.config.algorithm, self.config.rollout.group_size)
        batch, metrics, rewards = gae_rows(rollout, self.config.algorithm)
        self.schedule.see_rewards(rewards, self.iteration)
        return batch, metrics

    # --------------------------------------------------------------------------------------------------------- update

    def update(self, batch: Minibatch) -> dict[str, Any]:
        """n_epochs passes of minibatches over the rows, each with one step of both optimizers.

        Returns:
            actor/* and critic/* metrics: means over the minibatches, but for the first minibatch's invariants.
        """
        algorithm = self.config.algorithm
        self.schedule.begin_update(self.boundary.timesteps)
        if len(batch) == 0:
            log.warning("every group's returns are equal, or every episode was broken off: no update in this iteration")
            return {}
        train_actor = self.schedule.steps_in(self.iteration)
        scored: dict[str, float] = {}
        if algorithm.recompute_logprobs and train_actor:
            old_logprobs = self.micro_batches.score(batch, self.policy.logprobs, self.temperature, self.ranks)
            scored = check_rescored(batch, old_logprobs, self.policy.chunk_size, self.config.policy.dtype)
            batch = replace(batch, old_logprobs=old_logprobs)
        if algorithm.kl_coef > 0 and train_actor:
            reference = self.micro_batches.score(batch, self.policy.reference_logprobs, self.temperature, self.ranks)
            batch = replace(batch, reference_logprobs=reference)
        steps_planned = algorithm.n_epochs * -(-len(batch) // algorithm.minibatch_size)
        bar = progress_bar("update", steps_planned, "step", self.config.logging.progress)
        history: list[dict[str, float]] = []  # metrics of each minibatch
        stopped_by_kl = False
        with bar:
            for rows in shuffled_rows(len(batch), algorithm.minibatch_size, self.order_generator, algorithm.n_epochs):
                self.check_stop(together=True)
                minibatch, steps = batch.share(rows, self.ranks), batch.steps[rows]
                arguments = (minibatch, train_actor, train_actor or not history, steps)
                metrics = self.ranks.add_metrics(self.micro_batches.run(self.minibatch_gradients, *arguments))
                with self.finite.updating(minibatch, train_actor, steps):  # before any step
                    for name, value in metrics.items():
                        check_finite(name, torch.tensor(value))
                self.ranks.add_gradients((self.actor_parameters if train_actor else []) + self.critic_parameters)
                history.append(metrics)
                if len(history) == 1:
                    check_first_minibatch(metrics, self.tokens_per_ratio, self.config.policy.dtype)
                else:
                    kl = metrics.get("actor/approx_kl", 0.0)
                    self.schedule.before_step(kl)
                    if algorithm.target_kl is not None and kl > algorithm.target_kl:
                        stopped_by_kl = True
                        break
                with self.finite.updating(minibatch, train_actor, steps):
                    metrics |= self.optimizer_steps(train_actor)
                bar.update()
                bar.set_postfix_str(progress.update_text(metrics))
        actor_steps = len(history) - stopped_by_kl if train_actor else 0
        passes = list(self.critic_passes(batch))
        self.ranks.copy_from_first(self.critic_parameters)  # all have calculated the same, but for rounding perhaps
        check_replicas(self.actor_parameters, self.ranks)
        steps = {"actor/optimizer_steps": actor_steps, "actor/stopped_by_kl": float(stopped_by_kl)}
        return progress.update_metrics(history, passes) | self.schedule.metrics() | steps | scored

    def critic_passes(self, batch: Minibatch) -> Iterator[dict[str, float]]:
        """critic_epochs more passes of the value head over the cached hidden states: nearly free next to the policy's.

        A new head needs many more steps than the policy may take on one rollout; more passes for the value than for the
        policy is Cobbe et al. 2021 (arXiv:2009.04416).
        """
        if not self.uses_critic:
            return
        hidden, returns = batch.hidden.to(self.device), batch.returns.to(self.device)  # [R, D], [R]
        for _ in range(self.config.algorithm.critic_epochs):
            self.check_stop(together=True)
            for rows in shuffled_rows(len(batch), self.config.algorithm.minibatch_size, self.order_generator):
                self.critic_optimizer.zero_grad(set_to_none=True)
                loss = losses.value_loss(self.value_head(hidden[rows]), returns[rows])
                with self.finite.fitting(hidden[rows], returns[rows]):
                    check_finite("critic/value_loss", loss)
                    loss.backward()
                    norms = self.optimizer_steps(train_actor=False)
                yield {"critic/value_loss": loss.item()} | norms

    def minibatch_gradients(
        self, minibatch: Minibatch, train_actor: bool, score_actor: bool, steps: Tensor | None = None
    ) -> dict[str, float]:
        """Backward passes of all micro-batches: they add up to the gradient of the whole minibatch.

        One forward a micro-batch gives policy and value. While only the critic warms up, the hidden states cached in
        the rollout are enough: no forward of the policy at all (but on the first minibatch, to check the invariants).

        Args:
            train_actor: the policy loss counts; False during the critic's warm-up.
            score_actor: compute the actor's numbers.
            steps: int64 [B], of the whole minibatch, where this is one process's share of it.
        """
        algorithm = self.config.algorithm
        minibatch = minibatch.to(self.device)  # once: micro-batches are parts of it
        steps = minibatch.steps if steps is None else to_device(steps, self.device)
        self.actor_optimizer.zero_grad(set_to_none=True)
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad(set_to_none=True)
        tokens = losses.token_mask(steps, self.policy.chunk_size, ACTION_DIM)  # [B, A]
        trained = losses.of_dims(tokens, algorithm.action_dims, ACTION_DIM)  # [B, A]
        _, ratios = losses.sum_to_level(trained.float(), trained, algorithm.logprob_level, ACTION_DIM)  # [B, L]
        totals: dict[str, Tensor] = {}
        for micro in minibatch.split(self.micro_batches.rows):
            loss = torch.zeros((), device=self.device)
            hidden = micro.hidden
            if score_actor:
                with nullcontext() if train_actor else torch.no_grad():
                    actor_loss, metrics, fresh_hidden = self.actor_losses(micro, trained.sum(), ratios.sum())
                progress.accumulate(totals, metrics)
                if train_actor:
                    loss = loss + actor_loss
                    hidden = fresh_hidden
            if self.value_head is not None:
                if algorithm.freeze_vla_for_critic:
                    hidden = hidden.detach()
                critic_loss = losses.value_loss(self.value_head(hidden), micro.returns, len(steps), micro.steps > 0)
                progress.accumulate(totals, {"critic/value_loss": critic_loss})
                loss = loss + algorithm.value_coef * critic_loss
            loss.backward()
        return progress.to_numbers(totals)

    def actor_losses(
        self, micro: Minibatch, token_count: Tensor, ratio_count: Tensor
    ) -> tuple[Tensor, dict, Tensor | None]:
        """Policy loss, entropy bonus and KL penalty of a micro-batch, each divided by the minibatch's valid entries.

        Args:
            token_count: tokens of the minibatch that were acted on and are of algorithm.action_dims.
            ratio_count: valid ratios of the minibatch (tokens, actions or chunks).

        Returns:
            The loss, actor/* metrics (sums that add up over micro-batches), and the hidden state [B, D] of this forward.
        """
        algorithm = self.config.algorithm
        evaluation = self.policy.evaluate_actions(micro.inputs, micro.action_tokens, temperature=self.temperature)
        tokens = losses.token_mask(micro.steps, self.policy.chunk_size, ACTION_DIM)
        trained = losses.of_dims(tokens, algorithm.action_dims, ACTION_DIM)
        logprobs, mask = losses.sum_to_level(evaluation.logprobs, trained, algorithm.logprob_level, ACTION_DIM)
        old_logprobs, _ = losses.sum_to_level(micro.old_logprobs, trained, algorithm.logprob_level, ACTION_DIM)
        clip = (algorithm.clip_ratio_low, algorithm.clip_ratio_high)

        policy_loss = losses.ppo_policy_loss(logprobs, old_logprobs, micro.advantages, mask, *clip, count=ratio_count)
        entropy = losses.masked_mean(evaluation.entropy, trained, token_count)
        loss = policy_loss - algorithm.entropy_coef * entropy
        metrics = {"actor/policy_loss": policy_loss, "actor/entropy": entropy}
        if micro.reference_logprobs is not None:
            reference_kl = losses.approx_kl(evaluation.logprobs, micro.reference_logprobs, trained, token_count)
            loss = loss + algorithm.kl_coef * reference_kl
            metrics["actor/reference_kl"] = reference_kl
        with torch.no_grad():
            ratio_error = (losses.log_ratio(evaluation.logprobs, micro.old_logprobs, tokens).exp() - 1).abs()  # [B, A]
            metrics |= {
                "actor/approx_kl": losses.approx_kl(old_logprobs, logprobs, mask, ratio_count),
                "actor/clip_fraction": losses.clip_fraction(logprobs, old_logprobs, mask, *clip, ratio_count),
                "actor/ratio_error": ratio_error.max(),
                "actor/ratio_error_mean": losses.masked_mean(ratio_error, trained, token_count),
            }
        hidden = evaluation.hidden
        if hidden is None and self.value_head is not None:
            hidden = self.policy.compute_hidden(micro.inputs)
        return loss, metrics, hidden

    def optimizer_steps(self, train_actor: bool) -> dict[str, float]:
        """Clips each side's gradient by its own norm, then steps both optimizers; neither if a norm is not finite."""
        sides = {"critic": (self.critic_optimizer, self.config.critic)} if self.uses_critic else {}
        sides |= {"actor": (self.actor_optimizer, self.config.actor)} if train_actor else {}
        norms = {
            f"{name}/grad_norm": clip_gradient(optimizer, settings) for name, (optimizer, settings) in sides.items()
        }
        for name, norm in norms.items():
            check_finite(name, norm)
        for optimizer, _ in sides.values():
            optimizer.step()
        return {name: norm.item() for name, norm in norms.items()}

    # ---------------------------------------------------------------------------------------------------------- guard

    def request_stop(self) -> None:
        """Ends the run at the next decision or minibatch, saved as it was after the last finished iteration."""
        self.stop_requested = True

    def check_stop(self, together: bool = False) -> None:
        """together: all processes are at this place; else each is on its own, between two decisions (Ranks.all_of)."""
        asked = self.ranks.any if together else self.ranks.stop_asked
        if asked(self.stop_requested):
            raise StopTraining

    # ------------------------------------------------------------------------------------------------------- evaluate

    def evaluation_due(self) -> bool:
        interval = self.config.eval.interval
        return interval > 0 and self.iteration % interval == 0 and self.evaluated_iteration < self.iteration

    def evaluate_saved(self) -> None:
        """Evaluates what is saved first, as the run may be killed in it, and keeps that if it is the best so far."""
        begun = self.evaluated_iteration >= 0  # a run that cannot be saved at all ends at once
        folder = self.outage.survive(self.save_checkpoint) if begun else self.save_checkpoint()
        entry = self.evaluate()
        if entry and folder and self.config.logging.keep_best and self.ranks.first:
            self.outage.survive(lambda: keep_best(folder, evaluation_of(entry, self.config.eval)))
        if self.outage.survive(self.save_checkpoint):  # a resumed run does not evaluate again
            self.kept.remove()

    def evaluate(self) -> dict[str, Any]:
        """Success from the fixed initial states, logged as eval/*, with a video of one success and one failure."""
        entry: dict[str, Any] = {}
        if self.eval_envs is not None:
            start, prefix = time.perf_counter(), f"{self.timesteps:09d}"
            videos = self.logger.folder / "videos"
            with naming_what_fits(self.config, "eval", self.ranks.size), self.finite.evaluating():
                arguments = (self.policy, self.eval_envs, self.config, videos, prefix, self.check_stop)
                predict_values = None if self.value_head is None else self.predict_values
                metrics = evaluate_modes(*arguments, predict_values, self.ranks, self.kept.begin())
            metrics["time/eval_s"] = time.perf_counter() - start
            entry = {"iteration": self.iteration, "timesteps": self.timesteps, **metrics}
            self.logger.log_evaluation(entry, sorted(videos.glob(f"{prefix}_*.mp4")))
            log.info("evaluation at %d timesteps: %s", self.timesteps, progress.evaluation_text(metrics))
        self.evaluated_iteration = self.iteration
        self.boundary.set_evaluated()
        return entry

    # ----------------------------------------------------------------------------------------------------- checkpoint

    def save_checkpoint(self) -> Path:
        """Writes the state after the last finished iteration; returns the folder."""
        return self.boundary.save()

    def load_checkpoint(self, folder: Path) -> None:
        """Continues from a checkpoint as if the run had never stopped.

        Raises:
            CheckpointError: the checkpoint is torn or of another model.
        """
        self.boundary.load(folder)
