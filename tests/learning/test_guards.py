"""Numbers that are not finite and a first minibatch that is not on policy stop the trainer."""

from __future__ import annotations

import pytest
import torch

from tests.fakes import CHUNK, FakePolicy
from tests.trainers import final_state, make_trainer, training_lines
from vla_rl.learning.guards import check_finite, check_first_minibatch
from vla_rl.run.checkpoint import find_checkpoint
from vla_rl.types import InvariantError, NonFiniteError


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


@pytest.mark.parametrize("tokens", [1, 7, 14])
def test_in_bfloat16_the_first_minibatchs_kl_is_what_is_checked(tokens):
    noisy = {"actor/ratio_error": 0.069, "actor/approx_kl": 4e-4 * tokens}  # the 7B model's, with a token for a ratio
    check_first_minibatch(noisy, tokens, dtype="bfloat16")
    with pytest.raises(InvariantError, match=r"first_minibatch_ratio_error is 6\.90e-02"):
        check_first_minibatch(noisy, tokens, dtype="float32")
    with pytest.raises(InvariantError, match=r"first_minibatch_kl is .* expected below 1e-02 a token"):
        check_first_minibatch(noisy | {"actor/approx_kl": 1.1e-2 * tokens}, tokens, dtype="bfloat16")


def test_scoring_at_another_temperature_stops_a_bfloat16_run_too(tmp_path):
    trainer = make_trainer(tmp_path, policy_settings={"dtype": "bfloat16"})
    evaluate_actions = trainer.policy.evaluate_actions
    trainer.policy.head.data.mul_(20)  # a sharp distribution, as a trained policy has
    trainer.policy.evaluate_actions = lambda *args, temperature: evaluate_actions(*args, temperature=1.5 * temperature)
    with pytest.raises(InvariantError, match="first_minibatch_kl"):
        trainer.train_iteration()


def test_a_value_that_is_not_finite_is_named_with_its_iteration(tmp_path):
    check_finite("critic/value_loss", torch.tensor(1.0), 3, tmp_path)
    with pytest.raises(NonFiniteError, match="critic/value_loss is not finite in iteration 3"):
        check_finite("critic/value_loss", torch.tensor([1.0, torch.inf]), 3, tmp_path)
