"""Command line: flags and YAML -> settings -> parts -> OpenVLAPPO.train(). The only place where parts are built."""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from vla_rl.run.load_settings import expand, load_config, settings_help
from vla_rl.run.logs import configure_logging
from vla_rl.run.run_folder import (
    changed_settings,
    check_run_folder,
    if_moved,
    make_run_folder,
    resumed_settings,
    setting,
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

# MUJOCO_GL -> the library that it needs, and Debian's packages of it
RENDERERS = {
    "egl": ("EGL", "libegl1 libgl1 libgl1-mesa-dri libglib2.0-0"),
    "osmesa": ("OSMesa", "libosmesa6"),
}

# what trained_as.json beside a checkpoint may tell of its training
TRAINED_AS = (
    *("policy.decoder", "policy.num_images", "policy.use_proprio", "policy.chunk_size", "policy.center_crop"),
    *("env.image_size", "env.render"),
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


def check_device(config: Config) -> None:
    import torch

    if config.run.device == "cuda" and not torch.cuda.is_available():
        built = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "no CUDA build"
        )
        raise ConfigError(
            f"run.device=cuda, but torch finds no CUDA GPU that it can use ({built}; nvidia-smi shows which CUDA the driver "
            "supports: an older driver needs another build of torch). Use a machine with one (24 GB or more for the 7B model), or "
            f"train the small model on the CPU: --config {TINY_CONFIG}"
        )


def check_rendering() -> None:
    backend = os.environ.get("MUJOCO_GL") or "egl"
    if backend not in RENDERERS:
        raise ConfigError(
            f"MUJOCO_GL={backend}: the simulators render without a screen, with egl (the default, on a GPU or in software) "
            "or osmesa (software); unset MUJOCO_GL or set it to one of them"
        )
    library, packages = RENDERERS[backend]
    if not can_load(library):
        raise ConfigError(
            f"MUJOCO_GL={backend}: the library {library}, with which the simulators render, is not there; install it "
            f"(apt-get install -y {packages}), or set MUJOCO_GL={'osmesa' if backend == 'egl' else 'egl'} if that is there"
        )


def can_load(library: str) -> bool:
    names = (f"lib{library}.so.1", f"lib{library}.so.8", ctypes.util.find_library(library), f"lib{library}.so")
    for name in filter(None, names):
        with suppress(OSError):
            return bool(ctypes.CDLL(name))
    return False


def check_trained_as(config: Config, model: Path, resumed: bool) -> None:
    """Used otherwise than it was trained, a checkpoint solves nothing; a run that has begun so goes on, warned.

    Raises:
        ConfigError: a setting differs, unless policy.as_trained is false or the run is resumed.
    """
    from vla_rl.model.trained_as import differences

    other = differences(model, {name: setting(config, name) for name in TRAINED_AS})
    if other and config.policy.as_trained and not resumed:
        raise ConfigError(f"{'; '.join(other)}; or policy.as_trained=false to train it otherwise all the same")
    for difference in [*other, *differences(model, {"eval.render": config.eval.render})]:
        log.warning("%s", difference)


def check_start(config: Config, resumed: bool) -> None:
    """All that can be told before a run folder is made and anything heavy begins, quick things first.

    Raises:
        ConfigError: what the settings need is not there.
    """
    check_device(config)
    check_rendering()
    if not resumed:
        check_run_folder(config)
    if config.env.reward == "dense":
        from vla_rl.simulation.suites import check_dense_reward

        check_dense_reward(config.env.task_suite, config.env.task_ids)

    from vla_rl.model.checkpoint_folder import read_statistics, read_tokenizer
    from vla_rl.model.execution import compiles
    from vla_rl.model.find_checkpoint import check_checkpoint
    from vla_rl.model.quantization import check_quantization
    from vla_rl.run.metrics import check_wandb

    check_wandb(config)
    settings = config.policy
    if settings.compile == "true":
        compiles(settings.compile, config.run.device)
    check_quantization(settings.quantization)
    try:
        model = check_checkpoint(settings.checkpoint, settings.use_proprio)
    except ConfigError as error:
        raise (if_moved(error, "policy.checkpoint") if resumed else error) from None
    check_card(config, model)
    read_statistics(model, settings.unnorm_key or config.env.task_suite, settings.use_proprio)
    read_tokenizer(model)
    check_trained_as(config, model, resumed)


def check_card(config: Config, model: Path) -> None:
    """Raises ConfigError if the weights alone are more than the GPU has free; those in 4 bit count as a quarter."""
    import torch

    from vla_rl.learning.memory import check_weights
    from vla_rl.model.checkpoint_folder import tensor_shapes

    if config.run.device == "cuda":
        dtype, numbers = config.policy.dtype, 0.0
        for name, shape in tensor_shapes(model, config.policy.use_proprio):
            packed = config.policy.quantization != "none" and "language_model.model.layers." in name and len(shape) == 2
            numbers += math.prod(shape) / (4 if packed else 1)
        check_weights(int(numbers * getattr(torch, dtype).itemsize), *torch.cuda.mem_get_info(), dtype)


def train(config: Config, checkpoint: Path | None) -> None:
    """Checks what the settings need, makes the run folder, and trains in it."""
    check_start(config, resumed=checkpoint is not None)
    from vla_rl.run.checkpoint import locked

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
    made = {path.name for path in folder.iterdir()} <= {"config.yaml", ".lock", "wandb", "wandb_id", "checkpoints"}
    return made and all("iteration-000000" in path.name for path in folder.glob("checkpoints/*"))


def build_and_train(config: Config, checkpoint: Path | None, folder: Path) -> None:
    from OpenVLA_PPO import OpenVLAPPO
    from vla_rl.learning.memory import fit_to_card
    from vla_rl.run.metrics import MetricsLogger
    from vla_rl.simulation.suites import task_languages
    from vla_rl.simulation.vector_env import make_vector_env

    with ExitStack() as cleanup:
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


def build_policy(config: Config):
    import torch

    from vla_rl.model.execution import compiles
    from vla_rl.model.policy import OpenVLAPolicy

    if config.run.torch_threads is not None:
        torch.set_num_threads(config.run.torch_threads)
    torch.manual_seed(config.run.seed)  # of the adapter's initial weights
    torch.backends.cudnn.allow_tf32 = False  # convolutions too in true float32, as matrix products are by default
    settings = config.policy
    return OpenVLAPolicy.from_checkpoint(
        settings.checkpoint,
        decoder=settings.decoder,
        num_images=settings.num_images,
        use_proprio=settings.use_proprio,
        lora=settings.lora,
        device=config.run.device,
        dtype=getattr(torch, settings.dtype),
        chunk_size=settings.chunk_size,
        center_crop=settings.center_crop,
        unnorm_key=settings.unnorm_key or config.env.task_suite,
        gradient_checkpointing="none" if settings.gradient_checkpointing == "auto" else settings.gradient_checkpointing,
        compiled=compiles(settings.compile, config.run.device),
        quantization=settings.quantization,
    )


def build_value_head(config: Config, hidden_size: int):
    """None for GRPO, which has no critic."""
    import torch

    from vla_rl.model.value_head import ValueHead

    if config.algorithm.estimator == "grpo":
        return None
    generator = torch.Generator().manual_seed(config.run.seed)
    return ValueHead(hidden_size, config.value_head.hidden_sizes, generator).to(config.run.device)


def log_sizes(policy, value_head) -> None:
    from vla_rl.model.quantization import count_weights

    millions = {
        "policy": count_weights(policy.network),
        "trained (LoRA)": sum(p.numel() for p in policy.trainable_parameters()),
        "value head": sum(p.numel() for p in value_head.parameters()) if value_head is not None else 0,
    }
    log.info("parameters: %s", ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in millions.items()))


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
