"""How a checkpoint was trained, and whether it is used so: run otherwise it fails without a word.

tiny-openvla, six greedy states of the task it solves best: 100 %; without its proprio or with chunks of 4: 0 %; without its
centre crop: 83 %. vla_rl.sft writes trained_as.json beside the model; the official checkpoints have none, but some tell by
their files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vla_rl.model.checkpoint_folder import TRAINED_AS, find_l1_head, find_proprio_file
from vla_rl.run.files import read_json
from vla_rl.run.settings import ConfigError

log = logging.getLogger(__name__)

WAYS_FROM_L1 = (
    "evaluate it with policy.head=l1, teach its token head with `python -m vla_rl.warmstart --checkpoint ...` before a training, or start "
    "from a checkpoint with a trained token head, such as Haozhan72/Openvla-oft-SFT-libero-*"
)

# how the policy is used, settings of its own
USE = {"decoder": str, "num_images": int, "use_proprio": bool, "chunk_size": int, "center_crop": bool}
KINDS = USE | {
    "head": str,  # what the actions were learned through: "tokens" or "l1"
    "image_size": int,  # px, of the camera
    "render": str,
}


def read_trained_as(folder: Path) -> dict[str, Any] | None:
    """Settings under which a checkpoint was trained, those of KINDS, null where it is not known; None of an official
    checkpoint, which has no such file.

    Raises:
        ConfigError: the file is torn, or has something else in it.
    """
    path = Path(folder) / TRAINED_AS
    if not path.exists():
        return None
    trained = read_json(path)
    for name, value in trained.items():
        if name not in KINDS or (value is not None and type(value) is not KINDS[name]):
            known = ", ".join(f"{key} ({kind.__name__})" for key, kind in KINDS.items())
            raise ConfigError(
                f"{path}: {name if name.isidentifier() else repr(name):.40}={value!r:.80}, expected some of {known}; correct the file or remove it"
            )
    return trained


def write_trained_as(folder: Path, trained_as: Mapping[str, Any]) -> None:
    (Path(folder) / TRAINED_AS).write_text(json.dumps(trained_as, indent=1) + "\n")


def differences(folder: Path, settings: Mapping[str, Any], source: str | None = None) -> list[str]:
    """What of these settings ("policy.chunk_size", "env.render", ...) is otherwise than the checkpoint was trained, each with
    the way out; empty where nothing is known.

    Args:
        source: what the checkpoint is called; None calls it by its folder.
    """
    trained = read_trained_as(folder) or {}
    found = []
    for name, value in settings.items():
        known = trained.get(name.rpartition(".")[2])
        if known is not None and known != value:
            was, now = (str(v).lower() if isinstance(v, bool) else v for v in (known, value))
            found.append(f"{name}={now}, but {source or folder.name} was trained with {was}: set {name}={was}")
    return found


def l1_head_of(folder: Path, names: Iterable[str]) -> str | None:
    """What tells that a checkpoint acts through an L1 head: its file, or trained_as.json; None if nothing does.

    Args:
        names: of the files beside the model, also of those that were not downloaded.
    """
    head = (read_trained_as(folder) or {}).get("head") or "tokens"
    return find_l1_head(names) or (None if head == "tokens" else f"trained_as.json: {head}")


def warn_of_other_use(source: str, folder: Path, names: Iterable[str], settings: Mapping[str, Any]) -> None:
    """Says what is known to make a checkpoint fail: a head that was not trained, another use than in its training.

    Args:
        source: what the checkpoint is called: its folder, or its Hugging Face id.
        names: of the files beside the model, also of those that were not downloaded.
        settings: as `differences`.
    """
    trained, projector, l1_head = read_trained_as(folder), find_proprio_file(folder), l1_head_of(folder, names)
    if l1_head is not None and settings.get("policy.head", "tokens") == "tokens":
        log.warning(
            "%s has an L1 action head (%s): its token head, which this policy samples from, was not trained and solves "
            "no task; %s",
            *(source, l1_head, WAYS_FROM_L1),
        )
    for difference in differences(folder, settings, source):
        log.warning("%s", difference)
    if projector is not None and trained is None and not settings["policy.use_proprio"]:
        log.warning(
            "%s has a proprio projector (%s), so it was trained with proprioception: set policy.use_proprio=true",
            *(source, projector.name),
        )
