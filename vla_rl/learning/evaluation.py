"""Success of a policy over tasks x fixed initial states, with intervals and videos.

N environments, E episodes.
"""

from __future__ import annotations

import logging
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from tqdm import tqdm

from vla_rl.learning.episodes import EpisodeQueue, reset_finished, step_arguments
from vla_rl.run.failures import one_line
from vla_rl.run.settings import Config
from vla_rl.types import Episode, Observation, Policy

log = logging.getLogger(__name__)

CONTROL_HZ = 20  # LIBERO's control frequency: simulator steps per second of robot time


@dataclass(frozen=True)
class EpisodeResult:
    """One evaluated episode."""

    episode: Episode
    success: bool
    length: int  # simulator steps
    frames: list[np.ndarray] | None  # uint8 [H, W, 3], one a decision; None unless recorded


def evaluation_episodes(task_ids: Sequence[int], states: Sequence[int]) -> list[Episode]:
    """Every task from every fixed state, with the fixtures where the official evaluation has them.

    A state does not hold them: each reset draws them anew. openvla (c8f03f4, experiments/robot/libero/run_libero_eval.py)
    seeds a task's environment once with 0 and resets it before each trial, trial i with state i. In the few tasks that begin
    with something open or on, stock LIBERO then draws other places (docs/libero.md, departures).
    """
    return [Episode(task_id, state, seed=0, resets=state + 1) for task_id in task_ids for state in states]


def evaluate_policy(
    policy: Policy,
    envs: VectorEnv,
    episodes: Sequence[Episode],
    *,
    greedy: bool,
    temperature: float,
    seed: int,
    record: bool = False,
    progress: bool = True,
    on_decision: Callable[[], None] = lambda: None,
) -> list[EpisodeResult]:
    """Plays each episode once; an environment that is done takes the next from one queue.

    Each episode samples from a generator of its own: what it draws depends neither on the number of environments nor on the
    episodes beside it, and an evaluation does not change the training that follows it.

    Args:
        envs: at most as many environments as episodes.
        temperature: of the sampled mode; greedy ignores it.
        seed: of the sampling, 0 or more.
        record: keep the frames of the success and of the failure that end first.
        on_decision: called before each decision; may raise to stop the evaluation.

    Returns:
        E results in the order of `episodes`.
    """
    if envs.num_envs > len(episodes):
        raise ValueError(f"{envs.num_envs} evaluation environments for {len(episodes)} episodes; make fewer")
    generators = sampling_generators(episodes, seed)
    queue = EpisodeQueue(episodes, getattr(envs, "held", None))
    lengths = np.zeros(envs.num_envs, dtype=np.int64)
    frames: list[list[np.ndarray]] = [[] for _ in range(envs.num_envs)]
    recorded: set[bool] = set()  # outcomes whose frames are kept
    results: list[EpisodeResult | None] = [None] * len(episodes)
    description = "evaluate greedy" if greedy else f"evaluate T={temperature:g}"
    bar = tqdm(total=len(episodes), desc=description, unit="ep", disable=not progress, mininterval=1)

    obs = reset_finished(envs, np.ones(envs.num_envs, dtype=bool), queue)
    with bar:
        while queue.playing:
            on_decision()
            playing = sorted(queue.playing)
            output = policy.act(
                obs.rows(playing),
                temperature=temperature,
                greedy=greedy,
                generator=[generators[queue.playing[index]] for index in playing],
            )
            if record:
                for index in playing:
                    frames[index].append(obs.agent_view[index].copy())  # not a view that keeps all environments' images
            envs.step_async(*step_arguments(output.actions, playing, envs.action_space.shape))
            raw_obs, _, terminated, truncated, info = envs.step_wait()
            obs = Observation.from_vector_env(raw_obs)
            lengths += info["steps"]
            finished = np.zeros(envs.num_envs, dtype=bool)
            finished[playing] = (terminated | truncated)[playing]
            for index in np.flatnonzero(finished):
                number = queue.playing[int(index)]
                success = bool(terminated[index])
                shown = None
                if record and success not in recorded:
                    recorded.add(success)
                    shown = [*frames[index], obs.agent_view[index].copy()]
                results[number] = EpisodeResult(episodes[number], success, int(lengths[index]), shown)
                lengths[index], frames[index] = 0, []
                bar.update()
                bar.set_postfix_str(f"succ={np.mean([r.success for r in results if r is not None]):.1%}")
            obs = reset_finished(envs, finished, queue) or obs
    return results


def sampling_generators(episodes: Sequence[Episode], seed: int) -> list[torch.Generator]:
    """One generator an episode, of the seed and of what the episode is; equal episodes are told apart by their number."""
    met: Counter[Episode] = Counter()
    generators = []
    for episode in episodes:
        state = -1 if episode.initial_state is None else episode.initial_state
        identity = [seed, episode.task_id, state + 1, episode.seed, episode.resets, met[episode]]
        met[episode] += 1
        drawn = np.random.SeedSequence(identity).generate_state(1, np.uint64)
        generators.append(torch.Generator().manual_seed(int(drawn[0])))
    return generators


