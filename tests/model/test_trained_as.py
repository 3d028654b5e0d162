"""vla_rl/model/trained_as.py: a checkpoint that is used otherwise than it was trained is told."""

from __future__ import annotations

import logging

import pytest

from tests.model.policies import copy_recorded
from vla_rl.model.checkpoint_folder import save_checkpoint
from vla_rl.model.find_checkpoint import check_checkpoint
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.tiny_openvla import TRAINED as TINY
from vla_rl.model.trained_as import differences, read_trained_as, write_trained_as
from vla_rl.run.settings import ConfigError

TRAINED = {"decoder": "parallel", "chunk_size": 8, "use_proprio": True, "image_size": 128, "render": None}


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("decoder", ["parallel", "autoregressive"])
def test_untrained_token_head_beside_an_l1_head_is_warned_about(tmp_path, warnings, decoder):
    folder = copy_recorded(tmp_path / "c")
    (folder / "action_head--150000_checkpoint.pt").touch()
    OpenVLAPolicy.from_checkpoint(folder, decoder=decoder, use_proprio=True)
    (message,) = warnings()
    assert "its token head, which this policy samples from, was not trained" in message and str(folder) in message


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


def test_tiny_openvla_is_warned_about_where_it_is_used_otherwise(warnings):
    OpenVLAPolicy.from_checkpoint("tiny-openvla", "parallel", use_proprio=True)
    assert warnings() == []
    OpenVLAPolicy.from_checkpoint("tiny-openvla", "parallel", num_images=2, chunk_size=4, center_crop=False)
    names = [message.partition("=")[0] for message in warnings()]
    assert names == ["policy.num_images", "policy.use_proprio", "policy.chunk_size", "policy.center_crop"]
    assert all("tiny-openvla was trained with" in message or "tiny_openvla was" in message for message in warnings())


def test_tiny_openvla_knows_its_camera():
    found = differences(TINY, {"env.image_size": 256, "env.render": "exact"})
    assert [text.rpartition(": ")[2] for text in found] == ["set env.image_size=128", "set env.render=fast"]


def test_proprio_projector_that_is_not_used_is_warned_about(tmp_path, warnings):
    OpenVLAPolicy.from_checkpoint(copy_recorded(tmp_path / "with"))
    assert "has a proprio projector (proprio_projector--150000_checkpoint.pt)" in warnings()[0]
    OpenVLAPolicy.from_checkpoint(copy_recorded(tmp_path / "without", leave_out="proprio*"))
    OpenVLAPolicy.from_checkpoint("tiny-openvla-random", unnorm_key="libero_spatial")  # never trained
    assert len(warnings()) == 1


def test_merged_model_keeps_what_is_known_of_its_base_and_one_of_new_data_does_not(tmp_path):
    policy = OpenVLAPolicy.from_checkpoint("tiny-openvla", "parallel", use_proprio=True)
    policy.save_merged(tmp_path / "merged")
    assert read_trained_as(tmp_path / "merged") == read_trained_as(TINY)
    save_checkpoint(tmp_path / "new", policy.merged_tensors(), TINY, statistics={"new": policy.statistics})
    assert read_trained_as(tmp_path / "new") is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"chunks": 8}', "chunks=8, expected some of decoder"),
        ('{"chunk_size": "8"}', "chunk_size='8', expected some of"),
        ('{"use_proprio": 1}', "use_proprio=1, expected some of"),
        ('{"chunk_size": true}', "chunk_size=True, expected some of"),
    ],
)
def test_a_wrong_file_is_told_early_and_in_one_line(tmp_path, content, words):
    folder = copy_recorded(tmp_path / "c")
    (folder / "trained_as.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"trained_as\.json.*{words}") as error:
        check_checkpoint(folder)
    assert "\n" not in str(error.value)
