"""Ctrl-C, a cluster's SIGTERM and a closed terminal, for a command that ends between two of its steps."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vla_rl.types import SimulatorDied

log = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """Somebody asked for an end, which came between two steps."""


class Stop:
    """A first signal ends the evaluation before its next decision, a second one at once."""

    asked = False

    def __call__(self) -> None:
        if self.asked:
            raise Stopped

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        def handle(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            log.warning("%s: stopping; once more to stop at once", signal.Signals(number).name)
            self.asked = True

        names = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        before = {name: signal.signal(name, handle) for name in names}
        try:
            yield
        except SimulatorDied as error:  # a signal to the whole process group ends the simulators too
            if self.asked:
                raise Stopped from error
            raise
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)
