"""Evaluation plays each episode once, in one queue, and leaves videos that can be watched."""

import sys
from contextlib import closing
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from tests.fakes import FakePolicy, make_envs
from vla_rl.learning.evaluation import (
    EpisodeResult,
    evaluate_policy,
    evaluation_episodes,
    sampling_generators,
    success_metrics,
    wilson_interval,
    write_videos,
)
from vla_rl.types import Episode, PolicyOutput


class ScriptedVectorEnv:
    """Episode (task, state) lasts task + 1 decisions of 8 steps, the last of 3, and succeeds if the state is even.

    Its picture shows task, state and decision; an environment that was never reset or is done refuses to be played.
    """

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.action_space = type("Space", (), {"shape": (num_envs, 8, 7)})()
        self.episodes: list[Episode | None] = [None] * num_envs
        self.decisions = [0] * num_envs
        self.started: list[tuple[int, int]] = []

    def observe(self) -> dict:
        images = np.zeros((self.num_envs, 1, 64, 64, 3), np.uint8)
        for i, episode in enumerate(self.episodes):
            if episode is not None:
                images[i, ..., :] = [40 * episode.task_id, episode.initial_state, 40 * self.decisions[i]]
        texts = ["" if e is None else f"{e.task_id} {e.initial_state}" for e in self.episodes]
        return {"images": images, "proprio": np.zeros((self.num_envs, 8), np.float32), "instruction": texts}

    def reset(self, options):
        for index in np.flatnonzero(options["reset_mask"]):
            self.episodes[index], self.decisions[index] = options["episodes"][index], 0
            self.started.append((self.episodes[index].task_id, self.episodes[index].initial_state))
        return self.observe(), {}

    def step_async(self, actions, active):
        self.under_way = actions, active

    def step_wait(self):
        actions, active = self.under_way
        done, success, steps = (np.zeros(self.num_envs, dtype=kind) for kind in (bool, bool, np.int64))
        for i, episode in enumerate(self.episodes):
            played = self.decisions[i] <= episode.task_id
            assert played == active[i] == (actions[i] == 1).all(), (
                "an idle environment was played or a playing one was not"
            )
            self.decisions[i] += played
            done[i] = self.decisions[i] > episode.task_id
            success[i] = done[i] and episode.initial_state % 2 == 0
            steps[i] = (3 if done[i] else 8) if played else 0
        rewards = success.astype(np.float64)
        return self.observe(), rewards, success, done & ~success, {"steps": steps}


class OnesPolicy:
    """Acts 1 everywhere, and notes what it was asked."""

    def __init__(self):
        self.calls = []

    def act(self, obs, *, temperature, greedy, generator):
        n = len(obs)
        assert len(generator) == n, "one generator a row"
        draws = [torch.rand(1, generator=g).item() for g in generator]
        self.calls.append((obs.instructions, temperature, greedy, draws))
        return PolicyOutput(torch.zeros(n, 56), torch.zeros(n, 56), np.ones((n, 8, 7), np.float32), None, None)


def play(num_envs: int, episodes, policy=None, **more) -> tuple[list[EpisodeResult], ScriptedVectorEnv]:
    envs = ScriptedVectorEnv(num_envs)
    settings = {"greedy": True, "temperature": 1.0, "seed": 0, "progress": False} | more
    return evaluate_policy(policy or OnesPolicy(), envs, episodes, **settings), envs


EPISODES = evaluation_episodes([3, 0, 2], [4, 5, 6])  # lengths 4, 1 and 3 decisions


# the episodes


def test_evaluation_episodes_are_every_task_from_every_state():
    """With the fixtures of the official evaluation: seeded once, reset before each trial."""
    starts = [(e.task_id, e.initial_state, e.seed, e.resets) for e in evaluation_episodes([3, 1], [0, 9])]
    assert starts == [(3, 0, 0, 1), (3, 9, 0, 10), (1, 0, 0, 1), (1, 9, 0, 10)]


@pytest.mark.parametrize("num_envs", [1, 2, 4, 9])
def test_each_episode_is_played_once_and_results_are_in_the_order_of_the_list(num_envs):
    results, envs = play(num_envs, EPISODES)
    assert [r.episode for r in results] == EPISODES
    assert sorted(envs.started) == sorted((e.task_id, e.initial_state) for e in EPISODES)


