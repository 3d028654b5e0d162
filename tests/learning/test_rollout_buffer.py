"""Rows stay together from the environment to the minibatch; next values are those of the state really reached."""

import pytest
import torch

from vla_rl.learning.rollout_buffer import Minibatch, RolloutBuffer, Transition, shuffled_rows
from vla_rl.run.distributed import Ranks
from vla_rl.types import PolicyInputs

A, D = 4, 3  # action tokens, hidden size


def transition(numbers, values=None, terminated=None, truncated=None) -> Transition:
    """One row per number, which every field of the row carries."""
    x = torch.tensor(numbers, dtype=torch.float32)
    n = len(numbers)
    no = [False] * n
    return Transition(
        inputs=PolicyInputs(
            x.to(torch.uint8).view(n, 1, 1, 1, 1), x.view(n, 1).expand(n, 8), tuple(str(k) for k in numbers)
        ),
        action_tokens=x.long().view(n, 1).expand(n, A),
        logprobs=-x.view(n, 1).expand(n, A),
        hidden=x.view(n, 1).expand(n, D),
        values=x if values is None else torch.tensor(values),
        rewards=x,
        terminated=torch.tensor(terminated or no),
        truncated=torch.tensor(truncated or no),
        steps=x.long(),
        episode=x.long(),
        broken=torch.tensor(no),
    )


def buffer_of(*rows: list[int]) -> RolloutBuffer:
    buffer = RolloutBuffer()
    for numbers in rows:
        add(buffer, transition(numbers), [])
    return buffer


def add(buffer: RolloutBuffer, row: Transition, wanted: list[int]) -> None:
    """Environments `wanted` have reached states whose value is 10 times their number."""
    mask = torch.zeros(len(row.steps), dtype=torch.bool)
    mask[wanted] = True
    buffer.add(row, mask, row.inputs.rows(wanted) if wanted else None)


def batch_of(rows: int) -> Minibatch:
    numbers = torch.arange(rows).float()
    return buffer_of(list(range(rows))).flatten(numbers, numbers)


def numbers_of(batch: Minibatch) -> list[int]:
    """The number that every field of a row carries; fails if the fields of a row do not agree."""
    numbers = batch.steps.tolist()
    x = batch.steps.float()
    assert batch.inputs.instructions == tuple(str(k) for k in numbers)
    assert batch.inputs.images.flatten().tolist() == numbers and torch.equal(batch.inputs.proprio[:, 0], x)
    assert torch.equal(batch.action_tokens, batch.steps.view(-1, 1).expand(-1, A))
    assert torch.equal(batch.old_logprobs, -x.view(-1, 1).expand(-1, A))
    assert torch.equal(batch.hidden, x.view(-1, 1).expand(-1, D))
    assert torch.equal(batch.advantages, x)
    for optional in (batch.returns, batch.reference_logprobs):
        assert optional is None or torch.equal(optional.view(len(x), -1)[:, 0], x)
    return numbers


# rows


def test_joined_buffers_have_the_environments_of_all_parts_in_each_decision():
    joined = RolloutBuffer.join([buffer_of([1, 2], [5, 6]), buffer_of([3], [7], [9])])  # one half ends earlier
    assert [t.steps.tolist() for t in joined.transitions] == [[1, 2, 3], [5, 6, 7], [9]]
    numbers = joined.rows("steps")
    assert numbers_of(joined.flatten(numbers.float(), None)) == [1, 2, 3, 5, 6, 7, 9]
    assert [len(wanted) for wanted, _ in joined.reached] == [3, 3, 1]
    assert RolloutBuffer.join([buffer_of([1, 2])]).rows("steps").tolist() == [1, 2]


def test_row_t_of_each_field_belongs_to_decision_t():
    buffer = buffer_of([0, 1], [2, 3], [4, 5])
    assert len(buffer) == 3
    assert buffer.stack("rewards").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert buffer.stack("hidden").shape == (3, 2, D)
    assert buffer.rows("steps").tolist() == [0, 1, 2, 3, 4, 5]


def test_flat_rows_are_in_the_order_of_flattened_stacks():
    buffer = buffer_of([0, 1], [2, 3], [4, 5])
    assert torch.equal(buffer.rows("values"), buffer.stack("values").flatten())


def test_decisions_may_have_different_numbers_of_playing_environments():
    buffer = buffer_of([0, 1, 2], [3], [4, 5])
    batch = buffer.flatten(torch.arange(6.0), None)
    assert numbers_of(batch) == [0, 1, 2, 3, 4, 5] and batch.returns is None


