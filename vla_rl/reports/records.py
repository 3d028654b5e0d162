"""Lines of a metrics.jsonl: reading them, and setting aside those that a resumed run writes anew."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vla_rl.run.files import read_bytes, write_whole
from vla_rl.run.settings import ConfigError

METRICS_FILE = "metrics.jsonl"
MAX_BYTES = 500_000_000  # 250,000 iterations of 2 kB
TEXTS = re.compile(r"system/.*|.*/render")  # metrics that may be words
WAY_OUT = "mend or remove the line, or move the file away"

Records = list[dict[str, Any]]  # its lines


def read_metrics(path: Path) -> Records:
    """The records of a metrics.jsonl; a torn last line (the run was killed while writing it) is left out. NaN and Infinity,
    which other programs may write, are null, as ours are.

    Raises:
        ConfigError: a line that is not the last one is damaged, or one has what no run writes; or the file is larger than any.
    """
    if not path.exists():
        return []
    lines = read_bytes(path, MAX_BYTES, WAY_OUT).removesuffix(b"\n").split(b"\n")
    records = []
    for number, line in enumerate(lines if lines != [b""] else [], start=1):
        try:
            record = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):
            if number < len(lines):
                raise ConfigError(f"{path}, line {number} is damaged: {line[:80]!r}; {WAY_OUT}") from None
            continue
        if problem := problem_of(record):
            raise ConfigError(f"{path}, line {number} is damaged: {problem}; {WAY_OUT}")
        records.append({"iteration": record["iteration"], **record})
    return records


def problem_of(record: Any) -> str | None:
    """What keeps a line from being one of ours: an object of numbers, with its iteration, and the names of renderers."""
    if not isinstance(record, dict) or "iteration" not in record:
        return "it is no object with an iteration"
    for name in ("iteration", "timesteps", "step"):
        value = record.get(name, 0)
        if type(value) is not int or not 0 <= value < 2**63:
            return f"{name} is {value!r:.60}, expected a whole number from 0"
    for name, value in record.items():
        if not (value is None or isinstance(value, int | float) or (isinstance(value, str) and TEXTS.fullmatch(name))):
            return f"{name!r:.60} is {value!r:.60}, expected a number"
    return None


def is_later(record: dict[str, Any], iteration: int, evaluated: bool) -> bool:
    """Whether a line was written after the checkpoint of an iteration."""
    is_evaluation = any(name.startswith("eval/") for name in record)
    return record["iteration"] > iteration or (record["iteration"] == iteration and is_evaluation and not evaluated)


def set_aside_later_lines(path: Path, iteration: int, evaluated: bool = True) -> None:
    """Moves lines written after the checkpoint to metrics.superseded.jsonl: the resumed run writes them anew."""
    records = read_metrics(path)
    later = [record for record in records if is_later(record, iteration, evaluated)]
    earlier = [record for record in records if not is_later(record, iteration, evaluated)]
    if later:
        with (path.parent / "metrics.superseded.jsonl").open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in later)
    write_whole(path, "".join(json.dumps(record) + "\n" for record in earlier))
