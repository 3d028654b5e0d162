"""vla_rl/run/best_checkpoint.py: the best of a run's evaluations stays, whole at any moment, and is in nobody's way."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from vla_rl.run import best_checkpoint, checkpoint
from vla_rl.run.best_checkpoint import evaluation_of, is_at_least_as_good, keep_best, read_evaluation
from vla_rl.run.checkpoint import (
    BEST,
    CheckpointError,
    find_checkpoint,
    find_saved,
    list_checkpoints,
    set_aside_later_checkpoints,
    verify,
    write_checkpoint,
)
from vla_rl.run.settings import ConfigError, EvalConfig


def write(run: Path, iteration: int, keep: int = 2) -> Path:
    def fill(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_text(f"weights {iteration}")

    run.mkdir(exist_ok=True)
    return write_checkpoint(run / "checkpoints", f"iteration-{iteration:06d}", "model", fill, keep)


def entry(iteration: int, **rates: float) -> dict:
    rates = {f"eval/success_rate_{mode}": rate for mode, rate in rates.items()}
    return {"iteration": iteration, "timesteps": 100 * iteration, **rates}


def evaluated(run: Path, iteration: int, settings: EvalConfig | None = None, **rates: float) -> Path:
    return keep_best(write(run, iteration), evaluation_of(entry(iteration, **rates), settings or EvalConfig()))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# which is the best


def test_greedy_success_counts_and_sampled_where_greedy_is_not_evaluated():
    both = evaluation_of(entry(3, sampled=0.9, greedy=0.4), EvalConfig())
    assert (both["metric"], both["value"], both["iteration"], both["timesteps"]) == (
        "eval/success_rate_greedy",
        0.4,
        3,
        300,
    )
    assert evaluation_of(entry(3, sampled=0.9), EvalConfig())["metric"] == "eval/success_rate_sampled"
    without = evaluation_of(entry(3, sampled=0.9, mean_action=0.5), EvalConfig())
    assert without["metric"] == "eval/success_rate_mean_action" and without["measured"]["temperature"] == 1


def test_of_equals_the_later_one_is_the_best():
    first, second = ({"metric": "m", "measured": {}, "value": value} for value in (0.5, 0.5))
    assert is_at_least_as_good(second, first) and not is_at_least_as_good(second | {"value": 0.4}, first)
    assert is_at_least_as_good(second, None)


@pytest.mark.parametrize("change", [{"states": "0-9"}, {"render": "fast"}, {"max_steps": 50}, {"modes": ["sampled"]}])
def test_what_was_measured_otherwise_is_not_compared(tmp_path, change):
    evaluated(tmp_path, 1, greedy=1.0, sampled=1.0)
    rates = {"sampled": 0.1} if "modes" in change else {"greedy": 0.1, "sampled": 0.1}
    assert evaluated(tmp_path, 2, EvalConfig(**change), **rates).name == "best-iteration-000002"


def test_another_temperature_is_another_measure_of_sampled_success_only(tmp_path):
    other = EvalConfig(temperature=0.5)
    evaluated(tmp_path / "greedy", 1, greedy=1.0)
    assert evaluated(tmp_path / "greedy", 2, other, greedy=0.9).name == "best-iteration-000001"
    evaluated(tmp_path / "sampled", 1, sampled=1.0)
    assert evaluated(tmp_path / "sampled", 2, other, sampled=0.9).name == "best-iteration-000002"


# what is kept


def test_the_best_stays_while_newer_ones_push_older_ones_out(tmp_path):
    for iteration, rate in ((1, 0.2), (2, 0.8), (3, 0.5), (4, 0.7), (5, 0.1)):
        best = evaluated(tmp_path, iteration, greedy=rate)
    assert best == tmp_path / "checkpoints/best-iteration-000002"
    assert names(tmp_path) == ["best-iteration-000002", "iteration-000004", "iteration-000005"]
    verify(best)
    assert (best / "adapter/weights").read_text() == "weights 2" and read_evaluation(best)["value"] == 0.8
    assert find_checkpoint(tmp_path).name == "iteration-000005"  # a resume goes on with the newest
    assert evaluated(tmp_path, 6, greedy=0.8).name == "best-iteration-000006"
    assert names(tmp_path) == ["best-iteration-000006", "iteration-000005", "iteration-000006"]


def test_it_takes_no_room_of_its_own_where_the_disk_has_links_and_is_a_copy_elsewhere(tmp_path, monkeypatch):
    best = evaluated(tmp_path / "a", 1, greedy=0.5)
    assert (best / "adapter/weights").stat().st_nlink == 2

    def no_links(source, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(best_checkpoint.os, "link", no_links)
    best = evaluated(tmp_path / "b", 1, greedy=0.5)
    assert (best / "adapter/weights").stat().st_nlink == 1
    verify(best)


def test_a_full_disk_is_an_error_and_leaves_what_was_the_best(tmp_path, monkeypatch):
    before = evaluated(tmp_path, 1, greedy=0.5)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(best_checkpoint.os, "link", full)
    with pytest.raises(OSError, match="No space left"):
        evaluated(tmp_path, 2, greedy=0.6)
    assert names(tmp_path) == [before.name, "iteration-000001", "iteration-000002"]


def test_what_an_evaluation_says_twice_of_one_checkpoint_is_what_it_said_last(tmp_path):
    evaluated(tmp_path, 1, greedy=0.5)
    best = evaluated(tmp_path, 1, greedy=0.6)
    assert read_evaluation(best)["value"] == 0.6 and names(tmp_path) == ["best-iteration-000001", "iteration-000001"]


def test_an_unreadable_evaluation_is_warned_of_and_superseded(tmp_path, caplog):
    best = evaluated(tmp_path, 1, greedy=0.9)
    for text in ("{", "[]", '{"value": null}', '{"metric": "m"}'):
        (best / "evaluation.json").write_text(text)
        assert read_evaluation(best) is None
    assert caplog.text.count("what it was the best of is not known") == 4
    assert evaluated(tmp_path, 2, greedy=0.1).name == "best-iteration-000002"


@pytest.mark.parametrize("moment", ["link", "replace", "rmtree"])
def test_whenever_a_run_is_killed_one_whole_best_is_there(tmp_path, moment):
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def keep_and_die() -> None:
        folder = write(tmp_path, 2)
        module = checkpoint.shutil if moment == "rmtree" else best_checkpoint.os
        kept = checkpoint.shutil.rmtree

        def half_removed(path, *args, **kwargs):
            if str(path).endswith(".gone"):
                next(Path(path).rglob("weights")).unlink()
                die()
            kept(path, *args, **kwargs)

        setattr(module, moment, half_removed if moment == "rmtree" else die)
        keep_best(folder, evaluation_of(entry(2, greedy=0.9), EvalConfig()))

    evaluated(tmp_path, 1, greedy=0.5)
    process = multiprocessing.get_context("fork").Process(target=keep_and_die)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    best = list_checkpoints(tmp_path / "checkpoints", BEST)[-1]
    verify(best)
    assert best.name == ("best-iteration-000002" if moment == "rmtree" else "best-iteration-000001")
    assert evaluated(tmp_path, 3, greedy=1.0).name == "best-iteration-000003"
    assert names(tmp_path) == ["best-iteration-000003", "iteration-000002", "iteration-000003"]  # no rest of it


# how it is found


def test_it_is_used_by_its_name_or_as_best_and_not_gone_on_from(tmp_path):
    with pytest.raises(ConfigError, match=r"--run .*/checkpoints/best: no evaluation's checkpoint is kept there"):
        find_saved(tmp_path / "checkpoints/best", "--run ")
    best = evaluated(tmp_path, 1, greedy=0.5)
    evaluated(tmp_path, 2, greedy=0.1)
    for name in ("best", "best-iteration-000001"):
        assert find_saved(tmp_path / "checkpoints" / name, "--run ") == best
        with pytest.raises(CheckpointError, match=r"is kept to be used, .*start a new run with policy.adapter=.*/best"):
            find_checkpoint(tmp_path / "checkpoints" / name)
    assert find_saved(tmp_path, "--run ").name == "iteration-000002"
    (best / "adapter/weights").write_text("other")
    with pytest.raises(CheckpointError, match="is torn"):
        find_saved(tmp_path / "checkpoints/best", "--run ")


def test_after_a_step_back_the_best_of_the_superseded_future_is_set_aside(tmp_path):
    for iteration, rate in ((1, 0.2), (2, 0.3), (3, 0.8)):
        evaluated(tmp_path, iteration, greedy=rate)
    set_aside_later_checkpoints(tmp_path / "checkpoints/iteration-000002")
    assert names(tmp_path) == [
        "iteration-000002",
        "superseded-best-iteration-000003",
        "superseded-iteration-000003",
    ]
    assert evaluated(tmp_path, 3, greedy=0.1).name == "best-iteration-000003"  # of the history that counts
    set_aside_later_checkpoints(tmp_path / "checkpoints/iteration-000003")
    assert "best-iteration-000003" in names(tmp_path)  # it is not later


def test_the_evaluation_is_readable(tmp_path):
    text = (evaluated(tmp_path, 1, greedy=0.5) / "evaluation.json").read_text()
    assert set(json.loads(text)) == {"iteration", "timesteps", "metric", "value", "measured"}
