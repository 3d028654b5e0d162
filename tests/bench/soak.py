"""A run of the small OpenVLA on the real simulator with a fault a minute, beside runs that had none.

    python tests/bench/soak.py --out soak --against docs/experiments/runs/weak_sparse_seed*.jsonl

It gives the same command again and again until the run has ended, as a job that is requeued does, and meanwhile kills (SIGKILL) and
stops (SIGSTOP) simulator workers, fills the disk for half a minute, and sends the trainer SIGTERM, SIGUSR1, SIGKILL and SIGINT. Then it
says what became of each fault, how memory and descriptors of each process went, and how the training episodes succeeded. Needs
Linux and root, or user namespaces: the run's disk is a small tmpfs in a namespace of its own. OUT gets the run's log, metrics and warnings.

Exit status 1 if a fault was not survived, a process was left, memory or descriptors grew by more than 5 % within a start, or the last
quarter's success is certainly lower than in the runs without faults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from tests.test_end_to_end import command
from vla_rl.reports.records import read_metrics
from vla_rl.reports.statistics import unpaired_difference
from vla_rl.run.interruption import STOPPED

FAULTS = ("kill a worker", "stop a worker", "fill the disk") * 5 + ("signal",)  # a start lasts long enough to leak
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL, signal.SIGINT)
DISK_MB, FULL_S, SAMPLE_S = 100, 30, 5
LEAST_S = 480  # of a start whose growth is told: two iterations and more in a third of it
LEAST_WORKER_S = 240  # of a worker's life, likewise: it has played episodes in each third
QUARTERS = 4
SETTINGS = (
    "--task-id 5 --resume auto run.name=soak eval.interval=0 eval.modes=[greedy,sampled] eval.video=false "
    "env.step_timeout_s=15 logging.checkpoint_interval=1 logging.progress=false"
)


def soak_command(folder: Path, timesteps: int) -> list[str]:
    words = ["--config", "configs/tiny_gae_ppo.yaml", *SETTINGS.split(), "--timesteps", str(timesteps)]
    return command(folder, *words)


@dataclass
class Sample:
    at_s: float  # since this start
    trainer_mb: float  # what only this process has, and its share of the rest
    descriptors: int  # of the trainer
    workers: dict[int, tuple[float, int]]  # process -> MB that it has allocated, descriptors


@dataclass
class Start:
    """One process of the command, from its start to its end."""

    process: psutil.Popen
    begun: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)

    def workers(self) -> list[psutil.Process]:
        found = []
        for child in self.process.children():
            try:
                if "spawn_main" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def sample(self) -> None:
        try:
            memory, descriptors = self.process.memory_full_info().pss / 1e6, self.process.num_fds()
            workers = {worker.pid: (allocated_mb(worker.pid), worker.num_fds()) for worker in self.workers()}
        except (psutil.Error, OSError):  # one that has just ended
            return
        if workers:
            self.samples.append(Sample(time.monotonic() - self.begun, memory, descriptors, workers))

    def growth(self) -> dict[str, tuple[float, float]] | None:
        """The most in its second and in its last third; the first has the first update. None if it was too short.

        Of the workers that lived long enough the one that grew most is told, in the same thirds of its own life.
        """
        if not self.samples or self.samples[-1].at_s < LEAST_S:
            return None
        found = {
            "trainer": thirds([(sample.at_s, sample.trainer_mb) for sample in self.samples]),
            "descriptors": thirds([(sample.at_s, sample.descriptors) for sample in self.samples]),
        }
        for place, name in enumerate(("a worker", "its descriptors")):
            lives: dict[int, list[tuple[float, float]]] = {}
            for sample in self.samples:
                for process, values in sample.workers.items():
                    lives.setdefault(process, []).append((sample.at_s, values[place]))
            long = [thirds(life) for life in lives.values() if life[-1][0] - life[0][0] >= LEAST_WORKER_S]
            if long:
                found[name] = max(long, key=lambda grown: grown[1] / grown[0])
        return found


def allocated_mb(process: int) -> float:
    """Without what it shares with others or has read from files: that changes with who else is there."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


