"""RUN/report.html: a run on one page that needs nothing but itself.

Success and its curves, the last evaluation by task with a playing video, warnings, settings.

Not here: the curves (vla_rl.reports.drawing) and the page's layout (vla_rl/assets/report.html.jinja).
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from vla_rl.reports.curves import (
    EVALUATED,
    L1_HEAD,
    TRAINING,
    minutes_of,
    success_of_last_episodes,
    success_of_task,
)
from vla_rl.reports.records import METRICS_FILE, Records, read_metrics
from vla_rl.reports.task_table import TaskSuccess, task_rows
from vla_rl.run.files import write_whole
from vla_rl.run.load_settings import list_settings
from vla_rl.run.logs import WARNINGS_FILE
from vla_rl.run.run_folder import setting
from vla_rl.run.settings import Config
from vla_rl.run.sft_settings import SftConfig
from vla_rl.run.warmstart_settings import WarmstartConfig

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).parents[1] / "assets"
EMBEDDED_BYTES = 4 * 2**20  # a larger video is linked, as the rest are
LAST_EPISODES = 100  # that the training success of the summary is of
LAST_OF_TASK = 50  # that a task's training success is of: as many as an evaluation of all its fixed states
LAST_WARNINGS = 200

NO_INSTRUCTIONS: Mapping[int, str] = MappingProxyType({})


@dataclass(frozen=True)
class Setting:
    name: str
    value: str
    default: str
    description: str

    @property
    def differs(self) -> bool:
        return self.value != self.default


def write_report(
    folder: Path, config: Config | SftConfig | WarmstartConfig, instructions: Mapping[int, str] = NO_INSTRUCTIONS
) -> None:
    """Whole or not at all.

    Args:
        instructions: of tasks, by their number; others are shown by it alone.

    Raises:
        ConfigError: a line of metrics.jsonl is damaged.
        OSError: the page cannot be written.
    """
    write_whole(folder / REPORT_FILE, render(folder, config, instructions))


def is_outdated(folder: Path) -> bool:
    """Whether metrics or warnings came after the page was written, or there are some and no page."""
    page, *written = (folder / name for name in (REPORT_FILE, METRICS_FILE, WARNINGS_FILE))
    times = [path.stat().st_mtime_ns for path in written if path.exists()]
    return max(times, default=-1) > (page.stat().st_mtime_ns if page.exists() else -1)


def render(
    folder: Path, config: Config | SftConfig | WarmstartConfig, instructions: Mapping[int, str] = NO_INSTRUCTIONS
) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from vla_rl.reports.drawing import panels_as_svg

    records = read_metrics(folder / METRICS_FILE)
    x_name = "timesteps" if isinstance(config, Config) else "step"
    task_ids = [] if isinstance(config, SftConfig) else config.env.task_ids
    evaluation = last_with(records, "eval/render")
    evaluated = task_rows(evaluation, task_ids) if evaluation else []
    videos = find_videos(folder, evaluation.get("timesteps") if evaluation else None)
    shown = videos[0] if videos else None
    settings = all_settings(config)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        name=folder.name,
        what=what_is_trained(config),
        written=time.strftime("%Y-%m-%d %H:%M:%S"),
        x_name=x_name,
        summary=summary(records, config),
        evaluation=evaluation,
        modes=list(dict.fromkeys(row.mode for row in evaluated)),
        tasks=by_task(evaluated, records, task_ids),
        instructions={str(task): text for task, text in instructions.items()},
        last_of_task=LAST_OF_TASK,
        video=shown,
        video_source=video_source(folder, shown) if shown else None,
        other_videos=videos[1:],
        panels=panels_as_svg(records, x_name),
        warnings=read_warnings(folder),
        changed=[s for s in settings if s.differs],
        settings=settings,
    )


def what_is_trained(config: Config | SftConfig | WarmstartConfig) -> str:
    if isinstance(config, SftConfig):
        return f"supervised fine-tuning on {config.data.name}, seed {config.run.seed}"
    if isinstance(config, WarmstartConfig):
        method = "warm start of the token head"
    else:
        method = "PPO with GAE" if config.algorithm.estimator == "gae" else "GRPO"
    tasks = ", ".join(map(str, config.env.task_ids))
    plural = "s" * (len(config.env.task_ids) > 1)
    return f"{method} of {config.policy.checkpoint} on {config.env.task_suite}, task{plural} {tasks}, seed {config.run.seed}"


def last_with(records: Records, name: str) -> dict[str, Any] | None:
    return next((record for record in reversed(records) if record.get(name) is not None), None)


def summary(records: Records, config: Config | SftConfig | WarmstartConfig) -> list[tuple[str, str, str]]:
    """Title, number and note of what a reader looks for first."""
    if not records:
        return []
    if not isinstance(config, Config):
        return sft_summary(records, config)
    done = max(record["timesteps"] for record in records)
    rows = [("timesteps", f"{done:,}", f"of {config.run.timesteps:,}")]
    success = success_of_last_episodes(records, LAST_EPISODES)[2]
    if len(success):
        rows.append(
            ("training success", f"{success[-1]:.1%}", f"of the last {LAST_EPISODES} episodes or fewer, sampled")
        )
    for title, name in EVALUATED.items():
        record = last_with(records, name)
        if record is not None:
            ends = [record.get(f"{name}_{end}") for end in ("low", "high")]
            interval = "" if None in ends else "95 % interval {:.1%} to {:.1%}, ".format(*ends)
            note = f"{interval}fixed states, at {record['timesteps']:,} timesteps"
            rows.append((title, f"{record[name]:.1%}", note))
    last = last_with(records, TRAINING) or last_with(records, "rollout/episodes")
    if last is not None:
        minutes = minutes_of(records)[-1]
        rows.append(
            ("time", f"{minutes / 60:.1f} h" if minutes >= 100 else f"{minutes:.0f} min", "rollouts and updates")
        )
        speed, memory = last.get("rollout/env_steps_per_s"), last.get("system/peak_memory_gib")
        if speed is not None:
            rows.append(("speed", f"{speed:.0f}", "simulator steps a second in the last rollout"))
        if memory is not None:
            where = "of the GPU" if config.run.device == "cuda" else "resident, without the simulators"
            rows.append(("peak memory", f"{memory:.1f} GiB", where))
    return rows


def sft_summary(records: Records, config: SftConfig | WarmstartConfig) -> list[tuple[str, str, str]]:
    rows = [("steps", f"{records[-1]['step']:,}", f"of {config.training.steps:,}")]
    for title, name, form in (
        ("L1 head's success", L1_HEAD, ".1%"),
        *((title, name, ".1%") for title, name in EVALUATED.items()),
        ("loss", "warmstart/loss", ".3f"),
        ("loss", "sft/loss", ".3f"),
        ("held-out loss", "validation/loss", ".3f"),
        ("held-out token accuracy", "validation/token_accuracy", ".1%"),
        ("held-out L1", "validation/l1", ".3f"),
    ):
        record = last_with(records, name)
        if record is not None:
            rows.append((title, format(record[name], form), f"at step {record['step']:,}"))
    return rows


def by_task(
    rows: list[TaskSuccess], records: Records, task_ids: Sequence[int]
) -> dict[str, dict[str, TaskSuccess | tuple[float, int]]]:
    """Task -> mode -> row, in the order of the rows, and of several tasks "training" -> success and episodes; all tasks last."""
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        table.setdefault(row.task, {})[row.mode] = row
    for task in task_ids:
        training = success_of_task(records, task, LAST_OF_TASK)
        if training is not None:
            table.setdefault(str(task), {})["training"] = training
    numbers = {str(task): place for place, task in enumerate(task_ids)}
    return {task: table[task] for task in sorted(table, key=lambda task: numbers.get(task, len(numbers)))}


# --------------------------------------------------------------------------------------------------------------- videos


def find_videos(folder: Path, last: int | None = None) -> list[Path]:
    """The newest evaluation's first, of these a greedy success before all others.

    Args:
        last: timesteps of the last evaluation; later videos are of before a resume from an earlier checkpoint. None: all.
    """

    def timesteps(path: Path) -> int:
        written = re.match(r"(\d+)_", path.name)
        return int(written[1]) if written else 0

    def order(path: Path) -> tuple:
        liked = sum(word in path.name for word in ("greedy", "success"))
        return -timesteps(path), -liked, path.name

    found = [path for path in (folder / "videos").glob("*.mp4") if not path.name.startswith(".")]
    return sorted((path for path in found if last is None or timesteps(path) <= last), key=order)


def video_source(folder: Path, path: Path) -> str:
    """A data URI, or where the video lies from the page if it is large."""
    if path.stat().st_size > EMBEDDED_BYTES:
        return path.relative_to(folder).as_posix()
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


# --------------------------------------------------------------------------------------------------- warnings, settings


def read_warnings(folder: Path) -> list[str]:
    """The newest last."""
    path = folder / WARNINGS_FILE
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_WARNINGS:] if path.exists() else []


def all_settings(config: Config | SftConfig | WarmstartConfig) -> list[Setting]:
    """Every setting in the order of --help; the default is what holds where a settings file says nothing."""
    defaults: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        with suppress(ValidationError):  # a section with settings that must be given
            defaults[name] = field.annotation()

    def default(name: str) -> str:
        value: Any = defaults.get(name.partition(".")[0])
        for part in name.split(".")[1:]:
            value = getattr(value, part, None)
        return as_text(value)

    known = list_settings(type(config))
    return [
        Setting(name, as_text(setting(config, name)), default(name), field.description or "")
        for name, field in known.items()
        if "." in name
    ]


def as_text(value: Any) -> str:
    if isinstance(value, list) and len(value) > 3 and value == list(range(value[0], value[0] + len(value))):
        return f"{value[0]}-{value[-1]}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
