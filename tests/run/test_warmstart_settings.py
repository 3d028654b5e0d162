"""vla_rl/run/warmstart_settings.py: combinations that cannot be are refused, and what the parts are built of."""

from __future__ import annotations

import pytest

from vla_rl.run.command_line import ROOT
from vla_rl.run.load_settings import load_config
from vla_rl.run.settings import Config, ConfigError
from vla_rl.run.warmstart_settings import WarmstartConfig


def load(*overrides: str) -> WarmstartConfig:
    return load_config(overrides=list(overrides), kind=WarmstartConfig)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.batch_size=6", "training.micro_batch_size=4"], "not a multiple of training.micro_batch_size=4"),
        (["policy.decoder=autoregressive", "policy.chunk_size=1"], "set policy.decoder=parallel"),
        (["env.task_ids=10"], "libero_spatial, which has tasks 0 to 9"),
        (["env.initial_states=0-9", "eval.states=5-20"], "make them disjoint"),
        (["training.margins=1"], "did you mean training.margin?"),
        (["collection.mixed_iterations=0"], "collection.mixed_iterations"),
    ],
)
def test_combination_that_cannot_be_is_refused_in_a_line(overrides, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as error:
        load(*overrides)
    assert len(str(error.value).splitlines()) == 2  # the source, then the setting


def test_policy_and_simulators_are_built_as_for_a_training_and_act_through_the_l1_head():
    config = load("collection.num_envs=3", "eval.num_envs=2", "env.max_steps=99", "eval.states=0-4")
    built = config.as_config()
    assert isinstance(built, Config) and built.policy.head == "l1" and built.rollout.num_envs == 3
    assert built.max_episode_steps() == 99 and built.max_episode_steps(evaluation=True) == 220
    assert built.eval.states == [0, 1, 2, 3, 4] and built.policy.gradient_checkpointing == "full"
    assert load("run.device=cpu").as_config().policy.gradient_checkpointing == "auto"
    assert config.training.steps == 20 * 200


@pytest.mark.parametrize("name", ["warmstart", "tiny_warmstart"])
def test_the_shipped_settings_are_sound(name):
    config = load_config(ROOT / f"configs/{name}.yaml", kind=WarmstartConfig)
    assert config.policy.use_proprio and config.as_config().policy.head == "l1"
