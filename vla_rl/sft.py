"""Supervised fine-tuning of OpenVLA on demonstrations.

    python -m vla_rl.sft --config configs/tiny_sft.yaml

The result, runs/NAME/model, is a checkpoint in the official layout with the statistics of its data: what PPO starts from.

Not here: the training (vla_rl.fine_tuning.supervised_fine_tuning), the data's layout (vla_rl.fine_tuning.demonstration_file).
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from vla_rl.fine_tuning.demonstration_file import Demonstration, find_files
from vla_rl.fine_tuning.demonstration_reader import DemonstrationReader
from vla_rl.fine_tuning.samples import data_statistics, make_samples, split
from vla_rl.fine_tuning.supervised_fine_tuning import SupervisedFineTuning
from vla_rl.model.checkpoint_folder import find_action_head_file
from vla_rl.model.execution import compiles
from vla_rl.model.find_checkpoint import check_checkpoint
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.quantization import check_quantization
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.reports.weights_and_biases import check_wandb
from vla_rl.run.checkpoint import locked
from vla_rl.run.command_line import Parser, end_of, parse
from vla_rl.run.interruption import Stop, Stopped
from vla_rl.run.load_settings import expand, load_config, settings_help
from vla_rl.run.logs import slow, warnings_kept
from vla_rl.run.run_folder import (
    changed_settings,
    check_run_folder,
    if_moved,
    make_run_folder,
    resumed_settings,
    unbegun_settings,
    with_absolute_output_dir,
)
from vla_rl.run.settings import ConfigError
from vla_rl.run.sft_settings import SftConfig
from vla_rl.simulation.suites import task_instructions

log = logging.getLogger("vla_rl.sft")

# what a resumed run must share with the one that it continues, but for what changes no result, and for places: whether it is
# the same base and the same data, their fingerprints tell
FIXED_ON_RESUME = ("run.", "policy.", "data.")
FREE_ON_RESUME = (
    *("policy.checkpoint", "policy.gradient_checkpointing", "policy.compile", "policy.as_trained", "data.files"),
    *("run.device", "run.torch_threads"),
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m vla_rl.sft",
        description="Fine-tune OpenVLA on demonstrations in LIBERO's HDF5 layout.",
        epilog="settings, given as section.key=value:\n" + settings_help(SftConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="any setting, for example optimizer.learning_rate=1e-4",
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--config", metavar="YAML", help="settings file, such as configs/tiny_sft.yaml")
    start.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    return parse(parser, argv)


def read_data(config: SftConfig) -> list[Demonstration]:
    settings = config.policy.num_images, config.data.filter_no_ops, task_instructions()
    with DemonstrationReader() as reader:
        demonstrations = [d for path in find_files(config.data.files) for d in reader.read(path, *settings)]
    sizes = {d.images.shape[1:] for d in demonstrations}
    if len(sizes) > 1:
        raise ConfigError(f"data.files have images of different shapes: {sorted(map(list, sizes))}; give one kind")
    height, width = demonstrations[0].images.shape[2:4]
    if height != width:
        raise ConfigError(
            f"data.files have images of {height} x {width} pixels; expected squares, as env.image_size renders"
        )
    renders = {d.render for d in demonstrations}
    if len(renders) > 1:
        log.warning("data.files were rendered in different ways: %s", ", ".join(sorted(map(str, renders))))
    return demonstrations


def automatic_name(config: SftConfig) -> str:
    return f"sft_{config.data.name}_seed{config.run.seed}_{time.strftime('%Y%m%d-%H%M%S')}"


def fine_tune(config: SftConfig, checkpoint: Path | None, stop: Stop) -> Path:
    """Trains and writes the model; returns its folder.

    Raises:
        Stopped: what was trained is saved.
    """
    stop.grace_s = config.run.grace_s
    settings = config.policy
    if config.run.torch_threads is not None:
        torch.set_num_threads(config.run.torch_threads)
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda, but torch finds no CUDA GPU; set run.device=cpu")
    if checkpoint is None:
        check_run_folder(config)
    with where_moved("policy.checkpoint", checkpoint):
        base = check_checkpoint(settings.checkpoint, settings.use_proprio)
    check_quantization(settings.quantization, config.run.device)
    check_wandb(config)
    with where_moved("data.files", checkpoint), slow("reading the demonstrations"):
        demonstrations = read_data(config)
    training, held_out = split(demonstrations, config.data.validation_fraction)
    steps, side = sum(map(len, training)), demonstrations[0].images.shape[2]
    renders = {d.render for d in demonstrations}
    render = renders.pop() if len(renders) == 1 else None  # None: not known, or mixed
    log.info("%d demonstrations, %d steps to train on, %d held out", len(demonstrations), steps, len(held_out))
    for instruction in dict.fromkeys(d.instruction for d in demonstrations):
        log.info("instruction: %s", instruction)

    checkpointing = settings.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = "full" if config.run.device == "cuda" else "none"
    torch.manual_seed(config.run.seed)  # of the adapter's initial weights
    with slow("loading the policy"):
        policy = OpenVLAPolicy.from_checkpoint(
            settings.checkpoint,
            decoder=settings.decoder,
            num_images=settings.num_images,
            use_proprio=settings.use_proprio,
            lora=settings.lora if config.training.method == "lora" else None,
            device=config.run.device,
            dtype=getattr(torch, settings.dtype),
            chunk_size=settings.chunk_size,
            center_crop=settings.center_crop,
            gradient_checkpointing=checkpointing,
            compiled=compiles(settings.compile, config.run.device),
            quantization=settings.quantization,
            head="l1" if config.training.head == "l1" and find_action_head_file(base) is not None else "tokens",
            unnorm_key=config.data.name,
            statistics=data_statistics(training),
        )
    progress = config.logging.progress
    train = make_samples(training, policy.chunk_size, policy.image_size, progress)
    validation = make_samples(held_out, policy.chunk_size, policy.image_size, progress) if held_out else None
    del demonstrations, training, held_out

    folder = make_run_folder(config, automatic_name(config)) if checkpoint is None else checkpoint.parent.parent
    with locked(folder), warnings_kept(folder), closing(MetricsLogger(folder, config)) as logger:
        trainer = SupervisedFineTuning(config, policy, train, validation, logger)
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
            log.info("continuing from %s", checkpoint)
        with stop.at_steps(ask=trainer.request_stop):
            trainer.train()
        if trainer.step < config.training.steps:
            raise Stopped
        trainer.save_model(folder / "model", side, render)
    seen = f"env.image_size={side}" + (f" env.render={render}" if render else "")
    use = "evaluate it" if config.training.head == "l1" else "train it"
    log.info("model in %s; %s with %s", folder / "model", use, seen)
    return folder / "model"


@contextmanager
def where_moved(key: str, checkpoint: Path | None) -> Iterator[None]:
    """A resumed run's base or data may lie elsewhere now; whether they are the same ones, its fingerprint tells."""
    try:
        yield
    except ConfigError as error:
        raise if_moved(error, key) if checkpoint is not None else error from None


def settings_from(args: argparse.Namespace) -> tuple[SftConfig, Path | None]:
    if args.resume is None:
        return with_absolute_output_dir(
            load_config(expand(args.config, "--config"), args.overrides, kind=SftConfig)
        ), None
    unbegun = unbegun_settings(args.resume, args.overrides, {}, SftConfig)
    if unbegun is not None:
        return unbegun, None
    before, config, checkpoint = resumed_settings(args.resume, args.overrides, {}, SftConfig)
    changed = changed_settings(before, config, FIXED_ON_RESUME, FREE_ON_RESUME)
    if changed:
        raise ConfigError(f"--resume {args.resume}: {', '.join(changed)} cannot change within a run; start a new one")
    return config, checkpoint


def main(argv: list[str] | None = None) -> int:
    """0: trained; 1: the run failed; 2: a mistake in the settings or the data; 75: stopped, and saved if it had begun."""
    args, stop = parse_args(argv), Stop()

    def work() -> None:
        fine_tune(*settings_from(args), stop)

    return end_of(work, stop=stop)


if __name__ == "__main__":
    sys.exit(main())
