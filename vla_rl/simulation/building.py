"""What workers do at present, as the main process sees it: simulators that are built, the phase in which one hangs or has died.

To build takes seconds a simulator, and more at a process's first: workers write a line to a file as they begin one and as it is
done, and the main process reads on while it waits. The phase is in shared memory, which outlives a worker.

W workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

log = logging.getLogger(__name__)

QUIET_S = 1.0  # a wait shorter than this is not worth a line
PHASES = ("start", "wait", "build", "reset", "step", "render")
LONG = ("start", "build", "reset")  # to which build_s applies
PHASE, WHO, CHANGES, STEPS, SLOWEST_US = range(5)  # of a row
FIRST_STEPS = 20  # of a worker, which are measured


@contextlib.contextmanager
def telling(path: str | None, what: str) -> Iterator[None]:
    """Tells the file that `what` is built inside; None tells nobody. Lines of several processes do not mix: they are short."""
    tell(path, f"begun {what}")
    yield
    tell(path, "done")


def tell(path: str | None, line: str) -> None:
    if path is not None:
        with contextlib.suppress(OSError), open(path, "a") as file:  # a full disk must not end a run for a bar
            file.write(f"{line}\n")


class BuildingBar:
    """A bar over the simulators that workers build during a wait; nothing where none is built.

    Args:
        shown: False: no bar, but still the line of the log when it is over.
    """

    def __init__(self, shown: bool):
        self.shown = shown
        handle, self.path = tempfile.mkstemp(prefix="vla_rl_building_")
        os.close(handle)
        self.close = weakref.finalize(
            self, Path(self.path).unlink, missing_ok=True
        )  # also at the exit of a process that did not close
        self.read = 0  # how much of the file
        self.bar: tqdm | None = None
        self.begun: list[str] = []
        self.since = 0.0

    def update(self) -> None:
        """Reads what the workers have told since the last time."""
        lines = ""
        with contextlib.suppress(OSError), open(self.path) as file:  # long runs outlive files in a temporary folder
            file.seek(self.read)
            lines = file.read()
            self.read = file.tell()
        for line in lines.splitlines():
            word, _, what = line.partition(" ")
            if word == "begun":
                self.begun.append(what)
                if self.bar is None:
                    self.since = time.perf_counter()
                    self.bar = tqdm(
                        desc="building simulators", unit="sim", disable=None if self.shown else True, leave=False
                    )
                self.bar.total = len(self.begun)
                self.bar.set_postfix_str(what)
            elif self.bar is not None:
                self.bar.update()
        if self.bar is not None:
            self.bar.refresh()  # its clock

    def finish(self) -> None:
        """The wait is over."""
        self.update()
        if self.bar is None:
            return
        self.bar.close()
        seconds = time.perf_counter() - self.since
        if seconds > QUIET_S:
            log.info("built %d simulators in %.0f s: %s", len(self.begun), seconds, ", ".join(sorted(set(self.begun))))
        self.bar, self.begun = None, []


# the phase


class Doing:
    """What this process does at present, in memory that its parent reads when it hangs or is dead: `with doing("step", 3):`."""

    def __init__(self) -> None:
        self.row = np.zeros(5, np.int64)  # a worker's own is its parent's, too

    @contextlib.contextmanager
    def __call__(self, phase: str, who: int | None = None) -> Iterator[None]:
        """An error leaves it as it is, so that the phase in which it was raised can be told."""
        before, start = self.row[[PHASE, WHO]], time.perf_counter()
        self.change(PHASES.index(phase), before[1] if who is None else who)
        yield
        self.change(*before)
        if phase == "step" and self.row[STEPS] < FIRST_STEPS:
            self.row[SLOWEST_US] = max(self.row[SLOWEST_US], (time.perf_counter() - start) * 1e6)
            self.row[STEPS] += 1

    def change(self, phase: int, who: int) -> None:
        self.row[[PHASE, WHO]] = phase, who
        self.row[CHANGES] += 1


doing = Doing()


def rows_of(memory: Any) -> np.ndarray:
    """int64 [W, 5]."""
    return np.frombuffer(memory, np.int64).reshape(-1, 5)
