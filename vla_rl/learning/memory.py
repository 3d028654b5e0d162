"""What fits the card: found before the training from a few passes of the trainer's own, so that its memory is used and suffices.

Sets how many rows a forward of the update has and what it recomputes, where the settings leave that to the program (auto), and
refuses settings that do not fit with those that do. Not here: what happens when memory runs out all the same
(vla_rl.learning.micro_batches).

Memory is in bytes, in texts in GiB (2^30).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from vla_rl.learning.episodes import EpisodeQueue, reset_finished
from vla_rl.learning.micro_batches import (
    MODES,
    SIZES,
    SMALLER_MODEL,
    Choice,
    MicroBatches,
    fewer_rows,
    rows_of_a_decision,
)
from vla_rl.learning.rollout_buffer import Minibatch
from vla_rl.model.value_head import ValueHead
from vla_rl.run.distributed import Ranks
from vla_rl.run.failures import is_out_of_memory
from vla_rl.run.settings import Config, ConfigError
from vla_rl.types import Episode, Observation, Policy, PolicyOutput

log = logging.getLogger(__name__)

# A mode is taken if this many rows fit. OpenVLA-7B on an H100, LoRA in bfloat16, compiled: 16 and 24 rows without
# checkpointing run at 30 and 39 rows/s, 16 and 32 in full at 21 and 27; not compiled, 8 without any at 15, 64 in full at 23
ENOUGH_ROWS = 16
PROBED_ROWS = (4, 8)  # two points make a line; what is larger costs more time, what is smaller tells less
FRAGMENTATION = 0.05  # of the card: what the allocator cannot use
MOMENT_BYTES = 8  # of AdamW, a trained parameter: two float32


# ----------------------------------------------------------------------------------------------------------- the choice


@dataclass(frozen=True)
class Card:
    """Memory of the card that this run can have."""

    available: int  # what it has and what is free
    reserved: int  # of it, for what comes later: moments
    simulators: int = 0  # besides

    @property
    def usable(self) -> int:
        return self.available - self.reserved

    @property
    def comfortable(self) -> int:
        """With room for what the allocator cannot use."""
        return self.usable - int(FRAGMENTATION * self.available)


def fit_line(peaks: Mapping[int, int], at_rest: float = 0) -> tuple[float, float]:
    """(base, slope) of bytes = base + slope x rows, by least squares.

    Args:
        peaks: rows -> bytes.
        at_rest: bytes without any pass, the base if there is one point.
    """
    if len(peaks) == 1:
        ((rows, peak),) = peaks.items()
        return float(at_rest), (peak - at_rest) / rows
    slope, base = np.polyfit(list(peaks), list(peaks.values()), 1)
    return float(base), max(float(slope), 1.0)


def rows_within(line: tuple[float, float], limit: float) -> int:
    """The most rows whose memory by the line is at most `limit`."""
    base, slope = line
    return max(0, int((limit - base) // slope))


def automatic_sizes(minibatch_size: int) -> tuple[int, ...]:
    """Rows to choose from: at most a minibatch, and the whole of a small one."""
    return tuple(sorted({*(size for size in SIZES if size < minibatch_size), min(minibatch_size, SIZES[-1])}))


def enough_rows(sizes: Sequence[int]) -> int:
    """With how many of these a mode is taken: 16, or the next below, or all that there is."""
    return max((size for size in sizes if size <= ENOUGH_ROWS), default=min(sizes))


def choose(most: Mapping[str, int], sizes: Sequence[int], minibatch_size: int) -> Choice | None:
    """The first mode in which enough rows fit, else that in which most do; and rows for as few forwards as can be.

    Of sizes that need as many forwards the smallest, which divides the minibatch most evenly: 64 rows of which 60 fit are
    two forwards of 32.

    Args:
        most: rows that fit in each mode, in the order of MODES.
        sizes: rows to choose from.

    Returns:
        None if not even the smallest size fits.
    """
    largest = {mode: max((size for size in sizes if size <= rows), default=0) for mode, rows in most.items()}
    enough = enough_rows(sizes)
    mode = next((mode for mode, rows in largest.items() if rows >= enough), max(largest, key=largest.get))
    if largest[mode] == 0:
        return None
    forwards = -(-minibatch_size // largest[mode])
    return Choice(mode, min(s for s in sizes if s <= largest[mode] and -(-minibatch_size // s) == forwards))


class Probe:
    """What fits, by as few measurements as tell it; each is made once.

    Args:
        measure: (mode, rows) -> peak bytes of a gradient pass, None if memory ran out.
        modes: to choose from, in the order of MODES.
        sizes: rows to choose from.
        at_rest: bytes of the model alone.
    """

    def __init__(
        self,
        measure: Callable[[str, int], int | None],
        modes: Sequence[str],
        sizes: Sequence[int],
        minibatch_size: int,
        at_rest: int,
    ):
        self.measure, self.modes, self.sizes = measure, modes, sizes
        self.minibatch_size, self.at_rest = minibatch_size, at_rest
        self.peaks: dict[str, dict[int, int | None]] = {mode: {} for mode in MODES}

    def peak(self, mode: str, rows: int) -> int | None:
        if rows not in self.peaks[mode]:
            self.peaks[mode][rows] = self.measure(mode, rows)
        return self.peaks[mode][rows]

    def fits(self, choice: Choice, limit: float) -> bool:
        peak = self.peak(choice.mode, choice.rows)
        return peak is not None and peak <= limit

    def line(self, mode: str) -> tuple[float, float] | None:
        """Through what was measured so far; None if nothing fitted."""
        peaks = {rows: peak for rows, peak in self.peaks[mode].items() if peak is not None}
        return fit_line(peaks, self.at_rest) if peaks else None

    def most_rows(self, mode: str, limit: float, thorough: bool) -> int:
        """Rows that fit by the line, fewer than any that did not.

        Args:
            thorough: also measure whether a few rows fit.
        """
        few, more = PROBED_ROWS
        if self.peak(mode, few) is not None:
            self.peak(mode, more)
        elif thorough and self.peak(mode, 2) is None:
            self.peak(mode, 1)
        line = self.line(mode)
        too_many = [rows for rows, peak in self.peaks[mode].items() if peak is None or peak > limit]
        return min([0 if line is None else rows_within(line, limit), *(rows - 1 for rows in too_many)])

    def choose(self, limit: float) -> Choice | None:
        """What runs within `limit`, confirmed by running it; None if nothing does."""
        if len(self.modes) == len(self.sizes) == 1:  # both are given
            choice = Choice(self.modes[0], self.sizes[0])
            return choice if self.fits(choice, limit) else None
        while True:
            most: dict[str, int] = {}
            for mode in self.modes:
                most[mode] = self.most_rows(mode, limit, thorough=mode == self.modes[-1])
                if most[mode] >= enough_rows(self.sizes):
                    break
            choice = choose(most, self.sizes, self.minibatch_size)
            if choice is None or self.fits(choice, limit):
                return choice
            # now it is among what does not fit, so fewer rows are

    def explain(self) -> str:
        """The lines that were found, such as "none 14.6 + 3.51 GiB a row"."""
        lines = {mode: self.line(mode) for mode in MODES if len(self.peaks[mode]) > 1}
        texts = {
            m: "too much" if line is None else f"{gib(line[0])} + {line[1] / 2**30:.2f}" for m, line in lines.items()
        }
        return f" ({', '.join(f'{mode} {text}' for mode, text in texts.items())} GiB a row)" if texts else ""


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def too_small(probe: Probe, card: Card, asked: Choice) -> ConfigError:
    """What a card that does not fit the settings is refused with: what they need, what there is, what would fit.

    Args:
        asked: the settings; of auto the smallest.
    """
    ways = []
    for mode in MODES[MODES.index(asked.mode) :]:
        most = min(asked.rows, probe.most_rows(mode, card.usable, thorough=True))
        rows = max((size for size in {*SIZES, asked.rows} if size <= most), default=0)
        if rows > 0:
            mode_text = f"policy.gradient_checkpointing={mode}" if mode != asked.mode else ""
            rows_text = f"algorithm.micro_batch_size={rows}" if rows != asked.rows else ""
            ways.append(" with ".join(filter(None, [mode_text, rows_text])))
    line, peak = probe.line(asked.mode), probe.peaks[asked.mode].get(asked.rows)
    need = peak if peak is not None else None if line is None else line[0] + line[1] * asked.rows
    # a line may say less than there is of what did in fact not fit
    need = f"{gib(need + card.reserved)} GiB" if need is not None and need > card.usable else "more than there is"
    there = f"the card has {gib(card.available)} GiB for it besides the simulators' {gib(card.simulators)} (nvidia-smi shows all)"
    if ways:
        return ConfigError(f"{asked} needs {need}; {there}; what fits: {', or '.join([*ways, 'auto for both'])}")
    return ConfigError(
        f"not one row of the update fits: with full checkpointing it needs {need}, {gib(probe.at_rest)} GiB of it the model alone; "
        f"{there}; take fewer rollout.num_envs and eval.num_envs, {SMALLER_MODEL}"
    )


# --------------------------------------------------------------------------------------------------- before the training


class Trainer(Protocol):
    """What of OpenVLA_PPO.OpenVLAPPO is measured."""

    config: Config
    own_config: Config
    ranks: Ranks
    policy: Policy
    value_head: ValueHead | None
    envs: VectorEnv
    eval_envs: VectorEnv | None
    device: torch.device
    obs: Observation | None
    actor_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer | None
    micro_batches: MicroBatches

    def minibatch_gradients(self, minibatch: Minibatch, train_actor: bool, score_actor: bool) -> dict[str, float]: ...


class Meter:
    """The trainer's own passes, and the most memory that torch held in them. Leaves no trace in the trainer.

    Args:
        instructions: of the run's tasks.
    """

    def __init__(self, trainer: Trainer, instructions: Sequence[str]):
        self.trainer = trainer
        self.instruction = max(instructions, key=len)
        self.seen: Observation | None = None
        self.decided: PolicyOutput | None = None

    def start_simulators(self) -> None:
        """Builds those of training and evaluation, unless they are there: they too have memory of the card, 0.3 to 0.4 GiB each
        by the size of their textures. The episodes that start are not the run's, which starts its own.
        """
        trainer, tasks = self.trainer, self.trainer.config.env.task_ids
        self.seen = trainer.obs
        for envs in filter(None, (trainer.eval_envs, trainer.envs if trainer.obs is None else None)):
            episodes = EpisodeQueue(Episode(tasks[i % len(tasks)], None, seed=0) for i in range(envs.num_envs))
            shown, _ = reset_finished(envs, np.ones(envs.num_envs, dtype=bool), episodes)
            self.seen = shown if envs is trainer.envs else self.seen

    def available(self) -> int:
        """Bytes that torch can have: what tensors have now and what is free. Not the memory of CUDA graphs, which keep it."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.trainer.device)[0] + self.at_rest()

    def at_rest(self) -> int:
        return torch.cuda.memory_allocated(self.trainer.device)

    def peak_of(self, run: Callable[[], None]) -> int | None:
        """Peak bytes while it runs; None if memory runs out."""
        device = self.trainer.device
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            run()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            gc.collect()  # of a failed pass
        return torch.cuda.max_memory_allocated(device)

    def acting(self, rows: int) -> int | None:
        """Of a rollout's forward and of its bootstrap values'."""
        return self.peak_of(lambda: self.act(rows))

    def gradients(self, mode: str, rows: int) -> int | None:
        """Of a minibatch's backward passes with micro-batches of so many rows."""
        trainer, before = self.trainer, self.trainer.micro_batches.choice
        trainer.micro_batches.use(Choice(mode, rows))
        try:
            return self.peak_of(lambda: self.accumulate(rows))
        finally:
            trainer.micro_batches.use(before)
            for optimizer in filter(None, (trainer.actor_optimizer, trainer.critic_optimizer)):
                optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def act(self, rows: int) -> None:
        policy, seen = self.trainer.policy, self.seen
        assert seen is not None, "start_simulators comes first: what they show is acted on"
        observation = replace(seen.rows([i % len(seen) for i in range(rows)]), instructions=(self.instruction,) * rows)
        temperature = self.trainer.config.rollout.temperature
        generator = torch.Generator().manual_seed(0)  # not the run's
        self.decided = policy.act(observation, temperature=temperature, generator=generator)
        policy.compute_hidden(self.decided.inputs)

    def accumulate(self, rows: int) -> None:
        """Two micro-batches: the second meets the gradients of the first."""
        trainer, decided = self.trainer, self.decided
        assert decided is not None, "act comes first: its rows are scored"
        count = min(2 * rows, max(rows, trainer.own_config.algorithm.minibatch_size))
        index = torch.arange(count) % len(decided.inputs)
        minibatch = Minibatch(
            inputs=decided.inputs.rows(index.tolist()),
            action_tokens=decided.action_tokens[index],
            old_logprobs=decided.logprobs[index],
            hidden=torch.zeros(count, trainer.policy.hidden_size),
            steps=torch.full((count,), trainer.policy.chunk_size),
            advantages=torch.zeros(count),
            returns=torch.zeros(count) if trainer.value_head is not None else None,
            reference_logprobs=decided.logprobs[index] if trainer.config.algorithm.kl_coef > 0 else None,
        )
        trainer.minibatch_gradients(minibatch, train_actor=True, score_actor=True)


