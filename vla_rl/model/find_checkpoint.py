"""The folder that a checkpoint's name stands for, checked to be whole before anything heavy loads; and how it may be used."""

from __future__ import annotations

from pathlib import Path

import torch

from vla_rl.model.checkpoint_folder import check_folder, find_folder
from vla_rl.model.execution import can_compile
from vla_rl.model.prismatic import build_network
from vla_rl.model.tiny_openvla import TRAINED, TRAINED_BY_PPO, ensure_tiny_openvla
from vla_rl.model.trained_as import read_trained_as
from vla_rl.run.settings import ConfigError

TINY = "tiny-openvla"  # the checkpoint in the repository, fine-tuned on libero_spatial
TINY_PPO = "tiny-openvla-ppo"  # likewise, the same after PPO on libero_spatial
TINY_RANDOM = "tiny-openvla-random"  # what it was before: made on first use


def check_checkpoint(path: str | Path, use_proprio: bool = False) -> Path:
    """The folder of a checkpoint, after checking that what the policy needs is in it; loads no weights.

    Args:
        path: a folder, a Hugging Face id (downloaded if it is not in the cache), "tiny-openvla", "tiny-openvla-ppo", or
            "tiny-openvla-random" (made if needed).

    Raises:
        ConfigError: says where it looked and how to get the checkpoint, or what is missing or torn in it.
    """
    return find_and_check(path, use_proprio)[0]


def find_and_check(path: str | Path, use_proprio: bool) -> tuple[Path, list[str]]:
    """`check_checkpoint`, and the names of the files beside the model, also of those that are not downloaded."""
    made_here = {TINY: lambda: TRAINED, TINY_PPO: lambda: TRAINED_BY_PPO, TINY_RANDOM: ensure_tiny_openvla}
    try:
        folder, names = find_folder(str(made_here[path]() if path in made_here else path))
        check_folder(folder, use_proprio)
        read_trained_as(folder)
        build_network(folder, use_proprio)
    except OSError as error:  # a folder that may not be entered, a disk that fails
        raise ConfigError(f"checkpoint {path} cannot be read ({error}); give a folder that you may read") from error
    return folder, names


DECODERS = {"autoregressive": 1, "parallel": 8}  # decoder -> actions a decision, as OpenVLA and OpenVLA-OFT train them


def check_use(
    decoder: str,
    head: str,
    chunk_size: int | None,
    num_images: int,
    device: str | torch.device,
    dtype: torch.dtype,
    compiled: bool,
) -> int:
    """The chunk size, of a checkpoint that is to be used so: see OpenVLAPolicy.from_checkpoint.

    Raises:
        ConfigError: the arguments do not go with each other or with this machine.
    """
    if decoder not in DECODERS:
        raise ConfigError(f"decoder={decoder!r}; expected one of {', '.join(DECODERS)}")
    if head not in ("tokens", "l1"):
        raise ConfigError(f"head={head!r}; expected tokens or l1")
    if head == "l1" and decoder != "parallel":
        raise ConfigError(
            f"head=l1 with decoder={decoder}; an L1 head reads all action slots at once: set decoder=parallel"
        )
    chunk_size = DECODERS[decoder] if chunk_size is None else chunk_size
    if chunk_size < 1 or (decoder == "autoregressive" and chunk_size != 1):
        raise ConfigError(
            f"chunk_size={chunk_size} with decoder={decoder}; autoregressive decodes 1, parallel 1 or more"
        )
    if num_images not in (1, 2):
        raise ConfigError(f"num_images={num_images}; expected 1 (agent view) or 2 (and wrist camera)")
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype={dtype}; expected torch.float32 or torch.bfloat16")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device; set device=cpu or install a CUDA build of torch")
    if compiled and (problem := can_compile(torch.device(device))):
        raise ConfigError(f"compiled=true, but {problem}; or compile nothing")
    return chunk_size
