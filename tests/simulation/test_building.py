"""What workers build is shown while it is waited for, and said when it took long."""

import logging
import os
import time

import pytest

from vla_rl.simulation import building
from vla_rl.simulation.building import (
    PHASE,
    PHASES,
    SLOWEST_US,
    STEPS,
    WHO,
    BuildingBar,
    Doing,
    rows_of,
    tell,
    telling,
)


def test_the_bar_counts_what_is_told_and_the_log_names_it(monkeypatch, capsys, caplog):
    monkeypatch.setattr(building, "QUIET_S", -1)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = BuildingBar(shown=True)
    bar.update()
    assert bar.bar is None and capsys.readouterr().err == ""  # nothing is built, nothing is shown
    tell(bar.path, "begun libero_goal task 3")
    bar.update()
    assert (
        "building simulators" in (shown := capsys.readouterr().err) and "0/1" in shown and "libero_goal task 3" in shown
    )
    tell(bar.path, "done")
    with telling(bar.path, "libero_goal task 0"):
        bar.update()
        assert (bar.bar.n, bar.bar.total) == (1, 2)
    with caplog.at_level(logging.INFO):
        bar.finish()
    assert bar.bar is None and "built 2 simulators in 0 s: libero_goal task 0, libero_goal task 3" in caplog.text
    bar.finish()
    assert caplog.text.count("built") == 1
    bar.close()
    assert not os.path.exists(bar.path)
    bar.close()


def test_a_file_that_somebody_removed_ends_nothing(capsys):
    bar = BuildingBar(shown=True)
    os.unlink(bar.path)
    bar.update()
    with telling("/nowhere/file", "a"):
        bar.finish()
    bar.close()
    assert capsys.readouterr().err == ""


def test_without_bars_or_for_a_short_wait_little_is_said(capsys, caplog):
    bar = BuildingBar(shown=False)
    with telling(bar.path, "a"), telling(None, "b"), caplog.at_level(logging.INFO):
        bar.update()
    bar.finish()
    bar.close()
    assert caplog.text == "" and capsys.readouterr().err == ""


def test_what_a_process_does_is_told_and_stays_where_an_error_was_raised():
    doing = Doing()
    with doing("reset", 4):
        with doing("build"):
            assert doing.row[[PHASE, WHO]].tolist() == [PHASES.index("build"), 4]
        assert doing.row[PHASE] == PHASES.index("reset")
    assert doing.row[:3].tolist() == [0, 0, 4]  # what it was, after four changes
    with pytest.raises(ValueError), doing("step", 2), doing("render"):
        raise ValueError
    assert doing.row[[PHASE, WHO]].tolist() == [PHASES.index("render"), 2]
    with doing("step"):
        time.sleep(0.05)
    assert doing.row[STEPS] == 1 and 50_000 <= doing.row[SLOWEST_US] < 5e6
    assert rows_of(doing.row.tobytes() * 2).shape == (2, 5)
