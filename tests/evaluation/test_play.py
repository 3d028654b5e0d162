"""Evaluation plays each episode once, in one queue, in batches of one shape, and keeps what it executed."""

from contextlib import closing

import numpy as np
import pytest
import torch

from tests.fakes import FakePolicy, make_envs
from tests.trainers import settings
from vla_rl.evaluation.play import (
    EpisodeResult,
    evaluate_modes,
    evaluate_policy,
    evaluation_episodes,
    one_of_each_outcome,
    recording,
    sampling_generators,
    success_metrics,
)
from vla_rl.learning.parts import build_policy
from vla_rl.run.load_settings import load_config
from vla_rl.simulation.vector_env import make_vector_env
from vla_rl.types import Episode, PolicyOutput


class ScriptedVectorEnv:
    """Episode (task, state) lasts task + 1 decisions of 8 steps, the last of 3, and succeeds if the state is even.

    Its picture shows task, state and decision; an environment that was never reset or is done refuses to be played.
    """

    def __init__(self, num_envs: int):
        self.num_envs, self.dropped = num_envs, np.zeros(num_envs, bool)
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
            if episode is None:
                assert not active[i], "an environment was played that was never reset"
                continue
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

    chunk_size = 8

    def __init__(self):
        self.calls = []

    def act(self, obs, *, mode, temperature, generator):
        n = len(obs)
        assert len(generator) == n, "one generator a row"
        fill = torch.Generator().initial_seed()  # of rows that are copies
        draws = [None if g.initial_seed() == fill else torch.rand(1, generator=g).item() for g in generator]
        self.calls.append((obs.instructions, temperature, mode, draws))
        return PolicyOutput(torch.zeros(n, 56), torch.zeros(n, 56), np.ones((n, 8, 7), np.float32), None, None)


def play(num_envs: int, episodes, policy=None, **more) -> tuple[list[EpisodeResult], ScriptedVectorEnv]:
    envs = ScriptedVectorEnv(num_envs)
    settings = {"mode": "greedy", "temperature": 1.0, "seed": 0, "progress": False} | more
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
    assert asked == [("3 0", "0 0"), ("3 0", "0 1"), ("3 0", "0 2"), ("3 0", "3 0")]  # a copy fills the batch


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
    play(1, EPISODES[:1], policy, mode="sampled", temperature=1.6)
    assert {(temperature, mode) for _, temperature, mode, _ in policy.calls} == {(1.6, "sampled")}


def drawn(num_envs: int, episodes, seed: int = 0) -> dict[str, list[list[float]]]:
    """What each episode drew, decision by decision."""
    policy, draws = OnesPolicy(), {}
    play(num_envs, episodes, policy, mode="sampled", seed=seed)
    for instructions, *_, numbers in policy.calls:
        for instruction, number in zip(instructions, numbers, strict=True):
            if number is not None:  # a copy that fills the batch
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
            results = evaluate_policy(policy, envs, wanted, mode="sampled", temperature=1.0, seed=5, progress=False)
        return [(r.success, r.length) for r in results]

    alone = run(1, episodes)
    assert 0 < sum(success for success, _ in alone) < 40
    assert all(run(num_envs, episodes) == alone for num_envs in (3, 8, 40))
    assert run(3, episodes[7:19]) == alone[7:19]