def thirds(series: list[tuple[float, float]]) -> tuple[float, float]:
    """The largest value in the second and in the last third of the time: (seconds, value)."""
    begun, length = series[0][0], (series[-1][0] - series[0][0]) or 1.0
    parts = [min(2, int(3 * (at_s - begun) / length)) for at_s, _ in series]
    return tuple(
        max((value for (_, value), part in zip(series, parts, strict=True) if part == k), default=0.0) for k in (1, 2)
    )


class Soak:
    def __init__(self, disk: Path, out: Path, timesteps: int, seed: int):
        self.disk, self.out, self.timesteps, self.rng = disk, out, timesteps, random.Random(seed)
        self.run, self.filler, self.full_until = disk / "soak", disk / "filler", None
        self.hit: dict[int, str] = {}  # process of a worker -> fault
        self.faults: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.starts: list[Start] = []
        self.signals = 0

    def go(self, every_s: float) -> None:
        """Until the run has ended."""
        next_fault = time.monotonic() + every_s
        expected = None
        with open(self.out / "log.txt", "ab") as log:
            while True:
                output = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
                self.starts.append(Start(psutil.Popen(soak_command(self.disk, self.timesteps), **output)))
                start = self.starts[-1]
                while start.process.poll() is None:
                    time.sleep(SAMPLE_S)
                    start.sample()
                    self.free_disk()
                    if time.monotonic() >= next_fault and len(start.workers()) > 1 and self.full_until is None:
                        expected = self.fault(start, FAULTS[self.faults.total() % len(FAULTS)])
                        next_fault = time.monotonic() + every_s
                status = start.process.returncode
                self.ends[f"exit status {status}"] += 1
                if status == 0:
                    return
                if status not in (STOPPED, -signal.SIGKILL) or expected is None:
                    raise SystemExit(f"the run has failed: exit status {status}, see {self.out / 'log.txt'}")
                expected = None

    def fault(self, start: Start, name: str) -> str | None:
        """The signal after which this start may end."""
        if name == "fill the disk":
            lines = read_metrics(self.run / "metrics.jsonl")
            done = lines[-1]["timesteps"] if lines else 0
            if not 0 < done < 0.9 * self.timesteps:  # the first checkpoint and the last one must be written
                name = "kill a worker"
        sent = None
        if name == "fill the disk":
            self.fill_disk()
        elif name == "signal":
            sent = SIGNALS[self.signals % len(SIGNALS)].name
            self.signals += 1
            start.process.send_signal(signal.Signals[sent])
        else:
            worker = self.rng.choice([worker for worker in start.workers() if worker.pid not in self.hit])
            self.hit[worker.pid] = name
            worker.send_signal(signal.SIGKILL if name == "kill a worker" else signal.SIGSTOP)
        self.faults[sent or name] += 1
        print(f"{time.strftime('%H:%M:%S')} {sent or name}", flush=True)
        return sent

    def fill_disk(self) -> None:
        self.full_until = time.monotonic() + FULL_S
        with self.filler.open("wb", buffering=0) as file:
            try:
                while file.write(b"\0" * 2**16):
                    pass
            except OSError:
                pass

    def free_disk(self) -> None:
        if self.full_until is not None and time.monotonic() >= self.full_until:
            self.filler.unlink()
            self.full_until = None

    def fates(self) -> Counter[str]:
        """What became of the workers that were hit."""
        lines, found = (self.out / "log.txt").read_text().splitlines(), Counter()
        for process, name in self.hit.items():
            replaced = any(f"(process {process}," in line or f"(process {process})" in line for line in lines)
            found[f"{name}: {'told and replaced' if replaced else 'ended with its trainer, before it was needed'}"] += 1
        return found


def success(lines: list[dict], timesteps: int) -> list[tuple[int, int]]:
    """Successes and episodes of training in each quarter of the timesteps."""
    counts = [[0, 0] for _ in range(QUARTERS)]
    for line in lines:
        if line.get("rollout/episodes"):
            quarter = min(QUARTERS - 1, int(QUARTERS * (line["timesteps"] - 1) / timesteps))
            counts[quarter][0] += round(line["rollout/success_rate"] * line["rollout/episodes"])
            counts[quarter][1] += line["rollout/episodes"]
    return [tuple(count) for count in counts]


