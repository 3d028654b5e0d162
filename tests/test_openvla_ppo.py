"""The trainer itself, on a small environment and a small policy; tests/test_end_to_end.py runs it on LIBERO."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from OpenVLA_PPO import InvariantError, OpenVLAPPO
from tests.fakes import CHUNK, FakePolicy, make_envs
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.value_head import ValueHead
from vla_rl.run.checkpoint import CheckpointError, find_checkpoint
from vla_rl.run.load_settings import config_from_dict
from vla_rl.run.metrics import MetricsLogger, read_metrics
from vla_rl.run.settings import LoraConfig
from vla_rl.types import NonFiniteError, SimulatorDied

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "run": {"timesteps": 3 * 4 * 8 * CHUNK, "seed": 3, "device": "cpu"},  # three iterations
    "policy": {"dtype": "float32", "chunk_size": CHUNK},
    "value_head": {"hidden_sizes": [32]},
    "rollout": {"num_envs": 4, "n_steps": 8, "group_size": 4, "n_episodes": 8},
    "algorithm": {"n_epochs": 2, "minibatch_size": 16, "micro_batch_size": 8, "target_kl": None},
    "actor": {"learning_rate": 0.01},
    "critic": {"learning_rate": 0.003},
    "eval": {"interval": 0, "states": "0-3", "num_envs": 2, "video": False},
    "env": {},
    "logging": {"checkpoint_interval": 1, "keep_checkpoints": 10, "progress": False},
}


def settings(**changes):
    """SETTINGS with changes such as algorithm={"n_epochs": 1}."""
    return config_from_dict(
        {section: values | changes.get(section, {}) for section, values in SETTINGS.items()}, "the test"
    )


def make_trainer(
    folder: Path, policy=None, evaluate=False, max_steps=3 * CHUNK, needed=3, policy_settings=None, **changes
):
    config = settings(policy=policy_settings or {}, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    policy = policy or FakePolicy()
    generator = torch.Generator().manual_seed(config.run.seed)
    head = None
    if config.algorithm.estimator == "gae":
        head = ValueHead(policy.hidden_size, config.value_head.hidden_sizes, generator)
    return OpenVLAPPO(
        config,
        policy,
        head,
        make_envs(config.rollout.num_envs, max_steps=max_steps, needed=needed),
        make_envs(config.eval.num_envs, max_steps=max_steps, needed=needed) if evaluate else None,
        MetricsLogger(folder, config),
    )


def training_lines(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock or on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    machine = ("time/", "system/", "rollout/env_steps_per_s")
    return [{k: v for k, v in line.items() if not k.startswith(machine)} for line in lines]


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_training_goes_from_chance_to_over_90_percent(tmp_path, estimator):
    """Chance is 12.5 % (see FakeEnv); success comes only at the end of an episode."""
    trainer = make_trainer(
        tmp_path,
        evaluate=True,
        run={"timesteps": 16 * 18 * CHUNK * 40},
        rollout={"num_envs": 16, "n_steps": 18, "group_size": 8, "n_episodes": 96},
        algorithm={"estimator": estimator, "n_epochs": 4, "minibatch_size": 72, "micro_batch_size": 72},
        actor={"learning_rate": 0.03},
        critic={"learning_rate": 0.01},
        eval={"states": "0-49", "num_envs": 10},
        logging={"checkpoint_interval": 1000, "curves_interval": 1000},
    )
    trainer.train()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines[0]["eval/success_rate_sampled"] < 0.3
    assert lines[-1]["eval/success_rate_sampled"] > 0.9
    assert lines[-1]["eval/success_rate_greedy"] > 0.9


# ----------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_first_minibatch_of_every_update_has_ratio_one_and_zero_kl(tmp_path, level):
    make_trainer(tmp_path, algorithm={"logprob_level": level, "n_epochs": 3}).train()
    lines = training_lines(tmp_path)
    assert len([line for line in lines if "actor/policy_loss" in line]) == 3
    for line in lines:
        assert line["actor/first_minibatch_ratio_error"] < 1e-4
        assert abs(line["actor/first_minibatch_kl"]) < 1e-6
        assert line["actor/approx_kl"] > 0  # later minibatches move


def test_scoring_at_another_temperature_than_sampling_stops_the_run(tmp_path):
    class Wrong(FakePolicy):
        def evaluate_actions(self, inputs, action_tokens, *, temperature):
            return super().evaluate_actions(inputs, action_tokens, temperature=temperature * 1.1)

    with pytest.raises(InvariantError, match="first_minibatch_ratio_error"):
        make_trainer(tmp_path, policy=Wrong()).train()


def test_each_optimizer_changes_its_own_parameters_and_no_other(tmp_path):
    trainer = make_trainer(tmp_path)
    policy = trainer.policy
    base = [policy.base.clone(), policy.head.clone()]
    batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
    adapter, head = policy.adapter.clone(), [p.clone() for p in trainer.critic_parameters]
    trainer.minibatch_gradients(batch, train_actor=True, score_actor=True)
    trainer.actor_optimizer.step()
    assert not torch.equal(policy.adapter, adapter)
    assert all(torch.equal(p, q) for p, q in zip(trainer.critic_parameters, head, strict=True))
    adapter = policy.adapter.clone()
    trainer.critic_optimizer.step()
    assert torch.equal(policy.adapter, adapter)
    assert not any(torch.equal(p, q) for p, q in zip(trainer.critic_parameters, head, strict=True))
    assert torch.equal(policy.base, base[0])
    assert torch.equal(policy.head, base[1])
    assert policy.base.grad is None


def test_learning_rates_are_those_of_actor_and_critic(tmp_path):
    trainer = make_trainer(tmp_path, actor={"learning_rate": 1e-5}, critic={"learning_rate": 3e-4})
    assert [g["lr"] for g in trainer.actor_optimizer.param_groups] == [1e-5]
    assert [g["lr"] for g in trainer.critic_optimizer.param_groups] == [3e-4]


def test_the_actors_learning_rate_falls_linearly_with_the_timesteps(tmp_path):
    """From the whole rate in the first iteration to more than 0 in the last: of the timesteps before each."""
    actor = {"learning_rate": 0.01, "anneal_learning_rate": True}
    trainer = make_trainer(tmp_path, actor=actor, run={"timesteps": 400})
    rates, expected = [], []
    while trainer.timesteps < 400:
        expected.append(0.01 * (1 - trainer.timesteps / 400))
        trainer.train_iteration()
        rates.append(read_metrics(tmp_path / "metrics.jsonl")[-1]["actor/learning_rate"])
        assert [group["lr"] for group in trainer.actor_optimizer.param_groups] == [rates[-1]]
    assert len(rates) > 2 and rates[0] == 0.01 and rates == pytest.approx(expected)
    assert [group["lr"] for group in trainer.critic_optimizer.param_groups] == [0.003]


@pytest.mark.parametrize("level", ["token", "chunk"])
def test_micro_batches_add_up_to_the_gradient_of_the_minibatch(tmp_path, level):
    """15 rows in micro-batches of 4, 4, 4 and 3 with masked tokens, against one of 15."""
    gradients = []
    for micro in (15, 4):
        changes = {"micro_batch_size": micro, "logprob_level": level, "entropy_coef": 0.01, "kl_coef": 0.1}
        trainer = make_trainer(tmp_path / str(micro), algorithm=changes, max_steps=3 * CHUNK - 1)
        batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
        batch = batch.rows(torch.arange(15))
        assert (batch.steps < CHUNK).any()  # an episode that ended inside a chunk
        with torch.no_grad():
            trainer.policy.adapter.add_(0.05)  # ratios away from 1
        reference = trainer.reference_logprobs(batch)
        metrics = trainer.minibatch_gradients(
            type(batch)(**vars(batch) | {"reference_logprobs": reference}), train_actor=True, score_actor=True
        )
        gradients.append(([p.grad.clone() for p in [trainer.policy.adapter, *trainer.critic_parameters]], metrics))
    for whole, parts in zip(gradients[0][0], gradients[1][0], strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)
    for name, value in gradients[0][1].items():
        assert gradients[1][1][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("dims", [[0, 1, 2, 3, 4, 5, 6], [0, 2]])
@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_policy_loss_is_a_mean_over_ratios_whatever_their_level(tmp_path, level, dims):
    """At ratio 1 and equal advantages of 2 the loss is -2, however many tokens were masked."""
    trainer = make_trainer(tmp_path, algorithm={"logprob_level": level, "action_dims": dims}, max_steps=3 * CHUNK - 1)
    batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
    assert (batch.steps < CHUNK).any()
    batch = type(batch)(**vars(batch) | {"advantages": torch.full((len(batch),), 2.0)})
    metrics = trainer.minibatch_gradients(batch, train_actor=True, score_actor=True)
    assert metrics["actor/policy_loss"] == pytest.approx(-2, abs=1e-5)


def test_what_is_learned_does_not_depend_on_the_tokens_of_other_dimensions(tmp_path):
    """Their old log-probabilities, so their ratios, may be anything."""
    gradients = []
    for shift in (0.0, 0.5):
        trainer = make_trainer(tmp_path / str(shift), algorithm={"action_dims": [0, 1, 2]})
        batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
        other = (torch.arange(batch.old_logprobs.shape[1]) % 7) > 2
        batch = type(batch)(**vars(batch) | {"old_logprobs": batch.old_logprobs + shift * other})
        trainer.minibatch_gradients(batch, train_actor=True, score_actor=True)
        gradients.append(trainer.policy.adapter.grad.clone())
    assert gradients[0].abs().max() > 1e-6 and torch.equal(*gradients)


# ------------------------------------------------------------------------------------------------------- value gradient


def adapter_gradient_of_value_loss(folder, **changes):
    trainer = make_trainer(folder, **changes)
    batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
    batch = type(batch)(**vars(batch) | {"advantages": torch.zeros(len(batch))})  # the policy loss has no gradient
    trainer.minibatch_gradients(batch, train_actor=True, score_actor=True)
    return trainer.policy.adapter.grad


def test_value_loss_reaches_the_adapter_unless_frozen_for_the_critic(tmp_path):
    assert adapter_gradient_of_value_loss(tmp_path / "a").abs().sum() > 0
    frozen = adapter_gradient_of_value_loss(tmp_path / "b", algorithm={"freeze_vla_for_critic": True})
    assert frozen.abs().sum() == 0


def test_critic_warmup_trains_only_the_value_head_and_needs_no_forward_but_the_check(tmp_path):
    trainer = make_trainer(tmp_path, algorithm={"critic_warmup_iterations": 1})
    before = trainer.policy.adapter.clone()
    head = [p.clone() for p in trainer.critic_parameters]
    batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
    forwards = trainer.policy.forwards
    metrics = trainer.update(batch)
    assert trainer.policy.forwards - forwards == 2  # first minibatch of 16 in micro-batches of 8
    assert torch.equal(trainer.policy.adapter, before)
    assert not torch.equal(trainer.critic_parameters[0], head[0])
    assert metrics["actor/first_minibatch_ratio_error"] < 1e-4
    trainer.iteration = 1
    trainer.update(batch)
    assert not torch.equal(trainer.policy.adapter, before)


def test_critic_epochs_step_the_value_head_alone_on_the_cached_hidden_states(tmp_path):
    trainer = make_trainer(tmp_path / "a", algorithm={"n_epochs": 1, "minibatch_size": 32, "critic_epochs": 3})
    batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
    adapter, forwards = trainer.policy.adapter.clone(), trainer.policy.forwards
    passes = list(trainer.critic_passes(batch))
    assert len(passes) == 3  # 32 rows in one minibatch
    assert passes[-1]["critic/value_loss"] < passes[0]["critic/value_loss"]
    assert trainer.policy.forwards == forwards
    assert torch.equal(trainer.policy.adapter, adapter)
    assert "critic/passes_value_loss" in trainer.update(batch)
    # the first pass is a full-batch step: the same as that of a critic in warm-up, which has the same loss
    twin = make_trainer(tmp_path / "b", algorithm={"value_coef": 1.0, "critic_warmup_iterations": 1})
    twin.minibatch_gradients(batch, train_actor=False, score_actor=False)
    twin.optimizer_steps(None, train_actor=False)
    for a, b in zip(first_pass(tmp_path / "c", batch), twin.critic_parameters, strict=True):
        torch.testing.assert_close(a, b)


def first_pass(folder, batch):
    trainer = make_trainer(folder, algorithm={"minibatch_size": 32, "critic_epochs": 1})
    list(trainer.critic_passes(batch))
    return trainer.critic_parameters


def test_critic_epochs_count_no_step_of_the_actor_and_mean_nothing_to_grpo(tmp_path):
    make_trainer(tmp_path / "gae", algorithm={"critic_epochs": 5}).train()
    assert {line["actor/optimizer_steps"] for line in training_lines(tmp_path / "gae") if "iteration" in line} == {4}
    states = []
    for epochs in (0, 5):  # an update makes the passes: another head, the same adapter
        trainer = make_trainer(tmp_path / str(epochs), algorithm={"critic_epochs": epochs})
        trainer.update(trainer.compute_advantages(trainer.collect_rollout()[0])[0])
        states.append((trainer.policy.adapter.clone(), trainer.critic_parameters[0].clone()))
    assert torch.equal(states[0][0], states[1][0]) and not torch.equal(states[0][1], states[1][1])
    trainer = make_trainer(tmp_path / "grpo", algorithm={"estimator": "grpo", "critic_epochs": 5})
    assert list(trainer.critic_passes(trainer.compute_advantages(trainer.collect_rollout()[0])[0])) == []


def test_critic_gae_lambda_changes_the_targets_and_not_the_advantages(tmp_path):
    plain, decoupled = (
        make_trainer(tmp_path / str(value), algorithm={"critic_gae_lambda": value, "gae_lambda": 0.5})
        for value in (None, 1.0)
    )
    rollout, _ = plain.collect_rollout()
    before, _ = plain.compute_advantages(rollout)
    after, _ = decoupled.compute_advantages(rollout)
    assert torch.equal(before.advantages, after.advantages)
    assert not torch.allclose(before.returns, after.returns)
    # lambda 1: the discounted rewards to the end of the episode, whatever the values are
    terminated = rollout.stack("terminated")
    t, n = (int(x) for x in terminated.nonzero()[-1])
    assert after.returns.view(terminated.shape)[t, n] == pytest.approx(1.0, abs=1e-6)
    if t > 0 and not (terminated | rollout.stack("truncated"))[t - 1, n]:
        assert after.returns.view(terminated.shape)[t - 1, n] == pytest.approx(0.99, abs=1e-6)


def test_values_of_a_rollout_cost_no_second_forward(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=100 * CHUNK)  # no episode ends: one bootstrap at the end
    rollout, _ = trainer.collect_rollout()
    assert trainer.policy.forwards == len(rollout) + 1
    expected = trainer.value_head(trainer.policy.compute_hidden(rollout.transitions[3].inputs))
    torch.testing.assert_close(rollout.transitions[3].values, expected.detach())


def test_missing_hidden_state_is_computed_from_scratch_with_one_warning(tmp_path, caplog):
    trainer = make_trainer(tmp_path, policy=FakePolicy(gives_hidden=False), max_steps=100 * CHUNK)
    with caplog.at_level(logging.WARNING):
        rollout, _ = trainer.collect_rollout()
    assert trainer.policy.forwards == 2 * len(rollout) + 1
    assert len([r for r in caplog.records if "no hidden state" in r.message]) == 1
    twin = make_trainer(tmp_path / "twin", max_steps=100 * CHUNK)
    torch.testing.assert_close(rollout.stack("values"), twin.collect_rollout()[0].stack("values"))


# -------------------------------------------------------------------------------------------------------------- rollout


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
    trainer = make_trainer(tmp_path, rollout={"n_steps": 7}, algorithm={"bootstrap_truncated": False})
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
    own = trainer.sampling_generators  # of each environment, whoever decides beside it
    assert drawn_from == [own[:2], own[2:]] * 2 and len({generator.initial_seed() for generator in own}) == 4


def test_grpo_plays_whole_groups_from_equal_starts_and_idle_environments_add_no_rows(tmp_path):
    trainer = make_trainer(tmp_path, algorithm={"estimator": "grpo"})
    rollout, metrics = trainer.collect_rollout()
    episode = rollout.rows("episode")
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


# ------------------------------------------------------------------------------------------------------ settings matter


def test_target_kl_stops_the_update_before_the_step(tmp_path):
    trainer = make_trainer(tmp_path, algorithm={"target_kl": 1e-3, "n_epochs": 50}, actor={"learning_rate": 0.1})
    batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
    metrics = trainer.update(batch)
    assert metrics["actor/stopped_by_kl"] == 1
    assert 1 <= metrics["actor/optimizer_steps"] < 100


def test_target_kl_counts_the_minibatch_that_was_too_far_and_never_the_first(tmp_path):
    """A policy whose scores are off by noise, as bfloat16's are, still takes the first step of each update."""
    trainer = make_trainer(
        tmp_path, algorithm={"target_kl": 1e-9, "n_epochs": 2}, **{"policy_settings": {"dtype": "bfloat16"}}
    )
    evaluate_actions = trainer.policy.evaluate_actions

    def noisy(*args, **kwargs):
        evaluation = evaluate_actions(*args, **kwargs)
        noise = 0.01 * torch.randn(evaluation.logprobs.shape, generator=torch.Generator().manual_seed(0))
        return type(evaluation)(evaluation.logprobs + noise, evaluation.entropy, evaluation.hidden)

    trainer.policy.evaluate_actions = noisy
    batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
    metrics = trainer.update(batch)
    assert metrics["actor/optimizer_steps"] == 1
    assert metrics["actor/stopped_by_kl"] == 1
    assert metrics["actor/approx_kl"] > metrics["actor/first_minibatch_kl"] / 2 > 0


