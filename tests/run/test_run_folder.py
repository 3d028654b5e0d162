"""A new run never shares a folder, and an old one goes on wherever it, its base model and its data are now."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from vla_rl.run.checkpoint import locked, write_manifest
from vla_rl.run.load_settings import load_config, save_config
from vla_rl.run.run_folder import (
    changed_settings,
    check_run_folder,
    if_moved,
    make_run_folder,
    newest_settings,
    resumed_settings,
    run_of_settings,
    with_absolute_output_dir,
)
from vla_rl.run.settings import Config, ConfigError
from vla_rl.run.sft_settings import SftConfig


def config_of(output_dir: Path, **run) -> Config:
    return Config(run={"output_dir": str(output_dir), **run})


# ------------------------------------------------------------------------------------------------------------------ new


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path):
    config = config_of(tmp_path / "runs")
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: make_run_folder(config, "run_12"), range(8)))
    assert sorted(path.name for path in folders) == ["run_12", *(f"run_12-{n}" for n in range(2, 9))]
    assert all(load_config(path / "config.yaml") == config for path in folders)


def test_a_name_that_was_given_is_taken_once(tmp_path):
    config = config_of(tmp_path, name="mine")
    check_run_folder(config)
    assert make_run_folder(config, "other") == tmp_path / "mine"
    assert make_run_folder(config, "other") == tmp_path / "mine"  # nothing is in it yet
    (tmp_path / "mine/checkpoints/iteration-000001").mkdir(parents=True)
    for refused in (check_run_folder, lambda c: make_run_folder(c, "other")):
        with pytest.raises(
            ConfigError, match=r"run folder .*/mine exists; choose another run\.name, or continue it with"
        ):
            refused(config)


def test_an_automatic_name_is_one_folder_s_also_where_it_is_made_of_a_name_with_a_slash(tmp_path):
    assert make_run_folder(config_of(tmp_path), "sft_a/../b_seed0") == tmp_path / "sft_a-..-b_seed0"


def test_a_place_that_cannot_hold_runs_is_told_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("file", "file/runs", "link", "link/runs"):
        with pytest.raises(ConfigError, match=rf"run\.output_dir=.*{place}: .* is not a folder; give another place"):
            check_run_folder(config_of(tmp_path / place))
        with pytest.raises(ConfigError, match=r"run\.output_dir=.*: cannot make "):
            make_run_folder(config_of(tmp_path / place), "run")
    with pytest.raises(ConfigError, match=r"cannot make .* \(File name too long\)"):
        make_run_folder(config_of(tmp_path / "runs"), "x" * 300)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="cannot be written to; give another place for runs"):
        check_run_folder(config_of(tmp_path / "new" / "runs"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "runs"]


def test_where_runs_are_kept_is_told_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_absolute_output_dir(Config()).run.output_dir == str(tmp_path / "runs")
    config = Config(run={"output_dir": "/a/b", "seed": 3})
    assert with_absolute_output_dir(config) == config


# -------------------------------------------------------------------------------------------------------------- resumed


def make_run(folder: Path, kind=Config, **sections) -> Path:
    checkpoint = folder / "checkpoints" / "iteration-000001"
    checkpoint.mkdir(parents=True)
    save_config(kind.model_validate(sections), checkpoint / "config.yaml")
    save_config(kind.model_validate(sections), folder / "config.yaml")
    write_manifest(checkpoint, "a model")
    return folder


def test_a_run_that_was_moved_or_copied_is_where_it_is_now(tmp_path):
    run = make_run(tmp_path / "here" / "old", run={"output_dir": "/gone", "name": "old"})
    run = run.rename(tmp_path / "here" / "new")
    before, config, checkpoint = resumed_settings(str(run), [], {"run.timesteps": 7}, Config)
    assert (config.run.output_dir, config.run.name, config.run.timesteps) == (str(tmp_path / "here"), "new", 7)
    assert changed_settings(before, config, ("run.output_dir", "run.name")) == []
    assert checkpoint == run / "checkpoints/iteration-000001"
    _, config, _ = resumed_settings(str(run), [f"run.output_dir={tmp_path}", "run.name=old"], {}, Config)
    changed = changed_settings(before, config, ("run.output_dir", "run.name"))
    assert changed == [f"run.output_dir ({tmp_path / 'here'} -> {tmp_path})", "run.name (new -> old)"]


def test_the_same_place_by_another_path_is_no_change(tmp_path, monkeypatch):
    make_run(tmp_path / "runs" / "a")
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    for place in ("runs", "link", "./runs/"):
        before, config, _ = resumed_settings("link/a", [], {"run.output_dir": place}, Config)
        assert changed_settings(before, config, ("run.",)) == []


def test_a_folder_that_was_renamed_to_what_is_no_name_goes_on(tmp_path):
    run = make_run(tmp_path / "-x", run={"name": "x"})
    assert resumed_settings(str(run), [], {}, Config)[1].run.name is None


def test_paths_that_a_run_was_given_are_read_as_they_were_written(tmp_path, monkeypatch):
    """Never expanded a second time; absolute where they are found."""
    (tmp_path / "$UNKNOWN").mkdir()
    (tmp_path / "d.hdf5").write_text("")
    data = {"files": ["d.hdf5", "$GONE/e.hdf5", "~/f.hdf5"], "name": "n"}
    run = make_run(tmp_path / "a", SftConfig, policy={"checkpoint": "$UNKNOWN"}, data=data)
    monkeypatch.chdir(tmp_path)
    before, config, _ = resumed_settings(str(run), [], {}, SftConfig)
    assert config.policy.checkpoint == str(tmp_path / "$UNKNOWN")
    assert config.data.files == [str(tmp_path / "d.hdf5"), "$GONE/e.hdf5", "~/f.hdf5"]
    _, config, _ = resumed_settings(
        str(run), ["data.files=[d.hdf5]", "policy.checkpoint=.", "policy.lora.rank=3"], {}, SftConfig
    )
    assert (config.policy.checkpoint, config.data.files) == (str(tmp_path), [str(tmp_path / "d.hdf5")])
    fixed, free = ("run.", "policy.", "data."), ("policy.checkpoint", "data.files")
    assert changed_settings(before, config, fixed, free) == ["policy.lora.rank (32 -> 3)"]


def test_settings_that_are_newer_than_the_run_have_their_defaults(tmp_path):
    run = make_run(tmp_path / "a")
    file = run / "checkpoints/iteration-000001/config.yaml"
    values = yaml.safe_load(file.read_text())
    del values["policy"]["dtype"], values["logging"]
    file.write_text(yaml.safe_dump(values))
    (file.parent / "manifest.json").unlink()
    write_manifest(file.parent, "a model")
    before, config, _ = resumed_settings(str(run), [], {}, Config)
    assert before == config and config.policy.dtype == "bfloat16"


def test_a_run_is_found_by_home_and_variables(tmp_path, monkeypatch):
    make_run(tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path))
    for given in ("~/a", "$RUNS/a", "${RUNS}/a/checkpoints/iteration-000001"):
        assert resumed_settings(given, [], {}, Config)[2].parent.parent == tmp_path / "a"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("$NOWHERE/a", "--resume=$NOWHERE/a: the variable NOWHERE is not set"),
        ("", "--resume='' is no path"),
        ("nowhere", "--resume takes a folder such as runs/NAME"),
        ("x" * 5000, "File name too long"),
        ("loop", "give a folder such as runs/NAME"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError) as caught:
        resumed_settings(given, [], {}, Config)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_outside_a_run_is_refused_for_it_has_no_folder_to_go_on_in(tmp_path):
    run = make_run(tmp_path / "a")
    alone = (run / "checkpoints/iteration-000001").rename(tmp_path / "iteration-000001")
    with pytest.raises(ConfigError, match="not in the folder checkpoints of a run"):
        resumed_settings(str(alone), [], {}, Config)


def test_a_checkpoint_copied_out_of_its_run_makes_no_run_of_another_folder(tmp_path):
    run = make_run(tmp_path / "a")
    shutil.copytree(run / "checkpoints", tmp_path / "home/checkpoints")
    with pytest.raises(ConfigError, match=r"home is no run's folder .*; copy the run whole, or begin a new one with"):
        resumed_settings(str(tmp_path / "home"), [], {}, Config)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["checkpoints"]


# ---------------------------------------------------------------------------------------------------------- resume auto


def made(root: Path, name: str, age_s: int, **sections) -> Path:
    """A run whose checkpoint is so old."""
    run = make_run(root / name, run={"output_dir": str(root), **sections.pop("run", {})}, **sections)
    os.utime(run / "checkpoints/iteration-000001", (1e9 - age_s,) * 2)
    return run


def test_auto_takes_the_newest_run_of_the_settings_and_the_settings_as_they_are_given(tmp_path):
    made(tmp_path, "older", 20)
    newer = made(tmp_path, "newer", 10, run={"timesteps": 5}, logging={"progress": False})
    made(tmp_path, "another_rate", 0, actor={"learning_rate": 1e-3})
    make_run(tmp_path / "fine_tuning", SftConfig, data={"files": ["d"], "name": "n"})
    (tmp_path / "no_run").mkdir()
    config, checkpoint = run_of_settings(config_of(tmp_path, timesteps=9))
    assert checkpoint == newer / "checkpoints/iteration-000001"
    assert (config.run.name, config.run.output_dir, config.run.timesteps) == ("newer", str(tmp_path), 9)
    assert config.logging.progress


def test_auto_starts_a_new_run_where_there_is_none_of_the_settings(tmp_path):
    made(tmp_path, "another_seed", 0, run={"seed": 1})
    config = config_of(tmp_path)
    assert run_of_settings(config) == (config, None)
    assert run_of_settings(config_of(tmp_path / "nowhere"))[1] is None
    named = config_of(tmp_path, name="mine")
    assert run_of_settings(named) == (named, None)


def test_auto_passes_over_what_is_torn(tmp_path, caplog):
    older, newer = made(tmp_path, "older", 20), made(tmp_path, "newer", 10)
    (newer / "checkpoints/iteration-000001/config.yaml").write_text(
        (newer / "checkpoints/iteration-000001/config.yaml").read_text() + "\n"
    )
    (newer / "metrics.jsonl").touch()
    assert run_of_settings(config_of(tmp_path))[1] == older / "checkpoints/iteration-000001"
    assert "is torn" in caplog.text
    with pytest.raises(ConfigError, match="newer has no sound checkpoint"):
        run_of_settings(config_of(tmp_path, name="newer"))


def test_auto_begins_a_run_anew_that_was_killed_before_its_first_checkpoint(tmp_path):
    folder = make_run_folder(config_of(tmp_path), "killed")
    config, checkpoint = run_of_settings(config_of(tmp_path))
    assert (config.run.name, checkpoint) == ("killed", None) and make_run_folder(config, "x") == folder


def test_auto_with_a_name_looks_at_that_run_alone_and_tells_what_differs(tmp_path):
    mine = made(tmp_path, "mine", 20, run={"name": "mine"})
    made(tmp_path, "newer", 10)
    assert run_of_settings(config_of(tmp_path, name="mine"))[1] == mine / "checkpoints/iteration-000001"
    with pytest.raises(
        ConfigError, match=r"run.name=mine has other settings: run.seed \(0 -> 3\); choose another name"
    ):
        run_of_settings(config_of(tmp_path, name="mine", seed=3))


def test_auto_starts_no_second_run_beside_one_that_goes_on(tmp_path):
    with locked(made(tmp_path, "a", 0)), pytest.raises(ConfigError, match="another process is working on"):
        run_of_settings(config_of(tmp_path))


def test_what_was_moved_is_told_with_the_setting_to_give():
    error = if_moved(ConfigError("no checkpoint folder base"), "policy.checkpoint")
    assert (
        str(error)
        == "no checkpoint folder base; if it was moved, tell --resume where it is now with policy.checkpoint=..."
    )


def test_the_newest_settings_are_those_of_the_newest_checkpoint(tmp_path):
    assert newest_settings(tmp_path) == tmp_path / "config.yaml"
    for name in ("iteration-999999", "iteration-1000000", "iteration-2.old", "superseded-iteration-2000000"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "config.yaml").touch()
    (tmp_path / "checkpoints/iteration-3000000").mkdir()
    assert newest_settings(tmp_path) == tmp_path / "checkpoints/iteration-1000000/config.yaml"
