"""What the parts hand to each other: observations, model inputs, policy outputs, episodes, and the Policy protocol.

N environments or rows, K images, C steps in a chunk, A = 7C action tokens, D hidden size, S model image side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:  # simulator workers import this file, and have no use for torch
    import torch
    from torch import Tensor

ACTION_DIM = 7  # end-effector translation (3), rotation (3), gripper (1)
PROPRIO_DIM = 8  # end-effector position (3), axis-angle (3), gripper joints (2)


class NonFiniteError(RuntimeError):
    """A reward, observation, output, loss, gradient or weight is NaN or infinite."""

    of_saved_weights = (
        False  # those after the last finished iteration gave it, so that a checkpoint of them is of no use
    )


class InvariantError(RuntimeError):
    """The first minibatch of an update did not find the ratio 1."""


class NoSignal(RuntimeError):
    """So many training episodes without a reward that the run was told to stop."""


class RenderingError(RuntimeError):
    """OpenGL cannot be used: a library is missing, or MUJOCO_GL names no back-end that is here."""


class OutOfMemory(RuntimeError):
    """The card's memory ran out; the message names settings that need less."""


class SimulatorDied(RuntimeError):
    """A simulator's worker process has ended by itself, or hangs, again and again."""


class SimulationUnstable(RuntimeError):
    """The physics has blown up: what follows says nothing of the policy."""


class ProcessLost(RuntimeError):
    """Another process of the run does not answer."""


class StopTraining(Exception):
    """Somebody asked for the run to stop (SIGTERM, Ctrl-C)."""


@dataclass(frozen=True)
class Episode:
    """Where an episode starts. Two environments that are reset with equal episodes are in equal states."""

    task_id: int
    initial_state: int | None  # index of the benchmark's fixed state, 0-49; None draws fresh placements
    seed: int  # of the placements and the fixtures
    resets: int = 1  # placements drawn with that seed; the last one is played


def place_in_round(index: int, num_envs: int) -> int:
    """Where environment `index` stands when the two halves of the environments, which overlapping steps in turns, alternate.

    Neighbours in the round have neighbouring tasks (vla_rl.learning.episodes.EpisodeStreams), and a worker has neighbours
    (vla_rl.simulation.vector_env): so it needs few simulators, and each half fills all workers.
    """
    half = -(-num_envs // 2)
    return 2 * index if index < half else 2 * (index - half) + 1


class ImageTransform(Protocol):
    """What a policy's images go through first, in the simulators' processes: it can be pickled, and equal ones are equal."""

    size: int  # S

    def __call__(self, image_uint8: np.ndarray) -> np.ndarray: ...  # uint8 [H, W, 3] -> uint8 [S, S, 3]


@dataclass(frozen=True)
class Observation:
    """What the environments show, right way up.

    Images are as rendered, or what `image_transform` made of them: never told by their size, always by this field.
    """

    images: np.ndarray  # uint8 [N, K, H, W, 3], or [N, K, S, S, 3] with an image_transform
    proprio: np.ndarray  # float32 [N, 8], metres, radians (axis-angle), metres
    instructions: tuple[str, ...]  # N
    image_transform: ImageTransform | None = None  # that the images have been through

    @classmethod
    def from_vector_env(cls, obs: dict) -> Observation:
        """The dict that a gymnasium.vector.VectorEnv over LiberoEnv returns. Arrays are copied: they are reused."""
        arrays = obs["images"].copy(), obs["proprio"].copy()
        return cls(*arrays, tuple(obs["instruction"]), obs.get("image_transform"))

    def __len__(self) -> int:
        return len(self.instructions)

    def rows(self, indices: Sequence[int]) -> Observation:
        indices = list(indices)
        return Observation(
            self.images[indices],
            self.proprio[indices],
            tuple(self.instructions[i] for i in indices),
            self.image_transform,
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; to a GPU through pinned memory, so that the copy waits for nothing that runs."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class PolicyInputs:
    """A preprocessed observation: what the buffer keeps and the network reads."""

    images: Tensor  # uint8 [N, K, S, S, 3], CPU or the policy's device
    proprio: Tensor  # float32 [N, 8], CPU, environment units
    instructions: tuple[str, ...]  # N

    def __len__(self) -> int:
        return len(self.instructions)

    def rows(self, indices: Sequence[int] | slice) -> PolicyInputs:
        if isinstance(indices, slice):
            return PolicyInputs(self.images[indices], self.proprio[indices], self.instructions[indices])
        indices = list(indices)
        return PolicyInputs(self.images[indices], self.proprio[indices], tuple(self.instructions[i] for i in indices))

    def to(self, device: torch.device) -> PolicyInputs:
        """With the images on a device; proprio stays on the CPU, where the policy normalises it in float64."""
        return replace(self, images=to_device(self.images, device))

    @staticmethod
    def concatenate(parts: Sequence[PolicyInputs]) -> PolicyInputs:
        import torch

        return PolicyInputs(
            torch.cat([p.images for p in parts]),
            torch.cat([p.proprio for p in parts]),
            tuple(text for p in parts for text in p.instructions),
        )


@dataclass(frozen=True)
class PolicyOutput:
    """One decision of each environment, all from one forward."""

    action_tokens: Tensor  # int64 [N, A], CPU
    logprobs: Tensor  # float32 [N, A], CPU, of the tempered distribution; NaN for a greedy token outside the action ids
    actions: np.ndarray  # float32 [N, C, 7], environment units, -1..1
    hidden: Tensor | None  # float32 [N, D], no gradient: final hidden state of the last prompt token
    inputs: PolicyInputs


@dataclass(frozen=True)
class ActionEvaluation:
    """Given tokens under the present weights, with gradients, all from one forward."""

    logprobs: Tensor  # float32 [B, A]
    entropy: Tensor  # float32 [B, A], nats
    hidden: Tensor | None  # float32 [B, D]


class Policy(Protocol):
    """What OpenVLAPPO needs of a policy; vla_rl.model.policy.OpenVLAPolicy is the one that is shipped."""

    hidden_size: int  # D
    chunk_size: int  # C
    gradient_checkpointing: str  # none, selective or full

    def act(
        self,
        obs: Observation,
        *,
        mode: str = "sampled",  # vla_rl.run.section.Mode
        temperature: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,  # a sequence: one a row
    ) -> PolicyOutput: ...

    def evaluate_actions(
        self, inputs: PolicyInputs, action_tokens: Tensor, *, temperature: float
    ) -> ActionEvaluation: ...

    def prepare(self, obs: Observation) -> PolicyInputs: ...

    def compute_hidden(self, inputs: PolicyInputs) -> Tensor: ...  # float32 [N, D], no gradient, one forward

    def logprobs(self, inputs: PolicyInputs, action_tokens: Tensor, *, temperature: float) -> Tensor: ...  # no gradient

    def reference_logprobs(self, inputs: PolicyInputs, action_tokens: Tensor, *, temperature: float) -> Tensor: ...

    def set_gradient_checkpointing(self, mode: str) -> None: ...  # less memory, slower; the gradients are the same

    def trainable_parameters(self) -> list[torch.nn.Parameter]: ...  # the LoRA weights and no other

    def save_adapter(self, folder: Path, values: list[Tensor] | None = None) -> None: ...  # of trainable_parameters()

    def load_adapter(self, folder: Path) -> None: ...

    def fingerprint(self) -> str: ...  # equal for equal base models, decoders and adapter shapes
