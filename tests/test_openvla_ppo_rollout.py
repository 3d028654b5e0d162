"""What a rollout of the trainer holds: bootstraps, timesteps, episodes, overlap, GRPO's groups."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.fakes import CHUNK, FakePolicy, make_envs
from tests.trainers import make_trainer, with_values
from vla_rl.types import NonFiniteError


def test_values_of_a_rollout_cost_no_second_forward(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=100 * CHUNK)  # no episode ends: one bootstrap at the end
    rollout, _ = trainer.collect_rollout()
    assert trainer.policy.forwards == len(rollout) + 1
    assert trainer.policy.rows[-1] == 4  # of all environments together
    expected = trainer.value_head(trainer.policy.compute_hidden(rollout.transitions[3].inputs))
    torch.testing.assert_close(rollout.transitions[3].values, expected.detach())


def test_bootstraps_wait_for_the_end_of_the_rollout_and_share_forwards(tmp_path):
    trainer = make_trainer(tmp_path, rollout={"n_steps": 20})
    rollout, _ = trainer.collect_rollout()
    wanted = int(rollout.stack("truncated")[:-1].sum() + (~rollout.stack("terminated")[-1]).sum())
    assert wanted > 8 and trainer.policy.rows[:20] == [4] * 20
    assert trainer.policy.rows[20:] == [4] * (wanted // 4) + [wanted % 4] * (wanted % 4 > 0)


def test_a_value_of_a_state_reached_that_is_not_finite_ends_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.policy.compute_hidden = lambda inputs: torch.full((len(inputs), 16), torch.nan)
    with pytest.raises(NonFiniteError, match="a value of the observations reached is not finite in iteration 1"):
        trainer.collect_rollout()


def test_missing_hidden_state_is_computed_from_scratch_with_one_warning(tmp_path, caplog):
    trainer = make_trainer(tmp_path, policy=FakePolicy(gives_hidden=False), max_steps=100 * CHUNK)
    with caplog.at_level(logging.WARNING):
        rollout, _ = trainer.collect_rollout()
    assert trainer.policy.forwards == 2 * len(rollout) + 1
    assert len([r for r in caplog.records if "no hidden state" in r.message]) == 1
    twin = make_trainer(tmp_path / "twin", max_steps=100 * CHUNK)
    torch.testing.assert_close(rollout.stack("values"), twin.collect_rollout()[0].stack("values"))


def test_truncated_episode_bootstraps_from_the_observation_it_reached(tmp_path):
    """FakeEnv's observation after the last step is not the one after the reset: the bootstrap must be of the former."""
    trainer = make_trainer(tmp_path)
    rollout, _ = trainer.collect_rollout()
    truncated, terminated = rollout.stack("truncated"), rollout.stack("terminated")
    assert truncated.any()
    assert not (truncated & terminated).any()
    # replay environment 0's first truncated episode and ask for the value of the state it reached
    t = int(truncated[:, 0].nonzero()[0])
    envs = make_envs(1)
    number = int((terminated | truncated)[:t, 0].sum())
    task = trainer.sampler.task_ids[0]
    obs, _ = envs.reset(options={"episodes": {0: trainer.sampler.draw(0, number, task)}})
    start = t - 2
    for row in range(start, t + 1):
        token = rollout.transitions[row].action_tokens[0]
        actions = ((token.float() - 1.5) / 2).view(1, CHUNK, 7).numpy()
        obs, *_ = envs.step(actions)
    reached = trainer.policy.prepare(type(trainer.obs).from_vector_env(obs))
    expected = trainer.value_head(trainer.policy.compute_hidden(reached)).item()
    assert rollout.next_values()[t, 0].item() == pytest.approx(expected, abs=1e-6)


def test_the_step_limit_is_worth_nothing_where_it_counts_as_failure(tmp_path):
    """No forward either; the rollout's own end is still bootstrapped."""
    trainer = with_values(make_trainer(tmp_path, rollout={"n_steps": 7}, algorithm={"bootstrap_truncated": False}))
    rollout, _ = trainer.collect_rollout()
    truncated, terminated = rollout.stack("truncated"), rollout.stack("terminated")
    assert truncated[:-1].any() and not (truncated | terminated)[-1].all()
    following = rollout.next_values()
    assert (following[truncated] == 0).all() and (following[-1][~(truncated | terminated)[-1]] != 0).all()
    batch, _ = trainer.compute_advantages(rollout)
    assert (batch.returns.view(truncated.shape)[truncated] == 0).all()


