"""Draws the figures of docs/experiments.md, and prints their numbers, from the metrics of the runs beside this file.

    python docs/experiments/figures.py            all figures
    python docs/experiments/figures.py ppo        one

runs/NAME_seedS.jsonl is the metrics.jsonl of a run, docs/experiments/run.py makes it. Thin lines are seeds: success of the last
WINDOW training episodes (sampled, random placements; fewer at the start). Thick lines are means over the seeds, with a 95 % t
interval from 3 seeds on. Crosses are the seeds' greedy evaluations over the fixed states.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from scipy import stats

from vla_rl.reports.curves import GREEDY, evaluations, success_of_last_episodes
from vla_rl.reports.drawing import draw_seeds
from vla_rl.reports.records import read_metrics

HERE = Path(__file__).parent
WINDOW = 160  # episodes

# figure -> label -> runs NAME
FIGURES: dict[str, dict[str, str]] = {
    "ppo": {"GAE-PPO": "ppo"},
    "grpo": {"GAE-PPO": "ppo", "GRPO": "grpo"},
    "grpo_trials": {
        "GRPO, 3e-3, groups of 8": "grpo_short",
        "1e-3": "grpo_1e-3",
        "6e-3": "grpo_6e-3",
        "groups of 4": "grpo_group_4",
        "groups of 16": "grpo_group_16",
    },
    "value_gradient": {"value loss kept from the LoRA": "short", "value loss reaches the LoRA": "value_gradient"},
    "warmup": {"1 iteration of critic warm-up": "short", "none": "warmup_0", "3": "warmup_3"},
    "level": {"ratio of a token": "short", "of an action": "level_action", "of a chunk": "level_chunk"},
    "level_chunk": {"ratio of a chunk": "level_chunk", "actor at 1e-3": "level_chunk_1e-3"},
    "epochs": {"2 epochs": "short", "1": "epochs_1", "4": "epochs_4"},
    "clip": {"clip 0.2, 0.28": "short", "0.2, 0.2": "clip_symmetric"},
    "temperature": {"temperature 1": "short", "0.5": "temperature_05", "1.5": "temperature_15"},
    "weak": {"GAE-PPO": "weak_sparse"},
    "weak_grpo": {"GAE-PPO": "weak_sparse", "GRPO, groups of 8": "weak_grpo"},
    "reward": {"sparse": "weak_sparse", "dense": "weak_dense"},
}

# also against minutes; beside the ablations the machine had more or less other work
TIMED = ("ppo", "grpo", "weak", "weak_grpo")


def load(name: str) -> dict[str, list[dict]]:
    """Seed -> records of its run."""
    paths = sorted((HERE / "runs").glob(f"{name}_seed*.jsonl"))
    return {path.stem.removeprefix(f"{name}_seed"): read_metrics(path) for path in paths}


def draw(figure: str, runs: dict[str, str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    texts = ("timesteps", "minutes (rollouts and updates)")[: 2 if figure in TIMED else 1]
    canvas, (axes,) = pyplot.subplots(1, len(texts), figsize=(11, 4), sharey=True, squeeze=False)
    for column, text in enumerate(texts):
        draw_axis(axes[column], runs, column)
        axes[column].set_xlabel(text)
    place = {"loc": "lower right"} if figure in TIMED else {"loc": "upper left", "bbox_to_anchor": (1.01, 1)}
    axes[0].legend(fontsize=8, **place)
    axes[0].set(ylabel="success", ylim=(-0.03, 1.03))
    canvas.tight_layout()
    canvas.savefig(HERE / f"{figure}.png", dpi=100)
    pyplot.close(canvas)


def draw_axis(axis: Any, runs: dict[str, str], column: int) -> None:
    """Against timesteps (column 0, with the evaluations) or minutes (1)."""
    for label, name in runs.items():
        seeds = list(load(name).values())
        curves = [(curve[column], curve[2]) for curve in (success_of_last_episodes(s, WINDOW) for s in seeds)]
        color = draw_seeds(axis, f"{label}, training episodes", curves)
        for number, records in enumerate(seeds if column == 0 else ()):
            x, _, y = evaluations(records, GREEDY)
            note = f"{label}, greedy on fixed states" if number == 0 else None
            axis.plot(x, y, "x--", linewidth=0.6, markersize=5, color=color, label=note)


COLUMNS = (
    "",
    "seed",
    "timesteps",
    "minutes",
    "greedy",
    "its spread after the start",
    "training episodes: first iteration, second half, last ones",
    "timesteps to 70 %, 80 %",
    "s an iteration: rollout, update",
    "s per 1,000 timesteps",
    "steadiness",
)


def report(label: str, name: str) -> None:
    """A line of the Markdown table for each seed. Seconds are medians. Steadiness: standard deviation of success between
    iterations, over that of as many independent episodes; 1 if the policy's changes add nothing."""
    for seed, records in load(name).items():
        timesteps, minutes, success = success_of_last_episodes(records, WINDOW)
        iterations = [r for r in records if r.get("rollout/episodes")]
        column = {
            key: np.array([r[key] for r in iterations]) for key in ("timesteps", "time/rollout_s", "time/update_s")
        }
        n, rate = (np.array([r[f"rollout/{key}"] for r in iterations]) for key in ("episodes", "success_rate"))
        expected = rate * (1 - rate) / n
        steadiness = np.sqrt(np.mean(np.diff(rate) ** 2) / np.mean(expected[1:] + expected[:-1]))
        half = column["timesteps"] > timesteps[-1] / 2
        greedy = [r[GREEDY] for r in records if r.get(GREEDY) is not None]
        rollout, update = column["time/rollout_s"], column["time/update_s"]
        per_timestep = (rollout + update) / np.diff(column["timesteps"], prepend=0)
        cells = (
            label,
            seed,
            f"{timesteps[-1]:.0f}",
            f"{minutes[-1]:.0f}",
            " ".join(f"{g:.0%}" for g in greedy),
            f"{np.std(greedy[1:], ddof=1):.1%}" if len(greedy) > 2 else "-",
            f"{rate[0]:.0%} {np.average(rate[half], weights=n[half]):.0%} {success[-1]:.0%}",
            ", ".join(first_at(timesteps, success, level) for level in (0.7, 0.8)),
            f"{np.median(rollout):.0f}, {np.median(update[1:]):.0f}",
            f"{1000 * np.median(per_timestep[1:]):.1f}",
            f"{steadiness:.2f}",
        )
        print(f"| {' | '.join(map(str, cells))} |")