def adapter_after_update(folder, **changes):
    trainer = make_trainer(folder, **changes)
    batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
    trainer.update(batch)
    return trainer.policy.adapter.detach().clone()


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"gamma": 0.5}},
        {"algorithm": {"gae_lambda": 0.1}},
        {"algorithm": {"bootstrap_truncated": False}},
        {"algorithm": {"action_dims": [0, 1, 2]}},
        {"algorithm": {"normalize_advantages": False}},
        {"algorithm": {"clip_ratio_low": 0.001}},
        {"algorithm": {"clip_ratio_high": 0.001}},
        {"algorithm": {"logprob_level": "chunk"}},
        {"algorithm": {"value_coef": 0.0}},
        {"algorithm": {"entropy_coef": 1.0}},
        {"algorithm": {"kl_coef": 1.0}},
        {"algorithm": {"n_epochs": 3}},
        {"algorithm": {"minibatch_size": 32}},
        {"algorithm": {"freeze_vla_for_critic": True}},
        {"algorithm": {"critic_gae_lambda": 0.0}},
        {"actor": {"learning_rate": 0.02}},
        {"actor": {"weight_decay": 0.5}},
        {"actor": {"beta1": 0.5}},
        {"actor": {"eps": 1e-2}},
        {"actor": {"max_grad_norm": 1e-4, "eps": 1e-3}},
        {"rollout": {"temperature": 2.0}},
        {"rollout": {"n_steps": 4}},
        {"run": {"seed": 4}},
        {"env": {"initial_states": [7]}},
    ],
    ids=str,
)
def test_each_learning_setting_changes_what_is_learned(tmp_path, changes):
    merged = {"algorithm": {"minibatch_size": 8}} | changes
    if "algorithm" in changes:
        merged["algorithm"] = {"minibatch_size": 8} | changes["algorithm"]
    base = adapter_after_update(tmp_path / "base", algorithm={"minibatch_size": 8})
    assert torch.equal(base, adapter_after_update(tmp_path / "again", algorithm={"minibatch_size": 8}))
    assert not torch.equal(base, adapter_after_update(tmp_path / "changed", **merged))


