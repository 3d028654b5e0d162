"""A file or folder that is there whole or not at all, whatever ends the writing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
