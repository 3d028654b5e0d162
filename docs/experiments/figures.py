"""Draws the figures of docs/experiments.md, and prints their numbers, from the metrics of the runs beside this file.

    python docs/experiments/figures.py            all figures
    python docs/experiments/figures.py ppo        one

runs/NAME_seedS.jsonl is the metrics.jsonl of a run, docs/experiments/run.py makes it. Thin lines are seeds: success of the last
WINDOW training episodes (sampled, random placements; fewer at the start). Thick lines are means over the seeds, with a 95 % t
interval from 3 seeds on. Crosses are the seeds' greedy evaluations over the fixed states. Of runs of several tasks a second
picture, FIGURE_tasks.png, has each task's last TASK_WINDOW episodes.

Sample efficiency is the timesteps to half and to 80 % of the way from the start, the success of all seeds' first iterations, to the
ceiling, which is 1, by the mean of the last WINDOW episodes; and, also where a seed does not get there, that mean's own mean over the
timesteps that all runs of the figure have.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from scipy import stats

from vla_rl.reports.curves import EPISODES, GREEDY, TRAINING, evaluations, success_of_last_episodes, t_half_width
from vla_rl.reports.drawing import draw_seeds
from vla_rl.reports.records import Records, read_metrics

HERE = Path(__file__).parent
WINDOW, TASK_WINDOW = 160, 40  # episodes

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
    "suite": {
        "GAE-PPO, dense": "suite_dense",
        "GAE-PPO, sparse": "suite_ppo",
        "GRPO, sparse": "suite_grpo",
    },
    "suite_grpo": {"GAE-PPO, dense": "suite_dense", "GRPO, sparse": "suite_grpo"},
    "task_6": {"GAE-PPO": "task_6_ppo", "GRPO": "task_6_grpo"},
    "long": {"GAE-PPO": "long_ppo", "GRPO": "long_grpo"},
    "noise": {
        "base": "noise_base",
        "16 environments": "noise_more",
        "steps by KL": "noise_kl",
        "cooled": "noise_cooled",
        "first actions": "noise_first_actions",
        "pairs": "noise_pairs",
    },
}

# also against minutes; beside the ablations the machine had more or less other work
TIMED = ("ppo", "grpo", "weak", "weak_grpo", "suite", "task_6", "long")


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


def draw_tasks(figure: str, runs: dict[str, str]) -> None:
    """A panel a task, against timesteps; nothing where the runs have one task."""
    tasks = sorted({int(task) for name in runs.values() for s in load(name).values() for task in tasks_of(s)})
    if len(tasks) < 2:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(5, len(tasks))
    shape = -(-len(tasks) // columns), columns
    canvas, axes = pyplot.subplots(*shape, figsize=(11, 2.1 * shape[0]), sharex=True, sharey=True, squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for label, name in runs.items():
            curves = [success_of_last_episodes(of_task(s, task), TASK_WINDOW) for s in load(name).values()]
            draw_seeds(axis, label, [(timesteps, success) for timesteps, _, success in curves])
        axis.set_title(f"task {task}", fontsize=9)
        axis.set(ylim=(-0.03, 1.03))
        axis.tick_params(labelsize=7)
    canvas.legend(
        *axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="upper center", ncols=len(runs), frameon=False
    )
    canvas.supxlabel("timesteps", fontsize=9)
    canvas.tight_layout(rect=(0, 0, 1, 0.95))
    canvas.savefig(HERE / f"{figure}_tasks.png", dpi=100)
    pyplot.close(canvas)


def tasks_of(records: Records) -> list[str]:
    prefix = f"{EPISODES}/task_"
    return [key.removeprefix(prefix) for key in {key for r in records for key in r} if key.startswith(prefix)]


def of_task(records: Records, task: int) -> Records:
    """The records with the success of a task's episodes in the place of all."""
    names = (EPISODES, TRAINING)
    return [r | {name: r.get(f"{name}/task_{task}") for name in names} for r in records]


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


def efficiency(runs: dict[str, str]) -> None:
    """Prints each method's sample efficiency: of each seed, then their mean."""
    curves = {label: [success_of_last_episodes(s, WINDOW) for s in load(name).values()] for label, name in runs.items()}
    first = [next(r for r in s if r.get(EPISODES)) for name in runs.values() for s in load(name).values()]
    start = np.average([r[TRAINING] for r in first], weights=[r[EPISODES] for r in first])
    common = min(timesteps[-1] for seeds in curves.values() for timesteps, _, _ in seeds)
    for label, seeds in curves.items():
        for share in (0.5, 0.8):
            level = start + share * (1 - start)
            reached = [first_at(timesteps, success, level) for timesteps, _, success in seeds]
            mean = "" if "-" in reached else mean_of_seeds([float(at) for at in reached], "{:.0f}")
            print(
                f"{label}: timesteps from {start:.0%} to {level:.0%}, {share:.0%} of the way: {', '.join(reached)}{mean}"
            )
        area = [np.interp(np.linspace(0, common, 1000), at, success).mean() for at, _, success in seeds]
        each = ", ".join(f"{a:.1%}" for a in area)
        print(f"{label}: mean success over the first {common:.0f} timesteps: {each}{mean_of_seeds(area, '{:.1%}')}")


def mean_of_seeds(values: list[float], form: str) -> str:
    """`; mean M` for two seeds or more, from three on with a 95 % t interval."""
    mean, half = np.mean(values), t_half_width(np.array(values))
    interval = f" ({form} to {form})".format(mean - half, mean + half) if len(values) > 2 else ""
    return f"; mean {form}{interval}".format(mean) if len(values) > 1 else ""


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
        runs = {label: name for label, name in FIGURES[figure].items() if name not in missing}
        if not runs:
            continue
        draw(figure, runs)
        draw_tasks(figure, runs)
        print(f"{figure}\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for label, name in runs.items():
            report(label, name)
        compare(*runs.values())
        efficiency(runs)


if __name__ == "__main__":
    main()
