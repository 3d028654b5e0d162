"""The tiny update: each item of the checklist passes on the shipped trainer, and fails where that one thing is broken."""

from types import SimpleNamespace

import pytest
import torch

from OpenVLA_PPO import OpenVLAPPO
from tests.fakes import FakePolicy, make_envs
from tests.trainers import settings
from vla_rl.learning import estimators
from vla_rl.model.value_head import ValueHead
from vla_rl.preflight import trial as trials
from vla_rl.preflight.trial import Trial, digest, plain_advantages, trial_settings
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run.settings import ConfigError
from vla_rl.types import InvariantError


def make_trial(folder, policy=None, collect=True, **changes) -> Trial:
    config = settings(**changes)
    policy, tiny = policy or FakePolicy(), trial_settings(config)
    head = ValueHead(policy.hidden_size, [32]) if config.algorithm.estimator == "gae" else None
    folder.mkdir(exist_ok=True)
    envs, eval_envs = make_envs(config.rollout.num_envs), make_envs(config.eval.num_envs)
    trial = Trial(OpenVLAPPO(tiny, policy, head, envs, eval_envs, MetricsLogger(folder, tiny)), config)
    if collect:
        trial.collect()
    return trial


GRPO = {"algorithm": {"estimator": "grpo"}}
CHECKS = [
    trials.check_learning_rates,
    trials.check_advantages,
    trials.check_hidden,
    trials.check_ratio,
    trials.check_value_head,
    trials.check_values,
    trials.check_gradients,
]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rollout": {"overlap": True}},
        {"algorithm": {"normalize_advantages": False, "critic_gae_lambda": 1.0, "critic_epochs": 3, "n_epochs": 1}},
        {"algorithm": {"kl_coef": 0.1, "recompute_logprobs": True, "freeze_vla_for_critic": True}},
        {"algorithm": {"wait_for_reward": True, "critic_warmup_iterations": 5}, "actor": {"schedule": "linear"}},
        GRPO,
    ],
)
def test_the_shipped_trainer_passes_with_all_kinds_of_settings(changes, tmp_path):
    trial = make_trial(tmp_path, **changes)
    trial.learn()
    found = [check(trial) for check in CHECKS]
    assert all(found)
    assert sum("no critic" in text for text in found) == (4 if changes is GRPO else 0)
    trial.save()
    trial.evaluate()
    trial.measure()
    assert trial.checkpoint_bytes > 1000 and trial.row_s > 0 and trial.decision_s > 0 and trial.eval_decision_s > 0
    assert (trial.score_s > 0) == ("kl_coef" in changes.get("algorithm", {}))
    assert (trial.critic_step_s > 0) == ("critic_epochs" in changes.get("algorithm", {}))
    assert trial.row_bytes == 8 * 8 * 3 + 8 * 4 + 14 * (8 + 4) + (16 if changes is not GRPO else 0) * 4 + 8 + (
        4 if changes is GRPO else 8
    )


def test_a_trial_has_the_runs_own_networks_environments_and_sizes():
    config = settings(env={"max_steps": 50}, eval={"num_envs": 2, "states": "0-40"}, logging={"wandb": True})
    tiny = trial_settings(config)
    assert (tiny.policy, tiny.value_head, tiny.actor, tiny.critic) == (
        *(config.policy, config.value_head, config.actor, config.critic),
    )
    assert (tiny.rollout.n_steps, tiny.rollout.num_envs, tiny.env.max_steps) == (4, config.rollout.num_envs, 50)
    assert tiny.algorithm.minibatch_size == config.algorithm.minibatch_size
    assert (tiny.eval.states, tiny.eval.max_steps, tiny.logging.wandb) == ([0, 1, 2, 3], 8, False)
    assert trial_settings(settings(**GRPO)).env.max_steps == 8  # whole episodes


def broken_learning_rate(trial):
    trial.trainer.critic_optimizer.param_groups[0]["lr"] = 0.5


def optimizer_of_other_weights(trial):
    trial.trainer.actor_optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.01})


@pytest.mark.parametrize(
    ("breaks", "words"),
    [(broken_learning_rate, "critic.learning_rate=0.003"), (optimizer_of_other_weights, "has 2 tensors, not the 1")],
)
def test_an_optimizer_with_another_rate_or_other_weights_is_told(breaks, words, tmp_path):
    trial = make_trial(tmp_path, collect=False)
    breaks(trial)
    with pytest.raises(ConfigError, match=words):
        trials.check_learning_rates(trial)


def test_a_policy_that_gives_no_hidden_state_costs_a_second_forward(tmp_path):
    trial = make_trial(tmp_path, FakePolicy(gives_hidden=False))
    trial.learn()
    with pytest.raises(ConfigError, match="second forward"):
        trials.check_hidden(trial)