def report(soak: Soak, against: list[Path], minutes: float) -> bool:
    """Prints the tables; whether all is as it should be."""
    good = True
    print(f"\n{minutes:.0f} minutes, {len(soak.starts)} starts ({dict(soak.ends)}), {soak.faults.total()} faults\n")
    print("| fault | times |\n|---|---|")
    for name, times in sorted((soak.faults + soak.fates()).items()):
        print(f"| {name} | {times} |")
    print("\nThe most in the second and in the last third of a start, and of the life of the worker that grew most:\n")
    print(
        "| start | lasted | trainer MB | trainer's descriptors | a worker MB | its descriptors |\n|---|---|---|---|---|---|"
    )
    for number, start in enumerate(soak.starts, 1):
        grown = start.growth()
        if grown is None:
            continue
        good &= all(last <= 1.05 * first for first, last in grown.values())
        columns = [grown.get(name) for name in ("trainer", "descriptors", "a worker", "its descriptors")]
        cells = " | ".join("{:.0f} -> {:.0f}".format(*column) if column else "-" for column in columns)
        print(f"| {number} | {start.samples[-1].at_s / 60:.0f} min | {cells} |")
    curves = {path.stem: success(read_metrics(path), soak.timesteps) for path in against}
    curves["with faults"] = mine = success(read_metrics(soak.run / "metrics.jsonl"), soak.timesteps)
    print("\n| success of training episodes, by quarters | " + " | ".join("1234") + " |\n|---|---|---|---|---|")
    for name, counts in curves.items():
        print(f"| {name} | " + " | ".join(f"{100 * won / max(all_, 1):.0f} %" for won, all_ in counts) + " |")
    if against:
        lowest = min((curves[path.stem][-1] for path in against), key=lambda count: count[0] / count[1])
        difference, low, high = unpaired_difference(*mine[-1], *lowest)
        print(
            f"\nlast quarter less the lowest without faults: {100 * difference:+.0f} points ({100 * low:+.0f} to {100 * high:+.0f})"
        )
        good &= high >= 0
    last = read_metrics(soak.run / "metrics.jsonl")[-1]
    print(
        "evaluation at the end:", {name: value for name, value in last.items() if name.startswith("eval/success_rate")}
    )
    dropped = sum(line.get("rollout/episodes_dropped", 0) for line in read_metrics(soak.run / "metrics.jsonl"))
    print(f"episodes dropped: {dropped}")
    left = [
        process for process in psutil.Process().children(recursive=True) if process.status() != psutil.STATUS_ZOMBIE
    ]
    left += [psutil.Process(process) for process in soak.hit if psutil.pid_exists(process)]
    print(f"processes left: {[process.cmdline() for process in left]}")
    return good and not left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--timesteps", type=int, default=100_000)
    parser.add_argument("--every", type=float, default=60, metavar="S", help="seconds from fault to fault")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument(
        "--against", type=Path, nargs="*", default=[], metavar="METRICS", help="metrics.jsonl without faults"
    )
    args = parser.parse_args()
    if "SOAK_DISK" not in os.environ:  # again, in a mount namespace with a small disk
        os.environ["SOAK_DISK"] = tempfile.mkdtemp(prefix="soak_")
        script = f'mount -t tmpfs -o size={DISK_MB}m none "$SOAK_DISK" && exec "$@"'
        root = [] if os.geteuid() == 0 else ["--map-root-user"]
        os.execvp("unshare", ["unshare", "--mount", *root, "sh", "-c", script, "sh", sys.executable, *sys.argv])
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # with what it has started
    begun = time.monotonic()
    soak = Soak(Path(os.environ["SOAK_DISK"]), args.out, args.timesteps, args.seed)
    try:
        soak.go(args.every)
        good = report(soak, args.against, (time.monotonic() - begun) / 60)
    finally:
        for start in soak.starts:
            if start.process.poll() is None:
                start.process.kill()
        for name in ("metrics.jsonl", "warnings.log"):
            if (soak.run / name).exists():
                shutil.copy(soak.run / name, args.out / name)
        samples = [[vars(sample) for sample in start.samples] for start in soak.starts]
        (args.out / "samples.json").write_text(json.dumps(samples))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
