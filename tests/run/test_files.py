"""A file is the old one or the new one, and nothing torn stays beside it; lines wait for a disk that does not take them."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vla_rl.run.files import Lines, Outage, folder_written_whole, write_whole, written_whole


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
