"""Records demonstrations of a scripted expert.

    python -m vla_rl.demonstrations --task-suite libero_spatial --task-ids 0 1 --episodes 50 --out demonstrations/a.hdf5

Only successes are kept. Now and then the arm is pushed aside or lets go of what it carries, so that it gets into situations that
a policy will get into by its own errors, while the expert's own actions are what is written to be learned (DART: Laskey et
al. 2017). Episodes start from random placements; evaluation has the benchmark's fixed states.

Not here: the expert (vla_rl.simulation.expert), the processes (vla_rl.fine_tuning.recorders), the file's layout
(vla_rl.fine_tuning.demonstration_file).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_rl.fine_tuning.demonstration_file import CAMERAS, SPARE_BYTES, DemonstrationFile, has_suffix
from vla_rl.fine_tuning.recorders import Job, Recorders
from vla_rl.run.command_line import Parser, end_of
from vla_rl.run.failures import say
from vla_rl.run.load_settings import expand
from vla_rl.run.logs import progress_bar
from vla_rl.run.section import parse_indices
from vla_rl.run.settings import ConfigError
from vla_rl.run.task_suites import check_states, list_suites, suite_size
from vla_rl.simulation.libero_env import LiberoEnv, Simulators
from vla_rl.simulation.suites import goal_predicates, load_benchmark, task_languages
from vla_rl.simulation.worker_processes import Patience
from vla_rl.types import Episode, SimulationUnstable

PUSH_STEPS, PAUSE_STEPS = (3, 7), 30  # of a push, from 3 to 6; of a pause, in the mean
ROTATION_SHARE = 0.3  # of a push's translation: |a| = 1 is 5 cm or 0.5 rad
DROP_STEPS = 6  # that the hand is open
GIVE_UP_AFTER = 20  # failed episodes of a task, when they are more than half


@dataclass(frozen=True)
class Recording:
    """What all episodes of a run share."""

    task_suite: str
    num_images: int
    image_size: int
    render: str
    cache_gb: float


@dataclass(frozen=True)
class Disturbance:
    """What is done to the expert's actions before they are executed."""

    noise: float = 0.0  # largest translation that a push adds, in units of the action (1 asks for 5 cm a step)
    drops: float = 0.0  # chance in each step of carrying that the hand lets go


@dataclass(frozen=True)
class Outcome:
    """One episode of the expert."""

    episode: Episode
    success: bool | None  # None: the simulation blew up, which says nothing of the expert
    arrays: dict[str, np.ndarray] | None  # of vla_rl.fine_tuning.demonstration_file; None but of a success
    attributes: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- episode


def record_episode(env: LiberoEnv, episode: Episode, disturbance: Disturbance) -> Outcome:
    """Plays the expert from the start of an episode.

    Args:
        env: with chunks of 1 action.
    """
    from vla_rl.simulation.expert import OPEN, Expert

    obs, _ = env.reset(options={"episode": episode})
    sim = env.simulator
    expert = Expert(sim)
    expert.reset()
    initial_state = flat_state(sim)
    rows: list[dict[str, np.ndarray]] = []
    pushes, drops = Pushes(disturbance.noise, episode.seed), Drops(disturbance.drops, episode.seed)
    terminated = truncated = False
    while not (terminated or truncated):
        label = np.clip(expert.act(), -1, 1)
        executed = np.clip(label + pushes.next(), -1, 1)
        if drops.next(carrying=expert.phase == "place"):
            executed[6] = OPEN
        rows.append(observed(sim, obs) | {"actions": label, "executed_actions": executed})
        try:
            obs, _, terminated, truncated, _ = env.step(executed[None])
        except SimulationUnstable:
            return Outcome(episode, None, None, {})
    if not terminated:
        return Outcome(episode, False, None, {})
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    ends = np.zeros(len(rows), np.uint8)
    ends[-1] = 1
    attributes = {
        "init_state": initial_state,
        "bddl_file_name": bddl_file_name(env.task_suite, episode.task_id),
        "episode": json.dumps(asdict(episode)),
    }
    return Outcome(episode, True, arrays | {"rewards": ends, "dones": ends}, attributes)


