"""The journal of an evaluation cannot tear, goes on where it ended, and refuses what is not of the same kind."""

import json

import numpy as np
import pytest

from vla_rl.evaluation.play import EpisodeResult
from vla_rl.evaluation.results import JOURNAL, Journal, Key, check_continues, read_baseline, write_whole
from vla_rl.run.settings import ConfigError
from vla_rl.types import Episode

PROTOCOL = {
    "max_steps": {"libero_spatial": 220},
    "task_ids": [0, 1],
    "states": [0, 1],
    "modes": ["greedy", "sampled"],
    "settle_steps": 10,
    "image_size": 128,
    "render": "fast",
    "temperature": 1.0,
    "num_envs": 4,
    "chunk_size": 8,
}
POLICY = {"name": "tiny", "fingerprint": "0123456789abcdef"}
KEYS = [
    Key("libero_spatial", mode, task, state) for mode in ("greedy", "sampled") for task in (0, 1) for state in (0, 1)
]


def result(number: int) -> EpisodeResult:
    actions = np.random.default_rng(number).normal(size=(5 + number, 7)).astype(np.float32)
    episode = Episode(KEYS[number].task_id, KEYS[number].initial_state, 0, KEYS[number].initial_state + 1)
    return EpisodeResult(episode, number % 2 == 0, 5 + number, actions, [0.5, 0.25] if number else None)


def journal(folder, count=0, protocol=PROTOCOL, policy=POLICY) -> Journal:
    opened = Journal(folder, protocol, policy)
    for number in range(count):
        if number == 0:
            opened.add_session({"host": "here"})
        opened.add(KEYS[number], result(number), 2.0 * number)
    return opened


def test_an_episode_comes_back_as_it_was_kept(tmp_path):
    journal(tmp_path, 3)
    again = journal(tmp_path)
    assert list(again.rows) == KEYS[:3] and again.sessions == [{"host": "here"}]
    for number in range(3):
        kept, was = again.result(KEYS[number], result(number).episode), result(number)
        assert (kept.episode, kept.success, kept.length, kept.values) == (
            was.episode,
            was.success,
            was.length,
            was.values,
        )
        np.testing.assert_array_equal(kept.actions, was.actions)
        assert kept.actions.dtype == np.float32


def test_each_episode_is_on_the_disk_before_the_next_begins(tmp_path):
    opened = journal(tmp_path, 2)
    assert len((tmp_path / JOURNAL).read_text().splitlines()) == 4  # header, session, two episodes
    opened.add(KEYS[2], result(2), 1.0)
    assert list(journal(tmp_path).rows) == KEYS[:3]


@pytest.mark.parametrize("torn", [1, 20, 200])
def test_a_line_that_was_being_written_is_left_out_and_the_next_begins_a_line_of_its_own(tmp_path, torn):
    journal(tmp_path, 3)
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes()[:-torn])
    again = journal(tmp_path)
    assert list(again.rows) == KEYS[:2]
    again.add(KEYS[2], result(2), 1.0)
    assert list(journal(tmp_path).rows) == KEYS[:3]


def test_a_damaged_line_is_refused_and_nothing_is_lost(tmp_path):
    journal(tmp_path, 3)
    path = tmp_path / JOURNAL
    text = path.read_text().replace('"length": 6', '"len": 6')
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=r"episodes.jsonl, line 4 is damaged: .*remove the line or give another --out"
    ):
        journal(tmp_path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"render": "exact"}, "another protocol: render fast; exact (there; here)"),
        ({"states": [0, 1, 2]}, "states [0, 1]; [0, 1, 2]"),
        ({"num_envs": 8}, "num_envs 4; 8"),
    ],
)
def test_results_of_another_protocol_are_refused_and_stay(tmp_path, change, words):
    journal(tmp_path, 3)
    before = (tmp_path / JOURNAL).read_bytes()
    for attempt in (
        lambda: check_continues(tmp_path, PROTOCOL | change),
        lambda: journal(tmp_path, 0, PROTOCOL | change),
    ):
        with pytest.raises(ConfigError) as error:
            attempt()
        assert words in str(error.value) and "nothing is overwritten" in str(error.value)
    assert (tmp_path / JOURNAL).read_bytes() == before


