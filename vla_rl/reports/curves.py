"""The numbers behind the curves of runs: which metrics share a panel, smoothing, axis limits, means over seeds.

Not here: the drawing (vla_rl.reports.drawing). n points of a curve; all arrays are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from vla_rl.reports.records import Records
from vla_rl.run.section import Mode

EPISODES = "rollout/episodes"  # how many a training success rate is of
TRAINING = "rollout/success_rate"
GREEDY = "eval/success_rate_greedy"
EVALUATED = {f"{mode.replace('_', '-')} success": f"eval/success_rate_{mode}" for mode in get_args(Mode)}
L1_HEAD = "eval/success_rate_l1"  # of a warm start
OF_EPISODES = (TRAINING, "rollout/return", "rollout/length")  # means over the episodes of an iteration
MEASURED = ("eval/", "validation/")  # points of their own, far apart: no means of neighbours unless there are many
MANY = 60  # points


@dataclass(frozen=True)
class Panel:
    """Metrics that share an axis.

    Args:
        span: the axis shows at least this much, in the metrics' unit (decades if log): what is less is noise.
        bounds: the axis shows no more than this; None: no end.
        zero: the axis begins at 0.
        log: the axis is logarithmic; what is not above 0 is left out.
        noisy: neighbours are averaged.
    """

    title: str
    names: tuple[str, ...]
    span: float = 0.0
    bounds: tuple[float | None, float | None] = (None, None)
    zero: bool = False
    log: bool = False
    noisy: bool = True


# what the lines of a run count -> its panels
PANELS: dict[str, tuple[Panel, ...]] = {
    "timesteps": (
        Panel("success rate", (TRAINING, *EVALUATED.values()), span=1, bounds=(0, 1)),
        Panel("return", ("rollout/return",), span=0.5),
        Panel("episode length (simulator steps)", ("rollout/length",), span=20),
        Panel("policy loss", ("actor/policy_loss",), span=0.02),
        Panel("approximate KL of the update", ("actor/approx_kl",), span=0.002, zero=True),
        Panel("clip fraction", ("actor/clip_fraction",), span=0.05, zero=True),
        Panel("entropy (nats)", ("actor/entropy",), span=0.2),
        Panel("gradient norm", ("actor/grad_norm", "critic/grad_norm"), span=2, log=True),
        Panel("value loss", ("critic/value_loss",), span=0.02, zero=True),
        # far below 0 it says no more than below 0
        Panel("explained variance", ("critic/explained_variance",), span=0.5, bounds=(-1, 1)),
        Panel("learning rate", ("actor/learning_rate",), zero=True, noisy=False),
        Panel("simulator steps per second", ("rollout/env_steps_per_s",), zero=True),
        Panel("seconds per iteration", ("time/rollout_s", "time/update_s"), zero=True),
        Panel("peak memory (GiB)", ("system/peak_memory_gib",), zero=True, noisy=False),
    ),
    "step": (  # supervised fine-tuning and warm starts
        Panel("success rate", (TRAINING, L1_HEAD, *EVALUATED.values()), span=1, bounds=(0, 1)),
        Panel("decisions of the token head", ("warmstart/token_share",), span=1, bounds=(0, 1), noisy=False),
        Panel("loss (nats a token)", ("sft/loss", "validation/loss", "warmstart/loss"), span=0.1),
        Panel("token accuracy", ("validation/token_accuracy",), span=0.2, bounds=(0, 1)),
        Panel("L1 of normalised actions", ("validation/l1",), span=0.05, zero=True),
        Panel("gripper accuracy", ("validation/gripper_accuracy",), span=0.1, bounds=(0, 1)),
        Panel("value loss", ("validation/value_loss",), span=0.02, zero=True),
        Panel("gradient norm", ("sft/grad_norm", "warmstart/grad_norm"), span=2, log=True),
        Panel("learning rate", ("sft/learning_rate", "warmstart/learning_rate"), zero=True, noisy=False),
        Panel("samples per second", ("sft/samples_per_s",), zero=True),
        Panel("peak memory (GiB)", ("system/peak_memory_gib",), zero=True, noisy=False),
    ),
}


@dataclass(frozen=True)
class Curve:
    """One metric of a run, where it has values."""

    name: str
    x: np.ndarray  # [n]
    y: np.ndarray  # [n], as logged
    smooth: np.ndarray  # [n]
    band: tuple[np.ndarray, np.ndarray] | None  # [n] each: the intervals of evaluations, smoothed likewise


@dataclass(frozen=True)
class DrawnPanel:
    """A panel with its curves and the ends of its axis, in the metrics' unit."""

    panel: Panel
    curves: list[Curve]
    low: float
    high: float


