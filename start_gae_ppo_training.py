"""Command line: flags and YAML -> settings -> parts -> OpenVLAPPO.train()."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import signal
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from vla_rl.run.load_settings import expand, load_config, settings_help
from vla_rl.run.logs import WARNINGS_FILE, configure_logging, warnings_kept
from vla_rl.run.run_folder import (
    changed_settings,
    make_run_folder,
    resumed_settings,
    with_absolute_output_dir,
)
from vla_rl.run.settings import Config, ConfigError

log = logging.getLogger("start_gae_ppo_training")

ROOT = Path(__file__).resolve().parent
DEFAULT_CONFIG = "configs/gae_ppo_config.yaml"
TINY_CONFIG = "configs/tiny_gae_ppo.yaml"

# flag -> setting: short names of what is set most
FLAGS = {
    "task_suite": "env.task_suite",
    "timesteps": "run.timesteps",
    "seed": "run.seed",
    "output_dir": "run.output_dir",
    "checkpoint": "policy.checkpoint",
    "wandb_project": "logging.wandb_project",
    "wandb_entity": "logging.wandb_entity",
}

# what a resumed run must share with the one that it continues: its episodes and optimizers are of these
FIXED_ON_RESUME = (
    *("policy.", "value_head.", "env.", "rollout.num_envs", "algorithm.estimator"),
    *("run.seed", "run.output_dir", "run.name"),
)
# but for what depends on the machine and changes data by rounding at most; whether it is the same base model, its fingerprint tells
FREE_ON_RESUME = (
    *("env.num_workers", "env.simulators_per_worker", "env.model_cache_gb"),
    *("policy.checkpoint", "policy.as_trained", "policy.gradient_checkpointing", "policy.compile"),
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="start_gae_ppo_training.py",
        description="Fine-tune OpenVLA on LIBERO with PPO and GAE (or GRPO).\n\n"
        f"On a CPU: start_gae_ppo_training.py --config {TINY_CONFIG} --task-id 0 --no-wandb",
        epilog="settings, given as section.key=value; the defaults hold where the settings file says nothing:\n"
        + settings_help(),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="any setting, for example actor.learning_rate=1e-4")
    add("--config", metavar="YAML", help=f"settings file (default {DEFAULT_CONFIG}, the 7B model on one GPU)")
    add("--resume", metavar="RUN", help="continue the run in this folder from its newest checkpoint")
    add("--task-suite", metavar="SUITE", help="libero_spatial, _object, _goal, _10 or _90 (env.task_suite)")
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument("--task-id", type=int, metavar="I", help="one task of the suite (env.task_ids)")
    tasks.add_argument("--task-ids", type=int, nargs="+", metavar="I", help="several tasks at once (env.task_ids)")
    add("--timesteps", type=int, metavar="N", help="simulator steps to train for (run.timesteps)")
    add("--seed", type=int, metavar="S", help="(run.seed)")
    add("--output-dir", metavar="DIR", help="where runs are kept (run.output_dir)")
    add("--checkpoint", metavar="PATH", help="OpenVLA checkpoint: folder or Hugging Face id (policy.checkpoint)")
    add("--wandb-project", metavar="P", help="log to this Weights & Biases project (logging.wandb_project)")
    add("--wandb-entity", metavar="E", help="of this user or team (logging.wandb_entity)")
    add("--no-wandb", action="store_true", help="no Weights & Biases, whatever the settings say")
    # section.key=value may stand anywhere, also after --task-ids, which would take it for a task
    argv = sys.argv[1:] if argv is None else argv
    overrides = [arg for arg in argv if re.match(r"[a-z_]+\.[a-z0-9_.]+=", arg)]
    args = parser.parse_intermixed_args([arg for arg in argv if arg not in overrides])
    args.overrides += overrides
    return args


def settings_from(args: argparse.Namespace) -> tuple[Config, Path | None]:
    """The run's settings and, for --resume, the verified checkpoint to continue from.

    Raises:
        ConfigError: see vla_rl.run.load_settings.load_config; or the checkpoint is missing, torn, or of other settings.
    """
    flags: dict[str, Any] = {setting: getattr(args, flag) for flag, setting in FLAGS.items()}
    flags["env.task_ids"] = args.task_ids if args.task_id is None else [args.task_id]
    flags["logging.wandb"] = False if args.no_wandb else (args.wandb_project or args.wandb_entity) and True
    if args.resume is None:
        config = load_config(find_config(DEFAULT_CONFIG if args.config is None else args.config), args.overrides, flags)
        return with_absolute_output_dir(config), None
    if args.config is not None:
        raise ConfigError("--resume takes the settings of the run; give --config or --resume, not both")
    before, config, checkpoint = resumed_settings(args.resume, args.overrides, flags, Config)
    changed = changed_settings(before, config, FIXED_ON_RESUME, FREE_ON_RESUME)
    if changed:
        raise ConfigError(f"--resume {args.resume}: {', '.join(changed)} cannot change within a run; start a new one")
    return config, checkpoint


def find_config(path: str) -> Path:
    """The settings file, looked for here and beside this script, so that the script works from any folder."""
    found = Path(expand(path, "--config"))
    return ROOT / found if not os.path.exists(found) and os.path.exists(ROOT / found) else found


def automatic_name(config: Config) -> str:
    tasks = "-".join(map(str, config.env.task_ids[:4])) + ("-etc" if len(config.env.task_ids) > 4 else "")
    what = f"{config.env.task_suite}_task{tasks}_{config.algorithm.estimator}_seed{config.run.seed}"
    return f"{what}_{time.strftime('%Y%m%d-%H%M%S')}"


def train(config: Config, checkpoint: Path | None) -> None:
    """Checks what the settings need, makes the run folder, and trains in it."""
    from vla_rl.learning.preflight import check_start
    from vla_rl.run.checkpoint import locked

    check_start(config, resumed=checkpoint is not None)

    folder = make_run_folder(config, automatic_name(config)) if checkpoint is None else checkpoint.parent.parent
    with locked(folder):
        try:
            build_and_train(config, checkpoint, folder)
        except BaseException:
            if checkpoint is None and is_untouched(folder):
                log.warning("nothing was measured or trained: %s is removed", folder)
                shutil.rmtree(folder)
            raise


def is_untouched(folder: Path) -> bool:
    """Whether a run folder has nothing but what a start makes: a checkpoint at 0 timesteps is the settings again."""
    by_start = {"config.yaml", ".lock", WARNINGS_FILE, "wandb", "wandb_id", "tensorboard", "checkpoints"}
    made = {path.name for path in folder.iterdir()} <= by_start
    return made and all("iteration-000000" in path.name for path in folder.glob("checkpoints/*"))


def build_and_train(config: Config, checkpoint: Path | None, folder: Path) -> None:
    from OpenVLA_PPO import OpenVLAPPO
    from vla_rl.learning.memory import fit_to_card
    from vla_rl.learning.parts import build_policy, build_value_head, log_sizes
    from vla_rl.run.metrics import MetricsLogger
    from vla_rl.simulation.suites import task_languages
    from vla_rl.simulation.vector_env import make_vector_env

    with ExitStack() as cleanup:
        cleanup.enter_context(warnings_kept(folder))
        logger = MetricsLogger(folder, config)
        cleanup.callback(logger.close)
        log.info("run folder %s", folder)
        policy = build_policy(config)
        value_head = build_value_head(config, policy.hidden_size)
        log_sizes(policy, value_head)

        num_evaluations = len(config.env.task_ids) * len(config.eval.states)
        kind = {"image_transform": policy.processor.image_transform}
        overlap = config.rollout.overlap
        envs = cleanup.enter_context(closing(make_vector_env(config, config.rollout.num_envs, overlap=overlap, **kind)))
        num_eval_envs = min(config.eval.num_envs, num_evaluations)
        eval_envs = cleanup.enter_context(closing(make_vector_env(config, num_eval_envs, evaluation=True, **kind)))
        trainer = OpenVLAPPO(config, policy, value_head, envs, eval_envs, logger)
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
            log.info("continuing from %s at %d timesteps", checkpoint, trainer.timesteps)
        log.info(
            "simulators: %d training environments in %d workers (render %s), %d for evaluation in %d (render %s)",
            *(envs.num_envs, envs.num_workers, config.env.render),
            *(eval_envs.num_envs, eval_envs.num_workers, config.eval.render),
        )
        languages = task_languages(config.env.task_suite)
        instructions = [languages[task_id] for task_id in config.env.task_ids]
        policy.processor.tokenize(tuple(instructions))  # so that it knows all lengths of prompts
        fit_to_card(trainer, instructions)
        stop_on_signals(trainer)
        trainer.train()
    log.info("run folder %s", folder)


def stop_on_signals(trainer) -> None:
    """Ctrl-C, a cluster's SIGTERM, a terminal that is gone (unless nohup has it ignored): save and end; a second one ends at
    once."""

    def handle(number, frame) -> None:
        if trainer.stop_requested:
            raise KeyboardInterrupt
        log.warning("%s: stopping and saving; once more to stop at once", signal.Signals(number).name)
        trainer.request_stop()

    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:
            signal.signal(name, handle)


def main(argv: list[str] | None = None) -> int:
    """0: trained or stopped and saved; 1: the run failed; 2: a mistake in the settings or arguments; 130: interrupted."""
    args = parse_args(argv)
    configure_logging()
    try:
        config, checkpoint = settings_from(args)
        from tqdm.contrib.logging import logging_redirect_tqdm

        with logging_redirect_tqdm():
            train(config, checkpoint)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from vla_rl.run.failures import report

        return report(error)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
