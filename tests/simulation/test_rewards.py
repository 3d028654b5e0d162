"""Rewards by name; of the dense one the identity it rests on, and the potentials of a real task as the expert solves it."""

from typing import get_args

import numpy as np
import pytest

from vla_rl.run.load_settings import load_config
from vla_rl.run.settings import ConfigError, EnvConfig
from vla_rl.simulation.expert import Expert
from vla_rl.simulation.libero_env import LiberoEnv, Simulators, build_simulator
from vla_rl.simulation.rewards import REWARDS, Reward, Step, nearness, potential, shaped

GAMMA = 0.97


@pytest.fixture(scope="module")
def simulators():
    simulators = Simulators(limit=2)
    yield simulators
    simulators.close()


def make_env(simulators, suite="libero_spatial", reward="dense", chunk_size=8, **settings):
    return LiberoEnv(
        suite,
        chunk_size=chunk_size,
        image_size=16,
        render="fast",
        reward=reward,
        gamma=GAMMA,
        simulators=simulators,
        **settings,
    )


def test_each_reward_that_the_settings_name_is_there_and_no_other():
    assert set(get_args(EnvConfig.model_fields["reward"].annotation)) == set(REWARDS)


def step_of(success=False, ended=False, before=0.0, after=0.0):
    return Step(success, ended, np.zeros((8, 7), np.float32), before, after, GAMMA)


def test_the_sparse_reward_is_1_on_success_and_the_dense_one_that_and_the_shaping():
    assert [REWARDS["sparse"].of(step_of(success=s, before=0.3, after=0.4)) for s in (False, True)] == [0.0, 1.0]
    assert REWARDS["dense"].of(step_of(before=0.3, after=0.4)) == pytest.approx(0.97 * 0.4 - 0.3)
    assert REWARDS["dense"].of(step_of(success=True, ended=True, before=0.3, after=0.4)) == pytest.approx(1 - 0.3)
    assert REWARDS["sparse"].measure is None


def test_an_environment_gives_its_reward_the_executed_actions_and_the_measures_around_them(simulators, monkeypatch):
    seen = []
    spy = Reward(lambda step: seen.append(step) or 0.25, measure=lambda sim: float(sim.data.time))
    monkeypatch.setitem(REWARDS, "spy", spy)
    env = make_env(simulators, reward="spy", max_steps=11, bootstrap_truncated=False)
    env.reset(options={"episode": {"task_id": 0, "initial_state": 1, "seed": 0}})
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 8, 7)).astype(np.float32)
    assert [env.step(chunk)[1] for chunk in (*actions, actions[0])] == [0.25, 0.25, 0.0]  # nothing after the end
    assert [len(step.actions) for step in seen] == [8, 3] and np.array_equal(seen[1].actions, actions[1, :3])
    assert seen[0].after == seen[1].before == pytest.approx(seen[0].before + 8 * 0.05)
    assert [(step.success, step.ended, step.gamma) for step in seen] == [(False, False, GAMMA), (False, True, GAMMA)]


def test_the_shaping_of_an_episode_is_minus_its_first_potential():
    """sum_t gamma^t (gamma phi' - phi) = gamma^T phi_T - phi_0, and phi of the terminal state counts as 0."""
    rng = np.random.default_rng(0)
    potentials, rewards = rng.random(9), np.array([0, 0, 0, 0, 0, 0, 0, 1.0])
    steps = zip(rewards, potentials, potentials[1:], strict=False)
    values = [shaped(r, before, after, t == 7, GAMMA) for t, (r, before, after) in enumerate(steps)]
    discounts = GAMMA ** np.arange(8)
    assert values @ discounts == pytest.approx(rewards @ discounts - potentials[0])


def test_a_truncated_episode_s_last_state_keeps_its_potential():
    assert shaped(0.0, 0.5, 0.8, ended=False, gamma=0.9) == pytest.approx(0.9 * 0.8 - 0.5)
    assert shaped(1.0, 0.5, 0.8, ended=True, gamma=0.9) == pytest.approx(1 - 0.5)


def test_nearness_falls_from_1_to_0():
    assert nearness(np.zeros(3)) == 1
    distances = [nearness(np.array([d, 0, 0])) for d in (0, 0.05, 0.1, 0.2, 0.5, 2)]
    assert distances == sorted(distances, reverse=True) and distances[2] == pytest.approx(1 - np.tanh(0.5))


