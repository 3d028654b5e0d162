"""Runs a command of the project whose simulator processes are broken, one after the other, in phases that are named.

    python -m tests.break_workers FOLDER reset:kill,step:stop,render:raise start_gae_ppo_training.py --config ...

A worker process takes the next fault that no other has taken, and has it in the second reset, step or picture. FOLDER keeps which are
taken; it is empty at first. Each fault is one of kill (SIGKILL), stop (SIGSTOP) and raise.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from pathlib import Path

from vla_rl.simulation import worker_processes
from vla_rl.simulation.worker import run_worker

VARIABLE = "BREAK_WORKERS"  # FOLDER|faults, which the workers inherit
AT_CALL = 2
METHODS = {"reset": "_start_in", "step": "_execute"}  # of LiberoEnv


def broken_worker(*arguments) -> None:
    folder, _, faults = os.environ[VARIABLE].partition("|")
    for number, fault in enumerate(filter(None, faults.split(","))):
        try:
            (Path(folder) / f"{number} {fault}".replace(":", " ")).touch(exist_ok=False)
        except FileExistsError:
            continue
        install(*fault.split(":"))
        break
    run_worker(*arguments)


def install(phase: str, how: str) -> None:
    from vla_rl.simulation.libero_env import LiberoEnv
    from vla_rl.simulation.libraries import import_simulator

    owner, name = (import_simulator(), "render") if phase == "render" else (LiberoEnv, METHODS[phase])
    method, calls = getattr(owner, name), []

    @functools.wraps(method)
    def broken(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == AT_CALL:
            if how == "raise":
                raise RuntimeError(f"broken in {phase}")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
        return method(self, *args, **kwargs)

    setattr(owner, name, broken)


def main(argv: list[str]) -> int:
    folder, faults, command, *arguments = argv
    os.environ[VARIABLE] = f"{folder}|{faults}"
    worker_processes.run_worker = broken_worker
    return importlib.import_module(command.removesuffix(".py")).main(arguments)


if __name__ == "__main__":
    from tests import break_workers  # under this name workers find its functions, not as __main__

    sys.exit(break_workers.main(sys.argv[1:]))
