"""A run's folder: whether a new one can be made, a name for it, the settings of an old one that is continued, and which it is.

Not here: what lies in it (vla_rl.run.checkpoint, vla_rl.reports.metrics).
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from vla_rl.run.load_settings import (
    ConfigKind,
    absolute,
    config_from_dict,
    expand,
    from_root,
    list_settings,
    merge,
    put_paths,
    read_yaml,
    save_config,
    set_key,
)
from vla_rl.run.logs import WARNINGS_FILE
from vla_rl.run.section import check_name
from vla_rl.run.settings import Config, ConfigError
from vla_rl.run.sft_settings import SftConfig
from vla_rl.run.warmstart_settings import WarmstartConfig

log = logging.getLogger(__name__)

# what a start leaves before anything is measured or trained
BY_START = {"config.yaml", ".lock", WARNINGS_FILE, "report.html", "wandb", "wandb_id", "tensorboard", "checkpoints"}
# of the settings, what says nothing of what is trained: two runs that differ in no other are the same one for --resume auto
NOT_OF_THE_TRAINING = (
    *("run.name", "run.output_dir", "run.timesteps", "run.stop_without_signal", "run.grace_s"),
    *("run.device", "run.torch_threads", "logging.", "distributed.", "eval.num_envs", "eval.video"),
    *("env.num_workers", "env.simulators_per_worker", "env.model_cache_gb"),
    *("policy.as_trained", "policy.gradient_checkpointing", "policy.compile"),
)

# ------------------------------------------------------------------------------------------------------------------ new


def with_absolute_output_dir(config: ConfigKind) -> ConfigKind:
    """The same settings; where runs are kept is told from any folder."""
    output_dir = from_root(config.run.output_dir)
    return config.model_copy(update={"run": config.run.model_copy(update={"output_dir": output_dir})})


def with_found_adapter(config: Config) -> Config:
    """The same settings; policy.adapter is the very folder of the weights, also once the run that it names has newer ones.

    Raises:
        ConfigError: there are no such weights, or they are torn.
    """
    if config.policy.adapter is None:
        return config
    from vla_rl.run.checkpoint import find_adapter  # torch: only where it is needed

    adapter = str(find_adapter(Path(config.policy.adapter), "policy.adapter="))
    return config.model_copy(update={"policy": config.policy.model_copy(update={"adapter": adapter})})


def check_run_folder(config: Config | SftConfig | WarmstartConfig) -> None:
    """Whether the folder of a new run can be made; makes nothing.

    Raises:
        ConfigError: run.name is there already, or run.output_dir cannot be written to.
    """
    output_dir = Path(config.run.output_dir)
    if config.run.name is not None and os.path.lexists(output_dir / config.run.name):
        check_begun(output_dir / config.run.name)
    nearest = next(path for path in (output_dir, *output_dir.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise ConfigError(f"run.output_dir={output_dir}: {nearest} is not a folder; give another place for runs")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"run.output_dir={output_dir}: {nearest} cannot be written to; give another place for runs")


def tasks_text(task_ids: list[int]) -> str:
    """ "0-3-5", for a name; of many tasks the first four."""
    return "-".join(map(str, task_ids[:4])) + ("-etc" if len(task_ids) > 4 else "")


def make_run_folder(config: Config | SftConfig | WarmstartConfig, automatic_name: str) -> Path:
    """The new folder of a run, with its config.yaml in it; that of a run of its name which ended before it began is made anew.

    Args:
        automatic_name: where run.name is null; if another run has it, -2, -3, ... is put behind it.

    Raises:
        ConfigError: run.name is there already, or the folder cannot be made.
    """
    output_dir = Path(config.run.output_dir)
    if config.run.name is not None and os.path.lexists(output_dir / config.run.name):
        check_begun(output_dir / config.run.name)
        log.warning("nothing was measured or trained in %s: it is begun anew", output_dir / config.run.name)
        shutil.rmtree(output_dir / config.run.name)
    for number in itertools.count(1):
        automatic = re.sub(r"[/\x00-\x1f]", "-", automatic_name) + (f"-{number}" if number > 1 else "")
        folder = output_dir / (config.run.name or automatic)
        try:
            folder.mkdir(parents=True)  # fails if it is there: two runs that start at once never share one
            break
        except OSError as error:
            if not os.path.lexists(folder):
                raise ConfigError(f"run.output_dir={output_dir}: cannot make {folder} ({error.strerror})") from None
            if config.run.name is not None:
                raise taken(folder) from None
    save_config(config, folder / "config.yaml")
    return folder


def taken(folder: Path) -> ConfigError:
    if (folder / "config.yaml").exists() and not any(folder.glob("checkpoints/iteration-*")):
        return ConfigError(
            f"run folder {folder} exists and ended before its first checkpoint; remove or rename it, or choose another run.name"
        )
    return ConfigError(f"run folder {folder} exists; choose another run.name, or continue it with --resume {folder}")


def check_begun(folder: Path) -> None:
    """Raises ConfigError if a folder is there that cannot be begun anew: of another thing, or of a run that has something or is
    being worked on."""
    from vla_rl.run.checkpoint import locked

    if not (folder / "config.yaml").is_file() or not is_untouched(folder):
        raise taken(folder)
    with locked(folder):
        pass


def is_untouched(folder: Path) -> bool:
    """Whether a run folder has nothing but what a start makes: a checkpoint at 0 timesteps is the settings again."""
    made = {path.name for path in folder.iterdir()} <= BY_START
    return made and all("iteration-000000" in path.name for path in folder.glob("checkpoints/*"))


# -------------------------------------------------------------------------------------------------------------- resumed


def resumed_settings(
    resume: str, overrides: list[str], flags: dict[str, Any], kind: type[ConfigKind]
) -> tuple[ConfigKind, ConfigKind, Path]:
    """Of a run that is continued: its settings, those with overrides and flags, and its newest checkpoint, verified.

    A run folder that was moved or copied is the run where it is now: run.output_dir and run.name are its present ones. Paths
    that the run was given stay as they were written, but are made absolute where something is there.

    Raises:
        ConfigError: no run or checkpoint, or a torn one; or see vla_rl.run.load_settings.load_config.
    """
    from vla_rl.run.checkpoint import find_checkpoint  # torch: not before the arguments are known to be sound

    try:
        checkpoint = find_checkpoint(Path(expand(resume, "--resume")).resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ConfigError(f"--resume {resume:.200}: {error}; give a folder such as runs/NAME") from None
    if checkpoint.parent.name != "checkpoints":
        raise ConfigError(
            f"--resume {resume}: the checkpoint is not in the folder checkpoints of a run, where the run goes on; put it "
            f"into one, such as runs/NAME/checkpoints/{checkpoint.name}"
        )
    if not (checkpoint.parent.parent / "config.yaml").is_file():  # a copy would make a run of whatever folder is there
        raise ConfigError(
            f"--resume {resume}: {checkpoint.parent.parent} is no run's folder (it has no config.yaml), where the run would go on; "
            "copy the run whole, or begin a new one with policy.adapter=..."
        )
    run, source = checkpoint.parent.parent, f"{checkpoint}/config.yaml"
    recorded = read_yaml(source)
    put_paths(recorded, absolute)
    set_key(recorded, "run.output_dir", str(run.parent))
    set_key(recorded, "run.name", None)
    with suppress(ValueError):  # a folder may have been renamed to what is no name
        set_key(recorded, "run.name", check_name(run.name))
    before = config_from_dict(recorded, source, kind)
    return before, config_from_dict(merge(recorded, overrides, flags), source, kind), checkpoint


def unbegun_settings(
    resume: str, overrides: list[str], flags: dict[str, Any], kind: type[ConfigKind]
) -> ConfigKind | None:
    """Of a run that ended before its first checkpoint and has nothing: the settings, by whose name it is begun anew (see
    make_run_folder). None of any other folder."""
    run = Path(expand(resume, "--resume"))
    try:
        saved = [*run.glob("checkpoints/iteration-*"), *run.glob("checkpoints/.iteration-*.old")]
        begun = (run / "config.yaml").is_file() and not saved and is_untouched(run)
        run = run.resolve()
    except (OSError, RuntimeError):
        return None
    if not begun:
        return None
    recorded = read_yaml(run / "config.yaml")
    put_paths(recorded, absolute)
    set_key(recorded, "run.output_dir", str(run.parent))
    set_key(recorded, "run.name", run.name)
    return config_from_dict(merge(recorded, overrides, flags), str(run / "config.yaml"), kind)


def run_of_settings(config: Config) -> tuple[Config, Path | None]:
    """For --resume auto: the settings with the name of the run to continue and its checkpoint, or as they are and None.

    It is the run with the newest checkpoint in run.output_dir, or that of run.name, whose settings are these but for
    NOT_OF_THE_TRAINING, which are taken from `config`: of a run what its newest checkpoint says, which has what a resume changed.
    A torn checkpoint is passed over with a warning. A run that ended before its first one is begun anew.

    Raises:
        ConfigError: run.name has other settings or no sound checkpoint, or another process works on the run.
    """
    from vla_rl.run.checkpoint import list_checkpoints, locked, newest_sound

    root, name = Path(config.run.output_dir), config.run.name
    runs = [path.parent for path in root.glob("*/config.yaml")] if name is None else [root / name]
    newest: dict[Path, float] = {}
    for run in runs:
        if not (run / "config.yaml").is_file():
            continue  # a name that is free, or a folder of something else
        if name is None and not is_of_settings(run, config):
            continue
        if name is not None and (changed := difference(run, config)):
            raise ConfigError(
                f"--resume auto: run.name={name} has other settings: {', '.join(changed)}; choose another name, or set them as they were"
            )
        checkpoints = list_checkpoints(run / "checkpoints")
        newest[run] = (checkpoints[-1] if checkpoints else run / "config.yaml").stat().st_mtime
    for run in sorted(newest, key=newest.__getitem__, reverse=True):
        with locked(run):
            checkpoint = newest_sound(run)
        begun_anew = checkpoint is None and is_untouched(run)
        if checkpoint is not None or begun_anew:
            log.info("--resume auto: %s %s", "beginning anew" if begun_anew else "continuing", run)
            place = {"output_dir": str(run.parent), "name": run.name}
            return config.model_copy(update={"run": config.run.model_copy(update=place)}), checkpoint
        if name is not None:
            raise ConfigError(f"--resume auto: {run} has no sound checkpoint; choose another run.name")
    return config, None


def is_of_settings(run: Path, config: Config) -> bool:
    try:
        return not difference(run, config)
    except ConfigError:  # of another kind of training, or of settings of long ago
        return False


def difference(run: Path, config: Config) -> list[str]:
    """What of a run's settings is not as in `config`, of those that say what is trained."""
    source = newest_settings(run)
    recorded = read_yaml(source)
    put_paths(recorded, absolute)
    free = tuple(name for name in list_settings(Config) if name.startswith(NOT_OF_THE_TRAINING))
    return changed_settings(config_from_dict(recorded, str(source), Config), config, ("",), free)


