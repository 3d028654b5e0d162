"""An evaluation of a training run that was stopped goes on where it was, and measures what it would have measured."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.fakes import make_flaky
from tests.trainers import make_trainer, training_lines, with_values
from vla_rl.evaluation.kept import FILE, read_kept
from vla_rl.evaluation.play import TRIES
from vla_rl.run import files
from vla_rl.run.checkpoint import find_checkpoint
from vla_rl.types import StopTraining

STATES = 8  # 2 modes: 16 episodes, in 2 environments
SETTINGS = {"evaluate": True, "needed": 2, "run": {"timesteps": 0}, "eval": {"states": f"0-{STATES - 1}"}}


class Killed(BaseException):
    """In place of SIGKILL: nothing is saved any more."""


def make(folder, **changes):
    merged = {
        name: value | changes.pop(name, {}) if isinstance(value, dict) else value for name, value in SETTINGS.items()
    }
    trainer = with_values(make_trainer(folder, **merged, **changes))
    trainer.boundary.take()  # with the values
    trainer.logger.draw_curves = lambda: None
    trainer.played = []
    add = trainer.kept.add
    trainer.kept.add = lambda mode, result: (
        add(mode, result),
        trainer.played.append((mode, result.episode.initial_state)),
    )
    return trainer


def resumed(folder, **changes):
    trainer = make(folder, **changes)
    trainer.load_checkpoint(find_checkpoint(folder))
    return trainer


def ended_after(trainer, episodes, error=StopTraining):
    """Ends the first evaluation of a trainer once so many episodes are played."""
    act = trainer.policy.act

    def act_or_end(*args, **kwargs):
        if len(trainer.played) >= episodes:
            raise error
        return act(*args, **kwargs)

    trainer.policy.act = act_or_end
    with pytest.raises(error):
        trainer.evaluate_saved()
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run whose evaluation nobody stopped, with its videos."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder, eval={"video": True}).train()
    (line,) = training_lines(folder)
    assert 0 < line["eval/success_rate_sampled"] < 1 and line["eval/episodes_sampled"] == STATES
    return folder


@pytest.mark.parametrize(
    ("episodes", "error"),
    [(3, StopTraining), (STATES, Killed), (STATES + 3, StopTraining), (STATES + 3, Killed), (2 * STATES, Killed)],
)
def test_a_stopped_evaluation_plays_what_is_missing_and_measures_the_same(whole, tmp_path, episodes, error):
    """Stopped in the first mode, between the modes, in the second one, and in its videos."""
    stopped = make(tmp_path, eval={"video": True})
    if episodes == 2 * STATES:
        stopped.eval_envs.replay = lambda recordings: (_ for _ in ()).throw(error)
    ended_after(stopped, episodes, error)
    again = resumed(tmp_path, eval={"video": True})
    again.train()
    assert not set(stopped.played) & set(again.played)
    assert len(stopped.played) >= episodes and len(stopped.played + again.played) == 2 * STATES
    assert training_lines(tmp_path) == training_lines(whole)
    videos, expected = ({p.name: p.read_bytes() for p in (run / "videos").iterdir()} for run in (tmp_path, whole))
    assert videos == expected and len(videos) >= 3
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_line_that_was_being_written_is_played_again(whole, tmp_path, cut, caplog):
    stopped = ended_after(make(tmp_path), STATES + 3, Killed)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-cut])
    left = path.read_bytes().count(b"\n") - 1
    again = resumed(tmp_path)
    again.train()
    assert left < len(stopped.played) and len(again.played) == 2 * STATES - left
    assert training_lines(tmp_path) == training_lines(whole) and "damaged" not in caplog.text


DAMAGES = {
    '"success": ': '"success": 1',
    '"length": ': '"length": 9',
    '"actions": "': '"actions": "AAAA',
    '"task_id": 0': '"task_id": 7',
    '"initial_state": ': '"initial_state": 9',
    '"mode": "greedy"': '"mode": "wild"',
    '"values": [': '"values": ["x", ',
    "{": "[",
}


def test_a_damaged_line_is_not_trusted(whole, tmp_path, caplog):
    stopped = ended_after(make(tmp_path), 5)
    path = tmp_path / FILE
    lines = path.read_text().splitlines(keepends=True)
    header, sound = stopped.kept.header, len(lines) - 1
    assert [len(part) for part in read_kept(path, header)] == [sound, 0]
    for old, new in DAMAGES.items():
        damaged = lines[2].replace(old, new, 1)
        assert damaged != lines[2]
        path.write_text("".join([*lines[:2], damaged, *lines[3:]]))
        rows, (problem,) = read_kept(path, header)
        assert len(rows) == sound - 1 and problem.startswith(f"{path}, line 3 is damaged (") and "\n" not in problem
    again = resumed(tmp_path)
    again.train()
    assert f"{path}, line 3 is damaged" in caplog.text and "evaluated anew" in caplog.text
    assert set(stopped.played) & set(again.played) == {stopped.played[1]}
    assert training_lines(tmp_path) == training_lines(whole)


def test_a_file_whose_first_line_is_damaged_is_not_trusted(whole, tmp_path, caplog):
    ended_after(make(tmp_path), 5)
    path = tmp_path / FILE
    path.write_text("x" + path.read_text())
    again = resumed(tmp_path)
    again.train()
    assert "line 1 is damaged" in caplog.text and len(again.played) == 2 * STATES
    assert training_lines(tmp_path) == training_lines(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"eval": {"states": "0-6"}},
        {"eval": {"temperature": 1.5}},
        {"eval": {"modes": ["greedy"]}},
        {"eval": {"max_steps": 5}},
        {"eval": {"num_envs": 3}},
        {"run": {"seed": 4}},
        {"env": {"settle_steps": 3}},
        "adapter",
        "value head",
        "iteration",
    ],
)
def test_what_is_of_another_evaluation_is_not_used_and_goes(tmp_path, change, caplog):
    caplog.set_level("INFO")
    ended_after(make(tmp_path), STATES + 3)
    again = make(tmp_path, **change) if isinstance(change, dict) else resumed(tmp_path)
    if change == "iteration":
        again.iteration += 1
    elif change in ("adapter", "value head"):
        with torch.no_grad():
            parameter = (again.actor_parameters if change == "adapter" else again.critic_parameters)[0]
            parameter.view(-1)[0] += 1e-6
    assert again.kept.begin().rows == {} and not (tmp_path / FILE).exists()
    assert "is of another evaluation, and removed" in caplog.text


def test_what_does_not_change_an_outcome_may_be_otherwise(tmp_path):
    """A video, how many workers there are, how long the run shall train."""
    stopped = ended_after(make(tmp_path), STATES + 3)
    change = {"eval": {"video": True}, "env": {"num_workers": 1}, "run": {"timesteps": 7}}
    assert len(resumed(tmp_path, **change).kept.begin().rows) == len(stopped.played)


def test_an_episode_comes_back_to_the_bit(tmp_path):
    stopped = make(tmp_path)
    results, add = [], stopped.kept.add
    stopped.kept.add = lambda mode, result: (add(mode, result), results.append(result))
    ended_after(stopped, STATES + 3)
    known = resumed(tmp_path).kept.begin()
    again = known.known("greedy")
    for result in results[:STATES]:
        kept = again[result.episode]
        assert (kept.success, kept.length, kept.values) == (result.success, result.length, result.values)
        assert kept.values and np.array_equal(kept.actions, result.actions) and kept.actions.dtype == np.float32
    assert len(known.known("sampled")) == len(results) - STATES


def test_the_file_goes_only_when_a_checkpoint_knows_of_the_evaluation(whole, tmp_path):
    """Killed after the line of the evaluation and before the checkpoint: nothing is played again."""
    trainer = make(tmp_path)
    save, saves = trainer.save_checkpoint, []
    trainer.save_checkpoint = lambda: saves.append(1) or (save() if len(saves) == 1 else None)
    trainer.evaluate_saved()
    assert (tmp_path / FILE).exists()
    again = resumed(tmp_path)
    again.train()
    assert again.played == [] and training_lines(tmp_path) == training_lines(whole)
    assert not (tmp_path / FILE).exists()


def test_a_full_disk_ends_no_evaluation(whole, tmp_path, monkeypatch, caplog):
    trainer = make(tmp_path)
    write = files.Lines.write

    def full(lines):
        if lines.path.name == FILE and len(trainer.played) in (2, 3, 9):
            raise OSError(28, "No space left on device")
        write(lines)

    monkeypatch.setattr("vla_rl.evaluation.kept.Lines.write", full)
    ended_after(trainer, STATES + 3)
    assert "finished episodes of the evaluation cannot be written (No space left on device)" in caplog.text
    again = resumed(tmp_path)
    again.train()
    assert len(trainer.played + again.played) == 2 * STATES  # those that waited were written with the next one
    assert training_lines(tmp_path) == training_lines(whole)


def test_a_file_that_cannot_be_put_in_order_is_read_but_not_added_to(whole, tmp_path, monkeypatch, caplog):
    stopped = ended_after(make(tmp_path), 5)
    before = (tmp_path / FILE).read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    again = resumed(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("vla_rl.evaluation.kept.write_whole", full)
        ended_after(again, 4)
    assert "cannot be written" in caplog.text and (tmp_path / FILE).read_text() == before
    third = resumed(tmp_path)
    third.train()
    assert len(stopped.played + third.played) == 2 * STATES and training_lines(tmp_path) == training_lines(whole)


def test_an_episode_that_was_left_out_is_tried_again_and_may_be_left_out_again(tmp_path):
    """Its simulator is lost in its first step each time: 7 of 8 are measured, with a stop and without."""
    for name, stops in (("whole", False), ("stopped", True)):
        trainer = make(tmp_path / name, eval={"num_envs": 1})
        make_flaky(trainer.eval_envs, {("step", n): [0] for n in range(TRIES)})
        if stops:
            ended_after(trainer, STATES - 1 + 2)
            trainer = resumed(tmp_path / name, eval={"num_envs": 1})
            make_flaky(trainer.eval_envs, {("step", n): [0] for n in range(TRIES)})
        trainer.train()
        (line,) = training_lines(tmp_path / name)
        assert line["eval/episodes_greedy"] == STATES - 1 and line["eval/episodes_sampled"] == STATES
    assert training_lines(tmp_path / "whole") == training_lines(tmp_path / "stopped")


def test_several_processes_have_a_file_each_that_the_first_one_reads(tmp_path):
    box = []

    def ranks(rank):
        by_first = (lambda work: box.append(work()) or box[-1]) if rank == 0 else lambda work: box[-1]
        return SimpleNamespace(rank=rank, first=rank == 0, by_first=by_first)

    source = ended_after(make(tmp_path / "source"), STATES)
    results = list(resumed(tmp_path / "source").kept.begin().known("greedy").values())
    trainers = [make(tmp_path / "run") for _ in range(3)]
    for rank, trainer in enumerate(trainers):
        trainer.ranks = ranks(rank)
    for trainer in trainers:
        assert trainer.kept.begin().known("greedy") == {}
    for number, result in enumerate(results[:6]):
        trainers[number % 3].kept.add("greedy", result)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["evaluation.1.jsonl", "evaluation.2.jsonl", FILE]
    for trainer in trainers:
        known = trainer.kept.begin().known("greedy")
        assert sorted(e.initial_state for e in known) == [r.episode.initial_state for r in results[:6]]
    trainers[2].kept.add("greedy", results[6])
    alone = make(tmp_path / "run")  # fewer processes, as many rows each
    assert len(alone.kept.begin().rows) == 7 and [p.name for p in (tmp_path / "run").iterdir()] == [FILE]
    for trainer in trainers:
        trainer.kept.remove()
    assert list((tmp_path / "run").iterdir()) == [] and len(source.played) == STATES


def test_a_file_of_another_name_is_not_touched(tmp_path):
    mine = tmp_path / "evaluation_notes.jsonl"
    mine.write_text("mine\n")
    make(tmp_path).train()
    assert mine.read_text() == "mine\n"


def test_each_episode_is_on_the_disk_before_the_next_one_is_known(tmp_path):
    trainer, lines = make(tmp_path), []
    add = trainer.kept.add
    trainer.kept.add = lambda *row: (add(*row), lines.append(len((tmp_path / FILE).read_text().splitlines())))
    trainer.train()
    assert lines == list(range(2, 2 * STATES + 2))  # the header and an episode; and so on


def test_a_file_that_cannot_be_read_is_a_problem_of_one_line(tmp_path):
    (tmp_path / FILE).mkdir()
    rows, (problem,) = read_kept(tmp_path / FILE, {})
    assert rows == {} and FILE in problem and "\n" not in problem
