"""Weights & Biases gets what metrics.jsonl gets, and is touched only when it is asked for."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from vla_rl.evaluation.videos import write_video
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.reports.records import read_metrics
from vla_rl.reports.weights_and_biases import WeightsAndBiases
from vla_rl.run.load_settings import load_config
from vla_rl.run.settings import ConfigError

ROOT = Path(__file__).parents[2]


def log_iterations(logger: MetricsLogger, *iterations: int) -> None:
    for iteration in iterations:
        logger.log({"iteration": iteration, "timesteps": 100 * iteration})


def iterations(path: Path) -> list[int]:
    return [record["iteration"] for record in read_metrics(path)]


def fails(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail


# each in its own process: what is imported there and where its home is matters


def python(code: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    home = tmp_path / "home"
    home.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "NETRC"))}
    env |= {"HOME": str(home), "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100)


def test_what_is_not_used_is_not_imported(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from vla_rl.run.settings import Config
        from vla_rl.reports.metrics import MetricsLogger
        logger = MetricsLogger(Path(sys.argv[1]), Config())
        logger.log({"iteration": 1, "timesteps": 1})
        print([name for name in ("wandb", "tensorboardX", "matplotlib", "jinja2", "torch") if name in sys.modules])
    """
    result = python(code, tmp_path)
    assert result.stdout == "[]\n", result.stderr


WANDB = """
    import socket, sys
    from pathlib import Path
    from vla_rl.run.load_settings import load_config
    from vla_rl.run.settings import ConfigError
    from vla_rl.reports.metrics import MetricsLogger
    from vla_rl.reports.weights_and_biases import check_wandb

    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("localhost", "127.0.0.1"):
            print("NETWORK", address)
            raise OSError("no network in this test")
        return original(self, address)

    original = socket.socket.connect
    socket.socket.connect = connect
    try:
        config = load_config(overrides=["logging.wandb=true", "logging.wandb_mode=MODE"])
        check_wandb(config)
        logger = MetricsLogger(Path(sys.argv[1]), config)
        logger.log({"iteration": 1, "timesteps": 64, "actor/entropy": 1.5, "critic/value_loss": float("nan")})
        logger.close()
        print("logged")
    except ConfigError as error:
        print(f"ConfigError: {error}")
"""


def test_wandb_offline_writes_numbers_videos_and_tables_into_the_run_folder_without_a_network(tmp_path):
    video = tmp_path / "videos" / "000000064_greedy_task0_state3_success.mp4"
    write_video([np.full((64, 64, 3), 20 * i, np.uint8) for i in range(4)], video, fps=2.5)
    more = """evaluation = {"iteration": 1, "timesteps": 64, "eval/render": "fast", "eval/episodes_greedy": 2}
        rates = {f"eval/success_rate_greedy{end}": 0.5 for end in ("", "_low", "_high")}
        logger.write_report = lambda: None
        logger.log_evaluation(evaluation | rates, [Path(sys.argv[1]) / "videos/000000064_greedy_task0_state3_success.mp4"])
        logger.close()"""
    code = WANDB.replace("MODE", "offline").replace("logger.close()", more)
    result = python(code, tmp_path, WANDB_SILENT="true")
    assert result.stdout == "logged\n", result.stdout + result.stderr
    assert result.stderr == ""
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (run / f"run-{(tmp_path / 'wandb_id').read_text()}.wandb").stat().st_size > 1000
    (shown,) = run.glob("files/media/videos/eval/video/greedy_success_*.mp4")
    (table,) = run.glob("files/media/table/eval/tasks_*.json")
    assert shown.read_bytes() == video.read_bytes()
    assert json.loads(table.read_text())["data"] == [["0", "greedy", 2, 0.5, 0.5, 0.5]]
    assert iterations(tmp_path / "metrics.jsonl") == [1, 1]


def test_wandb_online_without_a_login_is_a_users_error_that_names_three_ways_out(tmp_path):
    result = python(WANDB.replace("MODE", "online"), tmp_path)
    assert result.stdout.startswith("ConfigError: logging.wandb=true, but you are not logged in"), result.stderr
    assert all(way in result.stdout for way in ("wandb login", "logging.wandb_mode=offline", "--no-wandb"))
    assert not (tmp_path / "wandb_id").exists() and "deprecated" not in result.stderr


