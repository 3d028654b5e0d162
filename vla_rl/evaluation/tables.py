"""Tables of an evaluation: success with intervals, drops within a family of suites, what changed from a baseline.

For the terminal as aligned text, for a paper as Markdown. Not here: the intervals (vla_rl.reports.statistics).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vla_rl.evaluation.results import Key
from vla_rl.reports.statistics import mcnemar_exact, paired_difference, unpaired_difference, wilson_interval
from vla_rl.run.section import TEMPERED

Rows = Mapping[Key, Mapping[str, Any]]  # "success" and "length" of each episode


@dataclass(frozen=True)
class Table:
    """Cells as text, the header first."""

    title: str
    rows: list[list[str]]

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in self.rows
        ]
        return "\n".join([self.title, "", *lines])

    def markdown(self) -> str:
        header, *rows = ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([f"## {self.title}", "", header, "|" + "---|" * len(self.rows[0]), *rows])


@dataclass(frozen=True)
class Rate:
    """Success of some episodes."""

    successes: int
    episodes: int
    length: float | None  # mean simulator steps of the successes

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Rate:
        lengths = [row["length"] for row in rows if row["success"]]
        return cls(len(lengths), len(rows), sum(lengths) / len(lengths) if lengths else None)

    def __str__(self) -> str:
        if not self.episodes:
            return "-"
        low, high = wilson_interval(self.successes, self.episodes)
        return f"{100 * self.successes / self.episodes:.1f} % ({100 * low:.1f} to {100 * high:.1f})"

    def as_dict(self) -> dict[str, Any]:
        low, high = wilson_interval(self.successes, self.episodes)
        rate = {"successes": self.successes, "episodes": self.episodes, "success_rate": self.successes / self.episodes}
        return {**rate, "low": low, "high": high, "length_of_successes": self.length}


def rate(rows: Rows, **wanted: Any) -> Rate:
    """Of the episodes whose key has the wanted fields."""
    return Rate.of([row for key, row in rows.items() if all(getattr(key, n) == v for n, v in wanted.items())])


def summary(rows: Rows) -> list[dict[str, Any]]:
    """Rates of each suite (task_id null) and of each of its tasks, mode by mode."""
    groups = dict.fromkeys((k.task_suite, k.mode) for k in rows)
    found = []
    for suite, mode in groups:
        tasks = sorted({k.task_id for k in rows if (k.task_suite, k.mode) == (suite, mode)})
        for task in (None, *tasks):
            wanted = {"task_suite": suite, "mode": mode} | ({} if task is None else {"task_id": task})
            found.append({"task_suite": suite, "mode": mode, "task_id": task, **rate(rows, **wanted).as_dict()})
    return found


def suite_table(rows: Rows, suite: str, modes: Sequence[str], instructions: Sequence[str]) -> Table:
    """A line a task and one of all: success of each mode with its interval, mean steps of the successes."""
    header = ["task", *(name for mode in modes for name in (mode, "steps")), "instruction"]
    tasks = sorted({key.task_id for key in rows if key.task_suite == suite})
    lines = [header]
    for task in (*tasks, None):
        cells = []
        for mode in modes:
            wanted = {"task_suite": suite, "mode": mode} | ({} if task is None else {"task_id": task})
            found = rate(rows, **wanted)
            cells += [str(found), "-" if found.length is None else f"{found.length:.0f}"]
        lines.append(["all" if task is None else str(task), *cells, "" if task is None else instructions[task]])
    return Table(suite, lines)


def family_table(rows: Rows, suites: Sequence[str], modes: Sequence[str]) -> Table:
    """A line a suite; its drop from the first one, the base. The states are not the same, so the difference is unpaired."""
    lines = [["suite", *(name for mode in modes for name in (mode, "change from base"))]]
    for suite in suites:
        cells = []
        for mode in modes:
            here, base = (rate(rows, task_suite=name, mode=mode) for name in (suite, suites[0]))
            change = (
                ""
                if suite == suites[0] or not here.episodes or not base.episodes
                else points(*unpaired_difference(here.successes, here.episodes, base.successes, base.episodes))
            )
            cells += [str(here), change]
        lines.append([suite, *cells])
    return Table(f"{suites[0]} and its perturbations", lines)


def points(difference: float, low: float, high: float) -> str:
    """Percentage points with their interval."""
    return f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


@dataclass(frozen=True)
class Comparison:
    """One suite in one mode against a baseline, state by state."""

    task_suite: str
    mode: str
    pairs: int
    successes: int
    baseline_successes: int
    gained: list[Key] = field(default_factory=list)  # states that only this policy solves
    lost: list[Key] = field(default_factory=list)  # that only the baseline solves

    def as_dict(self) -> dict[str, Any]:
        gained, lost = len(self.gained), len(self.lost)
        difference, low, high = paired_difference(gained, lost, self.pairs)
        return {
            "task_suite": self.task_suite,
            "mode": self.mode,
            "pairs": self.pairs,
            "success_rate": self.successes / self.pairs,
            "baseline_success_rate": self.baseline_successes / self.pairs,
            "difference": difference,
            "low": low,
            "high": high,
            "mcnemar_p": mcnemar_exact(gained, lost),
            **{name: [[k.task_id, k.initial_state] for k in getattr(self, name)] for name in ("gained", "lost")},
        }


def compare(rows: Rows, baseline: Rows) -> list[Comparison]:
    """Pairs of the same suite, mode, task and state; what only one of the two has is left out."""
    found = []
    for suite, mode in dict.fromkeys((key.task_suite, key.mode) for key in rows):
        pairs = [k for k in rows if (k.task_suite, k.mode) == (suite, mode) and k in baseline]
        if pairs:
            both = [(k, rows[k]["success"], baseline[k]["success"]) for k in sorted(pairs)]
            found.append(
                Comparison(
                    suite,
                    mode,
                    len(both),
                    sum(ours for _, ours, _ in both),
                    sum(theirs for *_, theirs in both),
                    [key for key, ours, theirs in both if ours and not theirs],
                    [key for key, ours, theirs in both if theirs and not ours],
                )
            )
    return found


def compare_modes(rows: Rows, modes: Sequence[str]) -> list[Comparison]:
    """Each other mode against the first one, as if that were a baseline."""
    found = []
    for mode in modes[1:]:
        first = {key._replace(mode=mode): row for key, row in rows.items() if key.mode == modes[0]}
        found += compare(rows, first)
    return found


def comparison_table(comparisons: Sequence[Comparison], name: str) -> Table:
    """Difference in percentage points with its interval, McNemar's p, and how many states flipped each way."""
    lines = [["suite", "mode", "states", "here", "baseline", "difference", "McNemar p", "gained", "lost"]]
    for comparison in comparisons:
        values = comparison.as_dict()
        lines.append(
            [
                *(comparison.task_suite, comparison.mode, str(comparison.pairs)),
                *(f"{100 * values[n]:.1f} %" for n in ("success_rate", "baseline_success_rate")),
                points(values["difference"], values["low"], values["high"]),
                f"{values['mcnemar_p']:.2g}",
                *(str(len(flips)) for flips in (comparison.gained, comparison.lost)),
            ]
        )
    return Table(f"Against {name}, the same states paired", lines)


