"""Memory that can still be taken: the machine's, or less where a control group has a limit."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from vla_rl.run.command_line import ROOT
from vla_rl.run.machine import available_memory, commit, cores, launched, rank, restarts, versions

GIB = 2**30


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def machine(tmp_path):
    write(tmp_path, proc__meminfo="MemTotal: 33554432 kB\nMemAvailable:   16777216 kB\n")
    write(tmp_path, proc__self__cgroup="0::/job/step\n")
    return tmp_path


def group(root, path, limit, used, cached=0):
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_without_a_limit_it_is_what_the_kernel_says(machine):
    assert available_memory(machine) == 16 * GIB
    group(machine, "sys/fs/cgroup/job/step", "max", 3 * GIB)
    assert available_memory(machine) == 16 * GIB


def test_a_limit_of_the_job_counts_also_one_of_a_group_around_it(machine):
    group(machine, "sys/fs/cgroup/job/step", "max", 1 * GIB)
    group(machine, "sys/fs/cgroup/job", 8 * GIB, 3 * GIB, cached=GIB)
    assert available_memory(machine) == 6 * GIB  # 8 - 3 + 1 of cached files


def test_a_limit_that_is_used_up_leaves_nothing(machine):
    group(machine, "sys/fs/cgroup/job", 2 * GIB, 3 * GIB)
    assert available_memory(machine) == 0


def test_in_a_container_whose_group_is_not_mounted_the_mount_itself_counts(machine):
    group(machine, "sys/fs/cgroup", 4 * GIB, 1 * GIB)
    assert available_memory(machine) == 3 * GIB


def test_version_1_of_control_groups(machine):
    write(machine, proc__self__cgroup="5:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    folder = machine / "sys/fs/cgroup/memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(5 * GIB))
    (folder / "memory.usage_in_bytes").write_text(str(2 * GIB))
    (folder / "memory.stat").write_text(f"total_inactive_file {GIB}\n")
    assert available_memory(machine) == 4 * GIB


def test_this_machine_has_some():
    assert 0 < available_memory() < 2**50


def test_versions_are_those_installed_and_the_commit_is_that_of_the_folder(tmp_path, monkeypatch):
    found = versions()
    assert found["numpy"] == np.__version__ and torch.__version__.startswith(found["torch"])
    monkeypatch.setattr("vla_rl.run.machine.PACKAGES", ("no-such-package",))
    assert versions()["no-such-package"] is None
    assert commit(tmp_path) is None and commit(tmp_path / "nowhere") is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "f").write_text("1")
    for words in (["init", "-q"], ["add", "f"], ["commit", "-qm", "x"], ["tag", "v1"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "f").write_text("2")
    assert re.fullmatch(r"[0-9a-f]{40}-changed", commit(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit(tmp_path) is None


def test_processes_of_a_run_share_cores_and_memory(monkeypatch):
    alone, memory = cores(), available_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores() == max(1, alone // 2) and available_memory() == pytest.approx(memory / 2, rel=0.2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(1000))
    assert cores() == 1


def test_torchrun_says_who_is_who(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "2")  # of something else
    assert not launched() and rank() == 0 and restarts() == (0, 0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert launched() and rank() == 2 and restarts() == (1, 3)


FREED = """
import numpy as np
from vla_rl.run.machine import release_memory

def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

arrays = [np.ones(8000) for _ in range(4000)]  # 64 kB each, 256 MB
del arrays[:-1]  # the last one holds the others' room
kept = resident_mb()
release_memory()
print(kept - resident_mb())
"""


def test_what_was_freed_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(done.stdout) > 200
