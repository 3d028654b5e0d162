"""Makes the runs of docs/experiments.md: each on a core of its own, as many at once as there are cores; suites on all cores.

    python docs/experiments/run.py ppo grpo                all seeds that are named for them
    python docs/experiments/run.py ppo --seeds 0           one
    python docs/experiments/run.py ppo --print             only the commands

A run that was stopped, by Ctrl-C or SIGTERM too, goes on where it was when the same command is given again. Its log is
runs/NAME_seedS.log, its metrics are copied to docs/experiments/runs/ when it ends or is stopped.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]

ALONE = "--no-wandb eval.modes=[greedy] eval.video=false logging.checkpoint_interval=3 logging.progress=false"
COMMON = f"{ALONE} run.torch_threads=1 env.num_workers=1"
PPO, GRPO = "--config configs/tiny_gae_ppo.yaml", "--config configs/tiny_grpo.yaml"
ABLATION = f"{PPO} --timesteps 64000 eval.interval=0"
GRPO_TRIAL = f"{GRPO} --timesteps 64000 eval.interval=2"
WEAK = "--task-id 5 --timesteps 100000 eval.interval=0 eval.modes=[greedy,sampled]"
ALL_MODES = "eval.modes=[greedy,mean_action,sampled]"
NOISE = (
    f"{PPO} --task-id 5 --timesteps 100000 eval.interval=0 {ALL_MODES} env.physics=fast "
    "logging.checkpoint_interval=1 logging.keep_checkpoints=20"
)
TASK_6 = f"--task-id 6 --timesteps 150000 eval.interval=0 {ALL_MODES} env.physics=fast"
LONG = (
    "--task-suite libero_10 --task-id 0 --checkpoint runs/long_sft/model --timesteps 180000 env.max_steps=320 env.physics=fast "
    "eval.interval=0 eval.states=0-1"
)  # docs/experiments/long.py makes the checkpoint and evaluates what comes out
COOL = "rollout.temperature=0.5 actor.learning_rate=1.5e-3"
SUITE = "logging.keep_every=6 logging.checkpoint_interval=2 logging.keep_checkpoints=12"
SUITE_GRPO = (  # the reward is sparse: of dense reward GRPO would see nothing
    f"{GRPO} --task-ids 0 1 2 3 4 5 6 7 8 9 actor.learning_rate=1.5e-3 rollout.num_envs=16 rollout.final_temperature=0.5 "
    f"env.physics=fast eval.interval=0 eval.states=0-1 --timesteps 560000 {SUITE}"
)  # of its three trials two are stopped at 150,000 timesteps
TEN = "--task-ids 0 1 2 3 4 5 6 7 8 9 eval.interval=0 eval.states=0-1 eval.num_envs=2"

# name -> seeds, settings
RUNS: dict[str, tuple[tuple[int, ...], str]] = {
    "ppo": ((0, 1, 2), f"{PPO} eval.interval=3"),
    "grpo": ((0, 1, 2), f"{GRPO} eval.interval=3"),
    "grpo_4": ((0, 1), f"{GRPO} rollout.group_size=4 eval.interval=3"),
    "lambda_07": ((0, 1), f"{PPO} algorithm.gae_lambda=0.7 eval.interval=3"),
    "grpo_short": ((1,), GRPO_TRIAL),
    "grpo_1e-3": ((1,), f"{GRPO_TRIAL} actor.learning_rate=1e-3"),
    "grpo_6e-3": ((1,), f"{GRPO_TRIAL} actor.learning_rate=6e-3"),
    "grpo_group_4": ((1,), f"{GRPO_TRIAL} rollout.group_size=4"),
    "grpo_group_16": ((1,), f"{GRPO_TRIAL} rollout.group_size=16 rollout.num_envs=16"),
    "ppo_warmup_0": ((0, 1, 2), f"{PPO} algorithm.critic_warmup_iterations=0 eval.interval=3"),
    "short": ((0, 1, 2, 3), ABLATION),
    "value_gradient": ((1, 2), f"{ABLATION} algorithm.freeze_vla_for_critic=false"),
    "warmup_0": ((1, 2), f"{ABLATION} algorithm.critic_warmup_iterations=0"),
    "warmup_3": ((1, 2), f"{ABLATION} algorithm.critic_warmup_iterations=3"),
    "level_action": ((1, 2), f"{ABLATION} algorithm.logprob_level=action"),
    "level_chunk": ((1, 2), f"{ABLATION} algorithm.logprob_level=chunk"),
    "level_chunk_1e-3": ((1, 2), f"{ABLATION} algorithm.logprob_level=chunk actor.learning_rate=1e-3"),
    "epochs_1": ((1, 2), f"{ABLATION} algorithm.n_epochs=1"),
    "epochs_4": ((1, 2), f"{ABLATION} algorithm.n_epochs=4"),
    "clip_symmetric": ((1, 2), f"{ABLATION} algorithm.clip_ratio_high=0.2"),
    "temperature_05": ((1, 2), f"{ABLATION} rollout.temperature=0.5"),
    "temperature_15": ((1, 2), f"{ABLATION} rollout.temperature=1.5"),
    "small_steps": ((1, 2), f"{ABLATION} actor.learning_rate=2e-3 algorithm.target_kl=0.003"),
    "dims": ((1,), f"{ABLATION} algorithm.action_dims=0-2,6 actor.learning_rate=2e-3"),
    "weak_sparse": ((0, 1, 2), f"{PPO} {WEAK}"),
    "weak_dense": ((1, 2), f"{PPO} {WEAK} env.reward=dense"),
    "weak_grpo": ((0, 1, 2), f"{GRPO} {WEAK}"),
    "ten_ppo": ((1,), f"{PPO} {TEN} --timesteps 100000 rollout.num_envs=20 rollout.n_steps=64"),
    "ten_grpo": ((1,), f"{GRPO} {TEN} --timesteps 100000 rollout.num_envs=16"),
    "noise_base": ((1, 2), NOISE),
    "noise_more": ((1, 2), f"{NOISE} rollout.num_envs=16 algorithm.minibatch_size=512"),
    "noise_kl": ((1, 2), f"{NOISE} actor.schedule=kl actor.kl_target=0.003"),
    "noise_cooled": ((1, 2), f"{NOISE} rollout.final_temperature=0.5"),
    "noise_first_actions": ((1, 2), NOISE),
    "noise_pairs": ((1, 2), NOISE),
    "long_ppo": ((1, 2), f"{PPO} {LONG} {COOL}"),
    "long_dense": ((1, 2), f"{PPO} {LONG} {COOL} env.reward=dense"),
    "long_grpo": ((1, 2), f"{GRPO} {LONG} {COOL} rollout.n_episodes=32"),
    "task_6_ppo": ((1, 2), f"{PPO} {TASK_6}"),
    "task_6_grpo": ((1, 2), f"{GRPO} {TASK_6}"),
    "suite_dense": ((1, 2), f"--config configs/tiny_suite.yaml {SUITE}"),
    "suite_longer": ((1,), "--timesteps 900000"),
    "suite_cooled": ((1,), "--timesteps 1000000 rollout.final_temperature=0.2"),
    "suite_sparse": ((1,), f"--config configs/tiny_suite.yaml {SUITE} env.reward=sparse"),
    "suite_ppo": ((1, 2), f"--config configs/tiny_suite.yaml --timesteps 260000 {SUITE} env.reward=sparse"),
    "suite_3e-3": (
        (2,),
        f"--config configs/tiny_suite.yaml --timesteps 480000 {SUITE} env.reward=sparse actor.learning_rate=3e-3",
    ),
    "suite_grpo": ((1, 2), SUITE_GRPO),
    "suite_grpo_3e-3": ((1,), f"{SUITE_GRPO} actor.learning_rate=3e-3"),
    "suite_grpo_group_4": ((1,), f"{SUITE_GRPO} rollout.group_size=4"),
}

ON_ALL_CORES = tuple(name for name in RUNS if name.startswith("suite_"))
GOES_ON_FROM = {"suite_longer": "suite_dense", "suite_cooled": "suite_longer"}  # a copy of that run, resumed
VARIANTS = {f"noise_{variant}": variant for variant in ("first_actions", "pairs")}  # of noise.py


def command(name: str, seed: int) -> str:
    run = f"{name}_seed{seed}"
    if name in GOES_ON_FROM:
        return f"start_gae_ppo_training.py --resume runs/{run} --no-wandb logging.progress=false {RUNS[name][1]}"
    script = f"docs/experiments/noise.py {VARIANTS[name]}" if name in VARIANTS else "start_gae_ppo_training.py"
    if any((REPOSITORY / "runs" / run / "checkpoints").glob("iteration-*[0-9]")):
        return f"{script} --resume runs/{run} --no-wandb"
    parts = f"{ALONE if name in ON_ALL_CORES else COMMON} {RUNS[name][1]}".split()
    settings = {
        part.partition("=")[0]: part for part in parts if "=" in part
    }  # those of the run in place of the common ones
    return " ".join(
        [
            script,
            *(p for p in parts if "=" not in p),
            *settings.values(),
            f"--seed {seed} run.name={run}",
        ]
    )


class Cores:
    """Makes the runs for all cores first, then takes the others from a queue, one at a time on each core."""

    def __init__(self, runs: list[tuple[str, int]]):
        self.first = [run for run in runs if run[0] in ON_ALL_CORES]
        self.waiting: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        for run in runs:
            if run not in self.first:
                self.waiting.put(run)
        self.processes: dict[str, subprocess.Popen] = {}
        self.stopped = threading.Event()
        self.failed: list[str] = []

    def work_all(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self.stop())
        cores = sorted(map(str, os.sched_getaffinity(0)))
        for run in self.first:
            if not self.stopped.is_set():
                self.make(",".join(cores), *run)
        threads = [threading.Thread(target=self.work, args=(core,)) for core in cores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def work(self, core: str) -> None:
        while not self.stopped.is_set():
            try:
                run = self.waiting.get_nowait()
            except queue.Empty:
                return
            self.make(core, *run)

    def make(self, cores: str, name: str, seed: int) -> None:
        status = self.execute(cores, name, seed)
        keep_metrics(f"{name}_seed{seed}")
        how = "stopped" if self.stopped.is_set() else "done" if status == 0 else f"exit status {status}"
        print(f"{name}_seed{seed}: {how}", flush=True)
        if how not in ("stopped", "done"):
            self.failed.append(f"{name}_seed{seed}")

    def execute(self, cores: str, name: str, seed: int) -> int:
        (REPOSITORY / "runs").mkdir(exist_ok=True)
        if not begin_with_copy(name, seed):
            return 2
        with (REPOSITORY / "runs" / f"{name}_seed{seed}.log").open("a") as log:
            process = subprocess.Popen(
                ["taskset", "-c", cores, sys.executable, *command(name, seed).split()],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches it once, by stop()
            )
            self.processes[cores] = process
            if self.stopped.is_set():
                process.terminate()
            return process.wait()

    def stop(self) -> None:
        self.stopped.set()
        for process in list(self.processes.values()):
            process.terminate()  # it saves


def begin_with_copy(name: str, seed: int) -> bool:
    """Copies the run that one of GOES_ON_FROM goes on from, once; whether it can begin."""
    run = REPOSITORY / "runs" / f"{name}_seed{seed}"
    if name not in GOES_ON_FROM or run.exists():
        return True
    before = run.with_name(f"{GOES_ON_FROM[name]}_seed{seed}")
    if not before.is_dir():
        print(f"{run.name} goes on from runs/{before.name}, which is not there: make it first", file=sys.stderr)
        return False
    part = run.with_name(f"{run.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    Path(shutil.copytree(before, part)).rename(run)
    return True


def keep_metrics(run: str) -> None:
    metrics = REPOSITORY / "runs" / run / "metrics.jsonl"
    if metrics.is_file():
        (HERE / "runs").mkdir(exist_ok=True)
        shutil.copyfile(metrics, HERE / "runs" / f"{run}.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(RUNS), metavar="NAME", help=", ".join(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", metavar="S", help="instead of those named for the runs")
    parser.add_argument("--print", action="store_true", help="print the commands")
    args = parser.parse_args()
    runs = [(name, seed) for name in args.names for seed in args.seeds or RUNS[name][0]]
    if args.print:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # run.py ... --print | head
        print(*(f"python {command(*run)}" for run in runs), sep="\n")
        return 0
    cores = Cores(runs)
    cores.work_all()
    if cores.failed:
        print(f"failed: {', '.join(cores.failed)}; the line above or runs/NAME.log says why", file=sys.stderr)
    return 130 if cores.stopped.is_set() else 1 if cores.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