@pytest.mark.parametrize("num_envs", [1, 4])
def test_success_and_length_are_those_of_the_episode(num_envs):
    results, _ = play(num_envs, EPISODES)
    assert [r.success for r in results] == [True, False, True] * 3  # states 4, 5, 6
    # simulator steps: all decisions of 8 but the last of 3: 3*8+3 = 27, 3, 2*8+3 = 19
    assert [r.length for r in results] == [27] * 3 + [3] * 3 + [19] * 3


def test_an_environment_takes_the_next_episode_as_soon_as_it_is_done():
    policy = OnesPolicy()
    play(2, evaluation_episodes([3, 0], [0]) + evaluation_episodes([0], [1, 2]), policy)
    # env 0 plays task 3 for four decisions, env 1 three short episodes beside it, then nothing
    asked = [instructions for instructions, *_ in policy.calls]
    assert asked == [("3 0", "0 0"), ("3 0", "0 1"), ("3 0", "0 2"), ("3 0",)]


def test_more_environments_than_episodes_are_refused():
    with pytest.raises(ValueError, match="10 evaluation environments for 9 episodes"):
        play(10, EPISODES)


def test_an_evaluation_may_be_stopped_before_any_decision():
    seen = []

    def stop():
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    policy = OnesPolicy()
    with pytest.raises(KeyboardInterrupt):
        play(2, EPISODES, policy, on_decision=stop)
    assert len(policy.calls) == 2


# sampling


def test_mode_and_temperature_reach_the_policy():
    policy = OnesPolicy()
    play(1, EPISODES[:1], policy, greedy=False, temperature=1.6)
    assert {(temperature, greedy) for _, temperature, greedy, _ in policy.calls} == {(1.6, False)}


def drawn(num_envs: int, episodes, seed: int = 0) -> dict[str, list[list[float]]]:
    """What each episode drew, decision by decision."""
    policy, draws = OnesPolicy(), {}
    play(num_envs, episodes, policy, greedy=False, seed=seed)
    for instructions, *_, numbers in policy.calls:
        for instruction, number in zip(instructions, numbers, strict=True):
            draws.setdefault(instruction, []).append(number)
    return draws


@pytest.mark.parametrize("num_envs", [2, 4, 9])
def test_what_an_episode_draws_does_not_depend_on_the_number_of_environments(num_envs):
    assert drawn(num_envs, EPISODES) == drawn(1, EPISODES)


def test_what_an_episode_draws_does_not_depend_on_the_episodes_beside_it():
    whole = drawn(3, EPISODES)
    for part in (EPISODES[4:], EPISODES[:2], EPISODES[::-1]):
        assert all(whole[episode] == numbers for episode, numbers in drawn(2, part).items())


def test_no_two_episodes_draw_the_same():
    episodes = [Episode(0, 4, 0), Episode(0, 4, 0), Episode(0, 4, 1), Episode(0, 4, 0, resets=2), Episode(0, 5, 0)]
    first = [torch.rand(1, generator=g).item() for seed in (0, 1) for g in sampling_generators(episodes, seed)]
    assert len(set(first)) == len(first) == 10


def test_an_episode_of_a_fresh_placement_has_a_generator_too():
    (generator,) = sampling_generators([Episode(0, None, 3)], 0)
    assert generator.initial_seed() != sampling_generators([Episode(0, 0, 3)], 0)[0].initial_seed()


def test_a_sampled_evaluation_is_the_same_in_any_number_of_environments():
    episodes, policy = evaluation_episodes([0, 1], range(20)), FakePolicy()

    def run(num_envs, wanted):
        with closing(make_envs(num_envs)) as envs:
            results = evaluate_policy(policy, envs, wanted, greedy=False, temperature=1.0, seed=5, progress=False)
        return [(r.success, r.length) for r in results]

    alone = run(1, episodes)
    assert 0 < sum(success for success, _ in alone) < 40
    assert all(run(num_envs, episodes) == alone for num_envs in (3, 8, 40))
    assert run(3, episodes[7:19]) == alone[7:19]