def evaluate_modes(
    policy: Policy, envs: VectorEnv, config: Config, videos: Path, prefix: str, on_decision: Callable[[], None]
) -> dict[str, Any]:
    """Every task from the fixed states that eval.states names, greedy and sampled as eval.modes says: eval/* metrics.

    Args:
        videos: folder for an MP4 of one success and one failure of each mode, if eval.video.
        prefix: of their names.
        on_decision: called before each decision; may raise to stop the evaluation.
    """
    settings = config.eval
    metrics: dict[str, Any] = {"eval/render": settings.render}
    for mode in settings.modes:
        results = evaluate_policy(
            policy,
            envs,
            evaluation_episodes(config.env.task_ids, settings.states),
            greedy=mode == "greedy",
            temperature=settings.temperature or config.rollout.temperature,
            seed=config.run.seed,
            record=settings.video,
            progress=config.logging.progress,
            on_decision=on_decision,
        )
        metrics |= success_metrics(results, mode)
        if settings.video:
            write_videos(results, videos, f"{prefix}_{mode}", policy.chunk_size)
    return metrics


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success rate (Wilson 1927), from SciPy; both ends in 0..1."""
    from scipy.stats import binomtest  # a second to import

    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def success_metrics(results: Sequence[EpisodeResult], mode: str) -> dict[str, float]:
    """eval/* of one mode ("greedy" or "sampled"): rate, interval, length, and each task's rate if there are several."""
    successes = [r.success for r in results]
    low, high = wilson_interval(sum(successes), len(successes))
    metrics = {
        f"eval/success_rate_{mode}": float(np.mean(successes)),
        f"eval/success_rate_{mode}_low": low,
        f"eval/success_rate_{mode}_high": high,
        f"eval/length_{mode}": float(np.mean([r.length for r in results])),
        f"eval/episodes_{mode}": len(results),
    }
    tasks = sorted({r.episode.task_id for r in results})
    if len(tasks) > 1:
        for task_id in tasks:
            rates = [r.success for r in results if r.episode.task_id == task_id]
            metrics[f"eval/success_rate_{mode}/task_{task_id}"] = float(np.mean(rates))
    return metrics


def write_videos(results: Sequence[EpisodeResult], folder: Path, prefix: str, chunk_size: int) -> list[Path]:
    """An MP4 of the first success and of the first failure, as far as there are any.

    One frame a decision, shown at the speed of the robot: 20 / chunk_size frames a second.

    No failure of a picture ends a run: a video that cannot be written is a warning.

    Returns:
        The files written.
    """
    written = []
    for outcome, success in (("success", True), ("failure", False)):
        result = next((r for r in results if r.success is success and r.frames), None)
        if result is not None:
            episode = result.episode
            path = folder / f"{prefix}_task{episode.task_id}_state{episode.initial_state}_{outcome}.mp4"
            try:
                write_video(result.frames, path, fps=CONTROL_HZ / chunk_size)
                written.append(path)
            except Exception as error:
                log.warning("no video %s: %s", path, one_line(error))
    return written


def write_video(frames: Sequence[np.ndarray], path: Path, fps: float) -> None:
    """H.264 MP4 that browsers play, whole or not at all. Small frames are doubled until 256 pixels, sides made even.

    Args:
        frames: uint8 [H, W, 3] each.

    Raises:
        OSError: the folder cannot be made or written, or ffmpeg is not there.
        RuntimeError: ffmpeg failed; the message is its own.
    """
    from imageio_ffmpeg import get_ffmpeg_exe

    path.parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, 256 // frames[0].shape[0])
    frames = [frame.repeat(scale, axis=0).repeat(scale, axis=1) for frame in frames]
    height, width = (side - side % 2 for side in frames[0].shape[:2])
    unfinished = path.with_name(f".{path.name}")
    options = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{width}x{height}",
        "-r",
        str(Fraction(fps).limit_denominator(1000)),
        "-i",
        "-",
    ]
    options += ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "25", "-f", "mp4"]
    # file: and an absolute path, else a folder "a:b" is a protocol and "-x" an option
    command = [get_ffmpeg_exe(), "-y", "-v", "error", *options, f"file:{unfinished.absolute()}"]
    pixels = b"".join(frame[:height, :width].tobytes() for frame in frames)
    try:
        # in a session of its own: Ctrl-C is for the run, which ends when it has saved
        ffmpeg = subprocess.run(command, input=pixels, capture_output=True, start_new_session=True)
        if ffmpeg.returncode != 0:
            said = ffmpeg.stderr.decode(errors="replace").strip()
            raise RuntimeError(f"ffmpeg ended with status {ffmpeg.returncode}: {said[-300:]}")
        os.replace(unfinished, path)
    finally:
        with suppress(OSError):  # nothing torn stays
            unfinished.unlink(missing_ok=True)