def test_a_second_forward_in_a_call_or_in_the_update_is_counted(tmp_path):
    trial = make_trial(tmp_path)
    trial.learn()
    trial.watch.sees_forwards, trial.forwards = True, (8, 5, 1)
    with pytest.raises(ConfigError, match="8 forwards of the network in 5 calls"):
        trials.check_hidden(trial)
    trial.forwards, trial.second_forwards = (5, 5, 1), 3
    with pytest.raises(ConfigError, match="3 forwards for hidden states in the update"):
        trials.check_hidden(trial)


def test_forwards_of_a_network_are_seen_where_there_is_one_that_is_not_compiled():
    class Policy(FakePolicy):
        network = SimpleNamespace(embed=lambda: None)
        compiled = False

    watch = trials.Watch(policy := Policy())
    policy.network.embed()
    assert watch.sees_forwards and watch.forwards == 1
    Policy.compiled = True
    assert not trials.Watch(Policy()).sees_forwards


def test_another_lambda_than_the_one_that_is_set_is_not_gae(tmp_path, monkeypatch):
    shipped = estimators.compute_gae
    monkeypatch.setattr(estimators, "compute_gae", lambda *args: shipped(*args[:-1], 0.5))
    trial = make_trial(tmp_path)
    trial.learn()
    with pytest.raises(ConfigError, match="GAE differs"):
        trials.check_advantages(trial)


def test_advantages_of_one_sign_are_not_relative_to_a_group(tmp_path):
    trial = make_trial(tmp_path, **GRPO)
    trial.learn()
    trial.batch.advantages.abs_()
    with pytest.raises(ConfigError, match="expected both signs"):
        trials.check_advantages(trial)


def test_actions_that_are_scored_otherwise_than_sampled_end_the_update(tmp_path):
    policy = FakePolicy()
    scored = policy.evaluate_actions
    policy.evaluate_actions = lambda inputs, tokens, temperature: scored(inputs, tokens, temperature=1.5 * temperature)
    with pytest.raises(InvariantError, match="another temperature"):
        make_trial(tmp_path, policy).learn()


def test_a_value_head_that_does_not_begin_at_0_or_stays_there_is_told(tmp_path):
    trial = make_trial(tmp_path)
    trial.learn()
    trial.values_before = torch.ones_like(trial.values_before)
    with pytest.raises(ConfigError, match="values begin at up to 1"):
        trials.check_value_head(trial)
    trial.values_after[0] = 0
    with pytest.raises(ConfigError, match="1 of 16 values are still 0"):
        trials.check_values(trial)


def change_base(trial):
    trial.trainer.policy.base.data[1, 3] += 1e-6


def freeze_adapter(trial):
    trial.trainer.actor_optimizer.param_groups.clear()


def freeze_head(trial):
    trial.trainer.critic_optimizer.param_groups.clear()


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (change_base, "1 frozen tensors have changed, such as base"),
        (freeze_adapter, "0 of 1 LoRA tensors"),
        (freeze_head, "0 of 4 of the value head moved, not value_head.mlp"),
    ],
)
def test_what_moves_is_what_should_move_and_nothing_else(breaks, words, tmp_path):
    trial = make_trial(tmp_path)
    steps = trial.trainer.optimizer_steps

    def broken(*args):
        breaks(trial)
        return steps(*args)

    trial.trainer.optimizer_steps = broken
    trial.learn()
    with pytest.raises(ConfigError, match=words):
        trials.check_gradients(trial)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
def test_a_digest_tells_every_bit_and_every_place(dtype):
    torch.manual_seed(0)
    tensor = torch.randint(0, 2, (7, 9)).to(dtype)
    same = digest(tensor.clone(), part=5)
    assert digest(tensor) == same  # in parts or whole
    for place in range(63):
        other = tensor.clone().flatten()
        other[place] = 1 - other[place].to(torch.int64)
        assert digest(other) != same
    assert digest(tensor.flatten().flip(0)) != same
    assert digest(torch.tensor(3.0)) == digest(torch.tensor([3.0]))  # a buffer without dimensions


def test_gae_without_values_is_a_plain_sum():
    """By hand, gamma x lambda = 0.5: 1 + 0.5 x 2 + 0.25 x 4 = 3; the other environment's first episode ends after one step."""
    rewards = torch.tensor([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    done = torch.tensor([[False, True], [False, False], [False, False]])
    assert plain_advantages(rewards, done, 0.5).tolist() == [[3.0, 1.0], [4.0, 4.0], [4.0, 4.0]]
