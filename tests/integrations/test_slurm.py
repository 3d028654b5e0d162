"""The job script: what it would start, and that several nodes find each other by it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "integrations" / "slurm.sh"
FLAGS = ("--config", "configs/gae_ppo_config.yaml", "rollout.num_envs=64")

# each node runs the command, as srun does with a task a node
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit
for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & done
wait -n && wait -n
"""
# torchrun: passes the signal on, waits for its processes, and ends with 1
STOPPABLE = """#!/usr/bin/env bash
trap 'sleep 0.3; touch saved; exit 1' TERM
touch started
while true; do sleep 0.05; done
"""
# more names than a pipe holds
SCONTROL = """#!/usr/bin/env bash
echo 127.0.0.1
seq -f 'node-%g.cluster' 20000
"""
TRAINING = """
import os, pathlib, sys
pathlib.Path("rank_" + os.environ["RANK"]).write_text(" ".join(["of", os.environ["WORLD_SIZE"], *sys.argv[1:]]))
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder that looks like the repository to the script, and Slurm's commands."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "scontrol").write_text(SCONTROL)
    for path in (python, tmp_path / "srun", tmp_path / "scontrol"):
        path.chmod(0o755)
    (tmp_path / "start_gae_ppo_training.py").write_text(TRAINING)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("RUN", "DRY_RUN", *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def submit(folder, **environment):
    run = subprocess.run(
        ["bash", str(SCRIPT), *FLAGS],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_what_one_node_would_start(cluster):
    said = submit(cluster, DRY_RUN="1", SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE="4")
    assert "--nnodes 1 --nproc-per-node 4 --max-restarts 3" in said and "--rdzv-endpoint localhost:29500" in said
    assert said.strip().endswith(f"start_gae_ppo_training.py {' '.join(FLAGS)} run.name=job_7 --resume auto")


def test_two_nodes_meet_at_the_first_one(cluster):
    said = submit(cluster, DRY_RUN="1", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="x[1-2]", RUN="mine", PORT="1234")
    assert "--nnodes 2 --nproc-per-node 1" in said and "--rdzv-endpoint 127.0.0.1:1234" in said
    assert "run.name=mine" in said


def test_a_requeued_job_starts_the_same_command_at_another_place(cluster):
    said = submit(cluster, DRY_RUN="1", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert said.strip().endswith("run.name=job_7 --resume auto") and "--rdzv-id 7-1" in said


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_job_whose_time_is_nearly_over_is_saved_and_requeued_and_a_cancelled_one_is_not(cluster, number, requeued):
    (cluster / "srun").write_text(STOPPABLE)
    (cluster / "scontrol").write_text('#!/usr/bin/env bash\necho "$*" >asked\n')
    job = subprocess.Popen(["bash", str(SCRIPT), *FLAGS], cwd=cluster, env=os.environ | {"SLURM_JOB_ID": "7"})
    deadline = time.monotonic() + 30
    while not (cluster / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(number)
    assert job.wait(30) == 1 and (cluster / "saved").exists()
    asked = cluster / "asked"
    assert asked.exists() is requeued and (not requeued or asked.read_text() == "requeue 7\n")


@pytest.mark.slow
def test_two_nodes_of_two_processes_are_one_run_of_four(cluster):
    port = str(20000 + os.getpid() % 20000)
    submit(
        cluster,
        SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="x[1-2]",
        SLURM_GPUS_ON_NODE="2",
        PORT=port,
    )
    for rank in range(4):
        assert (cluster / f"rank_{rank}").read_text() == f"of 4 {' '.join(FLAGS)} run.name=job_7 --resume auto"
