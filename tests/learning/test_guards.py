"""A first minibatch that is not on policy stops the trainer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.fakes import FakePolicy
from tests.trainers import make_trainer, training_lines
from vla_rl.learning.guards import check_first_minibatch, check_rescored
from vla_rl.learning.rollout_buffer import Minibatch
from vla_rl.types import InvariantError


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


class Rounding(FakePolicy):
    """Acts with log-probabilities that are a little off those that it scores, as decoding in bfloat16."""

    def act(self, *args, **kwargs):
        output = super().act(*args, **kwargs)
        return replace(output, logprobs=output.logprobs + 5e-4)


def test_recomputed_log_probabilities_begin_an_update_at_ratio_one(tmp_path):
    for recompute in (False, True):
        changes = {"algorithm": {"recompute_logprobs": recompute, "kl_coef": 0.1}}
        trainer = make_trainer(tmp_path / str(recompute), policy=Rounding(), **changes)
        trainer.train()
        for line in training_lines(tmp_path / str(recompute)):
            assert line["actor/first_minibatch_ratio_error"] == pytest.approx(0 if recompute else 5e-4, abs=2e-5)
            assert line.get("actor/rollout_ratio_error", 5e-4) == pytest.approx(5e-4, abs=2e-5)
            assert ("actor/rollout_ratio_error" in line) == (recompute and line["actor/optimizer_steps"] > 0)


def test_recomputing_hides_no_other_distribution(tmp_path):
    class Wrong(FakePolicy):
        def act(self, *args, temperature, **kwargs):
            return super().act(*args, temperature=temperature * 1.1, **kwargs)

    with pytest.raises(InvariantError, match="sampled"):
        make_trainer(tmp_path, policy=Wrong(), algorithm={"recompute_logprobs": True}).train()


def test_the_error_of_a_rollout_is_the_mean_over_tokens_that_were_acted_on():
    old = torch.zeros(2, 14)
    batch = Minibatch(None, None, old, torch.zeros(2, 1), torch.tensor([2, 1]), torch.zeros(2), None, None)
    logprobs = torch.full((2, 14), math.log(1.0005))
    logprobs[1, 7:] = 5.0  # of the second action, which was not executed
    metrics = check_rescored(batch, logprobs, 2, "float32")
    assert metrics == {"actor/rollout_ratio_error": pytest.approx(5e-4, rel=1e-3)}
    with pytest.raises(InvariantError, match="ratio_error"):
        check_rescored(batch, logprobs + 0.01, 2, "float32")
    with pytest.raises(InvariantError, match="kl"):
        check_rescored(batch, logprobs + 0.2, 2, "bfloat16")


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