class Pushes:
    """Short pushes in random directions, long pauses between them; the first one comes at once. None on the gripper.

    Not noise in every step: an action chunk would then hold corrections of noise that has not happened yet when the chunk
    is chosen, which nobody can learn. With noise of 0.15 in every step the fine-tuned policy was 25 to 40 bins uncertain.
    """

    def __init__(self, size: float, seed: int):
        self.rng = np.random.default_rng([seed, 1])
        self.size, self.left = size, 0  # steps of the push under way
        self.start()

    def start(self) -> None:
        direction = self.rng.normal(size=6)
        direction[:3] /= np.linalg.norm(direction[:3])
        direction[3:] *= ROTATION_SHARE / np.linalg.norm(direction[3:])
        self.push = np.append(direction, 0) * self.size * self.rng.uniform()
        self.left = self.rng.integers(*PUSH_STEPS)

    def next(self) -> np.ndarray:
        """What is added to the step's action, float64 [7]."""
        if self.left == 0:
            if self.rng.uniform() >= 1 / PAUSE_STEPS:
                return np.zeros(7)
            self.start()
        self.left -= 1
        return self.push


class Drops:
    """Short moments in which a hand that carries something opens: what is to be done then, and where a placement has failed,
    is in no demonstration otherwise."""

    def __init__(self, chance: float, seed: int):
        self.rng = np.random.default_rng([seed, 2])
        self.chance, self.left = chance, 0  # steps of the drop under way

    def next(self, carrying: bool) -> bool:
        """Whether the hand is open in this step, whatever the action says."""
        if self.left == 0 and carrying and self.rng.uniform() < self.chance:
            self.left = DROP_STEPS
        if self.left == 0:
            return False
        self.left -= 1
        return True


def observed(sim: Any, obs: dict[str, Any]) -> dict[str, np.ndarray]:
    """What LIBERO's files have of one moment. Images are turned back: they are stored as LIBERO renders them."""
    robot = sim.robot
    position, axis_angle, fingers = np.split(obs["proprio"].astype(np.float64), [3, 6])
    images = {f"obs/{name}": image[::-1, ::-1] for name, image in zip(CAMERAS, obs["images"], strict=False)}
    return images | {
        "states": flat_state(sim),
        "robot_states": np.concatenate([sim.gripper_qpos, sim.eef_pos, sim.eef_quat]),
        "obs/ee_pos": position,
        "obs/ee_ori": axis_angle,
        "obs/ee_states": np.concatenate([position, axis_angle]),
        "obs/gripper_states": fingers,
        "obs/joint_states": sim.data.qpos[robot._ref_joint_pos_indexes].copy(),
    }


def flat_state(sim: Any) -> np.ndarray:
    """float64 [1 + nq + nv]: time, positions, velocities, as the benchmark's initial states."""
    return np.concatenate([[sim.data.time], sim.data.qpos, sim.data.qvel])


def bddl_file_name(task_suite: str, task_id: int) -> str:
    task = load_benchmark(task_suite).tasks[task_id]
    return f"{task.problem_folder}/{task.bddl_file}"


# ----------------------------------------------------------------------------------------------------------- processes


class Recorder:
    """Of a worker process."""

    def __init__(self, recording: Recording):
        self.recording = recording

    @functools.cached_property
    def env(self) -> LiberoEnv:
        return make_env(self.recording)

    def record(self, episode: Episode, disturbance: Disturbance) -> Outcome:
        return record_episode(self.env, episode, disturbance)

    def close(self) -> None:
        if "env" in vars(self):
            self.env.close()


def make_env(recording: Recording) -> LiberoEnv:
    return LiberoEnv(
        recording.task_suite,
        chunk_size=1,
        num_images=recording.num_images,
        image_size=recording.image_size,
        render=recording.render,
        simulators=Simulators(limit=1, cache_gb=recording.cache_gb),
    )


def episodes_of(task_id: int, states: str | Sequence[int], seed: int) -> Iterator[Episode]:
    """Random placements without end, or each of the fixed states once."""
    if states == "random":
        for number in itertools.count():
            rng = np.random.default_rng([seed, task_id, number])
            yield Episode(task_id, None, seed=int(rng.integers(2**31)))
    for state in states:
        yield Episode(task_id, int(state), seed=0)


def record_task(
    pool: Recorders, episodes: Iterator[Episode], wanted: int, disturbance: Disturbance, ahead: int, name: str
) -> Iterator[Outcome]:
    """The first `wanted` successes in the order of `episodes`, whichever worker is faster.

    Raises:
        ConfigError: the expert fails too often, or there are fewer episodes.
        Exception: see Recorders.wait.
    """
    waiting: list[Job] = []
    successes = failures = 0
    while successes < wanted:
        for episode in itertools.islice(episodes, min(ahead, wanted - successes + 1) - len(waiting)):
            waiting.append(pool.submit(episode, disturbance))
        if not waiting:
            raise ConfigError(
                f"{name}: the expert succeeded in {successes} of {successes + failures} fixed states, --episodes asks for "
                f"{wanted}; ask for fewer, or leave out --states for random placements"
            )
        outcome = waiting.pop(0).result()
        if outcome.success is None:
            continue
        successes, failures = successes + outcome.success, failures + (not outcome.success)
        yield outcome
        if failures >= GIVE_UP_AFTER and failures > successes:
            raise ConfigError(
                f"{name}: the expert failed in {failures} of {successes + failures} episodes (--noise {disturbance.noise:g}, "
                f"--drops {disturbance.drops:g}); lower them, or leave the task out"
            )
    for job in waiting:
        job.cancel()


