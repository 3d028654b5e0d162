"""Demonstrations on disk, in LIBERO's own HDF5 layout: its official data sets and ours are read by the same code.

    data                    attributes: bddl_file_name, problem_info, env_args, num_demos, total, ...; ours: made_with
    data/demo_0             attributes: num_samples, init_state, ...
        actions             [T, 7] of robosuite's OSC_POSE: -1..1, gripper -1 opens, 1 closes
        states              [T, 1 + nq + nv] of MuJoCo, before each action
        rewards, dones      [T], 1 in the last step
        robot_states        [T, 9]: fingers (2), end-effector position (3), quaternion (4)
        obs/agentview_rgb, obs/eye_in_hand_rgb      uint8 [T, H, W, 3], upside down as LIBERO renders them
        obs/ee_pos, ee_ori, ee_states, gripper_states, joint_states     [T, 3 | 3 | 6 | 2 | 7]

(LIBERO 8f1084e, scripts/create_dataset.py.) LIBERO's own files have in obs what came after the action of the same row,
those of OpenVLA's regenerate_libero_dataset.py and ours what came before it; both are read as what came before. A file may
hold several tasks: a demonstration's own bddl_file_name counts before the file's. Not here: who demonstrates
(vla_rl.demonstrations), which numbers cannot be of the layout's units (vla_rl.fine_tuning.demonstration_units), what is learned
(vla_rl.sft).

T steps of a demonstration, K images.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from vla_rl.fine_tuning.demonstration_units import (
    ACTION_EXCESS,
    UnitsError,
    check_fingers,
    check_gripper,
    check_image,
    check_ranges,
    no_ops,
)
from vla_rl.run.machine import available_memory
from vla_rl.run.settings import ConfigError
from vla_rl.types import ACTION_DIM

log = logging.getLogger(__name__)

SUFFIXES = (".hdf5", ".h5")  # of files that are written, and of those that are looked for in a folder
CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")  # in the order of OpenVLA-OFT's images
NUM_JOINTS = 7  # of the arm, first in a state's positions
SPARE_BYTES = 2**24  # that a disk must have beside a demonstration: for the file's own tables
DAMAGES = (OSError, KeyError, ValueError, TypeError, RuntimeError, OverflowError)  # what h5py raises, and this module
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"  # HDF5 file format specification, superblock
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # git-lfs, docs/spec.md
MAX_FOLDERS = 3  # that a message names
MAX_SHOWN = 80  # characters of a value in a message
MAX_ARRAY_BYTES = 4e9  # 20,000 steps of 256 x 256 pixels; LIBERO's longest demonstration has 500 of 128 x 128


@dataclass(frozen=True)
class Demonstration:
    """One episode, as a policy would have seen it."""

    name: str  # "demo_0"
    instruction: str
    images: np.ndarray  # uint8 [T, K, H, W, 3], right way up
    proprio: np.ndarray  # float32 [T, 8], metres, radians (axis-angle), metres
    actions: np.ndarray  # float64 [T, 7], environment units
    render: str | None = None  # how the images were rendered: "exact", "fast", or unknown

    def __len__(self) -> int:
        return len(self.actions)


class DemonstrationFile:
    """A file that is being written; it gets its name when it is closed whole, so that a torn one is never read.

    Raises:
        ConfigError: another process is writing it, or the place has no locks.
    """

    def __init__(self, path: Path, attributes: Mapping[str, Any]):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.unfinished = self.path.with_name(f".{self.path.name}.tmp")
        remove_remains(self.unfinished)
        self.file = open_file(self.unfinished, "x")
        self.data = self.file.create_group("data")
        self.data.attrs.update(attributes)
        self.count = self.total = 0

    def add(self, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
        """Appends demo_N. arrays: dataset name ("actions", "obs/ee_pos", ...) -> [T, ...].

        Raises:
            OSError: the disk is nearly full. Asked before, since the HDF5 library crashes when a write fails.
        """
        needed = SPARE_BYTES + sum(array.nbytes for array in arrays.values())
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{free:,} bytes free, {needed:,} wanted", str(self.path))
        demo = self.data.create_group(f"demo_{self.count}")
        for name, array in arrays.items():
            compressed = {"compression": "gzip", "compression_opts": 1} if array.dtype == np.uint8 else {}
            demo.create_dataset(name, data=array, **compressed)
        demo.attrs.update({"num_samples": len(arrays["actions"]), **attributes})
        self.count += 1
        self.total += len(arrays["actions"])

    def __enter__(self) -> DemonstrationFile:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.data.attrs.update(num_demos=self.count, total=self.total)
            self.file.close()
            os.replace(self.unfinished, self.path)
        else:
            self.file.close()
            self.unfinished.unlink(missing_ok=True)


def remove_remains(path: Path) -> None:
    """Removes what a process that was killed has left of its file.

    Raises:
        ConfigError: the process lives. HDF5's mode "w" would ask for the lock after it has emptied the file.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{path} {why_not_opened(path, error)}") from None
        except OSError:
            pass  # no locks here: nothing tells
        path.unlink()


