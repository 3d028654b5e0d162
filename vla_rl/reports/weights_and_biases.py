"""Weights & Biases, which gets what metrics.jsonl gets, and tables and videos of evaluations; imported only when it is on."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_rl.reports.task_table import COLUMNS, TASKS, TaskSuccess, video_names
from vla_rl.run.failures import one_line, warn_of_failure
from vla_rl.run.settings import Config, ConfigError
from vla_rl.run.sft_settings import SftConfig

log = logging.getLogger(__name__)

WANDB_MODES = {"run": "online", "dryrun": "offline"} | {m: m for m in ("online", "offline", "shared", "disabled")}
NO_WANDB = "set logging.wandb_mode=offline or pass --no-wandb"


def wandb_mode(config: Config | SftConfig) -> str:
    """ "online", "offline", "shared" or "disabled": what WANDB_MODE says, and logging.wandb_mode where that is offline.

    Raises:
        ConfigError: WANDB_MODE is no mode of wandb's.
    """
    if not config.logging.wandb:
        return "disabled"
    variable = os.environ.get("WANDB_MODE", "online")
    if variable not in WANDB_MODES:
        raise ConfigError(
            f"WANDB_MODE={variable} is none of {', '.join(WANDB_MODES)}; unset it, or set it to one of them"
        )
    mode = WANDB_MODES[variable]
    return config.logging.wandb_mode if mode == "online" else mode


def check_wandb(config: Config | SftConfig) -> None:
    """Before anything is made on disk.

    Raises:
        ConfigError: wandb was asked for, online, and nobody is logged in, or a key or a WANDB_* variable is malformed.
    """
    if wandb_mode(config) in ("offline", "disabled"):
        return
    import wandb

    try:
        logged_in = wandb.login(prompt=False, verify=False)  # looks for a key; asks nobody
    except (wandb.errors.Error, ValueError) as error:  # ValueError: of WANDB_* variables
        raise ConfigError(
            f"Weights & Biases refuses your login ({one_line(error)}); mend it, run `wandb login`, or {NO_WANDB}"
        ) from None
    if not logged_in:
        raise ConfigError(
            "logging.wandb=true, but you are not logged in to Weights & Biases; run `wandb login`, or set "
            "logging.wandb_mode=offline, or pass --no-wandb"
        )


class WeightsAndBiases:
    """The wandb run of a run folder: the one of an earlier start, or a new one.

    Raises:
        ConfigError: it cannot start (not logged in, no network).
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, config: Config | SftConfig):
        self.folder, self.config = folder, config
        self.run = start_wandb(folder, config)

    def log(self, record: dict[str, Any]) -> None:
        self.run.log({key: value for key, value in record.items() if value is not None})

    def log_evaluation(self, record: dict[str, Any], rows: Sequence[TaskSuccess], videos: Sequence[Path]) -> None:
        """The table of tasks and the videos of an evaluation, beside its numbers."""
        import wandb

        media = {name: wandb.Video(str(path), format="mp4") for name, path in video_names(videos).items()}
        table = wandb.Table(columns=list(COLUMNS), data=[row.cells() for row in rows])
        place = {key: record[key] for key in ("iteration", "timesteps", "step") if key in record}
        self.run.log(place | media | {TASKS: table})

    def supersede(self, earlier: list[dict[str, Any]], first_later: int) -> None:
        """wandb cannot take points back (its rewind is not on every server): the run ends and a new one of the same group
        begins with the lines that count, those of videos and tables left out.

        Raises:
            ConfigError: it cannot start.
        """
        warn_of_failure(f"{self.name} did not finish its run", self.close)
        self.run = start_wandb(self.folder, self.config, supersede=True)
        for record in earlier:
            self.log(record)

    def close(self) -> None:
        self.run.finish()


def start_wandb(folder: Path, config: Config | SftConfig, supersede: bool = False) -> Any:
    """The wandb run of this folder: the one of an earlier start, or a new one.

    Args:
        supersede: leave the earlier one as it is and make a new one, in the same group and numbered.

    Raises:
        ConfigError: wandb cannot start.
    """
    import wandb

    settings = config.logging
    id_file, superseded_file = folder / "wandb_id", folder / "wandb_id.superseded"
    run_id = id_file.read_text().strip() if id_file.exists() else None
    superseded = superseded_file.read_text().split() if superseded_file.exists() else []
    if supersede:
        superseded.append(run_id)
        run_id = secrets.token_hex(4)  # not WANDB_RUN_ID's
    try:
        run = wandb.init(
            project=settings.wandb_project,
            entity=settings.wandb_entity,
            name=f"{folder.name}_{len(superseded) + 1}" if superseded else folder.name,
            group=os.environ.get("WANDB_RUN_GROUP") or folder.name,
            notes=f"continues {superseded[-1]}, whose later points are superseded" if supersede else None,
            dir=str(folder),
            config=config.model_dump(mode="json"),
            mode=wandb_mode(config),
            id=run_id,
            resume="allow",
        )
    except (wandb.errors.Error, ValueError, OSError) as error:  # ValueError: of WANDB_* variables
        raise ConfigError(f"Weights & Biases could not start ({one_line(error)}); {NO_WANDB}") from error
    if superseded:
        superseded_file.write_text("".join(f"{superseded_id}\n" for superseded_id in superseded))
    id_file.write_text(run.id)
    run.define_metric(
        "*", step_metric="timesteps" if isinstance(config, Config) else "step"
    )  # its own step only grows: a resumed run logs smaller timesteps again
    return run
