"""Runs are grouped, averaged over seeds, drawn and tabulated; what is wrong with one is said in a line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vla_rl.compare import main
from vla_rl.run.load_settings import load_config, save_config

ROOT = Path(__file__).parents[1]


def records(success: float, iterations: int = 3) -> list[dict]:
    lines = [{"iteration": 0, "timesteps": 0, "eval/success_rate_greedy": 0.1}]
    for i in range(1, iterations + 1):
        line = {"iteration": i, "timesteps": 100 * i, "time/rollout_s": 60.0, "time/update_s": 60.0}
        lines.append(line | {"rollout/episodes": 10, "rollout/success_rate": success * i / iterations})
    return [*lines, {"iteration": iterations, "timesteps": 100 * iterations, "eval/success_rate_greedy": success}]


def make_run(folder: Path, name: str, success: float, *overrides: str) -> str:
    run = folder / name
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records(success)))
    save_config(load_config(overrides=[f"run.name={name}", *overrides]), run / "config.yaml")
    return str(run)


@pytest.fixture
def runs(tmp_path) -> list[str]:
    """PPO and GRPO, three seeds and one, which also differ in the size of their rollouts."""
    grpo = ("algorithm.estimator=grpo", "rollout.num_envs=16")
    ppo = [make_run(tmp_path, f"ppo{s}", r, f"run.seed={s}") for s, r in enumerate((0.84, 0.92, 0.94))]
    return [*ppo, make_run(tmp_path, "grpo0", 0.6, "run.seed=0", *grpo)]


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_runs_are_grouped_by_what_differs_other_than_the_seed(runs, tmp_path, capsys):
    assert main([*runs, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    _, ppo, grpo = rows(said)
    # the t interval of scipy's stats.t.interval(0.95, 2, 0.9, stats.sem([0.84, 0.92, 0.94]))
    assert ppo == ["estimator gae", "0, 1, 2", "300", "90.0% (76.9% to 100.0%)", "60.0% (51.2% to 68.8%)", "6"]
    assert grpo[:4] == ["estimator grpo", "0", "300", "60.0%"]
    assert "- rollout.num_envs: 8 in 3, 16 in 1." in said
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"compare.png", "compare.svg", "compare.md"}
    assert rows((out / "compare.md").read_text()) == rows(said)


def test_by_a_setting(runs, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for words in (
        [*runs, "--by", "rollout.num_envs", "--by", "run.seed"],
        ["--by", "rollout.num_envs", "--by", "run.seed", *runs],
        [*runs, "--by", "rollout.num_envs", "run.seed"],
    ):
        assert main([*words, *out]) == 0
        names = [row[0] for row in rows(capsys.readouterr().out)[1:]]
        assert names == ["num_envs 8, seed 0", "num_envs 8, seed 1", "num_envs 8, seed 2", "num_envs 16, seed 0"]


def test_labels_and_settings_exclude_each_other(runs, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*runs, "--by", "run.seed", "--labels", *"abcd"])
    assert ended.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_of_several_what_is_no_run_is_left_out(runs, tmp_path, capsys, caplog):
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "night.log").write_text("12:00:00 run folder\n12:00:01 iteration 1\n")
    (tmp_path / "film.mp4").write_bytes(b"\xff\xfe\x00")
    others = [no_line_yet(tmp_path), of_fine_tuning(tmp_path)]
    others += [str(tmp_path / name) for name in ("evaluations", "night.log", "film.mp4")]
    for more in ([], ["--labels", *"pppg", *"xxxxx"]):
        caplog.clear()
        assert main([*runs, *others, "--out", str(tmp_path / "out"), *more]) == 0
        assert [row[1] for row in rows(capsys.readouterr().out)[1:]] == ["0, 1, 2", "0"]
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 5 and all(line.startswith("left out: ") and "\n" not in line for line in said)


def test_of_several_that_are_no_runs_nothing_is_left(tmp_path, capsys):
    assert main([empty(tmp_path), of_fine_tuning(tmp_path)]) == 2
    assert "none of the 2 is a run of PPO or GRPO" in capsys.readouterr().err


def test_settings_that_a_resume_changed_are_those_of_the_newest_checkpoint(runs, tmp_path, capsys):
    for number, envs in ((2, 16), (10, 32)):
        checkpoint = Path(runs[0]) / f"checkpoints/iteration-{number:06d}"
        checkpoint.mkdir(parents=True)
        save_config(load_config(overrides=[f"rollout.num_envs={envs}"]), checkpoint / "config.yaml")
    (Path(runs[0]) / "checkpoints/superseded-iteration-000020").mkdir()
    assert main([*runs[:2], "--out", str(tmp_path / "out")]) == 0
    assert [row[:2] for row in rows(capsys.readouterr().out)[1:]] == [["num_envs 32", "0"], ["num_envs 8", "1"]]


def test_files_without_a_seed_in_their_name_are_no_seeds_of_each_other(tmp_path, capsys):
    files = []
    for name in ("a/metrics.jsonl", "b/metrics.jsonl", "c/a/metrics.jsonl", "old.jsonl"):
        files.append(tmp_path / name)
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        files[-1].write_text("".join(json.dumps(record) + "\n" for record in records(0.5)))
    assert main([*map(str, files), "--out", str(tmp_path / "out")]) == 0
    names = [row[:2] for row in rows(capsys.readouterr().out)[1:]]
    assert names == [
        [str(files[0]), "?"],
        ["b/metrics.jsonl", "?"],
        [str(files[2]), "?"],
        [f"{tmp_path.name}/old.jsonl", "?"],
    ]
    assert main([*map(str, files[:2]), "--labels", "x", "x", "--out", str(tmp_path / "out")]) == 0
    assert "more than once" not in capsys.readouterr().out


def test_files_are_grouped_by_name_or_label(tmp_path, capsys):
    files = []
    for name, success in (("ppo_seed0", 0.5), ("ppo_seed1", 0.7), ("grpo_seed0", 0.6)):
        files.append(str(tmp_path / f"{name}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(record) + "\n" for record in records(success)))
    out = ["--out", str(tmp_path / "out")]
    assert main([*files, *out]) == 0
    _, ppo, grpo = rows(capsys.readouterr().out)
    assert ppo[:4] == ["ppo", "0, 1", "300", "60.0% (50.0% and 70.0%)"] and grpo[:2] == ["grpo", "0"]
    assert main([*files, "--labels", "a", "b", "a", *out]) == 0
    said = capsys.readouterr().out
    assert [row[:2] for row in rows(said)[1:]] == [["a", "0, 0"], ["b", "1"]]
    assert "a: a seed is there more than once" in said


def test_an_evaluation_that_is_not_of_the_end_is_said(tmp_path, capsys):
    run = make_run(tmp_path, "under_way", 0.5)
    with (Path(run) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 4, "timesteps": 400, "rollout/episodes": 0}) + '\n{"torn')
    assert main([run, "--out", str(tmp_path / "out")]) == 0
    assert "all runs: the last evaluation is not of the last timesteps in under_way." in capsys.readouterr().out


def damaged(folder: Path) -> str:
    run = make_run(folder, "damaged", 0.5)
    path = Path(run) / "metrics.jsonl"
    path.write_text("torn\n" + path.read_text())
    return run


def empty(folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


def no_line_yet(folder: Path) -> str:
    run = make_run(folder, "new", 0.5)
    (Path(run) / "metrics.jsonl").write_text('{"iter')
    return run


def of_fine_tuning(folder: Path) -> str:
    (folder / "sft_seed0.jsonl").write_text('{"iteration": 1, "step": 1, "sft/loss": 1.0}\n')
    return str(folder / "sft_seed0.jsonl")


def with_line(**values) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        run = make_run(folder, "foreign", 0.5)
        with (Path(run) / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": 9, "timesteps": 900} | values) + "\n")
        return run

    return make


def without_settings(folder: Path) -> str:
    path = Path(make_run(folder, "bare", 0.5)) / "config.yaml"
    path.unlink()
    return str(path.parent)


@pytest.mark.parametrize(
    ("make", "more", "words"),
    [
        (damaged, [], "line 1 is damaged: b'torn'; mend or remove the line"),
        (empty, [], "has no metrics.jsonl; give the folder of a run"),
        (no_line_yet, [], "has no whole line yet"),
        (of_fine_tuning, [], "is of no PPO or GRPO run"),
        (without_settings, [], "no settings file"),
        (with_line(timesteps=None), [], "line 6 is damaged: timesteps is None, expected"),
        (with_line(timesteps="900"), [], "line 6 is damaged: timesteps is '900', expected"),
        (with_line(**{"rollout/episodes": 4}), [], "line 6: rollout/success_rate is None, not a number"),
        (
            with_line(**{"eval/success_rate_greedy": [1]}),
            [],
            "line 6 is damaged: 'eval/success_rate_greedy' is [1]",
        ),
        (lambda folder: str(folder / "nowhere"), [], "nowhere is not there"),
        (
            lambda folder: make_run(folder, "r", 0.5),
            ["--by", "algorithm.estimatr"],
            "did you mean algorithm.estimator?",
        ),
        (lambda folder: make_run(folder, "r", 0.5), ["--by", "gamma"], "did you mean algorithm.gamma?"),
        (lambda folder: make_run(folder, "r", 0.5), ["--labels", "a", "b"], "--labels has 2 labels for 1 runs"),
        (lambda folder: make_run(folder, "r", 0.5), ["--window", "0"], "--window 0 is no number of episodes"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(tmp_path, capsys, make, more, words):
    assert main([make(tmp_path), *more, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert not (tmp_path / "out").exists()


def test_a_file_has_no_settings_to_go_by(tmp_path, capsys):
    path = tmp_path / "ppo_seed0.jsonl"
    path.write_text(json.dumps(records(0.5)[0]) + "\n")
    assert main([str(path), "--by", "algorithm.estimator"]) == 2
    assert "ppo_seed0.jsonl has no config.yaml beside it; give run folders, or use --labels" in capsys.readouterr().err


def test_a_run_that_is_given_twice_counts_once(runs, tmp_path, capsys, caplog):
    (tmp_path / "link").symlink_to(runs[1])
    twice = [*runs[:2], runs[0] + "/", f"{runs[0]}/metrics.jsonl", str(tmp_path / "link")]
    assert main([*twice, "--out", str(tmp_path / "out")]) == 0
    assert rows(capsys.readouterr().out)[1][1] == "0, 1"
    assert [record.getMessage() for record in caplog.records] == [
        f"{t} is given twice, and counts once" for t in twice[2:]
    ]


def test_a_place_that_cannot_hold_the_figure_is_refused_before_the_table(runs, tmp_path, capsys):
    (tmp_path / "out/compare.png").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for out, words in (("out", "compare.png in it is a folder"), ("file/out", "cannot be made (Not a directory)")):
        assert main([*runs, "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr()
        assert said.out == "" and words in said.err and len(said.err.splitlines()) == 1


def test_the_libraries_say_nothing(runs, tmp_path):
    """In a home that cannot be written to, which matplotlib warns of."""
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "vla_rl.compare", *runs[:2], "--out", str(tmp_path / "out")]
    home = {"HOME": str(tmp_path / "file"), "MPLCONFIGDIR": "", "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | home)
    assert (done.returncode, done.stderr) == (0, "")
