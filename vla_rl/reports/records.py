"""Lines of a metrics.jsonl: reading them, and setting aside those that a resumed run writes anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vla_rl.run.files import write_whole
from vla_rl.run.settings import ConfigError

METRICS_FILE = "metrics.jsonl"

Records = list[dict[str, Any]]  # its lines


def read_metrics(path: Path) -> Records:
    """The records of a metrics.jsonl; a torn last line (the run was killed while writing it) is left out. NaN and Infinity,
    which other programs may write, are null, as ours are.

    Raises:
        ConfigError: a line that is not the last one is damaged.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line, parse_constant=lambda _: None)
            records.append({"iteration": record["iteration"], **record})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ConfigError(
                    f"{path}, line {number} is damaged: {line[:80]!r}; mend or remove the line, or move the file away"
                ) from error
    return records


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
