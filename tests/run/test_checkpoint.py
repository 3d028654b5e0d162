"""A checkpoint is whole or it is not there; whatever was damaged is refused by name."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from vla_rl.run import checkpoint
from vla_rl.run.checkpoint import (
    CheckpointError,
    cpu_copy,
    find_checkpoint,
    list_checkpoints,
    load_tensors,
    load_trainer_state,
    locked,
    newest_sound,
    save_tensors,
    set_aside_later_checkpoints,
    verify,
    write_checkpoint,
)
from vla_rl.run.settings import ConfigError


def fill(folder: Path, text: str = "weights") -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_text(text)
    torch.save({"iteration": 3, "moments": torch.arange(4.0)}, folder / "trainer.pt")


def write(run: Path, iteration: int, keep: int = 3, write_files=fill, fingerprint: str = "model-a") -> Path:
    run.mkdir(exist_ok=True)
    return write_checkpoint(run / "checkpoints", f"iteration-{iteration:06d}", fingerprint, write_files, keep)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# writing


def test_a_written_checkpoint_is_found_verified_and_read(tmp_path):
    folder = write(tmp_path, 3)
    assert find_checkpoint(tmp_path) == folder == tmp_path / "checkpoints" / "iteration-000003"
    assert (folder / "adapter" / "adapter_model.safetensors").read_text() == "weights"
    state = load_trainer_state(folder)
    assert state["iteration"] == 3 and torch.equal(state["moments"], torch.arange(4.0))


def test_the_manifest_names_every_file_with_its_size(tmp_path):
    folder = write(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"adapter/adapter_model.safetensors", "trainer.pt"}
    assert manifest["files"]["adapter/adapter_model.safetensors"]["bytes"] == len("weights")
    # sha256 of "weights" by coreutils: printf weights | sha256sum
    digest = subprocess.run(["sha256sum"], input=b"weights", capture_output=True, check=True).stdout.split()[0].decode()
    assert manifest["files"]["adapter/adapter_model.safetensors"]["sha256"] == digest


def test_no_unfinished_folder_stays_behind(tmp_path):
    write(tmp_path, 3)
    assert names(tmp_path) == ["iteration-000003"]


def test_a_failed_write_leaves_no_checkpoint_and_keeps_the_old_ones(tmp_path):
    old = write(tmp_path, 1)

    def fail(folder):
        fill(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, 2, write_files=fail)
    assert list_checkpoints(tmp_path / "checkpoints") == [old] and find_checkpoint(tmp_path) == old
    assert find_checkpoint(write(tmp_path, 2)).name == "iteration-000002"  # the next attempt is not in the way


def test_the_newest_are_kept_and_the_oldest_removed(tmp_path):
    for iteration in (8, 9, 10, 11, 100):
        write(tmp_path, iteration, keep=2)
    assert names(tmp_path) == ["iteration-000011", "iteration-000100"]


def test_one_is_kept_when_one_is_asked_for(tmp_path):
    for iteration in (1, 2):
        write(tmp_path, iteration, keep=1)
    assert names(tmp_path) == ["iteration-000002"]


def test_those_of_every_so_many_iterations_stay_for_good(tmp_path):
    def fill_empty(folder):
        (folder / "x").write_text("")

    (tmp_path / "checkpoints").mkdir()
    for iteration in range(0, 12, 2):
        name = f"iteration-{iteration:06d}"
        write_checkpoint(tmp_path / "checkpoints", name, "m", fill_empty, keep=2, keep_every=4)
    assert names(tmp_path) == [f"iteration-{n:06d}" for n in (4, 8, 10)]  # not the first one, before any training


def test_a_kill_in_the_middle_of_a_removal_leaves_nothing_that_is_listed(tmp_path, monkeypatch):
    for iteration in (1, 2):
        write(tmp_path, iteration)

    def killed(path, **_):
        if path.exists():
            next(path.rglob("trainer.pt")).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 3, keep=2)
    monkeypatch.undo()
    assert names(tmp_path) == [".iteration-000001.gone", "iteration-000002", "iteration-000003"]
    for folder in list_checkpoints(tmp_path / "checkpoints"):
        verify(folder)
    set_aside_later_checkpoints(find_checkpoint(tmp_path))  # as the next start does
    assert names(tmp_path) == ["iteration-000002", "iteration-000003"]


def test_a_run_folder_that_is_gone_is_not_made_anew(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_checkpoint(tmp_path / "unmounted/run/checkpoints", "iteration-000001", "m", fill, 1)
    assert not list(tmp_path.iterdir())


def test_the_newest_sound_one_passes_over_those_that_are_torn(tmp_path, caplog):
    assert newest_sound(tmp_path) is None
    sound = write(tmp_path, 1)
    (write(tmp_path, 2) / "trainer.pt").unlink()
    assert newest_sound(tmp_path) == sound and "000002 is torn: trainer.pt is missing; the one before" in caplog.text


def test_the_newest_are_kept_where_numbers_grow_longer(tmp_path):
    for iteration in (999_998, 999_999, 1_000_000, 1_000_001, 12_345_678):
        folder = write(tmp_path, iteration, keep=2)
        assert find_checkpoint(tmp_path) == folder
    assert names(tmp_path) == ["iteration-1000001", "iteration-12345678"]


@pytest.mark.parametrize("padding", [1, 6, 9])
def test_checkpoints_are_listed_by_number_whatever_their_padding(tmp_path, padding):
    for number in (9, 10, 2, 1_000_000):
        (tmp_path / f"iteration-{number:0{padding}d}").mkdir()
    listed = [int(path.name.removeprefix("iteration-")) for path in list_checkpoints(tmp_path)]
    assert listed == [2, 9, 10, 1_000_000]


STRAY = [
    "iteration-foo",
    "iteration-000010.bak",
    "iteration-",
    "iteration--5",
    "iteration-1e9",
    "iteration-٣",
    "iteration-9 ",
]
STRAY += ["iteration-000099.tmp", "my-iteration-000099", "superseded-iteration-000099", ".iteration-foo.old"]


def test_what_is_not_named_as_a_checkpoint_is_neither_read_nor_removed(tmp_path):
    for name in STRAY:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for iteration in (1, 2, 3):
        write(tmp_path, iteration, keep=1)
    assert find_checkpoint(tmp_path).name == "iteration-000003"
    write(tmp_path, 4)
    set_aside_later_checkpoints(tmp_path / "checkpoints" / "iteration-000003")
    assert names(tmp_path) == sorted([*STRAY, "iteration-000003", "superseded-iteration-000004"])


def test_a_copy_that_was_taken_out_under_another_name_is_no_run_to_remove(tmp_path):
    copy = write(tmp_path / "run", 10).rename(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"copy is not named as a checkpoint is, iteration-NUMBER; rename it"):
        find_checkpoint(copy)


def test_a_copy_of_another_name_is_refused_by_its_name(tmp_path):
    copy = write(tmp_path, 10).rename(tmp_path / "checkpoints" / "iteration-000010.bak")
    for refuses in (find_checkpoint, set_aside_later_checkpoints):
        with pytest.raises(CheckpointError, match=r"000010\.bak is not named as a checkpoint is, iteration-NUM"):
            refuses(copy)


@pytest.mark.parametrize("name", ["iteration-study", "iteration-5"])
def test_a_run_may_be_named_like_a_checkpoint(tmp_path, name):
    folder = write(tmp_path / name, 3)
    assert find_checkpoint(tmp_path / name) == folder


def test_what_was_just_written_stays_though_later_ones_were_not_set_aside(tmp_path):
    for iteration in (10, 20, 30):
        write(tmp_path, iteration)
    assert write(tmp_path, 11, keep=2).exists()
    assert names(tmp_path) == ["iteration-000011", "iteration-000020", "iteration-000030"]


def test_the_same_iteration_written_again_replaces_the_first(tmp_path):
    write(tmp_path, 1)
    folder = write(tmp_path, 1, write_files=lambda folder: fill(folder, "newer weights"))
    verify(folder)
    assert (folder / "adapter" / "adapter_model.safetensors").read_text() == "newer weights"
    assert names(tmp_path) == ["iteration-000001"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path, monkeypatch):
    write(tmp_path, 1)
    rename, calls = checkpoint.os.replace, []

    def killed_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 1, write_files=lambda folder: fill(folder, "newer weights"))
    monkeypatch.undo()
    assert (find_checkpoint(tmp_path) / "adapter" / "adapter_model.safetensors").read_text() == "weights"


def test_after_a_resume_from_an_earlier_one_the_later_ones_are_set_aside(tmp_path):
    for iteration in (10, 20, 30):
        write(tmp_path, iteration)
    set_aside_later_checkpoints(tmp_path / "checkpoints" / "iteration-000010")
    assert find_checkpoint(tmp_path).name == "iteration-000010"  # even if the resumed run dies before its first one
    folder = write(tmp_path, 11, keep=1)
    assert find_checkpoint(tmp_path) == folder
    assert names(tmp_path) == ["iteration-000011", "superseded-iteration-000020", "superseded-iteration-000030"]
    write(tmp_path, 20)
    set_aside_later_checkpoints(folder)  # and once more, with the name taken: nothing is lost
    assert find_checkpoint(tmp_path) == folder
    assert names(tmp_path)[1:] == [
        f"superseded-{name}iteration-0000{n}" for name, n in (("1-", 20), ("", 20), ("", 30))
    ]


def test_later_ones_are_later_by_number(tmp_path):
    for iteration in (999_999, 1_000_000, 1_000_001):
        write(tmp_path, iteration)
    set_aside_later_checkpoints(tmp_path / "checkpoints" / "iteration-1000000")
    assert names(tmp_path) == ["iteration-1000000", "iteration-999999", "superseded-iteration-1000001"]
    set_aside_later_checkpoints(tmp_path / "checkpoints" / "iteration-1000000")  # a second time: nothing to do
    set_aside_later_checkpoints(tmp_path / "checkpoints" / "iteration-999999")
    assert find_checkpoint(tmp_path).name == "iteration-999999"


def test_an_interrupted_setting_aside_leaves_the_beginning_of_the_history(tmp_path, monkeypatch):
    for iteration in (10, 20, 30):
        write(tmp_path, iteration)
    rename, calls = checkpoint.os.replace, []

    def killed_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        set_aside_later_checkpoints(tmp_path / "checkpoints" / "iteration-000010")
    assert names(tmp_path) == ["iteration-000010", "iteration-000020", "superseded-iteration-000030"]


def test_what_a_kill_left_over_does_not_block_writing_that_iteration_again(tmp_path):
    folder = write(tmp_path, 3)
    (folder.parent / ".iteration-000003.old").mkdir()
    (folder.parent / ".iteration-000003.old" / "file").write_text("left over")
    assert write(tmp_path, 3) == find_checkpoint(tmp_path)
    assert names(tmp_path) == ["iteration-000003"]


@pytest.mark.parametrize("moment", ["in write_files", "after the manifest"])
def test_a_process_killed_while_writing_leaves_the_earlier_checkpoint_to_resume_from(tmp_path, moment):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def write_and_die():
        if moment == "after the manifest":
            checkpoint.sync = die  # in the child process only
            write(tmp_path, 2)
        write(tmp_path, 2, write_files=lambda folder: (fill(folder), die()))

    earlier = write(tmp_path, 1)
    process = multiprocessing.get_context("fork").Process(target=write_and_die)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert names(tmp_path) == [".iteration-000002.tmp", "iteration-000001"]  # it was in the middle
    assert find_checkpoint(tmp_path) == earlier
    assert find_checkpoint(write(tmp_path, 2)).name == "iteration-000002"
    assert names(tmp_path) == ["iteration-000001", "iteration-000002"]


# reading


def remove(path: Path) -> None:
    path.unlink()


def change_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (remove, "trainer.pt", "trainer.pt is missing"),
        (change_a_byte, "trainer.pt", "trainer.pt is not what was written"),
        (truncate, "trainer.pt", "trainer.pt is not what was written"),
        (remove, "adapter/adapter_model.safetensors", "adapter/adapter_model.safetensors is missing"),
        (change_a_byte, "adapter/adapter_model.safetensors", "adapter_model.safetensors is not what was written"),
        (remove, "manifest.json", "manifest.json cannot be read"),
        (truncate, "manifest.json", "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_file_and_the_earlier_one_is_named(tmp_path, damage, name, words):
    earlier, newest = write(tmp_path, 1), write(tmp_path, 2)
    damage(newest / name)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path)
    message = str(caught.value)
    assert f"checkpoint {newest} is torn" in message and words in message
    assert message.endswith(f"resume from the one before: --resume {earlier}")
    assert find_checkpoint(earlier) == earlier


def test_a_damaged_only_checkpoint_names_no_other(tmp_path):
    truncate(write(tmp_path, 1) / "trainer.pt")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path)
    assert "--resume" not in str(caught.value)


def test_a_checkpoint_of_another_model_is_refused_with_both_names(tmp_path):
    folder = write(tmp_path, 1, fingerprint="model-a")
    verify(folder, "model-a")
    with pytest.raises(CheckpointError, match="does not fit this run: it was made with model-a, this run has model-b"):
        verify(folder, "model-b")


def test_a_checkpoint_folder_is_itself_something_to_resume_from(tmp_path):
    first, _ = write(tmp_path, 1), write(tmp_path, 2)
    assert find_checkpoint(first) == first and find_checkpoint(str(first)) == first


def test_a_run_that_is_not_there_or_has_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no run folder"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="has no checkpoint in"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_error_is_a_users_error():
    assert issubclass(CheckpointError, ConfigError)


def refusal(what, *arguments, kind=CheckpointError) -> str:
    """The one line of its error."""
    with pytest.raises(kind) as caught:
        what(*arguments)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def places(value, path=()):
    """The path of every node of a JSON value."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))


