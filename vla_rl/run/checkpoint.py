"""Checkpoints on disk: written whole or not at all, verified before they are read.

A checkpoint is a folder runs/RUN/checkpoints/iteration-000010 with
    adapter/                 LoRA in peft's own format (adapter_config.json, adapter_model.safetensors)
    value_head.safetensors   absent without a critic
    trainer.pt               both optimizers, RNG states, counters, episodes under way (tensors and plain values only)
    config.yaml              every setting of the run
    manifest.json            model fingerprint, size and SHA-256 of every file; written last
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from vla_rl.run.failures import one_line
from vla_rl.run.files import all_tensors, load_torch, open_tensors, read_json
from vla_rl.run.settings import ConfigError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # as peft names them
BEST = "best-"  # before the name of what vla_rl.run.best_checkpoint keeps
# what flock answers on Lustre without -o flock, on some NFS and FUSE
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


class CheckpointError(ConfigError):
    """A checkpoint that cannot be used; the message says which file, why, and what can be."""


def write_checkpoint(
    root: Path,
    name: str,
    fingerprint: str,
    write_files: Callable[[Path], None],
    keep: int,
    keep_every: int | None = None,
) -> Path:
    """Writes root/name atomically and removes the oldest ones beyond `keep`.

    Args:
        root: in the run's folder, which is there: one that is gone for a while must not be made anew in another place.
        fingerprint: of the model; a checkpoint is refused for another one.
        write_files: fills the folder that it is given.
        keep_every: those whose number is a multiple of it are not removed.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it cannot be written; those before it are as they were.
    """
    root.mkdir(exist_ok=True)
    remove_left_overs(root)
    unfinished = root / f".{name}.tmp"
    unfinished.mkdir()
    try:
        write_files(unfinished)
        write_manifest(unfinished, fingerprint)
    except BaseException:  # a full disk, say: leave it as free as it was
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    final = root / name
    replaced = root / f".{name}.old"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # the same iteration again: a run that ends right after a periodic checkpoint
        os.replace(final, replaced)
    os.replace(unfinished, final)
    sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in list_checkpoints(root)[:-keep]:
        wanted = keep_every is not None and checkpoint_number(old) % keep_every == 0 and checkpoint_number(old) > 0
        if old != final and not wanted:  # later ones are there only if nobody has set them aside
            remove_checkpoint(old)
    return final


def remove_checkpoint(folder: Path) -> None:
    """Under a hidden name, since half of a checkpoint must not be listed; what a kill leaves is removed by the next start."""
    gone = folder.with_name(f".{folder.name}.gone")
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_left_overs(root: Path) -> None:
    """What a run that was killed while it wrote or removed a checkpoint has left. A checkpoint that was about to be replaced, and
    was not, stays: `find_checkpoint` gives it its name again."""
    for path in root.glob(".*iteration-*"):
        match = re.fullmatch(rf"\.((?:{BEST})?iteration-[0-9]+)\.(tmp|old|gone)", path.name)
        if match and (match[2] != "old" or match[1].startswith(BEST) or (root / match[1]).exists()):
            shutil.rmtree(path, ignore_errors=True)


def write_manifest(folder: Path, fingerprint: str) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "fingerprint": fingerprint,
        "files": {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def set_aside_later_checkpoints(folder: Path) -> None:
    """Renames what is later than a checkpoint that a run resumes from to superseded-NAME, or superseded-1-NAME, ...; a best one, too.

    They are not of the resumed run's history, so the next resume must not find them; nor must they be lost. The newest goes
    first: whenever this is interrupted, what is left is the beginning of a history.

    Raises:
        CheckpointError: the folder has no checkpoint's name.
    """
    number = checkpoint_number(folder)
    if number is None:
        raise CheckpointError(f"{folder} is not named as a checkpoint is, iteration-NUMBER; rename it")
    remove_left_overs(folder.parent)
    for later in [*reversed(list_checkpoints(folder.parent, BEST)), *reversed(list_checkpoints(folder.parent))]:
        if checkpoint_number(later) > number:
            names = (f"superseded-{f'{n}-' if n else ''}{later.name}" for n in itertools.count())
            os.replace(later, next(p for name in names if not (p := folder.parent / name).exists()))


def checkpoint_number(folder: Path) -> int | None:
    """10 of iteration-000010 or best-iteration-000010; None of any other name, which is not ours to read or remove."""
    match = re.fullmatch(rf"(?:{BEST})?iteration-([0-9]+)", folder.name)
    return int(match[1]) if match else None


def list_checkpoints(root: Path, kind: str = "") -> list[Path]:
    """Finished checkpoint folders, oldest first: by their number, as iteration-1000000 comes before iteration-999999 in
    the order of names. kind: BEST lists those of best evaluations instead, the last of which is the best."""
    found = [path for path in root.glob(f"{kind}iteration-*") if checkpoint_number(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: (checkpoint_number(path), path.name))


def find_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run folder, or `run` itself if it is a checkpoint; verified.

    Raises:
        CheckpointError: no such folder, no checkpoint in it, or the newest one is torn.
    """
    run = Path(run)
    if run.parent.name == "checkpoints" and run.name.startswith(BEST.rstrip("-")):
        raise CheckpointError(f"{run} is kept to be used, not to go on from; start a new run with policy.adapter={run}")
    if not run.is_dir():
        raise CheckpointError(f"no run folder {run}; --resume takes a folder such as runs/NAME")
    is_checkpoint = run.name.startswith("iteration-") or (run / MANIFEST).is_file()
    if is_checkpoint and not (run / "checkpoints").is_dir():
        if checkpoint_number(run) is None:
            raise CheckpointError(f"{run} is not named as a checkpoint is, iteration-NUMBER; rename it")
        verify(run)
        return run
    restore_replaced(run)
    found = list_checkpoints(run / "checkpoints")
    if not found:
        raise CheckpointError(
            f"{run} has no checkpoint in {run / 'checkpoints'}; the run ended before its first one: remove or rename it, and start anew"
        )
    return newest_verified(found, "resume from the one before: --resume ")


