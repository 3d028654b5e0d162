"""Signals that ask a command to end: SIGTERM, SIGUSR1 and SIGHUP of a scheduler or a closed terminal, Ctrl-C.

The first one asks. A command that has nothing to save ends where it is; one that trains or plays ends at its next step, saved. It
is over within the grace time whatever hangs: a thread, which needs no step of the program, then saves in its place and ends the
process. A second one ends at once.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# EX_TEMPFAIL of sysexits.h, "try again": what requeueing schedulers are told with (RequeueExit of Slurm, podFailurePolicy of
# Kubernetes); neither 0, nor a failure (1, 2), nor 128 + a signal's number
STOPPED = 75
SAME_REQUEST_S = 1.0  # a scheduler signals all processes, and its launcher passes the signal on once more
GRACE_S = 30.0  # of run.grace_s; also what torchrun waits for its processes


class Stopped(KeyboardInterrupt):
    """Somebody asked for an end."""


class Stop:
    """What signals ask of this process.

    Attributes:
        asked: whether there was one.
        grace_s: seconds from then on until the process is ended, saved or not.
    """

    def __init__(self, grace_s: float = GRACE_S):
        self.grace_s = grace_s
        self.asked = False
        self._ask: Callable[[], None] | None = None  # None: a signal ends the program where it is
        self._save: Callable[[], Any] | None = None

    def __call__(self) -> None:
        """Before a step: raises Stopped if an end was asked for."""
        if self.asked:
            raise Stopped

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Obeys them inside; those that are ignored (nohup) stay so.

        Raises:
            Stopped: one came, where the program was or, in `at_steps`, at a step of it; also where simulators or processes of
                the run ended, which a signal to all of them does.
        """
        from vla_rl.types import ProcessLost, SimulatorDied  # numpy: not before stop_while_importing

        if threading.current_thread() is not threading.main_thread():  # which alone gets signals
            yield
            return
        names = [name for name in SIGNALS if signal.getsignal(name) != signal.SIG_IGN]
        start_tracker()
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        before = {name: signal.signal(name, self._handle) for name in names}
        fd_before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        watch = threading.Thread(target=self._watch, args=(told,), daemon=True, name="stop")
        watch.start()
        try:
            yield
        except (SimulatorDied, ProcessLost) as error:
            if self.asked:
                raise Stopped from error
            raise
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)
            signal.set_wakeup_fd(fd_before)
            os.close(tell)  # ends the thread
            watch.join()
            os.close(told)

    @contextmanager
    def at_steps(self, ask: Callable[[], None] = lambda: None, save: Callable[[], Any] | None = None) -> Iterator[None]:
        """Inside, a signal does not end the program where it is: the block does, at a step of its own.

        Args:
            ask: called in the signal's place, and then the block has to end itself; default: it asks `stop()` before each step.
            save: called from another thread where it has not ended after half of the grace time: writes what was last known to
                be sound, and may be called while the block does, too.
        """
        before = self._ask, self._save
        self._ask, self._save = ask, save
        try:
            yield
        finally:
            self._ask, self._save = before

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            return  # the thread tells whether it is another request
        self.asked = True
        if self._ask is None:
            raise Stopped
        self._ask()

    def _watch(self, told: int) -> None:
        """Ends the process: when the grace time is over, or at a second signal. Python's handlers may wait for ever, for a
        library's call; what the signal writes into the pipe is read here at once."""
        begun, saving = 0.0, False
        while True:
            left = (begun + self.grace_s * (1.0 if saving else 0.5) - time.monotonic()) if begun else None
            if select.select([told], [], [], None if left is None else max(0.0, left))[0]:
                numbers = os.read(told, 64)
                if not numbers:
                    return
                name = next((signal.Signals(number).name for number in numbers if number in SIGNALS), None)
                if name is None:
                    continue
                if not begun:
                    begun = time.monotonic()
                    log.warning("%s: stopping, within %g s; once more to stop at once", name, self.grace_s)
                elif time.monotonic() - begun > SAME_REQUEST_S:
                    end_now(128 + signal.Signals[name], f"{name}: ended at once")
            elif not saving:
                saving = True
                if self._save is not None:
                    threading.Thread(target=self._save_in_its_place, daemon=True).start()
            else:
                end_now(STOPPED, f"ended after {self.grace_s:g} s: what is saved is kept")

    def _save_in_its_place(self) -> None:
        try:
            saved = self._save()
        except Exception as error:
            log.error("cannot save: %s", error)
        else:
            log.warning("no step has ended for %g s: saved meanwhile in %s", self.grace_s / 2, saved)
            end_now(STOPPED, "stopped")


def start_tracker() -> None:
    """Of multiprocessing: the process that removes shared memory when this one has ended. Python has it ignore SIGINT and SIGTERM,
    but a signal to all processes may be another one."""
    before = {name: signal.signal(name, signal.SIG_IGN) for name in (signal.SIGUSR1, signal.SIGHUP)}
    try:
        resource_tracker.ensure_running()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def end_now(status: int, said: str) -> None:
    """Ends this process, and those that multiprocessing has started for it, without any more of the program."""
    with suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
    with suppress(Exception):
        print(said, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(status)


def stop_while_importing() -> None:
    """Until `Stop.on_signals`: a command that is still imported, which takes seconds, has nothing to save and ends in a line."""

    def handle(number: int, frame: Any) -> None:
        end_now(STOPPED, f"{signal.Signals(number).name}: stopped before anything was begun")

    for name in SIGNALS:
        if signal.getsignal(name) != signal.SIG_IGN:
            signal.signal(name, handle)