# -------------------------------------------------------------------------------------------------- stop, resume, guard


def final_state(trainer):
    return [p.detach().clone() for p in [*trainer.actor_parameters, *trainer.critic_parameters]]


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_stopped_and_resumed_run_equals_one_that_was_not(tmp_path, estimator):
    """Stopped in the middle of the third rollout; max_steps makes episodes span iterations."""
    changes = {
        "algorithm": {"estimator": estimator, "n_epochs": 2},
        "run": {"timesteps": 5 * 4 * 8 * CHUNK},
        "max_steps": 11 * CHUNK,
        "evaluate": True,
        "eval": {"interval": 2},
        "logging": {"checkpoint_interval": 100},
    }
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.train()

    stopped = make_trainer(tmp_path / "stopped", **changes)
    act, calls = stopped.policy.act, []

    def act_and_stop(*args, **kwargs):
        calls.append(1)
        if stopped.iteration == 2 and stopped.evaluated_iteration == 2 and len(calls) % 3 == 0:
            stopped.request_stop()
        return act(*args, **kwargs)

    stopped.policy.act = act_and_stop
    stopped.train()
    assert stopped.iteration == 2

    checkpoint = find_checkpoint(tmp_path / "stopped")
    resumed = make_trainer(tmp_path / "stopped", **changes)
    resumed.load_checkpoint(checkpoint)
    resumed.train()
    assert resumed.iteration == whole.iteration
    assert all(torch.equal(a, b) for a, b in zip(final_state(resumed), final_state(whole), strict=True))
    assert training_lines(tmp_path / "stopped") == training_lines(tmp_path / "whole")