def test_results_of_another_policy_are_refused_but_it_may_lie_elsewhere(tmp_path):
    journal(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"of another policy, tiny .fingerprint 0123456789ab, here ffff"):
        journal(tmp_path, policy=POLICY | {"fingerprint": "ffff"})
    assert len(journal(tmp_path, policy=POLICY | {"name": "moved"}).rows) == 3


def test_a_file_or_results_without_a_journal_are_no_place_to_go_on(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        check_continues(tmp_path / "file", PROTOCOL)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has results.json but no episodes.jsonl"):
        check_continues(tmp_path, PROTOCOL)
    check_continues(tmp_path / "new", PROTOCOL)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / JOURNAL).write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        check_continues(tmp_path / "empty", PROTOCOL)


def test_results_are_in_one_order_and_time_is_that_of_all_sessions(tmp_path):
    first = Journal(tmp_path, PROTOCOL, POLICY)
    first.add_session({"host": "a"})
    first.add(KEYS[5], result(5), 30.0)
    assert first.seconds_of_session() == 30.0
    second = Journal(tmp_path, PROTOCOL, POLICY)
    assert second.seconds_of_session() == 0
    second.add_session({"host": "b"})
    second.add(KEYS[0], result(0), 4.0)
    second.add(KEYS[3], result(3), 20.0)
    results = second.results({"run": {}})
    assert [(e["mode"], e["task_id"], e["initial_state"]) for e in results["episodes"]] == [
        ("greedy", 0, 0),
        ("greedy", 1, 1),
        ("sampled", 0, 1),
    ]
    assert results["episodes"][1] == {**KEYS[3]._asdict(), "success": False, "length": 8}
    # 10 + 5 + 8 steps in 30 + 20 seconds
    assert results["time"] == {"env_steps": 23, "seconds": 50.0, "env_steps_per_s": 23 / 50}
    assert [session["host"] for session in results["sessions"]] == ["a", "b"]
    assert results["policy"] == POLICY and results["protocol"] == PROTOCOL and results["config"] == {"run": {}}


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    write_whole(tmp_path / "r", "old")

    def fail(*_):
        raise OSError

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("vla_rl.evaluation.results.os.replace", fail)
        write_whole(tmp_path / "r", "new")
    assert (tmp_path / "r").read_text() == "old"


# as a baseline


@pytest.fixture
def baseline(tmp_path):
    write_whole(tmp_path / "results.json", json.dumps(journal(tmp_path, 4).results({})))
    return tmp_path / "results.json"


def test_a_baseline_is_read_from_its_file_or_folder_with_its_actions(baseline):
    for path in (baseline, baseline.parent):
        read = read_baseline(path, PROTOCOL | {"chunk_size": 1, "num_envs": 2})  # the policy's own
        assert read.name == "tiny" and list(read.rows) == KEYS[:4]
        assert read.rows[KEYS[1]] == {"success": False, "length": 6}
        np.testing.assert_array_equal(read.recorded(KEYS[2], result(2).episode).actions, result(2).actions)
    (baseline.parent / JOURNAL).unlink()
    assert read.recorded(KEYS[2], result(2).episode) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"render": "exact"}, "render fast; exact"),
        ({"settle_steps": 0}, "settle_steps 10; 0"),
        ({"max_steps": {"libero_spatial": 100}}, "max_steps of libero_spatial 220; 100"),
        ({"temperature": 1.5}, "temperature 1.0; 1.5"),
        ({"max_steps": {"libero_goal": 300}}, "has no episode that this evaluation has"),
        ({"states": [7]}, "has no episode that this evaluation has"),
    ],
)
def test_a_baseline_of_another_protocol_is_refused(baseline, change, words):
    with pytest.raises(ConfigError) as error:
        read_baseline(baseline, PROTOCOL | change)
    assert words in str(error.value)


def test_the_temperature_of_a_greedy_comparison_says_nothing(baseline):
    assert read_baseline(baseline, PROTOCOL | {"temperature": 1.5, "modes": ["greedy"]}).rows


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", '{"format": 1}', '{"episodes": [{}]}', "\x00", "[" * 100_000])
def test_what_is_no_results_file_is_no_baseline(tmp_path, text):
    path = tmp_path / "x.json"
    with pytest.raises(ConfigError, match=r"no such file; give the results.json"):
        read_baseline(path, PROTOCOL)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"is no results file of an evaluation|x.json(:| is not JSON)") as error:
        read_baseline(path, PROTOCOL)
    assert "\n" not in str(error.value)
