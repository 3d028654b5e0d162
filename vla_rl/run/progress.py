"""What a person sees while a run goes on: one line an iteration, and what the bars of it say."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from vla_rl.run.logs import seconds_text
from vla_rl.run.section import Mode


@dataclass(frozen=True)
class FinishedEpisode:
    """A training episode that ended in the present rollout."""

    ret: float  # undiscounted return
    length: int  # simulator steps
    success: bool
    task_id: int = 0


def rollout_metrics(
    episodes: list[FinishedEpisode], env_steps: int, num_tasks: int = 1, dropped: int = 0
) -> dict[str, Any]:
    """rollout/* of the episodes that ended in this rollout; None if none did. With several tasks each one's, too.

    Args:
        dropped: episodes that were broken off by the loss of their simulator.
    """
    successes = [episode.success for episode in episodes]
    of_task: dict[int, list[bool]] = {}
    for episode in sorted(episodes, key=lambda episode: episode.task_id):
        of_task.setdefault(episode.task_id, []).append(episode.success)
    tasks = of_task if num_tasks > 1 else {}
    return {
        **{f"rollout/success_rate/task_{i}": float(np.mean(successes)) for i, successes in tasks.items()},
        **{f"rollout/episodes/task_{i}": len(successes) for i, successes in tasks.items()},
        "rollout/episodes": len(episodes),
        "rollout/episodes_dropped": dropped,
        "rollout/success_rate": float(np.mean(successes)) if episodes else None,
        "rollout/return": float(np.mean([episode.ret for episode in episodes])) if episodes else None,
        "rollout/length": float(np.mean([episode.length for episode in episodes])) if episodes else None,
        "rollout/env_steps": env_steps,
    }


def accumulate(totals: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    """Adds a micro-batch's share to the minibatch's metrics, in float64 on their device; an error keeps its maximum."""
    for key, value in metrics.items():
        value = value.detach().double()
        old = totals.get(key, torch.zeros_like(value))
        totals[key] = torch.maximum(old, value) if key.endswith("_error") else old + value


def to_numbers(totals: dict[str, Tensor]) -> dict[str, float]:
    """All at once: a GPU is waited for once a minibatch, not once a number."""
    return dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True)) if totals else {}


def update_metrics(minibatches: list[dict[str, float]], passes: list[dict[str, float]]) -> dict[str, float]:
    """actor/* and critic/* of an update: means over the minibatches, but of the first one, before any step, the invariants.

    Args:
        minibatches: metrics of each, of the first one actor/ratio_error, its mean and actor/approx_kl among them.
        passes: of the critic's further passes.
    """
    errors = ("actor/ratio_error", "actor/ratio_error_mean")  # the largest and the mean of the tokens'
    names = {name for metrics in minibatches for name in metrics}.difference(errors)
    means = {name: float(np.mean([m[name] for m in minibatches if name in m])) for name in sorted(names)}
    if passes:
        means["critic/passes_value_loss"] = float(np.mean([m["critic/value_loss"] for m in passes]))
    first = minibatches[0]
    return means | {
        "actor/first_minibatch_ratio_error": first["actor/ratio_error"],
        "actor/first_minibatch_ratio_error_mean": first["actor/ratio_error_mean"],
        "actor/first_minibatch_kl": first["actor/approx_kl"],
    }


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process held so far: on the GPU if it uses one, else resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux: KiB


class Pace:
    """How long a run will still take, if it goes on as it went since `begin`."""

    def __init__(self):
        self.begun: tuple[float, int] | None = None

    def begin(self, timesteps: int) -> None:
        self.begun = time.monotonic(), timesteps

    def left_s(self, timesteps: int, total: int) -> float | None:
        """Seconds; None before anything was done."""
        if self.begun is None or timesteps <= self.begun[1]:
            return None
        return (time.monotonic() - self.begun[0]) / (timesteps - self.begun[1]) * max(0, total - timesteps)


def episodes_text(episodes: list[FinishedEpisode]) -> str:
    if not episodes:
        return "eps=0"
    success = np.mean([episode.success for episode in episodes])
    length = np.mean([episode.length for episode in episodes])
    return f"eps={len(episodes)}, succ={success:.1%}, len={length:.0f}"


def update_text(metrics: dict[str, float]) -> str:
    names = {
        "pi": "actor/policy_loss",
        "v": "critic/value_loss",
        "|g_a|": "actor/grad_norm",
        "|g_c|": "critic/grad_norm",
    }
    return ", ".join(f"{label}={metrics[name]:.3g}" for label, name in names.items() if name in metrics)


def summary_line(
    iteration: int, timesteps: int, total: int, metrics: dict[str, Any], left_s: float | None = None
) -> str:
    """One line a tired person can read.

    Args:
        left_s: seconds that the run will still take; None: not known.
    """

    def number(name: str, form: str) -> str:
        value = metrics.get(name)
        return "-" if value is None else format(value, form)

    why = "no reward yet" if metrics.get("actor/waits_for_reward") else "critic warm-up"
    critic_only = f" | {why}: no actor step" if metrics.get("actor/optimizer_steps") == 0 else ""
    left = f" | {seconds_text(left_s)} left" if left_s else ""
    return (
        f"iteration {iteration} | {timesteps}/{total} steps | success {number('rollout/success_rate', '.1%')} of "
        f"{metrics['rollout/episodes']} | return {number('rollout/return', '.2f')} | "
        f"kl {number('actor/approx_kl', '.2e')} | clip {number('actor/clip_fraction', '.1%')} | "
        f"entropy {number('actor/entropy', '.2f')} | pi {number('actor/policy_loss', '.3g')} | "
        f"v {number('critic/value_loss', '.3g')} | ev {number('critic/explained_variance', '.2f')} | "
        f"rollout {metrics['time/rollout_s']:.1f} s, update {metrics['time/update_s']:.1f} s | "
        f"{metrics['system/peak_memory_gib']:.1f} GiB{left}{critic_only}"
    )


def evaluation_text(metrics: dict[str, Any]) -> str:
    """Success rates with their intervals, and how they were measured."""
    rates = success_text(metrics, {mode: f"{mode.replace('_', '-')} success" for mode in get_args(Mode)})
    sampled = f", temperature {metrics['eval/temperature']:g}" if "eval/temperature" in metrics else ""
    return f"{rates} (render {metrics['eval/render']}{sampled})"


def success_text(metrics: dict[str, Any], names: dict[str, str]) -> str:
    """ "greedy success 80.0% of 50 (95% interval 66.9% to 88.8%), ...".

    Args:
        names: mode -> what it is called; modes that were not measured are left out.
    """
    texts = []
    for mode, name in names.items():
        key = f"eval/success_rate_{mode}"
        if key in metrics:
            rate, low, high = metrics[key], metrics[f"{key}_low"], metrics[f"{key}_high"]
            count = metrics[f"eval/episodes_{mode}"]
            texts.append(f"{name} {rate:.1%} of {count} (95% interval {low:.1%} to {high:.1%})")
    return ", ".join(texts)
