"""What a run has learned as a thing of its own: merged into its base, in the official layout, or as LoRA weights in peft's format.

    python -m vla_rl.export runs/NAME OUT
    python -m vla_rl.export --checkpoint MODEL --adapter FOLDER OUT
    python -m vla_rl.export --average runs/SEED0 runs/SEED1 runs/SEED2 OUT

The mean of several runs is that of their weight changes. OUT is there whole or not at all.

Not here: the merging and the mean (vla_rl.model.adapter), the files (vla_rl.model.checkpoint_folder).
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vla_rl.evaluation.subject import of_checkpoint
from vla_rl.learning.parts import build_policy
from vla_rl.model.adapter import lora_of, write_mean
from vla_rl.model.checkpoint_folder import load_statistics, tensor_shapes, weight_files
from vla_rl.model.find_checkpoint import check_checkpoint
from vla_rl.model.trained_as import USE, write_trained_as
from vla_rl.run.checkpoint import find_adapter
from vla_rl.run.command_line import Parser, end_of, parse
from vla_rl.run.files import folder_written_whole, open_tensors
from vla_rl.run.load_settings import absolute, config_from_dict, expand, full_path, put_paths, read_yaml
from vla_rl.run.run_folder import changed_settings
from vla_rl.run.settings import Config, ConfigError

log = logging.getLogger("vla_rl.export")

# of the policy, what may differ between runs whose mean is taken; whether their bases are the same, their adapters tell
FREE = (
    *("policy.checkpoint", "policy.as_trained", "policy.gradient_checkpointing", "policy.compile", "policy.unnorm_key"),
    *("policy.adapter", "policy.lora.rank", "policy.lora.alpha"),
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m vla_rl.export",
        description="A run's policy as a model in the official OpenVLA layout, or as LoRA weights in peft's format.",
        epilog="settings, given as section.key=value, are those of start_gae_ppo_training.py --help; of use here, with --checkpoint: "
        "policy.use_proprio, policy.quantization, policy.dtype",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("paths", nargs="+", metavar="RUN ... OUT", help="a run (its newest checkpoint), one of its checkpoints, RUN/checkpoints/best "
        "or a folder in peft's format; the folder to make comes last")  # fmt: skip
    add("overrides", nargs="*", metavar="section.key=value", help="any setting, see below")
    add("--checkpoint", metavar="MODEL", help="the base of LoRA weights that have no run; of a run, where it is now")
    add("--adapter", metavar="FOLDER", help="the LoRA weights, in the place of RUN")
    add(
        "--average",
        action="store_true",
        help="the mean of the weight changes of several RUNs, trained on the same base",
    )
    add("--as", dest="kind", choices=("merged", "adapter"), default="merged", help="default: merged into the base")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of merged weights (default: float32, in which nothing is lost)",
    )
    return parse(parser, argv)


def export(args: argparse.Namespace) -> None:
    """Raises ConfigError, before anything heavy begins, for a mistake in the arguments; later, if the base is another one."""
    *runs, last = args.paths
    out = Path(expand(last, "OUT")).absolute()
    runs = [*runs, *([] if args.adapter is None else [args.adapter])]
    check_arguments(args, runs, out)
    adapters = [find_adapter(Path(expand(run, "RUN")), "") for run in runs]
    if args.kind == "adapter":
        with folder_written_whole(out) as unfinished:
            rank = write_mean(adapters, unfinished)
        log.info("LoRA weights of rank %d in %s; --adapter or policy.adapter=%s takes them", rank, out, out)
        return
    config = config_of(args, adapters)
    dtype = getattr(torch, args.dtype or "float32")
    check_disk(config, out, dtype)
    with folder_written_whole(out) as unfinished:
        adapter = adapters[0]
        if args.average:
            adapter = unfinished / "mean"
            write_mean(adapters, adapter)
        merge(config, adapter, unfinished, dtype, from_run=recorded(adapters[0]) is not None)
        if args.average:
            shutil.rmtree(adapter)
    suite = "SUITE" if recorded(adapters[0]) is None else config.env.task_suite
    log.info("model in %s; to try it: python -m vla_rl.evaluate --checkpoint %s --task-suite %s", out, out, suite)


def check_arguments(args: argparse.Namespace, runs: Sequence[str], out: Path) -> None:
    """Raises ConfigError."""
    if not runs:
        raise ConfigError(f"nothing to export to {out}: give RUN OUT, or --checkpoint MODEL --adapter FOLDER OUT")
    if args.average != (len(runs) > 1):
        raise ConfigError(
            "--average takes two RUNs or more, then OUT"
            if args.average
            else f"{len(runs)} RUNs; --average exports their mean, else give one, then OUT"
        )
    if args.kind == "adapter" and (args.dtype or args.checkpoint or args.overrides):
        raise ConfigError(
            "--as adapter writes the LoRA weights as they are, without --dtype, --checkpoint and settings"
        )
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists, and the last path is the folder to make; give another place")
    nearest = next(path for path in out.parents if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{out} cannot be made: {nearest} is no folder that can be written to; give another place")


def recorded(adapter: Path) -> Path | None:
    """The settings of the run that LoRA weights are of; None of those in peft's format alone."""
    path = adapter.parent / "config.yaml"
    return path if adapter.name == "adapter" and path.exists() else None


