"""Policies that the tests of a file share."""

from __future__ import annotations

import shutil

import pytest

from tests.model.policies import DECODERS, RECORDED, make_policy, move_adapters
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.prismatic import load_network


@pytest.fixture(scope="module", params=DECODERS)
def policy(request):
    """Adapted away from the base. Tests that change it make their own."""
    policy = make_policy(request.param)
    move_adapters(policy)
    return policy


@pytest.fixture(scope="module")
def parallel():
    return make_policy("parallel")


@pytest.fixture(scope="module")
def recorded():
    return OpenVLAPolicy.from_checkpoint(RECORDED)


@pytest.fixture(scope="module")
def network():
    return load_network(RECORDED)


@pytest.fixture(scope="module")
def network_with_proprio():
    return load_network(RECORDED, use_proprio=True)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    for path in RECORDED.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path
