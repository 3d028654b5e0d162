"""Kills runs (SIGKILL) at random moments, resumes them, and compares each with one that nobody killed: bit for bit, or it fails.

    python tests/bench/kills.py --kills 50              the trainer on tests/fakes.py, minutes
    python tests/bench/kills.py --kills 50 --simulator  the command on the real simulator and the small OpenVLA, hours

A run is killed again and again until it has ended; then the next one begins, of another seed, until there were enough kills.
After each kill all checkpoints that are listed must be whole. Compared are metrics.jsonl (without times and memory), the adapter
and the value head. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import load_file

from tests.fakes import CHUNK, last_of_each
from tests.test_end_to_end import SETTINGS, command
from tests.trainers import make_trainer, training_lines
from vla_rl.run.checkpoint import list_checkpoints, newest_sound, verify

ITERATIONS = 6


def train_small(folder: Path, seed: int) -> None:
    """Begins the run or goes on with it, to its end."""
    trainer = make_trainer(
        folder,
        evaluate=True,
        max_steps=11 * CHUNK,  # episodes go on from one iteration to the next
        run={"timesteps": ITERATIONS * 4 * 8 * CHUNK, "seed": seed},
        eval={"interval": 3, "states": "0-1"},
        logging={"checkpoint_interval": 1, "keep_checkpoints": 2, "curves_interval": 1000},
    )
    trainer.logger.plot = lambda: None  # pictures would take most of the time
    checkpoint = newest_sound(folder)
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    trainer.train()


class SmallRun:
    """In a process that is forked off, since importing torch takes longer than the run."""

    def __init__(self, folder: Path, seed: int):
        self.process = multiprocessing.get_context("fork").Process(target=train_small, args=(folder, seed))
        self.process.start()

    def ended(self, timeout_s: float | None) -> bool:
        self.process.join(timeout_s)
        if self.process.exitcode not in (None, 0):
            raise SystemExit(f"a run has failed: exit status {self.process.exitcode}")
        return self.process.exitcode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def simulator_command(folder: Path, seed: int) -> list[str]:
    settings = last_of_each(*SETTINGS, f"run.seed={seed}", "eval.interval=2", "logging.keep_checkpoints=2")
    words = ["--timesteps", str(12 * ITERATIONS), f"run.name={folder.name}", "--resume", "auto"]
    return command(folder.parent, "--config", "configs/tiny_gae_ppo.yaml", *settings, *words)


class SimulatorRun:
    """The same command each time: it finds what it has begun."""

    def __init__(self, folder: Path, seed: int):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        output = {"stdout": self.log, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(simulator_command(folder, seed), start_new_session=True, **output)

    def ended(self, timeout_s: float | None) -> bool:
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        if status != 0:
            self.log.seek(0)
            raise SystemExit(f"a run has failed: exit status {status}\n{self.log.read().decode()[-3000:]}")
        return True

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)  # the trainer alone; its simulators end by themselves
        self.process.wait()


def moment(folder: Path) -> str:
    """Where a kill has hit, as far as the folder tells. Raises CheckpointError if what is listed is torn."""
    root, metrics = folder / "checkpoints", folder / "metrics.jsonl"
    found = list_checkpoints(root)
    for checkpoint in found:
        verify(checkpoint)
    if any(root.glob(".*.gone")):
        return "while an old checkpoint was removed"
    if any(root.glob(".*.tmp")) or any(root.glob(".*.old")):
        return "while a checkpoint was written"
    if metrics.exists() and not metrics.read_bytes().endswith(b"\n"):
        return "while a line was written"
    return "elsewhere" if found else "before the first checkpoint"


def tensors(path: Path) -> dict[str, bytes]:
    """Not the file, whose metadata safetensors writes in any order."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def result(folder: Path) -> dict[str, object]:
    """What must be equal."""
    newest = list_checkpoints(folder / "checkpoints")[-1]
    hidden = [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
    names = [path.name for path in list_checkpoints(folder / "checkpoints")]
    weights = [*newest.glob("adapter/*.safetensors"), newest / "value_head.safetensors"]
    return {
        "metrics.jsonl": training_lines(folder),
        "checkpoints": names,
        "left over": hidden,
        **{path.name: tensors(path) for path in weights},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the runs")
    parser.add_argument("--simulator", action="store_true")
    parser.add_argument("--within", type=float, metavar="S", help="a kill comes within so many seconds of a start")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kind, rng = SimulatorRun if args.simulator else SmallRun, random.Random(args.seed)
    root = Path(tempfile.mkdtemp(prefix="kills_"))
    if not args.simulator:
        train_small(root / "first", args.seed)  # what a process does once, those that are forked off need not
    moments: Counter[str] = Counter()
    runs = differing = 0
    while moments.total() < args.kills:
        runs += 1
        seed = args.seed + runs
        begun = time.monotonic()
        kind(root / f"whole_{seed}", seed).ended(None)
        whole_s = time.monotonic() - begun
        within_s = args.within or whole_s
        expected, folder, killed = result(root / f"whole_{seed}"), root / f"killed_{seed}", 0
        while True:
            run = kind(folder, seed)
            enough = moments.total() >= args.kills
            if run.ended(None if enough else rng.uniform(0, within_s)):
                break
            run.kill()
            killed += 1
            moments[moment(folder)] += 1
        found = result(folder)
        wrong = [name for name in expected if found.get(name) != expected[name]]
        differing += bool(wrong)
        verdict = f"differs: {', '.join(wrong)} ({folder})" if wrong else "equal bit for bit"
        print(f"run {runs}: {whole_s:.1f} s alone, killed {killed} times, {verdict}", flush=True)
        if not wrong:
            shutil.rmtree(folder)
            shutil.rmtree(root / f"whole_{seed}")
    print(f"{moments.total()} kills in {runs} runs, {runs - differing} of them equal bit for bit")
    for name, count in moments.most_common():
        print(f"  {count:4d}  {name}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
