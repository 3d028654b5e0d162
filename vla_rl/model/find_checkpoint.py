"""The folder that a checkpoint's name stands for, checked to be whole before anything heavy loads."""

from __future__ import annotations

from pathlib import Path

from vla_rl.model.checkpoint_folder import check_folder, find_folder
from vla_rl.model.prismatic import build_network
from vla_rl.model.tiny_openvla import TRAINED, ensure_tiny_openvla
from vla_rl.model.trained_as import read_trained_as
from vla_rl.run.settings import ConfigError

TINY = "tiny-openvla"  # the checkpoint in the repository, fine-tuned on libero_spatial
TINY_RANDOM = "tiny-openvla-random"  # what it was before: made on first use


def check_checkpoint(path: str | Path, use_proprio: bool = False) -> Path:
    """The folder of a checkpoint, after checking that what the policy needs is in it; loads no weights.

    Args:
        path: a folder, a Hugging Face id (downloaded if it is not in the cache), "tiny-openvla", or "tiny-openvla-random"
            (made if needed).

    Raises:
        ConfigError: says where it looked and how to get the checkpoint, or what is missing or torn in it.
    """
    return find_and_check(path, use_proprio)[0]


def find_and_check(path: str | Path, use_proprio: bool) -> tuple[Path, list[str]]:
    """`check_checkpoint`, and the names of the files beside the model, also of those that are not downloaded."""
    made_here = {TINY: lambda: TRAINED, TINY_RANDOM: ensure_tiny_openvla}
    try:
        folder, names = find_folder(str(made_here[path]() if path in made_here else path))
        check_folder(folder, use_proprio)
        read_trained_as(folder)
        build_network(folder, use_proprio)
    except OSError as error:  # a folder that may not be entered, a disk that fails
        raise ConfigError(f"checkpoint {path} cannot be read ({error}); give a folder that you may read") from error
    return folder, names
