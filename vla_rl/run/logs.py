"""What the command lines log: our own lines from INFO on, those of libraries from WARNING on. A run keeps its warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vla_rl.run.machine import rank

OURS = ("vla_rl", "OpenVLA_PPO", "start_gae_ppo_training")  # loggers, and all below them
# libraries whose warnings are of themselves: that a font cache is built, that a home folder cannot be written to
QUIET = ("matplotlib",)

WARNINGS_FILE = "warnings.log"


def who() -> str:
    """ "rank 3: " in a process beside the first one of a run."""
    return f"rank {rank()}: " if rank() else ""


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
    """Adds what is logged from WARNING on to RUN/warnings.log, a line each, which a resumed run goes on with."""
    handler = logging.FileHandler(folder / WARNINGS_FILE, delay=True, encoding="utf-8")
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


class OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return " ".join(super().format(record).split())