def replaced(value, path, new):
    return new if not path else value | {path[0]: replaced(value[path[0]], path[1:], new)}


# each in place of every node; {"bytes": 7} also says that a file has no sha256
WRONG = [None, True, 0, -1, 1.5, 1e400, "", "x", "a\nb", [], ["x"], {}, {"x": 1}, {"bytes": 7}, {"sha256": "x"}, [[]]]


def test_any_wrong_value_anywhere_in_the_manifest_is_a_torn_checkpoint(tmp_path):
    folder = write(tmp_path, 3)
    whole = json.loads((folder / "manifest.json").read_text())
    nodes = list(places(whole))
    assert len(nodes) == 9  # the whole, fingerprint, files, and three for each of two files
    for node in nodes:
        for wrong in WRONG:
            if node == ("fingerprint",) and isinstance(wrong, str):
                continue  # a text is one, of another model
            (folder / "manifest.json").write_text(json.dumps(replaced(whole, node, wrong)))
            assert refusal(find_checkpoint, tmp_path).startswith(f"checkpoint {folder} is torn: "), (node, wrong)
    (folder / "manifest.json").write_text(json.dumps(whole))
    assert find_checkpoint(tmp_path) == folder


@pytest.mark.parametrize(
    "name",
    ["../other", "a/../../other", "/etc/hostname", "..", ".", "", "x" * 300, "a\0b", "\ud800", "a\nb", "adapter"],
)
def test_a_manifest_names_only_files_within_its_folder(tmp_path, name):
    folder = write(tmp_path, 3)
    (folder.parent / "other").write_text("weights")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["adapter/adapter_model.safetensors"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    message = refusal(verify, folder)
    assert "is torn" in message and message.isprintable()


def test_a_fingerprint_is_told_in_part(tmp_path):
    folder = write(tmp_path, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "x" * 5000}))
    message = refusal(verify, folder, "another")
    assert "does not fit this run: it was made with xxx" in message and len(message) < 900


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b"NaN", b'{"files": ' + b"9" * 5000 + b"}"])
def test_a_manifest_that_is_no_json_is_a_torn_checkpoint(tmp_path, text):
    folder = write(tmp_path, 3)
    (folder / "manifest.json").write_bytes(text)
    assert "is torn: manifest.json cannot be read" in refusal(verify, folder)


