"""Worker processes: whatever becomes of one is noticed, told, and mended; an error arrives in its own words."""

import ctypes
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing.sharedctypes import RawArray
from pathlib import Path

import pytest

from tests.simulation.tasks import ERRORS, Task, Unbuilt, wait_until_gone
from vla_rl.run.failures import explain
from vla_rl.run.settings import ConfigError
from vla_rl.simulation import worker_processes
from vla_rl.simulation.worker import WorkerError
from vla_rl.simulation.worker_processes import Fault, Patience, WorkerProcesses
from vla_rl.types import RenderingError, SimulatorDied

ROOT = Path(__file__).parents[2]
QUICK = Patience(step_s=0.6, build_s=30, replacements=2)


@pytest.fixture
def two():
    workers = WorkerProcesses([Task, Task], QUICK)
    yield workers
    workers.close()


def ask_both(workers, method, *arguments):
    for worker in range(2):
        workers.ask(worker, method, *arguments)
    return workers.wait()


@pytest.mark.parametrize("name", ERRORS)
def test_a_workers_error_arrives_in_its_own_words(name):
    build, kind, text = ERRORS[name]
    try:
        raise build()
    except Exception as raised:
        error = pickle.loads(pickle.dumps(WorkerError.of(raised))).exception("worker 0")  # as through a pipe
    assert type(error) is kind and text in str(error)
    assert error.__notes__[-1].startswith("In worker 0:\nTraceback (most recent call last)")


@pytest.mark.parametrize(
    "name", ["end", pytest.param("no pickle", marks=pytest.mark.slow)]
)  # the first is not to be taken for a dead worker
def test_an_error_of_a_worker_that_is_not_replaced_is_raised_here(name):
    workers = WorkerProcesses([Task], Patience(replacements=0))
    workers.ask(0, "fail", name)
    with pytest.raises(ERRORS[name][1]) as caught:
        workers.wait()
    assert caught.value.__notes__[-1].startswith("In simulator worker 0:\nTraceback")
    assert "in fail" in caught.value.__notes__[-1] and workers.closed and not workers.processes[0].is_alive()


def test_what_is_raised_while_a_worker_is_made_is_raised_here_and_tried_once():
    workers = WorkerProcesses([Unbuilt], Patience(replacements=5))
    workers.ask(0, "pid")
    with pytest.raises(ValueError, match="100% of"):
        workers.wait()
    assert workers.closed


def test_they_answer_and_write_into_shared_memory_and_large_answers_arrive(two):
    assert ask_both(two, "add", 2, 3) == {0: 5, 1: 5}
    pids = ask_both(two, "pid")
    assert list(pids.values()) == [process.pid for process in two.processes]
    assert {len(answer) for answer in ask_both(two, "large", 30).values()} == {30 * 2**20}
    memory = RawArray(ctypes.c_ubyte, 4)
    with_memory = WorkerProcesses([Task], memory=(memory,))
    with_memory.ask(0, "fill", 9)
    assert with_memory.wait() == {0: None} and list(memory) == [9] * 4
    with_memory.close()
    with_memory.close()  # again does nothing


@pytest.mark.parametrize(
    ("method", "arguments", "phase", "words"),
    [
        ("die", ("render", signal.SIGKILL), "render", "died (SIGKILL; often out of memory)"),
        pytest.param("die", ("step", signal.SIGSEGV), "step", "died (SIGSEGV", marks=pytest.mark.slow),
        pytest.param("die", ("reset", None), "reset", "died (exit code 3", marks=pytest.mark.slow),
        ("hang", ("step",), "step", "hung for 1 s"),
        ("fail", ("words",), "step", "raised ValueError: 100% of"),
    ],
)
def test_one_that_dies_hangs_or_raises_is_told_and_replaced_beside_one_that_works(
    two, caplog, method, arguments, phase, words
):
    before = ask_both(two, "pid")
    two.ask(0, "add", 1, 1)
    two.ask(1, method, *arguments)
    start = time.monotonic()
    answers = two.wait()
    assert answers[0] == 2 and answers[1] == Fault(1, phase, 3 if method == "fail" else 7)
    assert time.monotonic() - start < 20
    after = ask_both(two, "pid")
    assert after[0] == before[0] and after[1] != before[1] and wait_until_gone([before[1]]) == []
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert line.startswith("simulator worker 1 ") and words in line
    assert (
        f"(process {before[1]}, 0." in line
        and "GB resident" in line
        and f"in {phase}; replaced, 1 of 2 in a row" in line
    )
    if method == "fail" or arguments[-1] == signal.SIGSEGV or method == "hang":
        assert "tasks.py" in line and f"in {method}" in line  # its own stack


def test_a_stopped_one_is_noticed_whatever_it_was_told_and_tells_where_it_was(two, caplog):
    pids = ask_both(two, "pid")
    os.kill(pids[0], signal.SIGSTOP)
    assert ask_both(two, "add", 1, 2) == {0: Fault(0, "wait", -1), 1: 3}
    assert "hung for 1 s" in caplog.text and "in run_worker" in caplog.text
    assert wait_until_gone([pids[0]]) == [] and ask_both(two, "add", 1, 2) == {0: 3, 1: 3}