def test_stop_in_the_middle_of_an_update_saves_the_state_before_it(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_iteration()
    expected = final_state(trainer)
    steps = trainer.optimizer_steps

    def step_and_stop(*args):
        trainer.request_stop()
        return steps(*args)

    trainer.optimizer_steps = step_and_stop
    trainer.evaluated_iteration = 1
    trainer.train()
    assert trainer.iteration == 1
    resumed = make_trainer(tmp_path)
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(final_state(resumed), expected, strict=True))


def test_resume_takes_the_learning_rate_of_the_settings_not_of_the_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_iteration()
    trainer.save_checkpoint()
    resumed = make_trainer(tmp_path, actor={"learning_rate": 1e-6, "weight_decay": 0.1}, critic={"beta1": 0.5})
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    (actor,), (critic,) = resumed.actor_optimizer.param_groups, resumed.critic_optimizer.param_groups
    assert (actor["lr"], actor["weight_decay"], critic["betas"]) == (1e-6, 0.1, (0.5, 0.999))
    moments = resumed.actor_optimizer.state[resumed.policy.adapter]["exp_avg"]
    assert torch.equal(moments, trainer.actor_optimizer.state[trainer.policy.adapter]["exp_avg"])


def test_run_stopped_in_its_first_iteration_does_not_repeat_the_first_evaluation(tmp_path):
    changes = {"evaluate": True, "run": {"timesteps": 4 * 8 * CHUNK}}
    stopped = make_trainer(tmp_path / "stopped", **changes)
    step = stopped.envs.step_async
    stopped.envs.step_async = lambda *args: (stopped.request_stop(), step(*args))[1]
    stopped.train()
    resumed = make_trainer(tmp_path / "stopped", **changes)
    resumed.load_checkpoint(find_checkpoint(tmp_path / "stopped"))
    resumed.train()
    whole = make_trainer(tmp_path / "whole", **changes)
    whole.train()
    assert training_lines(tmp_path / "stopped") == training_lines(tmp_path / "whole")


