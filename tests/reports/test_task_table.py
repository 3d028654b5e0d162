"""Success by task, and names of videos."""

from pathlib import Path

import pytest

from vla_rl.reports.task_table import as_markdown, task_rows, video_names

RECORD = {
    "eval/success_rate_greedy": 0.75,
    "eval/success_rate_greedy_low": 0.53,
    "eval/success_rate_greedy_high": 0.89,
    "eval/episodes_greedy": 20,
    "eval/success_rate_greedy/task_2": 0.5,
    "eval/success_rate_greedy/task_7": 1.0,
}


def test_each_task_has_the_interval_of_its_own_episodes():
    two, seven, whole = task_rows(RECORD, [2, 7])
    assert two.cells()[:4] == ["2", "greedy", 10, 0.5]
    # Wilson's interval of 5 and 10 of 10, from Brown, Cai and DasGupta 2001's formula by hand: z = 1.96
    assert (two.low, two.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert (seven.low, seven.high) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert whole.cells() == ["all", "greedy", 20, 0.75, 0.53, 0.89]


def test_of_one_task_the_whole_is_its_row():
    record = {name: value for name, value in RECORD.items() if "/task_" not in name}
    (row,) = task_rows(record, [5])
    assert (row.task, row.episodes) == ("5", 20)


def test_an_older_line_has_its_interval_counted_and_without_episodes_no_row():
    record = {"eval/success_rate_greedy": 0.5, "eval/episodes_greedy": 10, "eval/success_rate_sampled": 0.5}
    (row,) = task_rows(record, [5])
    assert (row.mode, row.low, row.high) == ("greedy", pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))


def test_a_table_as_text():
    lines = as_markdown(task_rows(RECORD, [2, 7])).splitlines()
    assert lines[0] == "| task | mode | episodes | success | low | high |"
    assert lines[4] == "| all | greedy | 20 | 75.0% | 53.0% | 89.0% |"


def test_videos_have_the_same_names_in_each_evaluation():
    written = "000012000_greedy_task3_state7_success.mp4 000012000_sampled_task0_state11_failure.mp4 000012000_grid.mp4"
    names = list(video_names([Path(name) for name in written.split()]))
    assert names == ["eval/video/greedy_success", "eval/video/sampled_failure", "eval/video/grid"]


def test_videos_that_would_share_a_name_keep_task_and_state():
    written = "000012000_greedy_task3_state7_success.mp4 000012000_greedy_task3_state8_success.mp4"
    names = list(video_names([Path(name) for name in written.split()]))
    assert names == ["eval/video/greedy_task3_state7_success", "eval/video/greedy_task3_state8_success"]
