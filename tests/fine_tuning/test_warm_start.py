"""vla_rl/fine_tuning/warm_start.py: DAgger on a small environment, with a teacher that knows and a student that learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.fakes import BINS, CHUNK, FakePolicy, make_envs
from tests.trainers import training_lines
from vla_rl.evaluation.play import evaluate_policy, evaluation_episodes, success_metrics
from vla_rl.fine_tuning.warm_start import DATA_FILE, WarmStart, data_of, pushed, token_share
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run.checkpoint import CheckpointError, list_checkpoints
from vla_rl.run.load_settings import config_from_dict
from vla_rl.run.settings import ConfigError
from vla_rl.run.warmstart_settings import WarmstartConfig
from vla_rl.types import ACTION_DIM, NonFiniteError, PolicyOutput

SETTINGS = {
    "run": {"seed": 3, "device": "cpu"},
    "policy": {"chunk_size": CHUNK},
    "collection": {"episodes": 12, "num_envs": 3, "mixed_iterations": 2, "noise": 0.0},
    "training": {
        **{"iterations": 4, "margin": 0.0, "steps_per_iteration": 20, "batch_size": 16, "micro_batch_size": 8},
        "keep_checkpoints": 9,
    },
    "optimizer": {"learning_rate": 0.05},
    "eval": {"states": "0-5", "num_envs": 2},
    "logging": {"progress": False},
}


def settings(**changes) -> WarmstartConfig:
    values = {section: values | changes.get(section, {}) for section, values in SETTINGS.items()}
    return config_from_dict(values, "the test", WarmstartConfig)


class Teacher:
    """Goes to the side that the colour shows: what an L1 head of FakeEnv would say; notes what it was asked."""

    def __init__(self):
        self.asked = 0

    def act(self, obs, *, mode, temperature, generator):
        self.asked += len(obs)
        right = obs.images[:, 0, 0, 0, 2] > 0
        tokens = torch.from_numpy(np.where(right, BINS - 1, 0))[:, None].expand(-1, CHUNK * ACTION_DIM)
        actions = np.where(right, 0.75, -0.75)[:, None, None] * np.ones((1, CHUNK, ACTION_DIM))
        inputs = FakePolicy().prepare(obs)
        return PolicyOutput(tokens, torch.full(tokens.shape, torch.nan), actions.astype(np.float32), None, inputs)


class Student(FakePolicy):
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.acted = self.steps = 0

    def act(self, obs, *, mode, temperature, generator):
        self.acted += len(obs)
        return super().act(obs, mode=mode, temperature=temperature, generator=generator)

    def parameters(self):
        return [self.adapter]

    def loss(self, inputs, tokens):
        logits, _ = self.forward(inputs, self.adapter)
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def stepped(self):
        self.steps += 1

    def save(self, folder: Path, values):
        self.save_adapter(folder / "adapter", values)

    def load(self, folder: Path):
        self.load_adapter(folder / "adapter")


def make(folder: Path, student=None, stop=lambda: None, **changes) -> WarmStart:
    folder.mkdir(parents=True, exist_ok=True)
    config, teacher, student = settings(**changes), Teacher(), student or Student()
    logger = MetricsLogger(folder, config, clock=lambda: 0.0)
    logger.write_report = logger.plot = lambda: None
    eval_envs = make_envs(config.eval.num_envs)

    def measure(head: str):
        actor, metrics = (teacher, {}) if head == "l1" else (student, {})
        for mode in ["l1"] if head == "l1" else config.eval.modes:
            results = evaluate_policy(
                actor,
                eval_envs,
                evaluation_episodes(config.env.task_ids, config.eval.states),
                mode="greedy" if mode == "l1" else mode,
                temperature=1.0,
                seed=0,
                progress=False,
            )
            metrics |= success_metrics(results, mode)
        return metrics

    return WarmStart(config, teacher, student, make_envs(config.collection.num_envs), measure, logger, stop)


# the schedule


def test_the_share_rises_from_0_to_1_in_equal_steps_and_stays():
    assert [token_share(i, 4) for i in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [token_share(i, 1) for i in range(3)] == [0, 1, 1]


def test_a_push_is_the_same_in_all_steps_and_of_the_translation_alone():
    actions = np.zeros((3, 7), np.float32)
    actions[:, 0], actions[:, 6] = 0.9, 1
    got = pushed(actions, np.array([0.5, -0.25, 0]))
    np.testing.assert_array_equal(got, np.tile(np.float32([1, -0.25, 0, 0, 0, 0, 1]), (3, 1)))
    assert actions[0, 1] == 0  # the teacher's own array is left


# collection


@pytest.mark.parametrize(("share", "acts"), [(0.0, "teacher"), (1.0, "student"), (0.5, "both")])
def test_the_teacher_labels_every_decision_whoever_takes_it(tmp_path, share, acts):
    trainer = make(tmp_path)
    decisions, metrics = trainer.collect(share)
    assert trainer.teacher.asked == len(decisions) and metrics["rollout/episodes"] == 12
    right = decisions.inputs.images[:, 0, 0, 0, 2] > 0
    assert torch.equal(decisions.tokens[:, 0], torch.where(right, BINS - 1, 0))
    acted = trainer.student.acted / len(decisions)
    if acts == "both":
        assert 0.2 < acted < 0.8
    else:
        assert acted == share
    assert metrics["rollout/success_rate"] == 1.0 if acts == "teacher" else metrics["rollout/success_rate"] < 1


def test_episodes_are_fresh_and_depend_neither_on_the_number_of_environments(tmp_path):
    one, three = make(tmp_path / "a", collection={"num_envs": 1}), make(tmp_path / "b")
    first, second = one.collect(0.5)[0], three.collect(0.5)[0]

    def counted(decisions):
        return sorted(zip(decisions.inputs.proprio[:, 0].tolist(), decisions.tokens[:, 0].tolist(), strict=True))

    assert counted(first) == counted(second)
    three.iteration = 1
    assert not {e.seed for e in three.episodes().episodes} & {e.seed for e in one.episodes().episodes}


def test_noise_moves_what_the_teacher_does_and_no_label(tmp_path):
    trainer = make(tmp_path, collection={"noise": 3.0})  # as large as to change sides
    decisions, metrics = trainer.collect(0.0)
    right = decisions.inputs.images[:, 0, 0, 0, 2] > 0
    assert torch.equal(decisions.tokens[:, 0], torch.where(right, BINS - 1, 0)) and trainer.student.acted == 0
    assert metrics["rollout/success_rate"] < 1


# the whole


def test_the_student_becomes_as_good_as_the_teacher_and_it_ends(tmp_path):
    trainer = make(tmp_path, training={"iterations": 20, "steps_per_iteration": 3}, optimizer={"learning_rate": 0.01})
    assert trainer.train() and 1 < trainer.iteration < 20
    lines = training_lines(tmp_path)
    evaluations = [line for line in lines if "eval/success_rate_l1" in line]
    assert [line["iteration"] for line in evaluations] == list(range(trainer.iteration + 1))
    assert {line["eval/success_rate_l1"] for line in evaluations} == {1.0}  # side by side, measured once
    assert "eval/success_rate_greedy" not in evaluations[0] and evaluations[-1]["eval/success_rate_greedy"] == 1.0
    played = [line for line in lines if "warmstart/loss" in line]
    assert [line["warmstart/token_share"] for line in played][:3] == [0, 0.5, 1][: len(played)]
    assert played[-1]["warmstart/loss"] < played[0]["warmstart/loss"] and trainer.student.steps == trainer.step


def test_it_ends_at_the_limit_and_says_so(tmp_path):
    trainer = make(tmp_path, optimizer={"learning_rate": 1e-9}, training={"iterations": 2, "steps_per_iteration": 1})
    assert not trainer.train() and trainer.iteration == 2 and trainer.step == 2


def test_a_margin_is_what_is_left_to_the_l1_head(tmp_path):
    trainer = make(tmp_path, training={"margin": 0.05})
    trainer.evaluated_iteration = 0
    for l1, tokens, reached in ((0.7, 0.65, True), (0.7, 0.64, False), (0.7, 0.9, True)):
        trainer.success = {"l1": l1, "tokens": tokens}
        assert trainer.reached() is reached
    trainer.iteration = 1  # not measured yet
    assert not trainer.reached()


def test_a_teacher_that_solves_nothing_is_told_before_anything_is_played(tmp_path):
    trainer = make(tmp_path)
    trainer.measure = lambda head: {"eval/success_rate_l1": 0.0, "eval/episodes_l1": 50}
    with pytest.raises(ConfigError, match=r"solves none of 50 episodes.*policy\.num_images"):
        trainer.train()
    assert trainer.iteration == 0 and trainer.teacher.asked == 0


def test_micro_batches_add_up_to_the_batch(tmp_path):
    whole, parts = make(tmp_path / "a", training={"micro_batch_size": 16}), make(tmp_path / "b")
    for trainer in (whole, parts):
        trainer.store.add(1, trainer.collect(0.0)[0])
        trainer.loss = trainer.train_step(np.arange(16))
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)
    torch.testing.assert_close(whole.student.adapter, parts.student.adapter)


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
    trainer = make(tmp_path)
    trainer.store.add(1, trainer.collect(0.0)[0])
    trainer.student.loss = lambda inputs, tokens: trainer.student.adapter.sum() * torch.nan
    with pytest.raises(NonFiniteError, match="step 1"):
        trainer.train_step(np.arange(16))


# checkpoints


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [38, 110])
def test_stopped_and_resumed_it_ends_with_the_same_bits(tmp_path, at):
    whole = make(tmp_path / "whole", training={"margin": 0})
    whole.reached = lambda: False
    whole.train()
    calls = iter(range(10**9))

    def stop():
        if next(calls) == at:
            raise Stopped

    parts = make(tmp_path / "parts", stop=stop)
    parts.reached = lambda: False
    with pytest.raises(Stopped):
        parts.train()
    again = make(tmp_path / "parts")
    again.reached = lambda: False
    again.load_checkpoint(list_checkpoints(tmp_path / "parts/checkpoints")[-1])
    assert 0 < again.iteration < 4
    again.train()
    assert torch.equal(again.student.adapter, whole.student.adapter)
    assert training_lines(tmp_path / "parts") == training_lines(tmp_path / "whole")


def test_a_resume_from_an_earlier_checkpoint_sets_the_later_ones_and_their_data_aside(tmp_path):
    first = make(tmp_path, training={"iterations": 3})
    first.reached = lambda: False
    first.train()
    again = make(tmp_path, training={"iterations": 3})
    again.reached = lambda: False
    again.load_checkpoint(tmp_path / "checkpoints/iteration-000001")
    again.train()
    assert torch.equal(again.student.adapter, first.student.adapter)
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {
        *(f"iteration-{n:06d}.pt" for n in (1, 2, 3)),
        *(f"superseded-iteration-{n:06d}.pt" for n in (2, 3)),
    }


def test_killed_in_an_evaluation_the_iteration_is_not_played_again(tmp_path):
    trainer = make(tmp_path)

    def killed(head):
        raise KeyboardInterrupt

    trainer.evaluate()
    trainer.save_checkpoint()
    trainer.measure = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = make(tmp_path)
    again.load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert again.iteration == 1 and again.evaluation_due()


def test_a_checkpoint_whose_data_are_gone_is_refused(tmp_path):
    trainer = make(tmp_path, training={"iterations": 1})
    trainer.train()
    (tmp_path / "data/iteration-000001.pt").unlink()
    with pytest.raises(CheckpointError, match=r"iteration-000001\.pt, which the checkpoint was trained on, is missing"):
        make(tmp_path).load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "a/b"])
def test_a_checkpoint_names_no_data_outside_its_run(tmp_path, name):
    (tmp_path / DATA_FILE).write_text(json.dumps({name: "0" * 64}))
    with pytest.raises(CheckpointError, match=r"data.json cannot be loaded \(.* is no file of decisions"):
        data_of(tmp_path)
