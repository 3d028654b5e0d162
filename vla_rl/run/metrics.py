"""Where numbers go: one JSON object a line in metrics.jsonl, PNG curves, and Weights & Biases when asked.

docs/metrics.md explains each name. wandb is imported nowhere else, and only when it is switched on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from vla_rl.run.failures import one_line
from vla_rl.run.settings import Config, ConfigError
from vla_rl.run.sft_settings import SftConfig

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"

# the panels of curves.png: title -> metric names
CURVES = {
    "success rate": ["rollout/success_rate", "eval/success_rate_greedy", "eval/success_rate_sampled"],
    "return": ["rollout/return"],
    "episode length (simulator steps)": ["rollout/length"],
    "policy loss": ["actor/policy_loss"],
    "approximate KL of the update": ["actor/approx_kl"],
    "clip fraction": ["actor/clip_fraction"],
    "entropy (nats)": ["actor/entropy"],
    "gradient norm": ["actor/grad_norm", "critic/grad_norm"],
    "value loss": ["critic/value_loss"],
    "explained variance": ["critic/explained_variance"],
    "simulator steps per second": ["rollout/env_steps_per_s"],
    "seconds per iteration": ["time/rollout_s", "time/update_s"],
}


class MetricsLogger:
    """Writes each iteration's metrics as soon as they are known; a killed run loses at most the line being written.

    Args:
        folder: the run's folder, which exists.

    Raises:
        ConfigError: wandb was asked for and cannot start (not logged in, no network).
    """

    def __init__(self, folder: Path, config: Config | SftConfig):
        self.folder = folder
        self.path = folder / METRICS_FILE
        self.config = config
        self.wandb_run = start_wandb(folder, config)

    def continue_from(self, iteration: int, evaluated: bool = True) -> None:
        """The run resumes from a checkpoint of this iteration: what was logged later is moved aside, not lost.

        wandb cannot take points back (its rewind is not on every server), so where there are later ones its run ends and
        a new one of the same group begins with the lines that count.

        Args:
            evaluated: the checkpoint knows of its iteration's evaluation; else that is later too, and done again.

        Raises:
            ConfigError: a line is damaged, or wandb cannot start.
        """
        records = read_metrics(self.path)
        earlier = [record for record in records if not is_later(record, iteration, evaluated)]
        if self.wandb_run is not None and len(earlier) < len(records):
            self.close()
            self.wandb_run = start_wandb(self.folder, self.config, supersede=True)
            for record in earlier:
                self.log_to_wandb(record)
        # last: what fails before it is done again by the next resume
        set_aside_later_lines(self.path, iteration, evaluated)

    def log(self, metrics: dict[str, Any]) -> None:
        """One line; metrics must hold `timesteps` and `iteration`. NaN and infinity become null, as JSON has neither."""
        record = {key: finite_or_none(value) for key, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.wandb_run is not None:
            self.log_to_wandb(record)

    def log_to_wandb(self, record: dict[str, Any]) -> None:
        """A line that wandb does not take is a warning: metrics.jsonl has it."""
        try:
            self.wandb_run.log({key: value for key, value in record.items() if value is not None})
        except Exception as error:
            log.warning("Weights & Biases did not take iteration %s: %s", record["iteration"], one_line(error))

    def draw_curves(self, curves: dict[str, list[str]] = CURVES, x: str = "timesteps") -> None:
        """curves.png in the run folder, from metrics.jsonl: panels of metrics against x.

        No failure of a picture ends a run: curves that cannot be drawn are a warning.
        """
        path = self.folder / "curves.png"
        try:
            records = read_metrics(self.path)
            if records:
                plot_curves(records, path, curves, x)
        except Exception as error:
            log.warning("no curves %s: %s", path, one_line(error))

    def close(self) -> None:
        if self.wandb_run is not None:
            try:
                self.wandb_run.finish()
            except Exception as error:
                log.warning("Weights & Biases did not finish its run: %s", one_line(error))


def finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a torn last line (the run was killed while writing it) is left out.

    Raises:
        ConfigError: a line that is not the last one is damaged.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append({"iteration": record["iteration"], **record})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ConfigError(
                    f"{path}, line {number} is damaged: {line[:80]!r}; mend or remove the line, or move the file away"
                ) from error
    return records


def is_later(record: dict[str, Any], iteration: int, evaluated: bool) -> bool:
    """Whether a line was written after the checkpoint of an iteration."""
    is_evaluation = any(name.startswith("eval/") for name in record)
    return record["iteration"] > iteration or (record["iteration"] == iteration and is_evaluation and not evaluated)


def set_aside_later_lines(path: Path, iteration: int, evaluated: bool = True) -> None:
    """Moves lines written after the checkpoint to metrics.superseded.jsonl: the resumed run writes them anew."""
    records = read_metrics(path)
    later = [record for record in records if is_later(record, iteration, evaluated)]
    earlier = [record for record in records if not is_later(record, iteration, evaluated)]
    if later:
        with (path.parent / "metrics.superseded.jsonl").open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in later)
    rewritten = path.with_suffix(".tmp")
    rewritten.write_text("".join(json.dumps(record) + "\n" for record in earlier))
    os.replace(rewritten, path)


def plot_curves(
    records: list[dict[str, Any]], path: Path, curves: dict[str, list[str]] = CURVES, x_name: str = "timesteps"
) -> None:
    from matplotlib.figure import Figure  # takes a second to import: not before the first picture
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panels = {
        title: [n for n in names if any(r.get(n) is not None for r in records)] for title, names in curves.items()
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            points = [r for r in records if r.get(name) is not None]
            x = [r[x_name] for r in points]
            marker = "." if len(points) < 30 else None
            (line,) = axis.plot(x, [r[name] for r in points], label=name, marker=marker, linewidth=1)
            if all(r.get(f"{name}_low") is not None for r in points):  # the interval of an evaluation
                low, high = ([r[f"{name}_{end}"] for r in points] for end in ("low", "high"))
                axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(x_name, fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
        if title == "success rate":
            axis.set_ylim(-0.05, 1.05)
        if title == "explained variance":  # far below 0 it says no more than below 0
            axis.set_ylim(max(axis.get_ylim()[0], -1.05), 1.05)
        # one peak would flatten the rest; before a run's first reward all of it may be 0
        if title == "gradient norm" and any((r.get(n) or 0) > 0 for r in records for n in names):
            axis.set_yscale("log", nonpositive="mask")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    unfinished = path.with_name(f".{path.name}")
    try:
        figure.tight_layout()
        figure.savefig(unfinished, dpi=100, format="png")
        os.replace(unfinished, path)
    finally:
        with suppress(OSError):  # nothing torn stays
            unfinished.unlink(missing_ok=True)


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


def start_wandb(folder: Path, config: Config | SftConfig, supersede: bool = False) -> Any:
    """The wandb run of this folder: the one of an earlier start, or a new one.

    Args:
        supersede: leave the earlier one as it is and make a new one, in the same group and numbered.

    Returns:
        None if wandb is switched off.

    Raises:
        ConfigError: wandb cannot start.
    """
    mode = wandb_mode(config)
    if mode == "disabled":
        if config.logging.wandb:
            log.info("WANDB_MODE=disabled: nothing goes to Weights & Biases")
        return None
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
            mode=mode,
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
