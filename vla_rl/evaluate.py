"""Evaluates a run or a checkpoint on LIBERO's fixed initial states, as training does it and as others report it.

    python -m vla_rl.evaluate --run runs/NAME
    python -m vla_rl.evaluate --checkpoint tiny-openvla --task-suite libero_spatial

The official protocol: of each task its 50 fixed states, placements of seed 0, 10 settle steps, the suite's step limit. What was
played is kept at once: whatever ends an evaluation, the same command goes on.

Not here: playing (vla_rl.evaluation.play), what is evaluated, what is left of it, tables and videos (beside it).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from vla_rl.evaluation import tables
from vla_rl.evaluation.play import (
    EpisodeResult,
    evaluate_policy,
    evaluation_episodes,
    one_of_each_outcome,
    recording,
)
from vla_rl.evaluation.protocol import measured, suite_settings
from vla_rl.evaluation.results import (
    RESULTS,
    Baseline,
    Journal,
    Key,
    check_continues,
    read_baseline,
)
from vla_rl.evaluation.subject import (
    Subject,
    build_subject,
    check_subject,
    check_suite,
    family_of,
    fingerprint,
    of_checkpoint,
    of_run,
)
from vla_rl.evaluation.videos import Recording, write_grid, write_replays
from vla_rl.run.checkpoint import locked
from vla_rl.run.command_line import Parser, end_of, parse
from vla_rl.run.failures import one_line, say
from vla_rl.run.files import write_whole
from vla_rl.run.interruption import Stop
from vla_rl.run.load_settings import expand, from_root
from vla_rl.run.machine import versions
from vla_rl.run.section import Mode
from vla_rl.run.settings import ConfigError
from vla_rl.run.task_suites import NUM_FIXED_STATES, TASK_SUITES, own_suites, suite_size
from vla_rl.simulation.suites import task_languages
from vla_rl.simulation.vector_env import LiberoVectorEnv, make_vector_env
from vla_rl.types import Episode

log = logging.getLogger("vla_rl.evaluate")

KEPT = (
    "stopped; what was played is kept, and the same command goes on (of a run that is still trained: name the checkpoint, "
    "--run RUN/checkpoints/iteration-N)"
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m vla_rl.evaluate",
        description="Success of a run or a checkpoint from LIBERO's fixed initial states.",
        epilog="settings, given as section.key=value, are those of start_gae_ppo_training.py --help; of use here: eval.num_envs, "
        "eval.temperature, eval.render, env.num_workers, run.device, run.seed, policy.*",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="any setting, for example eval.temperature=1.5")
    add(
        "--run",
        metavar="RUN",
        help="a run's folder (its newest checkpoint), one of its checkpoints, or RUN/checkpoints/best",
    )
    add(
        "--checkpoint",
        metavar="MODEL",
        help="a model: folder, Hugging Face id or tiny-openvla; with --run, where its base is now",
    )
    add(
        "--adapter",
        metavar="FOLDER",
        help="LoRA weights on the model: a run, its checkpoint, a peft folder (policy.adapter)",
    )
    suite = parser.add_mutually_exclusive_group()
    suite.add_argument("--task-suite", metavar="SUITE", help="default: the run's")
    suite.add_argument("--suite-family", metavar="SUITE", help="a suite and its LIBERO-PRO perturbations, in one table")
    add(
        "--task-ids",
        type=int,
        nargs="+",
        metavar="I",
        help="default: all of the suite, or the run's if it is the run's suite",
    )
    add("--states", metavar="0-49", help="fixed initial states of each task (default: all, or the run's eval.states)")
    add("--episodes", type=int, metavar="N", help="episodes a task in each mode: the first N of --states")
    add("--modes", nargs="+", choices=get_args(Mode), help="default: greedy sampled, or the run's")
    add("--out", metavar="DIR", help="default: RUN/evaluations/NAME, or runs/evaluations/NAME of a checkpoint")
    add("--baseline", metavar="RESULTS", help="results.json of another evaluation, compared state by state")
    add(
        "--videos",
        choices=("none", "outcomes", "all"),
        default="outcomes",
        help="outcomes: a success and a failure of each task, in the first mode (default); all: every episode",
    )
    add("--no-progress", action="store_true", help="no bars")
    return parse(parser, argv)


def subject_from(args: argparse.Namespace) -> tuple[Subject, list[str]]:
    """What is evaluated, and on which suites; nothing heavy is loaded.

    Raises:
        ConfigError: the arguments say nothing that can be evaluated.
    """
    if args.run is None and args.checkpoint is None:
        raise ConfigError("give --run runs/NAME, or --checkpoint MODEL with --task-suite")
    if args.run is None and args.task_suite is None and args.suite_family is None:
        raise ConfigError(f"--checkpoint needs --task-suite: one of {', '.join([*TASK_SUITES, *own_suites()])}")
    suites = [] if args.task_suite is None else [check_suite(args.task_suite)]
    suites = suites if args.suite_family is None else family_of(args.suite_family)
    flags: dict[str, Any] = {
        "env.task_suite": suites[0] if suites else None,
        "env.task_ids": args.task_ids,
        "eval.states": args.states,
        "eval.modes": args.modes,
        "logging.progress": False if args.no_progress else None,
        "logging.wandb": False,
    }
    if args.run is None:
        flags["env.task_ids"] = args.task_ids or list(range(suite_size(suites[0])[0]))
        subject = of_checkpoint(args.checkpoint, args.adapter, args.overrides, flags)
    else:
        flags["policy.checkpoint"] = args.checkpoint
        flags["policy.adapter"] = args.adapter
        subject = of_run(args.run, args.overrides, flags)
    return with_modes_of_head(with_first_episodes(subject, args.episodes)), suites or [subject.config.env.task_suite]


def with_first_episodes(subject: Subject, episodes: int | None) -> Subject:
    if episodes is None:
        return subject
    states = subject.config.eval.states
    if not 1 <= episodes <= len(states):
        raise ConfigError(
            f"--episodes {episodes}: of each task there are {len(states)} (--states); give 1 to {len(states)}"
        )
    evaluation = subject.config.eval.model_copy(update={"states": states[:episodes]})
    return replace(subject, config=subject.config.model_copy(update={"eval": evaluation}))


def with_modes_of_head(subject: Subject) -> Subject:
    """An L1 head has one action for an observation, so it is evaluated greedily alone.

    Raises:
        ConfigError: that was not asked for.
    """
    config = subject.config
    if config.policy.head == "tokens" or config.eval.modes == ["greedy"]:
        return subject
    if "greedy" not in config.eval.modes:
        raise ConfigError(
            f"--modes {' '.join(config.eval.modes)} with policy.head=l1, which has one action for an observation; give --modes greedy"
        )
    log.info("policy.head=l1 has one action for an observation: evaluated greedily alone")
    evaluation = config.eval.model_copy(update={"modes": ["greedy"]})
    return replace(subject, config=config.model_copy(update={"eval": evaluation}))


def out_folder(args: argparse.Namespace, subject: Subject, suites: list[str]) -> Path:
    """--out, or a name that says what is measured, so that the same command finds it again."""
    if args.out is not None:
        return Path(from_root(expand(args.out, "--out")))
    config = subject.config
    parts = [f"{suites[0]}_family" if len(suites) > 1 else suites[0]]
    if len(config.env.task_ids) < suite_size(suites[0])[0]:
        parts.append(f"tasks{tables.ranges(config.env.task_ids)}")
    if len(config.eval.states) < NUM_FIXED_STATES:
        parts.append(f"states{tables.ranges(config.eval.states)}")
    parts += config.eval.modes if len(config.eval.modes) == 1 else []
    root = Path(from_root(config.run.output_dir)) if subject.run is None else subject.run
    name = "_".join([subject.name.rpartition("/")[2], *parts])
    return root / "evaluations" / re.sub(r"[^\w.,+-]", "-", name)[:200]


@dataclass(frozen=True)
class Evaluation:
    """All that the steps of an evaluation share."""

    subject: Subject
    suites: list[str]
    folder: Path
    videos: str  # none, outcomes or all
    baseline: Baseline | None
    num_envs: int
    protocol: dict[str, Any]
    stop: Stop

    def episodes(self, suite: str, mode: str) -> dict[Key, Episode]:
        config = self.subject.config
        found = evaluation_episodes(config.env.task_ids, config.eval.states)
        return {Key(suite, mode, e.task_id, e.initial_state): e for e in found}

    def episode(self, key: Key) -> Episode:
        return evaluation_episodes([key.task_id], [key.initial_state])[0]


def evaluate(args: argparse.Namespace, stop: Stop) -> dict[str, Any]:
    """Plays what is not played yet; returns and writes the results.

    Raises:
        ConfigError: before anything heavy begins, a mistake in the arguments.
        Stopped: what was played is kept.
    """
    subject, suites = subject_from(args)
    check_subject(subject, suites)
    config = subject.config
    num_envs = min(config.eval.num_envs, len(config.env.task_ids) * len(config.eval.states))
    protocol, folder = measured(config, subject.temperature, suites, num_envs), out_folder(args, subject, suites)
    baseline = None if args.baseline is None else read_baseline(Path(expand(args.baseline, "--baseline")), protocol)
    check_continues(folder, protocol)
    evaluation = Evaluation(subject, suites, folder, args.videos, baseline, num_envs, protocol, stop)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be made ({error.strerror}); give another place") from None
    stop.grace_s = config.run.grace_s
    with locked(folder):
        return play_and_report(evaluation)


def play_and_report(evaluation: Evaluation) -> dict[str, Any]:
    subject, folder = evaluation.subject, evaluation.folder
    policy, value_head = build_subject(subject)
    who = {
        "name": subject.name,
        "checkpoint": subject.config.policy.checkpoint,
        "adapter": None if subject.adapter is None else str(subject.adapter),
        "fingerprint": fingerprint(policy),
    }
    journal = Journal(folder, evaluation.protocol, who)
    predict_values = None if value_head is None else lambda hidden: value_head(hidden).cpu()
    log.info("%s: %d episodes are there already; results in %s", subject.name, len(journal.rows), folder)
    for suite in evaluation.suites:
        with ExitStack() as cleanup, evaluation.stop.at_steps():
            make = SuiteEnvironments(evaluation, suite, policy.processor.image_transform, cleanup)
            policy.processor.pad_to([task_languages(suite)[i] for i in subject.config.env.task_ids])
            for mode in subject.config.eval.modes:
                played = play(evaluation, suite, mode, policy, predict_values, make, journal)
                if played and (suite, mode) != (evaluation.suites[-1], subject.config.eval.modes[-1]):
                    table = tables.suite_table(journal.rows, suite, subject.config.eval.modes, task_languages(suite))
                    say(f"{table.text()}\n")
            make_videos(evaluation, suite, make, journal, policy.chunk_size)
    return write_reports(evaluation, journal)


class SuiteEnvironments:
    """A suite's environments, made when they are first asked for: nothing is, where all is played and shown already."""

    def __init__(self, evaluation: Evaluation, suite: str, image_transform: Any, cleanup: ExitStack):
        self.evaluation, self.suite, self.image_transform, self.cleanup = evaluation, suite, image_transform, cleanup

    @cached_property
    def envs(self) -> LiberoVectorEnv:
        config = suite_settings(self.evaluation.subject.config, self.suite)
        kind = {"evaluation": True, "image_transform": self.image_transform}
        envs = self.cleanup.enter_context(closing(make_vector_env(config, self.evaluation.num_envs, **kind)))
        log.info(
            "%s: %d environments in %d workers (render %s)",
            *(self.suite, envs.num_envs, envs.num_workers, config.eval.render),
        )
        return envs