@pytest.mark.parametrize("mode", ["offline", "dryrun"])
def test_wandb_mode_of_the_environment_takes_wandb_offline(tmp_path, mode):
    result = python(WANDB.replace("MODE", "online"), tmp_path, WANDB_SILENT="true", WANDB_MODE=mode)
    assert result.stdout == "logged\n", result.stdout + result.stderr
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_mode_disabled_runs_without_wandb(tmp_path, mode):
    result = python(WANDB.replace("MODE", mode), tmp_path, WANDB_MODE="disabled")
    assert result.stdout == "logged\n", result.stdout + result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"home", "metrics.jsonl", "report.html"}


@pytest.mark.parametrize("mode", ["online", "shared", "run"])
def test_wandb_mode_online_still_wants_a_login(tmp_path, mode):
    result = python(WANDB.replace("MODE", "online"), tmp_path, WANDB_MODE=mode)
    assert result.stdout.startswith("ConfigError: logging.wandb=true, but you are not logged in"), result.stderr


MALFORMED = {
    "a short key": ({"WANDB_API_KEY": "abc"}, "API key must have 40+ characters, has 3."),
    "a key with a sign": ({"WANDB_API_KEY": "a!b" * 20}, "WANDB_API_KEY invalid"),
    "a key with a space": ({"WANDB_API_KEY": "a b"}, "may only contain the letters"),
    "no such mode": ({"WANDB_MODE": "on"}, "WANDB_MODE=on is none of run, dryrun, online, offline, shared, disabled"),
    "an empty mode": ({"WANDB_MODE": ""}, "WANDB_MODE= is none of"),
    "another variable": ({"WANDB_INIT_TIMEOUT": "soon"}, "init_timeout Input should be a valid number"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_wandb_refuses_is_one_line_with_the_way_out(tmp_path, what):
    variables, words = MALFORMED[what]
    result = python(WANDB.replace("MODE", "online"), tmp_path, **variables)
    (line,) = result.stdout.splitlines()
    assert line.startswith("ConfigError: ") and words in line, result.stderr
    assert "--no-wandb" in line or "unset it" in line
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


class FakeWandb:
    """Notes what it was asked; `init` gives runs abc1, abc2, ... unless it is told which."""

    class errors:
        class Error(Exception):
            pass

    def __init__(self):
        self.calls, self.started, self.refuses = [], [], False

    def login(self, **kwargs):
        return True

    def init(self, **kwargs):
        if self.refuses:
            raise self.errors.Error("no\nnetwork")
        self.started.append(kwargs)
        return FakeRun(self, kwargs["id"] or f"abc{len(self.started)}")

    def points(self, run_id: str) -> list[int]:
        return [call[1]["iteration"] for call in self.calls if call[0] == run_id and isinstance(call[1], dict)]


class FakeRun:
    def __init__(self, wandb: FakeWandb, run_id: str):
        self.wandb, self.id = wandb, run_id

    def log(self, values):
        self.wandb.calls.append((self.id, values))

    def define_metric(self, name, step_metric):
        self.wandb.calls.append((self.id, (name, step_metric)))

    def finish(self):
        self.wandb.calls.append((self.id, "finished"))


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def wandb_id(logger: MetricsLogger) -> str:
    (other,) = logger.others
    assert isinstance(other, WeightsAndBiases)
    return other.run.id


WITH_WANDB = load_config(overrides=["logging.wandb=true", "logging.wandb_project=p", "logging.wandb_entity=e"])


def test_wandb_gets_the_settings_and_continues_its_run(tmp_path, wandb):
    logger = MetricsLogger(tmp_path, WITH_WANDB)
    logger.log({"iteration": 1, "timesteps": 64, "a": 1.0, "b": float("nan"), "c": None})
    logger.close()
    MetricsLogger(tmp_path, WITH_WANDB)
    first, second = wandb.started
    assert (first["project"], first["entity"], first["mode"], first["id"]) == ("p", "e", "online", None)
    assert first["config"]["algorithm"]["gamma"] == 0.99 and first["name"] == tmp_path.name
    line = {"iteration": 1, "timesteps": 64, "a": 1.0}
    assert [call for _, call in wandb.calls[:3]] == [("*", "timesteps"), line, "finished"]
    assert second["id"] == "abc1" and second["resume"] == "allow"


def test_a_step_back_begins_a_new_wandb_run_with_the_lines_that_count(tmp_path, wandb):
    log_iterations(MetricsLogger(tmp_path, WITH_WANDB), 1, 2, 3, 4)
    back = MetricsLogger(tmp_path, WITH_WANDB)
    back.continue_from(2)
    log_iterations(back, 3)
    new = wandb_id(back)
    assert wandb.points("abc1") == [1, 2, 3, 4] and ("abc1", "finished") in wandb.calls
    assert new != "abc1" and wandb.points(new) == [1, 2, 3] and (new, ("*", "timesteps")) in wandb.calls
    first, resumed, fresh = wandb.started
    assert resumed["id"] == "abc1" and fresh["id"] == new and "abc1" in fresh["notes"]
    assert fresh["group"] == first["group"] and fresh["name"] == f"{tmp_path.name}_2"
    later = MetricsLogger(tmp_path, WITH_WANDB)  # a resume of the new one: its name, no third run
    later.continue_from(3)
    assert wandb_id(later) == new and wandb.started[3]["name"] == f"{tmp_path.name}_2"
    later.continue_from(1)
    assert len({wandb_id(later), new, "abc1"}) == 3 and wandb.points(wandb_id(later)) == [1]
    assert wandb.started[4]["name"] == f"{tmp_path.name}_3"


def test_a_resume_that_takes_nothing_back_goes_on_in_its_wandb_run(tmp_path, wandb):
    log_iterations(MetricsLogger(tmp_path, WITH_WANDB), 1, 2)
    resumed = MetricsLogger(tmp_path, WITH_WANDB)
    resumed.continue_from(2)
    assert wandb_id(resumed) == "abc1" and wandb.points("abc1") == [1, 2]


def test_a_step_back_that_wandb_refuses_is_done_by_the_next_resume(tmp_path, wandb):
    log_iterations(MetricsLogger(tmp_path, WITH_WANDB), 1, 2, 3)
    back = MetricsLogger(tmp_path, WITH_WANDB)
    wandb.refuses = True
    with pytest.raises(ConfigError, match=r"could not start \(no network\); set logging.wandb_mode=offline"):
        back.continue_from(1)
    assert iterations(tmp_path / "metrics.jsonl") == [1, 2, 3]
    wandb.refuses = False
    again = MetricsLogger(tmp_path, WITH_WANDB)
    again.continue_from(1)
    assert wandb.points(wandb_id(again)) == [1] and iterations(again.path) == [1]


def test_a_step_back_without_a_network_makes_two_offline_runs(tmp_path):
    more = """logger = MetricsLogger(Path(sys.argv[1]), config)
        logger.continue_from(0)
        logger.log({"iteration": 1, "timesteps": 32})
        logger.close()
        print("logged")"""
    result = python(WANDB.replace("MODE", "offline").replace('print("logged")', more), tmp_path, WANDB_SILENT="true")
    assert result.stdout == "logged\n", result.stdout + result.stderr
    runs = {path.stem for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}
    old, new = (tmp_path / name for name in ("wandb_id.superseded", "wandb_id"))
    assert runs == {f"run-{old.read_text().strip()}", f"run-{new.read_text()}"} and len(runs) == 2


def test_wandb_that_fails_meanwhile_does_not_end_the_run(tmp_path, wandb, monkeypatch, caplog):
    logger = MetricsLogger(tmp_path, WITH_WANDB)
    monkeypatch.setattr(FakeRun, "log", fails(BrokenPipeError("the service\nis gone")))
    monkeypatch.setattr(FakeRun, "finish", fails(BrokenPipeError("the service is gone")))
    log_iterations(logger, 7)
    logger.close()
    assert iterations(logger.path) == [7]
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases did not take iteration 7: the service is gone",
        "Weights & Biases did not finish its run: the service is gone",
    ]
