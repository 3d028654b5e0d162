"""Which episode is played next depends on the seed and on counters, on nothing else."""

import itertools
from typing import ClassVar

import numpy as np
import pytest
import torch

from tests.fakes import make_envs
from vla_rl.demonstrations import episodes_of
from vla_rl.learning.episodes import (
    BrokenOff,
    EpisodeQueue,
    EpisodeSampler,
    EpisodeStreams,
    episode_generators,
    group_episodes,
    group_queue,
    reset_finished,
)
from vla_rl.run.distributed import Ranks
from vla_rl.simulation.held_tasks import HeldTasks
from vla_rl.types import Episode, place_in_round


def sampler(tasks=(0,), states="random", seed=0) -> EpisodeSampler:
    return EpisodeSampler(list(tasks), states, seed)


# PPO: endless streams


def test_equal_seeds_give_equal_streams_and_other_seeds_others():
    def episodes(seed):
        streams = EpisodeStreams(sampler([0, 1], seed=seed), 3)
        return [streams.next(i % 3) for i in range(12)]

    assert episodes(5) == episodes(5)
    assert not {e.seed for e in episodes(5)} & {e.seed for e in episodes(6)}


def test_an_environments_episodes_do_not_depend_on_how_fast_the_others_are():
    together, alone = EpisodeStreams(sampler(range(4)), 2), EpisodeStreams(sampler(range(4)), 2)
    first = []
    for _ in range(5):
        first.append(together.next(1))
        together.next(0), together.next(0), together.next(0)
    assert first == [alone.next(1) for _ in range(5)]


def test_a_stream_goes_on_from_its_counters():
    streams = EpisodeStreams(sampler(range(3)), 2)
    whole = [streams.next(0) for _ in range(6)]
    resumed = EpisodeStreams(sampler(range(3)), 2)
    resumed.played = [4, 0]
    assert [resumed.next(0), resumed.next(0)] == whole[4:]


def test_no_two_episodes_of_a_run_start_alike():
    streams = EpisodeStreams(sampler(), 8)
    assert len({streams.next(i).seed for i in range(8) for _ in range(50)}) == 400


def test_no_seed_trains_on_the_placements_that_it_demonstrates():
    demonstrated = {e.seed for task in range(8) for e in itertools.islice(episodes_of(task, "random", 0), 50)}
    streams = EpisodeStreams(sampler(seed=0), 8)
    trained = {streams.next(env).seed for _ in range(50) for env in range(8)}
    grouped = {e.seed for e in group_episodes(sampler(seed=0), 0, 50, 2)}
    assert not demonstrated & (trained | grouped)


@pytest.mark.parametrize(
    ("num_tasks", "num_envs"), [(10, 16), (10, 8), (3, 2), (3, 8), (1, 5), (90, 8), (7, 7), (4, 8)]
)
def test_tasks_get_equally_many_episodes_whatever_the_number_of_environments(num_tasks, num_envs):
    streams = EpisodeStreams(sampler(range(num_tasks)), num_envs)
    tasks = np.array([[streams.next(i).task_id for i in range(num_envs)] for _ in range(4 * num_tasks)])  # [rounds, N]
    for now in tasks:
        count = np.bincount(now, minlength=num_tasks)
        assert count.max() - count.min() <= 1  # the environments are spread evenly at any time
    for column in tasks.T:
        assert np.bincount(column, minlength=num_tasks).tolist() == [4] * num_tasks
        assert (column[1:] != column[:-1]).sum() <= num_tasks  # 4 in a row


@pytest.mark.parametrize(("num_tasks", "num_envs"), [(10, 10), (10, 16), (2, 8)])
def test_a_task_that_is_soon_solved_is_not_played_more_often_for_that(num_tasks, num_envs):
    """Even tasks take 8 decisions, odd ones 28."""
    streams, count, left = EpisodeStreams(sampler(range(num_tasks)), num_envs), np.zeros(num_tasks, int), [0] * num_envs
    for _ in range(40 * 18 * num_tasks):  # about 40 episodes of each task in each environment
        for env in range(num_envs):
            if left[env] == 0:
                task = streams.next(env).task_id
                count[task] += 1
                left[env] = 28 if task % 2 else 8
            left[env] -= 1
    assert count.max() < 1.15 * count.min()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_environments_play_and_sample_the_same_in_whichever_process_they_are(processes):
    whole, each = EpisodeStreams(sampler(range(3)), 8), 8 // processes
    parts = [EpisodeStreams(sampler(range(3)), 8, range(r * each, (r + 1) * each)) for r in range(processes)]
    for _ in range(9):
        expected = [whole.next(i) for i in range(8)]
        assert [part.next(i) for part in parts for i in range(each)] == expected
        drawn = [torch.rand(1, generator=part.generator_of(i)).item() for part in parts for i in range(each)]
        assert drawn == [torch.rand(1, generator=whole.generator_of(i)).item() for i in range(8)]
        assert [part.task_of(i) for part in parts for i in range(each)] == [episode.task_id for episode in expected]