def test_checkpoint_of_another_model_or_estimator_is_refused(tmp_path):
    make_trainer(tmp_path).save_checkpoint()
    with pytest.raises(CheckpointError, match="does not fit this run"):
        make_trainer(tmp_path / "b", value_head={"hidden_sizes": [16]}).load_checkpoint(find_checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match="does not fit this run"):
        make_trainer(tmp_path / "c", algorithm={"estimator": "grpo"}).load_checkpoint(find_checkpoint(tmp_path))


def test_nan_loss_stops_the_run_names_it_and_saves_the_last_good_state(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_iteration()
    good = final_state(trainer)
    evaluate_actions, calls = trainer.policy.evaluate_actions, []

    def broken(*args, **kwargs):
        calls.append(1)
        evaluation = evaluate_actions(*args, **kwargs)
        factor = torch.nan if len(calls) > 5 else 1.0  # after some good optimizer steps
        return type(evaluation)(evaluation.logprobs * factor, evaluation.entropy, evaluation.hidden)

    trainer.policy.evaluate_actions = broken
    with pytest.raises(NonFiniteError, match="actor/policy_loss is not finite in iteration 2"):
        trainer.train()
    dump = torch.load(tmp_path / "nonfinite_iteration_000002.pt", weights_only=True)
    assert dump["action_tokens"].shape == (16, 7 * CHUNK)
    resumed = make_trainer(tmp_path)
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(final_state(resumed), good, strict=True))