def test_timesteps_count_executed_simulator_steps(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3)  # every second chunk is cut after one of its two steps
    _, metrics = trainer.collect_rollout()
    assert metrics["rollout/env_steps"] == trainer.timesteps == 4 * (2 + 1) * 4  # 4 envs, 4 episodes of 3 steps each
    assert metrics["rollout/length"] == 3
    assert metrics["rollout/episodes"] == 16


def test_episodes_go_on_across_iterations(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=20 * CHUNK, needed=99, rollout={"n_steps": 8})
    policy = trainer.policy
    with torch.no_grad():
        policy.head.zero_()
    lengths = []
    for _ in range(3):
        _, metrics = trainer.collect_rollout()
        lengths.append(metrics["rollout/length"])
    assert max(length for length in lengths if length) > 8 * CHUNK


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_overlapping_halves_give_the_data_that_all_together_give(tmp_path, estimator):
    rollout = {"num_envs": 5, "n_steps": 12, "group_size": 5, "n_episodes": 15}
    trainers = [
        make_trainer(tmp_path / str(on), rollout=rollout | {"overlap": on}, algorithm={"estimator": estimator})
        for on in (False, True)
    ]
    for _ in range(2):  # the second rollout begins in the middle of episodes (gae)
        (together, metrics), (halves, metrics_of_halves) = (trainer.collect_rollout() for trainer in trainers)
        assert metrics["rollout/episodes"] > 5 and metrics == metrics_of_halves
        assert len(together) == len(halves)
        for name in ("action_tokens", "rewards", "terminated", "truncated", "steps", "episode"):
            assert torch.equal(together.rows(name), halves.rows(name)), name
        for name in ("logprobs", "hidden", "values"):  # matrix products of other sizes round differently
            torch.testing.assert_close(together.rows(name), halves.rows(name))
        images = [torch.cat([t.inputs.images for t in rollout.transitions]) for rollout in (together, halves)]
        assert torch.equal(*images)
        if estimator == "gae":
            assert halves.stack("rewards").shape == (12, 5)
            torch.testing.assert_close(together.next_values(), halves.next_values())


@pytest.mark.parametrize("overlap", [False, True])
def test_episodes_that_begin_in_the_step_give_the_data_of_resets_after_it(tmp_path, overlap):
    changes = {"rollout": {"num_envs": 5, "n_steps": 12, "overlap": overlap}, "env": {"task_ids": list(range(7))}}
    ours, other = (make_trainer(tmp_path / name, **changes) for name in ("ours", "other"))
    step_async = other.envs.step_async
    other.envs.step_async = lambda actions, active, episodes: step_async(actions, active)  # none begins by itself
    resets = {trainer: watch_resets(trainer) for trainer in (ours, other)}
    for _ in range(2):
        (rollout, metrics), (expected, expected_metrics) = (trainer.collect_rollout() for trainer in (ours, other))
        assert metrics == expected_metrics and metrics["rollout/episodes"] > 5
        for name in ("action_tokens", "logprobs", "hidden", "values", "rewards", "terminated", "truncated", "steps"):
            assert torch.equal(rollout.rows(name), expected.rows(name)), name
        assert torch.equal(rollout.next_values(), expected.next_values())
        for row, expected_row in zip(rollout.transitions, expected.transitions, strict=True):
            assert row.inputs.images.equal(expected_row.inputs.images)
            assert row.inputs.instructions == expected_row.inputs.instructions
        assert ours.streams.played == other.streams.played
        states, expected_states = (trainer.envs.episode_states() for trainer in (ours, other))
        assert str(states) == str(expected_states) and str(ours.obs) == str(other.obs)
    assert len(resets[ours]) == 1 and len(resets[other]) > 5


def watch_resets(trainer) -> list:
    resets, reset = [], trainer.envs.reset
    trainer.envs.reset = lambda **kwargs: resets.append(kwargs) or reset(**kwargs)
    return resets


def test_overlap_decides_for_one_half_while_the_other_steps(tmp_path):
    sizes = {"minibatch_size": 8, "micro_batch_size": 8}
    trainer = make_trainer(tmp_path, rollout={"overlap": True, "num_envs": 4, "n_steps": 2}, algorithm=sizes)
    calls, act = [], trainer.policy.act
    step_async, step_wait = trainer.envs.step_async, trainer.envs.step_wait
    drawn_from = []

    def watched(obs, **kwargs):
        calls.append("decide")
        drawn_from.append(kwargs["generator"])
        return act(obs, **kwargs)

    trainer.policy.act = watched
    trainer.envs.step_async = lambda *args: calls.append(args[1].tolist()) or step_async(*args)
    trainer.envs.step_wait = lambda: calls.append("wait") or step_wait()
    trainer.collect_rollout()
    first, second = [True, True, False, False], [False, False, True, True]
    turns = ["decide", first, "decide", "wait", second, "decide", "wait", first, "decide", "wait", second, "wait"]
    assert calls == turns
    own = trainer.streams.generators  # of each environment, whoever decides beside it
    assert drawn_from == [own[:2], own[2:]] * 2 and len({generator.initial_seed() for generator in own}) == 4


