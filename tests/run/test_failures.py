"""Failures that are not bugs are told in words, with the way out; others keep their stack."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from vla_rl.run.checkpoint import save_tensors, save_torch
from vla_rl.run.failures import explain, is_out_of_memory, one_line, say, warn_of_failure
from vla_rl.simulation.vector_env import KILLED_HINT
from vla_rl.types import InvariantError, NonFiniteError, NoSignal, OutOfMemory, RenderingError, SimulatorDied


@pytest.mark.parametrize("kind", [NonFiniteError, NoSignal, RenderingError, SimulatorDied, InvariantError, OutOfMemory])
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


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory."), True),  # while it compiles
        (RuntimeError("No valid triton configs. OutOfMemoryError: out of resource"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OutOfMemory("CUDA out of memory. One row of the update does not fit"), False),  # ours, with the way out
        (SimulatorDied(f"simulator worker 0 died (SIGKILL; {KILLED_HINT})"), False),  # the host's, perhaps
        (OSError("out of memory"), False),
    ],
)
def test_memory_of_a_gpu_that_ran_out_is_told_by_several_exceptions(error, is_one):
    assert is_out_of_memory(error) is is_one
    if is_one:
        assert "micro_batch_size" in explain(error)


def test_what_must_not_end_a_run_is_a_warning_of_one_line(caplog):
    warn_of_failure("no picture", lambda a, b: a / b, 1, 0)
    warn_of_failure("no list", list, (1, 2))
    assert [record.getMessage() for record in caplog.records] == ["no picture: division by zero"]


def test_what_is_said_goes_to_stdout_or_the_stream(capsys):
    say("the table")
    say("error: the disk", sys.stderr)
    assert capsys.readouterr() == ("the table\n", "error: the disk\n")