def fit_to_card(trainer: Trainer, instructions: Sequence[str], meter: Meter | None = None) -> None:
    """Measures what fits and sets the trainer's micro_batches so, of what is auto; checks what is not. On a GPU only.

    Nothing else of the trainer changes, no random state either.

    Args:
        instructions: of the run's tasks; the longest is measured.
        meter: None: the card's.

    Raises:
        ConfigError: the settings, or anything at all, do not fit; says what does.
    """
    if meter is None and trainer.device.type != "cuda":
        return
    meter = Meter(trainer, instructions) if meter is None else meter
    config = trainer.own_config
    with torch.random.fork_rng([trainer.device] if trainer.device.type == "cuda" else []):
        free = meter.available()
        meter.start_simulators()
        simulators, reserved = free - meter.available(), moment_bytes(trainer)
        check_acting(meter, Card(meter.available(), reserved).usable, trainer)
        card = Card(meter.available(), reserved, simulators)  # without what acting keeps
        modes, sizes = MODES, automatic_sizes(config.algorithm.minibatch_size)
        if config.policy.gradient_checkpointing != "auto":
            modes = (trainer.policy.gradient_checkpointing,)
        if config.algorithm.micro_batch_size != "auto":
            sizes = (config.algorithm.micro_batch_size,)
        probe = Probe(meter.gradients, modes, sizes, config.algorithm.minibatch_size, meter.at_rest())
        choice = probe.choose(card.comfortable) or probe.choose(card.usable)
        if choice is None:
            raise too_small(probe, card, Choice(modes[-1], min(sizes)))
    choices = trainer.ranks.gather(choice)  # all processes as the one with the least room
    choice = Choice(max((c.mode for c in choices), key=MODES.index), min(c.rows for c in choices))
    trainer.micro_batches.use(choice)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)  # system/peak_memory_gib is the training's
    log.info(
        "%s: %s GiB at the most of %s; %s more are for AdamW's moments, the simulators have %s%s",
        *(choice, gib(probe.peak(choice.mode, choice.rows)), gib(card.usable), gib(reserved), gib(simulators)),
        probe.explain(),
    )


