"""vla_rl/fine_tuning/labelled_decisions.py: what was played is on the disk, whole, and goes when nobody needs it."""

from __future__ import annotations

import pytest
import torch

from vla_rl.fine_tuning.labelled_decisions import DecisionStore, LabelledDecisions
from vla_rl.run.checkpoint import CheckpointError
from vla_rl.types import PolicyInputs


def decisions(rows: int, first: int = 0) -> LabelledDecisions:
    """Row r is told by its tokens, first + r."""
    numbers = torch.arange(first, first + rows)
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, 1, 2, 2, 3).contiguous()
    inputs = PolicyInputs(
        images, numbers[:, None].float().expand(-1, 8).contiguous(), tuple(f"do {n}" for n in numbers)
    )
    return LabelledDecisions(inputs, numbers[:, None].expand(-1, 14).contiguous())


def numbers_of(part: LabelledDecisions) -> list[int]:
    """Of the rows, which every field must tell alike."""
    numbers = part.tokens[:, 0].tolist()
    assert part.inputs.images[:, 0, 0, 0, 0].tolist() == part.inputs.proprio[:, 0].tolist() == numbers
    assert part.inputs.instructions == tuple(f"do {n}" for n in numbers)
    return numbers


def test_decisions_load_back_equal(tmp_path):
    decisions(3).save(tmp_path / "d.pt")
    assert numbers_of(LabelledDecisions.load(tmp_path / "d.pt")) == [0, 1, 2]
    (tmp_path / "d.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        LabelledDecisions.load(tmp_path / "d.pt")


def test_rows_are_counted_over_all_iterations(tmp_path):
    store = DecisionStore(tmp_path / "data", keep=100)
    store.add(1, decisions(3))
    store.add(2, decisions(4, first=3))
    assert len(store) == 7
    assert numbers_of(store.rows([6, 0, 2, 3, 0])) == [6, 0, 2, 3, 0]


def test_the_oldest_iteration_goes_while_the_others_have_enough(tmp_path):
    store = DecisionStore(tmp_path / "data", keep=5)
    for number in range(1, 4):
        store.add(number, decisions(3, first=3 * number))
    assert len(store) == 6 and numbers_of(store.rows(range(6))) == [6, 7, 8, 9, 10, 11]
    store.remove_unneeded([])
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["iteration-000002.pt", "iteration-000003.pt"]


def test_what_another_checkpoint_needs_and_what_is_not_ours_stays(tmp_path):
    store = DecisionStore(tmp_path / "data", keep=1)
    store.add(1, decisions(2))
    store.add(2, decisions(2))
    (tmp_path / "data/iteration-mine.pt").touch()
    store.remove_unneeded(["iteration-000001.pt"])
    assert len(list((tmp_path / "data").iterdir())) == 3
    store.remove_unneeded([])
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"iteration-000002.pt", "iteration-mine.pt"}


def test_a_store_is_restored_as_it_was_or_says_what_is_missing(tmp_path):
    store = DecisionStore(tmp_path / "data", keep=100)
    store.add(1, decisions(3))
    store.add(2, decisions(2, first=3))
    again = DecisionStore(tmp_path / "data", keep=100)
    again.restore(store.digests)
    assert numbers_of(again.rows(range(5))) == [0, 1, 2, 3, 4]
    decisions(2, first=9).save(tmp_path / "data/iteration-000002.pt")
    with pytest.raises(CheckpointError, match=r"iteration-000002\.pt.*missing or not what was written"):
        DecisionStore(tmp_path / "data", keep=100).restore(store.digests)


def test_files_of_a_future_that_a_resume_goes_back_from_are_set_aside_not_lost(tmp_path):
    store = DecisionStore(tmp_path / "data", keep=100)
    store.add(1, decisions(1))
    for _ in range(2):
        decisions(1, first=5).save(tmp_path / "data/iteration-000002.pt")
        store.set_aside(["iteration-000001.pt", "iteration-000002.pt"])
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {"iteration-000001.pt", "superseded-iteration-000002.pt", "superseded-1-iteration-000002.pt"}
