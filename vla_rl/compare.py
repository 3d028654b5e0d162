"""Several runs or seeds in one figure and one table.

    python -m vla_rl.compare runs/ppo_seed0 runs/ppo_seed1 runs/grpo_seed0 runs/grpo_seed1 --by algorithm.estimator
    python -m vla_rl.compare runs/*

Runs whose settings differ in nothing but the seed are seeds of one setting: their mean is drawn, with a 95 % t interval over
the seeds from three on. Of several RUNs, what is no run of PPO or GRPO is left out with a warning. The table goes to the
terminal and, with the figure, to --out.

Not here: the numbers of a curve (vla_rl.reports.curves), the drawing (vla_rl.reports.drawing).
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.reports.curves import (
    EPISODES,
    EVALUATED,
    TRAINING,
    evaluations,
    success_of_last_episodes,
    t_half_width,
)
from vla_rl.reports.drawing import plot_comparison
from vla_rl.reports.records import METRICS_FILE, Records, read_metrics
from vla_rl.reports.report import as_text
from vla_rl.run.command_line import Parser, end_of
from vla_rl.run.failures import say
from vla_rl.run.files import write_whole
from vla_rl.run.load_settings import config_from_dict, expand, list_settings, read_yaml, way_out
from vla_rl.run.run_folder import newest_settings, setting
from vla_rl.run.settings import Config, ConfigError

log = logging.getLogger(__name__)

FILES = ("compare.png", "compare.svg", "compare.md")
UNKNOWN = "?"  # the seed of a file whose name tells none
# what may differ between seeds of one setting: it changes no result, or is where the run lies
FREE = ("run.seed", "run.name", "run.output_dir", "run.torch_threads", "logging.")
FREE += ("env.num_workers", "env.simulators_per_worker", "env.model_cache_gb")
# of settings that tell the groups apart alike, one of an earlier section names them
SECTIONS = ("algorithm", "actor", "critic", "value_head", "rollout", "env", "policy", "eval", "run")


@dataclass(frozen=True)
class Run:
    """A run that is compared."""

    path: Path
    records: Records
    settings: dict[str, str] | None  # as text; None: a metrics.jsonl without its config.yaml
    seed: str
    given_label: str | None = None


class NotComparable(ConfigError):
    """What was given is no run of PPO or GRPO, or has no numbers yet; of several it is left out."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m vla_rl.compare",
        description="Several runs or seeds in one figure and one table.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folders of runs, or metrics.jsonl files, best named NAME_seedN.jsonl; of several, what is none is left out",
    )
    groups = parser.add_mutually_exclusive_group()
    groups.add_argument(
        "--by",
        action="append",
        metavar="SETTING",
        help="group by this setting alone, such as algorithm.estimator; several: --by ONE --by OTHER",
    )
    groups.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="group by these instead: one for each RUN, after all RUNs"
    )
    add("--window", type=int, default=160, metavar="N", help="training episodes that success is of (default 160)")
    add(
        "--out",
        default="comparison",
        metavar="DIR",
        help="for compare.png, compare.svg and compare.md (default comparison)",
    )
    args = parser.parse_intermixed_args(argv)
    if args.by:  # --by ONE OTHER, too
        more = [text for text in args.runs if text in list_settings() and not os.path.exists(text)]
        args.by += more
        args.runs = [text for text in args.runs if text not in more]
    return args


# ----------------------------------------------------------------------------------------------------------------- runs


def load_runs(texts: list[str], labels: list[str] | None) -> list[Run]:
    """Each run once, whether its folder was given or its file; of several, what is none is a warning.

    Raises:
        ConfigError: nothing is left; not as many labels as runs; or see load_run.
    """
    if labels is not None and len(labels) != len(texts):
        raise ConfigError(f"--labels has {len(labels)} labels for {len(texts)} runs; give one for each")
    runs: dict[str, Run] = {}
    for text, label in zip(texts, labels or [None] * len(texts), strict=True):
        path = Path(expand(text, "RUN"))
        file = os.path.realpath(path / METRICS_FILE if path.is_dir() else path)
        if file in runs:
            log.warning("%s is given twice, and counts once", text)
            continue
        try:
            runs[file] = load_run(path, label)
        except NotComparable as error:
            if len(texts) == 1:
                raise
            log.warning("left out: %s", error)
    if not runs:
        raise ConfigError(
            f"none of the {len(texts)} is a run of PPO or GRPO with numbers; give folders such as runs/NAME"
        )
    return list(runs.values())


