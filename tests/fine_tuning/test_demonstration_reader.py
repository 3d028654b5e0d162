"""DemonstrationReader: it gives what the file gives, and outlives files over which the HDF5 library hangs or crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.fine_tuning.test_demonstration_file import arrays
from vla_rl.fine_tuning.demonstration_file import DemonstrationFile, read_demonstrations
from vla_rl.fine_tuning.demonstration_reader import DemonstrationReader
from vla_rl.run.command_line import ROOT
from vla_rl.run.settings import ConfigError

SAID = {"bddl_file_name": "my/put_it.bddl", "problem_info": '{"language_instruction": "put it there"}'}


def written(path: Path, demonstrations: int = 2, **changed) -> Path:
    with DemonstrationFile(path, SAID) as file:
        for seed in range(demonstrations):
            file.add(arrays(seed=seed, size=8) | changed, {})
    return path


def endless(path: Path) -> Path:
    """The library looks for the instruction in a heap whose first object is said to reach beyond the second, and loops."""
    content = bytearray(written(path).read_bytes())
    size = content.index(b"GCOL") + 24  # HDF5 file format specification, III.E: collection header 16, object header 16
    assert content[size] == len(SAID["bddl_file_name"])
    content[size] = 78
    path.write_bytes(content)
    return path


@pytest.fixture
def reader():
    with DemonstrationReader(longest_s=60) as reader:
        yield reader


def test_it_gives_what_the_file_gives_and_goes_on_after_an_error(tmp_path, reader, caplog):
    actions = arrays(size=8)["actions"]
    actions[0, 0] = 1.0000001
    path = written(tmp_path / "a.hdf5", 3, actions=actions)
    wanted = list(read_demonstrations(path, 2, False, {}))
    before = [record.getMessage() for record in caplog.records]
    caplog.clear()
    found = list(reader.read(path, 2, False, {}))
    assert [record.getMessage() for record in caplog.records] == before and "clipped to -1..1" in before[0]
    assert [d.name for d in found] == [d.name for d in wanted] and len(found) == 3
    for one, other in zip(found, wanted, strict=True):
        assert (one.instruction, one.render) == (other.instruction, other.render)
        for name in ("images", "proprio", "actions"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    process = reader.process.pid
    (tmp_path / "torn.hdf5").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ConfigError, match=r"torn.hdf5 cannot be read as HDF5"):
        list(reader.read(tmp_path / "torn.hdf5", 2, False, {}))
    assert len(list(reader.read(path, 2, False, {}))) == 3 and reader.process.pid == process


def test_what_was_not_read_to_its_end_is_not_read_as_the_next_file(tmp_path, reader):
    next(reader.read(written(tmp_path / "a.hdf5", 3), 1, True, {}))
    assert len(list(reader.read(written(tmp_path / "b.hdf5"), 1, True, {}))) == 2


def test_a_process_that_ends_without_closing_it_ends(tmp_path):
    path = written(tmp_path / "a.hdf5")
    script = f"""
from pathlib import Path
from vla_rl.fine_tuning.demonstration_reader import DemonstrationReader
reader = DemonstrationReader()
print(len(list(reader.read(Path({str(path)!r}), 1, True, {{}}))), reader.process.pid)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    count, process = map(int, done.stdout.split())
    assert count == 2 and not Path(f"/proc/{process}").exists()


def test_a_name_that_is_no_utf_8_is_an_error_of_one_line(tmp_path, reader):
    path = written(tmp_path / "a.hdf5")
    path.write_bytes(path.read_bytes().replace(b"data\0", b"dat\xff\0"))
    with pytest.raises(ConfigError, match=r"a.hdf5 (has no demonstrations|is damaged)"):
        list(reader.read(path, 2, True, {}))


def test_a_file_in_which_the_library_hangs_is_named(tmp_path, reader):
    assert len(list(reader.read(written(tmp_path / "b.hdf5"), 2, True, {}))) == 2  # the process is there
    reader.longest_s = 1.0
    path = endless(tmp_path / "a.hdf5")
    with pytest.raises(ConfigError, match=r"a.hdf5 is damaged, or its disk hangs: .* in 1 s; make or download it anew"):
        list(reader.read(path, 2, True, {}))
    reader.longest_s = 60
    assert len(list(reader.read(tmp_path / "b.hdf5", 2, True, {}))) == 2


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGSEGV, r"a.hdf5 is damaged: .* crashed in the HDF5 library \(SIGSEGV\)"),
        (signal.SIGKILL, r"a.hdf5: .* was killed \(SIGKILL; often out of memory\)"),
    ],
)
def test_a_file_over_which_the_process_ends_is_named(tmp_path, reader, number, message):
    sound = written(tmp_path / "b.hdf5")
    assert len(list(reader.read(sound, 2, True, {}))) == 2  # the process is there
    threading.Timer(0.5, os.kill, (reader.process.pid, number)).start()
    with pytest.raises(ConfigError, match=message):
        list(reader.read(endless(tmp_path / "a.hdf5"), 2, True, {}))
    assert len(list(reader.read(sound, 2, True, {}))) == 2
    os.kill(reader.process.pid, number)  # between two files
    reader.process.join()
    assert len(list(reader.read(sound, 2, True, {}))) == 2
