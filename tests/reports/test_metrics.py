"""metrics.jsonl survives kills and resumes; pictures are drawn, and no failure of one ends a run."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from vla_rl.reports.metrics import MetricsLogger
from vla_rl.reports.records import read_metrics
from vla_rl.run.settings import Config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def logger(tmp_path) -> MetricsLogger:
    return MetricsLogger(tmp_path, Config())


def log_iterations(logger: MetricsLogger, *iterations: int, **more) -> None:
    for iteration in iterations:
        logger.log({"iteration": iteration, "timesteps": 100 * iteration, **more})


def iterations(path: Path) -> list[int]:
    return [record["iteration"] for record in read_metrics(path)]


# lines


def test_each_record_is_one_line_of_json(logger):
    log_iterations(logger, 1, 2, **{"actor/entropy": 1.25, "rollout/success_rate": None})
    lines = logger.path.read_text().splitlines()
    assert logger.path.name == "metrics.jsonl" and len(lines) == 2
    assert json.loads(lines[1]) == {
        "iteration": 2,
        "timesteps": 200,
        "actor/entropy": 1.25,
        "rollout/success_rate": None,
    }


def test_a_line_is_on_the_disk_as_soon_as_it_is_logged(logger):
    log_iterations(logger, 1)
    assert subprocess.run(["wc", "-l", logger.path], capture_output=True, text=True).stdout.startswith("1 ")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_what_json_has_no_number_for_becomes_null(logger, value):
    log_iterations(logger, 1, **{"actor/policy_loss": value})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(logger.path.read_text(), parse_constant=refuse)["actor/policy_loss"] is None


# resume


def resume(folder: Path, iteration: int) -> MetricsLogger:
    logger = MetricsLogger(folder, Config())
    logger.continue_from(iteration)
    return logger


def test_a_resumed_run_sets_later_lines_aside_and_loses_none(logger, tmp_path):
    log_iterations(logger, 0, 1, 2, 3, 4)
    resumed = resume(tmp_path, 2)
    log_iterations(resumed, 3)
    assert iterations(resumed.path) == [0, 1, 2, 3]
    assert iterations(tmp_path / "metrics.superseded.jsonl") == [3, 4]


def test_a_second_resume_adds_to_what_was_set_aside(logger, tmp_path):
    log_iterations(logger, 1, 2)
    log_iterations(resume(tmp_path, 1), 2, 3)
    resume(tmp_path, 0)
    assert iterations(logger.path) == [] and iterations(tmp_path / "metrics.superseded.jsonl") == [2, 1, 2, 3]


def test_a_run_killed_in_the_middle_of_a_line_resumes_with_whole_lines(logger, tmp_path):
    log_iterations(logger, 1, 2)
    with logger.path.open("a") as file:
        file.write('{"iteration": 3, "time')
    log_iterations(resume(tmp_path, 2), 3)
    assert iterations(logger.path) == [1, 2, 3]
    assert not (tmp_path / "metrics.superseded.jsonl").exists()


def test_a_new_run_leaves_existing_lines_alone(logger, tmp_path):
    log_iterations(logger, 1)
    MetricsLogger(tmp_path, Config())
    assert iterations(logger.path) == [1]


# a full disk


def test_lines_that_the_disk_does_not_take_are_written_later_and_said_once(logger, monkeypatch, caplog):
    log_iterations(logger, 1)
    with monkeypatch.context() as patch:
        patch.setattr("vla_rl.run.files.os.fsync", fails(OSError(28, "No space left on device")))
        log_iterations(logger, 2, 3)
        with pytest.raises(OSError):
            logger.write_waiting()
    log_iterations(logger, 4)
    assert iterations(logger.path) == [1, 2, 3, 4]
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        f"lines of {logger.path} cannot be written (No space left on device): they wait in memory until they can be",
        f"lines of {logger.path} are written again",
    ]


# pictures


def test_curves_and_report_are_drawn_anew_from_all_lines(logger, tmp_path):
    log_iterations(logger, 1, **{"actor/entropy": 1.0})
    logger.draw_curves()
    before = [(tmp_path / name).read_bytes() for name in ("curves.png", "report.html")]
    log_iterations(logger, 2, **{"actor/entropy": 2.0})
    logger.draw_curves()
    after = [(tmp_path / name).read_bytes() for name in ("curves.png", "report.html")]
    assert before[0] != after[0] and before[1] != after[1]


def test_nothing_logged_draws_no_curves(logger, tmp_path):
    logger.draw_curves()
    assert not (tmp_path / "curves.png").exists()


def test_the_report_is_written_after_an_evaluation_and_at_an_end_that_was_not_planned(logger, tmp_path):
    metrics = {"iteration": 0, "timesteps": 0, "eval/render": "fast", "eval/episodes_greedy": 2}
    rates = {f"eval/success_rate_greedy{end}": rate for end, rate in (("", 0.5), ("_low", 0.1), ("_high", 0.9))}
    logger.log_evaluation(metrics | rates)
    page = tmp_path / "report.html"
    assert "50.0 % of 2" in page.read_text()
    written = page.stat().st_mtime_ns
    logger.close()
    assert page.stat().st_mtime_ns == written  # nothing new
    log_iterations(logger, 1, **{"actor/entropy": 1.0})
    logger.close()
    assert "entropy" in page.read_text()


def test_a_run_that_ends_before_its_first_evaluation_leaves_a_report(logger, tmp_path):
    (tmp_path / "warnings.log").write_text("stopped\n")
    logger.close()
    assert "stopped" in (tmp_path / "report.html").read_text()


def test_pictures_are_drawn_with_an_iteration_when_the_last_ones_are_old(tmp_path, monkeypatch):
    now, drawn = [1000.0], []
    monkeypatch.setattr(MetricsLogger, "plot", lambda logger: drawn.append(now[0]))
    monkeypatch.setattr(MetricsLogger, "write_report", lambda logger: None)
    logger = MetricsLogger(tmp_path, Config(), clock=lambda: now[0])
    for iteration, second in enumerate((1030, 1060, 1061, 1100, 1121, 2000)):
        now[0] = second
        log_iterations(logger, iteration)
    assert drawn == [1061, 2000]
    now[0] = 2030
    logger.draw_curves()
    now[0] = 2080
    log_iterations(logger, 7)
    now[0] = 2091
    log_iterations(logger, 8)
    assert drawn == [1061, 2000, 2030, 2091]


def test_a_run_that_measured_nothing_leaves_no_report(logger, tmp_path):
    logger.close()
    assert list(tmp_path.iterdir()) == []


def fails(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("at", "error", "words"),
    [
        ("matplotlib.figure.Figure.savefig", OSError(28, "No space left on device"), "No space left on device"),
        ("vla_rl.reports.drawing.draw_panel", RuntimeError("no\nfont"), "no font"),
        ("matplotlib.figure.Figure.subplots", MemoryError(), "MemoryError"),
        ("matplotlib.axes.Axes.plot", ValueError("no line"), "no line"),
        ("vla_rl.run.files.os.replace", PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_warnings_and_leave_nothing_torn(
    logger, tmp_path, monkeypatch, caplog, at, error, words
):
    log_iterations(logger, 1, **{"actor/entropy": 1.0})
    monkeypatch.setattr(at, fails(error))
    logger.draw_curves()
    curves, report = caplog.records
    assert {curves.levelname, report.levelname} == {"WARNING"}
    assert curves.getMessage().startswith(f"no curves {tmp_path}/curves.png: ")
    assert report.getMessage().startswith(f"no report {tmp_path}/report.html: ")
    for record in (curves, report):
        assert words in record.getMessage() and "\n" not in record.getMessage()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_picture_that_cannot_be_drawn_is_told_once_until_it_can(logger, monkeypatch, caplog):
    log_iterations(logger, 1)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(logger, "plot", fails(OSError(28, "full")))
            logger.draw_curves()
            logger.draw_curves()
        logger.draw_curves()
    assert caplog.text.count("no curves") == 2


def test_a_damaged_line_does_not_end_the_run_at_its_curves(logger, caplog):
    log_iterations(logger, 1, 2)
    logger.path.write_text("torn\n" + logger.path.read_text())
    logger.draw_curves()
    assert "line 1 is damaged" in caplog.text


def test_values_that_are_no_numbers_do_not_end_the_run_at_its_curves(logger, caplog):
    log_iterations(logger, 1, **{"actor/entropy": {"a": 1}})
    logger.draw_curves()
    assert "no curves" in caplog.text