def load_run(path: Path, label: str | None = None) -> Run:
    """
    Raises:
        NotComparable: a folder or file without metrics, without a whole line yet, or of fine-tuning.
        ConfigError: there is no such file, or a line is damaged.
    """
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.is_file():
        way = "give the folder of a run, such as runs/NAME, or a metrics.jsonl"
        if path.is_dir():
            raise NotComparable(f"{path} has no {METRICS_FILE}; {way}")
        raise ConfigError(f"{path} is not there; {way}")
    try:
        records = read_metrics(file)
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        if file.suffix != Path(METRICS_FILE).suffix:
            raise NotComparable(f"{file} is no {METRICS_FILE}; give runs of start_gae_ppo_training.py") from None
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{file} cannot be read ({error}); give a metrics.jsonl") from None
    if not records:
        raise NotComparable(f"{file} has no whole line yet; leave the run out, or wait for its first evaluation")
    if any("timesteps" not in record for record in records):
        raise NotComparable(
            f"{file} is of no PPO or GRPO run: lines without timesteps; give runs of start_gae_ppo_training.py"
        )
    check_numbers(file, records)
    settings = newest_settings(file.parent)
    if path.is_dir() or (file.name == METRICS_FILE and settings.is_file()):
        values = settings_of(settings)
        return Run(path, records, values, values["run.seed"], label)
    seed = re.search(r"_seed(\w+)$", file.stem)
    return Run(path, records, None, seed[1] if seed else UNKNOWN, label)


def check_numbers(file: Path, records: Records) -> None:
    """What is compared must be numbers, which another program may have written.

    Raises:
        ConfigError: one is not.
    """
    for number, record in enumerate(records, start=1):
        wanted = ("timesteps", TRAINING) if record.get(EPISODES) else ("timesteps",)
        for name in ("timesteps", EPISODES, TRAINING, *EVALUATED.values(), "time/rollout_s", "time/update_s"):
            value = record.get(name)
            if (value is None and name in wanted) or not (value is None or is_number(value)):
                raise ConfigError(
                    f"{file}, line {number}: {name} is {value!r:.80}, not a number; mend the line, or leave the run out"
                )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def settings_of(path: Path) -> dict[str, str]:
    """Every setting of a run as text."""
    config = config_from_dict(read_yaml(path), str(path))
    return {name: as_text(setting(config, name)) for name in list_settings() if "." in name}