def test_sampling_is_of_the_seed_and_touches_no_global_state():
    def draws(seed):
        policy = OnesPolicy()
        play(2, EPISODES, policy, mode="sampled", seed=seed)
        return [draw for *_, draw in policy.calls]

    before = torch.get_rng_state()
    assert draws(1) == draws(1) != draws(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sampled_evaluation_of_the_small_policy_repeats_itself_and_touches_no_global_state():
    policy = FakePolicy()
    episodes = evaluation_episodes([0, 1], range(6))
    envs = make_envs(3)

    def run(seed, mode="sampled"):
        results = evaluate_policy(policy, envs, episodes, mode=mode, temperature=1.0, seed=seed, progress=False)
        return [(r.success, r.length) for r in results]

    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = run(3)
    assert run(3) == first and run(0, mode="greedy") == run(1, mode="greedy")
    assert any(run(seed) != first for seed in range(4, 9))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    envs.close()


# intervals and metrics


def result(task: int, success: bool, length: int, state: int = 0) -> EpisodeResult:
    return EpisodeResult(Episode(task, state, 0), success, length, np.zeros((length, 7), np.float32))


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


# what is kept of an episode


def test_the_actions_of_an_episode_are_those_executed():
    results, _ = play(2, EPISODES)
    assert [r.actions.shape for r in results] == [(r.length, 7) for r in results]
    assert {r.actions.dtype for r in results} == {np.dtype(np.float32)} and all((r.actions == 1).all() for r in results)


class CountingPolicy(OnesPolicy):
    """Tells the decision by its actions and its hidden state, and which row of the batch it was."""

    def act(self, obs, **kwargs):
        output = super().act(obs, **kwargs)
        seen = obs.images[:, 0, 0, 0].astype(np.float32)  # task, state, decision of each row
        output.actions[:] = 1
        return PolicyOutput(*[output.action_tokens, output.logprobs, output.actions], torch.from_numpy(seen), None)


def test_values_are_of_the_episodes_own_decisions():
    results, _ = play(3, EPISODES, CountingPolicy(), predict_values=lambda hidden: hidden @ torch.tensor([0.0, 100, 1]))
    for r in results:  # the picture has 40 a decision in its third channel
        assert r.values == [100 * r.episode.initial_state + 40 * k for k in range(r.episode.task_id + 1)]


def test_without_a_value_head_there_are_no_values():
    results, _ = play(2, EPISODES, CountingPolicy())
    assert {r.values for r in results} == {None}


def test_every_forward_has_a_row_for_each_environment_and_the_fill_draws_from_no_episode():
    for num_envs in (4, 12):  # of 9 episodes
        policy = OnesPolicy()
        results, _ = play(num_envs, EPISODES, policy, mode="sampled")
        assert {len(instructions) for instructions, *_ in policy.calls} == {num_envs}
        assert [(r.success, r.length) for r in results] == [(r.success, r.length) for r in play(1, EPISODES)[0]]


def test_results_are_told_as_they_come():
    told = []
    results, _ = play(2, EPISODES, on_result=told.append)
    assert len(told) == 9 and {id(r) for r in told} == {id(r) for r in results}
    assert told != results  # the order of their ends, not of the list


def test_one_of_each_outcome_is_the_first_of_the_list():
    results = [result(0, False, 3), result(0, True, 4), result(1, True, 5), result(1, False, 6)]
    assert one_of_each_outcome(results) == [results[1], results[0]]
    assert one_of_each_outcome(results[1:3]) == [results[1]] and one_of_each_outcome([]) == []


def test_a_recording_names_its_file_by_what_it_shows():
    shown = recording(result(3, False, 5, state=7), "000000100_greedy", "greedy", 8)
    assert shown.name == "000000100_greedy_task3_state7_failure" and (shown.label, shown.chunk_size) == ("greedy", 8)


# an evaluation of the trainer


def test_a_mode_leaves_a_video_of_a_success_and_of_a_failure_at_the_speed_of_the_robot(tmp_path):
    config = settings(eval={"states": "0-7", "video": True})
    with closing(make_envs(2, needed=2)) as envs:
        metrics = evaluate_modes(FakePolicy(), envs, config, tmp_path, "000000064", lambda: None)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert 0 < metrics["eval/success_rate_sampled"] < 1 and metrics["eval/episodes_greedy"] == 8
    assert len([n for n in names if n.startswith("000000064_sampled_task0_state")]) == 2
    assert {n.rpartition("_")[2] for n in names if "sampled" in n} == {"success.mp4", "failure.mp4"} and len(names) <= 4


@pytest.mark.parametrize(("mode", "temperature"), [("greedy", None), ("mean_action", 0.5), ("sampled", 0.5)])
def test_each_mode_asks_the_policy_for_its_own_and_names_a_temperature_that_matters(tmp_path, mode, temperature):
    policy = OnesPolicy()
    config = settings(eval={"states": "0-1", "video": False, "modes": [mode], "temperature": 0.5})
    metrics = evaluate_modes(policy, ScriptedVectorEnv(2), config, tmp_path, "", lambda: None)
    assert {(asked[2], asked[1]) for asked in policy.calls} == {(mode, 0.5)}
    assert (
        metrics[f"eval/episodes_{mode}"] == 2 * len(config.env.task_ids)
        and metrics.get("eval/temperature") == temperature
    )


def test_a_stop_ends_the_evaluation_before_a_replay(tmp_path):
    calls, config = [], settings(eval={"states": "0-7", "video": True, "modes": ["sampled"]})

    def decisions(count):
        calls.append(1)
        if len(calls) > count:
            raise KeyboardInterrupt

    with closing(make_envs(2, needed=2)) as envs:
        evaluate_modes(FakePolicy(), envs, config, tmp_path, "a", lambda: decisions(1000))
        asked = len(calls)
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            evaluate_modes(FakePolicy(), envs, config, tmp_path, "b", lambda: decisions(asked - 1))
    assert len(list(tmp_path.glob("a_*"))) == 2 and len(list(tmp_path.glob("b_*"))) == 1


# the real simulator and the small OpenVLA


@pytest.mark.libero
@pytest.mark.parametrize("workers", [(1, 2), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_greedy_episodes_are_the_same_for_any_number_of_workers_and_can_be_played_again(workers):
    config = load_config("configs/tiny_gae_ppo.yaml", ["eval.max_steps=24", "env.settle_steps=2", "env.image_size=64"])
    policy, episodes, played = build_policy(config, adapted=False), evaluation_episodes([0, 5], range(3)), []
    transform = policy.processor.image_transform
    for number in workers:
        config = config.model_copy(update={"env": config.env.model_copy(update={"num_workers": number})})
        with closing(make_vector_env(config, 4, evaluation=True, image_transform=transform)) as envs:
            results = evaluate_policy(policy, envs, episodes, mode="greedy", temperature=1.0, seed=0, progress=False)
            played.append([(r.success, r.length, r.actions.tobytes()) for r in results])
            assert [r.length for r in results] == [24] * 6 and len({r.actions.tobytes() for r in results}) == 6
            (frames, success, _), *_ = envs.replay([(r.episode, r.actions) for r in results[:1]])
            assert (len(frames), success) == (25, False)
    assert played[0] == played[1]