def test_a_file_that_cannot_be_read_is_a_torn_checkpoint(tmp_path, monkeypatch):
    folder = write(tmp_path, 3)
    monkeypatch.setattr(
        checkpoint, "sha256", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))
    )
    assert "cannot be read (Input/output error)" in refusal(verify, folder)


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path):
    torch.save({"harmful": Path("x")}, tmp_path / "trainer.pt")
    message = refusal(load_trainer_state, tmp_path)
    assert "trainer.pt cannot be loaded" in message and "weights_only" in message
    assert isinstance(torch.load(tmp_path / "trainer.pt", weights_only=False)["harmful"], Path)  # it is what is refused


def test_what_verifies_but_does_not_load_is_told_in_one_line(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.zeros(3)}, whole)
    zipped = whole.read_bytes()
    for content in (
        b"",
        b"x",
        b"weights\n",
        pickle.dumps([1], protocol=2),
        zipped[:-30],
        zipped[:40],
        b"PK\x03\x04" + b"\0" * 100,
    ):
        (tmp_path / "trainer.pt").write_bytes(content)
        assert f"checkpoint {tmp_path} is torn: trainer.pt cannot be loaded" in refusal(load_trainer_state, tmp_path)
    for value in (3, [1], torch.zeros(1), None):
        torch.save(value, tmp_path / "trainer.pt")
        assert f"it holds a {type(value).__name__}, not a dict" in refusal(load_trainer_state, tmp_path)
    (tmp_path / "trainer.pt").unlink()
    assert "No such file" in refusal(load_trainer_state, tmp_path)