def test_sampling_is_of_the_seed_and_touches_no_global_state():
    def draws(seed):
        policy = OnesPolicy()
        play(2, EPISODES, policy, greedy=False, seed=seed)
        return [draw for *_, draw in policy.calls]

    before = torch.get_rng_state()
    assert draws(1) == draws(1) != draws(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sampled_evaluation_of_the_small_policy_repeats_itself_and_touches_no_global_state():
    policy = FakePolicy()
    episodes = evaluation_episodes([0, 1], range(6))
    envs = make_envs(3)

    def run(seed, greedy=False):
        results = evaluate_policy(policy, envs, episodes, greedy=greedy, temperature=1.0, seed=seed, progress=False)
        return [(r.success, r.length) for r in results]

    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = run(3)
    assert run(3) == first and run(0, greedy=True) == run(1, greedy=True)
    assert any(run(seed) != first for seed in range(4, 9))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    envs.close()


# intervals and metrics


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # z = 1.959964, z^2 = 3.841459. Centre (p + z^2/2n)/(1 + z^2/n), half width z/(1 + z^2/n) sqrt(pq/n + z^2/4n^2)
        # 8/10: (0.8 + 0.192073)/1.384146 = 0.716740; 1.416010 sqrt(0.016 + 0.009604) = 0.226577
        (8, 10, 0.49016, 0.94332),
        # 0/10: centre 0.192073/1.384146 = 0.138766 = half width
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        # 250/500: centre 0.5; 1.945020 sqrt(0.0005 + 0.0000038415) = 0.043660
        (250, 500, 0.45634, 0.54366),
    ],
)
def test_wilson_interval_by_hand(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=2e-5)


def result(task: int, success: bool, length: int, frames=None, state: int = 0) -> EpisodeResult:
    return EpisodeResult(Episode(task, state, 0), success, length, frames)


def test_metrics_of_one_task_by_hand():
    metrics = success_metrics([result(0, i < 8, 10 * i) for i in range(10)], "greedy")
    assert metrics == {
        "eval/success_rate_greedy": 0.8,
        "eval/success_rate_greedy_low": pytest.approx(0.49016, abs=2e-5),
        "eval/success_rate_greedy_high": pytest.approx(0.94332, abs=2e-5),
        "eval/length_greedy": 45.0,  # mean of 0, 10 ... 90
        "eval/episodes_greedy": 10,
    }


def test_metrics_of_several_tasks_have_each_tasks_rate():
    metrics = success_metrics(
        [result(2, True, 5), result(7, False, 5), result(7, True, 5), result(2, True, 5)], "sampled"
    )
    assert metrics["eval/success_rate_sampled"] == 0.75
    assert metrics["eval/success_rate_sampled/task_2"] == 1.0 and metrics["eval/success_rate_sampled/task_7"] == 0.5
    assert len([name for name in metrics if "/task_" in name]) == 2


# videos


def decode(path) -> tuple[list[np.ndarray], dict]:
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader], meta


def test_frames_are_what_the_policy_saw_and_the_last_state():
    results, _ = play(2, [Episode(2, 5, 0), Episode(2, 5, 0)], record=True)  # three decisions each
    assert [r.frames is None for r in results].count(False) == 1  # one of each outcome is enough: frames are large
    frames = next(r.frames for r in results if r.frames)
    assert [frame[0, 0].tolist() for frame in frames] == [[80, 5, 0], [80, 5, 40], [80, 5, 80], [80, 5, 120]]
    assert frames[0].shape == (64, 64, 3) and frames[0].dtype == np.uint8


def test_frames_are_kept_only_when_asked_for():
    results, _ = play(2, EPISODES)
    assert all(r.frames is None for r in results)


def test_a_video_of_the_first_success_and_failure_can_be_watched(tmp_path):
    results, _ = play(2, EPISODES, record=True)
    paths = write_videos(results, tmp_path / "videos", "000000100_greedy", chunk_size=8)
    assert [path.name for path in paths] == [
        "000000100_greedy_task3_state4_success.mp4",
        "000000100_greedy_task3_state5_failure.mp4",
    ]
    assert sorted((tmp_path / "videos").iterdir()) == sorted(paths)  # nothing unfinished stays
    for path, state in zip(paths, (4, 5), strict=True):
        frames, meta = decode(path)
        assert len(frames) == 5  # four decisions and the end
        assert meta["fps"] == 2.5  # 20 steps a second / 8 steps a decision
        assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p")  # what browsers play
        assert meta["size"] == (256, 256)  # 64 pixels four times
        for decision, frame in enumerate(frames):
            # colours go through YUV and compression
            np.testing.assert_allclose(frame.mean(axis=(0, 1)), [120, state, 40 * decision], atol=6)


