"""The command: plays what is missing, keeps it whatever happens, and reports it; on small environments and a small policy."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.fakes import CHUNK, FakePolicy, FakeVectorEnv, make_envs
from vla_rl import evaluate as command
from vla_rl.evaluate import main
from vla_rl.evaluation.results import JOURNAL
from vla_rl.model.action_head import ActionHead, save_action_head
from vla_rl.model.tiny_openvla import TRAINED
from vla_rl.run.interruption import STOPPED

ROOT = Path(__file__).parent.parent
ARGUMENTS = ["--checkpoint", "tiny-openvla", "--task-suite", "libero_spatial", "--no-progress", "--task-ids", "0", "1"]


class Policy(FakePolicy):
    """With what the command asks of a policy beside acting."""

    adapter = None
    processor = SimpleNamespace(image_transform=None, pad_to=lambda texts: None)


class Envs(FakeVectorEnv):
    num_workers = 1

    def renderer_name(self):
        return "by hand"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Made environments, of which each test may look at the last; the policy is `parts.policy`."""
    parts = SimpleNamespace(policy=Policy(), head=None, made=[])

    def make(config, num_envs, **kind):
        envs = make_envs(num_envs, needed=2)
        envs.__class__ = Envs
        parts.made.append((config.env.task_suite, num_envs))
        return envs

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "make_vector_env", make)
    monkeypatch.setattr(command, "build_subject", lambda subject: (parts.policy, parts.head))
    monkeypatch.setattr(command, "fingerprint", lambda policy: f"{policy.base.sum().item():.6f}")
    monkeypatch.setattr(command, "task_languages", lambda suite: [f"do task {i}" for i in range(10)])
    return parts


def run(out: Path, *more: str, videos="none", arguments=ARGUMENTS) -> int:
    envs = [] if any(word.startswith("eval.num_envs=") for word in more) else ["eval.num_envs=3"]
    return main([*arguments, "--out", str(out), "--states", "0-9", "--videos", videos, *envs, *more])


def episodes(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["episodes"]


# what it leaves


def test_results_have_every_episode_and_how_it_was_measured(tmp_path, capsys):
    assert run(tmp_path / "a") == 0
    results = json.loads((tmp_path / "a/results.json").read_text())
    rows = results["episodes"]
    assert [(r["mode"], r["task_id"], r["initial_state"]) for r in rows] == [
        (mode, task, state) for mode in ("greedy", "sampled") for task in (0, 1) for state in range(10)
    ]
    assert set(rows[0]) == {"task_suite", "task_id", "initial_state", "mode", "success", "length"}
    assert results["protocol"]["temperature"] == 1.0 and results["protocol"]["render"] == "fast"
    assert results["config"]["policy"]["use_proprio"] is True and results["policy"]["name"] == "tiny-openvla"
    (session,) = results["sessions"]
    assert session["opengl"] == "by hand" and session["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert results["time"]["env_steps"] == sum(r["length"] for r in rows) and results["time"]["env_steps_per_s"] > 0
    sampled = [r["success"] for r in rows if r["mode"] == "sampled"]
    assert 0 < sum(sampled) < 20
    (whole,) = [r for r in results["summary"] if r["mode"] == "sampled" and r["task_id"] is None]
    assert whole["successes"] == sum(sampled)
    printed = capsys.readouterr().out
    assert "do task 1" in printed and f"{100 * sum(sampled) / 20:.1f} %" in printed and "Rendered fast" in printed
    assert (
        (tmp_path / "a/results.md").read_text().startswith("## libero_spatial\n\n| task | greedy | steps | sampled |")
    )
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [".lock", JOURNAL, "results.json", "results.md"]


def test_repeated_it_plays_nothing_and_says_the_same(tmp_path, capsys, small_parts):
    run(tmp_path / "a")
    before, printed = (tmp_path / "a/results.json").read_bytes(), capsys.readouterr().out
    small_parts.made.clear()
    assert run(tmp_path / "a") == 0 and small_parts.made == []
    assert (tmp_path / "a/results.json").read_bytes() == before
    again = capsys.readouterr().out  # without the table after the first mode
    assert again and printed.endswith(again) and printed.count("all ") == 2 * again.count("all ") == 2


def test_it_goes_on_where_it_was_stopped_with_the_same_outcomes(tmp_path, capsys, small_parts):
    run(tmp_path / "whole")

    class Killed(Policy):
        decisions = 0

        def act(self, *args, **kwargs):
            self.decisions += 1
            if self.decisions == 15:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().act(*args, **kwargs)

    small_parts.policy, handler = Killed(), signal.getsignal(signal.SIGTERM)
    assert run(tmp_path / "parts") == STOPPED
    assert "the same command goes on" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) == handler
    kept = len((tmp_path / "parts" / JOURNAL).read_text().splitlines()) - 2
    assert 0 < kept < 40 and not (tmp_path / "parts/results.json").exists()
    with (tmp_path / "parts" / JOURNAL).open("a") as file:
        file.write('{"task_suite": "libero_sp')  # as kill -9 leaves it
    small_parts.policy = Policy()
    assert run(tmp_path / "parts") == 0
    assert episodes(tmp_path / "parts") == episodes(tmp_path / "whole")
    assert len(json.loads((tmp_path / "parts/results.json").read_text())["sessions"]) == 2
    assert set(small_parts.policy.rows) == {3}  # every forward has a row an environment


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["eval.temperature=1.5"], "temperature 1.0; 1.5"),
        (["--modes", "greedy"], "modes ['greedy', 'sampled']; ['greedy']"),
        (["run.seed=4"], "seed 0; 4"),
        (["--episodes", "3"], "states"),
    ],
)
def test_results_of_another_protocol_are_not_continued(tmp_path, capsys, more, words):
    run(tmp_path / "a")
    before = (tmp_path / "a/results.json").read_bytes()
    assert run(tmp_path / "a", *more) == 2
    error = capsys.readouterr().err
    assert words in error and "nothing is overwritten" in error and (tmp_path / "a/results.json").read_bytes() == before


