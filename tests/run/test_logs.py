"""The log of a command line shows what we say, and of libraries only what they warn of."""

import io
import logging
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vla_rl.run.logs import OURS, MinuteLines, progress_bar, slow, warnings_kept

ROOT = Path(__file__).parents[2]


def logged(code: str, **variables: str) -> list[str]:
    """Lines on the error stream of a fresh process, without their times."""
    start = "import logging\nfrom vla_rl.run.logs import configure_logging\nconfigure_logging()\n"
    command = [sys.executable, "-c", start + textwrap.dedent(code)]
    result = subprocess.run(command, cwd=ROOT, env=variables or None, capture_output=True, text=True, check=True)
    return [line.split(" ", 1)[1] for line in result.stderr.splitlines()]


@pytest.mark.parametrize("name", [*OURS, "vla_rl.sft", "vla_rl.reports.metrics"])
def test_our_loggers_show_information(name):
    assert logged(f"log = logging.getLogger('{name}'); log.info('of ours'); log.debug('too much')") == ["of ours"]


def test_the_loggers_of_this_project_are_ours():
    files = [*ROOT.glob("*.py"), *ROOT.glob("vla_rl/**/*.py")]
    users = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files if "getLogger(" in path.read_text()}
    assert users == set(OURS)


LIBRARIES = (
    "matplotlib.font_manager PIL.Image h5py._conv numba OpenGL.acceleratesupport httpx urllib3 filelock anything"
)


@pytest.mark.parametrize("redirected", [False, True])
def test_libraries_show_warnings_alone(redirected):
    code = f"""
        from contextlib import nullcontext
        from tqdm.contrib.logging import logging_redirect_tqdm
        with logging_redirect_tqdm() if {redirected} else nullcontext():  # puts a handler of its own in place of ours
            for name in "{LIBRARIES} robosuite_logs libero.x".split():
                logging.getLogger(name).info("chatter of %s", name)
                logging.getLogger(name).setLevel(logging.INFO)  # as some do
                logging.getLogger(name).info("more of %s", name)
            logging.getLogger("urllib3").warning("retrying")
    """
    assert logged(code) == ["retrying"]


def test_the_font_list_of_a_first_picture_is_not_announced(tmp_path):
    code = """
        from pathlib import Path
        from vla_rl.reports.drawing import plot_curves
        plot_curves([{"iteration": 1, "timesteps": 1, "actor/entropy": 1.0}], Path("%s"))
    """
    variables = {"MPLCONFIGDIR": str(tmp_path / "empty"), "HOME": str(tmp_path)}
    assert logged(code % (tmp_path / "curves.png"), **variables) == []
    assert list((tmp_path / "empty").glob("fontlist*")) and (tmp_path / "curves.png").exists()


def test_matplotlib_and_gymnasium_do_not_speak_of_themselves():
    """On a slow machine matplotlib warns that it builds its font cache; gymnasium warns in yellow, its errors in red."""
    code = """
        import gymnasium, warnings
        logging.getLogger("matplotlib.font_manager").warning("Matplotlib is building the font cache")
        gymnasium.logger.warn("a box has lost precision")
        warnings.warn("of another", UserWarning)
        logging.getLogger("matplotlib.font_manager").error("no font")
    """
    shown = logged(code)
    assert [line for line in shown if "Matplotlib" in line or "precision" in line] == []
    assert "no font" in shown and any("of another" in line for line in shown)


def test_a_run_keeps_its_warnings_a_line_each_also_when_it_goes_on(tmp_path):
    log = logging.getLogger("vla_rl.test")
    for number in (1, 2):
        with warnings_kept(tmp_path):
            log.info("not this")
            log.warning("number %d\nof two", number)
            logging.getLogger("matplotlib").warning("nor this")
    log.warning("after the run")
    lines = (tmp_path / "warnings.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [f"WARNING vla_rl.test: number {n} of two" for n in (1, 2)]


def test_warnings_wait_for_a_disk_that_is_full(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    log = logging.getLogger("vla_rl.test")
    with warnings_kept(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr("vla_rl.run.files.os.fsync", full)
            log.warning("one")
        log.warning("two")
    assert [line.split()[-1] for line in (tmp_path / "warnings.log").read_text().splitlines()] == ["one", "two"]
    assert "Traceback" not in capsys.readouterr().err


def test_what_takes_long_in_a_start_has_a_line(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("vla_rl.run.logs.SLOW_S", 0.05)
    with slow("short"):
        pass
    with slow("reading"):
        time.sleep(0.1)
    assert [record.getMessage() for record in caplog.records] == ["reading ...", "reading: 0 s"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal_there_is_a_bar_and_elsewhere_or_unwanted_nothing_within_a_minute(monkeypatch, capfd):
    for shown in (True, False):
        with progress_bar("rollout", 3, "dec", shown) as bar:
            bar.update(3)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with progress_bar("rollout", 3, "dec", shown=False) as bar:
        bar.update(3)
    assert terminal.getvalue() == ""
    with progress_bar("rollout", 3, "dec", shown=True) as bar:
        bar.update(3)
    assert "rollout: 100%" in terminal.getvalue()


def test_elsewhere_there_is_a_line_a_minute_with_the_time_left_whatever_goes_on(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    now = [1000.0]
    monkeypatch.setattr(MinuteLines, "said_at", 1000.0)
    with MinuteLines("rollout", 100, "dec", clock=lambda: now[0]) as bar:
        for now[0] in (1030, 1061, 1080, 1120):
            bar.update(10)
            bar.set_postfix_str("eps=3")
    with MinuteLines("sft", 100, "step", initial=90, clock=lambda: now[0]) as bar:
        for now[0] in (1122, 1150, 1190):
            bar.update(2)
    with MinuteLines("images", None, "step", clock=lambda: 1300) as bar:
        bar.update(5)
    assert [record.getMessage() for record in caplog.records] == [
        "rollout: 20 of 100 dec, 4.1 min left, eps=3",  # 61 s for 20
        "sft: 92 of 100 step, 8.0 s left",  # 2 s for 2
        "sft: 96 of 100 step, 46.7 s left",  # 70 s for 6
        "images: 5 step",
    ]


def test_a_run_without_a_warning_leaves_no_file(tmp_path):
    with warnings_kept(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_torch_is_imported_for_it():
    code = "import sys, vla_rl.run.logs; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "torch" not in loaded.split() and "numpy" not in loaded.split()


def test_of_several_processes_the_first_tells_what_goes_on_and_the_others_their_warnings():
    code = """
    log = logging.getLogger("vla_rl.x")
    log.info("going on")
    log.warning("odd")
    """
    who = {"TORCHELASTIC_RUN_ID": "a"}
    assert logged(code, **who, RANK="0") == ["going on", "odd"] and logged(code, **who, RANK="2") == ["rank 2: odd"]
