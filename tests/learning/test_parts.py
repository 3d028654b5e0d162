"""The policy and the value head are those that the settings name."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from vla_rl.learning.parts import build_policy, build_trainer, build_value_head
from vla_rl.reports.metrics import MetricsLogger
from vla_rl.run.load_settings import load_config
from vla_rl.run.settings import ConfigError

TINY = "configs/tiny_gae_ppo.yaml"
SMALL = ["policy.lora.rank=2", "policy.lora.alpha=4"]


def test_a_policy_reads_a_perturbed_suite_with_its_base_suite_s_statistics():
    assert (
        build_policy(load_config(TINY, ["env.task_suite=libero_spatial_lan"])).unnorm_key == "libero_spatial_no_noops"
    )


def test_number_of_torch_threads_and_size_of_the_value_head_are_those_set():
    threads = torch.get_num_threads()
    try:
        config = load_config(TINY, ["run.torch_threads=3", "value_head.hidden_sizes=[7, 5]"])
        policy = build_policy(config)
        assert torch.get_num_threads() == 3
        head = build_value_head(config, policy.hidden_size)
        assert [list(p.shape) for p in head.parameters() if p.dim() == 2] == [[7, 128], [5, 7], [1, 5]]
        assert build_value_head(load_config("configs/tiny_grpo.yaml"), 128) is None
    finally:
        torch.set_num_threads(threads)


def test_what_is_only_evaluated_needs_no_adapter():
    policy = build_policy(load_config(TINY), adapted=False)
    assert policy.adapter is None and policy.trainable_parameters() == []


@pytest.fixture
def trained(tmp_path) -> Path:
    """LoRA weights of rank 2 in peft's format, none of them 0."""
    policy = build_policy(load_config(TINY, SMALL))
    with torch.no_grad():
        for number, parameter in enumerate(policy.trainable_parameters()):
            parameter.fill_(0.01 * (1 + number % 3))
    policy.save_adapter(tmp_path / "trained")
    return tmp_path / "trained"


def test_training_begins_with_the_lora_weights_that_are_named(trained):
    config = load_config(TINY, [*SMALL, f"policy.adapter={trained}"])
    policy = build_policy(config)
    saved = load_file(trained / "adapter_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in policy.adapter_tensors().items())
    assert all(parameter.requires_grad for parameter in policy.trainable_parameters())
    plain = build_policy(load_config(TINY, SMALL))
    assert policy.fingerprint() == plain.fingerprint()  # a checkpoint of the one fits the other


@pytest.mark.libero
def test_a_resumed_run_does_not_need_what_it_began_with(trained, tmp_path, monkeypatch):
    envs = SimpleNamespace(num_envs=1, num_workers=1, simulators_per_worker=1, close=lambda: None)
    monkeypatch.setattr("vla_rl.learning.parts.make_vector_env", lambda *args, **kwargs: envs)
    config = load_config(TINY, [*SMALL, f"policy.adapter={trained}"])
    shutil.rmtree(trained)
    with ExitStack() as cleanup:
        make = lambda *parts: parts  # noqa: E731
        logger = MetricsLogger(tmp_path, config)
        parts = build_trainer(make, config, logger, cleanup, resumed=True)
        assert parts[0].policy.adapter == str(trained)  # what the checkpoints say
        with pytest.raises(ConfigError, match=r"policy.adapter=.*trained: no such folder"):
            build_trainer(make, config, logger, cleanup)


@pytest.mark.libero
def test_the_logger_is_told_what_the_tasks_are(tmp_path, monkeypatch):
    envs = SimpleNamespace(num_envs=1, num_workers=1, simulators_per_worker=1, close=lambda: None)
    monkeypatch.setattr("vla_rl.learning.parts.make_vector_env", lambda *args, **kwargs: envs)
    config = load_config(TINY, ["env.task_ids=[4, 0]"])
    logger = MetricsLogger(tmp_path, config)
    with ExitStack() as cleanup:
        build_trainer(lambda *parts: parts, config, logger, cleanup)
    assert list(logger.instructions) == [4, 0]
    assert "top drawer" in logger.instructions[4] and "between the plate" in logger.instructions[0]