def test_grpo_trains_on_the_same_rows_whoever_plays_the_episodes(tmp_path):
    """Another number of environments, and a vector whose workers prefer a task: the batch is equal, row by row."""

    class LastTaskFirst:
        def choose(self, env_index, waiting):
            return max(waiting)

    batches = []
    for name, num_envs, held in (("one", 4, None), ("two", 8, None), ("three", 4, LastTaskFirst())):
        changes = {"rollout": {"num_envs": num_envs, "group_size": 4, "n_episodes": 16}, "env": {"task_ids": [0, 1, 2]}}
        trainer = make_trainer(
            tmp_path / name, algorithm={"estimator": "grpo", "drop_uniform_groups": False}, **changes
        )
        trainer.envs.held = held
        for _ in range(2):  # the second iteration's groups are numbered on
            rollout, metrics = trainer.collect_rollout()
        assert (
            metrics["rollout/episodes/task_0"] + metrics["rollout/episodes/task_1"] < metrics["rollout/episodes"] == 16
        )
        batches.append(trainer.compute_advantages(rollout)[0])
    assert len(batches[0]) > 32
    for batch in batches[1:]:
        for name in ("action_tokens", "steps", "advantages"):
            assert torch.equal(getattr(batch, name), getattr(batches[0], name)), name
        assert batch.inputs.instructions == batches[0].inputs.instructions
        assert torch.equal(batch.inputs.images, batches[0].inputs.images)
        torch.testing.assert_close(
            batch.old_logprobs, batches[0].old_logprobs
        )  # forwards of other sizes round otherwise


def test_several_tasks_are_played_evenly_and_each_ones_success_is_told(tmp_path):
    trainer = make_trainer(tmp_path, rollout={"num_envs": 4, "n_steps": 90}, env={"task_ids": [0, 1, 7]})
    _, metrics = trainer.collect_rollout()
    counts = {i: metrics[f"rollout/episodes/task_{i}"] for i in (0, 1, 7)}
    assert sum(counts.values()) == metrics["rollout/episodes"] > 100
    assert max(counts.values()) - min(counts.values()) <= 8  # every environment is as fast as the others, by chance
    rates = [metrics[f"rollout/success_rate/task_{i}"] * n for i, n in counts.items()]
    assert sum(rates) == pytest.approx(metrics["rollout/success_rate"] * metrics["rollout/episodes"])


def test_grpo_plays_whole_groups_from_equal_starts_and_idle_environments_add_no_rows(tmp_path):
    trainer = make_trainer(tmp_path, algorithm={"estimator": "grpo"})
    rollout, metrics = trainer.collect_rollout()
    episode = rollout.rows("episode")
    assert trainer.policy.forwards == len(rollout)  # no bootstraps
    assert metrics["rollout/episodes"] == 8
    assert sorted(set(episode.tolist())) == list(range(8))
    ends = rollout.rows("terminated") | rollout.rows("truncated")
    assert all(ends[episode == e].sum() == 1 for e in range(8))
    assert (rollout.rows("steps") > 0).all()
    images = torch.cat([t.inputs.images for t in rollout.transitions])
    starts = [images[(episode == e).nonzero()[0, 0]] for e in range(8)]
    assert all(torch.equal(start, starts[e // 4 * 4]) for e, start in enumerate(starts))


def test_grpo_drops_groups_without_signal_and_says_how_many(tmp_path):
    trainer = make_trainer(tmp_path, algorithm={"estimator": "grpo"}, max_steps=2 * CHUNK)  # nobody can succeed
    rollout, _ = trainer.collect_rollout()
    batch, metrics = trainer.compute_advantages(rollout)
    assert metrics["rollout/uniform_groups"] == 2
    assert len(batch) == 0
    before = trainer.policy.adapter.clone()
    assert trainer.update(batch) == {}
    assert torch.equal(before, trainer.policy.adapter)


def test_a_rollout_without_reward_is_told(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    rollout, _ = trainer.collect_rollout()
    trainer.compute_advantages(rollout)
    assert ("no reward in this rollout" in caplog.text) is not bool(rollout.stack("rewards").any())
    caplog.clear()
    rollout.stack = lambda name, stack=rollout.stack: stack(name) * 0 if name == "rewards" else stack(name)
    trainer.compute_advantages(rollout)
    assert "no reward in this rollout" in caplog.text