def config_of(args: argparse.Namespace, adapters: Sequence[Path]) -> Config:
    """The settings of the base: the runs' own, of which the first counts, or those of --checkpoint; on the CPU."""
    on_cpu = {"device": "cpu"}
    files = [path for adapter in adapters if (path := recorded(adapter))]
    if not files:
        if args.checkpoint is None:
            raise ConfigError(f"{adapters[0]} tells nothing of its base; give it with --checkpoint MODEL")
        model = check_checkpoint(full_path("policy.checkpoint", args.checkpoint))
        key = next(iter(load_statistics(model)))  # a merged model keeps all of them: any will do
        flags: dict[str, Any] = {"run.device": "cpu", "policy.unnorm_key": key, "policy.dtype": stored_in(model)}
        flags = {
            name: value for name, value in flags.items() if not any(o.startswith(f"{name}=") for o in args.overrides)
        }
        return of_checkpoint(args.checkpoint, str(adapters[0]), args.overrides, flags).config
    if args.overrides:
        raise ConfigError(f"a run is exported as it was trained, without {args.overrides[0]}")
    configs = []
    for path in files:
        values = read_yaml(path)
        put_paths(values, absolute)
        config = config_from_dict(values, str(path))
        policy = config.policy.model_copy(update={"compile": "false", "gradient_checkpointing": "none"})
        if args.checkpoint is not None:
            policy = policy.model_copy(update={"checkpoint": full_path("policy.checkpoint", args.checkpoint)})
        configs.append(config.model_copy(update={"policy": policy, "run": config.run.model_copy(update=on_cpu)}))
    for path, config in zip(files, configs, strict=True):
        if changed := changed_settings(configs[0], config, ("policy.",), FREE):
            raise ConfigError(f"{files[0].parent} and {path.parent} have no mean: {', '.join(changed)}")
    return configs[0]


def stored_in(model: Path) -> str:
    """The precision that holds the weights as they lie there: half of the memory for those of official checkpoints."""
    kinds = set()
    for path in weight_files(model):
        with open_tensors(path) as file:
            kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  safe_open is not a dict
    return "bfloat16" if kinds == {"BF16"} else "float32"


def check_disk(config: Config, out: Path, dtype: torch.dtype) -> None:
    """Raises ConfigError if the weights do not fit where they shall lie, or there is no base."""
    try:
        model = check_checkpoint(config.policy.checkpoint, config.policy.use_proprio)
    except ConfigError as error:
        raise ConfigError(f"{error}; if it was moved, --checkpoint says where it is now") from None
    numbers = sum(math.prod(shape) for _, shape in tensor_shapes(model, config.policy.use_proprio))
    nearest = next(path for path in out.parents if path.exists())
    needed, free = numbers * dtype.itemsize, shutil.disk_usage(nearest).free
    if needed > free:
        raise ConfigError(
            f"{needed / 1e9:.1f} GB of weights in {str(dtype)[6:]}, {free / 1e9:.1f} GB free in {nearest}; make room, give another "
            "place, or export --as adapter"
        )


def merge(config: Config, adapter: Path, folder: Path, dtype: torch.dtype, from_run: bool) -> None:
    """Base and LoRA weights into a folder, in the official layout, with the use that a run made of them."""
    lora = lora_of(adapter, check_checkpoint(config.policy.checkpoint))
    values = config.model_dump()
    values["policy"] |= {"adapter": str(adapter), "lora": lora}
    config = config_from_dict(values, str(adapter))
    build_policy(config).save_merged(folder, dtype)
    if from_run:
        use = {name: getattr(config.policy, name) for name in USE}
        env = {"image_size": config.env.image_size, "render": config.env.render}
        write_trained_as(folder, {"head": "tokens", **use, **env})


def main(argv: Sequence[str] | None = None) -> int:
    """0: exported; 1: failed; 2: a mistake in the arguments; 75: stopped, and nothing is left."""
    args = parse_args(argv)

    def work() -> None:
        export(args)

    return end_of(work, interrupted="stopped; nothing was written")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
