"""Numbers that are not finite stop the trainer, with what gave them, the checkpoint to go on with, and a dump."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.fakes import CHUNK
from tests.trainers import final_state, make_trainer
from vla_rl.learning.finite import check_finite, is_finite
from vla_rl.run.checkpoint import find_checkpoint, list_checkpoints
from vla_rl.types import NonFiniteError


def said(trainer, work=None):
    """What the error that ends the trainer's work says, and its dump."""
    with pytest.raises(NonFiniteError) as caught:
        (work or trainer.train)()
    dumps = list(trainer.logger.folder.glob("nonfinite_*.pt"))
    return str(caught.value), torch.load(dumps[0], weights_only=True) if dumps else None


def spoil(trainer, method, change, after=0):
    """From its call number `after` on, a method of the policy gives what `change` makes of its result."""
    real, calls = getattr(trainer.policy, method), []

    def spoilt(*args, **kwargs):
        calls.append(1)
        result = real(*args, **kwargs)
        return change(result) if len(calls) > after else result

    setattr(trainer.policy, method, spoilt)


def with_nan(array):
    array = array.copy() if isinstance(array, np.ndarray) else array.clone()
    array[-1, ..., 0] = float("nan")
    return array


def test_nan_loss_stops_the_run_names_it_and_saves_the_last_good_state(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_iteration()
    good = final_state(trainer)
    spoil(trainer, "evaluate_actions", lambda e: replace(e, logprobs=e.logprobs * torch.nan), after=5)
    text, dump = said(trainer)
    assert text.startswith(
        "actor/policy_loss is not finite in iteration 2: its rows and the weights are finite. Resume with a "
    )
    assert f"python -m vla_rl.replay {tmp_path / 'nonfinite_iteration_000002.pt'}" in text
    assert (dump["name"], dump["kind"]) == ("actor/policy_loss is not finite", "update")
    assert dump["minibatch"]["action_tokens"].shape == (16, 7 * CHUNK)
    assert torch.equal(dump["adapter"][0], trainer.policy.adapter) and dump["settings"]["run"]["seed"] == 3
    resumed = make_trainer(tmp_path)
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(final_state(resumed), good, strict=True))