def restore_replaced(run: Path) -> None:
    """Of a run that was killed between the two renames of a checkpoint that it wrote again."""
    for replaced in (run / "checkpoints").glob(".iteration-*.old"):
        final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".old"))
        if checkpoint_number(final) is not None and not final.exists():
            os.replace(replaced, final)


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint of a run that is whole; those that are not are passed over with a warning."""
    restore_replaced(run)
    for folder in reversed(list_checkpoints(run / "checkpoints")):
        try:
            verify(folder)
        except CheckpointError as error:
            log.warning("%s; the one before is taken", error)
        else:
            return folder
    return None


def newest_verified(found: list[Path], way_out: str) -> Path:
    """The last of some checkpoints.

    Args:
        way_out: what to say before the name of the one before, where the last one is torn.

    Raises:
        CheckpointError: it is.
    """
    try:
        verify(found[-1])
    except CheckpointError as error:
        earlier = f"; {way_out}{found[-2]}" if len(found) > 1 else ""
        raise CheckpointError(f"{error}{earlier}") from None
    return found[-1]


def find_saved(folder: Path, said: str) -> Path:
    """As find_checkpoint, for use and not to go on from: the run may be going on, so nothing is repaired. A best one does too,
    by the name of its folder or as RUN/checkpoints/best.

    Args:
        said: what names it in an error, such as "--run " or "policy.adapter=".

    Raises:
        ConfigError: no run, no checkpoint in it, or a torn one.
    """
    if folder.name == BEST.rstrip("-") and folder.parent.name == "checkpoints" and not folder.exists():
        best = list_checkpoints(folder.parent, BEST)
        if not best:
            raise ConfigError(f"{said}{folder}: no evaluation's checkpoint is kept there (logging.keep_best)")
        folder = best[-1]
    if not folder.is_dir():
        raise ConfigError(f"{said}{folder}: no such folder; give a run's, such as runs/NAME, or one of its checkpoints")
    if (folder / MANIFEST).exists() or (
        checkpoint_number(folder) is not None and not (folder / "checkpoints").is_dir()
    ):
        verify(folder)
        return folder.absolute()
    found = list_checkpoints(folder / "checkpoints")
    if not found:
        model = f"; it has a fine-tuned model: {folder / 'model'}" if (folder / "model").is_dir() else ""
        raise ConfigError(f"{said}{folder} has no checkpoint in {folder / 'checkpoints'} yet{model}")
    return newest_verified(found, f"take the one before: {said}").absolute()


def find_adapter(folder: Path, said: str) -> Path:
    """LoRA weights in peft's format: `folder` itself, or those of a run's newest checkpoint or of one that is named.

    Args:
        said: as find_saved.

    Raises:
        ConfigError: there are none, or they are torn.
    """
    if not any((folder / name).exists() for name in (*ADAPTER_FILES, "adapter_model.bin")):
        saved = (folder / MANIFEST, folder / "checkpoints")
        if folder.is_dir() and not any(path.exists() for path in saved) and checkpoint_number(folder) is None:
            raise ConfigError(
                f"{said}{folder} has no {ADAPTER_FILES[0]}; give a run, one of its checkpoints, or a folder in peft's format"
            )
        folder = find_saved(folder, said) / "adapter"
    missing = [name for name in ADAPTER_FILES if not (folder / name).exists()]
    if missing:
        raise ConfigError(
            f"{said}{folder} has no {missing[0]}; give a run of PPO or GRPO, or a folder in peft's format"
        )
    return folder.absolute()


def verify(folder: Path, fingerprint: str | None = None) -> dict[str, Any]:
    """Checks that every file is there and whole, and, if given, that the model is the same.

    Returns:
        The manifest.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint does not fit.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            if not path.is_file():
                raise torn(folder, f"{name} is missing")
            if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
                raise torn(folder, f"{name} is not what was written")
        except OSError as error:  # a name that is too long, a file that cannot be read
            raise torn(folder, f"{name} cannot be read ({error.strerror})") from None
    made_with = manifest["fingerprint"]
    if fingerprint is not None and made_with != fingerprint:
        raise CheckpointError(
            f"checkpoint {folder} does not fit this run: it was made with {made_with:.300}, this run has {fingerprint}"
        )
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """{"fingerprint": text, "files": {path within the folder: {"bytes": size, "sha256": text}}}, nothing else.

    Raises:
        CheckpointError: it is not there or is anything else.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        match manifest:
            case {"fingerprint": str(), "files": {**files}} if files:
                pass
            case _:
                raise ValueError("it has no fingerprint or lists no files")
        if not manifest["fingerprint"].isprintable():
            raise ValueError("its fingerprint is no text of one line")
        for name, entry in files.items():
            match entry:
                case {"bytes": int(), "sha256": str()} if is_within(name):
                    pass
                case _:
                    raise ValueError(f"its entry {name!r:.80} is not a file of this folder with bytes and sha256")
    except (OSError, ValueError, RecursionError) as error:
        raise torn(folder, f"{MANIFEST} cannot be read ({error})") from None
    return manifest


def is_within(name: str) -> bool:
    path = PurePosixPath(name)
    return name.isprintable() and not path.is_absolute() and ".." not in path.parts


def torn(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {folder} is torn: {' '.join(why.split())[:400]}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Two processes must not write into one run. The lock goes with the process, however that ends.

    Raises:
        ConfigError: another process has the lock, or .lock is no file.
    """
    lock = folder / ".lock"
    if os.path.lexists(lock) and (lock.is_symlink() or not lock.is_file()):
        raise ConfigError(f"{lock} is a folder, link or pipe, expected the empty file of a run; remove it")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is working on {folder}; wait for its end, or stop it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning(
                "%s is on a file system without locks (%s): two processes that work on it would not notice each other",
                *(folder, error.strerror),
            )
        yield