def flip_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """ "libero_spatial greedy, gained: task 0 states 3, 7; task 4 state 1": which states flipped."""
    lines = []
    for comparison in comparisons:
        for word, keys in (("gained", comparison.gained), ("lost", comparison.lost)):
            states: dict[int, list[int]] = {}
            for key in keys:
                states.setdefault(key.task_id, []).append(key.initial_state)
            text = "; ".join(
                f"task {task} state{'s' if len(there) > 1 else ''} {', '.join(map(str, there))}"
                for task, there in states.items()
            )
            lines.append(f"{comparison.task_suite} {comparison.mode}, {word}: {text or 'none'}")
    return lines


def protocol_text(protocol: Mapping[str, Any], policy: Mapping[str, Any], time: Mapping[str, Any]) -> str:
    """How it was measured, in sentences."""
    states = ranges(protocol["states"])
    limits = ", ".join(f"{suite} {steps}" for suite, steps in protocol["max_steps"].items())
    speed = f" {time['env_steps_per_s']:.0f} simulator steps a second." if time["env_steps_per_s"] else ""
    tempered = " and ".join(mode for mode in protocol["modes"] if mode in TEMPERED)
    temperature = f" Temperature of {tempered} {protocol['temperature']:g}." if tempered else ""
    return (
        f"{policy['name']}: success in % with 95 % Wilson intervals, from the fixed initial states {states} of each task; steps are "
        f"the mean length of the successes. Rendered {protocol['render']} at {protocol['image_size']} px,"
        f" {protocol['settle_steps']} settle steps, step limit {limits}.{temperature} Seed {protocol['seed']}.{speed}"
    )


def ranges(indices: Sequence[int]) -> str:
    """ "0-3,7" of [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for index in sorted(indices):
        if parts and parts[-1][-1] == index - 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
