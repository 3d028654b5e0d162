"""Command line: flags and YAML -> settings -> parts -> OpenVLAPPO.train()."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from vla_rl.run.command_line import TINY_CONFIG, end_of, flag_settings, new_run_settings, parse, settings_parser
from vla_rl.run.interruption import Stop, Stopped
from vla_rl.run.logs import slow, warnings_kept
from vla_rl.run.machine import launched, restarts
from vla_rl.run.run_folder import (
    changed_settings,
    is_untouched,
    make_run_folder,
    resumed_settings,
    run_of_settings,
    tasks_text,
    unbegun_settings,
    with_found_adapter,
)
from vla_rl.run.settings import Config, ConfigError

if TYPE_CHECKING:  # torch: not before the arguments are known to be sound
    from vla_rl.run.distributed import Ranks

log = logging.getLogger("start_gae_ppo_training")

AUTO = "auto"  # of --resume

# what a resumed run must share with the one that it continues: its episodes and optimizers are of these
FIXED_ON_RESUME = (
    *("policy.", "value_head.", "env.", "rollout.num_envs", "algorithm.estimator"),
    *("run.seed", "run.output_dir", "run.name"),
)
# but for what depends on the machine and changes data by rounding at most; whether it is the same base model, its fingerprint tells
FREE_ON_RESUME = (
    *("env.num_workers", "env.simulators_per_worker", "env.model_cache_gb"),
    *("env.step_timeout_s", "env.build_timeout_s", "env.worker_replacements"),
    *("policy.checkpoint", "policy.as_trained", "policy.gradient_checkpointing", "policy.compile"),
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = settings_parser(
        "start_gae_ppo_training.py",
        "Fine-tune OpenVLA on LIBERO with PPO and GAE (or GRPO).\n\n"
        f"On a CPU: start_gae_ppo_training.py --config {TINY_CONFIG} --task-id 0 --no-wandb",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue the run in this folder from its newest checkpoint; auto: the newest run of these settings, or a new one",
    )
    parser.add_argument(
        "--check", action="store_true", help="train nothing: check what the run needs, and estimate what it takes"
    )
    return parse(parser, argv)


def settings_from(args: argparse.Namespace) -> tuple[Config, Path | None]:
    """The run's settings and, for --resume, the verified checkpoint to continue from; for --resume auto `train` finds it.

    Raises:
        ConfigError: see vla_rl.run.load_settings.load_config; or the checkpoint is missing, torn, or of other settings.
    """
    if args.resume == AUTO:
        return with_found_adapter(new_run_settings(args)), None
    if args.resume is None:
        config = with_found_adapter(new_run_settings(args))
        begun = run_of_restart(config)
        return (config, None) if begun is None else resume(args, str(begun))
    if args.config is not None:
        raise ConfigError("--resume takes the settings of the run; give --config or --resume, not both")
    return resume(args, args.resume)


def resume(args: argparse.Namespace, run: str) -> tuple[Config, Path | None]:
    unbegun = unbegun_settings(run, args.overrides, flag_settings(args), Config)
    if unbegun is not None:
        return unbegun, None
    before, config, checkpoint = resumed_settings(run, args.overrides, flag_settings(args), Config)
    changed = changed_settings(before, config, FIXED_ON_RESUME, FREE_ON_RESUME)
    if changed:
        raise ConfigError(f"--resume {run}: {', '.join(changed)} cannot change within a run; start a new one")
    return config, checkpoint


def run_of_restart(config: Config) -> Path | None:
    """The run that this same command began before torchrun started all its processes anew; None where it has no checkpoint.

    Raises:
        ConfigError: torchrun may do so (--max-restarts), but then the run could not be found.
    """
    count, most = restarts()
    if most == 0:
        return None
    if config.run.name is None:
        raise ConfigError(
            f"torchrun --max-restarts={most} starts this command anew when a process dies, which finds its run by name; "
            "give it one with run.name=..., or --max-restarts=0"
        )
    folder = Path(config.run.output_dir) / config.run.name
    return folder if count > 0 and any(folder.glob("checkpoints/iteration-*")) else None


def automatic_name(config: Config) -> str:
    what = f"{config.env.task_suite}_task{tasks_text(config.env.task_ids)}_{config.algorithm.estimator}_seed{config.run.seed}"
    return f"{what}_{time.strftime('%Y%m%d-%H%M%S')}"


def train(config: Config, checkpoint: Path | None, stop: Stop, auto: bool = False) -> None:
    """Checks what the settings need, makes the run folder, and trains in it; together with the processes that torchrun started.

    Args:
        auto: goes on from the newest checkpoint of these settings, if there is one.

    Raises:
        Stopped: a signal asked for it; the run is saved, or was not begun.
    """
    stop.grace_s = config.run.grace_s
    with slow("importing torch and the model's libraries"):
        from vla_rl.preflight.needs import check_start
        from vla_rl.run.checkpoint import locked
        from vla_rl.run.distributed import joined, share_of

    with joined(config.run.device) as ranks:
        share_of(config, ranks.size)  # whether it can be shared
        if auto:
            config, checkpoint = ranks.by_first(lambda: run_of_settings(config))
        config = config if ranks.first else without_bars(config)
        with slow("checking what the settings need"):
            ranks.all_of(lambda: check_start(config, resumed=checkpoint is not None))
        if checkpoint is None:
            folder = ranks.by_first(lambda: make_run_folder(config, automatic_name(config)))
        else:
            folder = checkpoint.parent.parent
        with locked(folder) if ranks.first else nullcontext():
            try:
                build_and_train(config, checkpoint, folder, ranks, stop)
            except BaseException:
                if ranks.first and checkpoint is None and is_untouched(folder):
                    log.warning("nothing was measured or trained: %s is removed", folder)
                    shutil.rmtree(folder)
                raise


def without_bars(config: Config) -> Config:
    """Of a process beside the one that a person follows."""
    return config.model_copy(update={"logging": config.logging.model_copy(update={"progress": False})})


def build_and_train(config: Config, checkpoint: Path | None, folder: Path, ranks: Ranks, stop: Stop) -> None:
    from OpenVLA_PPO import OpenVLAPPO
    from vla_rl.learning.memory import fit_to_card
    from vla_rl.learning.parts import build_trainer, instructions_of
    from vla_rl.reports.metrics import MetricsLogger, SilentLogger

    with ExitStack() as cleanup:
        cleanup.enter_context(warnings_kept(folder))
        logger = MetricsLogger(folder, config) if ranks.first else SilentLogger(folder)
        cleanup.callback(logger.close)
        log.info("run folder %s", folder)
        trainer = build_trainer(OpenVLAPPO, config, logger, cleanup, ranks, resumed=checkpoint is not None)
        if checkpoint is not None:
            with slow("loading the checkpoint"):
                trainer.load_checkpoint(checkpoint)
            log.info("continuing from %s at %d timesteps", checkpoint, trainer.timesteps)
        with slow("measuring what fits the card"):
            fit_to_card(trainer, instructions_of(config))
        with stop.at_steps(ask=trainer.request_stop, save=trainer.save_checkpoint):
            finished = trainer.train()
        if not finished:
            raise Stopped
    log.info("run folder %s", folder)


def main(argv: list[str] | None = None) -> int:
    """0: trained, or all checks passed; 1: the run or a check failed; 2: a mistake in the settings or arguments; 75: stopped, and
    saved where it had begun (but see end_of)."""
    args, stop = parse_args(argv), Stop()

    def work() -> int | None:
        config, checkpoint = settings_from(args)
        if args.check:
            if launched():
                raise ConfigError("--check looks at one process of a run; give it without torchrun and --gpus")
            from vla_rl.check import check_and_report

            if args.resume == AUTO:
                config, checkpoint = run_of_settings(config)
            return check_and_report(config, resumed=checkpoint is not None)
        train(config, checkpoint, stop, auto=args.resume == AUTO)

    return end_of(work, stop=stop)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if launched():  # torchrun then shows the stack of the process that failed first
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    sys.exit(main())
