"""A file is the old one or the new one, and nothing torn stays beside it."""

import pytest

from vla_rl.run.files import folder_written_whole, write_whole, written_whole


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