@pytest.mark.parametrize("field", ["values", "logprobs", "inputs", "episode"])
def test_a_field_with_another_number_of_rows_is_refused_with_the_counts(field):
    good, bad = transition([1, 2]), transition([1])
    mixed = Transition(**{**vars(good), field: getattr(bad, field)})
    with pytest.raises(ValueError, match=f"one row per environment.*'{field}': 1"):
        RolloutBuffer().add(mixed, torch.zeros(2).bool(), None)


def test_states_reached_with_another_number_of_rows_are_refused():
    buffer, row = RolloutBuffer(), transition([1, 2])
    with pytest.raises(ValueError, match=r"one row per environment.*1 wanted"):
        buffer.add(row, torch.zeros(1).bool(), None)
    for inputs, came in ((None, "None"), (row.inputs, "2")):
        with pytest.raises(ValueError, match=f"{came} states reached, but 1 are wanted"):
            buffer.add(row, torch.tensor([False, True]), inputs)
    assert len(buffer) == 0


# next values


def test_next_values_are_the_next_rows_the_final_observations_or_the_last_bootstrap():
    # env 0 is truncated at t = 1 (final observation worth 50); env 1 terminates at t = 0 (ignored by GAE); the rollout
    # ends after t = 2 in states worth 70 and 80
    buffer = RolloutBuffer()
    add(buffer, transition([0, 0], values=[1.0, 2.0], terminated=[False, True]), [])
    add(buffer, transition([5, 0], values=[3.0, 4.0], truncated=[True, False]), [0])
    add(buffer, transition([7, 8], values=[5.0, 6.0]), [0, 1])
    buffer.bootstrap(ten_times_the_number, batch_size=2)
    next_values = buffer.next_values()
    assert next_values[:, 0].tolist() == [3, 50, 70]
    assert next_values[1:, 1].tolist() == [6, 80]


def test_an_episode_truncated_at_the_rollouts_end_bootstraps_from_its_own_final_observation():
    buffer = RolloutBuffer()
    add(buffer, transition([9], values=[1.0]), [0])  # not truncated: 90 is not used
    add(buffer, transition([7], values=[2.0], truncated=[True]), [0])
    buffer.bootstrap(ten_times_the_number, batch_size=8)
    assert buffer.next_values().tolist() == [[2], [70]]


def ten_times_the_number(inputs: PolicyInputs) -> torch.Tensor:
    return 10.0 * inputs.images.flatten()


@pytest.mark.parametrize(("batch_size", "forwards"), [(1, 5), (2, 3), (5, 1), (9, 1)])
def test_bootstraps_of_all_parts_are_computed_together_in_forwards_of_limited_size(batch_size, forwards):
    halves = [RolloutBuffer(), RolloutBuffer()]
    add(halves[0], transition([1, 2]), [1])
    add(halves[0], transition([4, 5]), [])
    add(halves[0], transition([7, 8]), [0, 1])
    add(halves[1], transition([3]), [0])
    add(halves[1], transition([6]), [0])
    joined, calls = RolloutBuffer.join(halves), []
    joined.bootstrap(lambda inputs: calls.append(len(inputs)) or ten_times_the_number(inputs), batch_size)
    assert len(calls) == forwards and max(calls) <= batch_size
    assert [values.tolist() for values in joined.bootstrap_values] == [[0, 20, 30], [0, 0, 60], [70, 80]]


def test_parts_of_several_processes_are_joined_with_their_bootstraps_and_without_what_those_were_made_of():
    parts = [RolloutBuffer(), RolloutBuffer()]
    add(parts[0], transition([1, 2]), [1])
    add(parts[0], transition([4, 5]), [])
    add(parts[1], transition([3]), [0])
    for part in parts:
        part.bootstrap(ten_times_the_number, 2)
    joined = RolloutBuffer.join(parts)
    assert [values.tolist() for values in joined.bootstrap_values] == [[0, 20, 30], [0, 0]]
    assert not any(wanted.any() or inputs is not None for wanted, inputs in joined.reached)
    assert RolloutBuffer.join(parts[:1]) is parts[0]


def test_nothing_wanted_costs_no_forward():
    buffer = buffer_of([1, 2], [3])  # as GRPO's, whose number of rows changes
    buffer.bootstrap(None, batch_size=1)
    assert [values.tolist() for values in buffer.bootstrap_values] == [[0, 0], [0]]


# flat batches


def test_rows_that_are_not_kept_are_left_out_of_every_field_and_the_others_come_in_the_order_asked_for():
    kept = torch.tensor([4, 0, 3])
    batch = buffer_of([0, 1, 2], [3, 4, 5]).flatten(torch.arange(6.0), torch.arange(6.0), kept)
    assert numbers_of(batch) == [4, 0, 3] and batch.returns.tolist() == [4, 0, 3]


