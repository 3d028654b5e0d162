"""Recorders: whole episodes in order, each once more where its process was lost."""

import logging
import os
import signal
from functools import partial

import pytest

from tests.simulation.tasks import wait_until_gone
from vla_rl.fine_tuning.recorders import Recorders
from vla_rl.simulation.worker_processes import Patience
from vla_rl.types import Episode, SimulatorDied

EPISODES = [Episode(0, None, seed) for seed in range(5)]


class Recorder:
    """Is lost in some episodes, once each."""

    def __init__(self, folder, how=None):
        self.folder, self.how = folder, how

    def record(self, episode, lost):
        mark = self.folder / f"{episode.seed}"
        if episode.seed in lost and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), self.how)
        return episode.seed, os.getpid()


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_an_episode_whose_process_is_lost_is_recorded_again_in_its_place(tmp_path, caplog, how):
    recorders = Recorders(partial(Recorder, tmp_path, how), 2, Patience(0.6, 30), "libero_spatial")
    jobs = [recorders.submit(episode, {1, 2}) for episode in EPISODES]
    jobs[4].cancel()
    outcomes = [job.result() for job in jobs[:4]]
    assert [seed for seed, _ in outcomes] == [0, 1, 2, 3] and jobs[4].outcome is None
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2 and all("libero_spatial, Episode(task_id=0" in line for line in warnings)
    pids = [process.pid for process in recorders.workers.processes]
    recorders.close()
    assert wait_until_gone(pids) == []


def test_one_that_is_lost_again_and_again_ends_the_recording(tmp_path):
    recorders = Recorders(partial(Recorder, tmp_path / "nowhere", 9), 1, Patience(replacements=1))
    with pytest.raises(FileNotFoundError):  # of the worker's own touch
        recorders.submit(EPISODES[1], {1}).result()
    recorders = Recorders(partial(Recorder, tmp_path, 9), 1, Patience(replacements=0))
    with pytest.raises(SimulatorDied, match=r"worker 0 died \(SIGKILL; often out of memory: lower --workers\)"):
        recorders.submit(EPISODES[1], {1}).result()