def test_results_of_another_policy_are_not_continued(tmp_path, capsys, small_parts):
    run(tmp_path / "a")
    small_parts.policy = Policy(seed=1)
    assert run(tmp_path / "a") == 2 and "of another policy, tiny-openvla" in capsys.readouterr().err


def test_two_at_once_in_one_folder_are_refused(tmp_path, capsys):
    from vla_rl.run.checkpoint import locked

    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a"):
        assert run(tmp_path / "a") == 2
    assert "another process is working on" in capsys.readouterr().err


def test_the_number_of_environments_changes_no_outcome(tmp_path):
    for number in (1, 4):
        run(tmp_path / str(number), f"eval.num_envs={number}")
    assert episodes(tmp_path / "1") == episodes(tmp_path / "4")


def test_episodes_are_the_first_states_and_a_folder_is_named_by_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*ARGUMENTS, "--videos", "none", "--modes", "greedy", "--states", "5-20", "--episodes", "2"]
    assert main(arguments) == 0
    (folder,) = (tmp_path / "runs/evaluations").iterdir()
    assert folder.name == "tiny-openvla_libero_spatial_tasks0-1_states5-6_greedy"
    assert [e["initial_state"] for e in episodes(folder)] == [5, 6, 5, 6]


def test_an_l1_head_is_evaluated_greedily_alone(tmp_path, capsys, monkeypatch):
    model = shutil.copytree(TRAINED, tmp_path / "model")
    save_action_head(ActionHead(128), model, 1)
    arguments = ["--checkpoint", str(model), *ARGUMENTS[2:]]
    assert run(tmp_path / "a", arguments=arguments) == 0
    assert {row["mode"] for row in episodes(tmp_path / "a")} == {"greedy"}
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert results["protocol"]["head"] == "l1" and results["config"]["policy"]["head"] == "l1"
    assert run(tmp_path / "b", "--modes", "sampled", arguments=arguments) == 2
    error = capsys.readouterr().err
    assert "give --modes greedy" in error.splitlines()[-1]


def test_the_mean_action_is_a_mode_of_its_own(tmp_path):
    modes = ["--modes", "greedy", "mean_action"]
    assert run(tmp_path / "a", *modes, "eval.temperature=0.5") == 0
    results = json.loads((tmp_path / "a/results.json").read_text())
    assert [mode for mode in ("greedy", "mean_action") for _ in range(20)] == [e["mode"] for e in results["episodes"]]
    text = (tmp_path / "a/results.md").read_text()
    assert "Temperature of mean_action 0.5." in text and "Against greedy, the same states paired" in text
    (comparison,) = results["comparison_of_modes"]
    assert comparison["mode"] == "mean_action" and comparison["pairs"] == 20
    baseline = ["--baseline", str(tmp_path / "a/results.json")]
    assert run(tmp_path / "b", *modes, *baseline) == 2  # at temperature 1


# a family of suites


def test_a_family_is_one_table_with_the_drop_from_its_base(tmp_path, capsys, small_parts):
    kinds = [f"libero_spatial_{kind}" for kind in ("lan", "object", "swap", "task")]
    arguments = [
        "--checkpoint",
        "tiny-openvla",
        "--suite-family",
        "libero_spatial",
        "--task-ids",
        "0",
        "--states",
        "0-3",
    ]
    assert main([*arguments, "--no-progress", "--videos", "none", "--out", str(tmp_path / "f")]) == 0
    assert [suite for suite, _ in small_parts.made] == ["libero_spatial", *kinds]
    printed = capsys.readouterr().out
    assert "libero_spatial and its perturbations" in printed and "change from base" in printed and "Newcombe" in printed
    assert {e["task_suite"] for e in episodes(tmp_path / "f")} == {"libero_spatial", *kinds}


# videos


