"""Several runs or seeds in one figure and one table.

    python -m vla_rl.compare runs/ppo_seed0 runs/ppo_seed1 runs/grpo_seed0 runs/grpo_seed1 --by algorithm.estimator

Runs whose settings differ in nothing but the seed are seeds of one setting: their mean is drawn, with a 95 % t interval over
the seeds from three on. The table goes to the terminal and, with the figure, to --out.

Not here: the numbers of a curve (vla_rl.reports.curves), the drawing (vla_rl.reports.drawing).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.reports.curves import GREEDY, SAMPLED, evaluations, success_of_last_episodes, t_half_width
from vla_rl.reports.drawing import plot_comparison
from vla_rl.reports.records import METRICS_FILE, Records, read_metrics
from vla_rl.reports.report import as_text
from vla_rl.run.failures import report
from vla_rl.run.load_settings import config_from_dict, expand, list_settings, read_yaml, way_out
from vla_rl.run.run_folder import setting
from vla_rl.run.settings import Config, ConfigError

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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vla_rl.compare",
        description="Several runs or seeds in one figure and one table.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folders of runs, or metrics.jsonl files, whose names end in _seedN.jsonl",
    )
    add("--by", nargs="+", metavar="SETTING", help="group by these alone, such as algorithm.estimator")
    add("--labels", nargs="+", metavar="LABEL", help="group by these instead: one for each RUN")
    add("--window", type=int, default=160, metavar="N", help="training episodes that success is of (default 160)")
    add(
        "--out",
        default="comparison",
        metavar="DIR",
        help="for compare.png, compare.svg and compare.md (default comparison)",
    )
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------- runs


def load_run(text: str) -> Run:
    """
    Raises:
        ConfigError: there is no such run, it has no line yet, a line is damaged, or it is one of fine-tuning.
    """
    path = Path(expand(text, "RUN"))
    file = path / METRICS_FILE if path.is_dir() else path
    if not file.is_file():
        what = f"has no {METRICS_FILE}" if path.is_dir() else "is not there"
        raise ConfigError(f"{path} {what}; give the folder of a run, such as runs/NAME, or a metrics.jsonl")
    try:
        records = read_metrics(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); give a metrics.jsonl") from None
    if not records:
        raise ConfigError(f"{file} has no whole line yet; leave the run out, or wait for its first evaluation")
    if any("timesteps" not in record for record in records):
        raise ConfigError(
            f"{file} is of no PPO or GRPO run: lines without timesteps; give runs of start_gae_ppo_training.py"
        )
    config = file.with_name("config.yaml")
    if path.is_dir() or (file.name == METRICS_FILE and config.is_file()):
        values = settings_of(config)
        return Run(path, records, values, values["run.seed"])
    seed = re.search(r"_seed(\w+)$", file.stem)
    return Run(path, records, None, seed[1] if seed else "?")


def settings_of(path: Path) -> dict[str, str]:
    """Every setting of a run as text."""
    config = config_from_dict(read_yaml(path), str(path))
    return {name: as_text(setting(config, name)) for name in list_settings() if "." in name}


def group_runs(runs: list[Run], by: list[str] | None, labels: list[str] | None) -> dict[str, list[Run]]:
    """Label -> its seeds, in the order of the runs.

    Raises:
        ConfigError: --by names no setting, or a run has no settings; or not as many labels as runs.
    """
    if labels is not None and len(labels) != len(runs):
        raise ConfigError(f"--labels has {len(labels)} labels for {len(runs)} runs; give one for each")
    by_label: Callable[[Run], str]
    if labels is not None:
        of_run = {id(run): label for run, label in zip(runs, labels, strict=True)}
        by_label = lambda run: of_run[id(run)]  # noqa: E731
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
    """Names what differs by the fewest settings that tell all groups apart; a file without settings by its own name."""
    known = [run for run in runs if run.settings is not None]
    names = [n for n in (known[0].settings if known else ()) if not n.startswith(FREE)]
    differing = [n for n in names if len({run.settings[n] for run in known}) > 1]
    differing.sort(key=lambda name: SECTIONS.index(name.partition(".")[0]))

    def kinds(chosen: list[str]) -> int:
        return len({tuple(run.settings[n] for n in chosen) for run in known})

    chosen: list[str] = []
    while kinds(chosen) < kinds(differing):
        chosen.append(max(differing, key=lambda name: kinds([*chosen, name])))

    def label(run: Run) -> str:
        if run.settings is None:
            return re.sub(r"_seed\w+$", "", run.path.stem)
        return name_by(run, chosen) or "all runs"

    return label


# ---------------------------------------------------------------------------------------------------------------- table


def table(groups: dict[str, list[Run]], window: int) -> str:
    """Markdown: a row for each setting."""
    columns = ("setting", "seeds", "timesteps", "greedy success", "sampled success")
    columns += (f"training success, last {window} episodes", "minutes")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for label, runs in groups.items():
        curves = [success_of_last_episodes(run.records, window) for run in runs]
        cells = [label.replace("|", "\\|"), ", ".join(run.seed for run in runs)]
        cells.append(span([run.records[-1]["timesteps"] for run in runs]))
        cells += [over_seeds([last(run.records, name) for run in runs]) for name in (GREEDY, SAMPLED)]
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
        seeds = [run.seed for run in runs]
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
    return any(len(e := evaluations(run.records, name)[0]) and e[-1] < done for name in (GREEDY, SAMPLED))


# -------------------------------------------------------------------------------------------------------------- command


def compare(args: argparse.Namespace) -> None:
    if args.window < 1:
        raise ConfigError(f"--window {args.window} is no number of episodes; give 1 or more")
    paths = [os.path.realpath(run) for run in args.runs]
    twice = [run for run, path in zip(args.runs, paths, strict=True) if paths.count(path) > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is given twice; give each run once")
    groups = group_runs([load_run(run) for run in args.runs], args.by, args.labels)
    quantities: dict[str, Any] = {
        f"training success, last {args.window} episodes": lambda records: success_of_last_episodes(
            records, args.window
        ),
        "greedy success": lambda records: evaluations(records, GREEDY),
        "sampled success": lambda records: evaluations(records, SAMPLED),
    }
    drawn: dict[str, dict[str, list]] = {}
    for quantity, curve_of in quantities.items():
        for label, runs in groups.items():
            curves = [curve for curve in (curve_of(run.records) for run in runs) if len(curve[0])]
            if curves:
                drawn.setdefault(quantity, {})[label] = curves
    text = table(groups, args.window) + "\n\n" + "\n".join(f"- {note}" for note in notes(groups)) + "\n"
    print(text)

    out = Path(expand(args.out, "--out"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error.strerror}); give another folder") from None
    pictures = [out / "compare.png", out / "compare.svg"] if drawn else []
    for picture in pictures:
        plot_comparison(drawn, picture)
    shown = "![success against timesteps and minutes](compare.png)\n\n" if drawn else ""
    unfinished = out / ".compare.md"
    unfinished.write_text(shown + text)
    os.replace(unfinished, out / "compare.md")
    print(f"in {out}: {', '.join(path.name for path in [*pictures, out / 'compare.md'])}")


def main(argv: list[str] | None = None) -> int:
    """0: compared; 1: it failed; 2: a mistake in the arguments or a damaged run."""
    try:
        compare(parse_args(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
