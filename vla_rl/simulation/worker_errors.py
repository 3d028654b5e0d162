"""An error of a worker process, brought to the main process in its own words and, where that can be, of its own class.

Not every exception can be pickled, and not every one that can be is built again from that; to unpickle one imports its
module, here perhaps robosuite with numba and OpenGL. Both are looked after here.
"""

from __future__ import annotations

import pickle
import sys
import traceback
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerError:
    """What a worker tells of an error; holds nothing but texts and bytes, so it always arrives."""

    pickled: bytes | None  # None where the exception would not come out as it went in
    module: str  # of its class
    kind: str  # the class's name
    message: str
    trace: str  # the traceback, as Python prints it

    @classmethod
    def of(cls, error: BaseException) -> WorkerError:
        kind = type(error)
        try:
            message = str(error)
        except Exception:  # of a __str__ of anybody's
            message = "(its message cannot be read)"
        try:
            pickled = pickle.dumps(error)
            copy = pickle.loads(pickled)  # our own bytes
            if type(copy) is not kind or str(copy) != message:
                pickled = None
        except Exception:  # of anybody's __reduce__ or __init__
            pickled = None
        trace = "".join(traceback.format_exception(error))
        return cls(pickled, kind.__module__, kind.__qualname__, message, trace)

    def exception(self, worker: str) -> BaseException:
        """The exception, with the worker's traceback as a note; a RuntimeError that names it where this process lacks it.

        Args:
            worker: which one, for the note.
        """
        error = RuntimeError(f"{self.kind}: {self.message}")
        if self.pickled is not None and self.module in sys.modules:
            try:
                error = pickle.loads(self.pickled)  # of our own worker
            except Exception as broken:
                error.add_note(f"it could not be built again: {type(broken).__name__}: {broken}")
        error.add_note(f"In {worker}:\n{self.trace}")
        return error