@pytest.mark.parametrize(("side", "size"), [(256, (256, 256)), (128, (256, 256)), (101, (202, 202)), (257, (256, 256))])
def test_frames_of_any_size_become_a_video(tmp_path, side, size):
    frames = [np.full((side, side, 3), 128, np.uint8)] * 3
    (path,) = write_videos([result(0, True, 3, frames)], tmp_path, "x", chunk_size=1)
    decoded, meta = decode(path)
    assert len(decoded) == 3 and meta["size"] == size and meta["fps"] == 20


def test_without_a_failure_there_is_one_video_and_without_frames_none(tmp_path):
    frames = [np.zeros((64, 64, 3), np.uint8)] * 2
    assert len(write_videos([result(0, True, 3, frames)], tmp_path, "a", 8)) == 1
    assert write_videos([result(0, True, 3), result(0, False, 3)], tmp_path, "b", 8) == []


FRAMES = [np.zeros((64, 64, 3), np.uint8)] * 3
BOTH = [result(0, True, 3, FRAMES), result(0, False, 3, FRAMES)]


@pytest.mark.parametrize("name", ["a:b", "http:x", "-x", "a b", "100%d", "file:", "'q'", "ä"])
def test_a_relative_folder_of_any_name_gets_its_videos(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (path,) = write_videos([result(0, True, 3, FRAMES)], Path(name), "x", 8)
    assert len(decode(tmp_path / path)[0]) == 3
    assert [file.name for file in Path(name).iterdir()] == ["x_task0_state0_success.mp4"]


def fake_ffmpeg(script: str):
    def install(folder, monkeypatch):
        (folder / "ffmpeg").write_text(f"#!/bin/sh\nfor last; do :; done\n{script}\n")
        (folder / "ffmpeg").chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(folder / "ffmpeg"))

    return install


def raises(error: Exception):
    def replace(*_):
        raise error

    return lambda folder, monkeypatch: monkeypatch.setattr("vla_rl.learning.evaluation.os.replace", replace)


FAILURES = {
    "ffmpeg is not there": (lambda _, patch: patch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg"), "/nowhere/ffmpeg"),
    "ffmpeg cannot be executed": (
        lambda _, patch: patch.setenv("IMAGEIO_FFMPEG_EXE", "/dev/null"),
        "Permission denied",
    ),
    "the package is missing": (lambda _, patch: patch.setitem(sys.modules, "imageio_ffmpeg", None), "imageio_ffmpeg"),
    "it reads nothing": (fake_ffmpeg("echo No such filter >&2; exit 3"), "status 3: No such filter"),
    "the disk is full at the end": (
        fake_ffmpeg('cat >"${last#file:}"; printf "trailer:\nNo space left" >&2; exit 1'),
        "status 1: trailer: No space left",
    ),
    "it is killed": (fake_ffmpeg('echo torn >"${last#file:}"; kill -9 $$'), "status -9"),
    "it writes nothing": (fake_ffmpeg("cat >/dev/null"), "No such file"),
    "no permission": (raises(PermissionError(13, "Permission denied")), "Permission denied"),
    "the folder is a file": (lambda folder, _: (folder / "videos").write_text(""), "videos"),
    "an error without words": (raises(ValueError()), "ValueError"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_video_that_fails_is_one_warning_that_names_it_and_leaves_nothing_torn(
    tmp_path, monkeypatch, caplog, capfd, failure
):
    fail, words = FAILURES[failure]
    fail(tmp_path, monkeypatch)
    assert write_videos(BOTH, tmp_path / "videos", "x", 8) == []
    for record, outcome in zip(caplog.records, ("success", "failure"), strict=True):
        message = record.getMessage()
        assert record.levelname == "WARNING" and "\n" not in message
        assert f"{tmp_path}/videos/x_task0_state0_{outcome}.mp4: " in message and words in message
    assert not list(tmp_path.glob("videos/*")) and not list(tmp_path.glob("videos/.*"))
    assert capfd.readouterr().err == ""  # ffmpeg itself says nothing on the terminal


def test_a_failed_video_does_not_keep_the_next_from_being_written(tmp_path):
    (tmp_path / "x_task0_state0_success.mp4").mkdir()  # in the way
    (path,) = write_videos(BOTH, tmp_path, "x", 8)
    assert path.name == "x_task0_state0_failure.mp4" and len(decode(path)[0]) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_stop_while_a_video_is_written_still_stops(tmp_path, monkeypatch):
    raises(KeyboardInterrupt())(tmp_path, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        write_videos(BOTH, tmp_path / "videos", "x", 8)
    assert not list((tmp_path / "videos").iterdir())