def test_no_usable_row_gives_an_empty_batch():
    assert len(buffer_of([0, 1]).flatten(torch.zeros(2), None, torch.zeros(2).bool())) == 0


def test_a_minibatch_goes_to_a_device_but_for_what_is_read_on_the_cpu():
    batch = batch_of(3)
    there = batch.to(torch.device("meta"))
    devices = {name: value.device.type for name, value in vars(there).items() if isinstance(value, torch.Tensor)}
    moved = ["advantages", "hidden", "old_logprobs", "returns", "steps"]
    assert devices == {"action_tokens": "cpu"} | dict.fromkeys(moved, "meta") and there.reference_logprobs is None
    assert there.inputs.images.device.type == "meta" and there.inputs.proprio.device.type == "cpu"
    assert numbers_of(batch.to(torch.device("cpu"))) == [0, 1, 2]


def test_micro_batches_are_parts_of_the_minibatch_and_no_copies():
    batch = batch_of(5)
    parts = list(batch.split(2))
    assert [part.returns.data_ptr() for part in parts] == [batch.returns[start:].data_ptr() for start in (0, 2, 4)]


def test_picked_rows_keep_the_optional_fields():
    batch = batch_of(4)
    with_reference = Minibatch(**{**vars(batch), "reference_logprobs": torch.arange(4.0).view(4, 1).expand(4, A)})
    assert numbers_of(with_reference.rows(torch.tensor([2, 0]))) == [2, 0]
    assert with_reference.rows(torch.tensor([2, 0])).reference_logprobs.tolist() == [[2] * A, [0] * A]


# minibatches


@pytest.mark.parametrize(("rows", "size"), [(12, 4), (13, 4), (3, 8), (9, 1), (17, 16)])
def test_an_epoch_has_each_row_once_in_parts_of_nearly_equal_size(rows, size):
    parts = [part.tolist() for part in shuffled_rows(rows, size, torch.Generator().manual_seed(0))]
    assert sorted(number for part in parts for number in part) == list(range(rows))
    sizes = [len(part) for part in parts]
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1
    assert len(parts) == len(range(0, rows, size))


def test_the_order_comes_from_the_generator_alone():
    def epoch(generator):
        return [part.tolist() for part in shuffled_rows(12, 5, generator)]

    torch.manual_seed(1)
    first = epoch(torch.Generator().manual_seed(3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert epoch(torch.Generator().manual_seed(3)) == first
    assert epoch(torch.Generator().manual_seed(4)) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_each_epoch_has_a_fresh_order():
    parts = [part.tolist() for part in shuffled_rows(12, 4, torch.Generator().manual_seed(0), epochs=2)]
    epochs = parts[:3], parts[3:]
    assert epochs[0] != epochs[1] and epochs[0] != [list(range(i, i + 4)) for i in (0, 4, 8)]


@pytest.mark.parametrize(("count", "size"), [(8, 2), (7, 2), (5, 4), (1, 3), (3, 1)])
def test_processes_share_a_minibatch_in_parts_of_one_size_and_what_fills_them_has_no_steps(count, size):
    batch, rows = batch_of(10), torch.arange(1, 10).flip(0)[:count]
    shares = [batch.share(rows, Ranks(rank, size)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) == -(-count // size)
    taken = torch.cat([share.returns[share.steps > 0] for share in shares])
    assert sorted(taken.tolist()) == sorted(rows.tolist()) and batch.steps.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("size", "parts"),
    [(2, [[0, 1], [2, 3], [4]]), (4, [[0, 1, 2], [3, 4]]), (5, [[0, 1, 2, 3, 4]]), (9, [[0, 1, 2, 3, 4]])],
)
def test_a_minibatch_splits_into_micro_batches_in_order(size, parts):
    assert [numbers_of(part) for part in batch_of(5).split(size)] == parts


def test_the_rows_of_dropped_episodes_are_taken_out():
    buffer = buffer_of([1, 2, 3], [1, 2], [4])
    buffer.drop_episodes(torch.tensor([], dtype=torch.int64))
    assert buffer.rows("episode").tolist() == [1, 2, 3, 1, 2, 4]
    buffer.drop_episodes(torch.tensor([1, 4]))
    assert buffer.rows("episode").tolist() == [2, 3, 2] and buffer.rows("rewards").tolist() == [2, 3, 2]
    assert [len(t.inputs) for t in buffer.transitions] == [2, 1, 0]
    buffer.bootstrap(lambda inputs: torch.ones(len(inputs)), 8)
    assert [len(values) for values in buffer.bootstrap_values] == [2, 1, 0]
