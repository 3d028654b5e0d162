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


def test_growth_is_told_of_the_worker_that_grew_most_in_its_own_life():
    start = soak.Start(process=None)
    for at_s in range(0, 600, 5):  # worker 7 lives throughout, 8 for 5 minutes, 9 for too short a time
        workers = {7: (500.0, 11)} | ({8: (400.0 + (at_s > 500) * 40, 11)} if at_s >= 295 else {})
        workers |= {9: (100.0 + at_s, 11)} if at_s < 100 else {}
        start.samples.append(soak.Sample(at_s, 2000.0 if at_s < 100 else 700.0, 29, workers))
    assert start.growth() == {
        "trainer": (700, 700), "descriptors": (29, 29), "a worker": (400, 440), "its descriptors": (11, 11),
    }  # fmt: skip
    start.samples = start.samples[:60]
    assert start.growth() is None


@pytest.fixture
def experiments(monkeypatch):
    monkeypatch.chdir(find_config(TINY_CONFIG).parents[1])
    spec = importlib.util.spec_from_file_location("experiments_run", Path("docs/experiments/run.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_commands_of_the_experiments_are_taken(experiments):
    for name, (seeds, settings) in experiments.RUNS.items():
        if name in experiments.GOES_ON_FROM:
            settings_from(parse_args(["--config", "configs/tiny_suite.yaml", *settings.split()]))
            assert f"--resume runs/{name}_seed{seeds[0]} " in experiments.command(name, seeds[0])
            continue
        script = 2 if name in experiments.VARIANTS else 1
        config, _ = settings_from(parse_args(experiments.command(name, seeds[0]).split()[script:]))
        assert (config.run.name, config.run.seed) == (f"{name}_seed{seeds[0]}", seeds[0])
    assert experiments.command("weak_sparse", 0).split().count("eval.modes=[greedy,sampled]") == 1


def test_an_experiment_that_goes_on_from_another_begins_as_its_copy_once(experiments, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(experiments, "REPOSITORY", tmp_path)
    assert not experiments.begin_with_copy("suite_longer", 1)
    assert "goes on from runs/suite_dense_seed1, which is not there" in capsys.readouterr().err
    before, run = (tmp_path / "runs" / f"{name}_seed1" for name in ("suite_dense", "suite_longer"))
    before.mkdir(parents=True)
    (before / "metrics.jsonl").write_text("before")
    run.with_name(f"{run.name}.part").mkdir()  # of a copy that was killed
    assert experiments.begin_with_copy("suite_longer", 1)
    assert (run / "metrics.jsonl").read_text() == "before" and set(run.parent.iterdir()) == {before, run}
    (run / "metrics.jsonl").write_text("longer")
    assert experiments.begin_with_copy("suite_longer", 1) and (run / "metrics.jsonl").read_text() == "longer"
