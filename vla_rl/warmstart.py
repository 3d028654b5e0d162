"""Teaches the token head of an OpenVLA-OFT checkpoint what its L1 head does, on the simulator: a start for PPO and GRPO.

    python -m vla_rl.warmstart --config configs/warmstart.yaml --checkpoint moojink/openvla-7b-oft-finetuned-libero-spatial
    python -m vla_rl.warmstart --resume runs/NAME

The result, runs/NAME/model, is a checkpoint in the official layout without an L1 head, for start_gae_ppo_training.py
--checkpoint. Not here: how it learns (vla_rl.fine_tuning.warm_start), the two heads (vla_rl.fine_tuning.two_heads).
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from vla_rl.evaluation.play import evaluate_policy, evaluation_episodes, success_metrics
from vla_rl.fine_tuning.two_heads import L1Teacher, TokenStudent
from vla_rl.fine_tuning.warm_start import WarmStart
from vla_rl.learning.parts import build_policy, instructions_of, log_sizes
from vla_rl.preflight.needs import check_device, check_policy, check_rendering
from vla_rl.preflight.room import check_fits
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.reports.weights_and_biases import check_wandb
from vla_rl.run.checkpoint import locked
from vla_rl.run.command_line import end_of, find_config, flag_settings, parse, settings_parser
from vla_rl.run.interruption import Stop, Stopped
from vla_rl.run.load_settings import load_config
from vla_rl.run.logs import warnings_kept
from vla_rl.run.machine import available_memory
from vla_rl.run.run_folder import (
    changed_settings,
    check_run_folder,
    make_run_folder,
    resumed_settings,
    tasks_text,
    unbegun_settings,
    with_absolute_output_dir,
)
from vla_rl.run.settings import ConfigError
from vla_rl.run.warmstart_settings import WarmstartConfig
from vla_rl.simulation.vector_env import make_vector_env

log = logging.getLogger("vla_rl.warmstart")

DEFAULT_CONFIG = "configs/warmstart.yaml"
# what a resumed run must share with the one that it continues, but for what changes no result, and for places
FIXED_ON_RESUME = ("run.seed", "run.output_dir", "run.name", "policy.", "env.", "training.train_head")
FREE_ON_RESUME = (
    *("policy.checkpoint", "policy.as_trained", "policy.gradient_checkpointing", "policy.compile"),
    *("env.num_workers", "env.simulators_per_worker", "env.model_cache_gb"),
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = settings_parser(
        "python -m vla_rl.warmstart",
        "Teach the token head of an OpenVLA-OFT checkpoint what its L1 head does: the start of a training with PPO or GRPO.",
        kind=WarmstartConfig,
        default_config=DEFAULT_CONFIG,
    )
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    return parse(parser, argv)


def settings_from(args: argparse.Namespace) -> tuple[WarmstartConfig, Path | None]:
    """The run's settings and, for --resume, the verified checkpoint to continue from.

    Raises:
        ConfigError: a setting is wrong; or the checkpoint is missing, torn, or of other settings.
    """
    flags = flag_settings(args)
    if args.resume is None:
        config = load_config(find_config(args.config or DEFAULT_CONFIG), args.overrides, flags, WarmstartConfig)
        return with_absolute_output_dir(config), None
    if args.config is not None:
        raise ConfigError("--resume takes the settings of the run; give --config or --resume, not both")
    unbegun = unbegun_settings(args.resume, args.overrides, flags, WarmstartConfig)
    if unbegun is not None:
        return unbegun, None
    before, config, checkpoint = resumed_settings(args.resume, args.overrides, flags, WarmstartConfig)
    changed = changed_settings(before, config, FIXED_ON_RESUME, FREE_ON_RESUME)
    if changed:
        raise ConfigError(f"--resume {args.resume}: {', '.join(changed)} cannot change within a run; start a new one")
    return config, checkpoint


def automatic_name(config: WarmstartConfig) -> str:
    tasks = tasks_text(config.env.task_ids)
    return f"warmstart_{config.env.task_suite}_task{tasks}_seed{config.run.seed}_{time.strftime('%Y%m%d-%H%M%S')}"


def check_start(config: WarmstartConfig, resumed: bool) -> None:
    """All that can be told before a run folder is made and anything heavy begins.

    Raises:
        ConfigError: what the settings need is not there, an L1 head first of all.
    """
    check_device(config.as_config())
    check_rendering()
    if not resumed:
        check_run_folder(config)
    check_wandb(config)
    model = check_policy(config.as_config(), resumed)
    check_kept(config, model.image_size, available_memory())


def check_kept(config: WarmstartConfig, image_size: int, available: int) -> None:
    """Raises ConfigError if the decisions that are learned from do not fit in `available` bytes: their images at the least."""
    kept = config.collection.keep
    limit = config.as_config().max_episode_steps(evaluation=False)
    most = config.training.iterations * config.collection.episodes * -(-limit // config.policy.chunk_size)
    needed = min(kept, most) * config.policy.num_images * 3 * image_size**2
    check_fits(needed, "collection.keep (its images)", min(kept, most), available)


def warm_start(config: WarmstartConfig, checkpoint: Path | None, stop: Stop) -> Path:
    """Trains and writes the model; returns its folder.

    Raises:
        Stopped: what the last whole iteration left is saved.
    """
    stop.grace_s = config.run.grace_s
    check_start(config, resumed=checkpoint is not None)
    folder = make_run_folder(config, automatic_name(config)) if checkpoint is None else checkpoint.parent.parent
    with ExitStack() as cleanup:
        for context in (locked(folder), warnings_kept(folder), closing(MetricsLogger(folder, config))):
            logger = cleanup.enter_context(context)
        log.info("run folder %s", folder)
        try:
            with stop.at_steps():
                trainer, student = build(config, logger, cleanup, stop)
                if checkpoint is not None:
                    trainer.load_checkpoint(checkpoint)
                    log.info("continuing from %s", checkpoint)
                reached = trainer.train()
                student.save_model(folder / "model", {"image_size": config.env.image_size, "render": config.env.render})
        except Stopped:
            log.warning("stopped; --resume %s continues from the last iteration that was saved", folder)
            raise
    if not reached:
        log.warning(
            "the token head is at %.1f%%, the L1 head at %.1f%%: not within training.margin=%g after %d iterations; RL may go on from "
            "there, or --resume %s training.iterations=%d",
            *(100 * trainer.success["tokens"], 100 * trainer.success["l1"], config.training.margin, trainer.iteration),
            *(folder, 2 * trainer.iteration),
        )
    seen = f"env.image_size={config.env.image_size} env.render={config.env.render}"
    log.info("model in %s; train it with start_gae_ppo_training.py --checkpoint %s %s", *[folder / "model"] * 2, seen)
    return folder / "model"


def build(
    config: WarmstartConfig, logger: MetricsLogger, cleanup: ExitStack, stop: Stop
) -> tuple[WarmStart, TokenStudent]:
    """The trainer on the real model and the real simulators, which `cleanup` closes."""
    settings = config.as_config()
    policy = build_policy(settings)
    log_sizes(policy, None)
    teacher = L1Teacher(policy)
    student = TokenStudent(policy, config.training.train_head, config.training.label_sigma)
    policy.processor.pad_to(instructions_of(settings))
    kind = {"image_transform": policy.processor.image_transform}
    envs = cleanup.enter_context(closing(make_vector_env(settings, config.collection.num_envs, **kind)))
    episodes = evaluation_episodes(config.env.task_ids, config.eval.states)
    num_envs = min(config.eval.num_envs, len(episodes))
    eval_envs = cleanup.enter_context(closing(make_vector_env(settings, num_envs, evaluation=True, **kind)))
    logger.instructions = dict(zip(config.env.task_ids, instructions_of(settings), strict=True))

    def measure(head: str) -> dict[str, Any]:
        metrics: dict[str, Any] = {"eval/render": config.eval.render}
        for mode in ["l1"] if head == "l1" else config.eval.modes:
            results = evaluate_policy(
                teacher if head == "l1" else student,
                eval_envs,
                episodes,
                mode="greedy" if mode == "l1" else mode,
                temperature=config.eval.temperature or config.collection.temperature,
                seed=config.run.seed,
                progress=config.logging.progress,
                on_decision=stop,
            )
            metrics |= success_metrics(results, mode)
        return metrics

    return WarmStart(config, teacher, student, envs, measure, logger, stop), student


def main(argv: list[str] | None = None) -> int:
    """0: taught; 1: the run failed; 2: a mistake in the settings or arguments; 75: stopped, --resume goes on."""
    args, stop = parse_args(argv), Stop()

    def work() -> None:
        warm_start(*settings_from(args), stop)

    return end_of(work, stop=stop)


if __name__ == "__main__":
    sys.exit(main())
