"""TensorBoard's files hold what metrics.jsonl holds, with tables and videos, also after a resume."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from vla_rl.evaluation.videos import write_video
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.reports.records import read_metrics
from vla_rl.reports.tensorboard import TensorBoard
from vla_rl.run.load_settings import load_config
from vla_rl.run.settings import Config, ConfigError

CONFIG = load_config(overrides=["logging.tensorboard=true", "env.task_ids=2,7"])


def events(folder: Path) -> list[Event]:
    """Of all files in the order of their names, by TFRecord's layout: length, its checksum, data, their checksum."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            found.append(Event.FromString(data[place + 12 : place + 12 + length]))
            place += 12 + length + 4
        assert place == len(data)
    return found


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars as TensorBoard shows them: where a session starts at a step, what is older at or after it is purged."""
    shown: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            shown = {tag: [p for p in old if p[0] < event.step] for tag, old in shown.items()}
        for value in event.summary.value:
            if value.HasField("simple_value"):
                shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown


def log_iterations(logger: MetricsLogger, *iterations: int, shift: float = 0) -> None:
    for i in iterations:
        logger.log(
            {"iteration": i, "timesteps": 100 * i, "actor/entropy": i + shift, "rollout/render": "fast", "a": None}
        )


def evaluation(iteration: int) -> dict:
    rates = {f"eval/success_rate_greedy{end}": rate for end, rate in (("", 0.75), ("_low", 0.5), ("_high", 1.0))}
    tasks = {"eval/success_rate_greedy/task_2": 0.5, "eval/success_rate_greedy/task_7": 1.0, "eval/episodes_greedy": 4}
    return {"iteration": iteration, "timesteps": 100 * iteration, "eval/render": "fast", **rates, **tasks}


def test_numbers_have_the_names_of_metrics_jsonl_and_are_on_the_disk_at_once(tmp_path):
    logger = MetricsLogger(tmp_path, CONFIG)
    log_iterations(logger, 1, 2)
    assert points(tmp_path) == {"actor/entropy": [(100, 1.0), (200, 2.0)]}


def test_an_evaluation_brings_its_table_and_its_videos_as_moving_pictures(tmp_path):
    frames = [np.full((256, 256, 3), 20 * i, np.uint8) for i in range(10)]
    video = tmp_path / "videos" / "000000000_greedy_task2_state0_success.mp4"
    write_video(frames, video, fps=2.5)
    MetricsLogger(tmp_path, CONFIG).log_evaluation(evaluation(0), [video])
    values = {value.tag: value for event in events(tmp_path) for value in event.summary.value}
    picture = values["eval/video/greedy_success"].image
    assert picture.encoded_image_string[:6] == b"GIF89a" and (picture.width, picture.height) == (192, 192)
    table = values["eval/tasks/text_summary"].tensor.string_val[0].decode()
    assert "| 2 | greedy | 2 | 50.0% |" in table
    assert values["eval/success_rate_greedy/task_7"].simple_value == 1


def test_a_step_back_supersedes_the_later_points(tmp_path):
    log_iterations(MetricsLogger(tmp_path, CONFIG), 1, 2, 3)
    resumed = MetricsLogger(tmp_path, CONFIG)
    resumed.continue_from(1)
    log_iterations(resumed, 2, shift=0.5)
    assert points(tmp_path)["actor/entropy"] == [(100, 1.0), (200, 2.5)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3


def test_an_evaluation_that_is_done_again_leaves_its_iteration(tmp_path):
    logger = MetricsLogger(tmp_path, CONFIG)
    log_iterations(logger, 1)
    logger.log(evaluation(1))
    resumed = MetricsLogger(tmp_path, CONFIG)
    resumed.continue_from(1, evaluated=False)
    shown = points(tmp_path)
    assert shown["actor/entropy"] == [(100, 1.0)] and shown["eval/success_rate_greedy"] == []
    resumed.log(evaluation(1))
    assert points(tmp_path)["eval/success_rate_greedy"] == [(100, 0.75)]


def test_a_resume_that_takes_nothing_back_purges_nothing(tmp_path):
    log_iterations(MetricsLogger(tmp_path, CONFIG), 1, 2)
    resumed = MetricsLogger(tmp_path, CONFIG)
    resumed.continue_from(2)
    log_iterations(resumed, 3)
    assert [step for step, _ in points(tmp_path)["actor/entropy"]] == [100, 200, 300]


def test_files_that_cannot_be_written_or_read_do_not_end_the_run(tmp_path, caplog):
    logger = MetricsLogger(tmp_path, CONFIG)
    (tmp_path / "torn.mp4").write_bytes(b"no video")
    logger.log_evaluation(evaluation(0), [tmp_path / "torn.mp4"])
    logger.others[0].writer.close()
    log_iterations(logger, 1)
    assert [r["iteration"] for r in read_metrics(logger.path)] == [0, 1]
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("TensorBoard did not take the tasks and videos of iteration 0: torn.mp4: ffmpeg said")
    assert second.startswith("TensorBoard did not take iteration 1: ")


def test_without_the_package_it_is_a_users_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"logging.tensorboard=true, but .*tensorboardX.* logging.tensorboard=false"):
        TensorBoard(tmp_path, CONFIG)


def test_it_is_off_by_default(tmp_path):
    log_iterations(MetricsLogger(tmp_path, Config()), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
