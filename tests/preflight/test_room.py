"""What no machine or model could hold is refused with what fits; vla_rl.check's own checks of room are in tests/test_check.py."""

import pytest

from vla_rl.model.prismatic_config import read_config
from vla_rl.model.tiny_openvla import TRAINED
from vla_rl.preflight.room import check_sizes
from vla_rl.run.load_settings import load_config
from vla_rl.run.settings import ConfigError

GB = 10**9


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # 65,536 x 64 images of 3 x 112 x 112 bytes are 157.8 GB; 10 GB hold 265,731
        (
            ["rollout.num_envs=65536"],
            r"rollout.num_envs x .* = 4,194,304 needs 157.8 GB .* 10.0 GB are free; at most 265,731 fits",
        ),
        (["rollout.n_steps=100000"], r"rollout.num_envs x rollout.n_steps .* = 800,000 needs 30.1 GB"),
        (
            ["env.image_size=4096", "rollout.num_envs=256", "rollout.n_steps=2"],
            r"rollout.num_envs \(its images\) = 256 needs 12.9 GB",
        ),
        (["env.num_workers=100", "rollout.num_envs=100"], r"env.num_workers \(a simulator in each\) = 100 needs"),
        (
            ["value_head.hidden_sizes=[65536, 65536]"],
            r"value_head.hidden_sizes, .* needs 68.9 GB .* at most 625,000,000 fits",
        ),
        (
            ["policy.chunk_size=400"],
            r"policy.chunk_size=400 .* needs 2865 positions .* at most policy.chunk_size=279 fits",
        ),
    ],
)
def test_what_no_memory_or_model_could_hold_is_refused_with_the_size_that_fits(overrides, words):
    given = " ".join(overrides)
    small = [o for o in ("policy.num_images=1", "rollout.n_steps=64") if o.partition("=")[0] not in given]
    config = load_config("configs/tiny_gae_ppo.yaml", [*small, *overrides])
    with pytest.raises(ConfigError, match=words) as error:
        check_sizes(config, read_config(TRAINED), available=10 * GB)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path", ["configs/tiny_gae_ppo.yaml", "configs/gae_ppo_config.yaml", "configs/grpo_config.yaml"]
)
def test_shipped_settings_fit(path):
    assert "GB at the least of 16.0 GB" in check_sizes(load_config(path), read_config(TRAINED), available=16 * GB)
