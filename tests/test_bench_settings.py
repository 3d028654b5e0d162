"""What the benchmarks and experiments change of the settings is valid, so that they start; their figures are theirs."""

import importlib.util
from pathlib import Path

import pytest

from start_gae_ppo_training import parse_args, settings_from
from tests.bench import check, kills, scaling, soak
from tests.fakes import last_of_each
from vla_rl.run.command_line import TINY_CONFIG, find_config
from vla_rl.run.load_settings import load_config


@pytest.mark.parametrize("bench", [check, scaling], ids=lambda module: module.__name__)
def test_the_small_settings_are_those_of_a_run(bench):
    config = load_config(find_config(TINY_CONFIG), last_of_each(*bench.SMALL, "rollout.n_steps=64"))
    assert config.rollout.n_steps == 64
    config = load_config(find_config(TINY_CONFIG), bench.SMALL)
    assert config.rollout.num_envs * config.rollout.n_steps >= config.algorithm.minibatch_size


def test_the_command_that_is_killed_is_taken(tmp_path):
    config, _ = settings_from(parse_args(kills.simulator_command(tmp_path / "killed_3", 3)[2:]))
    assert (config.run.name, config.run.seed, config.logging.keep_checkpoints) == ("killed_3", 3, 2)


def test_the_command_that_is_soaked_is_taken(tmp_path):
    config, _ = settings_from(parse_args(soak.soak_command(tmp_path, 1000)[2:]))
    assert (config.run.name, config.run.timesteps, config.env.step_timeout_s) == ("soak", 1000, 15)


def test_the_commands_of_the_experiments_are_taken(monkeypatch):
    monkeypatch.chdir(find_config(TINY_CONFIG).parents[1])
    spec = importlib.util.spec_from_file_location("experiments_run", Path("docs/experiments/run.py"))
    experiments = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiments)
    for name, (seeds, _) in experiments.RUNS.items():
        script = 2 if name in experiments.VARIANTS else 1
        config, _ = settings_from(parse_args(experiments.command(name, seeds[0]).split()[script:]))
        assert (config.run.name, config.run.seed) == (f"{name}_seed{seeds[0]}", seeds[0])
    assert experiments.command("weak_sparse", 0).split().count("eval.modes=[greedy,sampled]") == 1
