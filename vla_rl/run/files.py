"""A file or folder that is there whole or not at all, whatever ends the writing; lines that wait for a disk."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to; renamed to it at the end, removed where the writing failed."""
    unfinished = path.with_name(f".{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        with suppress(OSError):  # nothing torn stays
            unfinished.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to fill; renamed to it, which must not be there, at the end, removed where that failed."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """The file has the old text or the new one, at any time."""
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


class Outage:
    """What cannot be written for a while, a disk being full, read-only or gone, ends no run: it is said once, and once more when
    it is written again.

    Args:
        what: is written, in the plural.
        meanwhile: what becomes of it.

    Attributes:
        failing: whether the last attempt failed.
    """

    def __init__(self, what: str, meanwhile: str):
        self.what, self.meanwhile = what, meanwhile
        self.failing = False

    def survive(self, write: Callable[[], T]) -> T | None:
        """What `write` returns; None where it raised an OSError."""
        try:
            written = write()
        except OSError as error:
            if not self.failing:
                log.warning("%s cannot be written (%s): %s", self.what, error.strerror or error, self.meanwhile)
            self.failing = True
            return None
        if self.failing:
            log.warning("%s are written again", self.what)
        self.failing = False
        return written


class Lines:
    """Lines at the end of a file, on the disk as soon as they are written. Those that cannot be wait in memory, and are written in
    their order before the next one, none twice.

    Args:
        path: of the file, which the first line makes, in a folder that is there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []
        self._whole: int | None = None  # bytes of the file before an attempt that failed, which may have left a part

    def append(self, line: str) -> None:
        """Takes a line; `write` writes it."""
        self.waiting.append(line)

    def write(self) -> None:
        """Writes what waits.

        Raises:
            OSError: it cannot; it waits on.
        """
        if not self.waiting:
            return
        with self.path.open("ab") as file:
            if self._whole is not None and file.tell() > self._whole:
                file.truncate(self._whole)
                file.seek(0, os.SEEK_END)
            self._whole = file.tell()
            file.write("".join(f"{line}\n" for line in self.waiting).encode())
            file.flush()
            os.fsync(file.fileno())
        self.waiting.clear()
        self._whole = None
