"""Lines of metrics.jsonl survive kills and resumes."""

import json
from pathlib import Path

import pytest

from vla_rl.reports.records import read_metrics, set_aside_later_lines
from vla_rl.run.settings import ConfigError


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, *iterations: int) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps({"iteration": i, "timesteps": 100 * i}) + "\n" for i in iterations)


def iterations(path: Path) -> list[int]:
    return [record["iteration"] for record in read_metrics(path)]


def test_a_torn_last_line_is_left_out(path):
    write(path, 1, 2)
    path.write_text(path.read_text()[:-10])
    assert iterations(path) == [1]


def test_a_damaged_line_in_the_middle_is_refused_by_number(path):
    write(path, 1, 2, 3)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], lines[2]]) + "\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"iteration": null, "timesteps": 1}', "iteration is None, expected a whole number from 0"),
        ('{"iteration": "2", "timesteps": 1}', "iteration is '2', expected a whole number"),
        ('{"iteration": 1.5}', "iteration is 1.5, expected"),
        ('{"iteration": -1}', "iteration is -1, expected"),
        ('{"iteration": true}', "iteration is True, expected"),
        ('{"iteration": 1, "timesteps": null}', "timesteps is None, expected"),
        ('{"iteration": 1, "actor/policy_loss": "x"}', "'actor/policy_loss' is 'x', expected a number"),
        ('{"iteration": 1, "a\\nb": [1]}', r"'a\nb' is [1], expected a number"),
        ('{"timesteps": 1}', "it is no object with an iteration"),
        ("[]", "it is no object with an iteration"),
        ("3", "it is no object with an iteration"),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_a_line_with_what_no_run_writes_is_refused_wherever_it_stands(path, line, words, last):
    write(path, 1)
    path.write_text(path.read_text() + line + "\n")
    if not last:
        write(path, 3)
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        set_aside_later_lines(path, 1)
    assert words in str(caught.value) and "metrics.jsonl, line 2 is damaged" in str(caught.value)
    assert "\n" not in str(caught.value) and path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_bytes_that_are_no_text_are_a_damaged_line(path):
    write(path, 1)
    path.write_bytes(path.read_bytes() + b"\xff\n" + b'{"iteration": 2, "eval/render": "exact"}\n' + b'{"iteration": 3')
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        read_metrics(path)
    path.write_bytes(path.read_bytes().replace(b"\xff\n", b""))
    assert iterations(path) == [1, 2]


def test_what_json_has_no_number_for_is_null_also_where_another_program_wrote_it(path):
    path.write_text('{"iteration": 1, "a": NaN, "b": -Infinity, "c": 1.5}\n')
    assert read_metrics(path) == [{"iteration": 1, "a": None, "b": None, "c": 1.5}]


def test_no_file_has_no_records(path):
    assert read_metrics(path) == []


def test_later_lines_are_set_aside_and_none_is_lost(path):
    write(path, 0, 1, 2, 3, 4)
    set_aside_later_lines(path, 2)
    write(path, 3)
    assert iterations(path) == [0, 1, 2, 3]
    assert iterations(path.with_name("metrics.superseded.jsonl")) == [3, 4]


def test_an_evaluation_that_is_done_again_is_later_than_its_iteration(path):
    write(path, 1)
    with path.open("a") as file:
        file.write(json.dumps({"iteration": 1, "timesteps": 100, "eval/success_rate_greedy": 0.5}) + "\n")
    set_aside_later_lines(path, 1, evaluated=True)
    assert len(read_metrics(path)) == 2
    set_aside_later_lines(path, 1, evaluated=False)
    assert read_metrics(path) == [{"iteration": 1, "timesteps": 100}]
