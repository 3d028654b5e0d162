"""What a run evaluates, and what it leaves behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.fakes import CHUNK
from tests.trainers import final_state, make_trainer
from vla_rl.reports.records import read_metrics

ROOT = Path(__file__).parents[1]


def test_run_leaves_metrics_checkpoints_curves_and_config(tmp_path):
    make_trainer(tmp_path, evaluate=True, eval={"interval": 1, "video": True}).train()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [0, 1, 1, 2, 2, 3, 3]
    assert all("timesteps" in line for line in lines)
    training = [line for line in lines if "rollout/return" in line]
    for name in [
        "rollout/success_rate",
        "rollout/return",
        "rollout/length",
        "rollout/env_steps_per_s",
        "actor/policy_loss",
        "actor/approx_kl",
        "actor/clip_fraction",
        "actor/entropy",
        "actor/grad_norm",
        "actor/first_minibatch_ratio_error",
        "actor/first_minibatch_ratio_error_mean",
        "critic/value_loss",
        "critic/explained_variance",
        "critic/grad_norm",
        "time/rollout_s",
        "time/update_s",
    ]:
        assert all(isinstance(line[name], float) for line in training), name
    for name in ("eval/success_rate_greedy", "eval/success_rate_sampled"):
        assert isinstance(lines[-1][name], float)
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for name in {name for line in lines for name in line}:
        assert f"`{name}`" in documented or f"`{re.sub('greedy|sampled', 'MODE', name)}`" in documented, name
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    newest = [f"iteration-{i:06d}" for i in range(4)]
    best, *kept = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert kept == newest and best.removeprefix("best-") in newest
    assert list((tmp_path / "videos").glob("*.mp4"))


def test_evaluation_does_not_change_the_training_that_follows(tmp_path):
    trainers = [make_trainer(tmp_path / str(e), evaluate=e, eval={"interval": 1}) for e in (False, True)]
    for trainer in trainers:
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(*map(final_state, trainers), strict=True))


def evaluation_of(folder, **changes):
    trainer = make_trainer(folder, evaluate=True, run={"timesteps": 0}, **{"eval": {}} | changes)
    seen, act = [], trainer.policy.act
    trainer.policy.act = lambda obs, **kwargs: (seen.append(kwargs), act(obs, **kwargs))[1]
    trainer.train()
    return read_metrics(folder / "metrics.jsonl")[0], seen


def test_evaluation_plays_the_modes_and_states_that_are_set(tmp_path):
    line, seen = evaluation_of(tmp_path / "a", eval={"modes": ["sampled"], "states": "3-7"})
    assert line["eval/episodes_sampled"] == 5 and "eval/success_rate_greedy" not in line
    assert {kwargs["mode"] for kwargs in seen} == {"sampled"}
    line, seen = evaluation_of(tmp_path / "b", eval={"modes": ["greedy"]}, env={"task_ids": [0, 2]})
    assert line["eval/episodes_greedy"] == 8 and {kwargs["mode"] for kwargs in seen} == {"greedy"}


@pytest.mark.parametrize(("given", "expected"), [({}, 1.0), ({"temperature": 0.6}, 0.6), ({"temperature": None}, 1.5)])
def test_evaluation_samples_at_1_or_as_it_is_told_and_says_so(tmp_path, given, expected):
    line, seen = evaluation_of(tmp_path, rollout={"temperature": 1.5}, eval={"modes": ["sampled"], **given})
    assert {kwargs["temperature"] for kwargs in seen} == {line["eval/temperature"]} == {expected}


def test_evaluation_interval_counts_iterations(tmp_path):
    trainer = make_trainer(tmp_path, evaluate=True, run={"timesteps": 5 * 4 * 8 * CHUNK}, eval={"interval": 2})
    trainer.train()
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "eval/success_rate_greedy" in line]
    assert [line["iteration"] for line in lines] == [0, 2, 4, 5]