def play(
    evaluation: Evaluation,
    suite: str,
    mode: str,
    policy: Any,
    predict_values: Any,
    make: SuiteEnvironments,
    journal: Journal,
) -> bool:
    """The episodes of one mode that are not in the journal; whether there were any."""
    config = evaluation.subject.config
    episodes = evaluation.episodes(suite, mode)
    known = {episode: journal.result(key, episode) for key, episode in episodes.items() if key in journal.rows}
    if len(known) == len(episodes):
        return False
    envs, start = make.envs, time.perf_counter() - journal.seconds_of_session()

    def keep(result: EpisodeResult) -> None:
        if not journal.in_session:
            journal.add_session(session(envs))
        episode = result.episode
        key = Key(suite, mode, episode.task_id, episode.initial_state)
        journal.add(key, result, time.perf_counter() - start)
        of_task = [row for k, row in journal.rows.items() if k[:3] == key[:3]]
        if len(of_task) == len(config.eval.states):
            log.info("%s task %d %s: %s", suite, episode.task_id, mode, tables.Rate.of(of_task))

    evaluate_policy(
        policy,
        envs,
        list(episodes.values()),
        mode=mode,
        temperature=evaluation.subject.temperature,
        seed=config.run.seed,
        predict_values=predict_values,
        progress=config.logging.progress,
        on_decision=evaluation.stop,
        on_result=keep,
        known=known,
    )
    return True