def test_videos_of_each_tasks_outcomes_and_a_grid_are_made_once(tmp_path, small_parts):
    small_parts.head = lambda hidden: hidden.sum(-1)
    assert run(tmp_path / "a", "--modes", "sampled", videos="outcomes") == 0
    names = sorted(path.name for path in (tmp_path / "a/videos").iterdir())
    assert len(names) == 5 and "libero_spatial_sampled_grid.mp4" in names
    for task in (0, 1):
        for outcome in ("success", "failure"):
            assert any(n.startswith(f"libero_spatial_sampled_task{task}_state") and outcome in n for n in names)
    first = json.loads((tmp_path / "a" / JOURNAL).read_text().splitlines()[2])
    assert len(first["values"]) == -(-first["length"] // CHUNK)
    small_parts.made.clear()
    (tmp_path / "a/videos" / names[1]).unlink()
    assert run(tmp_path / "a", "--modes", "sampled", videos="outcomes") == 0
    assert sorted(path.name for path in (tmp_path / "a/videos").iterdir()) == names and len(small_parts.made) == 1


# against a baseline


def test_a_baseline_is_compared_state_by_state_with_the_flipped_ones_side_by_side(tmp_path, capsys, small_parts):
    assert run(tmp_path / "old", "--modes", "sampled", arguments=ARGUMENTS[:-1]) == 0
    more = ["--modes", "sampled", "--baseline", str(tmp_path / "old/results.json"), "run.seed=7"]
    assert run(tmp_path / "new", *more, videos="outcomes", arguments=ARGUMENTS[:-1]) == 0
    results = json.loads((tmp_path / "new/results.json").read_text())
    (comparison,) = results["comparison"]
    old, new = ([e["success"] for e in episodes(tmp_path / name)] for name in ("old", "new"))
    assert comparison["pairs"] == 10
    assert len(comparison["gained"]) == sum(b > a for a, b in zip(old, new, strict=True)) > 0
    assert len(comparison["lost"]) == sum(a > b for a, b in zip(old, new, strict=True)) > 0
    assert comparison["difference"] == pytest.approx((sum(new) - sum(old)) / 10)
    assert "McNemar p" in (tmp_path / "new/results.md").read_text() and "gained: task" in capsys.readouterr().out
    flips = [path.name for path in (tmp_path / "new/flips").glob("*.mp4")]
    assert any("gained" in name for name in flips) and any("lost" in name for name in flips)
    task, state = comparison["gained"][0]
    assert f"libero_spatial_sampled_task{task}_state{state}_gained.mp4" in flips


# mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --run runs/NAME, or --checkpoint MODEL"),
        (["--checkpoint", "tiny-openvla"], "--checkpoint needs --task-suite: one of libero_spatial"),
        (["--checkpoint", "tiny-openvla", "--task-suite", "libero_spacial"], "did you mean libero_spatial?"),
        (["--checkpoint", "tiny-openvla", "--suite-family", "libero_spacial"], "did you mean libero_spatial?"),
        (["--checkpoint", "/nowhere", "--task-suite", "libero_spatial"], "no checkpoint folder /nowhere"),
        (["--run", "/nowhere"], "--run /nowhere: no such folder"),
        ([*ARGUMENTS, "10"], "env.task_ids=[10] outside libero_spatial, which has tasks 0 to 9"),
        ([*ARGUMENTS, "--states", "50"], "eval.states"),
        ([*ARGUMENTS, "--episodes", "51"], "--episodes 51: of each task there are 50"),
        ([*ARGUMENTS, "--baseline", "/nowhere"], "--baseline /nowhere: no such file"),
        ([*ARGUMENTS, "eval.tempature=1"], "did you mean eval.temperature?"),
        ([*ARGUMENTS, "run.device=cuda"], "torch finds no CUDA GPU"),
    ],
)
def test_a_mistake_is_one_error_before_anything_is_made(tmp_path, monkeypatch, capsys, arguments, words, small_parts):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == [] and small_parts.made == []


def test_an_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "a").write_text("mine")
    assert run(tmp_path / "a") == 2 and "is not a folder" in capsys.readouterr().err
    assert (tmp_path / "a").read_text() == "mine"


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    said = capsys.readouterr().out
    assert exit.value.code == 0 and "--suite-family" in said and "--baseline" in said


# the real one


@pytest.mark.libero
@pytest.mark.slow
def test_killed_and_repeated_it_ends_with_the_outcomes_of_one_that_was_not(tmp_path):
    def start(out):
        words = [
            *ARGUMENTS[:5],
            "--task-ids",
            "0",
            "--states",
            "0-5",
            "--out",
            str(tmp_path / out),
            "--videos",
            "outcomes",
        ]
        words += ["eval.max_steps=96", "eval.num_envs=2", "run.torch_threads=1"]
        return subprocess.Popen([sys.executable, "-m", "vla_rl.evaluate", *words], cwd=ROOT)

    assert start("whole").wait(600) == 0
    process, journal = start("parts"), tmp_path / "parts" / JOURNAL
    while not (journal.exists() and len(journal.read_text().splitlines()) > 4):
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    assert start("parts").wait(600) == 0
    assert episodes(tmp_path / "parts") == episodes(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "parts/videos").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole/videos").iterdir()
    )
