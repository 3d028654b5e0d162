"""What a warm start learns from: observations and the tokens that say what the L1 head did in them, on disk an iteration a file.

    RUN/data/iteration-000003.pt     images uint8 [R, K, S, S, 3], proprio float32 [R, 8], instructions, tokens int64 [R, A]

Not here: who played (vla_rl.fine_tuning.warm_start). R decisions, K images, S model image side, A action tokens.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vla_rl.run.checkpoint import CheckpointError, loading, save_torch, sha256
from vla_rl.run.files import load_torch, written_whole
from vla_rl.types import PolicyInputs


@dataclass(frozen=True)
class LabelledDecisions:
    """Of one iteration, or of several."""

    inputs: PolicyInputs  # on the CPU
    tokens: Tensor  # int64 [R, A]

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: Sequence[int] | np.ndarray) -> LabelledDecisions:
        return LabelledDecisions(self.inputs.rows(indices), self.tokens[torch.as_tensor(np.asarray(indices))])

    @staticmethod
    def concatenate(parts: Sequence[LabelledDecisions]) -> LabelledDecisions:
        tokens = torch.cat([part.tokens for part in parts])
        return LabelledDecisions(PolicyInputs.concatenate([part.inputs for part in parts]), tokens)

    def save(self, path: Path) -> None:
        values = {"images": self.inputs.images, "proprio": self.inputs.proprio, "tokens": self.tokens}
        values["instructions"] = list(self.inputs.instructions)
        with written_whole(path) as unfinished:
            save_torch(values, unfinished)

    @staticmethod
    def load(path: Path) -> LabelledDecisions:
        """Raises CheckpointError where it cannot be read."""
        with loading(path):
            values = load_torch(path)
            inputs = PolicyInputs(values["images"], values["proprio"], tuple(values["instructions"]))
            return LabelledDecisions(inputs, values["tokens"])


class DecisionStore:
    """The newest decisions, in whole iterations; each iteration's are a file in `folder`.

    Args:
        keep: the oldest iteration goes while the others have as many rows or more.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self.parts: dict[str, LabelledDecisions] = {}  # file name -> its rows, oldest first
        self.digests: dict[str, str] = {}  # file name -> SHA-256

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def rows(self, indices: Sequence[int] | np.ndarray) -> LabelledDecisions:
        """Of all iterations, one behind the other."""
        parts = list(self.parts.values())
        ends = np.cumsum([len(part) for part in parts])
        places = [int(np.searchsorted(ends, index, side="right")) for index in indices]
        rows = [parts[p].rows([index - ends[p] + len(parts[p])]) for p, index in zip(places, indices, strict=True)]
        return LabelledDecisions.concatenate(rows)

    def add(self, number: int, decisions: LabelledDecisions) -> None:
        """The decisions of iteration `number`, written before they are learned from."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / file_name(number)
        decisions.save(path)
        self.parts[path.name], self.digests[path.name] = decisions, sha256(path)
        while len(self.parts) > 1 and len(self) - len(next(iter(self.parts.values()))) >= self.keep:
            oldest = next(iter(self.parts))
            del self.parts[oldest], self.digests[oldest]

    def restore(self, digests: dict[str, str]) -> None:
        """The files that a checkpoint was learned from.

        Raises:
            CheckpointError: one is missing, or not what was written.
        """
        for name, digest in digests.items():
            path = self.folder / name
            if not path.is_file() or sha256(path) != digest:
                raise CheckpointError(
                    f"{path}, which the checkpoint was trained on, is missing or not what was written"
                )
        self.parts = {name: LabelledDecisions.load(self.folder / name) for name in digests}
        self.digests = dict(digests)

    def remove_unneeded(self, needed: Iterable[str]) -> None:
        """Removes the files of iterations that are neither needed nor learned from."""
        wanted = {*needed, *self.parts}
        for path in self.folder.glob("iteration-*.pt"):
            if iteration_of(path) is not None and path.name not in wanted:
                path.unlink()

    def set_aside(self, names: Iterable[str]) -> None:
        """Renames files that are not learned from to superseded-NAME, or superseded-1-NAME, ...: a resumed run writes its own."""
        for name in sorted({*names} - self.parts.keys()):
            if (self.folder / name).exists():
                others = (f"superseded-{f'{n}-' if n else ''}{name}" for n in itertools.count())
                os.replace(self.folder / name, next(p for other in others if not (p := self.folder / other).exists()))


def file_name(number: int) -> str:
    return f"iteration-{number:06d}.pt"


def iteration_of(path: Path) -> int | None:
    """3 of iteration-000003.pt; None of any other name, which is not ours."""
    match = re.fullmatch(r"iteration-([0-9]+)\.pt", path.name)
    return int(match[1]) if match else None
