"""How a checkpoint was trained, and whether it is used so: run otherwise it fails without a word.

tiny-openvla, six greedy states of the task it solves best: 100 %; without its proprio or with chunks of 4: 0 %; without its
centre crop: 83 %. vla_rl.sft writes trained_as.json beside the model; the official checkpoints have none, but some tell by
their files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vla_rl.model.checkpoint_folder import file_names, find_l1_head, find_proprio_file, read_json

log = logging.getLogger(__name__)

TRAINED_AS = "trained_as.json"


def read_trained_as(folder: Path) -> dict[str, Any] | None:
    """Settings under which a checkpoint was trained, as vla_rl.sft writes them: decoder, head, num_images, use_proprio,
    chunk_size, center_crop, image_size, render; None of an official checkpoint, which has no such file."""
    path = Path(folder) / TRAINED_AS
    return read_json(path) if path.is_file() else None


def write_trained_as(folder: Path, trained_as: Mapping[str, Any]) -> None:
    (Path(folder) / TRAINED_AS).write_text(json.dumps(trained_as, indent=1) + "\n")


def differences(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """What of these settings ("policy.chunk_size", "env.render", ...) is otherwise than the checkpoint was trained, each with
    the way out; empty where nothing is known."""
    trained = read_trained_as(folder) or {}
    found = []
    for name, value in settings.items():
        known = trained.get(name.rpartition(".")[2])
        if known is not None and known != value:
            was = str(known).lower() if isinstance(known, bool) else known
            now = str(value).lower() if isinstance(value, bool) else value
            found.append(f"{name}={now}, but {folder.name} was trained with {was}: set {name}={was}")
    return found


def warn_of_other_use(source: str | Path, folder: Path, settings: Mapping[str, Any]) -> None:
    """Says what is known to make a checkpoint fail: a head that was not trained, another use than in its training.

    Args:
        source: where it came from: the folder, or a Hugging Face id, of which the folder has only a part.
        settings: as `differences`.
    """
    head, projector = find_l1_head(file_names(source)), find_proprio_file(folder)
    if settings["policy.decoder"] == "parallel" and head is not None:
        log.warning(
            "%s has an L1 action head (%s): its token head, which this policy samples from, was not trained and solves "
            "no task; start from a checkpoint with a trained token head, such as Haozhan72/Openvla-oft-SFT-libero-*",
            *(source, head),
        )
    for difference in differences(folder, settings):
        log.warning("%s", difference)
    if projector is not None and read_trained_as(folder) is None and not settings["policy.use_proprio"]:
        log.warning(
            "%s has a proprio projector (%s), so it was trained with proprioception: set policy.use_proprio=true",
            *(source, projector.name),
        )
