"""What the parts hand to each other keeps its rows together."""

import numpy as np
import torch

from vla_rl.types import Observation, PolicyInputs, to_device


def observation(n: int) -> Observation:
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1, 1).repeat(3, axis=-1)
    return Observation(images, np.arange(n, dtype=np.float32).reshape(n, 1).repeat(8, 1), tuple(map(str, range(n))))


def test_picked_rows_of_an_observation_belong_together():
    picked = observation(5).rows([3, 0])
    assert len(picked) == 2 and picked.instructions == ("3", "0")
    assert picked.images[:, 0, 0, 0, 0].tolist() == [3, 0] and picked.proprio[:, 7].tolist() == [3, 0]


def test_what_images_have_been_through_goes_with_the_rows():
    raw = observation(4)
    assert raw.image_transform is None
    shown = {"images": raw.images, "proprio": raw.proprio, "instruction": raw.instructions}
    transformed = Observation.from_vector_env(shown | {"image_transform": "crop"}).rows([3, 1])
    assert transformed.image_transform == "crop" and transformed.images[:, 0, 0, 0, 0].tolist() == [3, 1]


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
    part = whole.rows(slice(3, 9))
    assert part.instructions == ("3", "4") and part.images[:, 0, 0, 0, 0].tolist() == [3, 4]
    assert part.proprio[:, 7].tolist() == [3, 4] and part.images.data_ptr() == whole.images[3:].data_ptr()


def test_a_copy_to_a_gpu_goes_through_pinned_memory_without_waiting():
    class Recorded:
        """A tensor that notes what is asked of it."""

        def __init__(self, kind):
            self.device, self.asked = torch.device(kind), []

        def pin_memory(self):
            self.asked.append("pin")
            return self

        def to(self, device, non_blocking=False):
            self.asked.append((device.type, non_blocking))

    asked = {}
    for source, target in (("cpu", "cuda"), ("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cpu")):
        tensor = Recorded(source)
        to_device(tensor, torch.device(target))
        asked[source, target] = tensor.asked
    assert asked["cpu", "cuda"] == ["pin", ("cuda", True)] and asked["cuda", "cuda"] == [("cuda", False)]
    assert asked["cuda", "cpu"] == [("cpu", False)]  # else its values might be read before they have come
    assert asked["cpu", "cpu"] == [("cpu", False)]
    here = torch.zeros(2)
    assert to_device(here, torch.device("cpu")) is here
