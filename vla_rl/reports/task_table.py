"""Success of each task in an evaluation, as report.html, TensorBoard and Weights & Biases show it; names of its videos."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from vla_rl.reports.statistics import wilson_interval
from vla_rl.run.section import Mode

TASKS = "eval/tasks"  # name of the table
COLUMNS = ("task", "mode", "episodes", "success", "low", "high")


@dataclass(frozen=True)
class TaskSuccess:
    """One row."""

    task: str  # number of the task, or "all"
    mode: str  # vla_rl.run.section.Mode
    episodes: int
    success: float  # rate
    low: float  # 95 % Wilson interval
    high: float

    def cells(self) -> list[Any]:
        """In the order of COLUMNS."""
        return [getattr(self, column) for column in COLUMNS]


def task_rows(record: dict[str, Any], task_ids: Sequence[int]) -> list[TaskSuccess]:
    """Rows of an evaluation's line of metrics.jsonl: each task's, and all tasks' together; of one task, its own.

    Args:
        task_ids: tasks of the run (env.task_ids); each was evaluated as often as the others.
    """
    rows = []
    for mode in get_args(Mode):
        key = f"eval/success_rate_{mode}"
        episodes = record.get(f"eval/episodes_{mode}")
        if record.get(key) is None or not episodes:
            continue
        rates = {task: record.get(f"{key}/task_{task}") for task in task_ids}
        for task, rate in rates.items():
            if rate is not None:
                played = round(episodes / len(task_ids))
                rows.append(TaskSuccess(str(task), mode, played, rate, *wilson_interval(round(rate * played), played)))
        whole = "all" if len(task_ids) > 1 else str(*task_ids)
        ends = record.get(f"{key}_low"), record.get(f"{key}_high")
        if None in ends:
            ends = wilson_interval(round(record[key] * episodes), episodes)
        rows.append(TaskSuccess(whole, mode, episodes, record[key], *ends))
    return rows


def as_markdown(rows: Sequence[TaskSuccess]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in rows:
        cells = (f"{cell:.1%}" if isinstance(cell, float) else str(cell) for cell in row.cells())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def video_names(videos: Sequence[Path]) -> dict[str, Path]:
    """Names that are the same in each evaluation: 000012000_greedy_task3_state7_success.mp4 is eval/video/greedy_success.

    The task and state stay in the names of those that would have the same.
    """
    whole = {path: re.sub(r"^\d+_", "", path.stem) for path in videos}
    short = {path: re.sub(r"_task\d+_state\w+?(?=_|$)", "", name) for path, name in whole.items()}
    names = list(short.values())
    return {f"eval/video/{short[p] if names.count(short[p]) == 1 else whole[p]}": p for p in videos}