def save_tensors(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """A safetensors file. Through Python's own write, whose OSError tells of a full disk; so does save_torch."""
    path.write_bytes(safetensors.torch.save(tensors, metadata or None))


def save_torch(value: Any, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def load_trainer_state(folder: Path) -> dict[str, Any]:
    """trainer.pt of a checkpoint, on the CPU; tensors and plain values only.

    Raises:
        CheckpointError: it cannot be loaded, whatever its checksum says.
    """
    with loading(folder / "trainer.pt"):
        state = load_torch(folder / "trainer.pt")
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not a dict")
    return state


def whole_number(state: dict[str, Any], name: str, least: int = 0) -> int:
    """A counter of trainer.pt; raises ValueError where it is none."""
    value = state.get(name)
    if type(value) is not int or not least <= value < 2**53:
        raise ValueError(f"{name} is {value!r:.60}, expected a whole number from {least}")
    return value


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, on the CPU.

    Raises:
        ConfigError: it cannot be loaded, whatever its checksum says.
    """
    with loading(path), open_tensors(path) as file:
        return all_tensors(path, file)


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Around what reads a file or folder of a checkpoint: its failure names the checkpoint, on one line."""
    try:
        yield
    except ConfigError:  # says it in its own words
        raise
    except Exception as error:  # of pickle, zip files, torch, safetensors: there is no common kind
        raise torn(path.parent, f"{path.name} cannot be loaded ({one_line(error)})") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk, so that a power cut after the rename cannot leave it empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cpu_copy(value: Any) -> Any:
    """A copy of nested dicts and lists with every tensor detached and on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: cpu_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cpu_copy(item) for item in value]
    return value
