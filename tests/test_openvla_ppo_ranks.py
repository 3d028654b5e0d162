"""Two processes train as one does: the same episodes, minibatches, steps, evaluations and checkpoints."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainers import make_trainer, training_lines, with_values
from vla_rl.run.checkpoint import list_checkpoints
from vla_rl.run.distributed import ONE, Ranks
from vla_rl.types import ProcessLost, StopTraining

SMALL_STEPS = {"actor": {"learning_rate": 1e-3}}
# name -> settings: minibatches that two processes cannot halve, further scorings, halves that step in turns, several tasks
KINDS = {
    "gae": SMALL_STEPS
    | {
        "algorithm": {"minibatch_size": 15, "critic_epochs": 3, "recompute_logprobs": True},
        "env": {"task_ids": [0, 1, 2]},
    },
    "overlap": SMALL_STEPS
    | {"rollout": {"overlap": True}, "algorithm": {"target_kl": 1e-4, "freeze_vla_for_critic": True}},
    "grpo": SMALL_STEPS
    | {"algorithm": {"estimator": "grpo", "minibatch_size": 7, "micro_batch_size": 4, "kl_coef": 0.1}}
    | {"env": {"task_ids": [0, 1]}},
}
STOPS = ("decide", "minibatch_gradients")


def train_all(ranks, folder, one=None):
    """one: the folder in which one process did the same before."""
    results = {name: train(ranks, folder / name, name) for name in KINDS}
    for part in STOPS:
        store = None if ranks.store is None else torch.distributed.PrefixStore(part, ranks.store)  # a stop is for good
        train(Ranks(ranks.rank, ranks.size, store), folder / f"stopped in {part}", "gae", stop_in=part)
    results["evaluated"] = stop_evaluating(ranks, folder / "stopped in evaluation")
    if one is not None:
        newest = Path(one) / "stopped in decide" / "checkpoints" / "iteration-000001"
        results["resumed"] = train(ranks, folder / "resumed", "gae", checkpoint=newest)
        results["lost"] = lose_one(ranks, folder / "lost")  # last, since one process is gone then
    return results


def stop_evaluating(ranks, folder):
    """The first evaluation, stopped in its second mode and gone on with: which episodes all played before and after, and what the
    stop left."""
    played = []
    for number in range(2):
        store = None if ranks.store is None else torch.distributed.PrefixStore(f"evaluation {number}", ranks.store)
        trainer = make(Ranks(ranks.rank, ranks.size, store), folder, "gae")
        if number == 1:
            trainer.load_checkpoint(folder / "checkpoints" / "iteration-000000")
        trainer.boundary.take()  # with the values
        played.append([e for part in ranks.gather(evaluate(trainer, stopped=number == 0)) for e in part])
        if number == 0:
            files = sorted(path.name for path in folder.glob("evaluation*"))
    return {"played": played, "files": files}


def evaluate(trainer, stopped):
    played, sampled = [], []
    add, act = trainer.kept.add, trainer.policy.act

    def watched(*args, mode, **kwargs):
        sampled.extend([1] if mode == "sampled" else [])
        if stopped and len(sampled) == 5:
            trainer.request_stop()
        return act(*args, mode=mode, **kwargs)

    trainer.policy.act = watched
    trainer.kept.add = lambda mode, result: (add(mode, result), played.append([mode, *vars(result.episode).values()]))
    try:
        trainer.evaluate_saved()
    except StopTraining:
        assert stopped
    return played


def lose_one(ranks, folder):
    """What the first process says when the second one fails in the second iteration."""
    trainer = make(ranks, folder, "gae")
    play = trainer.play

    def fails():
        if trainer.iteration == 1 and ranks.rank == 1:
            (folder.parent / "result_1.json").write_text("{}")
            os._exit(0)  # as if killed, but that torchrun leaves the other one to itself
        return play()

    trainer.play = fails
    try:
        trainer.train()
    except ProcessLost as error:
        return str(error)


def make(ranks, folder, kind):
    trainer = make_trainer(folder, evaluate=True, ranks=ranks, needed=2, **KINDS[kind] | {"eval": {"interval": 2}})
    return with_values(trainer) if trainer.value_head is not None else trainer


def train(ranks, folder, kind, stop_in=None, checkpoint=None):
    """What a run leaves.

    Args:
        stop_in: a method of the trainer in whose second iteration the last process, and it alone, is asked to stop.
    """
    trainer = make(ranks, folder, kind)
    if checkpoint is not None:
        trainer.load_checkpoint(checkpoint)
    if stop_in is not None and ranks.rank == ranks.size - 1:
        method = getattr(trainer, stop_in)

        def asked(*args):
            if trainer.iteration == 1:
                trainer.request_stop()
            return method(*args)

        setattr(trainer, stop_in, asked)
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.actor_parameters + trainer.critic_parameters])
    return {"weights": weights.tolist(), "timesteps": trainer.timesteps, "iteration": trainer.iteration}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder and results of one process, and of two."""
    folder = tmp_path_factory.mktemp("ranks")
    return (folder / "one", [train_all(ONE, folder / "one")]), (
        folder / "two",
        run_ranks(2, "tests.test_openvla_ppo_ranks:train_all", folder / "two", str(folder / "one")),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(runs, kind):
    (one, (alone,)), (two, results) = runs
    close(results[0][kind], alone[kind])  # that the second one's weights are equal, each iteration has checked
    lines, expected = training_lines(two / kind), training_lines(one / kind)
    assert len(lines) == len(expected) >= 4
    for line, line_of_one in zip(lines, expected, strict=True):
        assert list(line) == list(line_of_one)
        for name, value in line.items():
            same = isinstance(value, str) or value is None
            wanted = line_of_one[name] if same else pytest.approx(line_of_one[name], abs=1e-5, rel=1e-5)
            assert value == wanted, name


def close(result, expected):
    weights, others = torch.tensor(result["weights"]), torch.tensor(expected["weights"])
    torch.testing.assert_close(weights, others, atol=1e-6, rtol=0)
    assert (result["timesteps"], result["iteration"]) == (expected["timesteps"], expected["iteration"])


def test_one_process_writes(runs):
    (one, _), (two, _) = runs
    for kind in KINDS:
        names = [sorted(p.relative_to(f / kind).as_posix() for p in (f / kind).rglob("*")) for f in (one, two)]
        assert names[0] == names[1] and json.loads((two / kind / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("part", STOPS)
def test_a_stop_of_one_process_is_a_stop_of_all_and_one_goes_on_where_two_were(runs, part, tmp_path):
    """And its checkpoint is that of one process."""
    (one, (alone,)), (two, _) = runs
    for folder in (one, two):
        checkpoints = list_checkpoints(folder / f"stopped in {part}" / "checkpoints")
        assert [path.name for path in checkpoints] == ["iteration-000000", "iteration-000001"]
    newest = two / f"stopped in {part}" / "checkpoints" / "iteration-000001"
    close(train(ONE, tmp_path / "resumed", "gae", checkpoint=newest), alone["gae"])


def test_two_go_on_where_one_was(runs):
    (_, (alone,)), (_, results) = runs
    close(results[0]["resumed"], alone["gae"])


def test_a_stopped_evaluation_goes_on_with_what_each_process_has_played(runs):
    """3 tasks from 4 states in 2 modes."""
    for folder, results in runs:
        stopped, again = results[0]["evaluated"]["played"]
        episodes = {tuple(episode) for episode in stopped + again}
        assert len(stopped + again) == len(episodes) == 24 and 12 < len(stopped) < 24
        files = ["evaluation.1.jsonl", "evaluation.jsonl"] if len(results) > 1 else ["evaluation.jsonl"]
        assert results[0]["evaluated"]["files"] == files
        assert not list((folder / "stopped in evaluation").glob("evaluation*"))
        assert training_lines(folder / "stopped in evaluation") == training_lines(folder / "gae")[:1]


def test_a_lost_process_ends_the_others_which_save(runs):
    _, (two, results) = runs
    assert "another process of this run has ended" in results[0]["lost"]
    assert (two / "lost/checkpoints/iteration-000001/manifest.json").is_file()
