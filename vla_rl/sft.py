"""Supervised fine-tuning of OpenVLA on demonstrations.

    python -m vla_rl.sft --config configs/tiny_sft.yaml

Cross-entropy on action tokens (behaviour cloning), as OpenVLA and OpenVLA-OFT with its token head are fine-tuned. The
result, runs/NAME/model, is a checkpoint in the official layout with the statistics of its data: what PPO starts from.

Not here: the network and its tokens (vla_rl.model.policy), the data's layout (vla_rl.learning.demonstration_file), images
(vla_rl.learning.augmentation).

B samples, C actions of a chunk, A = 7C action tokens, S model image side, K images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vla_rl.learning.augmentation import augment
from vla_rl.learning.demonstration_file import Demonstration, find_files, read_demonstrations
from vla_rl.learning.optimizer import adamw, load_optimizer
from vla_rl.model.action_tokenizer import ActionTokenizer, normalize
from vla_rl.model.image_transform import crop_center, preprocess
from vla_rl.model.policy import OpenVLAPolicy, check_checkpoint
from vla_rl.model.prismatic import save_checkpoint
from vla_rl.run.checkpoint import (
    cpu_copy,
    find_checkpoint,
    load_trainer_state,
    locked,
    save_torch,
    verify,
    write_checkpoint,
)
from vla_rl.run.failures import report
from vla_rl.run.load_settings import load_config, save_config, settings_help
from vla_rl.run.metrics import MetricsLogger, check_wandb
from vla_rl.run.progress import peak_memory_gib
from vla_rl.run.settings import ConfigError, SftConfig
from vla_rl.simulation.suites import task_instructions
from vla_rl.types import NonFiniteError, PolicyInputs

log = logging.getLogger("vla_rl.sft")

GRIPPER_MASK = [True] * 6 + [False]  # the gripper is 0 or 1 and stays as it is
CURVES = {
    "cross-entropy (nats a token)": ["sft/loss", "validation/loss"],
    "token accuracy": ["validation/token_accuracy"],
    "L1 of normalised actions": ["validation/l1"],
    "gripper accuracy": ["validation/gripper_accuracy"],
    "value loss": ["validation/value_loss"],
    "gradient norm": ["sft/grad_norm"],
    "learning rate": ["sft/learning_rate"],
}

# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Samples:
    """One sample a step: what was seen, and the C actions that followed."""

    images: np.ndarray  # uint8 [R, K, S, S, 3], resized, not yet cropped
    proprio: np.ndarray  # float32 [R, 8]
    instructions: list[str]  # R
    chunks: np.ndarray  # float64 [R, C, 7], data set's units: gripper 0 closes, 1 opens
    steps_to_go: np.ndarray  # int64 [R], to the end of the demonstration, which is its success; 0 in the last step

    def __len__(self) -> int:
        return len(self.chunks)

    @property
    def digest(self) -> str:
        """Hex digits; of the images one in 64 counts."""
        digest = hashlib.sha256("\n".join(self.instructions).encode())
        for array in (self.images[::64], self.proprio, self.chunks, self.steps_to_go):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()[:16]


def data_units(actions: np.ndarray) -> np.ndarray:
    """Environment's actions [..., 7] in the data set's units: the gripper 1 (closes) becomes 0, -1 (opens) 1.

    clip((1 - a) / 2, 0, 1) (openvla c8f03f4, prismatic/vla/datasets/rlds/oxe/transforms.py, libero_dataset_transform).
    """
    actions = actions.copy()
    actions[..., -1] = np.clip((1 - actions[..., -1]) / 2, 0, 1)
    return actions


def chunks_of(actions: np.ndarray, chunk_size: int) -> np.ndarray:
    """[T, 7] -> [T, C, 7]: row t has actions t .. t+C-1; after the end the last one is repeated."""
    steps = np.arange(len(actions))[:, None] + np.arange(chunk_size)  # [T, C]
    return actions[np.minimum(steps, len(actions) - 1)]


def make_samples(demonstrations: Sequence[Demonstration], chunk_size: int, size: int, progress: bool) -> Samples:
    """Preprocesses every image once."""
    rows, cameras = sum(map(len, demonstrations)), demonstrations[0].images.shape[1]
    resized = np.empty((rows, cameras, size, size, 3), np.uint8)
    images = (image for d in demonstrations for image in d.images)  # [K, H, W, 3]
    for row, image in enumerate(tqdm(images, "images", rows, unit="step", disable=not progress, mininterval=1)):
        for camera in range(cameras):
            resized[row, camera] = preprocess(image[camera], center_crop=False, size=size)
    return Samples(
        images=resized,
        proprio=np.concatenate([d.proprio for d in demonstrations]),
        instructions=[d.instruction for d in demonstrations for _ in range(len(d))],
        chunks=np.concatenate([chunks_of(data_units(d.actions), chunk_size) for d in demonstrations]),
        steps_to_go=np.concatenate([np.arange(len(d))[::-1] for d in demonstrations]),
    )


def split(demonstrations: Sequence[Demonstration], fraction: float) -> tuple[list[Demonstration], list[Demonstration]]:
    """Training and held-out episodes: of each task the last ones, at least one unless the fraction is 0.

    Raises:
        ConfigError: a task has only one episode.
    """
    training, held_out = [], []
    for instruction in dict.fromkeys(d.instruction for d in demonstrations):
        episodes = [d for d in demonstrations if d.instruction == instruction]
        count = max(1, round(fraction * len(episodes))) if fraction > 0 else 0
        if count == len(episodes):
            raise ConfigError(
                f"{instruction!r} has {len(episodes)} demonstration, which leaves none to train on; give more, or set "
                "data.validation_fraction=0"
            )
        training += episodes[: len(episodes) - count]
        held_out += episodes[len(episodes) - count :]
    return training, held_out


def data_statistics(demonstrations: Sequence[Demonstration]) -> dict[str, Any]:
    """One entry of dataset_statistics.json: actions in the data set's units, and proprio."""
    actions = np.concatenate([data_units(d.actions) for d in demonstrations])
    proprio = np.concatenate([d.proprio for d in demonstrations]).astype(np.float64)

    def describe(values: np.ndarray) -> dict[str, list[float]]:
        low, high = np.quantile(values, [0.01, 0.99], axis=0)
        numbers = {"mean": values.mean(0), "std": values.std(0), "max": values.max(0), "min": values.min(0)}
        return {name: number.tolist() for name, number in (numbers | {"q01": low, "q99": high}).items()}

    return {
        "action": describe(actions) | {"mask": GRIPPER_MASK},
        "proprio": describe(proprio),
        "num_transitions": len(actions),
        "num_trajectories": len(demonstrations),
    }