def test_processes_take_from_one_list_and_each_begins_with_tasks_of_its_own():
    class Two(Ranks):
        taken: ClassVar[dict] = {}

        def claims(self):
            def claim(task):
                self.taken[task] = self.taken.get(task, -1) + 1
                return self.taken[task]

            return claim

    episodes = [Episode(task, state, 0) for task in range(4) for state in range(2)]
    first, second = (EpisodeQueue(episodes, HeldTasks([0], 4), ranks=Two(rank, 2)) for rank in range(2))
    played = [(queue.next(0), queue) for queue in (first, second, second, first, first, second, second, first)]
    assert [episode.task_id for episode, _ in played] == [0, 2, 2, 0, 1, 3, 3, 1]
    assert {episode for episode, _ in played} == set(episodes)
    assert first.next(0) is None and second.next(0) is None and not first.playing and not second.playing


@pytest.mark.parametrize("num_workers", [1, 2, 4, 16])
def test_neighbours_of_the_round_share_tasks_so_a_worker_needs_few_simulators_at_once(num_workers):
    streams, places = EpisodeStreams(sampler(range(10)), 16), [place_in_round(i, 16) for i in range(16)]
    assert sorted(places) == list(range(16))
    for _ in range(50):
        now = [streams.next(i).task_id for i in range(16)]
        for worker in range(num_workers):
            envs = [i for i in range(16) if places[i] * num_workers // 16 == worker]
            assert len({now[i] for i in envs}) <= -(-10 // num_workers) + 1
            if num_workers <= 8:
                assert sum(i < 8 for i in envs) == len(envs) / 2  # a half of an overlapped rollout fills every worker


@pytest.mark.parametrize("tasks", [[3], [0, 1, 2, 3, 4]])
def test_what_is_coming_is_what_comes_next_and_is_not_counted(tasks):
    streams = EpisodeStreams(sampler(tasks), 2)
    streams.next(1)
    coming = streams.coming([1, 0])
    assert coming == streams.coming([1, 0]) and streams.played == [0, 1]
    assert coming == {i: streams.next(i) for i in (1, 0)} and streams.played == [1, 2]
    assert coming.keys().isdisjoint(streams.coming([])) and EpisodeQueue([Episode(0, 0, 0)]).coming([0]) == {}


def test_random_placements_have_no_fixed_state():
    assert sampler().draw(0, 0, 3).initial_state is None and sampler().draw(0, 0, 3).task_id == 3


def test_a_named_subset_is_never_left_and_all_of_it_is_used():
    streams = EpisodeStreams(sampler(states=[3, 17, 40]), 2)
    assert {streams.next(i).initial_state for i in range(2) for _ in range(50)} == {3, 17, 40}


# GRPO: groups


def test_the_episodes_of_a_group_share_task_state_and_seed():
    episodes = group_episodes(sampler([2, 5], states=list(range(40))), 0, num_groups=6, group_size=4)
    groups = [episodes[i : i + 4] for i in range(0, 24, 4)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len({group[0].seed for group in groups}) == 6
    assert [group[0].task_id for group in groups] == [2, 5, 2, 5, 2, 5]


def test_groups_go_on_where_the_last_iteration_ended():
    source = sampler([0, 1, 2], seed=4)
    assert group_episodes(source, 0, 5, 2) == group_episodes(source, 0, 2, 2) + group_episodes(source, 2, 3, 2)


def test_groups_stay_in_a_named_subset():
    episodes = group_episodes(sampler(states=[7, 8]), 0, num_groups=30, group_size=2)
    assert {e.initial_state for e in episodes} == {7, 8}


# the queue


def test_the_queue_gives_episodes_in_order_to_whoever_is_free():
    queue = EpisodeQueue([Episode(0, i, 0) for i in range(4)])
    assert [queue.next(i).initial_state for i in (1, 0, 1, 2)] == [0, 1, 2, 3]
    assert queue.playing == {1: 2, 0: 1, 2: 3}


def test_the_queue_asks_which_task_an_environment_takes_and_plays_each_episode_once():
    class Held:
        asked: ClassVar[list] = []

        def choose(self, env_index, waiting):
            self.asked.append((env_index, dict(waiting)))
            return env_index if env_index in waiting else None

    queue = EpisodeQueue([Episode(task, state, 0) for state in range(2) for task in (5, 6)], Held())
    assert [queue.next(env) for env in (6, 6, 5)] == [Episode(6, 0, 0), Episode(6, 1, 0), Episode(5, 0, 0)]
    assert queue.playing == {6: 3, 5: 0} and (queue.task_of(6), queue.task_of(5)) == (6, 5)
    assert queue.next(6) is None and queue.playing == {5: 0}
    assert queue.next(5) == Episode(5, 1, 0) and queue.next(5) is None and not queue.waiting
    assert Held.asked[0] == (6, {5: 2, 6: 2}) and Held.asked[-1] == (5, {5: 1})


def test_what_an_episode_of_a_group_samples_is_its_own_whoever_plays_it():
    def draws(queue, envs):
        numbers = {}
        for env in envs:
            queue.next(env)
            numbers[queue.playing[env]] = torch.rand(2, generator=queue.generator_of(env)).tolist()
        return numbers

    first = draws(group_queue(sampler([0, 1]), 3, 2, 4, None), [0, 1, 2, 3, 0, 1, 2, 3])
    assert first == draws(group_queue(sampler([0, 1]), 3, 2, 4, None), [7] * 8)
    assert len({tuple(values) for values in first.values()}) == 8  # members of a group differ
    later = draws(group_queue(sampler([0, 1]), 4, 2, 4, None), [0] * 8)
    assert [later[i] for i in range(4)] == [first[i] for i in range(4, 8)]  # numbered over the run


def test_an_empty_queue_leaves_the_environment_idle():
    queue = EpisodeQueue([Episode(0, 0, 0)])
    queue.next(1)
    assert queue.next(0) is None and queue.playing == {1: 0}
    assert queue.next(1) is None and queue.playing == {}


# resets


@pytest.fixture
def envs():
    vector = make_envs(3)
    yield vector
    vector.close()


def start(envs) -> EpisodeQueue:
    queue = EpisodeQueue([Episode(task, None, seed=task) for task in range(4)])
    reset_finished(envs, np.ones(3, dtype=bool), queue)
    return queue


def test_all_environments_start_with_the_first_episodes(envs):
    queue = EpisodeQueue([Episode(task, None, seed=task) for task in range(4)])
    obs, _ = reset_finished(envs, np.ones(3, dtype=bool), queue)
    assert obs.instructions == ("do task 0", "do task 1", "do task 2")


def test_only_finished_environments_are_reset(envs):
    queue = start(envs)
    envs.step(np.zeros(envs.action_space.shape, np.float32))
    obs, _ = reset_finished(envs, np.array([False, True, False]), queue)
    assert obs.instructions == ("do task 0", "do task 3", "do task 2")
    assert obs.proprio[:, 0].tolist() == [2, 0, 2]  # simulator steps so far, in chunks of 2
    assert queue.playing == {0: 0, 1: 3, 2: 2}


def test_an_environment_that_has_begun_its_next_episode_is_counted_but_not_reset(envs):
    streams = EpisodeStreams(sampler(), 3)
    reset_finished(envs, np.ones(3, dtype=bool), streams)
    envs.step(np.zeros(envs.action_space.shape, np.float32))
    obs, _ = reset_finished(envs, np.array([True, True, False]), streams, begun=np.array([True, False, False]))
    assert obs.proprio[:, 0].tolist() == [2, 0, 2] and streams.played == [2, 2, 1]


def test_an_environment_for_which_nothing_is_left_is_not_reset(envs):
    queue = start(envs)
    obs, _ = reset_finished(envs, np.array([True, True, False]), queue)  # one episode left for two
    assert obs.instructions == ("do task 3", "do task 1", "do task 2")
    assert sorted(queue.playing) == [0, 2]


def test_nothing_to_reset_gives_no_observation(envs):
    queue = start(envs)
    obs, _ = reset_finished(envs, np.zeros(3, dtype=bool), queue)
    assert obs is None
    reset_finished(envs, np.array([True, False, False]), queue)
    obs, _ = reset_finished(envs, np.array([True, False, False]), queue)  # the queue is empty
    assert obs is None and 0 not in queue.playing


def test_a_broken_off_episode_is_played_again_with_the_same_samples_and_at_last_left_out():
    generators = episode_generators(3, range(2))
    queue = EpisodeQueue([Episode(0, None, seed=1), Episode(0, None, seed=2)], generators=generators, tries=3)
    first = queue.next(0)
    drawn = torch.rand(3, generator=queue.generator_of(0))
    assert queue.again(0) == first and torch.equal(torch.rand(3, generator=queue.generator_of(0)), drawn)
    assert queue.again(0) == first and torch.equal(torch.rand(3, generator=queue.generator_of(0)), drawn)
    assert queue.again(0) == Episode(0, None, seed=2) and queue.left_out == [0]
    endless = EpisodeQueue([first], generators=generators[:1])
    endless.next(0)
    drawn = torch.rand(3, generator=endless.again(0) and endless.generator_of(0))
    assert endless.again(0) == first  # another sample from now on: it may be what breaks it
    assert not torch.equal(torch.rand(3, generator=endless.generator_of(0)), drawn) and endless.again(0) == first


def test_rows_of_broken_episodes_are_told_of_this_decision_and_of_those_made_for_a_state_that_is_gone():
    broken = BrokenOff()
    no = torch.zeros(2, dtype=torch.bool)
    assert broken.rows([0, 3], [0, 1], no).tolist() == [True, False] and broken.idle == {3} and broken.count == 2
    assert broken.rows([], [2, 3], no).tolist() == [False, True] and broken.idle == set()
    assert broken.rows([0], [0, 1], ~no).tolist() == [False, False] and broken.count == 3  # the next one was broken off
