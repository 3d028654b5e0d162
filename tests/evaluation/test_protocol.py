"""Equal protocols and weights are equal, and nothing else is."""

import json

import torch

from vla_rl.evaluation.protocol import digest, measured, suite_settings
from vla_rl.evaluation.subject import of_checkpoint
from vla_rl.run.settings import Config

SUITE = {"env.task_suite": "libero_spatial", "env.task_ids": [0]}


def test_the_protocol_is_the_official_one_of_each_suite():
    subject = of_checkpoint("tiny-openvla", None, [], SUITE | {"env.task_ids": [0, 3]})
    protocol = measured(subject.config, subject.temperature, ["libero_spatial", "libero_10"], 8)
    assert protocol["max_steps"] == {"libero_spatial": 220, "libero_10": 520}
    assert (protocol["settle_steps"], protocol["states"], protocol["center_crop"]) == (10, list(range(50)), True)
    assert (protocol["render"], protocol["temperature"], protocol["unnorm_key"]) == ("fast", 1.0, "libero_spatial")
    assert json.loads(json.dumps(protocol)) == protocol
    assert suite_settings(subject.config, "libero_10").env.task_ids == [0, 3]
    assert Config().eval.states == list(range(50))


def test_weights_differ_by_text_name_and_bit_and_not_by_their_order():
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    same = digest("base", {"a": one, "b": other})
    assert digest("base", {"b": other.clone(), "a": one.clone()}) == same and len(same) == 32
    bit = torch.nextafter(one, one + 1)
    texts = [digest("another", {"a": one, "b": other}), digest("base", {"a": bit, "b": other}), digest("base", {})]
    assert len({same, *texts, digest("base", {"a": one, "c": other})}) == 5