def final_greedy(name: str) -> tuple[int, int]:
    """Successes and failures in the evaluations that ended a setting's seeds, together; a run under way has none."""
    last = [records[-1] for records in load(name).values() if records[-1].get(GREEDY) is not None]
    successes = sum(round(r[GREEDY] * r["eval/episodes_greedy"]) for r in last)
    return successes, sum(r["eval/episodes_greedy"] for r in last) - successes


def compare(base: str, *others: str) -> None:
    """Fisher's p of each setting's last evaluations against the base's, as if all episodes were independent."""
    for name in others:
        counts, reference = final_greedy(name), final_greedy(base)
        p = stats.fisher_exact([counts, reference]).pvalue
        print(
            f"greedy at the end: {name} {counts[0]} of {sum(counts)}, {base} {reference[0]} of {sum(reference)}, p {p:.2g}"
        )


def first_at(timesteps: np.ndarray, success: np.ndarray, level: float) -> str:
    reached = np.flatnonzero(success >= level)
    return f"{timesteps[reached[0]]:.0f}" if len(reached) else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"all unless named: {', '.join(FIGURES)}")
    figures = parser.parse_args().figures or list(FIGURES)
    unknown = set(figures) - set(FIGURES)
    if unknown:
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    for figure in figures:
        missing = [name for name in FIGURES[figure].values() if not load(name)]
        if missing:
            print(f"{figure}: no runs; python docs/experiments/run.py {' '.join(missing)}")
            continue
        draw(figure, FIGURES[figure])
        print(f"{figure}\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for label, name in FIGURES[figure].items():
            report(label, name)
        compare(*FIGURES[figure].values())


if __name__ == "__main__":
    main()
