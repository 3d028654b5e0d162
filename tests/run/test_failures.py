"""Failures that are not bugs are told in words, with the way out; others keep their stack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vla_rl.run.checkpoint import save_tensors, save_torch
from vla_rl.run.failures import explain, one_line
from vla_rl.types import InvariantError, NonFiniteError, OutOfMemory, RenderingError, SimulatorDied


@pytest.mark.parametrize("kind", [NonFiniteError, RenderingError, SimulatorDied, InvariantError, OutOfMemory])
def test_failures_that_name_their_own_way_out_are_passed_on(kind):
    assert explain(kind("what happened")) == "what happened"


def test_the_machines_limits_are_explained_and_bugs_are_not():
    assert "Read-only file system" in explain(OSError(30, "Read-only file system", "runs/x"))
    assert "micro_batch_size" in explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert explain(ValueError("what happened")) is None


@pytest.mark.parametrize("save", [save_tensors, save_torch])
def test_a_full_disk_is_told_whatever_is_written(save):
    with pytest.raises(OSError) as error:
        save({"weights": torch.zeros(100_000)}, Path("/dev/full"))
    assert "Make room" in explain(error.value)


def test_an_error_of_many_lines_or_none_is_told_in_one():
    assert one_line(OSError("broken\n\n  pipe\n")) == "broken pipe"
    assert one_line(MemoryError()) == "MemoryError"