def session(envs: LiberoVectorEnv) -> dict[str, Any]:
    """What this process plays with."""
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    machine = {"host": platform.node(), "platform": platform.platform(), "cores": len(os.sched_getaffinity(0))}
    return {
        "began": began,
        **machine,
        "num_workers": envs.num_workers,
        "opengl": envs.renderer_name(),
        "versions": versions(),
    }


# --------------------------------------------------------------------------------------------------------------- videos


def make_videos(evaluation: Evaluation, suite: str, make: SuiteEnvironments, journal: Journal, chunk_size: int) -> None:
    """What --videos asks for and is not there yet; then the suite's grid, and what flipped beside the baseline's."""
    if evaluation.videos == "none":
        return
    config, folder = evaluation.subject.config, evaluation.folder / "videos"
    limit = evaluation.protocol["max_steps"][suite]
    flips = chosen_flips(evaluation, suite, journal)
    for mode in config.eval.modes:
        results = {k: journal.result(k, e) for k, e in evaluation.episodes(suite, mode).items() if k in journal.rows}
        of_task: dict[int, list[Key]] = {}
        for key in results:
            of_task.setdefault(key.task_id, []).append(key)
        shown = set(results) if evaluation.videos == "all" else {key for key in flips if key.mode == mode}
        first = {}  # of each task, what stands in the grid
        for task, keys in of_task.items():
            firsts = one_of_each_outcome([results[key] for key in keys])
            keys_of = [next(key for key in keys if results[key] is result) for result in firsts]
            first[task] = keys_of[0]
            if evaluation.videos == "all" or mode == config.eval.modes[0]:
                shown |= set(keys_of)
        label = f"{evaluation.subject.name}, {mode}"
        recordings = {k: recording(results[k], f"{suite}_{mode}", label, chunk_size) for k in sorted(shown)}
        new = [r for r in recordings.values() if not (folder / f"{r.name}.mp4").exists()]
        if new:
            log.info("%s %s: %d videos", suite, mode, len(new))
            write_replays(make.envs, new, folder, limit, evaluation.stop)
        tiles = [folder / f"{recordings[key].name}.mp4" for key in first.values() if key in recordings]
        grid = folder / f"{suite}_{mode}_grid.mp4"
        if len(tiles) > 1 and (new or not grid.exists()):
            write_beside([tile for tile in tiles if tile.exists()], grid)
        for key in (key for key in flips if key.mode == mode):
            own = folder / f"{recordings[key].name}.mp4"
            write_flip(evaluation, key, results[key].success, own, make, chunk_size)