def fill(panel: Panel, records: Records, x_name: str) -> DrawnPanel | None:
    """The panel of a run; None if the run has none of its metrics."""
    points = {
        name: [r for r in records if r.get(name) is not None and (not panel.log or r[name] > 0)] for name in panel.names
    }
    points = {name: rows for name, rows in points.items() if rows}
    if not points:
        return None
    values = np.array([r[name] for name, rows in points.items() for r in rows], dtype=float)
    low, high = limits(np.log10(values) if panel.log else values, panel)
    if panel.log:
        low, high = 10**low, 10**high
    return DrawnPanel(panel, [curve(rows, name, x_name, panel, low, high) for name, rows in points.items()], low, high)


def curve(points: Records, name: str, x_name: str, panel: Panel, low: float, high: float) -> Curve:
    """A metric over the records that have it. An outlier counts in the means of its neighbours as the end of the axis."""
    x, y = (np.array([r[key] for r in points], dtype=float) for key in (x_name, name))
    weights = np.array([r.get(EPISODES) or 1 for r in points], dtype=float) if name in OF_EPISODES else np.ones(len(x))
    few = name.startswith(MEASURED) and len(x) <= MANY
    half = half_width(len(x)) if panel.noisy and not few else 0

    def smooth(values: np.ndarray) -> np.ndarray:
        if half == 0:
            return values
        values = np.clip(values, low, high)
        return (
            np.exp(windowed_mean(np.log(values), weights, half)) if panel.log else windowed_mean(values, weights, half)
        )

    band = None
    if all(r.get(f"{name}_{end}") is not None for r in points for end in ("low", "high")):
        band = tuple(smooth(np.array([r[f"{name}_{end}"] for r in points], dtype=float)) for end in ("low", "high"))
    return Curve(name, x, y, smooth(y), band)


def half_width(n: int) -> int:
    """Points on each side that a smoothed point is the mean of: 0 of 2 points, 2 of 30, 22 of 2,000."""
    return int(np.sqrt(n) / 2)


def windowed_mean(y: np.ndarray, weights: np.ndarray, half: int) -> np.ndarray:
    """sum(w y) / sum(w) over up to `half` points on each side, fewer at the ends. y, weights [n], weights above 0."""
    window = np.ones(2 * half + 1)
    total, weight = (np.convolve(values, window)[half : half + len(y)] for values in (weights * y, weights))
    return total / weight


def limits(values: np.ndarray, panel: Panel) -> tuple[float, float]:
    """The axis of a panel: all values but outliers, at least panel.span, within panel.bounds, with a margin of 5 %.

    What is further from the middle 80 % than they are wide is an outlier, and cut: one peak would flatten the rest.

    Args:
        values: of all curves of the panel, [n], n >= 1; logarithms (base 10) if panel.log.
    """
    tenth, ninetieth = np.percentile(values, (10, 90))
    width = ninetieth - tenth
    low = max(values.min(), tenth - width)
    high = min(values.max(), ninetieth + width)
    low, high = (min(low, 0.0), max(high, 0.0)) if panel.zero else (low, high)
    missing = panel.span - (high - low)
    if missing > 0:
        low, high = (low, high + missing) if panel.zero else (low - missing / 2, high + missing / 2)
    lowest, highest = (
        end if end is not None else sign * np.inf for end, sign in zip(panel.bounds, (-1, 1), strict=True)
    )
    if low < lowest:
        low, high = lowest, max(high, lowest + panel.span)
    if high > highest:
        low, high = max(lowest, min(low, highest - panel.span)), highest
    if high <= low:  # all values are one, and no span
        low, high = low - (0.0 if panel.zero else 0.5), low + (1.0 if panel.zero else 0.5)
    margin = 0.05 * (high - low)
    return (low if panel.zero and low == 0 else low - margin), high + margin


