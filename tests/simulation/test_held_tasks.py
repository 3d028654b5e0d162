"""Who takes which task: as few simulators are built as can be, and nobody waits for long."""

import numpy as np
import pytest

from vla_rl.simulation.held_tasks import HeldTasks


def played(num_tasks, episodes, num_workers, places, limit):
    """Plays a queue in lockstep, episodes of 1 to 3 rounds: (worker, task) of each simulator built, and rounds until the end."""
    worker_of = [env // places for env in range(num_workers * places)]
    held, waiting = HeldTasks(worker_of, limit), {task: episodes for task in range(num_tasks)}
    real = [{} for _ in range(num_workers)]  # each worker's own order of use, as Simulators keeps it
    rng, left, built, rounds = np.random.default_rng(0), {env: 0 for env in range(len(worker_of))}, [], 0
    while left:
        for env in [env for env, rest in left.items() if rest == 0]:
            task = held.choose(env, waiting) if waiting else None
            if task is None:
                del left[env]
                continue
            waiting[task] -= 1
            waiting = {task: count for task, count in waiting.items() if count}
            mine = real[worker_of[env]]
            if task not in mine:
                built.append((worker_of[env], task))
            mine.pop(task, None)
            mine[task] = None
            if len(mine) > limit:
                del mine[next(iter(mine))]
            left[env] = int(rng.integers(1, 4))
        left = {env: rest - 1 for env, rest in left.items()}
        rounds += 1
    assert not waiting
    return built, rounds


@pytest.mark.parametrize("limit", [4, 10])
def test_an_evaluation_of_ten_tasks_builds_each_once_but_for_the_last_ones(limit):
    built, rounds = played(num_tasks=10, episodes=50, num_workers=2, places=4, limit=limit)
    assert len(built) <= 12  # in the list's order, all environments on one task, it would be 20
    assert rounds < 1.2 * 500 * 2 / 8  # of a mean of 2 rounds an episode: the workers end at about the same time


def test_no_environment_is_idle_while_as_many_episodes_wait():
    """A GRPO rollout of one group, an environment a worker."""
    held, waiting = HeldTasks(range(8), limit=1), 8
    for env in range(8):
        assert held.choose(env, {3: waiting}) == 3
        waiting -= 1


def test_more_workers_than_tasks_share_them():
    built, _ = played(num_tasks=2, episodes=50, num_workers=4, places=2, limit=2)
    assert {task for _, task in built} == {0, 1} and {worker for worker, _ in built} == {0, 1, 2, 3}


def test_what_is_held_is_taken_first_then_what_nobody_has():
    held = HeldTasks([0, 0, 1, 1], limit=2)
    assert held.choose(0, {5: 9, 6: 9, 7: 9}) == 5
    assert held.choose(1, {5: 8, 6: 9, 7: 9}) == 5
    assert held.choose(2, {5: 7, 6: 9, 7: 9}) == 6
    assert held.choose(2, {5: 7, 7: 9}) == 7
    assert held.choose(0, {6: 1, 7: 2}) == 7  # as many as the worker has environments
    assert held.choose(0, {6: 1}) is None  # sooner played by those who have it
    assert held.choose(3, {6: 1}) == 6


def test_recordings_are_played_by_those_who_have_their_task():
    held = HeldTasks([0, 0, 1, 1, 2, 2], limit=2)
    for env, task in ((0, 7), (2, 8), (4, 9)):
        held.use(env, task)
    assert held.workers_for([9, 7]) == [2, 0]
    assert held.workers_for([5, 8, 8]) == [0, 1, 2]  # one of task 8 has to be built, and 5
    assert [set(kept) for kept in held.kept] == [{7, 5}, {8}, {9, 8}]


def test_what_was_used_longest_ago_is_forgotten_as_the_worker_closes_it():
    held = HeldTasks([0, 0], limit=2)
    for task in (1, 2, 1, 3):
        held.use(0, task)
    assert list(held.kept[0]) == [1, 3] and held.choose(1, {2: 1, 1: 1}) == 1


def test_a_worker_that_is_another_process_now_has_no_task():
    held = HeldTasks([0, 1], limit=2)
    held.use(0, 5)
    held.use(1, 6)
    held.forget(0)
    assert [list(kept) for kept in held.kept] == [[], [6]]
