"""What the parts hand to each other keeps its rows together."""

import numpy as np
import pytest
import torch

from vla_rl.types import Observation, PolicyInputs


def observation(n: int) -> Observation:
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1, 1).repeat(3, axis=-1)
    return Observation(images, np.arange(n, dtype=np.float32).reshape(n, 1).repeat(8, 1), tuple(map(str, range(n))))


def test_picked_rows_of_an_observation_belong_together():
    picked = observation(5).rows([3, 0])
    assert len(picked) == 2 and picked.instructions == ("3", "0")
    assert picked.images[:, 0, 0, 0, 0].tolist() == [3, 0] and picked.proprio[:, 7].tolist() == [3, 0]


def test_what_images_have_been_through_goes_with_the_rows():
    raw = observation(4)
    assert raw.image_transform is None and raw.agent_view[2, 0, 0, 0] == 2
    shown = {"images": raw.images, "proprio": raw.proprio, "instruction": raw.instructions}
    frames = 9 + raw.images[:, 0]
    transformed = Observation.from_vector_env(shown | {"image_transform": "crop", "frames": frames}).rows([3, 1])
    assert transformed.image_transform == "crop" and transformed.agent_view[:, 0, 0, 0].tolist() == [12, 10]
    assert transformed.images[:, 0, 0, 0, 0].tolist() == [3, 1]
    with pytest.raises(ValueError, match=r"rendered images were not kept.*keep_frames=True"):
        _ = Observation.from_vector_env(shown | {"image_transform": "crop"}).agent_view


def test_an_observation_of_a_vector_environment_is_a_copy():
    reused = {
        "images": np.zeros((1, 1, 2, 2, 3), np.uint8),
        "proprio": np.zeros((1, 8), np.float32),
        "instruction": ("a",),
    }
    obs = Observation.from_vector_env(reused)
    reused["images"][:], reused["proprio"][:] = 9, 9
    assert (obs.images == 0).all() and (obs.proprio == 0).all() and obs.instructions == ("a",)


def test_concatenated_inputs_give_back_their_rows():
    def inputs(*numbers):
        images = torch.tensor(numbers, dtype=torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, 1, 2, 2, 3)
        return PolicyInputs(images, torch.tensor(numbers).float().view(-1, 1).expand(-1, 8), tuple(map(str, numbers)))

    whole = PolicyInputs.concatenate([inputs(0, 1), inputs(2), inputs(3, 4)])
    picked = whole.rows(torch.tensor([4, 2]).tolist())
    assert len(whole) == 5 and whole.images.dtype == torch.uint8
    assert picked.instructions == ("4", "2")
    assert picked.images[:, 0, 0, 0, 0].tolist() == [4, 2] and picked.proprio[:, 0].tolist() == [4, 2]
