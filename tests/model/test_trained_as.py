"""vla_rl/model/trained_as.py: a checkpoint that is used otherwise than it was trained is told."""

from __future__ import annotations

import logging

from tests.model.policies import copy_recorded
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.trained_as import differences, read_trained_as, write_trained_as


def test_untrained_token_head_beside_an_l1_head_is_warned_about(tmp_path, caplog):
    folder = copy_recorded(tmp_path / "c")
    (folder / "action_head--150000_checkpoint.pt").touch()
    with caplog.at_level(logging.WARNING):
        OpenVLAPolicy.from_checkpoint(folder, decoder="parallel")
    assert "its token head, which this policy samples from, was not trained" in caplog.text


TRAINED = {"decoder": "parallel", "chunk_size": 8, "use_proprio": True, "image_size": 128, "render": None}


def test_settings_that_differ_from_the_training_are_named_with_the_way_out(tmp_path):
    write_trained_as(tmp_path, TRAINED)
    same = {"policy.decoder": "parallel", "policy.chunk_size": 8, "policy.use_proprio": True, "env.image_size": 128}
    assert differences(tmp_path, same) == []
    other = same | {"policy.chunk_size": 4, "policy.use_proprio": False, "env.render": "exact"}  # render is not known
    assert differences(tmp_path, other) == [
        f"policy.chunk_size=4, but {tmp_path.name} was trained with 8: set policy.chunk_size=8",
        f"policy.use_proprio=false, but {tmp_path.name} was trained with true: set policy.use_proprio=true",
    ]


def test_nothing_is_known_of_a_checkpoint_without_the_file(tmp_path):
    assert read_trained_as(tmp_path) is None and differences(tmp_path, {"policy.chunk_size": 4}) == []