# -------------------------------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m vla_rl.demonstrations",
        description="Record demonstrations of a scripted expert on LIBERO's pick-and-place tasks, in LIBERO's HDF5 layout.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--task-suite",
        default="libero_spatial",
        metavar="SUITE",
        help=f"one of {list_suites()} (default libero_spatial)",
    )
    add("--task-ids", type=int, nargs="+", default=[0], metavar="I", help="tasks of the suite (default 0)")
    add("--episodes", type=int, default=50, metavar="N", help="successful episodes of each task (default 50)")
    add(
        "--out",
        required=True,
        metavar="F.hdf5",
        help="file for all tasks; a folder gets one file a task, as LIBERO's, each when it is whole",
    )
    add("--states", default="random", metavar="0-39", help="fixed initial states instead of random placements")
    add("--noise", type=float, default=0.5, help="largest push, 1 is 5 cm a step; 0 for none (default 0.5)")
    add("--drops", type=float, default=0.0, help="chance in each step of carrying that the hand lets go (default 0)")
    add("--seed", type=int, default=0, help="of the placements and the disturbances (default 0)")
    add("--num-images", type=int, default=2, choices=(1, 2), help="1: agent view; 2: and wrist camera (default)")
    add("--image-size", type=int, default=128, metavar="PX", help="image side (default 128, as LIBERO's files)")
    add("--render", default="exact", choices=("exact", "fast"), help="as env.render of training (default exact)")
    add("--workers", type=int, metavar="W", help="processes (default one a CPU core)")
    add(
        "--step-timeout-s",
        type=float,
        metavar="S",
        help="a process that takes longer for a step hangs, and is replaced (default: 20 of its slowest first steps, but at least 60)",
    )
    add("--model-cache-gb", type=float, default=3.0, metavar="GB", help="disk for compiled models (default 3)")
    add("--no-progress", action="store_true", help="no bars")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> str | list[int]:
    """Raises ConfigError or ValueError for what argparse cannot check; returns the states."""
    try:
        num_tasks, _ = suite_size(args.task_suite)
    except ValueError as error:
        raise ConfigError(f"--task-suite: {error}") from None
    wrong = [task_id for task_id in args.task_ids if not 0 <= task_id < num_tasks]
    if wrong:
        raise ConfigError(f"--task-ids {wrong} outside {args.task_suite}, which has tasks 0 to {num_tasks - 1}")
    for task_id in args.task_ids:
        goal = goal_predicates(args.task_suite, task_id)
        if not goal or not {"on", "in"}.issuperset(goal):
            raise ConfigError(
                f"--task-ids {task_id}: {args.task_suite} task {task_id} ({task_languages(args.task_suite)[task_id]}) is not "
                f"pick-and-place alone: its goal is {' and '.join(goal)}; leave it out"
            )
    if len(set(args.task_ids)) < len(args.task_ids):
        raise ConfigError(f"--task-ids {args.task_ids}: a task is there twice; name each once")
    for flag, value, least in (
        ("--episodes", args.episodes, 1),
        ("--workers", args.workers, 1),
        ("--noise", args.noise, 0),
        ("--drops", args.drops, 0),
        ("--seed", args.seed, 0),
        ("--step-timeout-s", args.step_timeout_s, 1),
        ("--model-cache-gb", args.model_cache_gb, 0),
    ):
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{flag} {value}: expected at least {least}{' and finite' if value == math.inf else ''}")
    if args.drops > 1:
        raise ConfigError(f"--drops {args.drops}: a chance, expected at most 1")
    if args.image_size < 16:
        raise ConfigError(f"--image-size {args.image_size}: expected at least 16 pixels")
    try:
        states = parse_indices(args.states)
    except ValueError as error:
        raise ConfigError(f"--states: {error}, or random") from None
    if states != "random":
        check_states(args.task_suite, states, "--states")
    check_out(args)
    return states


