"""vla_rl/model/find_checkpoint.py: what a checkpoint's name stands for, told before anything heavy loads."""

from __future__ import annotations

import pytest

from tests.model.policies import copy_recorded
from vla_rl.model import find_checkpoint
from vla_rl.model.find_checkpoint import TINY, TINY_RANDOM, check_checkpoint, find_and_check
from vla_rl.model.tiny_openvla import TRAINED
from vla_rl.run.settings import ConfigError


def test_names_of_the_small_ones_and_folders_are_found():
    assert check_checkpoint(TINY) == TRAINED
    assert check_checkpoint(TRAINED) == TRAINED
    folder, names = find_and_check(TINY_RANDOM, use_proprio=True)
    assert folder != TRAINED and "model.safetensors" in names


def test_folder_that_fails_is_named_with_the_way_out(monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(find_checkpoint, "find_folder", fail)
    with pytest.raises(ConfigError, match=r"checkpoint /a/b cannot be read .*give a folder that you may read"):
        check_checkpoint("/a/b")


def test_folder_that_is_not_whole_is_refused(tmp_path):
    folder = copy_recorded(tmp_path / "c", leave_out="model.safetensors")
    with pytest.raises(ConfigError, match="model"):
        check_checkpoint(folder)
