"""A first signal ends a command between two steps, a second one at once, and the grace time whatever hangs."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vla_rl.run.command_line import ROOT
from vla_rl.run.interruption import SIGNALS, STOPPED, Stop, Stopped
from vla_rl.types import ProcessLost, SimulatorDied


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_is_to_be_saved_it_ends_where_it_is(number, caplog):
    stop, before = Stop(), signal.getsignal(number)
    with pytest.raises(Stopped), stop.on_signals():
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("it went on")
    assert signal.getsignal(number) == before and stop.asked
    assert f"{number.name}: stopping, within 30 s; once more to stop at once" in caplog.text


def test_at_steps_the_first_one_asks_and_the_same_request_twice_is_one():
    """torchrun and srun pass on what their processes have got already."""
    stop, asked = Stop(), []
    with stop.on_signals(), stop.at_steps(ask=lambda: asked.append(1)):
        stop()  # nothing was asked
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert asked == [1]
        with pytest.raises(Stopped):
            stop()


@pytest.mark.parametrize("error", [SimulatorDied("killed"), ProcessLost("killed")])
def test_what_a_signal_to_all_processes_ended_is_no_failure(error):
    stop = Stop()
    with pytest.raises(type(error)), stop.on_signals():
        raise error
    stop.asked = True
    with pytest.raises(Stopped), stop.on_signals():
        raise error


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Stop().on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


# a program that hangs where no step ends; it says "ready", and "saved" where it saves
HANGS = """
    import sys, time
    from vla_rl.run.interruption import Stop

    def save():
        print("saved", flush=True)
        return "RUN"

    stop = Stop(grace_s={grace_s})
    with stop.on_signals(), stop.at_steps(save={save}):
        print("ready", flush=True)
        while True:
            time.sleep(60)
"""


def end_of_program(code: str, *signals: signal.Signals, apart_s: float = 1.2) -> tuple[int, str, float]:
    """Exit status, what it said, and seconds from the first signal on."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        begun = time.monotonic()
        for number in signals:
            if number is not signals[0]:
                time.sleep(apart_s)
            process.send_signal(number)
        said = process.stdout.read()
        return process.wait(), said, time.monotonic() - begun


def test_what_hangs_is_saved_and_ended_within_the_grace_time():
    status, said, seconds = end_of_program(HANGS.format(grace_s=1, save="save"), signal.SIGTERM)
    assert status == STOPPED and "saved\n" in said and "saved meanwhile in RUN" in said and 0.4 < seconds < 10


def test_a_save_that_takes_longer_than_the_grace_time_is_not_waited_for():
    status, said, seconds = end_of_program(HANGS.format(grace_s=1, save="lambda: time.sleep(60)"), signal.SIGUSR1)
    assert status == STOPPED and "ended after 1 s: what is saved is kept" in said and seconds < 10


def test_a_second_signal_ends_at_once_whatever_hangs():
    status, said, _ = end_of_program(HANGS.format(grace_s=60, save="save"), signal.SIGTERM, signal.SIGINT)
    assert status == 128 + signal.SIGINT and "SIGINT: ended at once" in said and "saved" not in said


def test_a_signal_to_all_processes_leaves_the_one_that_removes_shared_memory():
    status, said, _ = end_of_program(
        """
        import os, signal, time
        from multiprocessing import resource_tracker
        from vla_rl.run.interruption import Stop, Stopped

        with Stop().on_signals(), Stop().at_steps():
            try:
                print("ready", flush=True)
                time.sleep(60)
            except Stopped:
                tracker = resource_tracker._resource_tracker._pid
                for number in (signal.SIGUSR1, signal.SIGHUP):
                    os.kill(tracker, number)
                time.sleep(0.2)
                print(open(f"/proc/{tracker}/stat").read().split()[2])
        """,
        signal.SIGUSR1,
    )
    assert status == 0 and said.splitlines()[-1] in "SR", said  # sleeping or running, no zombie


def test_a_command_that_is_still_imported_ends_in_a_line():
    process = subprocess.Popen([sys.executable, "-m", "vla_rl.sft"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while b"numpy" not in Path(f"/proc/{process.pid}/maps").read_bytes():  # it imports what it needs, torch before all
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (STOPPED, "SIGINT: stopped before anything was begun\n")
