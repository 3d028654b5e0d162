"""Demonstrations read by a process of its own: over some broken files the HDF5 library crashes, in others it loops for ever.

Not here: what is read and how it is checked (vla_rl.fine_tuning.demonstration_file). No torch.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from vla_rl.fine_tuning.demonstration_file import Demonstration, read_demonstrations
from vla_rl.run.settings import ConfigError
from vla_rl.simulation.worker import PARENTS_SIGNALS, WorkerError, end_with_parent
from vla_rl.simulation.worker_processes import kill_all, lean_workers

log = logging.getLogger(__name__)

LONGEST_S = (
    300.0  # to the first demonstration, before which all actions of a file are looked at, and from one to the next
)


class DemonstrationReader:
    """The process, which lives from the first file on. Use it with `with`.

    Args:
        longest_s: that it may be silent.
    """

    def __init__(self, longest_s: float = LONGEST_S):
        self.longest_s = longest_s
        self.process: Any = None
        self.pipe: Connection | None = None

    def read(
        self, path: Path, num_images: int, filter_no_ops: bool, instructions: Mapping[str, str]
    ) -> Iterator[Demonstration]:
        """As `read_demonstrations`; also a ConfigError where the library crashes or hangs."""
        if self.process is not None and not self.process.is_alive():
            self.close()
        if self.process is None:
            self.start()
        self.pipe.send((path, num_images, filter_no_ops, instructions))
        whole = False
        try:
            while not whole:
                kind, value = self.receive(path)
                if kind == "demonstration":
                    yield value
                elif kind == "log":
                    log.log(*value)
                elif kind == "error":
                    whole = True
                    raise value.exception("the reader of demonstrations")
                whole = kind == "end"
        finally:
            if not whole:
                self.close()

    def receive(self, path: Path) -> tuple[str, Any]:
        if not self.pipe.poll(self.longest_s):
            raise ConfigError(
                f"{path} is damaged, or its disk hangs: the HDF5 library has not come back from it in {self.longest_s:.0f} s; make "
                "or download it anew"
            )
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            if code == -signal.SIGKILL:
                raise ConfigError(
                    f"{path}: the process that reads it was killed (SIGKILL; often out of memory); give it more, or fewer files"
                ) from None
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise ConfigError(
                f"{path} is damaged: the process that reads it crashed in the HDF5 library ({how}); make or download it anew"
            ) from None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, its_pipe = context.Pipe()
        self.process = context.Process(target=answer, args=(its_pipe, os.getpid()), daemon=True)
        with lean_workers(draw_in_one_thread=False):
            self.process.start()
        its_pipe.close()
        # before multiprocessing's own end of daemons, whose SIGTERM it ignores
        self.end = Finalize(self, kill_all, ([self.process],), exitpriority=10)

    def close(self) -> None:
        if self.process is not None:
            self.end()
            self.pipe.close()
            self.process = None

    def __enter__(self) -> DemonstrationReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ToPipe(logging.Handler):
    def __init__(self, pipe: Connection):
        super().__init__()
        self.pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self.pipe.send(("log", (record.levelno, "%s", record.getMessage())))


def answer(pipe: Connection, parent: int) -> None:
    """The process: sends the demonstrations of each file that it is told, and what is logged of it, then "end" or "error"."""
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
    logging.getLogger().addHandler(ToPipe(pipe))
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        try:
            for demonstration in read_demonstrations(*arguments):
                pipe.send(("demonstration", demonstration))
        except Exception as error:
            pipe.send(("error", WorkerError.of(error)))
        else:
            pipe.send(("end", None))
