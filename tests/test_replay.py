"""python -m vla_rl.replay: dumps of the shipped network and of the simulator, done again."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from OpenVLA_PPO import OpenVLAPPO
from tests.fakes import FakeEnv, make_envs
from tests.model.policies import make_obs
from tests.trainers import settings
from vla_rl.learning.finite import check_finite
from vla_rl.learning.parts import build_policy, build_value_head
from vla_rl.learning.rollout_buffer import Minibatch
from vla_rl.replay import main
from vla_rl.reports.metrics import SilentLogger
from vla_rl.types import NonFiniteError

CONFIG = {
    "policy_settings": {"checkpoint": "tiny-openvla-random", "lora": {"rank": 4, "alpha": 8}, "compile": "false"},
    "env": {"task_ids": [0]},
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """The trainer on the shipped network, which plays nothing."""
    values = dict(CONFIG)
    config = settings(policy=values.pop("policy_settings"), **values)
    policy = build_policy(config)
    head = build_value_head(config, policy.hidden_size)
    idle = SimpleNamespace(num_envs=4)
    return OpenVLAPPO(config, policy, head, idle, None, SilentLogger(tmp_path_factory.mktemp("run")))


@pytest.fixture
def infinite(trainer):
    """A LoRA weight of the first block of the language model is infinite, and so is what it gives."""
    names = {id(p): name for name, p in trainer.policy.network.named_parameters()}
    weight = next(
        p for p in trainer.actor_parameters if "language" in names[id(p)] and "lora_b" in names[id(p)].lower()
    )
    before = weight.detach().clone()
    weight.data.fill_(torch.inf)
    yield names[id(weight)]
    weight.data.copy_(before)


def dump_of(trainer):
    dumps = list(trainer.logger.folder.glob("nonfinite_*.pt"))
    assert len(dumps) == 1
    return dumps[0].rename(dumps[0].with_name("dump.pt"))


def act(trainer):
    obs = make_obs(2)
    with trainer.finite.acting(obs):
        output = trainer.policy.act(obs)
        check_finite("a log-probability", output.logprobs)


def value(trainer):
    trainer.values_of(trainer.policy.prepare(make_obs(2)))


def update(trainer):
    rng = torch.Generator().manual_seed(0)
    inputs, tokens = trainer.policy.prepare(make_obs(4)), trainer.policy.num_tokens
    bins = torch.randint(256, (4, tokens), generator=rng) + trainer.policy.action_tokenizer.first_id
    zeros = torch.zeros(4)
    hidden = torch.zeros(4, trainer.policy.hidden_size)
    batch = Minibatch(inputs, bins, torch.zeros(4, tokens), hidden, torch.full((4,), 2), zeros + 1, zeros, None)
    with trainer.finite.updating(batch, True, batch.steps):
        for name, number in trainer.minibatch_gradients(batch, True, True).items():
            check_finite(name, torch.tensor(number))


@pytest.mark.parametrize("work", [act, value, update])
def test_what_was_not_finite_comes_again_with_the_module_that_gave_it(trainer, infinite, work, capsys):
    with pytest.raises(NonFiniteError, match=r"python -m vla_rl\.replay"):
        work(trainer)
    dump = dump_of(trainer)
    assert main([str(dump)]) == 0
    said = capsys.readouterr().out
    assert "again: " in said and f"the first output that is not: {infinite.rpartition('.')[0]}" in said


@pytest.mark.parametrize("work", [act, value, update])
def test_what_is_finite_does_not_come_again(trainer, infinite, work, capsys):
    with pytest.raises(NonFiniteError):
        work(trainer)
    dump = dump_of(trainer)
    values = torch.load(dump, weights_only=True)
    values["adapter"] = [torch.zeros_like(weight) for weight in values["adapter"]]
    torch.save(values, dump)
    assert main([str(dump)]) == 1
    assert "not again" in capsys.readouterr().out


def test_a_pass_of_the_value_head_comes_again(trainer, capsys):
    hidden = torch.full((3, trainer.policy.hidden_size), torch.nan)
    with pytest.raises(NonFiniteError), trainer.finite.fitting(hidden, torch.zeros(3)):
        check_finite("critic/value_loss", torch.tensor(torch.nan))
    assert main([str(dump_of(trainer))]) == 0
    assert "critic/value_loss is not finite" in capsys.readouterr().out


def step_dump(trainer, episode, actions, chunk):
    values = {
        "settings": trainer.config.model_dump(mode="json"),
        "version": 1,
        "name": "a reward is not finite",
        "kind": "step",
    }
    values |= {
        "adapter": [],
        "value_head": None,
        "episode": episode,
        "actions": actions,
        "chunk": chunk,
        "steps": min(2, len(actions)),
    }
    path = trainer.logger.folder / "step.pt"
    torch.save(values, path)
    return str(path)


EPISODE = {"task_id": 0, "initial_state": 3, "seed": 5, "resets": 1}


def test_a_step_of_the_environment_comes_again(trainer, monkeypatch, capsys):
    class Spoilt(FakeEnv):
        def step(self, actions):
            obs, _, *rest = super().step(actions)
            return obs, np.nan if self.steps == 6 else 0.0, *rest

    monkeypatch.setattr("tests.fakes.FakeEnv", Spoilt)
    monkeypatch.setattr("vla_rl.replay.make_vector_env", lambda config, n: make_envs(n, max_steps=20))
    actions = torch.zeros(6, 7)
    assert main([step_dump(trainer, EPISODE, actions, actions[:2])]) == 0
    assert "again: a reward is not finite" in capsys.readouterr().out
    assert main([step_dump(trainer, EPISODE, actions[:4], actions[:2])]) == 1


@pytest.mark.libero
def test_a_step_of_the_simulator_is_done_again(trainer, capsys):
    assert main([step_dump(trainer, EPISODE, torch.zeros(3, 7), torch.zeros(2, 7)), "env.num_workers=1"]) == 1
    assert "not again" in capsys.readouterr().out


def test_what_is_no_dump_is_refused_in_one_line(trainer, tmp_path, capsys):
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "torn.pt").write_bytes(b"PK123")
    torch.save({"version": 1, "kind": "update", "name": "x", "settings": {}}, tmp_path / "lacking.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Path))  # plain, as torch.load takes it where it may
    for name in ("list.pt", "torn.pt", "absent.pt", "lacking.pt", "code.pt"):
        assert main([str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert str(tmp_path / name) in said and len(said.splitlines()) == 1
    assert main([step_dump(trainer, EPISODE, torch.zeros(1), torch.zeros(1)), "policy.nothing=1"]) == 2
