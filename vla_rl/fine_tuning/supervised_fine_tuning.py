"""Behaviour cloning of action tokens, or of actions through an L1 head.

Cross-entropy on action tokens, as OpenVLA and OpenVLA-OFT with its token head are fine-tuned; or the mean absolute error of
normalised actions through an L1 head, as the best checkpoints of OpenVLA-OFT were (openvla-oft@213c5ff vla-scripts/finetune.py).

Not here: the network and its tokens (vla_rl.model.policy), the samples (vla_rl.fine_tuning.samples), files and flags (vla_rl.sft).

B samples, C actions of a chunk, A = 7C action tokens.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vla_rl.fine_tuning.augmentation import augment
from vla_rl.fine_tuning.samples import GRIPPER_MASK, Samples, batch_rows
from vla_rl.learning.optimizer import adamw, load_optimizer
from vla_rl.model.action_head import ActionHead, save_action_head
from vla_rl.model.action_tokenizer import ActionTokenizer, normalize
from vla_rl.model.checkpoint_folder import save_checkpoint
from vla_rl.model.image_transform import crop_center
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.trained_as import write_trained_as
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run.checkpoint import (
    cpu_copy,
    load_trainer_state,
    loading,
    save_torch,
    set_aside_later_checkpoints,
    verify,
    whole_number,
    write_checkpoint,
)
from vla_rl.run.files import Outage
from vla_rl.run.load_settings import save_config
from vla_rl.run.logs import progress_bar
from vla_rl.run.progress import peak_memory_gib
from vla_rl.run.sft_settings import SftConfig
from vla_rl.types import NonFiniteError, PolicyInputs

log = logging.getLogger(__name__)


def soft_labels(index: Tensor, num_bins: int, sigma: float, spread: Tensor) -> Tensor:
    """Target distributions over the bins: a Gaussian around the label, cut at the ends and normalised; or one-hot.

    Neighbouring bins are nearly the same action, which one-hot labels have to be learned from data.

    Args:
        index: int64 [B, A], the label's bin.
        sigma: in bins; 0 gives one-hot.
        spread: bool [A], False where the label is one-hot whatever sigma is.

    Returns:
        float32 [B, A, num_bins].
    """
    hard = F.one_hot(index, num_bins).float()
    if sigma == 0:
        return hard
    distance = torch.arange(num_bins, device=index.device) - index[..., None]  # [B, A, bins]
    soft = torch.softmax(-0.5 * (distance / sigma) ** 2, dim=-1)
    return torch.where(spread[:, None], soft, hard)


def cross_entropy(logits: Tensor, labels: Tensor, first_id: int) -> Tensor:
    """-sum q log p over the whole vocabulary, mean over the tokens: the other ids must become unlikely too, since greedy
    decoding takes the most likely of all.

    Args:
        logits: float32 [B, A, vocabulary].
        labels: float32 [B, A, bins], of the ids from first_id on.
    """
    logprobs = torch.log_softmax(logits, dim=-1)[..., first_id : first_id + labels.shape[-1]]
    return -(labels * logprobs).sum(dim=-1).mean()


def learning_rate(settings: Any, training: Any, step: int) -> float:
    """Linear warm-up, then a cosine from the full rate to final_learning_rate_fraction of it. step: from 0."""
    if step < training.warmup_steps:
        return settings.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    low = training.final_learning_rate_fraction
    return settings.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Losses:
    """Of one forward."""

    action: Tensor  # cross-entropy in nats a token; of an L1 head the mean absolute error of normalised actions
    value: Tensor  # mean squared error of value_discount ** steps to go
    predicted: Tensor  # most likely tokens int64 [B, A]; of an L1 head normalised actions float32 [B, C, 7]


class SupervisedFineTuning:
    """Trains a policy on samples.

    Args:
        policy: with an adapter for method lora, without one for full.
        validation: held-out samples; None for none.
        logger: knows the run's folder.
    """

    def __init__(
        self,
        config: SftConfig,
        policy: OpenVLAPolicy,
        train: Samples,
        validation: Samples | None,
        logger: MetricsLogger,
    ):
        self.config, self.policy, self.train_samples, self.validation = config, policy, train, validation
        self.logger = logger
        if config.training.method == "full":
            policy.network.requires_grad_(True)
        self.parameters = [p for p in policy.network.parameters() if p.requires_grad]
        self.value_map = torch.nn.Linear(policy.hidden_size, 1, device=policy.device)
        if config.training.value_coef > 0:
            self.parameters += self.value_map.parameters()
        self.action_head: ActionHead | None = None
        if config.training.head == "l1":
            head = policy.action_head or ActionHead(policy.hidden_size)
            self.action_head = head.float().to(policy.device).requires_grad_(True)
            self.parameters += self.action_head.parameters()
        self.optimizer = adamw(self.parameters, config.optimizer)
        shape = f"{policy.decoder} {policy.num_tokens}, {sum(p.numel() for p in self.parameters)} trained numbers"
        base = policy.base_digest[:16]  # of the weights that are not trained
        kind = config.training.method + ("" if self.action_head is None else " l1")
        self.fingerprint = f"sft {kind}, policy {shape}, base {base}, data {train.digest}"
        self.step = 0  # finished optimizer steps
        self.stop_requested = False
        self.outage = Outage("checkpoints", "the training goes on, and the next one is tried in its turn")
        self.spread = torch.tensor(GRIPPER_MASK * policy.chunk_size, device=policy.device)  # [A]

    def train(self) -> None:
        """Steps until training.steps; measures, logs and saves in between and at the end."""
        training, logging_settings = self.config.training, self.config.logging
        losses: list[float] = []
        start, first = time.perf_counter(), self.step
        bar = progress_bar("sft", training.steps, "step", logging_settings.progress, initial=self.step)
        with bar:
            while self.step < training.steps and not self.stop_requested:
                metrics = self.train_step()
                losses.append(metrics["sft/loss"])
                bar.update()
                bar.set_postfix_str(f"loss={np.mean(losses[-50:]):.3f}")
                measured = self.step % training.evaluation_interval == 0 or self.step == training.steps
                if self.step % logging_settings.interval == 0 or measured:
                    metrics |= {
                        "sft/loss": float(np.mean(losses)),
                        "sft/samples_per_s": (self.step - first) * training.batch_size / (time.perf_counter() - start),
                        "system/peak_memory_gib": peak_memory_gib(self.policy.device),
                    }
                    metrics |= self.evaluate() if measured and self.validation is not None else {}
                    self.logger.log({"iteration": self.step, "step": self.step, **metrics})
                    losses = []
                if measured and self.step < training.steps:
                    self.logger.draw_curves()
                if measured:
                    log.info(summary(self.step, training.steps, metrics))
                if self.step % training.checkpoint_interval == 0 and self.step < training.steps:
                    self.outage.survive(self.save_checkpoint)
        self.save_checkpoint()
        self.logger.draw_curves()
        if self.stop_requested:
            log.warning("stopped at step %d, saved; --resume continues", self.step)

    def request_stop(self) -> None:
        """Ends the training at the next step, saved."""
        self.stop_requested = True

    def train_step(self) -> dict[str, float]:
        training = self.config.training
        rows = batch_rows(len(self.train_samples), training.batch_size, self.step, self.config.run.seed)
        rng = np.random.default_rng([self.config.run.seed, 1, self.step])
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in rows.reshape(-1, training.micro_batch_size):
            inputs = self.inputs(self.train_samples, part, rng if self.config.data.augment else None)
            losses = self.losses(inputs, self.train_samples, part)
            loss = losses.action + training.value_coef * losses.value
            (loss * len(part) / len(rows)).backward()
            total += losses.action.item() * len(part) / len(rows)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
        if not math.isfinite(total) or not torch.isfinite(norm):
            raise NonFiniteError(
                f"the loss or its gradient is not finite in step {self.step + 1}; --resume with a lower learning rate"
            )
        rate = learning_rate(self.config.optimizer, training, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        return {"sft/loss": total, "sft/grad_norm": norm.item(), "sft/learning_rate": rate}

    def inputs(self, samples: Samples, rows: np.ndarray, rng: np.random.Generator | None) -> PolicyInputs:
        """Model inputs of some rows, augmented with rng, else as in evaluation."""
        images = samples.images[rows]  # [B, K, S, S, 3]
        if rng is not None or self.policy.center_crop:
            flat = images.reshape(-1, *images.shape[2:])
            flat = [augment(image, rng) if rng is not None else crop_center(image) for image in flat]
            images = np.stack(flat).reshape(images.shape)
        texts = tuple(samples.instructions[row] for row in rows)
        return PolicyInputs(torch.from_numpy(images), torch.from_numpy(samples.proprio[rows]), texts)

    def losses(self, inputs: PolicyInputs, samples: Samples, rows: np.ndarray) -> Losses:
        """One forward for some rows of the samples."""
        policy, training = self.policy, self.config.training
        tokens = label_tokens(policy.action_tokenizer, samples.chunks[rows], policy.statistics["action"])
        tokens = tokens.to(policy.device)  # [B, A]
        hidden = policy.action_hidden(inputs, tokens)  # [B, A, D]
        if self.action_head is not None:
            predicted = self.action_head(hidden)  # [B, C, 7]
            chunks = label_actions(samples.chunks[rows], policy.statistics["action"])
            action_loss = F.l1_loss(predicted, torch.from_numpy(chunks).to(predicted))
        else:
            logits = policy.network.vocabulary_logits(hidden)
            first, bins = policy.action_tokenizer.first_id, policy.action_tokenizer.n_bins
            labels = soft_labels(tokens - first, bins, training.label_sigma, self.spread)
            action_loss, predicted = cross_entropy(logits, labels, first), logits.argmax(dim=-1)
        steps_to_go = torch.from_numpy(samples.steps_to_go[rows]).to(policy.device)
        values = self.value_map(hidden[:, 0].float()).squeeze(-1)  # [B]
        return Losses(
            action=action_loss,
            value=F.mse_loss(values, training.value_discount**steps_to_go),
            predicted=predicted.detach(),
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On evenly spaced held-out samples, most likely tokens under teacher forcing, or the L1 head's actions."""
        samples, policy = self.validation, self.policy
        count = min(self.config.training.evaluation_samples, len(samples))
        rows = np.linspace(0, len(samples) - 1, count).astype(int)
        stats, sums = policy.statistics["action"], np.zeros(5)
        for part in np.array_split(rows, math.ceil(count / self.config.training.micro_batch_size)):
            chunks = samples.chunks[part]
            losses = self.losses(self.inputs(samples, part, None), samples, part)
            predicted, accuracy = losses.predicted.cpu(), 0.0
            if self.action_head is None:  # tokens [B, A]
                accuracy = (predicted == label_tokens(policy.action_tokenizer, chunks, stats)).float().mean().item()
                predicted = policy.action_tokenizer.decode(predicted.numpy()).reshape(chunks.shape)
            predicted = np.asarray(predicted)
            error = np.abs(predicted - label_actions(chunks, stats))
            gripper = (predicted[..., -1] > 0.5) == (chunks[..., -1] > 0.5)
            numbers = losses.action.item(), accuracy, error[..., :-1].mean(), gripper.mean(), losses.value.item()
            sums += len(part) * np.array(numbers)
        names = ["loss", "token_accuracy", "l1", "gripper_accuracy"]
        names += ["value_loss"] if self.config.training.value_coef > 0 else []
        sums = sums[: len(names)]
        metrics = {f"validation/{name}": float(value) for name, value in zip(names, sums / count, strict=True)}
        if self.action_head is not None:
            del metrics["validation/token_accuracy"]
        return metrics

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def save_checkpoint(self) -> Path:
        state = cpu_copy({"step": self.step, "parameters": self.parameters, "optimizer": self.optimizer.state_dict()})

        def write_files(folder: Path) -> None:
            save_torch(state, folder / "trainer.pt")
            save_config(self.config, folder / "config.yaml")

        self.logger.write_waiting()
        root = self.logger.folder / "checkpoints"
        return write_checkpoint(
            root, f"iteration-{self.step:06d}", self.fingerprint, write_files, self.config.training.keep_checkpoints
        )

    def load_checkpoint(self, folder: Path) -> None:
        verify(folder, self.fingerprint)
        state = load_trainer_state(folder)
        with loading(folder / "trainer.pt"), torch.no_grad():
            self.step = whole_number(state, "step")
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                if value.shape != parameter.shape:
                    raise ValueError(f"a parameter is {list(value.shape)}, expected {list(parameter.shape)}")
                parameter.copy_(value)
            load_optimizer(self.optimizer, state["optimizer"], self.config.optimizer)
        set_aside_later_checkpoints(folder)
        self.logger.continue_from(self.step)

    def save_model(self, folder: Path, image_size: int, render: str | None) -> None:
        """A checkpoint in the official layout: bfloat16 weights, adapters merged, statistics of the data, how it was trained.

        Args:
            image_size: side in pixels of the demonstrations' images.
            render: how they were rendered; None where that is not known.
        """
        policy, settings = self.policy, self.config.policy
        proprio_file = policy.network.proprio_file
        if self.action_head is not None and settings.use_proprio:  # the official code looks for both files
            proprio_file = f"proprio_projector--{self.step}_checkpoint.pt"
        unfinished = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        save_checkpoint(
            unfinished,
            ((name, tensor.detach().to(torch.bfloat16)) for name, tensor in policy.merged_tensors()),
            source=policy.folder,
            proprio_file=proprio_file,
            statistics={self.config.data.name: policy.statistics},
        )
        if self.action_head is not None:
            save_action_head(self.action_head, unfinished, self.step)
        write_trained_as(
            unfinished,
            {
                "decoder": settings.decoder,
                "head": self.config.training.head,
                "num_images": settings.num_images,
                "use_proprio": settings.use_proprio,
                "chunk_size": settings.chunk_size,
                "center_crop": settings.center_crop,
                "image_size": image_size,
                "render": render,
            },
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)


def label_tokens(tokenizer: ActionTokenizer, chunks: np.ndarray, statistics: dict[str, Any]) -> Tensor:
    """Actions [B, C, 7] in the data set's units -> token ids int64 [B, A]."""
    return torch.from_numpy(tokenizer.encode(label_actions(chunks, statistics)).reshape(len(chunks), -1))


def label_actions(chunks: np.ndarray, statistics: dict[str, Any]) -> np.ndarray:
    """Actions [B, C, 7] in the data set's units -> normalised, float64 in -1..1, the gripper 0 or 1."""
    return np.clip(normalize(chunks, statistics), -1, 1)


def summary(step: int, steps: int, metrics: dict[str, float]) -> str:
    names = {"loss": "sft/loss", "held-out loss": "validation/loss", "token accuracy": "validation/token_accuracy"}
    names |= {"L1": "validation/l1", "gripper": "validation/gripper_accuracy", "samples/s": "sft/samples_per_s"}
    parts = [f"{label} {metrics[name]:.3f}" for label, name in names.items() if name in metrics]
    return f"step {step}/{steps} | " + " | ".join(parts)
