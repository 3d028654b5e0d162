"""The checkpoint of a run's best evaluation, kept beside the newest ones: runs/RUN/checkpoints/best-iteration-000030.

A copy of iteration-000030 (hard links where the disk has them) with evaluation.json, which says what was measured. Its name is none
of a checkpoint that a resume finds or pruning removes. A better one is there whole before the one before it goes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, get_args

from vla_rl.run.checkpoint import BEST, list_checkpoints, remove_checkpoint, remove_left_overs, sync
from vla_rl.run.failures import one_line
from vla_rl.run.files import Finite, Strict, checked, read_json, write_whole
from vla_rl.run.section import Mode
from vla_rl.run.settings import ConfigError, EvalConfig

log = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
METRICS = {mode: f"eval/success_rate_{mode}" for mode in get_args(Mode)}  # the first that was measured counts
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EACCES)


class Evaluation(Strict):
    """What of evaluation.json is compared."""

    metric: str
    value: Finite
    measured: dict


def evaluation_of(metrics: dict[str, Any], settings: EvalConfig) -> dict[str, Any]:
    """What is compared of an evaluation: success in the first of METRICS' modes that was evaluated, and how it was measured.

    Args:
        metrics: of log_evaluation, with iteration and timesteps.
    """
    mode = next(mode for mode, name in METRICS.items() if name in metrics)
    measured = settings.model_dump(mode="json", include={"states", "max_steps", "render", "temperature"})
    if mode == "greedy":
        del measured["temperature"]
    return {
        "iteration": metrics["iteration"],
        "timesteps": metrics["timesteps"],
        "metric": METRICS[mode],
        "value": metrics[METRICS[mode]],
        "measured": measured,
    }


def is_at_least_as_good(new: dict[str, Any], old: dict[str, Any] | None) -> bool:
    """Of equals the later one is the best, and what was measured otherwise is not comparable: the new one counts."""
    if old is None or any(old.get(name) != new[name] for name in ("metric", "measured")):
        return True
    return new["value"] >= old["value"]


def keep_best(folder: Path, evaluation: dict[str, Any]) -> Path:
    """Keeps a checkpoint that was evaluated if it is the best so far; returns the best one's folder.

    Args:
        folder: of the checkpoint, iteration-NUMBER.
        evaluation: see evaluation_of.
    """
    root = folder.parent
    remove_left_overs(root)
    before = list_checkpoints(root, BEST)
    if before and not is_at_least_as_good(evaluation, read_evaluation(before[-1])):
        return before[-1]
    best, unfinished = root / f"{BEST}{folder.name}", root / f".{BEST}{folder.name}.tmp"
    text = json.dumps(evaluation, indent=1) + "\n"
    if best.is_dir():  # evaluated again after a kill: the same weights
        write_whole(best / EVALUATION, text)
    else:
        try:
            shutil.copytree(folder, unfinished, copy_function=link_or_copy)
            (unfinished / EVALUATION).write_text(text)
            for path in [*unfinished.rglob("*"), unfinished]:
                sync(path)
            os.replace(unfinished, best)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)  # a full disk, say: leave it as free as it was
        sync(root)
    for old in before:
        if old != best:
            remove_checkpoint(old)
    log.info("best evaluation so far, %s of %.1f %%: kept in %s", evaluation["metric"], 100 * evaluation["value"], best)
    return best


def read_evaluation(best: Path) -> dict[str, Any] | None:
    """None, with a warning, of what cannot be read: a later evaluation takes its place."""
    try:
        return load_evaluation(best / EVALUATION)
    except ConfigError as error:
        log.warning("%s: what it was the best of is not known", error)
        return None


def load_evaluation(path: Path) -> dict[str, Any]:
    """Raises ConfigError where evaluation.json cannot be read or says nothing that can be compared."""
    way_out = "remove it, and the next evaluation takes its place"
    found = read_json(path, way_out)
    try:
        checked(Evaluation, found)
    except ValueError as error:
        raise ConfigError(f"{path} is of no evaluation ({one_line(error)}); {way_out}") from None
    return found


def link_or_copy(source: str, target: str) -> None:
    """No file of a checkpoint is ever changed, so two folders can share it."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)
