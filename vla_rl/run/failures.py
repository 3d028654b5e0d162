"""What to tell a user of a failure that is not a bug of ours; the command lines end with it instead of a stack."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from vla_rl.run.machine import who

log = logging.getLogger(__name__)


def report(error: Exception) -> int:
    """Prints what `explain` says and returns the exit status 1; an error that may be a bug goes on, with its stack."""
    hint = explain(error)
    if hint is None:
        raise error
    say(f"{who()}error: {hint}", sys.stderr)
    return 1


def explain(error: Exception) -> str | None:
    """What happened and the way out; None if it may be a bug."""

    from vla_rl.types import (
        InvariantError,
        NonFiniteError,
        NoSignal,
        OutOfMemory,
        ProcessLost,
        RenderingError,
        SimulatorDied,
    )

    ours = (InvariantError, NonFiniteError, NoSignal, OutOfMemory, ProcessLost, RenderingError, SimulatorDied)

    if is_out_of_memory(error):
        return (
            f"{str(error).splitlines()[0]} Lower the micro_batch_size (the result is the same), or set "
            "policy.gradient_checkpointing=full."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error}). Make room, then --resume the run if it has begun, or start it again."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error}: the place that is written to must be writable."
    if isinstance(error, ImportError) and not (error.name or "").startswith("vla_rl"):
        return str(error)  # of a package that is missing or broken
    if isinstance(error, ours):
        return str(error)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory ran out, also while a kernel was compiled or loaded, of which other exceptions tell.

    Not if a simulator died, which guesses at the host's memory, nor if it was said already.
    """
    import torch

    from vla_rl.types import OutOfMemory, SimulatorDied

    said = ("out of memory", "OutOfMemoryError", "CUBLAS_STATUS_ALLOC_FAILED")
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    return isinstance(error, torch.OutOfMemoryError) or (told and not isinstance(error, (OutOfMemory, SimulatorDied)))


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints to stdout or the stream. Once nothing reads it any more (`| head`, a `tee` that got the same signal) it shows nothing
    from then on, and the work and its exit status stay as they are."""
    stream = sys.stdout if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def one_line(error: BaseException | str, most: int = 300) -> str:
    """What an error says, on one line of a log and at most so many characters; its kind if it says nothing."""
    said = " ".join(str(error).split()) or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in said)[:most]


def warn_of_failure(said: str, action: Callable[..., None], *arguments: Any) -> None:
    """metrics.jsonl has what counts: no failure of the rest ends a run."""
    try:
        action(*arguments)
    except Exception as error:
        log.warning("%s: %s", said, one_line(error))