@pytest.mark.parametrize("suite", ["libero_spatial", "libero_object"])
def test_the_potential_rises_while_the_expert_solves_the_task(simulators, suite):
    env = make_env(simulators, suite)
    env.reset(options={"episode": {"task_id": 0, "initial_state": 3, "seed": 0}})
    sim = env.simulator
    expert = Expert(sim)
    values, success = [potential(sim)], False
    while not success:
        success = sim.step(expert.act(), render=False)
        values.append(potential(sim))
        assert len(values) < 250
    assert 0 < values[0] < 0.4 and values[-2] > 0.7 and values[-1] == 1.0
    thirds = [np.mean(part) for part in np.array_split(values, 4)]
    assert thirds == sorted(thirds)


def test_an_episode_s_dense_return_is_its_sparse_one_less_the_first_potential(simulators):
    episode = {"task_id": 0, "initial_state": 1, "seed": 0}
    env = make_env(simulators, chunk_size=1)
    env.reset(options={"episode": episode})
    first = potential(env.simulator)
    assert 0.1 < first < 0.5
    expert = Expert(env.simulator)
    actions, rewards, ended = [], [], False
    while not ended:
        actions.append(expert.act().astype(np.float32))
        _, reward, terminated, truncated, _ = env.step(actions[-1][None])
        rewards.append(reward)
        ended = terminated or truncated
    discounts = GAMMA ** np.arange(len(rewards))
    assert terminated
    assert np.dot(rewards, discounts) == pytest.approx(discounts[-1] - first)

    sparse = make_env(simulators, chunk_size=1, reward="sparse")
    sparse.reset(options={"episode": episode})
    assert sum(sparse.step(action[None])[1] for action in actions) == 1.0


@pytest.mark.parametrize("bootstrap", [True, False])
def test_at_the_step_limit_the_potential_stays_where_the_value_is_bootstrapped_and_is_0_where_it_is_failure(
    simulators, bootstrap
):
    env = make_env(simulators, chunk_size=1, max_steps=3, bootstrap_truncated=bootstrap)
    env.reset(options={"episode": {"task_id": 0, "initial_state": 1, "seed": 0}})
    first = potential(env.simulator)
    rewards = [env.step(np.full((1, 7), 0.5, np.float32))[1] for _ in range(3)]
    last = potential(env.simulator) if bootstrap else 0.0
    assert first > 0.1 and last != first
    assert np.dot(rewards, GAMMA ** np.arange(3)) == pytest.approx(GAMMA**3 * last - first, abs=1e-6)


@pytest.mark.parametrize("initial_state", [None, 3])
@pytest.mark.parametrize("settle_steps", [0, 10])
@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_restored_episode_goes_on_with_the_same_potential_and_reward(simulators, initial_state, settle_steps, chunks):
    """Bit for bit, whether its start has been settled here before, and whoever has used the simulator in between."""
    rng = np.random.default_rng(2)
    actions = rng.uniform(-1, 1, (4, 8, 7)).astype(np.float32)
    env, other, neighbour = (make_env(simulators, settle_steps=settle_steps) for _ in range(3))
    settled = env._shared(0).settled
    settled.clear()
    env.reset(options={"episode": {"task_id": 0, "initial_state": initial_state, "seed": 5}})
    for chunk in actions[:chunks]:
        env.step(chunk)
    state, before, reward = env.episode_state(), env._measured, env.step(actions[chunks])[1]
    assert reward != 0 and before > 0.1
    for known in (True, False, True):
        if not known:
            settled.clear()
        other.restore_episode(state)
        neighbour.reset(seed=8)
        neighbour.step(actions[0])
        assert other._measured == before
        assert other.step(actions[chunks])[1] == reward
        other.restore_episode(other.episode_state())


def test_where_an_environment_s_simulator_is_shared_its_potential_is_its_own(simulators):
    alone, shared_, neighbour = (make_env(simulators) for _ in range(3))
    rng = np.random.default_rng(4)
    chunks = rng.uniform(-1, 1, (3, 8, 7)).astype(np.float32)

    def rewards(env, between):
        env.reset(options={"episode": {"task_id": 0, "initial_state": None, "seed": 9}})
        values = []
        for chunk in chunks:
            between()
            values.append(env.step(chunk)[1])
        return values

    expected = rewards(alone, lambda: None)
    neighbour.reset(options={"episode": {"task_id": 0, "initial_state": 7, "seed": 0}})
    assert rewards(shared_, lambda: neighbour.step(np.ones((8, 7), np.float32))) == expected


def test_tasks_without_a_placement_are_refused_by_name():
    sim = build_simulator("libero_goal", 7, cameras=(), image_size=16, fast=True)  # turn on the stove
    with pytest.raises(ValueError, match=r"asks for no object to be placed; use env\.reward=sparse"):
        potential(sim)


def test_grpo_refuses_a_dense_reward():
    with pytest.raises(ConfigError, match="potentials cancel out of an episode's return"):
        load_config("configs/tiny_grpo.yaml", ["env.reward=dense"])
