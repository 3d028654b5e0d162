"""The trainer itself, on a small environment and a small policy; tests/test_end_to_end.py runs it on LIBERO."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.fakes import CHUNK
from tests.trainers import make_trainer, training_lines, with_values
from vla_rl.learning.rollout_buffer import Minibatch
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.reports.records import read_metrics
from vla_rl.run.settings import LoraConfig


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


def test_each_optimizer_changes_its_own_parameters_and_no_other(tmp_path):
    trainer = with_values(make_trainer(tmp_path))
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
    actor = {"learning_rate": 0.01, "schedule": "linear"}
    trainer = make_trainer(tmp_path, actor=actor, run={"timesteps": 400})
    rates, expected = [], []
    while trainer.timesteps < 400:
        expected.append(0.01 * (1 - trainer.timesteps / 400))
        trainer.train_iteration()
        rates.append(read_metrics(tmp_path / "metrics.jsonl")[-1]["actor/learning_rate"])
        assert [group["lr"] for group in trainer.actor_optimizer.param_groups] == [rates[-1]]
    assert len(rates) > 2 and rates[0] == 0.01 and rates == pytest.approx(expected)
    assert [group["lr"] for group in trainer.critic_optimizer.param_groups] == [0.003]


def test_the_temperature_falls_in_the_last_third_and_a_resume_goes_on_with_it(tmp_path):
    """The rollout's and the update's are the same: the first minibatch's ratios are 1. And it is a dump's."""
    run, rollout = {"timesteps": 600}, {"temperature": 1.0, "final_temperature": 0.5}
    trainer, acted = make_trainer(tmp_path / "a", run=run, rollout=rollout), []
    act = trainer.policy.act
    trainer.policy.act = lambda *args, **kwargs: acted.append(kwargs["temperature"]) or act(*args, **kwargs)
    began, metrics = [], []
    while trainer.timesteps < 600:
        began.append(trainer.timesteps)
        trainer.train_iteration()
        metrics.append(read_metrics(tmp_path / "a" / "metrics.jsonl")[-1])
        assert {*acted} == {metrics[-1]["rollout/temperature"]}
        acted.clear()
        assert metrics[-1]["actor/first_minibatch_ratio_error"] < 1e-5
        if trainer.timesteps < 500:
            saved = trainer.save_checkpoint()
    temperatures = [m["rollout/temperature"] for m in metrics]
    assert temperatures == pytest.approx([1 - 0.5 * max(0, 3 * t / 600 - 2) for t in began])
    assert temperatures[0] == 1 and 0.5 < temperatures[-1] < 0.9
    resumed = make_trainer(tmp_path / "b", run=run, rollout=rollout)
    resumed.load_checkpoint(saved)
    assert resumed.temperature == temperatures[began.index(resumed.timesteps)]
    dumped = torch.load(resumed.finite.dump("a loss", "update", {}), weights_only=True)["settings"]["rollout"]
    assert (dumped["temperature"], dumped["final_temperature"]) == (resumed.temperature, None)


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
        reference = trainer.micro_batches.score(batch, trainer.policy.reference_logprobs, 1.0, trainer.ranks)
        metrics = trainer.minibatch_gradients(
            type(batch)(**vars(batch) | {"reference_logprobs": reference}), train_actor=True, score_actor=True
        )
        gradients.append(([p.grad.clone() for p in [trainer.policy.adapter, *trainer.critic_parameters]], metrics))
    for whole, parts in zip(gradients[0][0], gradients[1][0], strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)
    for name, value in gradients[0][1].items():
        assert gradients[1][1][name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_a_minibatch_is_copied_to_the_device_once_and_its_parts_are_read_there(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, algorithm={"micro_batch_size": 4})
    copied, scored, to, score = [], [], Minibatch.to, trainer.policy.evaluate_actions
    monkeypatch.setattr(Minibatch, "to", lambda self, device: copied.append(to(self, device)) or copied[-1])

    def watched(inputs, *args, **kwargs):
        scored.append(inputs.images.untyped_storage().data_ptr())
        return score(inputs, *args, **kwargs)

    trainer.policy.evaluate_actions = watched
    trainer.update(trainer.compute_advantages(trainer.collect_rollout()[0])[0])
    assert len(copied) == 2 * 2 and len(scored) == 16  # 32 rows in minibatches of 16 and micro-batches of 4, 2 epochs
    assert scored == [batch.inputs.images.untyped_storage().data_ptr() for batch in copied for _ in range(4)]


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


@pytest.mark.parametrize("coefficient", ["entropy_coef", "kl_coef"])
def test_entropy_bonus_and_kl_penalty_are_of_the_dimensions_that_are_learned(tmp_path, coefficient):
    """What the head says of the other dimensions may be anything."""
    gradients = []
    for scale in (1.0, 3.0):
        algorithm = {"action_dims": [0, 1, 2], coefficient: 1.0}
        trainer = make_trainer(tmp_path / str(scale), algorithm=algorithm)
        with torch.no_grad():
            trainer.policy.adapter.add_(0.1)  # another policy than the base, so that the penalty has a gradient
        batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
        other = ((torch.arange(batch.old_logprobs.shape[1]) % 7) > 2).repeat_interleave(4)  # four bins a token
        batch = type(batch)(
            **vars(batch)
            | {
                "reference_logprobs": trainer.micro_batches.score(
                    batch, trainer.policy.reference_logprobs, 1.0, trainer.ranks
                )
            }
        )
        trainer.policy.head.data[:, other] *= scale
        trainer.minibatch_gradients(batch, train_actor=True, score_actor=True)
        gradients.append(trainer.policy.adapter.grad.clone())
    assert gradients[0].abs().max() > 1e-6 and torch.allclose(*gradients, atol=1e-7)


def adapter_gradient_of_value_loss(folder, **changes):
    trainer = with_values(make_trainer(folder, **changes))
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
    twin.optimizer_steps(train_actor=False)
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
    trainer = with_values(make_trainer(folder, **changes))
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
        {"actor": {"schedule": "kl", "kl_target": 1e-4}},
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
