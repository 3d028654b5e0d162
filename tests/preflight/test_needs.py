"""What is told before a run begins; the command line shows each as one line (tests/test_start_gae_ppo_training.py)."""

from vla_rl.preflight.needs import can_load


def test_a_library_is_there_if_it_can_be_loaded():
    assert can_load("c") and not can_load("NoSuchLibrary")