def test_any_failure_saves_the_last_good_state(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_iteration()
    good = final_state(trainer)
    trainer.evaluated_iteration = 1

    def dies(actions, active):
        with torch.no_grad():  # what lives on the device is lost, as after a CUDA error: only the copy is sound
            trainer.policy.adapter.fill_(torch.nan)
        trainer.actor_optimizer.state.clear()
        raise SimulatorDied("simulator worker 2 died")

    trainer.envs.step_async = dies
    with pytest.raises(SimulatorDied, match="worker 2 died"):
        trainer.train()
    resumed = make_trainer(tmp_path)
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(final_state(resumed), good, strict=True))


def test_error_after_a_stop_was_asked_for_is_still_an_error_but_for_simulators_that_got_the_signal_too(tmp_path):
    for error, raised in ((ValueError("a bug"), True), (SimulatorDied("worker 0 died"), False)):
        trainer = make_trainer(tmp_path / type(error).__name__)

        def dies(actions, active, trainer=trainer, error=error):
            trainer.request_stop()
            raise error

        trainer.envs.step_async = dies
        if raised:
            with pytest.raises(ValueError, match="a bug"):
                trainer.train()
        else:
            trainer.train()
        assert find_checkpoint(tmp_path / type(error).__name__).name == "iteration-000000"


