"""Flags and overrides become the settings of a run (the rest is in tests/test_start_gae_ppo_training.py)."""

from vla_rl.run.command_line import ROOT, TINY_CONFIG, find_config, new_run_settings, parse, settings_parser


def config_of(*argv: str):
    return new_run_settings(parse(settings_parser("a command", "what it does"), list(argv)))


def test_a_setting_may_stand_anywhere_also_behind_a_list_of_tasks():
    config = config_of("--config", TINY_CONFIG, "--task-ids", "0", "1", "run.seed=5", "--timesteps", "7")
    assert (config.env.task_ids, config.run.seed, config.run.timesteps) == ([0, 1], 5, 7)


def test_a_flag_wins_over_a_setting_and_wandb_follows_its_flags():
    argv = ("--config", TINY_CONFIG, "--seed", "8", "run.seed=7")
    assert config_of(*argv).run.seed == 8 and not config_of(*argv).logging.wandb
    assert config_of(*argv, "--wandb-project", "P").logging.wandb
    assert not config_of(*argv, "--wandb-project", "P", "--no-wandb").logging.wandb


def test_settings_files_are_found_beside_the_programs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(TINY_CONFIG) == ROOT / TINY_CONFIG
    assert config_of("--config", TINY_CONFIG).run.output_dir == str(tmp_path / "runs")
