"""What tests/bench/gpu_7b.py makes of its measurements: FLOPs, hours, the table, the time line. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vla_rl.model.prismatic import Prismatic
from vla_rl.run.settings import Config


@dataclass(frozen=True)
class Target:
    """What is wanted on an H100: at most or at least this, of the measured number or of its share of the ceiling."""

    limit: float
    at_least: bool = False
    of_ceiling: bool = False

    def text(self, unit: str) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{sign} {self.limit:.0%} of the ceiling" if self.of_ceiling else f"{sign} {self.limit:g} {unit}"

    def is_met(self, value: float, share: float | None) -> bool:
        got = share if self.of_ceiling else value
        return got is not None and (got >= self.limit if self.at_least else got <= self.limit)


TARGETS = {
    "forward, OFT, 16 rows": Target(0.58, at_least=True, of_ceiling=True),
    "forward, OFT, 32 rows": Target(0.62, at_least=True, of_ceiling=True),
    "forward, OFT, 1 row": Target(35),
    "act, OFT, 16 rows": Target(190),
    "update, the fastest within 76 GiB": Target(42, at_least=True),
    "update, the fastest within 24 GiB in all": Target(30, at_least=True),
    "vanilla, 7 tokens, 16 rows": Target(260),
    "vanilla, 7 tokens, 1 row": Target(110),
    "ratio error of the first minibatch, vanilla, mean": Target(0.005),
    "an iteration with its simulators (estimate)": Target(42),
    "1 M timesteps, evaluations included (estimate)": Target(1.9),
    "GPU idle in a rollout on LIBERO": Target(12),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    work: str
    value: float | None = None  # None: not measured, and the note says why
    unit: str = ""
    share: float | None = None  # of the ceiling
    note: str = ""
    compiled: str = "auto"


def table(rows: list[Row], compared: bool) -> str:
    """Markdown. Targets are an H100's: only there (or on an H200) is said whether they are met."""
    lines = ["| what | target | measured | of the ceiling | |", "|---|---|---|---|---|"]
    eager = {row.work: row.value for row in rows if row.compiled == "false" and row.value}
    for row in rows:
        target, text, note = TARGETS.get(row.work), "", row.note
        if target is not None:
            text = target.text(row.unit)
            if compared and row.value is not None:
                text += " met" if target.is_met(row.value, row.share) else " missed"
        if row.compiled == "true" and row.value and row.work in eager:
            ratio = eager[row.work] / row.value
            note += f"; {1 / ratio if row.unit.endswith('/s') else ratio:.2f} times as fast as eager"
        name = row.work + {"auto": "", "true": ", compiled", "false": ", eager"}[row.compiled]
        value = "-" if row.value is None else f"{row.value:.4g} {row.unit}".strip()
        share = "" if row.share is None else f"{row.share:.0%}"
        lines.append(f"| {name} | {text} | {value} | {share} | {note} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- figures


def forward_flops(network: Prismatic, tokens: int, images: int = 1) -> float:
    """FLOPs of one row's forward without LoRA and heads: 2 x weights x tokens in each linear layer that an action depends on,
    and attention's two products, 4 x tokens^2 x width a layer. (Kaplan et al. 2020, arXiv:2001.08361, table 1.)

    Args:
        network: before an adapter is put in; may be on the meta device.
        tokens: of the language model, all that it reads.
    """
    vision, llama = network.vision_backbone, network.llama
    parts = [("language_model.", tokens, 1, llama.num_hidden_layers, llama.hidden_size)]
    parts += [("projector.", vision.num_patches, images, 0, 0)]
    for name in ("featurizer", "fused_featurizer"):
        vit = getattr(vision, name)
        length = vision.num_patches + vit.num_prefix_tokens
        parts += [
            (f"vision_backbone.{name}.", length, images, len(vit.blocks) - 1, vit.embed_dim)
        ]  # the last is not read
    weights = {name: network.get_submodule(name).weight.numel() for name in network.adaptable_linears()}
    total = 0.0
    for prefix, length, count, layers, width in parts:
        linear = sum(size for name, size in weights.items() if name.startswith(prefix))
        total += count * (2 * linear * length + 4 * layers * length**2 * width)
    return total


def hours_per_million(iteration_s: float, evaluation_round_s: float, config: Config) -> float:
    """Hours of 1 M timesteps: iterations whose decisions all take their whole chunk, and evaluations at the start, each
    interval and the end in which every episode lasts to the suite's limit (a policy that never succeeds)."""
    rollout, chunk = config.rollout, config.policy.chunk_size
    iterations = 1e6 / (rollout.num_envs * rollout.n_steps * chunk)
    evaluations = 2 + (iterations // config.eval.interval if config.eval.interval else 0)
    episodes = len(config.eval.modes) * len(config.env.task_ids) * len(config.eval.states)
    rounds = episodes * math.ceil(config.max_episode_steps(evaluation=True) / chunk) / config.eval.num_envs
    return (iterations * iteration_s + evaluations * rounds * evaluation_round_s) / 3600


def union(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(start, end) pairs, merged where they overlap, in order."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def busy_share(intervals: list[tuple[float, float]], start: float, end: float) -> float:
    """Share of start..end that the intervals cover together."""
    covered = sum(max(0.0, min(b, end) - max(a, start)) for a, b in union(intervals))
    return covered / (end - start) if end > start else 0.0


def timeline(events: list[dict], width: int = 60) -> str:
    """The spans of a chrome trace in order of time, one a line, and below them when the GPU worked.

    Args:
        events: "ph" X, with "cat" user_annotation (spans of the host) or kernel, gpu_memcpy, gpu_memset; "ts", "dur" in us.
    """
    spans = [e for e in events if e.get("cat") == "user_annotation" and "#" not in e["name"]]  # # is torch's own
    spans.sort(key=lambda e: (e["ts"], -e["dur"]))
    gpu = gpu_intervals(events)
    start = spans[0]["ts"]
    end = max([e["ts"] + e["dur"] for e in spans] + [b for _, b in gpu])
    cell = (end - start) / width
    lines, open_until = [f"{'span':<28} {'start':>8} {'ms':>8}  GPU busy"], []
    for span in spans:
        open_until = [until for until in open_until if until > span["ts"]]  # of the spans that it is in
        name = "  " * len(open_until) + span["name"]
        open_until.append(span["ts"] + span["dur"])
        first = min(width - 1, int((span["ts"] - start) / cell))
        length = max(1, round(span["dur"] / cell))
        bar = (" " * first + "=" * length)[:width].ljust(width)
        busy = f"{busy_share(gpu, span['ts'], span['ts'] + span['dur']):>7.0%}" if gpu else "      -"
        lines.append(f"{name:<28} {(span['ts'] - start) / 1e3:8.1f} {span['dur'] / 1e3:8.1f} {busy}  |{bar}|")
    if gpu:
        shares = [busy_share(gpu, start + i * cell, start + (i + 1) * cell) for i in range(width)]
        bar = "".join(" .:#"[min(3, math.ceil(3 * share))] for share in shares)
        total = (end - start) / 1e3
        lines.append(f"{'GPU':<28} {0.0:8.1f} {total:8.1f} {busy_share(gpu, start, end):>7.0%}  |{bar}|")
    return "\n".join(lines)


def gpu_intervals(events: list[dict]) -> list[tuple[float, float]]:
    gpu = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return union([(e["ts"], e["ts"] + e["dur"]) for e in gpu])
