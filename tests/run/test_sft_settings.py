"""vla_rl/run/sft_settings.py: combinations that cannot train are refused."""

from __future__ import annotations

import pytest

from vla_rl.run.load_settings import load_config
from vla_rl.run.settings import ConfigError
from vla_rl.run.sft_settings import SftConfig

DATA = ["data.name=n", "data.files=[d.hdf5]"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.batch_size=6", "training.micro_batch_size=4"], "not a multiple of training.micro_batch_size=4"),
        (["data.augment=false"], "need the centre crop afterwards"),
        (["training.method=full", "policy.dtype=bfloat16"], "rounds small steps away"),
        (["policy.decoder=autoregressive"], "decodes one action"),
        (["policy.adapter=runs/one"], "merge the two with python -m vla_rl.export"),
        (["policy.head=l1"], "what is trained is training.head=l1"),
        (["training.head=l1", "policy.decoder=autoregressive", "policy.chunk_size=1"], "set policy.decoder=parallel"),
        (["training.head=l1", "training.label_sigma=1"], "set training.label_sigma=0"),
    ],
)
def test_combination_that_cannot_train_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[*DATA, *overrides], kind=SftConfig)


def test_defaults_train():
    assert load_config(overrides=DATA, kind=SftConfig).training.method == "lora"