def test_failing_save_does_not_hide_what_went_wrong(tmp_path, caplog):
    trainer = make_trainer(tmp_path)

    def no_room(folder, values=None):
        raise OSError(28, "No space left on device")

    def disk_and_simulator_fail(actions, active):
        trainer.policy.save_adapter = no_room
        raise ZeroDivisionError

    trainer.envs.step_async = disk_and_simulator_fail
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert "could not be saved" in caplog.text
    saved = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert saved == ["iteration-000000"]  # before the first iteration; nothing half written stays


def test_a_rollout_without_reward_is_told(tmp_path, caplog):
    trainer = make_trainer(tmp_path)
    rollout, _ = trainer.collect_rollout()
    trainer.compute_advantages(rollout)
    assert ("no reward in this rollout" in caplog.text) is not bool(rollout.stack("rewards").any())
    caplog.clear()
    rollout.stack = lambda name, stack=rollout.stack: stack(name) * 0 if name == "rewards" else stack(name)
    trainer.compute_advantages(rollout)
    assert "no reward in this rollout" in caplog.text


def test_nan_gradient_is_not_stepped(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.policy.adapter.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NonFiniteError, match="actor/grad_norm"):
        trainer.train_iteration()
    assert torch.isfinite(trainer.policy.adapter).all()


def test_nan_logprobs_in_a_rollout_stop_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    act = trainer.policy.act

    def broken(*args, **kwargs):
        output = act(*args, **kwargs)
        output.logprobs[0, 0] = torch.nan
        return output

    trainer.policy.act = broken
    with pytest.raises(NonFiniteError, match="log-probabilities of the rollout"):
        trainer.train_iteration()


# -------------------------------------------------------------------------------------------------------------- outputs


def test_run_leaves_metrics_checkpoints_curves_and_config(tmp_path):
    make_trainer(tmp_path, evaluate=True, eval={"interval": 1, "video": True}).train()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [0, 1, 1, 2, 2, 3, 3]
    assert all("timesteps" in line for line in lines)
    training = [line for line in lines if "rollout/return" in line]
    for name in [
        "rollout/success_rate",
        "rollout/return",
        "rollout/length",
        "rollout/env_steps_per_s",
        "actor/policy_loss",
        "actor/approx_kl",
        "actor/clip_fraction",
        "actor/entropy",
        "actor/grad_norm",
        "actor/first_minibatch_ratio_error",
        "critic/value_loss",
        "critic/explained_variance",
        "critic/grad_norm",
        "time/rollout_s",
        "time/update_s",
    ]:
        assert all(isinstance(line[name], float) for line in training), name
    for name in ("eval/success_rate_greedy", "eval/success_rate_sampled"):
        assert isinstance(lines[-1][name], float)
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for name in {name for line in lines for name in line}:
        assert f"`{name}`" in documented or f"`{re.sub('greedy|sampled', 'MODE', name)}`" in documented, name
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [f"iteration-{i:06d}" for i in range(4)]
    assert list((tmp_path / "videos").glob("*.mp4"))


def test_evaluation_does_not_change_the_training_that_follows(tmp_path):
    trainers = [make_trainer(tmp_path / str(e), evaluate=e, eval={"interval": 1}) for e in (False, True)]
    for trainer in trainers:
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(*map(final_state, trainers), strict=True))


