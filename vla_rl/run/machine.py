"""What this machine has for a run: host memory. Linux; a container's limit counts."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


def available_memory(root: Path = ROOT) -> int:
    """Bytes of host memory that can still be taken without swapping: the kernel's MemAvailable, or what the control group of a
    container or a cluster's job leaves, if that is less. Pages of cached files count as free.

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
    return free


def own_groups(root: Path, mounted: Path) -> list[Path]:
    """This process's control group and those around it, from the inside out; inside a container the mount is all there is."""
    lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    inner = [path for _, kinds, path in lines if kinds == "" or "memory" in kinds.split(",")]
    folders = []
    for path in inner:
        own = mounted / path.lstrip("/")
        folders += [folder for folder in (own, *own.parents) if folder == mounted or mounted in folder.parents]
    return list(dict.fromkeys(folders))
