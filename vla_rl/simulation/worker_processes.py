"""Processes that work for this one: asked, waited for within a deadline, and replaced where one dies, hangs or raises.

gymnasium's and Python's own pools wait without end for a worker that hangs, replace none, and leave semaphores behind when the
main process is killed; so only their parts are used here. A worker is any object; what it does is handed in
(vla_rl.simulation.worker, vla_rl.demonstrations). It ends with its parent, however that ends, and signals to the whole process
group are the parent's to handle. No torch.

W workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import pickle
import select
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawArray
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
from gymnasium.vector.utils import CloudpickleWrapper

from vla_rl.run.settings import ConfigError
from vla_rl.simulation.building import CHANGES, FIRST_STEPS, LONG, PHASE, PHASES, SLOWEST_US, STEPS, WHO, rows_of
from vla_rl.simulation.worker import LENGTH, STACK_SIGNAL, WorkerError, run_worker
from vla_rl.types import RenderingError, SimulatorDied

log = logging.getLogger(__name__)

SLICE_S = 0.5  # of a wait: signals are handled, and what hangs is looked for, as often
CLOSE_S = 2.0  # for a worker that is asked to end; then it is killed
STACK_S = 2.0  # for a worker that hangs to write where it is
KILLED_S = 10.0  # for a killed one to be gone: the kernel may hold it in a driver
FACTOR, LEAST_STEP_S = 20, 60.0  # see Patience.step_s
INCURABLE = (ImportError, RenderingError, ConfigError)  # another process would raise it, too


@dataclass(frozen=True)
class Patience:
    """How long a worker may take, and how often it is replaced.

    Args:
        step_s: seconds of one step or picture of one environment; None: FACTOR times the slowest of a worker's first FIRST_STEPS
            steps, but at least LEAST_STEP_S, and build_s until that is known.
        build_s: seconds of the start of a process, the build of a simulator, or a reset.
        replacements: of one worker in a row, with no episode of it that ended between them; one more raises.
    """

    step_s: float | None = None
    build_s: float = 300.0
    replacements: int = 5


@dataclass(frozen=True)
class Fault:
    """The answer of a worker that gave none: it has been replaced."""

    worker: int
    phase: str  # of vla_rl.simulation.building.PHASES
    who: int  # which of its environments; -1: none


class WorkerProcesses:
    """W workers. `ask` some, then `wait` for them; one that gives no answer gives a Fault and is another process from then on.

    Start and replace them in a thread that lives as long as they shall.

    Args:
        makers: of each, called in its process.
        memory: RawArrays, the arguments of the makers.
        name: of a worker, in messages.
        describe: what a Fault's worker was at, "step of libero_spatial task 3"; may be "".
        hint: why one may have been killed, and the way out.
        draw_in_one_thread: see lean_workers.

    Attributes:
        on_wait: called every SLICE_S of a wait; may raise, and then the workers can only be closed.
    """

    def __init__(
        self,
        makers: Sequence[Callable[..., Any]],
        patience: Patience | None = None,
        memory: tuple = (),
        name: str = "simulator worker",
        describe: Callable[[Fault], str] = lambda fault: fault.phase,
        hint: str = "often out of memory",
        draw_in_one_thread: bool = False,
    ):
        self.makers, self.patience, self.memory = list(makers), patience or Patience(), memory
        self.name, self.describe, self.hint, self.draw_in_one_thread = name, describe, hint, draw_in_one_thread
        self.context = multiprocessing.get_context("spawn")  # never fork: the parent has threads, CUDA, perhaps OpenGL
        count = len(self.makers)
        self.shared_rows = RawArray(ctypes.c_int64, 5 * count)
        self.rows = rows_of(self.shared_rows)
        self.processes: list[Any] = [None] * count
        self.pipes: list[Connection] = [None] * count
        self.stacks: list[Connection] = [None] * count
        self.received = [bytearray() for _ in range(count)]
        self.unsent = [memoryview(b"")] * count
        self.asked: set[int] = set()  # those that have not answered
        self.waited, self.seen = np.zeros(count), np.zeros(count, np.int64)  # seconds without a change, and the change
        self.resident = [0] * count  # most bytes, when it was looked at last
        self.in_a_row = [0] * count  # faults since an episode of it ended
        self.step_s = self.patience.step_s
        self.on_wait: Callable[[], None] = lambda: None
        self.closed = False
        # before multiprocessing's own end of daemons, whose SIGTERM they ignore
        self.finalize = Finalize(self, kill_all, (self.processes,), exitpriority=10)
        for worker in range(count):
            self._start(worker)

    def ask(self, worker: int, method: str, *arguments: Any) -> None:
        """Has it call a method of its object; `wait` gives what that returns."""
        assert worker not in self.asked, f"{self.name} {worker} was asked before it has answered"
        self._send(worker, method, arguments)
        self.asked.add(worker)
        self.waited[worker] = 0.0
        self._look_at_memory(worker)

    def wait(self, workers: Iterable[int] | None = None, first: bool = False) -> dict[int, Any]:
        """Their answers, worker -> what its method returned or a Fault.

        Args:
            workers: all that were asked without.
            first: as soon as there is one.

        Raises:
            SimulatorDied, or the worker's own error: it was replaced too often in a row, or a new one would raise it, too. All
                workers are ended.
        """
        waiting = set(self.asked if workers is None else workers)
        answers: dict[int, Any] = {}
        before = called = time.monotonic()
        while waiting and not (first and answers):
            moved = self._poll(waiting)
            now = time.monotonic()
            # of a stretch in which this process was stopped itself, only a part is counted
            passed, before = min(now - before, 2 * SLICE_S), now
            for worker in sorted(waiting):
                ended = worker in moved and self._receive(worker)
                message = self._message(worker)
                if message is not None:
                    self.asked.discard(worker)
                    good, answer = message
                    answers[worker] = answer if good else self._replace(worker, error=answer)
                elif ended:
                    answers[worker] = self._replace(worker)
                elif self._too_long(worker, passed, worker in moved):
                    answers[worker] = self._replace(worker, hung=True)
            waiting -= answers.keys()
            if now - called >= SLICE_S or not moved:
                self.on_wait()
                called = now
        return dict(sorted(answers.items()))

    def episode_ended(self, worker: int) -> None:
        """It works: its next fault is the first in a row."""
        self.in_a_row[worker] = 0

    def count_fault(self, worker: int, error: Exception) -> None:
        """One more in a row; raises the error, when all workers are ended, where they are too many."""
        self.in_a_row[worker] += 1
        if self.in_a_row[worker] > self.patience.replacements:
            self.close()
            raise error

    def replace_dead(self) -> list[Fault]:
        """Of those that are not asked, another process for each that has ended."""
        dead = [worker for worker, process in enumerate(self.processes) if process.exitcode is not None]
        return [self._replace(worker) for worker in dead if worker not in self.asked]

    def close(self) -> None:
        """Ends the workers within CLOSE_S; at once those that have not answered or still start."""
        if self.closed:
            return
        self.closed = True
        ending = set(np.flatnonzero(self.rows[:, PHASE] != PHASES.index("start")).tolist()) - self.asked
        for worker in ending:
            if not self.pipes[worker].closed:
                self._send(worker, None, ())
        deadline = time.monotonic() + CLOSE_S
        for worker in ending:
            self.processes[worker].join(max(0.0, deadline - time.monotonic()))
        self.finalize()
        for connection in (*self.pipes, *self.stacks):
            connection.close()

    # -------------------------------------------------------------------------------------------------------- processes

    def _start(self, worker: int) -> None:
        pipe, its_pipe = self.context.Pipe()
        stacks, its_stacks = self.context.Pipe(duplex=False)
        for connection in (pipe, stacks):
            os.set_blocking(connection.fileno(), False)
        self.rows[worker] = (0, -1, self.rows[worker, CHANGES] + 1, 0, 0)
        arguments = (CloudpickleWrapper(self.makers[worker]), self.memory, its_pipe, its_stacks, self.shared_rows)
        process = self.context.Process(
            target=run_worker,
            name=f"{self.name} {worker}",
            args=(*arguments, worker, os.getpid()),
            daemon=True,
        )
        with lean_workers(self.draw_in_one_thread):
            process.start()
        its_pipe.close()
        its_stacks.close()
        self.processes[worker], self.pipes[worker], self.stacks[worker] = process, pipe, stacks
        self.received[worker], self.unsent[worker] = bytearray(), memoryview(b"")
        self.resident[worker], self.waited[worker] = 0, 0.0

    def _replace(self, worker: int, error: WorkerError | None = None, hung: bool = False) -> Fault:
        """Ends the process, tells what has been, and starts another one."""
        self.asked.discard(worker)
        process, row = self.processes[worker], self.rows[worker]
        fault = Fault(worker, PHASES[row[PHASE]], int(row[WHO]))
        stack = self._ask_for_stack(worker) if hung else ""
        if error is not None:  # it ends by itself, with its OpenGL
            process.join(CLOSE_S)
        if process.exitcode is None:
            process.join(SLICE_S if not hung else 0)  # its pipe ends before it does
            process.kill()
            process.join(KILLED_S)
        stack += self._read_stack(worker)
        for connection in (self.pipes[worker], self.stacks[worker]):
            connection.close()
        if error is not None:
            what, raised = f"raised {error.kind}: {error.message}", error.exception(f"{self.name} {worker}")
            stack = f"\n{error.trace}"
        else:
            what = f"hung for {self.waited[worker]:.0f} s" if hung else self._describe_death(process.exitcode)
            stack = f" It was here:\n{stack}" if stack else " It told no stack." if hung else ""
            raised = None
        memory = f", {self.resident[worker] / 1e9:.1f} GB resident" if self.resident[worker] else ""
        text = f"{self.name} {worker} {what} (process {process.pid}{memory}) in {self.describe(fault)}"
        most = self.patience.replacements
        died = SimulatorDied(
            f"{text}; it is not replaced again, as none of its episodes has ended in {self.in_a_row[worker]} replacements in a "
            f"row (env.worker_replacements={most})"
            if most
            else text
        )
        if isinstance(raised, INCURABLE) or (raised is not None and fault.phase == "start"):
            self.close()
            raise raised
        if self.in_a_row[worker] >= most:
            log.error("%s.%s", text, stack)
        self.count_fault(worker, raised or died)
        log.warning("%s; replaced, %d of %d in a row.%s", text, self.in_a_row[worker], most, stack)
        self._start(worker)
        return fault

    def _describe_death(self, exitcode: int | None) -> str:
        if exitcode is None:
            return "does not end: the kernel holds it"
        cause = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
        return f"died ({cause}; {self.hint if cause == 'SIGKILL' else 'its own message is above'})"

    def _ask_for_stack(self, worker: int) -> str:
        """Of a living one; one that was stopped writes its own when it goes on."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[worker].pid, STACK_SIGNAL)
            os.kill(self.processes[worker].pid, signal.SIGCONT)
        if not select.select([self.stacks[worker]], [], [], STACK_S)[0]:
            return ""
        time.sleep(0.2)  # it writes line by line
        return self._read_stack(worker)

    def _read_stack(self, worker: int) -> str:
        text = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.stacks[worker].fileno(), 2**16):
                text += part
        return text.decode(errors="replace")

    def _look_at_memory(self, worker: int) -> None:
        with contextlib.suppress(OSError), open(f"/proc/{self.processes[worker].pid}/status") as file:
            peak = [line for line in file if line.startswith("VmHWM")]
            self.resident[worker] = int(peak[0].split()[1]) * 1024 if peak else self.resident[worker]

    # ------------------------------------------------------------------------------------------------------------- pipes

    def _send(self, worker: int, method: str | None, arguments: tuple) -> None:
        data = pickle.dumps((method, arguments))
        self.unsent[worker] = memoryview(LENGTH.pack(len(data)) + data)
        self._send_rest(worker)

    def _send_rest(self, worker: int) -> None:
        """As much as its pipe takes. Where it is dead, the wait will tell."""
        try:
            while self.unsent[worker]:
                sent = os.write(self.pipes[worker].fileno(), self.unsent[worker])
                self.unsent[worker] = self.unsent[worker][sent:]
        except BlockingIOError:
            pass
        except ConnectionError:
            self.unsent[worker] = memoryview(b"")

    def _poll(self, workers: set[int]) -> set[int]:
        """Those of which something has come or which have ended, after SLICE_S at most."""
        poll, of = select.poll(), {}
        for worker in workers:
            pipe, sentinel = self.pipes[worker].fileno(), self.processes[worker].sentinel
            poll.register(pipe, select.POLLIN | (select.POLLOUT if self.unsent[worker] else 0))
            poll.register(sentinel, select.POLLIN)
            of[pipe] = of[sentinel] = worker
        found = poll.poll(SLICE_S * 1000)
        for number, event in found:
            if event & select.POLLOUT:
                self._send_rest(of[number])
        return {of[number] for number, event in found if event & ~select.POLLOUT}

    def _receive(self, worker: int) -> bool:
        """Takes what has come; whether it was the last."""
        try:
            while part := os.read(self.pipes[worker].fileno(), 2**20):
                self.received[worker] += part
        except BlockingIOError:
            return not self.processes[worker].is_alive()
        except ConnectionError:
            pass
        return True

    def _message(self, worker: int) -> Any:
        """What a worker has written, if it is whole: (True, answer) or (False, WorkerError)."""
        received = self.received[worker]
        if len(received) < LENGTH.size:
            return None
        end = LENGTH.size + LENGTH.unpack_from(received)[0]
        if len(received) < end:
            return None
        message = pickle.loads(memoryview(received)[LENGTH.size : end])  # of our own worker
        self.received[worker] = received[end:]
        return message

    def _too_long(self, worker: int, passed: float, moved: bool) -> bool:
        changes = self.rows[worker, CHANGES]
        if moved or changes != self.seen[worker]:
            self.seen[worker], self.waited[worker] = changes, 0.0
            return False
        self.waited[worker] += passed
        self._look_at_memory(worker)
        return self.waited[worker] > self._limit(PHASES[self.rows[worker, PHASE]])

    def _limit(self, phase: str) -> float:
        known = self.rows[self.rows[:, STEPS] >= FIRST_STEPS, SLOWEST_US]
        if self.step_s is None and len(known):
            self.step_s = max(LEAST_STEP_S, FACTOR * known.max() / 1e6)
        build_s = self.patience.build_s
        return build_s if phase in LONG or self.step_s is None else self.step_s


def kill_all(processes: Sequence[Any]) -> None:
    for process in processes:
        if process is not None and process.is_alive():
            process.kill()
    for process in processes:
        if process is not None:
            process.join(KILLED_S)


@contextlib.contextmanager
def lean_workers(draw_in_one_thread: bool) -> Iterator[None]:
    """Workers started inside use one thread a library, and import this module but not the caller's script.

    A spawned process imports the main script again, here one that imports torch: 0.4 GB and seconds a worker.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # read before any of our code runs
    if draw_in_one_thread and "LP_NUM_THREADS" not in os.environ:
        names = (*names, "LP_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    main = sys.modules["__main__"]
    os.environ.update({name: "0" if name == "LP_NUM_THREADS" else "1" for name in names})  # Mesa's 0: none of its own
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
