"""What the benchmarks change of the settings is valid, so that they start; their figures are theirs."""

import pytest

from tests.bench import check, scaling
from vla_rl.run.command_line import TINY_CONFIG, find_config
from vla_rl.run.load_settings import load_config


@pytest.mark.parametrize("bench", [check, scaling], ids=lambda module: module.__name__)
def test_the_small_settings_are_those_of_a_run(bench):
    config = load_config(find_config(TINY_CONFIG), bench.SMALL)
    assert config.rollout.num_envs * config.rollout.n_steps >= config.algorithm.minibatch_size
