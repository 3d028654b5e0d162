"""What the command lines log: our own lines from INFO on, those of libraries from WARNING on. A run keeps its warnings.

At a terminal a bar shows what goes on, elsewhere a line a minute. No torch here: simulators' processes import this.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vla_rl.run.files import Lines
from vla_rl.run.machine import rank, who

OURS = ("vla_rl", "OpenVLA_PPO", "start_gae_ppo_training")  # loggers, and all below them
# libraries whose warnings are of themselves: that a font cache is built, that a home folder cannot be written to
QUIET = ("matplotlib",)

WARNINGS_FILE = "warnings.log"
SLOW_S = 3.0
MINUTE_S = 60.0

log = logging.getLogger(__name__)


def configure_logging() -> None:
    """Once, at the start of a command line; where the root has handlers already (a test), they stay as they are. Of several
    processes of a run the first one tells what is going on, the others their warnings."""
    handler = logging.StreamHandler()
    handler.addFilter(is_shown)  # the level of the root does not hold for a library that sets its own
    line = f"%(asctime)s {who()}%(message)s"
    logging.basicConfig(level=logging.WARNING, format=line, datefmt="%H:%M:%S", handlers=[handler])
    for name in OURS:
        logging.getLogger(name).setLevel(logging.WARNING if rank() else logging.INFO)
    # gymnasium's "WARN: ...", in yellow, through Python's warnings; its errors still show
    warnings.filterwarnings("ignore", message="\x1b\\[33mWARN: ")


def is_shown(record: logging.LogRecord) -> bool:
    library = record.name.split(".")[0]
    return library in OURS or record.levelno >= (logging.ERROR if library in QUIET else logging.WARNING)


@contextmanager
def warnings_kept(folder: Path) -> Iterator[None]:
    """Adds what is logged from WARNING on to RUN/warnings.log, a line each, which a resumed run goes on with; where the disk takes
    none, they are added with the next one."""
    handler = LinesHandler(Lines(folder / WARNINGS_FILE))
    handler.setLevel(logging.WARNING)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(is_shown)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@contextmanager
def slow(what: str) -> Iterator[None]:
    """Around a thing that a start does: a line once it takes over SLOW_S, and one when it is done."""
    begun = time.monotonic()
    timer = threading.Timer(SLOW_S, log.info, args=("%s ...", what))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    seconds = time.monotonic() - begun
    if seconds > SLOW_S:
        log.info("%s: %.0f s", what, seconds)


def progress_bar(name: str, total: int | None, unit: str, shown: bool, initial: int = 0) -> tqdm | MinuteLines:
    """A bar where a person watches and wants one (`shown`), else what says as much in a line a minute."""
    if shown and sys.stderr.isatty():
        return tqdm(total=total, desc=name, unit=unit, mininterval=0.5, initial=initial)
    return MinuteLines(name, total, unit, initial)


class MinuteLines:
    """What of tqdm's bars the programs use: lines of the log, a minute apart whoever says them, with the time left."""

    said_at = time.monotonic()

    def __init__(
        self, name: str, total: int | None, unit: str, initial: int = 0, clock: Callable[[], float] = time.monotonic
    ):
        self.name, self.total, self.unit, self.clock = name, total, unit, clock
        self.initial = self.done = initial
        self.begun, self.postfix = clock(), ""

    def __enter__(self) -> MinuteLines:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def update(self, count: int = 1) -> None:
        self.done += count
        now = self.clock()
        if now - MinuteLines.said_at < MINUTE_S:
            return
        MinuteLines.said_at = now
        parts = [f"{self.done}{'' if self.total is None else f' of {self.total}'} {self.unit}"]
        if self.total is not None and self.done > self.initial:
            left_s = (now - self.begun) / (self.done - self.initial) * (self.total - self.done)
            parts.append(f"{seconds_text(left_s)} left")
        log.info("%s: %s", self.name, ", ".join([*parts, *filter(None, [self.postfix])]))

    def set_postfix_str(self, text: str) -> None:
        self.postfix = text


def seconds_text(seconds: float) -> str:
    """ "4.2 s", "3.5 min", "7.1 h"."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class LinesHandler(logging.Handler):
    def __init__(self, lines: Lines):
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
        with suppress(OSError):
            self.lines.write()


class OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return " ".join(super().format(record).split())