# ----------------------------------------------------------------------------------------------------------------- seeds


def success_of_last_episodes(records: Records, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Timesteps, minutes and success of the last `window` training episodes (fewer at the start) after each iteration that
    ended one; minutes are of rollouts and updates."""
    minutes = minutes_of(records)
    counts, rates, rows = [], [], []
    for record, minute in zip(records, minutes, strict=True):
        if record.get(EPISODES) and record.get(TRAINING) is not None:
            counts.append(record[EPISODES])
            rates.append(record[TRAINING])
            rows.append((record["timesteps"], minute, rate_of_last(counts, rates, window)[0]))
    return tuple(np.array(rows).T) if rows else (np.zeros(0), np.zeros(0), np.zeros(0))


def success_of_task(records: Records, task: int, window: int) -> tuple[float, int] | None:
    """Success of the last `window` training episodes (fewer at the start) of a task, and how many; None: none ended."""
    episodes, success = f"{EPISODES}/task_{task}", f"{TRAINING}/task_{task}"
    known = [r for r in records if r.get(episodes) and r.get(success) is not None]
    return rate_of_last([r[episodes] for r in known], [r[success] for r in known], window) if known else None


def rate_of_last(counts: Sequence[int], rates: Sequence[float], window: int) -> tuple[float, int]:
    """Rate of the last `window` episodes, and how many there were: of whole iterations from the last one backwards, of the
    oldest in part.

    Args:
        counts: episodes of each iteration, above 0.
        rates: their success.
    """
    before = np.cumsum(counts[::-1]) - counts[::-1]
    weights = np.clip(window - before, 0, counts[::-1])
    return float(weights @ rates[::-1] / weights.sum()), int(weights.sum())


def evaluations(records: Records, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Timesteps, minutes (of rollouts and updates) and value of each evaluation."""
    rows = [
        (r["timesteps"], minute, r[name])
        for r, minute in zip(records, minutes_of(records), strict=True)
        if r.get(name) is not None
    ]
    return tuple(np.array(rows).T) if rows else (np.zeros(0), np.zeros(0), np.zeros(0))


def minutes_of(records: Records) -> np.ndarray:
    """[n] minutes of rollouts and updates until each record."""
    seconds = [(r.get("time/rollout_s") or 0) + (r.get("time/update_s") or 0) for r in records]
    return np.cumsum(seconds) / 60


def mean_and_interval(
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean and half width of the 95 % t interval (0 with fewer than 3) of curves (x, y), where all of them are.

    Three empty arrays where they have no part in common.
    """
    first, last = max(c[0][0] for c in curves), min(c[0][-1] for c in curves)
    if first > last:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    x = np.linspace(first, last, 100)
    y = np.stack([np.interp(x, *curve) for curve in curves])
    return x, y.mean(axis=0), t_half_width(y)


def t_half_width(y: np.ndarray) -> np.ndarray:
    """Half width of the 95 % t interval of the mean over seeds, axis 0 [S, ...]; 0 with fewer than 3 seeds."""
    from scipy import stats  # a second to import

    n = len(y)
    if n < 3:
        return np.zeros(y.shape[1:])
    return stats.t.ppf(0.975, n - 1) * y.std(axis=0, ddof=1) / np.sqrt(n)