def moment_bytes(trainer: Trainer) -> int:
    """What the optimizers will have after their first steps and do not have yet."""
    optimizers = filter(None, (trainer.actor_optimizer, trainer.critic_optimizer))
    parameters = [(o, p) for o in optimizers for group in o.param_groups for p in group["params"]]
    return MOMENT_BYTES * sum(p.numel() for optimizer, p in parameters if p not in optimizer.state)


def check_acting(meter: Meter, limit: float, trainer: Trainer) -> None:
    """Raises ConfigError if a forward of all environments does not fit, with the number that does."""
    wanted_rows = {"rollout": rows_of_a_decision(trainer.own_config, "rollout")}
    if trainer.eval_envs is not None:
        wanted_rows["eval"] = trainer.eval_envs.num_envs
    # the largest first: CUDA graphs of fewer rows use its memory
    for section, wanted in sorted(wanted_rows.items(), key=lambda item: -item[1]):
        rows = wanted
        while rows > 0 and ((peak := meter.acting(rows)) is None or peak > limit):
            rows //= 2
        if rows == wanted:
            continue
        if rows == 0:
            raise ConfigError(f"one row of a forward without gradients does not fit the card; take {SMALLER_MODEL}")
        raise ConfigError(
            f"{section}.num_envs={getattr(trainer.config, section).num_envs}: {wanted} rows in one forward do not fit the card, "
            f"{rows} do; set {fewer_rows(trainer.config, section, rows, trainer.ranks.size)}"
        )


def check_weights(weights: int, free: int, total: int, dtype: str) -> None:
    """Before the weights are loaded. Raises ConfigError if their bytes in policy.dtype are more than the card has free."""
    if weights > free:
        half = "policy.dtype=bfloat16, " if dtype == "float32" else ""
        raise ConfigError(
            f"the checkpoint's weights take {gib(weights)} GiB in {dtype}, and {gib(free)} GiB of the card's {gib(total)} are free "
            f"(nvidia-smi shows what uses it); take {half}policy.quantization=nf4 or a larger card"
        )