def batch_rows(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Rows of optimizer step `step` (from 0), int64 [batch_size]: each row once an epoch, in an order of the epoch's own."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in set(positions // count)}
    return np.array([orders[position // count][position % count] for position in positions])


# -------------------------------------------------------------------------------------------------------------- losses


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


# ------------------------------------------------------------------------------------------------------------- trainer


@dataclass(frozen=True)
class Losses:
    """Of one forward."""

    cross_entropy: Tensor  # nats a token
    value: Tensor  # mean squared error of value_discount ** steps to go
    logits: Tensor  # float32 [B, A, vocabulary]


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
        self.optimizer = adamw(self.parameters, config.optimizer)
        shape = f"{policy.decoder} {policy.num_tokens}, {sum(p.numel() for p in self.parameters)} trained numbers"
        base = policy.base_digest[:16]  # of the weights that are not trained
        self.fingerprint = f"sft {config.training.method}, policy {shape}, base {base}, data {train.digest}"
        self.step = 0  # finished optimizer steps
        self.stop_requested = False
        self.spread = torch.tensor(GRIPPER_MASK * policy.chunk_size, device=policy.device)  # [A]

    def train(self) -> None:
        """Steps until training.steps; measures, logs and saves in between and at the end."""
        training, logging_settings = self.config.training, self.config.logging
        losses: list[float] = []
        start, first = time.perf_counter(), self.step
        bar = tqdm(
            total=training.steps,
            initial=self.step,
            desc="sft",
            unit="step",
            disable=not logging_settings.progress,
            mininterval=1,
        )
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
                if measured:
                    log.info(summary(self.step, training.steps, metrics))
                if self.step % training.checkpoint_interval == 0 and self.step < training.steps:
                    self.save_checkpoint()
        self.save_checkpoint()
        self.logger.draw_curves(CURVES, x="step")
        if self.stop_requested:
            log.warning("stopped at step %d, saved; --resume continues", self.step)

    def train_step(self) -> dict[str, float]:
        training = self.config.training
        rows = batch_rows(len(self.train_samples), training.batch_size, self.step, self.config.run.seed)
        rng = np.random.default_rng([self.config.run.seed, 1, self.step])
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in rows.reshape(-1, training.micro_batch_size):
            inputs = self.inputs(self.train_samples, part, rng if self.config.data.augment else None)
            losses = self.losses(inputs, self.train_samples, part)
            loss = losses.cross_entropy + training.value_coef * losses.value
            (loss * len(part) / len(rows)).backward()
            total += losses.cross_entropy.item() * len(part) / len(rows)
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
        logits = policy.network.vocabulary_logits(hidden)
        first, bins = policy.action_tokenizer.first_id, policy.action_tokenizer.n_bins
        labels = soft_labels(tokens - first, bins, training.label_sigma, self.spread)
        steps_to_go = torch.from_numpy(samples.steps_to_go[rows]).to(policy.device)
        values = self.value_map(hidden[:, 0].float()).squeeze(-1)  # [B]
        return Losses(
            cross_entropy=cross_entropy(logits, labels, first),
            value=F.mse_loss(values, training.value_discount**steps_to_go),
            logits=logits,
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """On evenly spaced held-out samples, most likely tokens under teacher forcing."""
        samples, policy = self.validation, self.policy
        count = min(self.config.training.evaluation_samples, len(samples))
        rows = np.linspace(0, len(samples) - 1, count).astype(int)
        stats, sums = policy.statistics["action"], np.zeros(5)
        for part in np.array_split(rows, math.ceil(count / self.config.training.micro_batch_size)):
            chunks = samples.chunks[part]
            losses = self.losses(self.inputs(samples, part, None), samples, part)
            tokens = losses.logits.argmax(dim=-1).cpu()  # [B, A]
            expected = label_tokens(policy.action_tokenizer, chunks, stats)
            predicted = policy.action_tokenizer.decode(tokens.numpy()).reshape(chunks.shape)
            error = np.abs(predicted - np.clip(normalize(chunks, stats), -1, 1))
            gripper = (predicted[..., -1] > 0.5) == (chunks[..., -1] > 0.5)
            accuracy = (tokens == expected).float().mean().item()
            numbers = losses.cross_entropy.item(), accuracy, error[..., :-1].mean(), gripper.mean(), losses.value.item()
            sums += len(part) * np.array(numbers)
        names = ["loss", "token_accuracy", "l1", "gripper_accuracy"]
        names += ["value_loss"] if self.config.training.value_coef > 0 else []
        sums = sums[: len(names)]
        return {f"validation/{name}": float(value) for name, value in zip(names, sums / count, strict=True)}

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def save_checkpoint(self) -> Path:
        state = cpu_copy({"step": self.step, "parameters": self.parameters, "optimizer": self.optimizer.state_dict()})

        def write_files(folder: Path) -> None:
            save_torch(state, folder / "trainer.pt")
            save_config(self.config, folder / "config.yaml")

        root = self.logger.folder / "checkpoints"
        return write_checkpoint(
            root, f"iteration-{self.step:06d}", self.fingerprint, write_files, self.config.training.keep_checkpoints
        )

    def load_checkpoint(self, folder: Path) -> None:
        verify(folder, self.fingerprint)
        state = load_trainer_state(folder)
        self.step = state["step"]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        load_optimizer(self.optimizer, state["optimizer"], self.config.optimizer)
        self.logger.continue_from(self.step)

    def save_model(self, folder: Path) -> None:
        """A checkpoint in the official layout: bfloat16 weights, adapters merged, statistics of the data."""
        policy = self.policy
        unfinished = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        tensors = policy.merged_tensors() if policy.adapted is not None else policy.network.named_parameters()
        tensors = ((name, tensor.detach().to(torch.bfloat16)) for name, tensor in tensors)
        save_checkpoint(unfinished, tensors, source=policy.folder, proprio_file=policy.network.proprio_file)
        statistics = {self.config.data.name: policy.statistics}
        (unfinished / "dataset_statistics.json").write_text(json.dumps(statistics, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)


def label_tokens(tokenizer: ActionTokenizer, chunks: np.ndarray, statistics: dict[str, Any]) -> Tensor:
    """Actions [B, C, 7] in the data set's units -> token ids int64 [B, A]."""
    normalized = np.clip(normalize(chunks, statistics), -1, 1)
    return torch.from_numpy(tokenizer.encode(normalized).reshape(len(chunks), -1))


def summary(step: int, steps: int, metrics: dict[str, float]) -> str:
    names = {"loss": "sft/loss", "held-out loss": "validation/loss", "token accuracy": "validation/token_accuracy"}
    names |= {"L1": "validation/l1", "gripper": "validation/gripper_accuracy", "samples/s": "sft/samples_per_s"}
    parts = [f"{label} {metrics[name]:.3f}" for label, name in names.items() if name in metrics]
    return f"step {step}/{steps} | " + " | ".join(parts)


# -------------------------------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vla_rl.sft",
        description="Fine-tune OpenVLA on demonstrations in LIBERO's HDF5 layout.",
        epilog="settings, given as section.key=value:\n" + settings_help(SftConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="any setting, for example optimizer.learning_rate=1e-4",
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--config", metavar="YAML", help="settings file, such as configs/tiny_sft.yaml")
    start.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    return parser.parse_args(argv)


def read_data(config: SftConfig) -> list[Demonstration]:
    settings = config.policy.num_images, config.data.filter_no_ops, task_instructions()
    demonstrations = [d for path in find_files(config.data.files) for d in read_demonstrations(path, *settings)]
    sizes = {d.images.shape[1:] for d in demonstrations}
    if len(sizes) > 1:
        raise ConfigError(f"data.files have images of different shapes: {sorted(map(list, sizes))}; give one kind")
    return demonstrations


def new_run_folder(config: SftConfig) -> Path:
    """Its name; the folder is made when there is something to put into it.

    Raises:
        ConfigError: it exists already.
    """
    name = config.run.name or f"sft_{config.data.name}_seed{config.run.seed}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.run.output_dir) / name
    if folder.exists():
        raise ConfigError(f"run folder {folder} exists; choose another run.name, or --resume {folder}")
    return folder


def fine_tune(config: SftConfig, checkpoint: Path | None) -> Path:
    """Trains and writes the model; returns its folder, or the run's where it was stopped."""
    settings = config.policy
    if config.run.torch_threads is not None:
        torch.set_num_threads(config.run.torch_threads)
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda, but torch finds no CUDA GPU; set run.device=cpu")
    check_checkpoint(settings.checkpoint, settings.use_proprio)
    check_wandb(config)
    folder = new_run_folder(config) if checkpoint is None else checkpoint.parent.parent
    demonstrations = read_data(config)
    training, held_out = split(demonstrations, config.data.validation_fraction)
    steps, side = sum(map(len, training)), demonstrations[0].images.shape[2]
    log.info("%d demonstrations, %d steps to train on, %d held out", len(demonstrations), steps, len(held_out))
    for instruction in dict.fromkeys(d.instruction for d in demonstrations):
        log.info("instruction: %s", instruction)

    torch.manual_seed(config.run.seed)  # of the adapter's initial weights
    policy = OpenVLAPolicy.from_checkpoint(
        settings.checkpoint,
        decoder=settings.decoder,
        num_images=settings.num_images,
        use_proprio=settings.use_proprio,
        lora=settings.lora if config.training.method == "lora" else None,
        device=config.run.device,
        dtype=getattr(torch, settings.dtype),
        chunk_size=settings.chunk_size,
        center_crop=settings.center_crop,
        gradient_checkpointing=settings.gradient_checkpointing,
        unnorm_key=config.data.name,
        statistics=data_statistics(training),
    )
    progress = config.logging.progress
    train = make_samples(training, policy.chunk_size, policy.image_size, progress)
    validation = make_samples(held_out, policy.chunk_size, policy.image_size, progress) if held_out else None
    del demonstrations, training, held_out

    if checkpoint is None:
        folder.mkdir(parents=True)
        save_config(config, folder / "config.yaml")
    with locked(folder), closing(MetricsLogger(folder, config)) as logger:
        trainer = SupervisedFineTuning(config, policy, train, validation, logger)
        if checkpoint is not None:
            trainer.load_checkpoint(checkpoint)
            log.info("continuing from %s", checkpoint)
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(name) != signal.SIG_IGN:  # nohup
                signal.signal(name, lambda *_: setattr(trainer, "stop_requested", True))
        trainer.train()
        if trainer.stop_requested:
            return folder
        trainer.save_model(folder / "model")
    log.info("model in %s; its images were %d px: env.image_size=%d in training", folder / "model", side, side)
    return folder / "model"


def settings_from(args: argparse.Namespace) -> tuple[SftConfig, Path | None]:
    if args.resume is None:
        return load_config(args.config, args.overrides, kind=SftConfig), None
    checkpoint = find_checkpoint(Path(args.resume).resolve())
    before = load_config(checkpoint / "config.yaml", kind=SftConfig)
    config = load_config(checkpoint / "config.yaml", args.overrides, kind=SftConfig)
    changed = [name for name in ("run", "policy", "data") if getattr(before, name) != getattr(config, name)]
    if changed:
        raise ConfigError(f"--resume {args.resume}: settings of {', '.join(changed)} cannot change within a run")
    return config, checkpoint


def main(argv: list[str] | None = None) -> int:
    """0: trained, or stopped and saved; 1: the run failed; 2: a mistake in the settings or the data."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    from tqdm.contrib.logging import logging_redirect_tqdm

    try:
        with logging_redirect_tqdm():
            fine_tune(*settings_from(args))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
