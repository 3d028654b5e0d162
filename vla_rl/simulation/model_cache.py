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
import tempfile
import time
from pathlib import Path

import mujoco

log = logging.getLogger(__name__)


def load_model(xml: str, limit_gb: float) -> mujoco.MjModel:
    """The compiled model of an XML; the cache is left alone where limit_gb is 0, and does without a disk that is full."""
    if limit_gb == 0:
        return compile_model(xml)
    try:
        path = cache_folder() / f"{digest(xml)}.mjb"
        known = path.is_file()
    except (OSError, RuntimeError) as error:  # a folder that is not ours, a user without a home
        log.warning("compiled models are not kept: %s", error)
        return compile_model(xml)
    if known:
        try:
            model = mujoco.MjModel.from_binary_path(str(path))
            os.utime(path)
            return model
        except (ValueError, OSError, mujoco.FatalError) as error:
            log.warning("compiling the model again: %s cannot be read (%s)", path, error)
    model = compile_model(xml)
    try:
        save(model, path)
        prune(path.parent, limit_gb)
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


def save(model: mujoco.MjModel, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")  # mj_saveModel itself would only print an error
    os.close(handle)
    unfinished = Path(name)
    try:
        mujoco.mj_saveModel(model, name, None)
        if unfinished.stat().st_size != mujoco.mj_sizeModel(model):
            raise OSError("the file is not whole: is the disk full?")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def prune(folder: Path, limit_gb: float) -> None:
    """Keeps the most recently used models, and no unfinished file of a process that was killed an hour ago."""
    times = {file: file.stat().st_mtime for file in folder.iterdir() if file.suffix in (".mjb", ".tmp")}
    total = 0
    for file in sorted(times, key=times.get, reverse=True):
        total += file.stat().st_size
        abandoned = file.suffix == ".tmp" and time.time() - times[file] > 3600
        if abandoned or (total > limit_gb * 1e9 and file.suffix == ".mjb"):
            file.unlink(missing_ok=True)


def compile_model(xml: str) -> mujoco.MjModel:
    model = mujoco.MjModel.from_xml_string(xml)
    # MuJoCo keeps the last parsed XML with its meshes and textures, 0.3 GB, for mj_saveLastXML
    for library in Path(mujoco.__file__).parent.glob("libmujoco.so*"):  # the one that mujoco has loaded
        ctypes.CDLL(str(library)).mj_freeLastXML()
        ctypes.CDLL(None).malloc_trim(0)
    return model
