"""Success of a policy over tasks x fixed initial states, with intervals and videos.

Not here: intervals (vla_rl.reports.statistics), pictures (vla_rl.evaluation.videos), the command that evaluates a run or a
checkpoint (vla_rl.evaluate).

N environments, E episodes, C steps in a chunk.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from vla_rl.evaluation.videos import Recording, write_replays
from vla_rl.learning.episodes import EpisodeQueue, reset_finished, step_arguments
from vla_rl.reports.statistics import wilson_interval
from vla_rl.run.distributed import ONE, Ranks
from vla_rl.run.logs import progress_bar
from vla_rl.run.section import TEMPERED, Mode
from vla_rl.run.settings import Config
from vla_rl.types import Episode, Observation, Policy, SimulatorDied

log = logging.getLogger(__name__)

TRIES = 3  # of an episode whose simulator is lost each time, as greedy actions may lead it to


@dataclass(frozen=True)
class EpisodeResult:
    """One evaluated episode."""

    episode: Episode
    success: bool
    length: int  # simulator steps
    actions: np.ndarray  # float32 [length, 7], those executed: the episode can be played again
    values: list[float] | None = None  # V(s) at each decision, if there is a value head


class Kept(Protocol):
    """What of vla_rl.evaluation.kept.KeptEpisodes an evaluation needs."""

    def known(self, mode: str) -> dict[Episode, EpisodeResult]: ...  # played before it was stopped

    def add(self, mode: str, result: EpisodeResult) -> None: ...  # an episode that has ended


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
    mode: Mode,
    temperature: float,
    seed: int,
    predict_values: Callable[[Tensor], Tensor] | None = None,
    progress: bool = True,
    on_decision: Callable[[], None] = lambda: None,
    on_result: Callable[[EpisodeResult], None] = lambda result: None,
    known: Mapping[Episode, EpisodeResult] | None = None,
    ranks: Ranks = ONE,
) -> list[EpisodeResult]:
    """Plays each episode once; an environment that is done takes the next from one queue.

    Each episode samples from a generator of its own: what it draws depends neither on the number of environments nor on the
    episodes beside it, and an evaluation does not change the training that follows it. Every forward has N rows, row i that of
    environment i or, where that has nothing left to play, a copy of another's: a batch of another size rounds otherwise, and
    then greedy tokens would depend on which episodes happen to end last.

    Args:
        envs: N environments; more than episodes are left idle.
        temperature: of the sampled and the mean action; greedy ignores it.
        seed: of the sampling, 0 or more.
        predict_values: hidden states [N, D] -> V [N]; None keeps no values.
        on_decision: called before each decision, and while simulators are waited for; may raise to stop the evaluation.
        on_result: called with each episode as it ends.
        known: results of some of the episodes, on every process the same, which are not played again.
        ranks: processes that play the episodes together; the callbacks are this one's.

    Returns:
        Results in the order of `episodes`, without those that were left out: their simulator was lost or blew up TRIES times.
    """
    known = known or {}
    results = {number: known[episode] for number, episode in enumerate(episodes) if episode in known}
    missing = [number for number in range(len(episodes)) if number not in results]
    held, generators = getattr(envs, "held", None), sampling_generators(episodes, seed)
    wanted = [episodes[number] for number in missing], held, [generators[number] for number in missing]
    queue = EpisodeQueue(*wanted, ranks, tries=TRIES)
    envs.on_wait = on_decision

    def play() -> dict[int, EpisodeResult]:
        settings = (mode, temperature, predict_values, progress, on_decision, on_result, list(results.values()))
        return play_queue(policy, envs, queue, *settings)

    if missing:
        results |= {missing[number]: result for part in ranks.all_of(play) for number, result in part.items()}
    if not results:
        raise SimulatorDied(f"none of {len(episodes)} episodes could be played: each lost its simulator {TRIES} times")
    return [results[number] for number in range(len(episodes)) if number in results]


def play_queue(
    policy: Policy,
    envs: VectorEnv,
    queue: EpisodeQueue,
    mode: Mode,
    temperature: float,
    predict_values: Callable[[Tensor], Tensor] | None,
    progress: bool,
    on_decision: Callable[[], None],
    on_result: Callable[[EpisodeResult], None],
    known: Sequence[EpisodeResult] = (),
) -> dict[int, EpisodeResult]:
    """Of evaluate_policy what one process does: number in the queue -> result, of the episodes that it took.

    Args:
        known: of what is not in the queue, for the bar.
    """
    unused = torch.Generator()  # of the rows that only fill the batch
    lengths = np.zeros(envs.num_envs, dtype=np.int64)
    actions: list[list[np.ndarray]] = [[] for _ in range(envs.num_envs)]
    values: list[list[float]] = [[] for _ in range(envs.num_envs)]
    results: dict[int, EpisodeResult] = {}
    description = f"evaluate {mode}" + (f" T={temperature:g}" if mode in TEMPERED else "")
    outcomes = [result.success for result in known]
    bar = progress_bar(description, len(known) + len(queue.episodes), "ep", progress, initial=len(known))

    obs, _ = reset_finished(envs, np.ones(envs.num_envs, dtype=bool), queue)
    with bar:
        while queue.playing:
            on_decision()
            playing = sorted(queue.playing)
            rows = [index if index in queue.playing else playing[0] for index in range(envs.num_envs)]
            output = policy.act(
                obs.rows(rows),
                mode=mode,
                temperature=temperature,
                generator=[
                    queue.generator_of(index) if index in queue.playing else unused for index in range(envs.num_envs)
                ],
            )
            envs.step_async(*step_arguments(output.actions[playing], playing, envs.action_space.shape))
            if predict_values is not None and output.hidden is not None:  # while the simulators step
                with torch.no_grad():
                    predicted = predict_values(output.hidden).tolist()
                for index in playing:
                    values[index].append(predicted[index])
            raw_obs, _, terminated, truncated, info = envs.step_wait()
            obs = Observation.from_vector_env(raw_obs)
            lengths += info["steps"]
            for index in playing:
                actions[index].append(output.actions[index, : info["steps"][index]])
            finished = np.zeros(envs.num_envs, dtype=bool)
            finished[playing] = (terminated | truncated)[playing]
            for index in map(int, np.flatnonzero(finished)):
                number = queue.playing[index]
                played, told = np.concatenate(actions[index]).astype(np.float32), values[index] or None
                results[number] = EpisodeResult(
                    queue.episodes[number], bool(terminated[index]), int(lengths[index]), played, told
                )
                on_result(results[number])
                outcomes.append(results[number].success)
                lengths[index], actions[index], values[index] = 0, [], []
                bar.update()
                bar.set_postfix_str(f"succ={np.mean(outcomes):.1%}")
            fresh, broken = reset_finished(envs, finished, queue)
            obs = fresh or obs
            for index in broken:  # which begin again
                lengths[index], actions[index], values[index] = 0, [], []
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
    policy: Policy,
    envs: VectorEnv,
    config: Config,
    videos: Path,
    prefix: str,
    on_decision: Callable[[], None],
    predict_values: Callable[[Tensor], Tensor] | None = None,
    ranks: Ranks = ONE,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Every task from the fixed states that eval.states names, in each of eval.modes: eval/* metrics.

    Args:
        videos: folder for an MP4 of one success and one failure of each mode, if eval.video.
        prefix: of their names.
        on_decision: called before each decision and replay; may raise to stop the evaluation.
        predict_values, ranks: see evaluate_policy.
        kept: has the episodes that were played before this evaluation was stopped, and takes those that end now.
    """
    settings, temperature = config.eval, sampling_temperature(config)
    metrics: dict[str, Any] = {"eval/render": settings.render}
    if TEMPERED.intersection(settings.modes):
        metrics["eval/temperature"] = temperature
    shown: list[Recording] = []
    for mode in settings.modes:
        results = evaluate_policy(
            policy,
            envs,
            evaluation_episodes(config.env.task_ids, settings.states),
            mode=mode,
            temperature=temperature,
            seed=config.run.seed,
            predict_values=predict_values,
            progress=config.logging.progress,
            on_decision=on_decision,
            ranks=ranks,
            **({} if kept is None else {"known": kept.known(mode), "on_result": partial(kept.add, mode)}),
        )
        metrics |= success_metrics(results, mode)
        shown += [recording(r, f"{prefix}_{mode}", mode, policy.chunk_size) for r in one_of_each_outcome(results)]
    if settings.video:
        log.info("videos: %d episodes are played again, rendered at every step", len(shown))
        shown = shown if ranks.first else []
        limit = config.max_episode_steps(evaluation=True)
        ranks.all_of(lambda: write_replays(envs, shown, videos, limit, on_decision))
    return metrics


def sampling_temperature(config: Config) -> float:
    """Of the modes TEMPERED in a training run."""
    return config.eval.temperature or config.rollout.temperature


def one_of_each_outcome(results: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    """The first success and the first failure, as far as there are any."""
    firsts = (next((r for r in results if r.success is outcome), None) for outcome in (True, False))
    return [result for result in firsts if result is not None]


def recording(result: EpisodeResult, prefix: str, label: str, chunk_size: int) -> Recording:
    """What a video of the episode is made of; prefix begins its file's name, label is written into it."""
    episode, outcome = result.episode, "success" if result.success else "failure"
    name = f"{prefix}_task{episode.task_id}_state{episode.initial_state}_{outcome}"
    return Recording(name, label, episode, result.actions, result.success, result.values, chunk_size)


def success_metrics(results: Sequence[EpisodeResult], mode: str) -> dict[str, float]:
    """eval/* of one mode ("greedy", or "l1" of a warm start): rate, interval, length, and each task's rate if there are several."""
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
