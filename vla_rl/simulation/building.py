"""What workers build, shown while the main process waits for them: seconds a simulator, and more at a process's first.

Workers write a line to a file as they begin one and as it is done; the main process reads on while it waits.
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

from tqdm import tqdm

log = logging.getLogger(__name__)

QUIET_S = 1.0  # a wait shorter than this is not worth a line


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
