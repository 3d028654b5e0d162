"""Draws the figures of docs/experiments.md, and prints their numbers, from the metrics of the runs beside this file.

    python docs/experiments/figures.py            all figures
    python docs/experiments/figures.py ppo        one

runs/NAME_seedS.jsonl is the metrics.jsonl of a run. Thin lines are seeds: success of the last WINDOW training episodes (sampled,
random placements; fewer at the start). Thick lines are means over the seeds, with a 95 % t interval from 3 seeds on. Dashed
lines with crosses are the seeds' greedy evaluations over the fixed states.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from scipy import stats

from vla_rl.metrics import read_metrics

HERE = Path(__file__).parent
WINDOW = 60  # episodes

# figure -> label -> runs NAME
FIGURES: dict[str, dict[str, str]] = {
    "ppo": {"GAE-PPO": "ppo"},
}


def seeds_of(name: str) -> list[Path]:
    return sorted((HERE / "runs").glob(f"{name}_seed*.jsonl"))


def success_curve(records: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Timesteps, seconds and success of the last WINDOW episodes after each iteration that ended one."""
    seconds, counts, rates, rows = 0.0, [], [], []
    for record in records:
        seconds += record.get("time/rollout_s", 0) + record.get("time/update_s", 0)
        if record.get("rollout/episodes"):
            counts.append(record["rollout/episodes"])
            rates.append(record["rollout/success_rate"])
            # whole iterations from the last one backwards, the oldest in part
            before = np.cumsum(counts[::-1]) - counts[::-1]
            weights = np.clip(WINDOW - before, 0, counts[::-1])
            rows.append((record["timesteps"], seconds, weights @ rates[::-1] / weights.sum()))
    return tuple(np.array(rows).T) if rows else (np.zeros(0), np.zeros(0), np.zeros(0))


def mean_and_interval(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean and half width of the 95 % t interval (0 with fewer than 3) of curves (x, y), where all of them are."""
    x = np.linspace(max(c[0][0] for c in curves), min(c[0][-1] for c in curves), 100)
    y = np.stack([np.interp(x, *curve) for curve in curves])
    n = len(curves)
    half = stats.t.ppf(0.975, n - 1) * y.std(axis=0, ddof=1) / np.sqrt(n) if n > 2 else np.zeros(len(x))
    return x, y.mean(axis=0), half


def first_above(x: np.ndarray, y: np.ndarray, level: float) -> float | None:
    reached = np.flatnonzero(y >= level)
    return float(x[reached[0]]) if len(reached) else None


def draw(figure: str, runs: dict[str, str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for label, name in runs.items():
        records = [read_metrics(path) for path in seeds_of(name)]
        if not records:
            print(f"{figure}: no runs {name}_seed*.jsonl")
            continue
        curves = [success_curve(r) for r in records]
        for axis, column, scale in zip(axes, (0, 1), (1, 60), strict=True):
            x, mean, half = mean_and_interval([(c[column] / scale, c[2]) for c in curves])
            (line,) = axis.plot(x, mean, linewidth=2.2, label=f"{label}, training episodes ({len(records)} seeds)")
            for curve in curves:
                axis.plot(curve[column] / scale, curve[2], linewidth=0.8, alpha=0.5, color=line.get_color())
            axis.fill_between(
                x, np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1), alpha=0.15, color=line.get_color()
            )
        for number, record in enumerate(records):
            points = [r for r in record if r.get("eval/success_rate_greedy") is not None]
            x, y = ([r[name] for r in points] for name in ("timesteps", "eval/success_rate_greedy"))
            note = f"{label}, greedy on fixed states" if number == 0 else None
            axes[0].plot(x, y, "x--", linewidth=0.8, markersize=5, color=line.get_color(), label=note)
        report(label, records, curves)
    for axis, text in zip(axes, ("timesteps", "minutes (rollouts and updates)"), strict=True):
        axis.set_xlabel(text)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("success")
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].legend(fontsize=8, loc="lower right")
    canvas.tight_layout()
    canvas.savefig(HERE / f"{figure}.png", dpi=100)
    pyplot.close(canvas)


def report(label: str, records: list[list[dict]], curves: list[tuple[np.ndarray, ...]]) -> None:
    """One line of a Markdown table a seed."""
    for number, (run, curve) in enumerate(zip(records, curves, strict=True)):
        greedy = [r["eval/success_rate_greedy"] for r in run if r.get("eval/success_rate_greedy") is not None]
        sampled = [r["eval/success_rate_sampled"] for r in run if r.get("eval/success_rate_sampled") is not None]
        reached = first_above(curve[0], curve[2], 0.8)
        print(
            f"| {label} | {number} | {run[-1]['timesteps']} | {curve[1][-1] / 60:.0f} min | "
            f"{' '.join(f'{v:.0%}' for v in greedy)} | {' '.join(f'{v:.0%}' for v in sampled)} | {curve[2][-1]:.0%} | "
            f"{'-' if reached is None else f'{reached:.0f}'} |"
        )


def main() -> None:
    wanted = sys.argv[1:] or list(FIGURES)
    print("| | seed | timesteps | time | greedy | sampled | last 60 training episodes | timesteps to 80 % |")
    print("|---|---|---|---|---|---|---|---|")
    for figure in wanted:
        draw(figure, FIGURES[figure])


if __name__ == "__main__":
    main()