def check_out(args: argparse.Namespace) -> None:
    """Expands ~ and $HOME in --out, and makes its folder.

    Raises:
        ConfigError: it is there already, or cannot be written.
    """
    args.out = expand(args.out, "--out")
    out = Path(args.out)
    folder = out.parent if is_file_name(out) else out
    try:
        if is_file_name(out) and os.path.lexists(out):
            raise ConfigError(f"--out {out} exists; choose another name, or remove it")
        if folder == out:
            there = [path for path in (task_file(args, task_id) for task_id in args.task_ids) if os.path.lexists(path)]
            if there:
                raise ConfigError(f"--out {out} has {there[0].name} already; choose another folder, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{out.name}", dir=folder) as file:
            file.write(b"1")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(folder) else ""
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}{where}; choose another place") from None
    if free < SPARE_BYTES:
        raise ConfigError(f"--out {out}: {free:,} bytes are free, expected at least {SPARE_BYTES:,}; make room")


def is_file_name(out: Path) -> bool:
    """Whether --out is one file for all tasks; else it is a folder."""
    return has_suffix(out) and not os.path.isdir(out)


def task_file(args: argparse.Namespace, task_id: int) -> Path:
    return Path(args.out) / f"{Path(bddl_file_name(args.task_suite, task_id)).stem}_demo.hdf5"


def file_attributes(args: argparse.Namespace, task_ids: Sequence[int]) -> dict[str, Any]:
    """Of the group `data`; the task's own where there is one task."""
    texts = [task_languages(args.task_suite)[task_id] for task_id in task_ids]
    attributes = {
        "tag": "libero-v1",
        "macros_image_convention": "opengl",
        "env_args": json.dumps({"type": 1, "env_name": args.task_suite, "env_kwargs": {"control_freq": 20}}),
        "problem_info": json.dumps({"domain_name": args.task_suite, "language_instruction": texts[0]}),
        "made_with": json.dumps({"program": "vla_rl.demonstrations"} | vars(args), default=str),
    }
    return attributes | ({"bddl_file_name": bddl_file_name(args.task_suite, task_ids[0])} if len(task_ids) == 1 else {})


def collect(args: argparse.Namespace, states: str | list[int]) -> None:
    """Writes the file or files.

    Raises:
        ConfigError: a task is not pick-and-place, or the expert fails too often.
    """
    recording = Recording(args.task_suite, args.num_images, args.image_size, args.render, args.model_cache_gb)
    workers = args.workers or len(os.sched_getaffinity(0))
    out = Path(args.out)
    files = [(out, args.task_ids)] if is_file_name(out) else [(task_file(args, i), [i]) for i in args.task_ids]
    make, one_thread = functools.partial(Recorder, recording), args.render == "fast"
    with contextlib.closing(
        Recorders(make, workers, Patience(args.step_timeout_s), args.task_suite, one_thread)
    ) as pool:
        for path, task_ids in files:
            with contextlib.ExitStack() as after, DemonstrationFile(path, file_attributes(args, task_ids)) as file:
                after.enter_context(removed_after_a_kill(file.unfinished))
                for task_id in task_ids:
                    collect_task(pool, file, args, states, task_id, ahead=2 * workers)
            say(f"{path}: {file.count} demonstrations, {file.total} steps, {path.stat().st_size / 1e6:.0f} MB")


@contextlib.contextmanager
def removed_after_a_kill(path: Path) -> Iterator[None]:
    """A shell waits for the end of this process, SIGKILL included, and removes the unfinished file; inside the block."""
    words = ["sh", "-c", 'read -r _; rm -f -- "$0"', str(path)]
    shell = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        shell.stdin.close()
        shell.wait()


def collect_task(
    pool: Recorders, file: DemonstrationFile, args: argparse.Namespace, states: Any, task_id: int, ahead: int
) -> None:
    name = f"{args.task_suite} task {task_id}"
    episodes = episodes_of(task_id, states, args.seed)
    tried = kept = steps = 0
    disturbance = Disturbance(args.noise, args.drops)
    with progress_bar(name, args.episodes, "ep", not args.no_progress) as bar:
        for outcome in record_task(pool, episodes, args.episodes, disturbance, ahead, name):
            tried += 1
            if outcome.success:
                file.add(outcome.arrays, outcome.attributes)
                kept, steps = kept + 1, steps + len(outcome.arrays["actions"])
                bar.update()
            bar.set_postfix_str(f"succ={kept / tried:.0%}, len={steps / max(1, kept):.0f}")
    say(f"{name}: {kept} of {tried} episodes succeeded, {steps / kept:.0f} steps each")


def main(argv: list[str] | None = None) -> int:
    """0: written; 1: a simulator failed; 2: a mistake in the arguments; 75: stopped. A file is there whole or not."""
    args = parse_args(argv)

    def work() -> None:
        try:
            states = check_args(args)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        collect(args, states)

    return end_of(work, interrupted="stopped; no unfinished file was written")


if __name__ == "__main__":
    from vla_rl import demonstrations  # under this name workers find its functions, not as __main__

    sys.exit(demonstrations.main())
