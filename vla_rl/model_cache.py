"""Compiled MuJoCo models on disk: to read one takes a quarter of the time of compiling its XML, meshes and textures.

A file is 0.25 GB; the least recently used go when the folder is over its limit. Its name is a digest of the XML, of the
size and time of every file that the XML names, and of MuJoCo's version. Processes may share the folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
from pathlib import Path

import mujoco

log = logging.getLogger(__name__)


def load_model(xml: str, limit_gb: float) -> mujoco.MjModel:
    """The compiled model of an XML; the cache is left alone where limit_gb is 0, and does without a disk that is full."""
    if limit_gb == 0:
        return compile_model(xml)
    path = cache_folder() / f"{digest(xml)}.mjb"
    if path.exists():
        try:
            model = mujoco.MjModel.from_binary_path(str(path))
            os.utime(path)
            return model
        except (ValueError, OSError, mujoco.FatalError) as error:
            log.warning("compiling the model again: %s cannot be read (%s)", path, error)
    model = compile_model(xml)
    try:
        save(model, path, limit_gb)
    except (OSError, mujoco.FatalError) as error:
        log.warning("the compiled model was not kept in %s: %s", path.parent, error)
    return model


def cache_folder() -> Path:
    """$VLA_RL_CACHE, or vla_rl in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("VLA_RL_CACHE") or user / "vla_rl")


def digest(xml: str) -> str:
    parts = [mujoco.__version__, xml]
    for name in sorted(set(re.findall(r'file="([^"]+)"', xml))):
        stat = os.stat(name)
        parts.append(f"{name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def save(model: mujoco.MjModel, path: Path, limit_gb: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        unfinished.touch()  # where this fails, mj_saveModel would only print
        mujoco.mj_saveModel(model, str(unfinished), None)
        if unfinished.stat().st_size != mujoco.mj_sizeModel(model):  # a full disk is no error to mj_saveModel
            raise OSError("the file is not whole: is the disk full?")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    files = sorted(path.parent.glob("*.mjb"), key=lambda file: file.stat().st_mtime, reverse=True)
    total = 0
    for file in files:
        total += file.stat().st_size
        if total > limit_gb * 1e9:
            file.unlink(missing_ok=True)


def compile_model(xml: str) -> mujoco.MjModel:
    model = mujoco.MjModel.from_xml_string(xml)
    # MuJoCo keeps the last parsed XML with its meshes and textures, 0.3 GB, for mj_saveLastXML
    for library in Path(mujoco.__file__).parent.glob("libmujoco.so*"):  # the one that mujoco has loaded
        ctypes.CDLL(str(library)).mj_freeLastXML()
        ctypes.CDLL(None).malloc_trim(0)
    return model
