"""A file is the old one or the new one, and nothing torn stays beside it."""

import pytest

from vla_rl.run.files import write_whole, written_whole


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
