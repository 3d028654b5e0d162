"""The report of a run: what it says, and that a browser shows its curves and plays its video without a network."""

import json
import logging
import re
import time
from pathlib import Path

import pytest

from tests.browser import check_in_browser, needs_chromium
from tests.trainers import make_trainer
from vla_rl.reports.report import EMBEDDED_BYTES, all_settings, find_videos, is_outdated, render, write_report
from vla_rl.run.load_settings import config_from_dict, load_config
from vla_rl.run.logs import warnings_kept
from vla_rl.run.settings import Config
from vla_rl.run.sft_settings import SftConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Three iterations of the real trainer on the small environment, with two evaluations of two tasks."""
    folder = tmp_path_factory.mktemp("runs") / "small <run> & more"
    trainer = make_trainer(
        folder,
        evaluate=True,
        report=True,
        env={"task_ids": [0, 1]},
        eval={"states": "0-3", "num_envs": 2, "video": True},
    )
    with warnings_kept(folder):
        logging.getLogger("vla_rl.test").warning("something <b>odd</b>\nwas seen")
        trainer.train()
        trainer.logger.close()
    return folder


@pytest.fixture(scope="module")
def page(run) -> str:
    return (run / "report.html").read_text()


def test_it_needs_nothing_but_itself(page):
    assert (
        not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page) and "@import" not in page and "url(http" not in page
    )


def test_it_says_what_was_trained_and_how_far_it_is(page):
    assert "<h1>small &lt;run&gt; &amp; more</h1>" in page
    assert "PPO with GAE of tiny-openvla on libero_spatial, tasks 0, 1, seed 3" in page
    assert "<b>192</b><small>of 192</small>" in page


def test_the_last_evaluation_stands_by_task_with_intervals(run, page):
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    rows = re.search(r'<table id="tasks">.*?</table>', page, re.DOTALL)[0].split("<tr")[2:]
    assert len(rows) == 3
    for row, key in zip(rows, ("/task_0", "/task_1", ""), strict=True):
        assert f"{100 * last[f'eval/success_rate_greedy{key}']:.1f} % of {8 if key == '' else 4}" in row
    assert f"95 % interval {100 * last['eval/success_rate_sampled_low']:.1f} to" in rows[2]


def test_warnings_are_shown_as_they_were_logged(page):
    warnings = re.search(r"<pre>.*?</pre>", page, re.DOTALL)[0]
    assert "WARNING vla_rl.test: something &lt;b&gt;odd&lt;/b&gt; was seen" in warnings
    assert "1 warning<" in page


def test_settings_that_differ_from_the_defaults_come_first(page):
    first = re.search(r'id="changed".*?</details>', page, re.DOTALL)[0]
    assert "rollout.num_envs" in first and "algorithm.gamma" not in first
    assert page.index('id="changed"') < page.index('id="settings"') and "algorithm.gamma" in page


def test_every_setting_is_listed_with_its_default():
    settings = {s.name: s for s in all_settings(load_config(overrides=["eval.states=0-4", "policy.lora.rank=4"]))}
    assert {name for name, s in settings.items() if s.differs} == {"eval.states", "policy.lora.rank"}
    assert (settings["eval.states"].value, settings["eval.states"].default) == ("0-4", "0-49")
    assert (settings["policy.lora.rank"].default, settings["run.name"].value) == ("32", "null")


def test_the_newest_videos_come_first_and_of_them_a_greedy_success(run):
    names = [path.name for path in find_videos(run)]
    assert len(names) >= 3 and names[0].startswith("000000192_") and names[-1].startswith("000000000_")
    assert "greedy" in names[0]


def test_a_video_of_a_future_that_a_resume_went_back_from_is_not_shown(tmp_path):
    (tmp_path / "videos").mkdir()
    for timesteps in (100, 200, 300):
        (tmp_path / f"videos/{timesteps:09d}_greedy_success.mp4").write_bytes(b"x")
    line = {"iteration": 2, "timesteps": 200, "eval/render": "fast", "eval/success_rate_greedy": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line | {"eval/episodes_greedy": 10}) + "\n")
    text = render(tmp_path, Config())
    assert "<small>000000200_greedy_success" in text and "000000100_" in text and "000000300_" not in text


def test_lines_of_another_program_have_a_report(tmp_path):
    text = """{"iteration": 1, "timesteps": 10, "rollout/episodes": 4, "rollout/success_rate": 0.5, "actor/entropy": NaN}
{"iteration": 1, "timesteps": 10, "eval/render": "fast", "eval/success_rate_greedy": 0.25}
"""
    (tmp_path / "metrics.jsonl").write_text(text)
    page = render(tmp_path, Config())
    assert "<b>50.0%</b>" in page and "<b>25.0%</b>" in page and "speed" not in page and 'id="tasks"' not in page


def test_tasks_have_their_instructions_and_training_success_and_sampling_its_temperature(tmp_path):
    training = {f"rollout/{what}/task_2": value for what, value in (("episodes", 8), ("success_rate", 0.75))}
    evaluation = {"eval/render": "fast", "eval/temperature": 1.5, "eval/episodes_sampled": 20}
    rates = {f"eval/success_rate_sampled{end}": 0.5 for end in ("", "/task_2", "/task_7", "_low", "_high")}
    lines = [{"iteration": 1, "timesteps": 10} | training, {"iteration": 1, "timesteps": 10} | evaluation | rates]
    config = config_from_dict({"env": {"task_ids": [2, 7]}}, "the test")

    def page(count: int) -> str:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:count]))
        return render(tmp_path, config, {2: "open the <top> drawer", 7: "close it"})

    before, after = page(1), page(2)
    assert "<td>2<br><small>open the &lt;top&gt; drawer</small></td>\n<td>75.0 % of 8</td>" in before
    assert "fixed initial states, rendered" not in before and "rendered fast, sampled at temperature 1.5." in after
    assert "<small>close it</small></td>\n<td>50.0 % of 10<br>" in after and "75.0 % of 8" in after


def test_a_large_video_is_linked_not_embedded(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "000000000_greedy_success.mp4").write_bytes(bytes(EMBEDDED_BYTES + 1))
    text = render(tmp_path, Config())
    assert 'src="videos/000000000_greedy_success.mp4"' in text and len(text) < 200_000


def test_a_run_without_a_line_has_a_report_too(tmp_path):
    write_report(tmp_path, Config())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "no warnings" in (tmp_path / "report.html").read_text()


def test_a_run_of_fine_tuning_has_a_report(tmp_path):
    records = [
        {"iteration": i, "step": i, "sft/loss": 3 / i, "validation/loss": 4 / i, "sft/grad_norm": 1.0}
        for i in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = config_from_dict({"data": {"files": ["a.hdf5"], "name": "two_tasks"}}, "the test", SftConfig)
    text = render(tmp_path, config)
    assert "supervised fine-tuning on two_tasks" in text and "<b>3</b><small>of 50,000" in text
    assert text.count("<svg") == 2 and "Last evaluation" not in text
    assert 'class="differs"><td>data.files</td>' in text


def test_a_page_is_outdated_by_later_lines_and_warnings(tmp_path):
    assert not is_outdated(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert is_outdated(tmp_path)
    write_report(tmp_path, Config())
    assert not is_outdated(tmp_path)
    time.sleep(0.02)
    (tmp_path / "warnings.log").write_text("later\n")
    assert is_outdated(tmp_path)


@needs_chromium
def test_a_browser_shows_the_curves_and_plays_the_video(run):
    check_in_browser(run / "report.html", curves=12)
