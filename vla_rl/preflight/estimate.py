"""What a run will take, calculated from pieces that were measured: seconds, memory, disk.

Every assumption is on the side of more: each episode goes to its step limit, each iteration steps the actor. Not here: the
measuring (vla_rl.preflight.trial).

T decisions of a rollout, N environments, C steps of a decision, L the step limit of an episode, E episodes, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from vla_rl.run.settings import Config

LOGS_BYTES = 500_000  # curves and the like
LINE_BYTES = 2_000  # of metrics.jsonl, an iteration
BUFFER_COPIES = 2  # of a rollout's rows, by decision and flat


@dataclass(frozen=True)
class Pieces:
    """Measured, seconds and bytes."""

    start_s: float  # model, simulators, compiling
    decision_s: float  # of all training environments: policy and simulators
    reset_s: float  # of all training environments at once, with the settle steps
    row_s: float  # of the update, forward and backward
    step_s: float  # of both optimizers
    score_s: float  # of one row's further scoring; 0 where none is asked for
    critic_step_s: float  # of the value head alone; 0 without further passes
    eval_decision_s: float  # of all evaluation environments
    video_s: float  # of the decisions that a mode's videos play again, one of each at a time; 0 without videos
    save_s: float  # of a checkpoint
    checkpoint_bytes: int
    video_bytes: float  # a decision
    row_bytes: float  # of the rollout, in host memory
    rows: int  # that were there while the peaks were measured
    peak_gib: float  # of the trainer: on the GPU if it uses one, else resident
    host_peak_gib: float  # of the trainer, resident
    workers_gib: float  # of all simulators' processes


@dataclass(frozen=True)
class Estimate:
    """Of a whole run."""

    decisions: int  # of all environments together, a rollout
    rollout_s: float
    update_s: float
    eval_s: float
    iterations: int
    evaluations: int
    total_s: float
    gpu_peak_gib: float | None  # None on the CPU
    host_peak_gib: float  # trainer and simulators
    trainer_host_gib: float
    trainer_peak_gib: float  # as system/peak_memory_gib has it
    checkpoints: int  # that are kept
    other_bytes: int  # videos, metrics, curves
    disk_bytes: int


def estimate(config: Config, pieces: Pieces) -> Estimate:
    rollout, algorithm, chunk = config.rollout, config.algorithm, config.policy.chunk_size
    limit = config.max_episode_steps()
    per_episode = -(-limit // chunk)  # decisions
    if algorithm.estimator == "gae":
        rounds, rows = rollout.n_steps, rollout.n_steps * rollout.num_envs
        episodes_each = rounds / per_episode  # that begin in an environment
        steps = rows * limit / per_episode
    else:
        episodes = rollout.n_episodes or rollout.num_envs
        episodes_each = -(-episodes // rollout.num_envs)
        rounds, rows, steps = episodes_each * per_episode, episodes * per_episode, episodes * limit
    rollout_s = rounds * pieces.decision_s + episodes_each * pieces.reset_s
    iterations = int(-(-config.run.timesteps // steps))
    evaluations, eval_s = count_evaluations(config, iterations), evaluation_seconds(config, pieces)
    update_s = update_seconds(config, pieces, rows)
    saved = evaluations + iterations // config.logging.checkpoint_interval  # states; twice where they are evaluated
    total_s = (
        pieces.start_s
        + iterations * (rollout_s + update_s)
        + evaluations * eval_s
        + (saved + evaluations) * pieces.save_s
    )

    kept = min(saved, config.logging.keep_checkpoints) + config.logging.keep_best
    kept += iterations // config.logging.keep_every if config.logging.keep_every else 0
    growth_gib = BUFFER_COPIES * max(0, rows - pieces.rows) * pieces.row_bytes / 2**30
    trainer_host_gib = pieces.host_peak_gib + growth_gib
    on_gpu = config.run.device == "cuda"
    per_eval_episode = -(-config.max_episode_steps(evaluation=True) // chunk)
    videos = evaluations * len(config.eval.modes) * 2 * per_eval_episode * pieces.video_bytes  # a success, a failure
    other_bytes = int(videos) + LOGS_BYTES + iterations * LINE_BYTES
    return Estimate(
        decisions=rows,
        rollout_s=rollout_s,
        update_s=update_s,
        eval_s=eval_s,
        iterations=iterations,
        evaluations=evaluations,
        total_s=total_s,
        gpu_peak_gib=pieces.peak_gib if on_gpu else None,
        host_peak_gib=trainer_host_gib + pieces.workers_gib,
        trainer_host_gib=trainer_host_gib,
        trainer_peak_gib=pieces.peak_gib if on_gpu else trainer_host_gib,
        other_bytes=other_bytes,
        checkpoints=kept,
        disk_bytes=kept * pieces.checkpoint_bytes + other_bytes,
    )


def count_evaluations(config: Config, iterations: int) -> int:
    """At the start, every eval.interval iterations, and at the end."""
    interval = config.eval.interval
    regular = iterations // interval if interval else 0
    last = iterations > 0 and not (interval and iterations % interval == 0)
    return 1 + regular + int(last)


def evaluation_seconds(config: Config, pieces: Pieces) -> float:
    """Every episode to the step limit in every mode, and its videos; starts are settled once and kept."""
    episodes = len(config.env.task_ids) * len(config.eval.states)
    rounds = -(-episodes // min(config.eval.num_envs, episodes))
    per_episode = -(-config.max_episode_steps(evaluation=True) // config.policy.chunk_size)
    reset = pieces.eval_decision_s * pieces.reset_s / pieces.decision_s
    return len(config.eval.modes) * per_episode * (rounds * pieces.eval_decision_s + pieces.video_s) + rounds * reset


def update_seconds(config: Config, pieces: Pieces, rows: int) -> float:
    algorithm = config.algorithm
    steps = -(-rows // algorithm.minibatch_size)  # an epoch
    scorings = int(algorithm.recompute_logprobs) + int(algorithm.kl_coef > 0)
    return (
        algorithm.n_epochs * (rows * pieces.row_s + steps * pieces.step_s)
        + scorings * rows * pieces.score_s
        + (algorithm.critic_epochs * steps * pieces.critic_step_s if algorithm.estimator == "gae" else 0)
    )