def newest_settings(run: Path) -> Path:
    """config.yaml of a run's newest checkpoint, which has what a resume changed; RUN/config.yaml where there is none."""
    numbered = {
        int(name[1]): path
        for path in run.glob("checkpoints/iteration-*/config.yaml")
        if (name := re.fullmatch(r"iteration-([0-9]+)", path.parent.name))
    }
    return numbered[max(numbered)] if numbered else run / "config.yaml"


def changed_settings(
    before: ConfigKind, after: ConfigKind, fixed: tuple[str, ...], free: tuple[str, ...] = ()
) -> list[str]:
    """ "policy.chunk_size (2 -> 4)": what differs, of the settings that begin with one of `fixed` and are not in `free`."""
    changed = []
    for name in list_settings(type(before)):
        if "." in name and name.startswith(fixed) and name not in free:
            old, new = setting(before, name), setting(after, name)
            if old != new and not (name == "run.output_dir" and os.path.realpath(old) == os.path.realpath(new)):
                changed.append(f"{name} ({old} -> {new})")
    return changed


def setting(config: Config | SftConfig, name: str) -> Any:
    value = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def if_moved(error: ConfigError, key: str) -> ConfigError:
    """The error, of a resumed run, and the setting that says where a thing is now; the run's checkpoint knows whether it is
    the same one."""
    return ConfigError(f"{error}; if it was moved, tell --resume where it is now with {key}=...")