def test_nan_gradient_is_not_stepped(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.policy.adapter.register_hook(lambda gradient: gradient * torch.nan)
    text, _ = said(trainer, trainer.train_iteration)
    assert "actor/grad_norm is not finite" in text and "actor.learning_rate" in text
    assert torch.isfinite(trainer.policy.adapter).all()


def test_rows_that_are_not_finite_are_named(tmp_path):
    trainer = make_trainer(tmp_path)
    real = trainer.compute_advantages

    def spoilt(rollout):
        batch, metrics = real(rollout)
        return replace(batch, returns=batch.returns / 0), metrics

    trainer.compute_advantages = spoilt
    text, _ = said(trainer)
    assert "critic/value_loss is not finite in iteration 1: of its rows, returns is not finite" in text
    assert "critic.learning_rate" in text


def test_a_pass_of_the_value_head_alone_is_checked_too(tmp_path):
    trainer = make_trainer(tmp_path, algorithm={"critic_epochs": 1, "n_epochs": 1})
    real, passes = trainer.critic_passes, []

    def critic_passes(batch):
        trainer.value_head.register_forward_hook(lambda *args: args[-1] * torch.nan)
        passes.append(1)
        return real(batch)

    trainer.critic_passes = critic_passes
    _, dump = said(trainer)
    assert passes and dump["kind"] == "critic" and dump["hidden"].shape == (16, 16) and dump["returns"].shape == (16,)


@pytest.mark.parametrize("what", ["logprobs", "actions"])
def test_a_decision_that_is_not_finite_before_any_step_blames_the_checkpoint_that_it_began_with(tmp_path, what):
    trainer = make_trainer(tmp_path)
    spoil(trainer, "act", lambda output: replace(output, **{what: with_nan(getattr(output, what))}))
    text, dump = said(trainer)
    assert (
        "of the rollout is not finite in iteration 1: no step was taken yet. Begin with another policy.checkpoint"
        in text
    )
    assert dump["kind"] == "act" and dump["observation"]["images"].shape == (4, 1, 8, 8, 3)
    assert len(dump["observation"]["instructions"]) == 4 and not dump["observation"]["transformed"]


@pytest.mark.parametrize("first", [0, 1])
def test_saved_weights_that_give_it_are_not_what_to_go_on_with(tmp_path, first):
    """Iteration `first` has left weights with which the next rollout overflows; iterations before are sound."""
    trainer = make_trainer(tmp_path)
    for _ in range(1 + first):
        trainer.train_iteration()
    before = list_checkpoints(tmp_path / "checkpoints")
    spoil(trainer, "act", lambda output: replace(output, logprobs=with_nan(output.logprobs)))
    trainer.evaluated_iteration = trainer.iteration
    text, _ = said(trainer)
    assert f"the weights after iteration {1 + first} give it" in text
    expected = (
        f"--resume {tmp_path}/checkpoints/iteration-000001, with a lower" if first else "start again, with a lower"
    )
    assert expected in text
    assert list_checkpoints(tmp_path / "checkpoints") == before


def test_weights_that_give_it_are_not_saved(tmp_path):
    trainer = make_trainer(tmp_path, logging={"checkpoint_interval": 9})
    trainer.train_iteration()
    trainer.save_checkpoint()
    trainer.train_iteration()  # not its turn
    trainer.evaluated_iteration = trainer.iteration
    spoil(trainer, "act", lambda output: replace(output, logprobs=with_nan(output.logprobs)))
    said(trainer)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["iteration-000001"]


def test_a_weight_that_a_step_made_infinite_is_not_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train_iteration()
    real = trainer.update

    def update(batch):
        metrics = real(batch)
        with torch.no_grad():
            trainer.policy.adapter[0, 0] = torch.inf
        return metrics

    trainer.update = update
    text, _ = said(trainer)
    assert text == (
        "a weight of the adapter is not finite in iteration 2: an optimizer step made it. Resume with a lower actor.learning_rate."
    )
    resumed = make_trainer(tmp_path)
    resumed.load_checkpoint(find_checkpoint(tmp_path))
    assert resumed.iteration == 1 and torch.isfinite(resumed.policy.adapter).all()


def spoil_step(trainer, change, env=2):
    real = trainer.envs.step_wait

    def step_wait():
        obs, rewards, *rest = real()
        change(obs, rewards, env)
        return obs, rewards, *rest

    trainer.envs.step_wait = step_wait


def nan_reward(obs, rewards, env):
    rewards[env] = np.nan


def nan_proprio(obs, rewards, env):
    obs["proprio"] = obs["proprio"].copy()
    obs["proprio"][env, 3] = np.inf


@pytest.mark.parametrize(("change", "name"), [(nan_reward, "a reward"), (nan_proprio, "an observation")])
@pytest.mark.parametrize("overlap", [False, True])
def test_what_an_environment_gives_is_blamed_on_it(tmp_path, change, name, overlap):
    trainer = make_trainer(tmp_path, rollout={"overlap": overlap})
    spoil_step(trainer, change)
    text, dump = said(trainer)
    episode = trainer.envs.episode_states()[2]["episode"]
    start = f"initial state None, seed {episode['seed']}"
    assert (
        f"{name} is not finite in iteration 1: environment 2 gave it in task 0 ({start}) after {CHUNK} actions." in text
    )
    assert "No learning rate" in text
    assert dump["kind"] == "step" and dump["episode"] == episode and dump["steps"] == CHUNK
    assert dump["chunk"].shape == (CHUNK, 7) and torch.equal(dump["actions"][-CHUNK:], dump["chunk"])


def test_an_observation_after_a_reset_is_blamed_on_the_environment(tmp_path):
    trainer = make_trainer(tmp_path)
    real = trainer.envs.reset

    def reset(**kwargs):
        obs, info = real(**kwargs)
        return obs | {"proprio": with_nan(obs["proprio"])}, info

    trainer.envs.reset = reset
    text, dump = said(trainer)
    assert (
        "an observation after a reset is not finite in iteration 1: the environment gave it. No learning rate" in text
    )
    assert dump is None


def test_an_episode_that_is_over_is_named_without_a_dump(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=CHUNK)
    spoil_step(trainer, nan_reward)
    text, dump = said(trainer)
    assert "environment 2 gave it. No learning rate" in text and dump is None


def test_a_full_disk_hides_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    trainer = make_trainer(tmp_path)
    trainer.policy.adapter.register_hook(lambda gradient: gradient * torch.nan)
    monkeypatch.setattr("vla_rl.learning.finite.save_torch", full)
    text, dump = said(trainer, trainer.train_iteration)
    assert "actor/grad_norm is not finite" in text and "No space left" in text and dump is None


def test_an_evaluation_that_is_not_finite_leaves_no_checkpoint_of_its_weights(tmp_path):
    trainer = make_trainer(tmp_path, evaluate=True, eval={"interval": 1})

    def act(*args, **kwargs):
        if trainer.iteration == 2 and kwargs.get("mode") == "greedy":
            raise NonFiniteError("the policy's action distribution is not finite")
        return real(*args, **kwargs)

    real, trainer.policy.act = trainer.policy.act, act
    text, _ = said(trainer)
    assert "the weights after iteration 2 give it" in text and "checkpoints/iteration-000001, with" in text


def test_finite_values_pass():
    check_finite("x", torch.tensor([1.0, -2.0]))
    check_finite("x", np.zeros((0, 7)))
    for value in (torch.tensor([1.0, torch.inf]), np.array([np.nan]), torch.tensor(-torch.inf)):
        with pytest.raises(NonFiniteError, match=r"^x is not finite$"):
            check_finite("x", value)
    assert is_finite({"a": torch.ones(2), "b": {"c": "text", "d": None, "e": torch.tensor([True])}})
    assert not is_finite({"b": {"c": torch.tensor(torch.nan)}})
