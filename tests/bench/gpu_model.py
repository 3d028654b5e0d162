"""OpenVLA-7B at its true shapes without its files, and a trainer around it: what the sections of tests/bench/gpu_7b.py share."""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from OpenVLA_PPO import OpenVLAPPO
from tests.bench.gpu_figures import Row, forward_flops
from tests.fakes import FakeEnv, FakeVectorEnv
from vla_rl.learning.micro_batches import Choice
from vla_rl.learning.parts import build_value_head
from vla_rl.model.execution import compiles
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.prismatic import LlamaRotaryEmbedding, Prismatic, fill
from vla_rl.model.prismatic_config import read_config
from vla_rl.model.quantization import check_quantization
from vla_rl.model.tiny_openvla import TRAINED, initialize, make_config
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run.command_line import ROOT
from vla_rl.run.load_settings import load_config
from vla_rl.run.progress import peak_memory_gib
from vla_rl.run.settings import Config
from vla_rl.simulation.vector_env import make_vector_env
from vla_rl.types import ACTION_DIM, Observation

# libero_spatial 0: with one image and the OFT decoder 345 tokens
TASK = "pick up the black bowl between the plate and the ramekin and place it on the plate"


@dataclass(frozen=True)
class Scale:
    """How much is measured; the work is the same."""

    matmuls: tuple[tuple[int, int, int], ...]
    rows: tuple[int, ...]  # of forwards; the first is the rollout's, and the number of environments
    updates: tuple[tuple[str, int], ...]  # gradient checkpointing and micro-batch, in the order of their worth
    updates_24: tuple[tuple[str, int], ...]  # those that may fit a 24 GB card
    update_rows: int  # at least, of the minibatch that is timed
    n_steps: int  # decisions an environment of the iteration that is timed
    repeats: int


SCALES = {
    "7b": Scale(
        matmuls=((8192, 8192, 8192), (5600, 4096, 11008)),
        rows=(16, 32, 1),
        updates=(
            *(("none", 24), ("full", 16), ("full", 32), ("none", 16)),
            *(("selective", 32), ("selective", 16), ("full", 64)),
        ),
        updates_24=(("full", 16), ("full", 32)),
        update_rows=64,
        n_steps=16,
        repeats=5,
    ),
    "tiny": Scale(((256, 256, 256),), (4, 2, 1), (("none", 4), ("full", 2), ("selective", 2)), (("full", 2),), 4, 2, 1),
}


def write_small_files(folder: Path, scale: str) -> None:
    """What a policy reads of a checkpoint besides its weights; tokenizer, statistics and processor are the small model's."""
    config = make_config()
    if scale == "7b":  # what text_config leaves out is Llama-2 7B's, as in the official checkpoints
        config |= {"text_config": {"model_type": "llama"}, "image_sizes": [224, 224], "pad_token_id": 32000}
        del config["_tiny_timm_overrides"], config["_tiny_recipe"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("dataset_statistics.json", "preprocessor_config.json", "tokenizer.json"):
        shutil.copy(TRAINED / name, folder)


def random_network(folder: Path, device: torch.device, dtype: torch.dtype, quantization: str = "none") -> Prismatic:
    """The network of a folder's config.json, made on the device and filled there, without a copy anywhere else; else as
    vla_rl.model.prismatic.load_network."""
    with torch.device("meta"):
        network = Prismatic(read_config(folder))
    packed = set() if quantization == "none" else set(network.adaptable_linears(language_model_only=True))
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(network.named_parameters()):
        weight = torch.empty(parameter.shape, device=device, dtype=dtype)
        initialize(name, weight, generator)
        fill(network, name, weight, packed)
    network.language_model.model.rotary_emb = LlamaRotaryEmbedding(config=network.llama).to(device)
    return network.eval()


class InstantEnv(FakeEnv):
    """One picture, the policy's chunks, no time; ends as episodes of the suite do.

    Args:
        images: uint8 [1, H, W, 3].
        steps: of the first episode that are done already: ends are spread over time, as they are in a training.
    """

    def __init__(self, index: int, images: np.ndarray, chunk_size: int, max_steps: int, steps: int):
        super().__init__(index, max_steps)
        self.images, self.chunk_size, self.started_with = images, chunk_size, steps
        self.action_space = spaces.Box(-1, 1, (chunk_size, ACTION_DIM), np.float32)
        box = spaces.Box(0, 255, images.shape, np.uint8)
        self.observation_space = spaces.Dict(self.observation_space.spaces | {"images": box})

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed, options=options)
        self.steps, self.started_with = self.started_with, 0
        return result

    def observe(self):
        return {"images": self.images, "proprio": np.zeros(8, np.float32), "instruction": TASK}

    def step(self, actions):
        executed = min(self.chunk_size, self.max_steps - self.steps)
        self.steps += executed
        ended = self.steps >= self.max_steps
        success = ended and self.index % 2 == 0  # half of the episodes, so that there is something to learn
        return self.observe(), float(success), success, ended and not success, {"steps": executed, "success": success}


