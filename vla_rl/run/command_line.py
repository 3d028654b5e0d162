"""Flags of the commands that take a training's settings: a YAML file, short names of what is set most, section.key=value.

Not here: what files and values mean (vla_rl.run.load_settings), what else a command takes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vla_rl.run.failures import report, say
from vla_rl.run.interruption import STOPPED, Stop, Stopped
from vla_rl.run.load_settings import expand, load_config, settings_help
from vla_rl.run.logs import configure_logging
from vla_rl.run.machine import launched, who
from vla_rl.run.run_folder import with_absolute_output_dir
from vla_rl.run.section import Section
from vla_rl.run.settings import Config, ConfigError

ROOT = Path(__file__).resolve().parents[2]
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


class Once(argparse.Action):
    """Stores a flag's value, as argparse does; another one for the same flag is a mistake, of which argparse would take the last."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        given = vars(namespace).setdefault("flags_given", {})
        if option is not None and str(given.setdefault(self.dest, values)) != str(values):  # nan is not nan
            raise argparse.ArgumentError(self, f"given twice, with {given[self.dest]} and {values}; give it once")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Of the commands' flags."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        for name in (None, "store"):  # as which add_argument knows what a flag does
            self.register("action", name, Once)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)


def settings_parser(
    prog: str, description: str, kind: type[Section] = Config, default_config: str = DEFAULT_CONFIG
) -> Parser:
    """A parser with the flags of the settings, to which a command adds its own.

    Args:
        kind: of the settings; only Config has timesteps.
    """
    parser = Parser(
        prog=prog,
        description=description,
        epilog="settings, given as section.key=value; the defaults hold where the settings file says nothing:\n"
        + settings_help(kind),
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="any setting, for example actor.learning_rate=1e-4")
    add("--config", metavar="YAML", help=f"settings file (default {default_config}, the 7B model on one GPU)")
    add("--task-suite", metavar="SUITE", help="libero_spatial, libero_spatial_lan, ... (env.task_suite)")
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument("--task-id", type=int, metavar="I", help="one task of the suite (env.task_ids)")
    tasks.add_argument("--task-ids", type=int, nargs="+", metavar="I", help="several tasks at once (env.task_ids)")
    if kind is Config:
        add("--timesteps", type=int, metavar="N", help="simulator steps to train for (run.timesteps)")
    add("--seed", type=int, metavar="S", help="(run.seed)")
    add("--output-dir", metavar="DIR", help="where runs are kept (run.output_dir)")
    add("--checkpoint", metavar="PATH", help="OpenVLA checkpoint: folder or Hugging Face id (policy.checkpoint)")
    add("--wandb-project", metavar="P", help="log to this Weights & Biases project (logging.wandb_project)")
    add("--wandb-entity", metavar="E", help="of this user or team (logging.wandb_entity)")
    add("--no-wandb", action="store_true", help="no Weights & Biases, whatever the settings say")
    return parser


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """section.key=value may stand anywhere, also after --task-ids, which would take it for a task."""
    argv = sys.argv[1:] if argv is None else argv
    overrides = [arg for arg in argv if re.match(r"[a-z_]+\.[a-z0-9_.]+=", arg)]
    args = parser.parse_intermixed_args([arg for arg in argv if arg not in overrides])
    args.overrides += overrides
    return args


def end_of(work: Callable[[], int | None], interrupted: str = "stopped", stop: Stop | None = None) -> int:
    """Does a command's work and tells how it ended: 0, or what the work returns; 1: it failed; 2: a mistake in the settings or
    arguments; 75: stopped by a signal (but 0 under torchrun, which takes any other status of a process for a failure and starts
    all of them anew; its own status is 1 where it got the signal); 130: interrupted otherwise. One line says why; what may be a
    bug of ours goes on, with its stack.

    Args:
        interrupted: what to say of a stop.
        stop: what signals ask, for work that ends at its steps.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    configure_logging()
    try:
        with logging_redirect_tqdm(), (stop or Stop()).on_signals():
            return work() or 0
    except ConfigError as error:
        say(f"{who()}error: {error}", sys.stderr)
        return 2
    except Stopped:
        say(f"{who()}{interrupted}", sys.stderr)
        return 0 if launched() else STOPPED
    except KeyboardInterrupt:
        say(interrupted, sys.stderr)
        return 130
    except Exception as error:
        return report(error)


def flag_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Setting -> what a flag gave; None where it was not given."""
    flags: dict[str, Any] = {setting: getattr(args, flag) for flag, setting in FLAGS.items() if flag in args}
    flags["env.task_ids"] = args.task_ids if args.task_id is None else [args.task_id]
    flags["logging.wandb"] = False if args.no_wandb else (args.wandb_project or args.wandb_entity) and True
    return flags


def new_run_settings(args: argparse.Namespace) -> Config:
    """The settings of a new run.

    Raises:
        ConfigError: see vla_rl.run.load_settings.load_config.
    """
    path = find_config(DEFAULT_CONFIG if args.config is None else args.config)
    return with_absolute_output_dir(load_config(path, args.overrides, flag_settings(args)))


def find_config(path: str) -> Path:
    """The settings file, looked for here and beside the programs, so that they work from any folder."""
    found = Path(expand(path, "--config"))
    return ROOT / found if not os.path.exists(found) and os.path.exists(ROOT / found) else found