def chosen_flips(evaluation: Evaluation, suite: str, journal: Journal) -> list[Key]:
    """Which flipped states are shown: all, or of each task the first gained and the first lost in the first mode."""
    if evaluation.baseline is None:
        return []
    rows = {key: row for key, row in journal.rows.items() if key.task_suite == suite}
    chosen = []
    for comparison in tables.compare(rows, evaluation.baseline.rows):
        for keys in (comparison.gained, comparison.lost):
            firsts = {key.task_id: key for key in reversed(keys)}
            first_mode = comparison.mode == evaluation.subject.config.eval.modes[0]
            chosen += keys if evaluation.videos == "all" else list(firsts.values()) if first_mode else []
    return chosen


def write_flip(
    evaluation: Evaluation, key: Key, gained: bool, own: Path, make: SuiteEnvironments, chunk_size: int
) -> None:
    """The baseline's episode and this one's side by side: its own video if it is there, else its actions played again."""
    path = evaluation.folder / "flips" / own.name.replace("_success.", "_gained.").replace("_failure.", "_lost.")
    if path.exists() or not own.exists():
        return
    baseline = evaluation.baseline
    outcome = "failure" if gained else "success"
    theirs = baseline.path.parent / "videos" / own.name.replace("_success.", ".").replace("_failure.", ".")
    theirs = theirs.with_name(f"{theirs.stem}_{outcome}.mp4")
    result = None if theirs.exists() else baseline.recorded(key, evaluation.episode(key))
    made: list[Path] = []
    if result is not None:
        name = f"{key.task_suite}_{key.mode}"
        again: Recording = recording(
            result, name, f"{baseline.name}, {key.mode}", baseline.protocol.get("chunk_size", chunk_size)
        )
        limit = evaluation.protocol["max_steps"][key.task_suite]
        made = write_replays(make.envs, [again], path.parent / "baseline", limit, evaluation.stop)
        theirs = made[0] if made else theirs
    if theirs.exists():
        write_beside([theirs, own], path)
    else:
        log.warning("no video %s: the baseline has neither %s nor its episodes.jsonl", path, theirs)