def group_runs(runs: list[Run], by: list[str] | None) -> dict[str, list[Run]]:
    """Label -> its seeds, in the order of the runs.

    Raises:
        ConfigError: --by names no setting, or a run has no settings.
    """
    by_label: Callable[[Run], str]
    if runs[0].given_label is not None:
        by_label = lambda run: run.given_label  # noqa: E731
    elif by is not None:
        by_label = lambda run: name_by(run, by)  # noqa: E731
        check_settings(runs, by)
    else:
        by_label = automatic_labels(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(by_label(run), []).append(run)
    return groups


def check_settings(runs: list[Run], by: list[str]) -> None:
    known = [name for name in list_settings() if "." in name]
    for name in by:
        if name not in known:
            raise ConfigError(f"--by {name}: unknown setting; {way_out(name, Config)}")
    bare = [str(run.path) for run in runs if run.settings is None]
    if bare:
        raise ConfigError(
            f"--by {' '.join(by)}: {bare[0]} has no config.yaml beside it; give run folders, or use --labels"
        )


def name_by(run: Run, names: list[str]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {run.settings[name]}" for name in names)


def automatic_labels(runs: list[Run]) -> Callable[[Run], str]:
    """Names what differs by the fewest settings that tell all groups apart; a file without settings by its own name, and one
    without a seed in it stands alone."""
    known = [run for run in runs if run.settings is not None]
    names = [n for n in (known[0].settings if known else ()) if not n.startswith(FREE)]
    differing = [n for n in names if len({run.settings[n] for run in known}) > 1]
    differing.sort(key=lambda name: SECTIONS.index(name.partition(".")[0]))

    def kinds(chosen: list[str]) -> int:
        return len({tuple(run.settings[n] for n in chosen) for run in known})

    chosen: list[str] = []
    while kinds(chosen) < kinds(differing):
        chosen.append(max(differing, key=lambda name: kinds([*chosen, name])))

    files = [run.path.absolute() for run in runs if run.settings is None and run.seed == UNKNOWN]
    short = Counter(f"{file.parent.name}/{file.name}" for file in files)

    def label(run: Run) -> str:
        if run.settings is not None:
            return name_by(run, chosen) or "all runs"
        if run.seed != UNKNOWN:
            return re.sub(r"_seed\w+$", "", run.path.stem)
        name = f"{run.path.absolute().parent.name}/{run.path.name}"  # which seeds belong together nothing tells
        return name if short[name] == 1 else str(run.path)

    return label


# ---------------------------------------------------------------------------------------------------------------- table


def table(groups: dict[str, list[Run]], window: int) -> str:
    """Markdown: a row for each setting."""
    known = [run.records for runs in groups.values() for run in runs]
    modes = {title: name for title, name in EVALUATED.items() if any(len(evaluations(r, name)[0]) for r in known)}
    columns = ("setting", "seeds", "timesteps", *modes)
    columns += (f"training success, last {window} episodes", "minutes")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for label, runs in groups.items():
        curves = [success_of_last_episodes(run.records, window) for run in runs]
        cells = [label.replace("|", "\\|"), ", ".join(run.seed for run in runs)]
        cells.append(span([run.records[-1]["timesteps"] for run in runs]))
        cells += [over_seeds([last(run.records, name) for run in runs]) for name in modes.values()]
        cells.append(over_seeds([curve[2][-1] if len(curve[2]) else None for curve in curves]))
        cells.append(span([round(curve[1][-1]) if len(curve[1]) else 0 for curve in curves]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def last(records: Records, name: str) -> float | None:
    values = evaluations(records, name)[2]
    return float(values[-1]) if len(values) else None


def over_seeds(rates: list[float | None]) -> str:
    """Mean and 95 % t interval, within 0 and 1, from 3 seeds on; of fewer, the mean and each."""
    known = np.array([rate for rate in rates if rate is not None])
    if not len(known):
        return "-"
    mean, missing = known.mean(), f", {len(known)} of {len(rates)} runs" * (len(known) < len(rates))
    if len(known) == 1:
        return f"{mean:.1%}{missing}"
    if len(known) == 2:
        return f"{mean:.1%} ({' and '.join(f'{rate:.1%}' for rate in known)}{missing})"
    half = float(t_half_width(known))
    return f"{mean:.1%} ({max(0.0, mean - half):.1%} to {min(1.0, mean + half):.1%}{missing})"


def span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def notes(groups: dict[str, list[Run]]) -> list[str]:
    """What a reader of the table must know."""
    said = [
        "Success over seeds: mean, with a 95 % t interval in brackets from 3 seeds on; minutes are of rollouts and updates."
    ]
    for label, runs in groups.items():
        seeds = [run.seed for run in runs if run.seed != UNKNOWN]
        if len(set(seeds)) < len(seeds):
            said.append(f"{label}: a seed is there more than once, so its runs are not independent.")
        early = [run.path.name for run in runs if ended_early(run)]
        if early:
            said.append(f"{label}: the last evaluation is not of the last timesteps in {', '.join(early)}.")
    known = [run for runs in groups.values() for run in runs if run.settings is not None]
    for name in known[0].settings if len(known) > 1 else ():
        values = Counter(run.settings[name] for run in known)
        if len(values) > 1 and not name.startswith(FREE):
            said.append(f"{name}: {', '.join(f'{value} in {count}' for value, count in values.items())}.")
    return said


def ended_early(run: Run) -> bool:
    done = run.records[-1]["timesteps"]
    return any(len(e := evaluations(run.records, name)[0]) and e[-1] < done for name in EVALUATED.values())


# -------------------------------------------------------------------------------------------------------------- command


def compare(args: argparse.Namespace) -> None:
    if args.window < 1:
        raise ConfigError(f"--window {args.window} is no number of episodes; give 1 or more")
    groups = group_runs(load_runs(args.runs, args.labels), args.by)
    out = make_out(args.out)
    quantities: dict[str, Any] = {
        f"training success, last {args.window} episodes": lambda records: success_of_last_episodes(
            records, args.window
        ),
        **{title: partial(evaluations, name=name) for title, name in EVALUATED.items()},
    }
    drawn: dict[str, dict[str, list]] = {}
    for quantity, curve_of in quantities.items():
        for label, runs in groups.items():
            curves = [curve for curve in (curve_of(run.records) for run in runs) if len(curve[0])]
            if curves:
                drawn.setdefault(quantity, {})[label] = curves
    text = table(groups, args.window) + "\n\n" + "\n".join(f"- {note}" for note in notes(groups)) + "\n"

    pictures = [out / "compare.png", out / "compare.svg"] if drawn else []
    for picture in pictures:
        plot_comparison(drawn, picture)
    shown = "![success against timesteps and minutes](compare.png)\n\n" if drawn else ""
    write_whole(out / "compare.md", shown + text)
    say(f"{text}\nin {out}: {', '.join(path.name for path in [*pictures, out / 'compare.md'])}")


def make_out(text: str) -> Path:
    """
    Raises:
        ConfigError: the folder cannot be made or written to, or has folders where the files go.
    """
    out = Path(expand(text, "--out"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error.strerror}); give another folder") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out} cannot be written to; give another folder")
    for name in FILES:
        if (out / name).is_dir():
            raise ConfigError(f"--out {out}: {name} in it is a folder; move it away, or give another folder")
    return out


def main(argv: list[str] | None = None) -> int:
    """0: compared; 1: it failed; 2: a mistake in the arguments or a damaged run."""
    args = parse_args(argv)
    return end_of(lambda: compare(args))


if __name__ == "__main__":
    sys.exit(main())
