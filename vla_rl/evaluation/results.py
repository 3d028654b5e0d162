"""What an evaluation leaves in its folder, and how another one reads it.

    episodes.jsonl  what is measured and with what (first line), then a line a session and a line an episode, each on the disk as
                    soon as it is known: whatever ends an evaluation, the same command goes on after the last whole line
    results.json    the same in one object for scripts, written when all episodes are played

Not here: tables and comparisons (vla_rl.evaluation.tables), playing (vla_rl.evaluation.play).
"""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from vla_rl.evaluation.play import EpisodeResult
from vla_rl.run.failures import one_line
from vla_rl.run.files import Count, Finite, Lines, Strict, checked, read_bytes, read_json, refuse_depth, write_whole
from vla_rl.run.section import TEMPERED
from vla_rl.run.settings import ConfigError
from vla_rl.types import ACTION_DIM, Episode

JOURNAL, RESULTS = "episodes.jsonl", "results.json"
FORMAT = 1  # of both files
MAX_BYTES = 500_000_000  # of a journal; 5 suites of 500 episodes in two modes have at most 100 MB
SAID = 400  # characters of what differs, in an error
# of a protocol, what must be equal for two policies' rates to be compared; step limits are compared suite by suite
COMPARABLE = ("settle_steps", "image_size", "render")


class Key(NamedTuple):
    """Names an episode of an evaluation."""

    task_suite: str
    mode: str  # vla_rl.run.section.Mode
    task_id: int
    initial_state: int


def key_of(row: Mapping[str, Any]) -> Key:
    return Key(*(row[field] for field in Key._fields))