def test_safetensors_that_do_not_load_are_told_in_one_line(tmp_path):
    path = tmp_path / "value_head.safetensors"
    save_tensors({"a": torch.arange(3.0)}, path)
    assert load_tensors(path)["a"].tolist() == [0, 1, 2]
    data = path.read_bytes()
    for content in (b"", b"x", data[:-1], data[:20], b"\xff" * 8 + data[8:], data.replace(b"F32", b"X32")):
        path.write_bytes(content)
        assert "value_head.safetensors is cut off" in refusal(load_tensors, path, kind=ConfigError)
    path.unlink()
    assert "cannot be read (No such file" in refusal(load_tensors, path, kind=ConfigError)


# the lock


def test_a_second_process_is_refused_while_the_first_works(tmp_path, caplog):
    with locked(tmp_path), pytest.raises(ConfigError, match="another process is working on"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
    assert caplog.records == []


def test_a_lock_that_is_no_file_is_told(tmp_path):
    (tmp_path / ".lock").mkdir()
    assert "is a folder, link or pipe, expected the empty file of a run" in refusal(
        locked(tmp_path).__enter__, kind=ConfigError
    )
    (tmp_path / ".lock").rmdir()
    (tmp_path / "kept").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "kept")
    assert "is a folder, link or pipe" in refusal(locked(tmp_path).__enter__, kind=ConfigError)
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize("code", ["ENOSYS", "EOPNOTSUPP", "ENOTSUP", "ENOLCK", "EINVAL"])
def test_a_file_system_without_locks_is_one_warning_and_the_work_goes_on(tmp_path, monkeypatch, caplog, code):
    number, done = getattr(errno, code), []
    monkeypatch.setattr(
        checkpoint.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number)))
    )
    with locked(tmp_path):
        done.append(1)
    (record,) = caplog.records
    assert done and record.levelname == "WARNING" and "\n" not in record.getMessage()
    assert str(tmp_path) in record.getMessage() and "would not notice each other" in record.getMessage()


def test_other_failures_of_the_lock_and_of_the_work_are_not_hidden(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="of the work"), locked(tmp_path):
        raise OSError(errno.ENOLCK, "of the work")
    monkeypatch.setattr(checkpoint.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken disk")))
    with pytest.raises(OSError, match="broken disk"), locked(tmp_path):
        pass


# copies


def test_a_copy_does_not_change_with_the_original():
    weight = torch.nn.Parameter(torch.zeros(2))
    original = {"state": {0: {"step": 1, "moment": weight}}, "list": [torch.ones(1), (2, 3)], "none": None}
    copy = cpu_copy(original)
    with torch.no_grad():
        weight += 1
    original["list"][0] += 1
    original["state"][0]["step"] = 9
    assert copy["state"][0]["step"] == 1 and copy["state"][0]["moment"].tolist() == [0, 0]
    assert copy["list"] == [torch.ones(1), [2, 3]] and copy["none"] is None
    assert not copy["state"][0]["moment"].requires_grad