def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer = make_trainer(tmp_path / name, run={"seed": seed})
        trainer.train()
        runs.append(trainer.policy.adapter.detach())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert np.isfinite(runs[0].numpy()).all()


def test_real_policy_makes_good_tokens_likelier_and_bad_ones_rarer(tmp_path):
    """The sign, through losses, trainer, LoRA and the whole network: rows with A = +1 gain log-probability, others lose."""
    torch.manual_seed(0)
    policy = OpenVLAPolicy.from_checkpoint(
        "tiny-openvla-random", "parallel", lora=LoraConfig(rank=8), chunk_size=CHUNK, unnorm_key="libero_spatial"
    )
    base = {name: p.clone() for name, p in policy.network.named_parameters() if not p.requires_grad}
    changes = {"n_epochs": 4, "value_coef": 0.0, "minibatch_size": 16, "micro_batch_size": 8}
    trainer = make_trainer(
        tmp_path, policy=policy, rollout={"n_steps": 4}, algorithm=changes, actor={"learning_rate": 1e-3}
    )
    batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
    signs = torch.where(torch.arange(len(batch)) % 2 == 0, 1.0, -1.0)
    metrics = trainer.update(type(batch)(**vars(batch) | {"advantages": signs}))
    assert metrics["actor/first_minibatch_ratio_error"] < 1e-4
    with torch.no_grad():
        after = policy.evaluate_actions(batch.inputs, batch.action_tokens, temperature=1.0).logprobs
    change = (after - batch.old_logprobs).mean(dim=1)  # per row
    assert (change[signs > 0] > 0).all()
    assert (change[signs < 0] < 0).all()
    assert all(torch.equal(p, base[n]) for n, p in policy.network.named_parameters() if not p.requires_grad)


# ------------------------------------------------------------------------------- settings of evaluation and of outputs


def evaluation_of(folder, **changes):
    trainer = make_trainer(folder, evaluate=True, run={"timesteps": 0}, **{"eval": {}} | changes)
    seen, act = [], trainer.policy.act
    trainer.policy.act = lambda obs, **kwargs: (seen.append(kwargs), act(obs, **kwargs))[1]
    trainer.train()
    return read_metrics(folder / "metrics.jsonl")[0], seen


def test_evaluation_plays_the_modes_and_states_that_are_set(tmp_path):
    line, seen = evaluation_of(tmp_path / "a", eval={"modes": ["sampled"], "states": "3-7"})
    assert line["eval/episodes_sampled"] == 5 and "eval/success_rate_greedy" not in line
    assert not any(kwargs["greedy"] for kwargs in seen)
    line, seen = evaluation_of(tmp_path / "b", eval={"modes": ["greedy"]}, env={"task_ids": [0, 2]})
    assert line["eval/episodes_greedy"] == 8 and all(kwargs["greedy"] for kwargs in seen)


def test_evaluation_samples_at_its_own_temperature_or_at_the_rollouts(tmp_path):
    rollout = {"temperature": 1.5}
    _, seen = evaluation_of(tmp_path / "a", rollout=rollout, eval={"modes": ["sampled"]})
    assert {kwargs["temperature"] for kwargs in seen} == {1.5}
    _, seen = evaluation_of(tmp_path / "b", rollout=rollout, eval={"modes": ["sampled"], "temperature": 0.6})
    assert {kwargs["temperature"] for kwargs in seen} == {0.6}


def test_evaluation_interval_counts_iterations(tmp_path):
    trainer = make_trainer(tmp_path, evaluate=True, run={"timesteps": 5 * 4 * 8 * CHUNK}, eval={"interval": 2})
    trainer.train()
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "eval/success_rate_greedy" in line]
    assert [line["iteration"] for line in lines] == [0, 2, 4, 5]


def test_checkpoints_and_curves_come_at_their_intervals_and_only_the_newest_are_kept(tmp_path):
    logging_settings = {"checkpoint_interval": 2, "keep_checkpoints": 2, "curves_interval": 3}
    trainer = make_trainer(tmp_path, run={"timesteps": 7 * 4 * 8 * CHUNK}, logging=logging_settings)
    drawn = []
    trainer.logger.draw_curves = lambda: drawn.append(trainer.iteration)
    trainer.train()
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["iteration-000006", "iteration-000007"]
    assert drawn == [3, 6, 7]