class InstantEnvs(FakeVectorEnv):
    """N of them, whose images are as simulators' workers hand them to this policy."""

    def __init__(self, policy: OpenVLAPolicy, config: Config):
        chunk, limit, count = policy.chunk_size, config.max_episode_steps(), config.rollout.num_envs
        images, self.extra = shown_images(policy)
        done = [max(0, limit - chunk - i * limit // count) for i in range(count)]  # the first decision ends an episode
        makers = [lambda i=i: InstantEnv(i, images, chunk, limit, done[i]) for i in range(count)]
        super().__init__(makers, autoreset_mode=AutoresetMode.DISABLED)

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs | self.extra, info

    def step_wait(self):
        obs, *flags, info = super().step_wait()
        if "truncated_obs" in info:
            info["truncated_obs"] |= self.extra
        return obs | self.extra, *flags, info


def shown_images(policy: OpenVLAPolicy) -> tuple[np.ndarray, dict[str, Any]]:
    """A picture of the simulator's size, uint8 [1, H, W, 3], through the transform that the workers do, and its mark."""
    with np.load(ROOT / "tests/data/images.npz") as images:
        image = images["scene_raw256"]
    transform = policy.processor.image_transform
    return transform(image)[None], {"image_transform": transform}


class Bench:
    """What the sections share: one policy at a time, trainers, the ceiling, the rows of the table."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.scale = args, folder, SCALES[args.scale]
        self.device, self.dtype = torch.device(args.device), torch.bfloat16
        self.compile = "auto"  # as policy.compile: auto, true or false
        self.began = time.perf_counter()
        self.rows: list[Row] = []
        self.texts: list[str] = []  # printed below the table
        self.ceiling_flops: float | None = None
        self.fastest = self.scale.updates_24[0]  # checkpointing and micro-batch of an iteration
        self.made: tuple[tuple[str, str], OpenVLAPolicy] | None = None
        write_small_files(folder, args.scale)
        with torch.device("meta"):
            self.shapes = Prismatic(read_config(folder))

    def config(self, decoder: str = "parallel") -> Config:
        """configs/gae_ppo_config.yaml at this scale, its actor in training from the first iteration."""
        num_envs, chunk = self.scale.rows[0], 8 if decoder == "parallel" else 1
        rows = num_envs * self.scale.n_steps
        given = [f"run.device={self.device.type}", f"policy.decoder={decoder}", f"policy.chunk_size={chunk}"]
        given += [f"rollout.num_envs={num_envs}", f"rollout.n_steps={self.scale.n_steps}", "logging.progress=false"]
        given += [f"algorithm.minibatch_size={min(128, rows)}", f"algorithm.micro_batch_size={self.fastest[1]}"]
        given += ["algorithm.critic_warmup_iterations=0"]
        given += ["algorithm.wait_for_reward=false"]
        return load_config(ROOT / "configs/gae_ppo_config.yaml", given)

    def policy(self, decoder: str = "parallel") -> OpenVLAPolicy:
        if self.made is None or self.made[0] != (decoder, self.compile):
            self.made = None
            release(self.device)
            self.made = (decoder, self.compile), self.make_policy(decoder)
        return self.made[1]

    def make_policy(self, decoder: str) -> OpenVLAPolicy:
        """As OpenVLAPolicy.from_checkpoint, but for where the weights come from."""
        torch.manual_seed(0)
        torch.backends.cudnn.allow_tf32 = False
        settings, quantization = self.config(decoder).policy, self.args.quantization
        check_quantization(quantization, self.device)
        network = random_network(self.folder, self.device, self.dtype, quantization)
        options = {"chunk_size": settings.chunk_size, "center_crop": True, "unnorm_key": "libero_spatial"}
        options["compiled"] = compiles(self.compile, self.device)
        policy = OpenVLAPolicy(network, self.folder, decoder, settings.num_images, settings.lora, **options)
        generator = torch.Generator(self.device).manual_seed(1)
        with torch.no_grad():
            for name, tensor in policy.adapter_tensors().items():
                if "lora_B" in name:  # starts at 0, where every precision agrees
                    tensor.normal_(std=0.01, generator=generator)
        return policy

    @contextmanager
    def trainer(self, decoder: str = "parallel", libero: bool = False) -> Iterator[OpenVLAPPO]:
        policy, config = self.policy(decoder), self.config(decoder)
        if libero:
            _, mark = shown_images(policy)
            envs = make_vector_env(config, config.rollout.num_envs, overlap=config.rollout.overlap, **mark)
        else:
            envs = InstantEnvs(policy, config)
        with tempfile.TemporaryDirectory() as run, closing(envs):
            head = build_value_head(config, policy.hidden_size)
            yield OpenVLAPPO(config, policy, head, envs, None, MetricsLogger(Path(run), config))

    def observation(self, policy: OpenVLAPolicy, rows: int) -> Observation:
        images, mark = shown_images(policy)
        return Observation(np.stack([images] * rows), np.zeros((rows, 8), np.float32), (TASK,) * rows, **mark)

    def forward_flops(self, policy: OpenVLAPolicy) -> float:
        """Of one row; the autoregressive decoder reads all tokens but the last that it chooses."""
        after = policy.num_tokens + 1 if policy.decoder == "parallel" else policy.num_tokens - 1
        prompt = len(policy.processor.encode_prompt(TASK)) + self.shapes.vision_backbone.num_patches
        return forward_flops(self.shapes, prompt + after)

    def is_late(self, share: float = 1.0) -> bool:
        """Whether this share of the minutes is over."""
        return time.perf_counter() - self.began > share * 60 * self.args.minutes

    def seconds(self, work: Callable[[], object]) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - start

    def median(self, work: Callable[[], object], repeats: int | None = None) -> tuple[float, str]:
        """Seconds, after two calls to warm up; and what the first of them took, with what it compiled."""
        first = self.seconds(work)
        self.seconds(work)
        times = [self.seconds(work) for _ in range(repeats or self.scale.repeats)]
        return statistics.median(times), f"first call {first:.1f} s" if first > 1 else ""

    def matmul_flops(self, m: int, k: int, n: int, products: int = 10) -> float:
        """FLOP/s of [m, k] x [k, n] in bf16."""
        a, b = (torch.randn(shape, device=self.device).to(torch.bfloat16) for shape in ((m, k), (k, n)))
        out = a @ b
        seconds, _ = self.median(lambda: [torch.mm(a, b, out=out) for _ in range(products)])
        return 2 * m * k * n * products / seconds

    def add(
        self, work: str, value: float | None, unit: str = "", flops_per_s: float | None = None, note: str = ""
    ) -> None:
        share = None
        if flops_per_s is not None:
            if self.ceiling_flops is None:
                self.ceiling_flops = self.matmul_flops(*self.scale.matmuls[0])
            share = flops_per_s / self.ceiling_flops
            note = f"{flops_per_s / 1e12:.3g} TFLOP/s" + (f", {note}" if note else "")
        self.rows.append(Row(work, value, unit, share, note, self.compile))
        print(f"  {work}: {'-' if value is None else f'{value:.4g} {unit}'} {note}", flush=True)


def with_settings(config: Config, section: str, **values) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def held_gib(device: torch.device) -> float:
    """Most memory that torch took from the card, with what its allocator could not use."""
    return torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else peak_memory_gib(device)


def use(trainer: OpenVLAPPO, mode: str, micro_batch: int) -> None:
    """Sets gradient checkpointing and micro-batch of the update."""
    trainer.micro_batches.use(Choice(mode, micro_batch))
