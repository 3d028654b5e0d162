"""Where numbers go: one JSON object a line in metrics.jsonl, pictures of them, and TensorBoard or wandb when asked.

docs/metrics.md explains each name.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vla_rl.reports.records import METRICS_FILE, is_later, read_metrics, set_aside_later_lines
from vla_rl.reports.task_table import task_rows
from vla_rl.reports.tensorboard import TensorBoard
from vla_rl.reports.weights_and_biases import WeightsAndBiases, wandb_mode
from vla_rl.run.failures import one_line, warn_of_failure
from vla_rl.run.files import Lines, Outage
from vla_rl.run.settings import Config
from vla_rl.run.sft_settings import SftConfig
from vla_rl.run.warmstart_settings import WarmstartConfig

log = logging.getLogger(__name__)

REDRAW_S = 60  # seconds; pictures of a long run take 2


class MetricsLogger:
    """Writes each iteration's metrics as soon as they are known; a killed run loses at most the line being written. Lines that the
    disk does not take wait in memory, and a picture that cannot be drawn is drawn the next time.

    Args:
        folder: the run's folder, which exists.
        clock: seconds, which go on.

    Attributes:
        instructions: of the tasks by their number, for the report; whoever builds the trainer knows them.

    Raises:
        ConfigError: wandb or TensorBoard was asked for and cannot start (not logged in, no network, not installed).
    """

    def __init__(
        self, folder: Path, config: Config | SftConfig | WarmstartConfig, clock: Callable[[], float] = time.monotonic
    ):
        self.folder = folder
        self.path = folder / METRICS_FILE
        self.config = config
        self.x_name = "timesteps" if isinstance(config, Config) else "step"
        self.instructions: dict[int, str] = {}
        self.clock = clock
        self.drawn_at = clock()
        self.lines = Lines(self.path)
        self.outage = Outage(f"lines of {self.path}", "they wait in memory until they can be")
        self.undrawn: set[str] = set()  # pictures that failed the last time, of which was told
        self.others: list[WeightsAndBiases | TensorBoard] = []
        if wandb_mode(config) != "disabled":
            self.others.append(WeightsAndBiases(folder, config))
        elif config.logging.wandb:
            log.info("WANDB_MODE=disabled: nothing goes to Weights & Biases")
        if config.logging.tensorboard:
            self.others.append(TensorBoard(folder, config))

    def continue_from(self, iteration: int, evaluated: bool = True) -> None:
        """The run resumes from a checkpoint of this iteration: what was logged later is moved aside, not lost.

        Args:
            evaluated: the checkpoint knows of its iteration's evaluation; else that is later too, and done again.

        Raises:
            ConfigError: a line is damaged, or wandb cannot start.
        """
        records = read_metrics(self.path)
        later = [record for record in records if is_later(record, iteration, evaluated)]
        earlier = [record for record in records if not is_later(record, iteration, evaluated)]
        if later:
            for other in self.others:
                other.supersede(earlier, min(record[self.x_name] for record in later))
        # last: what fails before it is done again by the next resume
        set_aside_later_lines(self.path, iteration, evaluated)

    def log(self, metrics: dict[str, Any]) -> None:
        """One line; metrics must hold `timesteps` and `iteration`. NaN and infinity become null, as JSON has neither.

        The pictures are drawn anew if the last ones are old.
        """
        self.write_line(metrics)
        if self.clock() - self.drawn_at > REDRAW_S:
            self.draw_curves()

    def write_line(self, metrics: dict[str, Any]) -> None:
        record = {key: finite_or_none(value) for key, value in metrics.items()}
        self.lines.append(json.dumps(record))
        self.outage.survive(self.lines.write)
        for other in self.others:
            said = f"{other.name} did not take iteration {record['iteration']}"
            warn_of_failure(said, other.log, record)

    def write_waiting(self) -> None:
        """Before a checkpoint, which must not be later than the lines.

        Raises:
            OSError: the disk still does not take them.
        """
        self.lines.write()

    def log_evaluation(self, metrics: dict[str, Any], videos: Sequence[Path] = ()) -> None:
        """The line of an evaluation; wandb and TensorBoard also get its videos and a table of its tasks."""
        self.write_line(metrics)
        rows = task_rows(metrics, self.config.env.task_ids)
        for other in self.others:
            said = f"{other.name} did not take the tasks and videos of iteration {metrics['iteration']}"
            warn_of_failure(said, other.log_evaluation, metrics, rows, videos)
        self.write_report()

    def draw_curves(self) -> None:
        """curves.png and report.html in the run folder, from what lies there.

        No failure of a picture ends a run: what cannot be drawn is a warning.
        """
        self.draw("curves", "curves.png", self.plot)
        self.write_report()
        self.drawn_at = self.clock()

    def plot(self) -> None:
        from vla_rl.reports.drawing import (
            plot_curves,  # matplotlib takes a second to import: not before the first picture
        )

        plot_curves(read_metrics(self.path), self.folder / "curves.png", self.x_name)

    def write_report(self) -> None:
        """report.html, as draw_curves does."""
        from vla_rl.reports.report import write_report

        self.draw("report", "report.html", lambda: write_report(self.folder, self.config, self.instructions))

    def draw(self, what: str, name: str, action: Callable[[], None]) -> None:
        """No failure of a picture ends a run; that it cannot be drawn is said once, until it can."""
        try:
            action()
        except Exception as error:
            if name not in self.undrawn:
                log.warning("no %s %s: %s", what, self.folder / name, one_line(error))
            self.undrawn.add(name)
        else:
            self.undrawn.discard(name)

    def close(self) -> None:
        """Ends what was begun; the report tells of an end that was not planned, too."""
        from vla_rl.reports.report import is_outdated

        if is_outdated(self.folder):
            self.write_report()
        for other in self.others:
            warn_of_failure(f"{other.name} did not finish its run", other.close)


class SilentLogger:
    """Of a process that writes nothing, since another one does (vla_rl.run.distributed)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.instructions: dict[int, str] = {}

    def continue_from(self, iteration: int, evaluated: bool = True) -> None: ...

    def log(self, metrics: dict[str, Any]) -> None: ...

    def write_waiting(self) -> None: ...

    def log_evaluation(self, metrics: dict[str, Any], videos: Sequence[Path] = ()) -> None: ...

    def draw_curves(self) -> None: ...

    def close(self) -> None: ...


def finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
