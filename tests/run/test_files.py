"""A file is the old one or the new one, and nothing torn stays beside it; lines wait for a disk that does not take them; what a
stranger wrote is read with a bound."""

import codecs
import errno
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from vla_rl.run import files
from vla_rl.run.files import (
    Lines,
    Outage,
    all_tensors,
    folder_written_whole,
    load_torch,
    open_tensors,
    read_json,
    write_whole,
    written_whole,
)
from vla_rl.run.settings import ConfigError


def test_a_file_is_replaced_once_it_is_whole(tmp_path):
    path = tmp_path / "page.html"
    write_whole(path, "old")
    with written_whole(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_torn(tmp_path, error):
    path = tmp_path / "page.html"
    write_whole(path, "old")
    with pytest.raises(error), written_whole(path) as unfinished:
        unfinished.write_text("ne")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_has_its_name_once_it_is_whole_whatever_a_kill_left(tmp_path):
    left = tmp_path / ".model.tmp"
    left.mkdir()
    (left / "half").write_text("of a process that was killed")
    with folder_written_whole(tmp_path / "new/model") as unfinished:
        (unfinished / "weights").write_text("new")
    with folder_written_whole(tmp_path / "model") as unfinished:
        (unfinished / "weights").write_text("new")
        assert not (tmp_path / "model").exists()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["weights"] and not left.exists()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_no_folder(tmp_path, error):
    with pytest.raises(error), folder_written_whole(tmp_path / "model") as unfinished:
        (unfinished / "weights").write_text("ne")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_text("old")
    with pytest.raises(OSError), folder_written_whole(tmp_path / "model") as unfinished:
        (unfinished / "weights").write_text("new")
    assert (tmp_path / "model/weights").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------------------ what somebody else wrote


def refused(read, *arguments) -> str:
    with pytest.raises((ConfigError, ValueError)) as caught:
        read(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON (Expecting property name"),
        (b"[]", "expected a JSON object, got list"),
        (b"\xff\xfe", "is not JSON ('utf-8' codec"),
        (b"[" * 100_000, "is not JSON (maximum recursion depth"),
        (b'{"a":' * 60 + b"1" + b"}" * 60, "nested more than 50 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON (Exceeds the limit"),
        (b'{"a": "' + b"x" * 5_000_000 + b'"}', "has 5,000,009 bytes, expected at most 4,000,000"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_json_that_is_none_or_too_large_or_deep_is_refused_by_name(tmp_path, content, words):
    (tmp_path / "a.json").write_bytes(content)
    message = refused(read_json, tmp_path / "a.json")
    assert words in message and "a.json" in message


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is a device or pipe" in refused(read_json, tmp_path / "pipe")
    assert "is a device or pipe" in refused(read_json, Path("/dev/zero"))
    assert "cannot be read (Is a directory)" in refused(read_json, tmp_path)
    assert "folder, device or pipe" in refused(load_torch, tmp_path / "pipe")
    assert "cannot be read" in refused(read_json, tmp_path / "a\0b")


class Harmful:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def write_pickle(path, pickled: bytes, compression=zipfile.ZIP_STORED, name="archive/data.pkl"):
    """As torch.save writes it."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, pickled)
        archive.writestr("archive/data/0", bytes(40))
        archive.writestr("archive/version", "3\n")


def test_tensors_and_plain_values_are_loaded(tmp_path):
    value = {"a": torch.arange(3), "b": [1, 2.5, None, True, "x"], "c": torch.nn.Linear(2, 2).state_dict()}
    torch.save(value | {"d": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}, tmp_path / "a.pt")
    loaded = load_torch(tmp_path / "a.pt")
    assert loaded["a"].tolist() == [0, 1, 2] and loaded["b"] == value["b"] and loaded["d"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch /tmp/harmed",)),
        (eval, ("1",)),
        (bytearray, (10**12,)),  # torch's weights_only makes it
        (codecs.encode, ("x" * 9, "hex")),
        (torch.Size, ([2**62],)),
        (set, ([1],)),
    ],
)
def test_a_pickle_that_calls_something_is_refused_before_it_is_loaded(tmp_path, monkeypatch, function, arguments):
    monkeypatch.setattr(torch, "load", None)
    write_pickle(tmp_path / "a.pt", pickle.dumps({"a": Harmful(function, *arguments)}, protocol=2))
    assert "expected tensors and plain values" in refused(load_torch, tmp_path / "a.pt")


def test_archives_that_claim_more_than_they_have_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    write_pickle(path, pickle.dumps(["x" * 10**6], protocol=2), zipfile.ZIP_DEFLATED)
    assert "it is compressed" in refused(load_torch, path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_pickle(path, pickle.dumps(1, protocol=2), name="archive/version")
    assert "it has a part twice" in refused(load_torch, path)
    torch.save(torch.zeros(1).expand(2**40), path)
    assert "claims the shape [1099511627776] with 4 bytes" in refused(load_torch, path)
    inner = [1]
    for _ in range(60):
        inner = [inner, inner]  # a walk through it would not end
    torch.save({"a": inner}, path)
    assert "a list or dict is in it twice" in refused(load_torch, path)
    inner = [1]
    inner.append(inner)
    torch.save(inner, path)
    assert "a list or dict is in it twice" in refused(load_torch, path)
    monkeypatch.setattr(files, "available_memory", lambda: 10)
    assert "more than the 0.0 GB of memory that are free" in refused(load_torch, path)


def write_safetensors(path, header: dict, claimed: int | None = None, size=24):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + bytes(size))


@pytest.mark.parametrize(
    ("header", "claimed", "words"),
    [
        ({}, 2**60, "its header claims 1,152,921,504,606,846,976 bytes, expected at most 10,000,000"),
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, None, "is cut off or no safetensors"),
        ({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 24]}}, None, "is cut off or no safetensors"),
        ({"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 20]}}, None, "is cut off or no safetensors"),
        (
            {"a\n\x1b": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}},
            None,
            r"has the name 'a\n\x1b', expected",
        ),
        ({"a": {"dtype": "I32", "shape": [6], "data_offsets": [0, 24]}}, None, "a is I32, expected F64 or F32"),
    ],
)
def test_safetensors_that_claim_what_they_have_not_are_refused(tmp_path, header, claimed, words):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, header, claimed)
    assert words in refused(lambda: all_tensors(path, open_tensors(path)))


def test_a_file_with_a_hole_is_not_read_into_more_memory_than_there_is(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    for numbers in (2**40, 2**20):
        write_safetensors(path, {"a": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}})
        try:
            os.truncate(path, path.stat().st_size - 24 + 4 * numbers)
        except OSError:
            continue  # the file system has no files of 4 TB
        monkeypatch.setattr(files, "available_memory", lambda: 2**20)
        assert re.search(
            r"unable to mmap|more than the 0\.0 GB of memory", refused(lambda: all_tensors(path, open_tensors(path)))
        )


# ---------------------------------------------------------------------------------------------------------------- a disk


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_outage_is_told_once_and_when_it_is_over(caplog):
    outage = Outage("checkpoints", "the next one is tried")
    assert [outage.survive(write) for write in (full, full, lambda: 3, lambda: 4, full)] == [None, None, 3, 4, None]
    assert [record.getMessage() for record in caplog.records] == [
        "checkpoints cannot be written (No space left on device): the next one is tried",
        "checkpoints are written again",
        "checkpoints cannot be written (No space left on device): the next one is tried",
    ]
    with pytest.raises(ZeroDivisionError):
        outage.survive(lambda: 1 // 0)


def test_lines_that_cannot_be_written_come_later_in_order_and_none_twice(tmp_path, monkeypatch):
    lines = Lines(tmp_path / "lines")

    def attempt(*added: str) -> bool:
        for line in added:
            lines.append(line)
        try:
            lines.write()
        except OSError:
            return False
        return True

    assert attempt("a")
    with monkeypatch.context() as patch:
        patch.setattr("vla_rl.run.files.os.fsync", full)  # written, but perhaps not on the disk
        assert not attempt("b") and not attempt("c")
    with (tmp_path / "lines").open("a") as file:
        file.write("half of a li")
    os.rename(tmp_path, away := tmp_path.with_name("away"))
    assert not attempt("d") and not tmp_path.exists()  # no file of its own in the place of a folder that is gone
    os.rename(away, tmp_path)
    assert attempt("e") and attempt("f") and attempt()
    assert (tmp_path / "lines").read_text().split() == ["a", "b", "c", "d", "e", "f"]


def test_a_file_that_was_replaced_meanwhile_is_not_filled_up(tmp_path, monkeypatch):
    lines = Lines(tmp_path / "lines")
    lines.append("a" * 100)
    lines.write()
    with monkeypatch.context() as patch:
        patch.setattr("vla_rl.run.files.os.fsync", full)
        lines.append("b")
        with pytest.raises(OSError):
            lines.write()
    (tmp_path / "lines").write_text("other\n")
    lines.write()
    assert (tmp_path / "lines").read_text() == "other\nb\n"


ON_A_SMALL_DISK = """
import os, sys
from pathlib import Path
from vla_rl.run.files import Lines
folder = Path(sys.argv[1])
lines, filler = Lines(folder / "lines"), folder / "filler"
for number in range(60):
    if number == 10:
        with filler.open("wb", buffering=0) as file:  # until nothing more fits
            try:
                while file.write(b"x" * 4096): pass
            except OSError: pass
    if number == 50:
        filler.unlink()
    lines.append(f"{number} " + "y" * 1000)
    try:
        lines.write()
    except OSError as error:
        print(number, error.errno)
print(*(line.split()[0] for line in (folder / "lines").read_text().splitlines()))
"""


def mounted(folder: Path, code: str, size: str = "64k") -> str:
    """What a program says on a small disk of its own, in a namespace that ends with it."""
    script = f'mount -t tmpfs -o size={size} none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(folder), sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode and ("unshare" in done.stderr or "mount:" in done.stderr):
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()[:80]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_on_a_disk_that_is_full_for_a_while_no_line_is_lost(tmp_path):
    *failed, kept = mounted(tmp_path, ON_A_SMALL_DISK).splitlines()
    assert len(failed) > 30 and {line.split()[1] for line in failed} == {str(errno.ENOSPC)}
    assert kept.split() == [str(number) for number in range(60)]
