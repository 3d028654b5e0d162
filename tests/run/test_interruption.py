"""A first signal ends a command between two steps, a second one at once; handlers are put back."""

import os
import signal

import pytest

from vla_rl.run.interruption import Stop, Stopped
from vla_rl.types import SimulatorDied


def test_a_first_signal_asks_and_a_second_one_interrupts():
    stop, before = Stop(), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop.on_signals():
        stop()  # nothing was asked
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            stop()
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_simulators_that_a_signal_ended_are_no_failure():
    stop = Stop()
    with pytest.raises(SimulatorDied), stop.on_signals():
        raise SimulatorDied("killed")
    stop.asked = True
    with pytest.raises(Stopped), stop.on_signals():
        raise SimulatorDied("killed")


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Stop().on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
