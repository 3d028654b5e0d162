"""The evaluation of a training run goes on where a stop, a crash or a kill has ended it.

    RUN/evaluation.jsonl    what is evaluated and how (first line), then a line an episode, each on the disk as soon as it has ended;
                            of several processes the others have evaluation.1.jsonl, ...

There while an evaluation is under way; what is of another iteration, other weights or another protocol is removed by the next one.
An episode that was left out, since it lost its simulator each time, is no finished one, and tried again.

Not here: playing (vla_rl.evaluation.play), lines of a journal (vla_rl.evaluation.results).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla_rl.evaluation.play import EpisodeResult, evaluation_episodes, sampling_temperature
from vla_rl.evaluation.protocol import digest, measured
from vla_rl.evaluation.results import (
    FORMAT,
    MAX_BYTES,
    Key,
    Row,
    check_header,
    check_row,
    key_of,
    parse_line,
    result_of,
    row_of,
)
from vla_rl.learning.trainer_state import Trainer
from vla_rl.run.failures import one_line
from vla_rl.run.files import Lines, Outage, read_bytes, write_whole
from vla_rl.run.settings import ConfigError
from vla_rl.types import Episode

log = logging.getLogger(__name__)

FILE = "evaluation.jsonl"


class KeptEpisodes:
    """Finished episodes of a trainer's evaluation, kept at once and known again after a stop. All processes call `begin` and `remove`
    at the same place.

    What the disk does not take ends no run: then a stop loses it, and it is evaluated anew.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.header: dict[str, Any] = {}
        self.rows: dict[Key, dict[str, Any]] = {}  # of before the stop
        self.lines: Lines | None = None  # None: nothing is kept
        self.outage = Outage("finished episodes of the evaluation", "a stop now would have them evaluated anew")

    def begin(self) -> KeptEpisodes:
        """Before an evaluation of what the trainer is now: knows what was played of the very same one."""
        ranks = self.trainer.ranks
        self.header, self.rows, sound = ranks.by_first(self.take_over)
        name = FILE if ranks.first else FILE.replace(".", f".{ranks.rank}.")
        self.lines = Lines(self.trainer.logger.folder / name) if sound else None
        if self.lines is not None and not (ranks.first and self.rows):
            self.lines.append(json.dumps(self.header))
        return self

    def known(self, mode: str) -> dict[Episode, EpisodeResult]:
        """What was played before the stop, the same on every process."""
        config = self.trainer.config
        keys = {self.key(mode, e): e for e in evaluation_episodes(config.env.task_ids, config.eval.states)}
        return {episode: result_of(self.rows[key], episode) for key, episode in keys.items() if key in self.rows}

    def add(self, mode: str, result: EpisodeResult) -> None:
        """An episode that has ended on this process."""
        if self.lines is not None:
            self.lines.append(json.dumps(row_of(self.key(mode, result.episode), result)))
            self.outage.survive(self.lines.write)

    def remove(self) -> None:
        """After the evaluation, once a checkpoint knows of it."""
        self.lines = None
        if self.trainer.ranks.first:
            self.outage.survive(lambda: self.put([]))

    # ------------------------------------------------------------------------------------------------- of the first process

    def take_over(self) -> tuple[dict[str, Any], dict[Key, dict[str, Any]], bool]:
        """The header, what there is of its evaluation, and whether that is all that is on the disk now, in one file."""
        header = self.what_is_evaluated()
        rows: dict[Key, dict[str, Any]] = {}
        for path in self.paths():
            found, problems = read_kept(path, header)
            rows |= found
            for problem in problems:
                log.warning("%s; it is not used, and evaluated anew", problem)
        if rows:
            total = math.prod(len(header["protocol"][name]) for name in ("modes", "task_ids", "states"))
            log.info("the evaluation goes on: %d of its %d episodes were played before", len(rows), total)
        lines = [json.dumps(line) for line in (header, *rows.values())] if rows else []
        return header, rows, self.outage.survive(lambda: self.put(lines)) is not None

    def what_is_evaluated(self) -> dict[str, Any]:
        """Of an equal one an evaluation would give the same, but for the rounding of a GPU."""
        trainer, config = self.trainer, self.trainer.config
        protocol = measured(config, sampling_temperature(config), [config.env.task_suite], trainer.eval_envs.num_envs)
        sides = {"adapter": trainer.actor_parameters, "value head": trainer.critic_parameters}
        weights = {f"{side} {n}": tensor for side, tensors in sides.items() for n, tensor in enumerate(tensors)}
        header = {
            "format": FORMAT,
            "iteration": trainer.iteration,
            "timesteps": trainer.timesteps,
            "protocol": protocol,
            "policy": {"fingerprint": digest(trainer.boundary.fingerprint, weights)},
        }
        return json.loads(json.dumps(header))

    def put(self, lines: list[str]) -> bool:
        """These lines and no others on the disk. True."""
        folder = self.trainer.logger.folder
        if lines:
            write_whole(folder / FILE, "".join(f"{line}\n" for line in lines))
        for path in self.paths():
            if not lines or path.name != FILE:
                path.unlink()
        return True

    def paths(self) -> list[Path]:
        stem, suffix = FILE.split(".")
        pattern = rf"{stem}(\.[0-9]+)?\.{suffix}"
        return sorted(path for path in self.trainer.logger.folder.glob("*") if re.fullmatch(pattern, path.name))

    def key(self, mode: str, episode: Episode) -> Key:
        return Key(self.trainer.config.env.task_suite, mode, episode.task_id, episode.initial_state)


def read_kept(path: Path, header: Mapping[str, Any]) -> tuple[dict[Key, dict[str, Any]], list[str]]:
    """The sound lines of a file if they are of the evaluation of `header`, and what is wrong with others, a line each.

    A last line without its end was being written when the run was killed, and is left out.
    """
    try:
        lines = read_bytes(path, MAX_BYTES, "remove it").split(b"\n")[:-1]
        if not lines:
            return {}, []
    except ConfigError as error:
        return {}, [str(error)]
    rows, problems = {}, []
    for number, line in enumerate(lines, start=1):
        try:
            value = parse_line(line)
            if number > 1:
                check_row(value, header["protocol"], Row)
                rows[key_of(value)] = value
                continue
            check_header(value)
            if value != header:
                log.info("%s is of another evaluation, and removed", path)
                return {}, []
        except ValueError as error:
            problems.append(f"{path}, line {number} is damaged ({one_line(error)})")
            if number == 1:
                break
    return rows, problems