def write_beside(videos: list[Path], path: Path) -> None:
    """No failure of a picture ends an evaluation."""
    try:
        write_grid(videos, path)
    except Exception as error:
        log.warning("no video %s: %s", path, one_line(error))


# -------------------------------------------------------------------------------------------------------------- reports


def write_reports(evaluation: Evaluation, journal: Journal) -> dict[str, Any]:
    """results.json and results.md; prints the tables."""
    config, folder, rows = evaluation.subject.config, evaluation.folder, journal.rows
    results = journal.results(config.model_dump(mode="json"))
    results["summary"] = tables.summary(rows)
    modes, shown = config.eval.modes, []
    for suite in evaluation.suites:
        shown.append(tables.suite_table(rows, suite, modes, task_languages(suite)))
    notes = [tables.protocol_text(results["protocol"], results["policy"], results["time"])]
    if len(evaluation.suites) > 1:
        shown.append(tables.family_table(rows, evaluation.suites, modes))
        notes.append("Changes from base are in percentage points with Newcombe's hybrid score interval, unpaired.")
    if len(modes) > 1:
        comparisons = tables.compare_modes(rows, modes)
        results["comparison_of_modes"] = [comparison.as_dict() for comparison in comparisons]
        shown.append(tables.comparison_table(comparisons, modes[0]))
    if evaluation.baseline is not None:
        comparisons = tables.compare(rows, evaluation.baseline.rows)
        results["comparison"] = [comparison.as_dict() for comparison in comparisons]
        results["baseline"] = {"path": str(evaluation.baseline.path), "name": evaluation.baseline.name}
        shown.append(tables.comparison_table(comparisons, evaluation.baseline.name))
        notes += tables.flip_lines(comparisons)
    if len(modes) > 1 or evaluation.baseline is not None:
        notes.append(
            "Differences are in percentage points with Agresti and Min's interval of pairs; p is exact, two-sided."
        )
    write_whole(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    write_whole(folder / "results.md", "\n\n".join([*(t.markdown() for t in shown), *notes]) + "\n")
    say("\n\n".join([*(table.text() for table in shown), "\n".join(notes)]))
    log.info("results in %s", folder)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """0: evaluated; 1: failed; 2: a mistake in the arguments; 75: stopped, the same command goes on."""
    args, stop = parse_args(argv), Stop()

    def work() -> None:
        evaluate(args, stop)

    return end_of(work, KEPT, stop)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
