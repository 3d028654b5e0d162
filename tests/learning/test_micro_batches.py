"""Memory that runs out in an update changes nothing but its speed; where it cannot be helped, the way out is named.

There is no GPU here: policies raise torch's own error.
"""

from __future__ import annotations

import pytest
import torch

from tests.fakes import CUDA_SAID, FakePolicy, WatchedPolicy
from tests.trainers import final_state, make_trainer, training_lines
from vla_rl.learning.micro_batches import MODES, SIZES, Choice, naming_what_fits, what_ran_out
from vla_rl.model.execution import GRADIENT_CHECKPOINTING, ROW_SIZES
from vla_rl.reports.records import read_metrics
from vla_rl.run.failures import explain
from vla_rl.types import OutOfMemory


def finished(folder, policy, **kwargs):
    trainer = make_trainer(folder, policy=policy, **kwargs)
    trainer.train()
    return trainer


def same_runs(a, b, folders):
    assert all(torch.equal(p, q) for p, q in zip(final_state(a), final_state(b), strict=True))
    assert training_lines(folders[0]) == training_lines(folders[1])


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_an_update_that_runs_out_of_memory_is_that_of_smaller_micro_batches(tmp_path, caplog, estimator):
    algorithm = {"estimator": estimator}
    a = finished(tmp_path / "a", WatchedPolicy(fits=lambda policy, rows: rows <= 4), algorithm=algorithm)
    warnings = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    b = finished(tmp_path / "b", FakePolicy(), algorithm=algorithm | {"micro_batch_size": 4})
    same_runs(a, b, (tmp_path / "a", tmp_path / "b"))
    assert len(warnings) == 1 and warnings[0].endswith(
        "The update goes on with policy.gradient_checkpointing=none with algorithm.micro_batch_size=4"
    )
    lines = [line for line in read_metrics(tmp_path / "a" / "metrics.jsonl") if "system/micro_batch_size" in line]
    assert {line["system/micro_batch_size"] for line in lines} == {4}
    assert {line["system/gradient_checkpointing"] for line in lines} == {"none"}


def test_a_base_in_parts_is_not_tried_with_fewer_rows_since_others_would_wait(tmp_path):
    policy = WatchedPolicy(fits=lambda policy, rows: rows <= 4)
    trainer = make_trainer(tmp_path, policy=policy, distributed={"shard": True})
    with pytest.raises(OutOfMemory, match=r"Resume with algorithm.micro_batch_size=4$"):
        trainer.train()


def test_memory_that_runs_out_later_in_a_run_changes_what_follows_and_nothing_before(tmp_path):
    class Later(WatchedPolicy):
        def evaluate_actions(self, *args, **kwargs):
            self.fits = lambda policy, rows: rows <= 4 or len(policy.scored) <= 11
            return super().evaluate_actions(*args, **kwargs)

    a = finished(tmp_path / "a", Later())  # 8 scorings an iteration: the third of the second's runs out
    b = make_trainer(tmp_path / "b")
    gradients, minibatches = b.minibatch_gradients, []

    def lowered(*args, **kwargs):
        minibatches.append(1)
        if len(minibatches) == 6:  # scorings 11 and 12
            b.micro_batches.rows = 4
        return gradients(*args, **kwargs)

    b.minibatch_gradients = lowered
    b.train()
    same_runs(a, b, (tmp_path / "a", tmp_path / "b"))
    assert tuple(a.policy.scored[i][1] for i in (11, 12)) == (8, 4)  # the second micro-batch; the minibatch again
    rows = [
        line["system/micro_batch_size"] for line in read_metrics(tmp_path / "a" / "metrics.jsonl") if len(line) > 20
    ]
    assert rows == [8, 4, 4]


def test_the_gradient_of_the_part_that_fitted_is_dropped(tmp_path):
    """The second micro-batch runs out: the first one's gradient must not be counted twice."""
    policy = WatchedPolicy(fits=lambda policy, rows: len(policy.scored) != 2)
    trainer = make_trainer(tmp_path, policy=policy)
    batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
    batch = batch.rows(torch.arange(16))
    trainer.micro_batches.run(trainer.minibatch_gradients, batch, train_actor=True, score_actor=True)
    found = policy.adapter.grad.clone()
    assert [rows for _, rows, _ in policy.scored] == [8, 8, 4, 4, 4, 4]
    trainer.minibatch_gradients(batch, train_actor=True, score_actor=True)
    assert found.abs().max() > 0 and torch.equal(found, policy.adapter.grad)


