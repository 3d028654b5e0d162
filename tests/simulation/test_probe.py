"""What a look at the simulator tells, without a simulator; with one: tests/test_check.py."""

import os
import time

import numpy as np
import pytest

from vla_rl.simulation.opengl import EglDevice
from vla_rl.simulation.probe import Probe, Rendered, egl_problem, is_software, movement
from vla_rl.types import SimulatorDied


@pytest.mark.parametrize(
    ("renderer", "software"),
    [
        ("llvmpipe (LLVM 15.0.6, 256 bits)", True),
        ("softpipe", True),
        ("Google SwiftShader", True),
        ("NVIDIA H100 80GB HBM3/PCIe/SSE2", False),
        ("AMD Radeon Graphics (radeonsi, gfx1100)", False),
    ],
)
def test_a_renderer_on_the_cpu_is_known_by_its_name(renderer, software):
    assert is_software(renderer) is software
    assert Rendered("osmesa", renderer, np.zeros((1, 1, 3)), 0.0).in_software


def test_the_furthest_way_counts_sideways_down_and_up():
    before = np.zeros((3, 3))
    after = np.array([[0.03, 0.04, 0], [0, 0, -0.07], [0.01, 0, 0.02]])
    assert movement(4, 12, before, after).moved == pytest.approx((0.05, 0.07, 0.02))
    assert movement(4, 12, before[:0], after[:0]).moved == (0, 0, 0)  # nothing can be moved
    assert movement(4, 12, before[:1], after[:1]).moved == pytest.approx((0.05, 0, 0))


A, B = "aaaaaaaa-0000-0000-0000-000000000000", "bbbbbbbb-0000-0000-0000-000000000000"


@pytest.mark.parametrize(
    ("devices", "index", "cuda_uuid", "words"),
    [
        ((), 0, A, None),  # osmesa
        ((EglDevice(),), 0, A, None),  # Mesa: nothing is known
        ((EglDevice(0, A), EglDevice(1, B)), 0, A, None),
        ((EglDevice(0, A), EglDevice(1, B)), 0, B, "which is EGL device 1"),  # their orders differ
        ((EglDevice(0, A),), 0, B, "another GPU than CUDA's"),
        (
            (EglDevice(1), EglDevice(0)),
            0,
            None,
            "EGL device 0 is CUDA device 1, the policy is on 0, which is EGL device 1",
        ),
        ((EglDevice(1), EglDevice(0)), 1, None, None),
    ],
)
def test_a_device_that_is_another_gpu_than_the_policys_is_told(devices, index, cuda_uuid, words):
    problem = egl_problem(devices, index, cuda_uuid)
    assert problem is None if words is None else words in problem


def test_a_look_runs_in_another_process_whose_end_is_an_error_here():
    with Probe() as probe:
        assert probe(os.getpid) != os.getpid()
        with pytest.raises(ZeroDivisionError):
            probe(divmod, 1, 0)
        with pytest.raises(SimulatorDied, match="crashed"):
            probe(os._exit, 3)


def test_a_look_that_hangs_is_an_error_and_does_not_hang():
    start = time.monotonic()
    with Probe(timeout_s=0.5) as probe, pytest.raises(SimulatorDied, match="has not answered"):
        probe(time.sleep, 60)
    assert time.monotonic() - start < 30
