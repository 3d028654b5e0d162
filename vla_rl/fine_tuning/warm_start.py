"""From an L1 head to a token head: DAgger on the simulator, with the L1 head as the expert (Ross et al. 2011, arXiv:1011.0686).

    iteration i:  play episodes; of each decision a coin, heads with probability share(i), says that the token head acts, else
                  the L1 head does, pushed; the L1 head labels them all
                  cross-entropy of the token head on the labels of all iterations that are kept

Ross's beta_i is 1 - share(i). Not here: the two heads (vla_rl.fine_tuning.two_heads), what is kept on disk
(labelled_decisions), simulators, evaluation and files of the result (vla_rl.warmstart).

N environments, C steps in a chunk, R decisions of an iteration, A action tokens.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from vla_rl.fine_tuning.labelled_decisions import DecisionStore, LabelledDecisions
from vla_rl.fine_tuning.samples import batch_rows
from vla_rl.fine_tuning.supervised_fine_tuning import learning_rate
from vla_rl.fine_tuning.two_heads import Head, Student
from vla_rl.learning.episodes import (
    EpisodeQueue,
    EpisodeSampler,
    RunningEpisodes,
    episode_generators,
    reset_finished,
    step_arguments,
)
from vla_rl.learning.optimizer import adamw, load_optimizer
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run import progress
from vla_rl.run.checkpoint import (
    checkpoint_number,
    cpu_copy,
    list_checkpoints,
    load_trainer_state,
    loading,
    save_torch,
    set_aside_later_checkpoints,
    verify,
    whole_number,
    write_checkpoint,
)
from vla_rl.run.files import Outage, read_json
from vla_rl.run.load_settings import save_config
from vla_rl.run.logs import progress_bar
from vla_rl.run.settings import ConfigError
from vla_rl.run.warmstart_settings import WarmstartConfig
from vla_rl.types import NonFiniteError, Observation

log = logging.getLogger(__name__)

# whose success is told, by the end of its metrics' names
HEADS = {
    "l1": "L1 head",
    "greedy": "token head greedy",
    "mean_action": "token head mean action",
    "sampled": "token head sampled",
}
DATA_FILE = "data.json"  # in a checkpoint: which files of RUN/data it was trained on


def token_share(iteration: int, mixed_iterations: int) -> float:
    """Of the decisions, those that the token head takes: 0 in iteration 0, then 1/m, 2/m, ... 1."""
    return min(1.0, iteration / mixed_iterations)


def pushed(actions: np.ndarray, push: np.ndarray) -> np.ndarray:
    """Actions float32 [C, 7] in environment units with a push [3] of the translation in each step, clipped to -1..1."""
    actions = np.array(actions)
    actions[:, :3] = np.clip(actions[:, :3] + push, -1, 1)
    return actions


class WarmStart:
    """Teaches a student what a teacher does.

    Args:
        teacher: labels; never changes.
        student: learns.
        envs: N training environments (see OpenVLA_PPO).
        measure: "l1" or "tokens" -> eval/* metrics of that head from fixed states.
        logger: knows the run's folder.
        stop: called before each decision and optimizer step; may raise to end the run, which goes on from the last iteration.
    """

    def __init__(
        self,
        config: WarmstartConfig,
        teacher: Head,
        student: Student,
        envs: VectorEnv,
        measure: Callable[[str], dict[str, Any]],
        logger: MetricsLogger,
        stop: Callable[[], None] = lambda: None,
    ):
        self.config, self.teacher, self.student, self.envs = config, teacher, student, envs
        self.measure, self.logger, self.stop = measure, logger, stop
        self.parameters = student.parameters()
        self.optimizer = adamw(self.parameters, config.optimizer)
        self.sampler = EpisodeSampler(config.env.task_ids, config.env.initial_states, config.run.seed)
        self.store = DecisionStore(logger.folder / "data", config.collection.keep)
        self.outage = Outage("checkpoints", "the training goes on, and the next one is tried in its turn")
        self.iteration = 0  # finished iterations
        self.step = 0  # finished optimizer steps
        self.evaluated_iteration = -1
        self.success: dict[str, float] = {}  # of "l1" and "tokens", as last measured
        self.l1_metrics: dict[str, Any] = {}  # of its one evaluation

    def train(self) -> bool:
        """Iterations until the token head is within the margin, or to the limit; whether it is."""
        while True:
            if self.evaluation_due():
                self.evaluate()
                self.outage.survive(self.save_checkpoint)
            if self.reached() or self.iteration >= self.config.training.iterations:
                if self.outage.failing:
                    self.save_checkpoint()
                return self.reached()
            self.train_iteration()

    def reached(self) -> bool:
        """Whether the token head of this iteration was measured to be as good as the margin asks for."""
        measured = "tokens" in self.success and self.evaluated_iteration == self.iteration
        # a whole state is the least that can be told apart: 0.7 - 0.05 is a hair above 0.65
        return measured and self.success["tokens"] >= self.success["l1"] - self.config.training.margin - 1e-9

    def evaluation_due(self) -> bool:
        last = self.iteration >= self.config.training.iterations
        return self.evaluated_iteration < self.iteration and (last or self.iteration % self.config.eval.interval == 0)

    def evaluate(self) -> None:
        """The L1 head's success is measured once, before the first iteration, and told beside the token head's each time."""
        if "l1" not in self.success:
            self.l1_metrics = self.measure("l1")
            self.success["l1"] = self.l1_metrics["eval/success_rate_l1"]
            self.check_teacher()
        metrics = dict(self.l1_metrics)
        if self.iteration > 0:
            metrics |= self.measure("tokens")
            self.success["tokens"] = metrics[f"eval/success_rate_{self.config.eval.modes[0]}"]
        self.evaluated_iteration = self.iteration
        self.logger.log({"iteration": self.iteration, "step": self.step, **metrics})
        log.info("iteration %d | success %s", self.iteration, progress.success_text(metrics, HEADS))
        self.logger.draw_curves()

    def check_teacher(self) -> None:
        """Raises ConfigError where the L1 head solves nothing: so would what learns from it, within any margin."""
        if self.success["l1"] == 0:
            raise ConfigError(
                f"the L1 head solves none of {self.l1_metrics['eval/episodes_l1']} episodes, so there is nothing to learn from it; "
                "check, in this order, policy.num_images, policy.use_proprio, env.image_size and eval.render, policy.unnorm_key, "
                "policy.center_crop, with python -m vla_rl.evaluate --checkpoint ... policy.head=l1"
            )

    def train_iteration(self) -> None:
        start = time.perf_counter()
        share = token_share(self.iteration, self.config.collection.mixed_iterations)
        decisions, metrics = self.collect(share)
        self.store.add(self.iteration + 1, decisions)
        collection_s = time.perf_counter() - start
        metrics |= self.learn()
        self.iteration += 1
        metrics |= {
            "warmstart/token_share": share,
            "warmstart/decisions": len(self.store),
            "time/rollout_s": collection_s,
            "time/update_s": time.perf_counter() - start - collection_s,
            "system/peak_memory_gib": progress.peak_memory_gib(self.student.device),
        }
        self.logger.log({"iteration": self.iteration, "step": self.step, **metrics})
        log.info(summary(self.iteration, self.config.training.iterations, metrics))
        self.outage.survive(self.save_checkpoint)  # before an evaluation in which the run may be killed

    # -------------------------------------------------------------------------------------------------------- collection

    @torch.no_grad()
    def collect(self, share: float) -> tuple[LabelledDecisions, dict[str, Any]]:
        """Plays the iteration's episodes; each draws from a generator of its own.

        Returns:
            Its decisions with their labels, and rollout/* metrics.
        """
        settings = self.config.collection
        queue = self.episodes()
        running, finished = RunningEpisodes(self.envs.num_envs), []
        rows: list[LabelledDecisions] = []
        steps_played = 0
        self.envs.on_wait = self.stop
        dropped = 0
        obs, _ = reset_finished(self.envs, np.ones(self.envs.num_envs, dtype=bool), queue)
        bar = progress_bar("collect", settings.episodes, "ep", self.config.logging.progress)
        with bar:
            while queue.playing:
                self.stop()
                playing = sorted(queue.playing)
                seen = obs.rows(playing)
                label = self.teacher.act(seen, mode="greedy", temperature=1.0, generator=None)
                rows.append(LabelledDecisions(label.inputs, label.action_tokens))
                actions = self.choose(seen, label.actions, [queue.generator_of(i) for i in playing], share)
                self.envs.step_async(*step_arguments(actions, playing, self.envs.action_space.shape))
                raw_obs, *flags, info = self.envs.step_wait()
                rewards, terminated, truncated, steps = (np.asarray(x)[playing] for x in (*flags, info["steps"]))
                done = terminated | truncated
                finished += running.add(queue, playing, rewards, steps, terminated, done)
                steps_played += int(steps.sum())
                bar.update(int(done.sum()))
                bar.set_postfix_str(progress.episodes_text(finished))
                ended = np.zeros(self.envs.num_envs, dtype=bool)
                ended[playing] = done
                fresh, broken = reset_finished(self.envs, ended, queue)  # labels of what was broken off are right, too
                running.forget(broken)
                dropped += len(broken)
                obs = fresh or Observation.from_vector_env(raw_obs)
        metrics = progress.rollout_metrics(finished, steps_played, len(self.config.env.task_ids), dropped)
        return LabelledDecisions.concatenate(rows), metrics

    def episodes(self) -> EpisodeQueue:
        """The iteration's, as a function of the seed and of its number: tasks take turns, placements are fresh."""
        count, tasks = self.config.collection.episodes, self.sampler.task_ids
        numbers = range(self.iteration * count, (self.iteration + 1) * count)
        episodes = [self.sampler.draw(0, number, tasks[number % len(tasks)]) for number in numbers]
        return EpisodeQueue(episodes, getattr(self.envs, "held", None), episode_generators(self.sampler.seed, numbers))

    def choose(
        self, seen: Observation, by_teacher: np.ndarray, generators: list[torch.Generator], share: float
    ) -> np.ndarray:
        """What is carried out, float32 [n, C, 7]: of each row the teacher's action, pushed, or the student's.

        A row draws its coin and its push from its own generator, whoever else plays.
        """
        settings, actions = self.config.collection, np.array(by_teacher)
        student_rows = []
        for row, generator in enumerate(generators):
            coin = torch.rand(1, generator=generator).item()
            push = settings.noise * torch.randn(3, generator=generator).numpy()
            if coin < share:
                student_rows.append(row)
            else:
                actions[row] = pushed(actions[row], push)
        if student_rows:
            own = [generators[row] for row in student_rows]
            options = {"mode": "sampled", "temperature": settings.temperature, "generator": own}
            actions[student_rows] = self.student.act(seen.rows(student_rows), **options).actions
        return actions

    # ---------------------------------------------------------------------------------------------------------- learning

    def learn(self) -> dict[str, float]:
        """steps_per_iteration optimizer steps on the decisions that are kept; means over them."""
        training = self.config.training
        losses, norms = [], []
        bar = progress_bar("learn", training.steps_per_iteration, "step", self.config.logging.progress)
        with bar:
            for step in range(training.steps_per_iteration):
                self.stop()
                # an order of the iteration's own: the data have grown
                seed = self.config.run.seed + 1000 * self.iteration
                loss, norm = self.train_step(batch_rows(len(self.store), training.batch_size, step, seed))
                losses.append(loss)
                norms.append(norm)
                bar.update()
                bar.set_postfix_str(f"loss={np.mean(losses[-50:]):.3f}")
        return {
            "warmstart/loss": float(np.mean(losses)),
            "warmstart/grad_norm": float(np.mean(norms)),
            "warmstart/learning_rate": self.optimizer.param_groups[0]["lr"],
        }

    def train_step(self, rows: np.ndarray) -> tuple[float, float]:
        """The loss, in nats a token, and the gradient's norm before clipping."""
        training = self.config.training
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in rows.reshape(-1, training.micro_batch_size):
            batch = self.store.rows(part)
            loss = self.student.loss(batch.inputs, batch.tokens) * (len(part) / len(rows))
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise NonFiniteError(
                f"the loss or its gradient is not finite in step {self.step + 1}; --resume with a lower learning rate"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, training, self.step)
        self.optimizer.step()
        self.student.stepped()
        self.step += 1
        return total, norm

    # -------------------------------------------------------------------------------------------------------- checkpoint

    @property
    def fingerprint(self) -> str:
        return f"warmstart, {self.student.fingerprint()}"

    def save_checkpoint(self) -> Path:
        """Between two iterations nothing is under way, so this is all."""
        values: list[Tensor] = cpu_copy(self.parameters)
        state = {name: getattr(self, name) for name in ("iteration", "step", "evaluated_iteration", "success")}
        state |= {"l1_metrics": self.l1_metrics}
        state |= {"optimizer": cpu_copy(self.optimizer.state_dict())}

        def write_files(folder: Path) -> None:
            self.student.save(folder, values)
            save_torch(state, folder / "trainer.pt")
            (folder / DATA_FILE).write_text(json.dumps(self.store.digests, indent=1))
            save_config(self.config, folder / "config.yaml")

        self.logger.write_waiting()
        root, keep = self.logger.folder / "checkpoints", self.config.training.keep_checkpoints
        path = write_checkpoint(root, f"iteration-{self.iteration:06d}", self.fingerprint, write_files, keep)
        self.store.remove_unneeded(name for folder in list_checkpoints(root) for name in data_of(folder))
        return path

    def load_checkpoint(self, folder: Path) -> None:
        """Raises CheckpointError: it is torn, of another model, or its data are not there."""
        verify(folder, self.fingerprint)
        state = load_trainer_state(folder)
        self.store.restore(data_of(folder))
        self.student.load(folder)
        with loading(folder / "trainer.pt"):
            load_optimizer(self.optimizer, state["optimizer"], self.config.optimizer)
            self.iteration, self.step = whole_number(state, "iteration"), whole_number(state, "step")
            self.evaluated_iteration = whole_number(state, "evaluated_iteration", least=-1)
            self.success, self.l1_metrics = dict(state["success"]), dict(state["l1_metrics"])
        later = [other for other in list_checkpoints(folder.parent) if checkpoint_number(other) > self.iteration]
        self.store.set_aside(name for other in later for name in data_of(other))
        set_aside_later_checkpoints(folder)
        self.logger.continue_from(self.iteration, evaluated=self.evaluated_iteration == self.iteration)


def data_of(checkpoint: Path) -> dict[str, str]:
    """File name -> SHA-256 of the decisions that a checkpoint was trained on.

    Raises:
        CheckpointError: it does not tell.
    """
    with loading(checkpoint / DATA_FILE):
        names = read_json(checkpoint / DATA_FILE)
        for name, digest in names.items():
            if Path(name).name != name or name == ".." or not isinstance(digest, str):  # a path would lead elsewhere
                raise ValueError(f"{name!r:.60} is no file of decisions with its SHA-256")
        return names


def summary(iteration: int, iterations: int, metrics: dict[str, Any]) -> str:
    return (
        f"iteration {iteration}/{iterations} | token head takes {metrics['warmstart/token_share']:.0%} | success "
        f"{metrics['rollout/success_rate']:.1%} of {metrics['rollout/episodes']} | loss {metrics['warmstart/loss']:.3f} nats a token | "
        f"{metrics['warmstart/decisions']} decisions | collect {metrics['time/rollout_s']:.0f} s, learn "
        f"{metrics['time/update_s']:.0f} s | {metrics['system/peak_memory_gib']:.1f} GiB"
    )