def test_one_row_that_does_not_fit_is_recomputed_more_and_at_last_refused(tmp_path, caplog):
    def fits(policy, rows):
        return rows == 1 and policy.gradient_checkpointing == "full"

    trainer = make_trainer(tmp_path, policy=WatchedPolicy(fits=fits), algorithm={"micro_batch_size": 16})
    batch, _ = trainer.compute_advantages(trainer.collect_rollout()[0])
    trainer.update(batch)
    assert trainer.micro_batches.choice == Choice("full", 1)
    failed = [(mode, rows) for mode, rows, _ in trainer.policy.scored[:7]]
    assert failed == [("none", rows) for rows in (16, 8, 4, 2, 1)] + [("selective", 1), ("full", 1)]
    trainer.policy.fits = lambda policy, rows: False
    with pytest.raises(
        OutOfMemory, match=r"One row of the update does not fit with full checkpointing.*nvidia-smi"
    ) as error:
        trainer.update(batch)
    assert "policy.quantization=nf4" in explain(error.value)


def test_rows_are_halved_to_a_size_that_is_compiled_and_from_those_that_there_were(tmp_path):
    trainer = make_trainer(tmp_path, algorithm={"minibatch_size": 24, "micro_batch_size": 24})
    batches, seen = trainer.micro_batches, []
    for rows in (24, 12, 4, 2, 1):
        seen.append(batches.smaller(rows, "").rows)
    assert seen == [12, 4, 2, 1, 1] and set(seen) <= set(SIZES)

    tried = []

    def step(batch):
        tried.append(batches.rows)
        if batches.rows >= len(batch):
            raise torch.OutOfMemoryError(CUDA_SAID)

    batches.run(step, list(range(10)))
    assert tried == [24, 4]  # not 12, which would be the same forward again


def test_sizes_and_modes_are_those_of_the_policy():
    """Other sizes would be filled up to these."""
    assert (SIZES, MODES) == (ROW_SIZES, GRADIENT_CHECKPOINTING)


def test_the_base_models_log_probabilities_are_made_with_fewer_rows_where_memory_runs_out(tmp_path):
    class Reference(FakePolicy):
        def reference_logprobs(self, inputs, action_tokens, *, temperature):
            if len(inputs) > 4:
                raise torch.OutOfMemoryError(CUDA_SAID)
            return super().reference_logprobs(inputs, action_tokens, temperature=temperature)

    algorithm = {"kl_coef": 0.1}
    a = finished(tmp_path / "a", Reference(), algorithm=algorithm)
    b = finished(tmp_path / "b", FakePolicy(), algorithm=algorithm | {"micro_batch_size": 4})
    same_runs(a, b, (tmp_path / "a", tmp_path / "b"))


# memory that runs out where the policy acts


class NoRoom(FakePolicy):
    def act(self, obs, **kwargs):
        if len(obs) > self.room:
            raise torch.OutOfMemoryError(CUDA_SAID)
        return super().act(obs, **kwargs)


@pytest.mark.parametrize(
    ("room", "changes", "words"),
    [
        (3, {}, "A forward of 4 rows did not fit, rollout.num_envs=4.*Resume with rollout.overlap=true"),
        (
            1,
            {"rollout": {"overlap": True}},
            "A forward of 2 rows did not fit.*in a new run rollout.num_envs=2 with more",
        ),
        (1, {"evaluate": True}, "A forward of 2 rows did not fit, eval.num_envs=2.*Resume with eval.num_envs=1"),
    ],
)
def test_memory_that_runs_out_in_a_forward_without_gradients_names_settings_that_need_less(
    tmp_path, room, changes, words
):
    policy = NoRoom()
    policy.room = room
    trainer = make_trainer(tmp_path, policy=policy, **changes)
    with pytest.raises(OutOfMemory, match=words) as error:
        trainer.train()
    assert explain(error.value).startswith("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "\n" not in str(error.value) and "reserved by PyTorch" not in str(error.value)
    assert (tmp_path / "checkpoints" / "iteration-000000").exists()  # what a resume continues from


def test_other_errors_of_the_policy_are_passed_on(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="mine"), naming_what_fits(trainer.config, "rollout"):
        raise ValueError("mine")
    calls = []

    def step(batch):
        calls.append(batch)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        trainer.micro_batches.run(step, [1])
    assert len(calls) == 1


def test_what_cuda_says_is_told_without_its_advice():
    assert what_ran_out(torch.OutOfMemoryError(CUDA_SAID)).endswith("77.90 GiB memory in use.")