class Journal:
    """episodes.jsonl of a folder, read and continued.

    Args:
        folder: is there; nobody else writes in it (vla_rl.run.checkpoint.locked).
        protocol, policy: of this evaluation; the policy's "fingerprint" counts, not where it lies.

    Raises:
        ConfigError: the folder has results of another protocol or policy, or a line before the last is damaged.
    """

    def __init__(self, folder: Path, protocol: Mapping[str, Any], policy: Mapping[str, Any]):
        self.path = folder / JOURNAL
        check_continues(folder, protocol, policy)
        self.header = {"format": FORMAT, "protocol": protocol, "policy": policy}
        if not self.path.exists():
            write_whole(self.path, json.dumps(self.header) + "\n")
        self.lines = Lines(self.path)
        lines, whole = read_lines(self.path)
        os.truncate(self.path, whole)  # a line that was being written when the evaluation was killed
        self.header, *rest = lines
        self.sessions = [line["session"] for line in rest if "session" in line]
        self.rows = {key_of(line): line for line in rest if "session" not in line}
        self.in_session = False  # of this process

    def add_session(self, session: Mapping[str, Any]) -> None:
        """What this process is and runs on; before its first episode."""
        self.sessions.append(dict(session))
        self.append({"session": session})
        self.in_session = True

    def add(self, key: Key, result: EpisodeResult, seconds: float) -> None:
        """An episode that has ended.

        Args:
            seconds: since the session began to play.
        """
        row = {**row_of(key, result), "number_of_session": len(self.sessions), "seconds": seconds}
        self.append(row)
        self.rows[key] = row

    def append(self, line: Mapping[str, Any]) -> None:
        self.lines.append(json.dumps(line))
        self.lines.write()

    def result(self, key: Key, episode: Episode) -> EpisodeResult:
        return result_of(self.rows[key], episode)

    def seconds(self) -> float:
        """Of playing, all sessions together."""
        return sum(self.seconds_of(number) for number in {row["number_of_session"] for row in self.rows.values()})

    def seconds_of_session(self) -> float:
        """Of this process."""
        return self.seconds_of(len(self.sessions)) if self.in_session else 0.0

    def seconds_of(self, number: int) -> float:
        return max((row["seconds"] for row in self.rows.values() if row["number_of_session"] == number), default=0.0)

    def results(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The object of results.json; config: every setting."""
        episodes = [
            {name: row[name] for name in (*Key._fields, "success", "length")}
            for _, row in sorted(self.rows.items(), key=lambda item: self.order(item[0]))
        ]
        steps, seconds = sum(e["length"] for e in episodes), self.seconds()
        time = {"env_steps": steps, "seconds": seconds, "env_steps_per_s": steps / seconds if seconds else None}
        return {**self.header, "time": time, "sessions": self.sessions, "config": config, "episodes": episodes}

    def order(self, key: Key) -> tuple:
        suites, modes = list(self.header["protocol"]["max_steps"]), self.header["protocol"]["modes"]
        return suites.index(key.task_suite), modes.index(key.mode), key.task_id, key.initial_state


def row_of(key: Key, result: EpisodeResult) -> dict[str, Any]:
    """A line of a journal; result_of gives the result again, to the bit."""
    return {
        **key._asdict(),
        "success": result.success,
        "length": result.length,
        "actions": base64.b64encode(np.ascontiguousarray(result.actions, "<f4").tobytes()).decode(),
        "values": result.values,
    }


def result_of(row: Mapping[str, Any], episode: Episode) -> EpisodeResult:
    actions = np.frombuffer(base64.b64decode(row["actions"]), "<f4").reshape(-1, ACTION_DIM)
    return EpisodeResult(episode, row["success"], row["length"], actions, row["values"])


# ------------------------------------------------------------------------------------------------------ what is read


class Protocol(Strict):
    """What of a protocol is used by itself."""

    max_steps: dict[str, Count]  # suites
    modes: list[str]
    task_ids: list[Count]
    states: list[Count]
    temperature: Finite
    chunk_size: Annotated[int, Field(ge=1, le=1000)]


class Measured(Strict):
    """A policy, and how it was measured."""

    format: Literal[1]
    protocol: Protocol
    policy: dict[str, Any]


class Outcome(Strict):
    """An episode in results.json."""

    task_suite: str
    mode: str
    task_id: Count
    initial_state: Count
    success: bool
    length: Count


class Row(Outcome):
    """An episode in a journal."""

    actions: str
    values: list[float] | None


class RowOfSession(Row):
    number_of_session: Count
    seconds: Finite


class Session(Strict):
    session: dict[str, Any]


class Results(Measured):
    """results.json."""

    episodes: Annotated[list[Outcome], Field(min_length=1)]


def check_header(value: dict[str, Any]) -> None:
    """Raises ValueError if it is not the first line of a journal."""
    checked(Measured, value)
    if not isinstance(value["policy"].get("fingerprint"), str):
        raise ValueError("its policy has no fingerprint")


def check_row(value: dict[str, Any], protocol: Mapping[str, Any], kind: type[Row]) -> None:
    """Raises ValueError if it is no episode of a journal, or none of the protocol."""
    checked(kind, value)
    key = key_of(value)
    if not (key.task_suite in protocol["max_steps"] and key.mode in protocol["modes"]):
        raise ValueError("it is of another suite or mode")
    if not (key.task_id in protocol["task_ids"] and key.initial_state in protocol["states"]):
        raise ValueError("it is of another task or state")
    actions = np.frombuffer(base64.b64decode(value["actions"], validate=True), "<f4")
    if len(actions) != value["length"] * ACTION_DIM or not np.isfinite(actions).all():
        raise ValueError(f"its actions are not those of {value['length']} steps")


def parse_line(line: bytes) -> dict[str, Any]:
    """Raises ValueError if it is no JSON object, or a deep one."""
    try:
        value = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    refuse_depth(value)
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    return value


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a journal, and how many bytes they are; a last line without its end is left out.

    Raises:
        ConfigError: the file cannot be read, or another line is damaged.
    """
    data = read_bytes(path, MAX_BYTES, "give another --out")
    whole, lines = data.rfind(b"\n") + 1, []
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            value = parse_line(line)
            if number == 1:
                check_header(value)
            elif "session" in value:
                checked(Session, value)
            else:
                check_row(value, lines[0]["protocol"], RowOfSession)
            lines.append(value)
        except ValueError:
            raise ConfigError(
                f"{path}, line {number} is damaged: {line[:60]!r}; remove the line or give another --out"
            ) from None
    if not lines:
        raise ConfigError(f"{path} is empty; remove it or give another --out")
    return lines, whole


def check_continues(folder: Path, protocol: Mapping[str, Any], policy: Mapping[str, Any] | None = None) -> None:
    """Whether an evaluation may go on in a folder, or begin there; writes nothing.

    Args:
        policy: None where it is not loaded yet.

    Raises:
        ConfigError: the folder is a file, or has results of something else.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f"--out {folder} is not a folder; give a folder for the results")
    path = folder / JOURNAL
    if not path.exists():
        if (folder / RESULTS).exists():
            raise ConfigError(
                f"--out {folder} has {RESULTS} but no {JOURNAL} to continue; give another --out, nothing is overwritten"
            )
        return
    header = read_lines(path)[0][0]
    other = unequal(header["protocol"], json.loads(json.dumps(protocol)))
    if other:
        raise ConfigError(
            f"--out {folder} has results of another protocol: {one_line('; '.join(other), SAID)} (there; here); give another --out, "
            "nothing is overwritten"
        )
    if policy is not None and header["policy"]["fingerprint"] != policy["fingerprint"]:
        raise ConfigError(
            f"--out {folder} has results of another policy, {one_line(str(header['policy'].get('name')), 100)} (fingerprint "
            f"{one_line(header['policy']['fingerprint'], 12)}, here {policy['fingerprint'][:12]}); give another --out, nothing is overwritten"
        )


def unequal(first: Mapping[str, Any], second: Mapping[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """ "render exact; fast": what differs between two protocols."""
    names = dict.fromkeys(itertools.chain(first, second)) if names is None else names
    return [f"{n} {first.get(n)}; {second.get(n)}" for n in names if first.get(n) != second.get(n)]


# -------------------------------------------------------------------------------------------------- of another evaluation


@dataclass(frozen=True)
class Baseline:
    """The results that others are compared with."""

    path: Path  # of results.json
    name: str  # of its policy
    protocol: dict[str, Any]
    rows: dict[Key, dict[str, Any]]  # success and length of each episode

    def recorded(self, key: Key, episode: Episode) -> EpisodeResult | None:
        """The episode with its actions, from the journal beside the results; None where that is not there."""
        path = self.path.with_name(JOURNAL)
        if not path.exists():
            return None
        lines = read_lines(path)[0][1:]
        row = next((line for line in lines if "session" not in line and key_of(line) == key), None)
        return None if row is None else result_of(row, episode)


def read_baseline(path: Path, protocol: Mapping[str, Any]) -> Baseline:
    """results.json of another evaluation, or the folder with it, if it can be compared with this one.

    Raises:
        ConfigError: it is no results file, of another protocol, or has no episode in common with this one.
    """
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"--baseline {path}: no such file; give the results.json of an evaluation that has ended")
    values = read_json(path, "give the results.json of an evaluation")
    try:
        checked(Results, values)
    except ValueError as error:
        raise ConfigError(
            f"--baseline {path} is no results file of an evaluation ({one_line(error)}); give a results.json"
        ) from None
    theirs, name = values["protocol"], one_line(str(values["policy"].get("name")), 100)
    rows = {key_of(row): {"success": row["success"], "length": row["length"]} for row in values["episodes"]}
    limits, modes, temperature = theirs["max_steps"], theirs["modes"], theirs["temperature"]
    other = unequal(theirs, json.loads(json.dumps(protocol)), COMPARABLE)
    shared = [suite for suite in protocol["max_steps"] if suite in limits]
    other += [
        f"max_steps of {s} {limits[s]}; {protocol['max_steps'][s]}"
        for s in shared
        if limits[s] != protocol["max_steps"][s]
    ]
    if TEMPERED.intersection(modes, protocol["modes"]) and temperature != protocol["temperature"]:
        other.append(f"temperature {temperature}; {protocol['temperature']}")
    if other:
        raise ConfigError(
            f"--baseline {path} is of another protocol: {one_line('; '.join(other), SAID)} (there; here); evaluate both in the same way"
        )
    wanted = {
        Key(suite, mode, task, state)
        for suite in shared
        for mode in protocol["modes"]
        for task in protocol["task_ids"]
        for state in protocol["states"]
    }
    if not wanted & rows.keys():
        raise ConfigError(
            f"--baseline {path} has no episode that this evaluation has; give one of the same suite and states"
        )
    return Baseline(path, name, theirs, rows)
