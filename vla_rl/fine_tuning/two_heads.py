"""The two heads of a warm start: the L1 head on the base weights, which labels; the token head on adapted ones, which learns.

The L1 head reads hidden states of the base: it acts with the adapter switched off, so what LoRA learns never moves it, and a
decision that the token head takes costs a second forward. The LM head's rows belong to the token head alone.

Not here: who plays when, what is kept (vla_rl.fine_tuning.warm_start). B decisions, A action tokens, D hidden size.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vla_rl.fine_tuning.samples import GRIPPER_MASK
from vla_rl.fine_tuning.supervised_fine_tuning import cross_entropy, soft_labels
from vla_rl.model.checkpoint_folder import save_checkpoint
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.trained_as import USE, write_trained_as
from vla_rl.run.checkpoint import load_tensors, loading, save_tensors
from vla_rl.run.files import folder_written_whole
from vla_rl.run.section import Mode
from vla_rl.types import Observation, PolicyInputs, PolicyOutput

ROWS_FILE = "token_rows.safetensors"


class Head(Protocol):
    """What plays."""

    def act(self, obs: Observation, *, mode: Mode, temperature: float, generator: Any) -> PolicyOutput: ...


class Student(Head, Protocol):
    """What learns."""

    device: torch.device

    def parameters(self) -> list[torch.nn.Parameter]: ...

    def loss(self, inputs: PolicyInputs, tokens: Tensor) -> Tensor: ...  # mean over the rows, nats a token

    def stepped(self) -> None: ...  # after each optimizer step

    def save(self, folder: Path, values: list[Tensor]) -> None: ...  # of parameters(), into a checkpoint

    def load(self, folder: Path) -> None: ...

    def fingerprint(self) -> str: ...


class L1Teacher:
    """The L1 head as it was trained, whatever the adapter has become."""

    def __init__(self, policy: OpenVLAPolicy):
        self.policy = policy

    def act(
        self, obs: Observation, *, mode: Mode = "greedy", temperature: float = 1.0, generator: Any = None
    ) -> PolicyOutput:
        """Its actions, and the tokens that say the same; always greedy."""
        with self.policy.require_adapter().switched_off():
            return self.policy.act(obs, mode="greedy")


class TokenStudent:
    """The token head on the adapted network.

    Args:
        train_head: the LM head's rows of the action ids are trained too, in float32.
        label_sigma: see vla_rl.fine_tuning.supervised_fine_tuning.soft_labels.
    """

    def __init__(self, policy: OpenVLAPolicy, train_head: bool, label_sigma: float):
        self.policy, self.label_sigma, self.device = policy, label_sigma, policy.device
        tokenizer = policy.action_tokenizer
        self.ids = slice(tokenizer.first_id, tokenizer.vocab_size)  # [256]
        self.spread = torch.tensor(GRIPPER_MASK * policy.chunk_size, device=policy.device)  # [A]
        self._fingerprint = f"policy {policy.fingerprint()}, token rows {train_head}"  # of the rows as they begin
        self.rows: torch.nn.Parameter | None = None  # float32 [256, D]
        if train_head:
            self.rows = torch.nn.Parameter(self.head_rows().detach().float().clone())

    def head_rows(self) -> Tensor:
        return self.policy.network.language_model.lm_head.weight[self.ids]

    def act(
        self, obs: Observation, *, mode: Mode = "sampled", temperature: float = 1.0, generator: Any = None
    ) -> PolicyOutput:
        policy = self.policy
        inputs = policy.prepare(obs)
        options = {"mode": mode, "temperature": temperature, "generator": generator}
        tokens, logprobs, hidden = policy.generate(*policy.tensors(inputs), **options)
        return PolicyOutput(tokens, logprobs, policy.decode_actions(tokens), hidden, inputs)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [*self.policy.trainable_parameters(), *([] if self.rows is None else [self.rows])]

    def loss(self, inputs: PolicyInputs, tokens: Tensor) -> Tensor:
        """Cross-entropy over the whole vocabulary, in nats a token, with gradients; tokens int64 [B, A]."""
        tokens = tokens.to(self.device)
        hidden = self.policy.action_hidden(inputs, tokens)  # [B, A, D]
        logits = self.policy.network.vocabulary_logits(hidden)  # float32 [B, A, vocabulary]
        if self.rows is not None:
            own = F.linear(hidden.float(), self.rows)
            logits = torch.cat([logits[..., : self.ids.start], own, logits[..., self.ids.stop :]], dim=-1)
        index = tokens - self.ids.start
        labels = soft_labels(index, self.ids.stop - self.ids.start, self.label_sigma, self.spread)
        return cross_entropy(logits, labels, self.ids.start)

    @torch.no_grad()
    def stepped(self) -> None:
        """The network acts with the rows as they are now, in its own precision."""
        if self.rows is not None:
            self.head_rows().copy_(self.rows)

    def save(self, folder: Path, values: list[Tensor]) -> None:
        count = len(self.policy.trainable_parameters())
        self.policy.save_adapter(folder / "adapter", values[:count])
        if self.rows is not None:
            save_tensors({"rows": values[count].cpu().contiguous()}, folder / ROWS_FILE)

    def load(self, folder: Path) -> None:
        """Raises CheckpointError where a file is torn or of another model."""
        with loading(folder / "adapter"):
            self.policy.load_adapter(folder / "adapter")
        if self.rows is not None:
            with loading(folder / ROWS_FILE), torch.no_grad():
                self.rows.copy_(load_tensors(folder / ROWS_FILE)["rows"])
        self.stepped()

    def fingerprint(self) -> str:
        return self._fingerprint

    def save_model(self, folder: Path, trained_as: dict[str, Any]) -> None:
        """A checkpoint in the official layout that acts by tokens: adapter merged, rows in the LM head, no L1 head beside it.

        In the precision of the base, in which a training loads it again.

        Args:
            trained_as: what trained_as.json says of image size and render; the rest is the policy's own.
        """
        policy = self.policy
        tensors = ((name, tensor.detach().to(policy.dtype)) for name, tensor in policy.merged_tensors())
        with folder_written_whole(folder) as unfinished:
            save_checkpoint(unfinished, tensors, policy.folder, policy.network.proprio_file)
            use = {name: getattr(policy, name) for name in USE}
            write_trained_as(unfinished, {"head": "tokens"} | use | trained_as)
            shutil.rmtree(folder, ignore_errors=True)  # of before a resume
