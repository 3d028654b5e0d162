"""What worker processes do in tests, in a module of its own: they import it, and nothing heavy with it."""

import errno
import os
import time

import numpy as np

from vla_rl.run.settings import ConfigError
from vla_rl.simulation.building import doing
from vla_rl.types import RenderingError

WORDS = "100% of {x} %s %d %(no)s é 雪 \\n\nand a second line"


class TwoArguments(Exception):
    """Is pickled, and fails to be built again."""

    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")


class NoPickle(Exception):
    def __reduce__(self):
        raise TypeError("cannot be pickled")


def local_error():
    class Local(Exception):
        pass

    return Local(WORDS)


def nested_error():
    try:
        raise KeyError("100%")
    except KeyError as error:
        chained = ValueError(WORDS)
        chained.__cause__ = error
        return chained


ERRORS = {  # what a worker raises -> class and text that arrive
    "words": (lambda: ValueError(WORDS), ValueError, WORDS),
    "config": (lambda: ConfigError(WORDS), ConfigError, WORDS),
    "rendering": (lambda: RenderingError(WORDS), RenderingError, WORDS),
    "disk": (lambda: OSError(errno.ENOSPC, "No space left on 100%"), OSError, "[Errno 28] No space left on 100%"),
    "text": (lambda: UnicodeDecodeError("utf-8", b"%", 0, 1, "50%"), UnicodeDecodeError, "50%"),
    "end": (lambda: EOFError("100% of a file"), EOFError, "100% of a file"),  # not to be taken for a dead worker
    "connection": (lambda: ConnectionResetError("%s"), ConnectionResetError, "%s"),
    "chained": (nested_error, ValueError, WORDS),
    "empty": (AssertionError, AssertionError, ""),
    "two arguments": (lambda: TwoArguments("50%", "{y}"), RuntimeError, "TwoArguments: 50% at {y}"),
    "no pickle": (lambda: NoPickle("%d"), RuntimeError, "NoPickle: %d"),
    "local": (local_error, RuntimeError, WORDS),
}


class Task:
    """What a worker does in these tests."""

    def __init__(self, memory=None):
        self.memory = memory

    def pid(self):
        return os.getpid()

    def add(self, a, b):
        return a + b

    def fill(self, value):
        self.memory[:] = [value] * len(self.memory)

    def hang(self, phase):
        with doing(phase, 7):
            time.sleep(60)

    def die(self, phase, how):
        with doing(phase, 7):
            os.kill(os.getpid(), how) if how else os._exit(3)

    def fail(self, name):
        with doing("step", 3):
            raise ERRORS[name][0]()

    def busy(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with doing("step"):
                time.sleep(0.1)

    def large(self, megabytes):
        return np.ones(megabytes * 2**20, np.uint8)


class Unbuilt:
    def __init__(self):
        raise ERRORS["words"][0]()


def wait_until_gone(pids, timeout_s=10):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.05)
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
