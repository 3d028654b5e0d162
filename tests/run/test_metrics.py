"""metrics.jsonl survives kills and resumes; curves are drawn; wandb is touched only when it is asked for."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vla_rl.run.load_settings import load_config
from vla_rl.run.metrics import CURVES, MetricsLogger, plot_curves, read_metrics
from vla_rl.run.settings import Config, ConfigError

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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("norm", [0.0, 0.5])
def test_gradients_of_0_are_drawn_without_a_word(tmp_path, norm):
    """As they are until a run's first reward."""
    records = [{"timesteps": step, "actor/grad_norm": norm, "critic/grad_norm": 0.0} for step in (1, 2)]
    plot_curves(records, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_torn_last_line_is_left_out(logger):
    log_iterations(logger, 1, 2)
    text = logger.path.read_text()
    logger.path.write_text(text[:-10])
    assert iterations(logger.path) == [1]


def test_a_damaged_line_in_the_middle_is_refused_by_number(logger):
    log_iterations(logger, 1, 2, 3)
    lines = logger.path.read_text().splitlines()
    logger.path.write_text("\n".join([lines[0], lines[1][:-5], lines[2]]) + "\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(logger.path)


def test_no_file_has_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


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


# curves


def panels_with_ink(path: Path) -> int:
    """Cells of the 4 x 3 grid in which a line of matplotlib's first colour (31, 119, 180) is drawn."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    blue = np.abs(pixels - [31, 119, 180]).sum(axis=-1) < 30
    rows = np.array_split(blue, 4, axis=0)
    return sum(cell.sum() > 20 for row in rows for cell in np.array_split(row, 3, axis=1))


def test_every_metric_that_was_logged_is_drawn(logger, tmp_path):
    names = [name for names in CURVES.values() for name in names]
    for i in range(5):
        log_iterations(logger, i, **{name: 0.1 * i for name in names})
    logger.draw_curves()
    image = Image.open(tmp_path / "curves.png")
    assert image.format == "PNG" and image.width > 1000
    assert panels_with_ink(tmp_path / "curves.png") == len(CURVES) == 12
    assert not list(tmp_path.glob(".curves*"))


def test_curves_of_a_metric_that_is_missing_or_null_now_and_then_are_drawn(logger, tmp_path):
    log_iterations(logger, 0, **{"eval/success_rate_greedy": 0.5})
    log_iterations(logger, 1, **{"rollout/success_rate": None, "actor/entropy": 1.0})
    log_iterations(logger, 2, **{"rollout/success_rate": 0.25, "actor/entropy": float("nan")})
    logger.draw_curves()
    assert Image.open(tmp_path / "curves.png").height < 500  # two panels: one row


def test_nothing_logged_draws_nothing(logger, tmp_path):
    logger.draw_curves()
    assert not (tmp_path / "curves.png").exists()


def test_a_run_without_any_known_metric_draws_nothing_and_goes_on(logger, tmp_path):
    log_iterations(logger, 1)
    logger.draw_curves()


def test_panels_show_only_metrics_that_the_documentation_explains():
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert [name for names in CURVES.values() for name in names if f"`{name}`" not in text] == []


def fails(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("at", "error", "words"),
    [
        ("matplotlib.figure.Figure.savefig", OSError(28, "No space left on device"), "No space left on device"),
        ("matplotlib.figure.Figure.tight_layout", RuntimeError("no\nfont"), "no font"),
        ("matplotlib.figure.Figure.subplots", MemoryError(), "MemoryError"),
        ("matplotlib.axes.Axes.plot", ValueError("no line"), "no line"),
        ("vla_rl.run.metrics.os.replace", PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_curves_that_cannot_be_drawn_are_a_warning_and_leave_nothing_torn(
    logger, tmp_path, monkeypatch, caplog, at, error, words
):
    log_iterations(logger, 1, **{"actor/entropy": 1.0})
    monkeypatch.setattr(at, fails(error))
    logger.draw_curves()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"no curves {tmp_path}/curves.png: ") and words in record.getMessage()
    assert "\n" not in record.getMessage()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_damaged_line_does_not_end_the_run_at_its_curves(logger, caplog):
    log_iterations(logger, 1, 2)
    logger.path.write_text("torn\n" + logger.path.read_text())
    logger.draw_curves()
    assert "line 1 is damaged" in caplog.text


def test_values_that_are_no_numbers_do_not_end_the_run_at_its_curves(logger, caplog):
    log_iterations(logger, 1, **{"actor/entropy": {"a": 1}})
    logger.draw_curves()
    assert "no curves" in caplog.text


# Weights & Biases, each in its own process: what is imported there and where its home is matters


def python(code: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    home = tmp_path / "home"
    home.mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "NETRC"))}
    env |= {"HOME": str(home), "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100)


def test_wandb_and_matplotlib_are_not_imported_when_they_are_not_used(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from vla_rl.run.settings import Config
        from vla_rl.run.metrics import MetricsLogger
        logger = MetricsLogger(Path(sys.argv[1]), Config())
        logger.log({"iteration": 1, "timesteps": 1})
        logger.close()
        print([name for name in ("wandb", "matplotlib", "torch") if name in sys.modules])
    """
    result = python(code, tmp_path)
    assert result.stdout == "[]\n", result.stderr


WANDB = """
    import socket, sys
    from pathlib import Path
    from vla_rl.run.load_settings import load_config
    from vla_rl.run.settings import ConfigError
    from vla_rl.run.metrics import MetricsLogger, check_wandb

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


def test_wandb_offline_writes_into_the_run_folder_without_a_network(tmp_path):
    result = python(WANDB.replace("MODE", "offline"), tmp_path, WANDB_SILENT="true")
    assert result.stdout == "logged\n", result.stdout + result.stderr
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert run.stem == "run-" + (tmp_path / "wandb_id").read_text() and run.stat().st_size > 1000
    assert iterations(tmp_path / "metrics.jsonl") == [1]


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
    assert {path.name for path in tmp_path.iterdir()} == {"home", "metrics.jsonl"}


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
    new = back.wandb_run.id
    assert wandb.points("abc1") == [1, 2, 3, 4] and ("abc1", "finished") in wandb.calls
    assert new != "abc1" and wandb.points(new) == [1, 2, 3] and (new, ("*", "timesteps")) in wandb.calls
    first, resumed, fresh = wandb.started
    assert resumed["id"] == "abc1" and fresh["id"] == new and "abc1" in fresh["notes"]
    assert fresh["group"] == first["group"] and fresh["name"] == f"{tmp_path.name}_2"
    later = MetricsLogger(tmp_path, WITH_WANDB)  # a resume of the new one: its name, no third run
    later.continue_from(3)
    assert later.wandb_run.id == new and wandb.started[3]["name"] == f"{tmp_path.name}_2"
    later.continue_from(1)
    assert len({later.wandb_run.id, new, "abc1"}) == 3 and wandb.points(later.wandb_run.id) == [1]
    assert wandb.started[4]["name"] == f"{tmp_path.name}_3"


def test_a_resume_that_takes_nothing_back_goes_on_in_its_wandb_run(tmp_path, wandb):
    log_iterations(MetricsLogger(tmp_path, WITH_WANDB), 1, 2)
    resumed = MetricsLogger(tmp_path, WITH_WANDB)
    resumed.continue_from(2)
    assert resumed.wandb_run.id == "abc1" and wandb.points("abc1") == [1, 2]


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
    assert wandb.points(again.wandb_run.id) == [1] and iterations(again.path) == [1]


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