def open_file(path: Path, mode: str) -> h5py.File:
    """An open HDF5 file.

    Raises:
        ConfigError: it cannot be opened; tells a missing, a locked, a forbidden, a torn and another kind of file apart.
        OSError: the disk is full.
    """
    try:
        return h5py.File(path, mode)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"{path} {why_not_opened(path, error)}") from None
    except DAMAGES as error:
        raise ConfigError(f"{path} cannot be read as HDF5: {one_line(error)}; make or download it anew") from None


def why_not_opened(path: Path, error: OSError) -> str:
    """What is the matter with a file, and the way out."""
    said = one_line(error)
    no_locks = "set the environment variable HDF5_USE_FILE_LOCKING=FALSE"
    if error.errno in (errno.EAGAIN, errno.EDEADLK) or ("lock file" in said and error.errno == errno.EACCES):
        return (
            "is locked: another process has it open for writing; wait for its end, or stop it (if there is none, the file "
            f"system cannot lock files: {no_locks})"
        )
    if "lock file" in said or error.errno == errno.ENOLCK:
        return (
            f"cannot be locked: its file system has no locks ({os.strerror(error.errno or errno.ENOLCK)}); {no_locks}"
        )
    if "already open for write" in said:
        return (
            f"was not closed by the process that wrote it; wait for its end, or if it was killed run h5clear -s {path}"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"may not be opened: {os.strerror(error.errno)}; change its permissions, or choose another place"
    if error.errno == errno.ENOENT:
        return "is missing, or a link to what is missing; name a file that is there"
    if error.errno is not None:
        return f"cannot be opened: {os.strerror(error.errno)}; name a file that can be read"
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return "is a pointer of Git LFS, not the file itself; run git lfs pull in its repository"
    size = f"{path.stat().st_size} bytes"
    if not start:
        return "cannot be read as HDF5: it is torn, it has 0 bytes; make or download it anew"
    if start.startswith(HDF5_SIGNATURE):
        return f"cannot be read as HDF5: it is torn, {size} are there ({said}); make or download it anew"
    return f"cannot be read as HDF5: it is another kind of file, which begins with {start[:16]!r}; name an HDF5 file"


def one_line(error: Exception) -> str:
    """What an error says, without the quotes of a KeyError."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(said).split())


def has_suffix(path: Path) -> bool:
    """Whether a name is that of an HDF5 file, in capitals or not."""
    return path.suffix.lower() in SUFFIXES


def find_files(paths: list[str]) -> list[Path]:
    """The HDF5 files that are named, and those in the folders that are named, not in their sub-folders.

    Raises:
        ConfigError: there is none, or a folder cannot be read.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        try:
            files = files_in(path) if path.is_dir() else [path] if path.is_file() else []
            if not files:
                raise ConfigError(f"demonstrations: {nothing_found(path)}")
        except OSError as error:
            raise ConfigError(f"demonstrations: {path} cannot be read: {error.strerror}; name another place") from None
        found += files
    return found


def files_in(folder: Path) -> list[Path]:
    """Hidden ones are left out: remains of copying."""
    return sorted(p for p in folder.iterdir() if has_suffix(p) and not p.name.startswith(".") and not p.is_dir())


def nothing_found(path: Path) -> str:
    if not path.is_dir():
        return f"no file {path}; make one with python -m vla_rl.demonstrations"
    there = (Path(folder) for folder, _, names in os.walk(path) if any(has_suffix(Path(name)) for name in names))
    below = [str(folder) for folder in itertools.islice((folder for folder in there if folder != path), MAX_FOLDERS)]
    out = (
        f"name its sub-folders that have some: {', '.join(below)}"
        if below
        else "make one with python -m vla_rl.demonstrations"
    )
    return f"no {' or '.join(SUFFIXES)} file in the folder {path}; {out}"


def read_demonstrations(
    path: Path, num_images: int, filter_no_ops: bool, instructions: Mapping[str, str]
) -> Iterator[Demonstration]:
    """The demonstrations of a file, checked, one at a time.

    Args:
        num_images: K, 1 is the agent view, 2 adds the wrist camera.
        filter_no_ops: leave out steps that do nothing (see no_ops), as OpenVLA's data have it.
        instructions: of the benchmark's tasks, by name (suites.task_instructions); a file's own are used for other tasks.

    Raises:
        ConfigError: the file or a demonstration in it is damaged, of another layout or in other units; names it.
    """
    with open_file(path, "r") as file:
        try:
            refuse_links(file)
            data = file.get("data")
            names = sorted(data, key=demo_number) if isinstance(data, h5py.Group) else []
            if names:
                refuse_links(data)
        except DAMAGES as error:
            raise ConfigError(f"{path} is damaged: {one_line(error)}; make or download it anew") from error
        if not names:
            raise ConfigError(f"{path} has no demonstrations: expected groups data/demo_0, ... as LIBERO's files have")
        try:
            check_file(path, data, names)
        except UnitsError as error:
            raise ConfigError(f"{path}: {error}") from None
        low, high = np.full(num_images, 255), np.zeros(num_images)  # of each camera's pixels
        for name in names:
            try:
                demonstration = read_demonstration(path, data, name, num_images, filter_no_ops, instructions)
            except UnitsError as error:
                raise ConfigError(f"{path}: demonstration {name}: {error}") from None
            except DAMAGES as error:
                raise ConfigError(
                    f"{path}: demonstration {name} is damaged: {one_line(error)}; make or download the file anew, or remove "
                    "the group"
                ) from error
            low = np.minimum(low, demonstration.images.min(axis=(0, 2, 3, 4)))
            high = np.maximum(high, demonstration.images.max(axis=(0, 2, 3, 4)))
            yield demonstration
        for camera, lowest, highest in zip(CAMERAS, low, high, strict=False):
            if lowest == highest:
                raise ConfigError(
                    f"{path}: every pixel of obs/{camera} is {lowest:.0f}, it has no picture; render it anew"
                )


def demo_number(name: str) -> tuple[int, str]:
    digits = re.search(r"\d+$", name)
    return int(digits.group()) if digits else -1, name


def read_demonstration(
    path: Path, data: h5py.Group, name: str, num_images: int, filter_no_ops: bool, instructions: Mapping[str, str]
) -> Demonstration:
    demo = demo_of(data, name)
    actions = read_array(demo, "actions", None, (ACTION_DIM,))
    steps = len(actions)
    if steps == 0:
        raise ValueError("it has no steps")
    expected = demo.attrs.get("num_samples", steps)
    if not isinstance(expected, int | np.integer):
        raise ValueError(f"attribute num_samples is {shown(expected)}, expected an integer")
    if expected != steps:
        raise ValueError(f"num_samples is {expected}, but actions has {steps} steps")
    if getattr(demo.get("obs/ee_states"), "shape", None) == (steps, 7):
        raise UnitsError(
            "obs/ee_states has 7 columns, which look like position and quaternion; expected [T, 6], position and axis-angle: "
            "convert it with robosuite's quat2axisangle"
        )
    proprio = [
        read_array(demo, f"obs/{key}", steps, (size,)) for key, size in (("ee_states", 6), ("gripper_states", 2))
    ]
    check_ranges(actions, *proprio)
    actions = np.clip(actions.astype(np.float64), -1, 1)
    images = [read_array(demo, f"obs/{camera}", steps, (None, None, 3)) for camera in CAMERAS[:num_images]]
    for camera, image in zip(CAMERAS, images, strict=False):
        if image.dtype != np.uint8:
            raise ValueError(f"images obs/{camera} are {image.dtype}, expected uint8")
        if image.shape != images[0].shape or image.size == 0:
            sides = " and ".join(f"{array.shape[1]} x {array.shape[2]}" for array in images)
            raise ValueError(f"images are {sides} pixels, expected one size of all cameras")
        check_image(camera, image)
    seen = np.concatenate(proprio, axis=1), np.stack(images, axis=1)
    if observed_after(demo, steps):
        actions, seen = actions[1:], tuple(array[:-1] for array in seen)
    keep = ~no_ops(actions) if filter_no_ops else np.ones(len(actions), dtype=bool)
    if not keep.any():
        raise ValueError("every action is a no-op")
    return Demonstration(
        name=name,
        instruction=read_instruction(path, demo, data, instructions),
        images=np.ascontiguousarray(seen[1][keep, :, ::-1, ::-1]),
        proprio=seen[0][keep].astype(np.float32),
        actions=actions[keep],
        render=read_render(demo, data),
    )


def check_file(path: Path, data: h5py.Group, names: Sequence[str]) -> None:
    """Checks what no demonstration tells alone, and warns of actions that are clipped. A damaged demonstration is left out
    here: reading it tells more.

    Raises:
        UnitsError: no gripper command of the file opens, or gripper_states are an openness.
    """
    actions, fingers = [], []  # of each demonstration
    for name in names:
        try:
            action = read_array(demo_of(data, name), "actions", None, (ACTION_DIM,)).astype(np.float64)
            finger = read_array(data[name], "obs/gripper_states", len(action), (2,)).astype(np.float64)
        except DAMAGES:
            continue
        if len(action) and np.abs(action).max() <= 1 + ACTION_EXCESS:
            actions.append(action)
            fingers.append(finger)
    if not actions:
        return
    check_fingers(np.concatenate(fingers))
    check_gripper([action[:, -1] for action in actions], fingers)
    largest = max(np.abs(action).max() for action in actions)
    if largest > 1:
        log.warning("%s: actions reach %.9g; clipped to -1..1, as robosuite does when it executes them", path, largest)


def observed_after(demo: h5py.Group, steps: int) -> bool:
    """Whether obs[t] is of the moment after actions[t]: whether its joints are those of states[t + 1], not of states[t].

    states[t] is before actions[t] in every file; LIBERO's script appends to obs what env.step(actions[t]) returned.
    Without both arrays it cannot be told: then obs are taken as they are, of the moment before.
    """
    if steps < 2 or "states" not in demo or "obs/joint_states" not in demo:
        return False
    arm = read_array(demo, "states", steps, (None,))[:, 1 : 1 + NUM_JOINTS]  # after the time
    joints = read_array(demo, "obs/joint_states", steps, (NUM_JOINTS,))
    if arm.shape != joints.shape:
        raise ValueError(f"states has {arm.shape[1] + 1} columns, expected the time and more than {NUM_JOINTS} joints")
    return bool(np.abs(joints[:-1] - arm[1:]).mean() < np.abs(joints - arm).mean())


def read_array(demo: h5py.Group, name: str, steps: int | None, shape: tuple[int | None, ...]) -> np.ndarray:
    """[T, *shape], finite."""
    if name not in demo:
        raise KeyError(f"{name} is missing")
    stored = demo[name]
    if not isinstance(stored, h5py.Dataset) or stored.dtype.kind not in "fiu":
        kind = f"of type {stored.dtype}" if isinstance(stored, h5py.Dataset) else "a group"
        raise ValueError(f"{name} is {kind}, expected an array of numbers")
    sides = stored.shape or ()  # None of an empty one
    fits = len(sides) == 1 + len(shape) and all(want in (None, got) for want, got in zip(shape, sides[1:], strict=True))
    if not fits or (steps is not None and sides[0] != steps):
        want = ["T" if steps is None else steps, *("*" if side is None else side for side in shape)]
        raise ValueError(f"{name} has shape {list(sides)}, expected [{', '.join(map(str, want))}]")
    if stored.external or stored.is_virtual:
        raise ValueError(f"{name} has its numbers in another file")
    size, free = math.prod(sides) * stored.dtype.itemsize, available_memory()
    if size > min(free / 2, MAX_ARRAY_BYTES):  # of floats, a copy is made of it
        raise ValueError(
            f"{name} has shape {list(sides)}, {size / 1e9:.1f} GB, more than a demonstration's array has or than fits into "
            f"{free / 1e9:.1f} GB of free memory"
        )
    array = stored[()]
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has a NaN or infinity")
    return array


def refuse_links(group: h5py.Group) -> None:
    """Raises ValueError where a name is a link: HDF5 would open any file that one leads to."""
    for name in group:  # bytes where they are no UTF-8
        encoded = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
        if group.id.links.get_info(encoded).type != h5py.h5l.TYPE_HARD:
            raise ValueError(f"{shown(name)} is a link, perhaps into another file; expected the data themselves")


def demo_of(data: h5py.Group, name: str) -> h5py.Group:
    """A demonstration's group, which leads nowhere else."""
    demo = data[name]
    if not isinstance(demo, h5py.Group):
        raise ValueError("it is an array, expected a group")
    refuse_links(demo)
    if isinstance(demo.get("obs"), h5py.Group):
        refuse_links(demo["obs"])
    return demo


def read_text(owner: h5py.Group, name: str) -> str:
    """An attribute of a group that is text."""
    value = owner.attrs[name]
    text = value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
    if not is_text(text):
        raise ValueError(f"attribute {name} is {shown(value)}, expected text")
    return text


def is_text(value: object) -> bool:
    """h5py and JSON give lone surrogates, which nothing can write again, where the bytes are no UTF-8."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def shown(value: object) -> str:
    """As it goes into a message of one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def read_instruction(path: Path, demo: h5py.Group, data: h5py.Group, instructions: Mapping[str, str]) -> str:
    """The benchmark's text of a task of the benchmark, which the BDDL file's name tells; it differs from the file's content
    for some tasks, and is what policies are trained and evaluated on. Of another task what problem_info says."""
    names = [read_text(owner, "bddl_file_name") for owner in (demo, data) if "bddl_file_name" in owner.attrs]
    file = Path(names[0] if names else path.stem.removesuffix("_demo"))
    task = file.stem
    for name in (f"{file.parent.name}/{task}", task):  # of a perturbed suite, and of LIBERO's own
        if name in instructions:
            return instructions[name]
    for owner in (demo, data):
        if "problem_info" in owner.attrs:
            return text_of_problem(read_text(owner, "problem_info"))
    raise ValueError(
        f"nothing tells its instruction: {task} is no task of LIBERO, and there is no attribute problem_info"
    )


def read_render(demo: h5py.Group, data: h5py.Group) -> str | None:
    """How vla_rl.demonstrations rendered the images; None of other files."""
    for owner in (demo, data):
        try:
            render = json.loads(read_text(owner, "made_with"))["render"]
        except DAMAGES:
            continue
        if render in ("exact", "fast"):
            return render
    return None


def text_of_problem(problem_info: str) -> str:
    """LIBERO writes the instruction as text, or as a list whose parts follow each other."""
    try:
        info = json.loads(problem_info)
    except (ValueError, RecursionError):
        info = None
    words = info.get("language_instruction") if isinstance(info, dict) else None
    parts = words if isinstance(words, list) else [words]
    text = "".join(parts) if all(map(is_text, parts)) else ""
    if not text.strip():
        raise ValueError(
            f"attribute problem_info is {shown(problem_info)}, expected JSON with the text language_instruction"
        )
    return text
