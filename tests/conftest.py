"""What every test runs under."""

import contextlib
import logging
import os
import signal
from pathlib import Path

import pytest
import torch

from vla_rl.run.logs import OURS
from vla_rl.simulation.libraries import prepare_environment

with contextlib.suppress(ImportError):
    import triton  # noqa: F401 (before robosuite's numba: in the other order their two LLVMs end the interpreter)

# small tensors: a second thread costs more than it gives, and much more on a busy machine
torch.set_num_threads(1)
# compiled models stay out of the user's home
os.environ["VLA_RL_CACHE"] = str(Path(__file__).parent.parent / ".pytest_cache" / "models")
# and suites of the user's own out of the tests
os.environ["VLA_RL_SUITES"] = str(Path(__file__).parent / "no_suites")
prepare_environment()  # MuJoCo reads it when it is imported
# under nohup or as a shell's background job these are ignored, and the programs that tests start would inherit that
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)  # of no effect here still, but not inherited


@pytest.fixture(autouse=True)
def levels_of_logs():
    """A command line sets them, by the rank of its process: no other test sees it."""
    before = {name: logging.getLogger(name).level for name in OURS}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(autouse=True)
def no_line_of_slowness(monkeypatch):
    """On a busy machine a start would say that it takes its time, where a test counts lines."""
    monkeypatch.setattr("vla_rl.run.logs.SLOW_S", 1e6)
