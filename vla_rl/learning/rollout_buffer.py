"""What a rollout leaves for the update: one row per decision of each playing environment, and minibatches of the rows.

T decisions, N playing environments (all of them under PPO; under GRPO fewer once the queue of episodes is empty),
A action tokens, D hidden size, R rows of the rollout, B rows of a minibatch. Row (t, n) of every field belongs to decision
t of environment n. Tensors stay on the CPU, images as uint8; a minibatch is copied to the GPU when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest

import torch
from torch import Tensor

from vla_rl.run.distributed import Ranks
from vla_rl.types import PolicyInputs, PolicyOutput, to_device


@dataclass(frozen=True)
class Decision:
    """What the policy chose for the environments that play."""

    envs: list[int]  # N
    output: PolicyOutput
    hidden: Tensor  # float32 [N, D]
    values: Tensor  # float32 [N]

    def transition(
        self,
        rewards: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        steps: Tensor,
        episode: Sequence[int],
        broken: Tensor | None = None,
    ) -> Transition:
        """With what came of it, each [N] in the order of `envs`."""
        broken = torch.zeros(len(self.envs), dtype=torch.bool) if broken is None else broken
        return Transition(
            inputs=self.output.inputs,
            action_tokens=self.output.action_tokens,
            logprobs=self.output.logprobs,
            hidden=self.hidden,
            values=self.values,
            rewards=rewards.float(),
            terminated=terminated,
            truncated=truncated,
            steps=steps,
            episode=torch.tensor(episode),
            broken=broken,
        )


@dataclass(frozen=True)
class Transition:
    """One decision of all environments."""

    inputs: PolicyInputs  # N rows
    action_tokens: Tensor  # int64 [N, A]
    logprobs: Tensor  # float32 [N, A], at the time of acting; never overwritten
    hidden: Tensor  # float32 [N, D], cached: values and the critic's warm-up need no second forward
    values: Tensor  # float32 [N]
    rewards: Tensor  # float32 [N]
    terminated: Tensor  # bool [N]
    truncated: Tensor  # bool [N]
    steps: Tensor  # int64 [N], simulator steps that were executed, 0..C
    episode: Tensor  # int64 [N], index in the queue of episodes (grpo); -1 where episodes are endless (gae)
    broken: Tensor  # bool [N], the episode was broken off by the loss of its simulator

    @staticmethod
    def join(parts: Sequence[Transition]) -> Transition:
        """The environments of all parts."""
        if len(parts) == 1:
            return parts[0]
        values = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Transition)}
        inputs = PolicyInputs.concatenate(values.pop("inputs"))
        return Transition(inputs=inputs, **{name: torch.cat(tensors) for name, tensors in values.items()})

    def rows(self, kept: Tensor) -> Transition:
        """kept: bool [N]."""
        values = {field.name: getattr(self, field.name) for field in fields(Transition)}
        inputs = values.pop("inputs").rows(kept.nonzero().flatten().tolist())
        return Transition(inputs=inputs, **{name: tensor[kept] for name, tensor in values.items()})


@dataclass(frozen=True)
class Minibatch:
    """B rows of a rollout, flat."""

    inputs: PolicyInputs
    action_tokens: Tensor  # int64 [B, A]
    old_logprobs: Tensor  # float32 [B, A]
    hidden: Tensor  # float32 [B, D]
    steps: Tensor  # int64 [B]
    advantages: Tensor  # float32 [B]
    returns: Tensor | None  # float32 [B]; None without a critic
    reference_logprobs: Tensor | None  # float32 [B, A]; None without a KL penalty

    def __len__(self) -> int:
        return len(self.steps)

    def rows(self, indices: Tensor | slice) -> Minibatch:
        """Some rows; a slice's share their memory with these."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in picked.items():
            if isinstance(value, PolicyInputs):
                picked[name] = value.rows(indices if isinstance(indices, slice) else indices.tolist())
            elif value is not None:
                picked[name] = value[indices]
        return Minibatch(**picked)

    def share(self, rows: Tensor, ranks: Ranks) -> Minibatch:
        """Every n-th of some rows, n processes: this one's.

        All have as many, so that all do as many forwards of as many rows: where there is one row less for a process, it has
        another one of no steps, which counts nowhere.

        Args:
            rows: int64, indices of the rows that the processes share.
        """
        own = rows[ranks.rank :: ranks.size]
        if len(own) == -(-len(rows) // ranks.size):
            return self.rows(own)
        part = self.rows(torch.cat([own, rows[:1]]))
        return replace(part, steps=torch.cat([part.steps[:-1], torch.zeros(1, dtype=torch.int64)]))

    def split(self, size: int) -> Iterator[Minibatch]:
        """Micro-batches of at most `size` rows, in order, that differ by at most one row: few shapes, and no small rest."""
        start = 0
        for part in torch.arange(len(self)).tensor_split(-(-len(self) // size)):
            yield self.rows(slice(start, start + len(part)))
            start += len(part)

    def to(self, device: torch.device) -> Minibatch:
        """On a device; action_tokens stay where they are, since the policy checks their range without waiting for a GPU."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "action_tokens"}
        for name, value in moved.items():
            if value is not None:
                moved[name] = value.to(device) if isinstance(value, PolicyInputs) else to_device(value, device)
        return replace(self, **moved)


class RolloutBuffer:
    """Transitions in order of time."""

    def __init__(self) -> None:
        self.transitions: list[Transition] = []
        self.reached: list[tuple[Tensor, PolicyInputs | None]] = []  # T of (wanted, inputs), see add
        self.bootstrap_values: list[Tensor] = []  # T of float32 [N], see bootstrap

    def __len__(self) -> int:
        return len(self.transitions)

    def add(self, transition: Transition, wanted: Tensor, reached: PolicyInputs | None) -> None:
        """Appends decision t.

        Args:
            wanted: bool [N], where no next row will tell V of the state that the decision reached (truncated, or the rollout's
                last decision).
            reached: those states, a row for each True of `wanted`; None where there is none.

        Raises:
            ValueError: a field has another number of rows than the rest, or `reached` than `wanted` has Trues.
        """
        rows = {field.name: len(getattr(transition, field.name)) for field in fields(transition)}
        if len({*rows.values(), len(wanted)}) > 1:
            raise ValueError(
                f"a transition needs one row per environment in every field, got {rows}, {len(wanted)} wanted"
            )
        if int(wanted.sum()) != (0 if reached is None else len(reached)):
            raise ValueError(f"{reached and len(reached)} states reached, but {int(wanted.sum())} are wanted")
        self.transitions.append(transition)
        self.reached.append((wanted, reached))

    def drop_episodes(self, numbers: Tensor) -> None:
        """Takes out the rows of some episodes of the queue (grpo).

        Args:
            numbers: int64, as in Transition.episode.
        """
        if len(numbers) == 0:
            return
        for t, (transition, (wanted, reached)) in enumerate(zip(self.transitions, self.reached, strict=True)):
            kept = ~torch.isin(transition.episode, numbers)
            if not kept.all():
                self.transitions[t] = transition.rows(kept)
                self.reached[t] = (wanted[kept], reached)  # wanted by nobody without a critic

    @staticmethod
    def join(buffers: Sequence[RolloutBuffer]) -> RolloutBuffer:
        """One buffer of parts of the environments, decision by decision, in the order of the parts."""
        if len(buffers) == 1:
            return buffers[0]
        joined = RolloutBuffer()
        for parts in zip_longest(*(zip(b.transitions, b.reached, strict=True) for b in buffers)):
            transitions, reached = zip(*filter(None, parts), strict=True)
            wanted, inputs = zip(*reached, strict=True)
            inputs = [rows for rows in inputs if rows is not None]
            joined.add(
                Transition.join(transitions), torch.cat(wanted), PolicyInputs.concatenate(inputs) if inputs else None
            )
        for values in zip_longest(*(buffer.bootstrap_values for buffer in buffers)):
            joined.bootstrap_values.append(torch.cat([part for part in values if part is not None]))
        return joined

    def bootstrap(self, value_of: Callable[[PolicyInputs], Tensor], batch_size: int) -> None:
        """V of the states that `add` was told of, 0 elsewhere, all together: the only ones that cost forwards of their own.

        Policy and value head are the same during the whole rollout, so this gives what a forward after each decision would
        give, but for the rounding of other batch sizes.

        Args:
            value_of: [B] of B rows, float32 on the CPU.
            batch_size: most rows of a forward.
        """
        if not self.reached:  # of a process for which the others left no episode
            return
        wanted = torch.cat([wanted for wanted, _ in self.reached])  # [R]
        values = torch.zeros(len(wanted))
        if wanted.any():
            inputs = PolicyInputs.concatenate([inputs for _, inputs in self.reached if inputs is not None])
            parts = torch.arange(len(inputs)).split(batch_size)
            values[wanted] = torch.cat([value_of(inputs.rows(part.tolist())) for part in parts])
        self.bootstrap_values = list(values.split([len(wanted) for wanted, _ in self.reached]))
        self.reached = [(torch.zeros_like(wanted), None) for wanted, _ in self.reached]  # not needed any more

    def stack(self, name: str) -> Tensor:
        """A field over time, [T, N, ...]; needs every environment to play at every decision."""
        return torch.stack([getattr(transition, name) for transition in self.transitions])

    def rows(self, name: str) -> Tensor:
        """A field as flat rows in order of time, [R, ...]."""
        return torch.cat([getattr(transition, name) for transition in self.transitions])

    def next_values(self) -> Tensor:
        """V(s'_t) [T, N]: the next row's value inside an episode, the bootstrap value (0 where it was not wanted) at its
        truncated end and at the rollout's last decision."""
        values = self.stack("values")
        bootstrap = torch.stack(self.bootstrap_values)
        following = torch.cat([values[1:], bootstrap[-1:]])  # [T, N]
        return torch.where(self.stack("truncated"), bootstrap, following)

    def flatten(self, advantages: Tensor, returns: Tensor | None, kept: Tensor | None = None) -> Minibatch:
        """The rows as one flat batch.

        Args:
            advantages, returns: [R], in the order of rows().
            kept: int64, which rows, in which order; None keeps all as they are.
        """
        batch = Minibatch(
            inputs=PolicyInputs.concatenate([transition.inputs for transition in self.transitions]),
            action_tokens=self.rows("action_tokens"),
            old_logprobs=self.rows("logprobs"),
            hidden=self.rows("hidden"),
            steps=self.rows("steps"),
            advantages=advantages,
            returns=returns,
            reference_logprobs=None,
        )
        return batch if kept is None else batch.rows(kept)


def shuffled_rows(count: int, size: int, generator: torch.Generator, epochs: int = 1) -> Iterator[Tensor]:
    """0..count-1 once an epoch, each time in fresh random order, in parts of at most `size` rows that differ by at most one row.

    Equal parts, because a last part of one row would make an optimizer step out of one decision.
    """
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).tensor_split(-(-count // size))