@pytest.mark.slow
def test_one_that_goes_on_is_given_time_and_a_build_more_than_a_step(two):
    assert ask_both(two, "busy", 2.0) == {0: None, 1: None}
    slow = WorkerProcesses([Task], Patience(step_s=0.1, build_s=1.5))
    slow.ask(0, "hang", "build")
    start = time.monotonic()
    assert slow.wait() == {0: Fault(0, "build", 7)} and time.monotonic() - start > 1.5
    slow.close()


def test_the_default_for_a_step_is_measured_in_the_first_ones(monkeypatch):
    workers = WorkerProcesses([Task], Patience(build_s=111))
    assert workers._limit("step") == workers._limit("build") == 111  # nothing is known yet
    workers.ask(0, "busy", 2.5)
    workers.wait()
    assert workers._limit("step") == 60 and workers._limit("reset") == 111  # 20 x 0.1 s is less
    workers.close()
    monkeypatch.setattr(worker_processes, "LEAST_STEP_S", 1)
    workers.step_s = None
    assert workers._limit("step") == pytest.approx(20 * 0.1, rel=0.5)


@pytest.mark.parametrize(
    ("method", "arguments", "kind"), [("fail", ("words",), ValueError), ("die", ("step", None), SimulatorDied)]
)
def test_too_many_in_a_row_end_all_with_the_cause(method, arguments, kind, caplog):
    workers = WorkerProcesses([Task, Task], Patience(replacements=1))
    pids = ask_both(workers, "pid")
    for _ in range(2):  # an episode that ends between two faults makes the second one the first in a row
        workers.ask(1, method, *arguments)
        assert workers.wait() == {1: Fault(1, "step", 3 if method == "fail" else 7)}
        workers.episode_ended(1)
    for last in (False, True):
        workers.ask(1, method, *arguments)
        if not last:
            workers.wait()
            continue
        with pytest.raises(
            kind, match="100% of" if kind is ValueError else "exit code 3.*replaced again.*worker_replacements=1"
        ):
            workers.wait()
    assert workers.closed and wait_until_gone(pids.values()) == []


def test_what_another_process_would_raise_too_is_raised_at_once():
    workers = WorkerProcesses([Task], QUICK)
    workers.ask(0, "fail", "rendering")
    with pytest.raises(RenderingError):
        workers.wait()


def test_one_that_died_while_nothing_was_asked_is_replaced(two):
    pids = ask_both(two, "pid")
    os.kill(pids[1], signal.SIGKILL)
    two.processes[1].join()
    assert two.replace_dead() == [Fault(1, "wait", -1)] and two.replace_dead() == []
    assert ask_both(two, "add", 1, 1) == {0: 2, 1: 2}
    os.kill(two.processes[0].pid, signal.SIGKILL)  # or as soon as something is asked
    assert ask_both(two, "add", 1, 1) == {0: Fault(0, "wait", -1), 1: 2}


def test_a_wait_can_be_left_and_the_close_after_it_does_not_wait(two):
    """As a stop that was asked for while a worker is stopped."""
    pids = ask_both(two, "pid")
    os.kill(pids[0], signal.SIGSTOP)

    def leave():
        raise KeyboardInterrupt

    two.on_wait, two.step_s = leave, 60
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask_both(two, "add", 1, 1)
    two.close()
    assert time.monotonic() - start < 5 and wait_until_gone(pids.values()) == []


@pytest.mark.parametrize(
    "ends",
    [
        ["os.kill(os.getpid(), signal.SIGKILL)"],
        pytest.param(["sys.exit()", "raise KeyError"], marks=pytest.mark.slow),
    ],
)
def test_they_end_with_their_parent_however_it_ends_and_leave_nothing(ends):
    """No process, nothing in /dev/shm, no word: of resource trackers, of pipes."""
    script = textwrap.dedent(
        """
        import os, signal, sys, time
        from tests.simulation.tasks import Task
        from vla_rl.simulation.worker_processes import WorkerProcesses
        workers = WorkerProcesses([Task, Task, Task])
        for worker in range(3):
            workers.ask(worker, "pid")
        print(*workers.wait().values(), flush=True)
        workers.ask(0, "busy", 60)
        os.kill(workers.processes[1].pid, signal.SIGSTOP)
        {end}
        """
    )
    shared = set(os.listdir("/dev/shm"))
    for end in ends:
        process = subprocess.run(
            [sys.executable, "-c", script.format(end=end)], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        pids = list(map(int, process.stdout.split()))
        assert len(pids) == 3 and wait_until_gone(pids) == []
        said = process.stderr.splitlines()
        assert said == [] or (end == "raise KeyError" and said[0].startswith("Traceback") and said[-1] == "KeyError")
    assert set(os.listdir("/dev/shm")) <= shared


@pytest.mark.parametrize("name", ["config", "rendering", "disk"])
def test_what_is_told_in_one_line_is_told_so_from_a_worker_too(monkeypatch, name):
    build, _, _ = ERRORS[name]
    error = WorkerError.of(build()).exception("worker 0")
    assert type(error) is type(build()) and explain(error) == explain(build())
    assert isinstance(error, ConfigError) or explain(error)


def test_a_class_that_this_process_has_not_imported_is_named_and_not_imported():
    told = WorkerError(
        pickled=b"not looked at", module="robosuite.utils.no", kind="RandomizationError", message="%", trace=""
    )
    assert repr(told.exception("x")) == "RuntimeError('RandomizationError: %')"
