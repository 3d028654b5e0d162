"""vla_rl/model/adapter.py: LoRA in the right layers, in peft's format, with the effect that it was trained for."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.policies import make_obs, make_policy
from vla_rl.model.adapter import Adapter, surviving_change
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.prismatic import load_network
from vla_rl.model.tiny_openvla import ensure_tiny_openvla
from vla_rl.run.settings import ConfigError, LoraConfig


@pytest.mark.parametrize(
    ("target", "last_layers"), [("all-linear", None), ("language-model", None), ("language-model", 1)]
)
def test_adapters_sit_where_the_setting_says(target, last_layers):
    policy = make_policy(lora=LoraConfig(rank=2, target_modules=target, last_layers=last_layers))
    names = {n.rsplit(".lora_", 1)[0] for n, p in policy.network.named_parameters() if p.requires_grad}
    plain = load_network(ensure_tiny_openvla())
    assert names == set(plain.adaptable_linears(target == "language-model", last_layers))
    assert not any("lm_head" in n or "embed" in n for n in names)
    assert all(n.startswith("language_model.") for n in names) == (target == "language-model")


def test_adapter_saves_loads_and_is_read_by_peft(policy, tmp_path):
    obs = make_obs()
    policy.save_adapter(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    other = make_policy(policy.decoder, seed=9)
    tokens = policy.act(obs).action_tokens
    expected = policy.evaluate_actions(policy.prepare(obs), tokens, temperature=1.0).logprobs
    assert not torch.allclose(other.evaluate_actions(other.prepare(obs), tokens, temperature=1.0).logprobs, expected)
    other.load_adapter(tmp_path)
    assert other.evaluate_actions(other.prepare(obs), tokens, temperature=1.0).logprobs.equal(expected)
    assert other.fingerprint() == policy.fingerprint()

    plain = make_policy(policy.decoder, lora=None)
    peft.PeftModel.from_pretrained(plain.network, tmp_path)
    scored = plain.evaluate_actions(plain.prepare(obs), tokens, temperature=1.0).logprobs
    assert scored.equal(expected)


def test_adapter_of_other_settings_is_refused(parallel, tmp_path):
    parallel.save_adapter(tmp_path)
    with pytest.raises(ConfigError, match=r"rank 4 and alpha 8.*rank 2 and alpha 8"):
        make_policy(lora=LoraConfig(rank=2, alpha=8)).load_adapter(tmp_path)
    with pytest.raises(ConfigError, match="another model or other target modules"):
        make_policy(lora=LoraConfig(rank=4, alpha=8, target_modules="language-model")).load_adapter(tmp_path)
    with pytest.raises(ConfigError, match=r"no adapter_config\.json"):
        parallel.load_adapter(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="this policy has no adapter"):
        make_policy(lora=None).save_adapter(tmp_path)


def test_merged_checkpoint_acts_as_base_and_adapter_together(policy, tmp_path):
    policy.save_merged(tmp_path)
    merged = make_policy(policy.decoder, path=tmp_path, lora=None)
    obs = make_obs()
    out = policy.act(obs)
    scored = merged.evaluate_actions(merged.prepare(obs), out.action_tokens, temperature=1.0)
    torch.testing.assert_close(scored.logprobs, out.logprobs, atol=2e-4, rtol=0)
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(ensure_tiny_openvla() / "model.safetensors"))


def test_what_survives_the_rounding_by_hand():
    """Between 1 and 2 a bfloat16 has steps of 1/128, below 1 of 1/256."""
    delta = torch.tensor([[0.001, 0.006, 1 / 128], [-0.003, -0.001, 0.0]])
    weight = torch.ones(2, 3, dtype=torch.bfloat16)
    rounded = (weight.float() + delta).bfloat16()
    kept, total, unchanged = surviving_change(weight, delta, rounded)
    assert total == pytest.approx(1e-6 + 36e-6 + 1 / 128**2 + 9e-6 + 1e-6)
    assert kept == pytest.approx(0.006 / 128 + 1 / 128**2 + 0.003 / 256) and unchanged == 3
    exact = weight.float() + delta
    assert surviving_change(weight, delta, exact) == (pytest.approx(total, rel=1e-4), pytest.approx(total), 1)
    # weights between two steps are rounded anyway: only what the change adds to that counts
    assert surviving_change(torch.tensor([1.003]), torch.tensor([1e-3]), torch.tensor([1.0078125]).bfloat16()) == (
        *(pytest.approx(1e-3 / 128), pytest.approx(1e-6)),
        0,
    )


def test_merged_weights_are_float32_unless_told_otherwise_and_say_what_is_left(tmp_path, caplog):
    """A base in bfloat16, an adapter with B of 3e-4: in bfloat16 most of the change is rounded away."""
    caplog.set_level("INFO")
    policy = make_policy(dtype=torch.bfloat16, use_proprio=True)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in policy.adapter_tensors().items():
        if "lora_B" in name:
            tensor.data.normal_(std=3e-4, generator=generator)
    whole = policy.save_merged(tmp_path / "whole")
    rounded = policy.save_merged(tmp_path / "rounded", torch.bfloat16)
    assert whole.share == pytest.approx(1, abs=1e-6) and whole.unchanged < 0.01 * whole.weights
    assert 0 < rounded.share < 0.5 and rounded.unchanged > 0.7 * rounded.weights
    assert f"{rounded.share:.1%} of the adapter's change of the weights survives the rounding, " in caplog.text
    for name, dtype in (("whole", torch.float32), ("rounded", torch.bfloat16)):
        for file in ("model", "proprio_projector"):
            saved = load_file(tmp_path / name / f"{file}.safetensors")
            assert {tensor.dtype for tensor in saved.values()} == {dtype}
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    base = dict(policy.network.named_parameters())[name.replace(".weight", ".base_layer.weight")].float()
    delta = policy.network.get_submodule(name.removesuffix(".weight")).get_delta_weight("default")
    assert load_file(tmp_path / "whole/model.safetensors")[name].equal(base + delta)


def test_without_a_change_nothing_is_lost(tmp_path):
    assert str(make_policy().save_merged(tmp_path / "a")).endswith("there is no adapter, or it changes nothing")
    assert make_policy(lora=None).save_merged(tmp_path / "b", torch.bfloat16).share == 1


def test_adapters_stay_float32_on_a_bfloat16_base():
    policy = make_policy(dtype=torch.bfloat16)
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    assert {p.dtype for p in policy.network.parameters() if not p.requires_grad} == {torch.bfloat16}
    out = policy.act(make_obs())
    assert out.hidden.dtype == out.logprobs.dtype == torch.float32
    scored = policy.evaluate_actions(out.inputs, out.action_tokens, temperature=1.0)
    scored.logprobs.mean().backward()
    assert scored.logprobs.dtype == torch.float32
    # the same forward of the same batch, so equal even in bfloat16
    assert ((scored.logprobs - out.logprobs).exp() - 1).abs().max() < 1e-4
    assert all(p.grad is not None for p in policy.trainable_parameters())


def test_values_given_to_save_adapter_are_what_is_written(tmp_path):
    policy = OpenVLAPolicy.from_checkpoint(
        "tiny-openvla-random", "parallel", unnorm_key="libero_spatial", lora=LoraConfig(rank=2)
    )
    values = [torch.full_like(p, float(i)) for i, p in enumerate(policy.trainable_parameters())]
    policy.save_adapter(tmp_path / "a", values)
    assert not any(torch.equal(p, v) for p, v in zip(policy.trainable_parameters(), values, strict=True))
    policy.load_adapter(tmp_path / "a")
    assert all(torch.equal(p, v) for p, v in zip(policy.trainable_parameters(), values, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_rslora": True}, "use_rslora=True"),  # scales by alpha / sqrt(rank): 0.35 of the effect at rank 8
        ({"use_dora": True}, "use_dora=True"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),  # which changes the base weights, as the next ones
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights=pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
        ({"init_lora_weights": "corda", "corda_config": {"x": 1}}, "init_lora_weights=corda"),
        ({"init_lora_weights": "loftq", "loftq_config": {"x": 1}}, "init_lora_weights=loftq"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights=lora_ga"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow=1"),
    ],
)
def test_adapter_that_computes_something_else_is_refused(saved, change, words):
    policy, folder = saved
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=f"made with .*{words}") as error:
        policy.load_adapter(folder)
    assert "\n" not in str(error.value)


@pytest.fixture
def saved(parallel, tmp_path):
    parallel.save_adapter(tmp_path)
    return parallel, tmp_path


@pytest.mark.parametrize(("start", "other"), [(True, {}), ("gaussian", {}), (True, {"use_rslora": True})])
def test_adapter_that_peft_made_has_its_exact_effect_or_is_refused(parallel, tmp_path, start, other):
    theirs = make_policy(lora=None)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.1,
        init_lora_weights=start,
        target_modules=theirs.network.adaptable_linears(),
        **other,
    )
    model = peft.get_peft_model(theirs.network, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    model.save_pretrained(tmp_path)
    ours = make_policy(seed=3)
    if other:
        with pytest.raises(ConfigError, match="made with use_rslora=True"):
            ours.load_adapter(tmp_path)
        return
    ours.load_adapter(tmp_path)
    inputs = ours.prepare(make_obs())
    torch.testing.assert_close(ours.compute_hidden(inputs), theirs.compute_hidden(inputs), atol=1e-5, rtol=0)
    assert (ours.compute_hidden(inputs) - parallel.compute_hidden(inputs)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("adapter_config.json", b"{", "is not JSON"),
        ("adapter_config.json", b"[]", "expected a JSON object, got list"),
        ("adapter_config.json", b"3", "expected a JSON object, got int"),
        (
            "adapter_config.json",
            b'{"r": "4", "lora_alpha": 8}',
            "expected r from 1 to 65536 and lora_alpha .* got '4' and 8",
        ),
        ("adapter_config.json", b'{"r": [4], "lora_alpha": 8}', r"got .4. and 8"),
        ("adapter_config.json", b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("adapter_model.safetensors", b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("adapter_model.safetensors", b"", "cut off or no safetensors"),
        ("adapter_model.safetensors", None, "cut off or no safetensors"),
    ],
)
def test_torn_adapter_files_are_named_in_one_line(saved, name, content, words):
    policy, folder = saved
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ConfigError, match=rf"{words}") as error:
        policy.load_adapter(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_adapter_in_the_old_format_is_named(saved):
    policy, folder = saved
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"no adapter_model.safetensors in .*, only adapter_model\.bin; give"):
        policy.load_adapter(folder)


def test_settings_that_say_nothing_of_what_is_computed_are_passed_over(parallel, tmp_path):
    parallel.save_adapter(tmp_path)
    path = tmp_path / "adapter_config.json"
    harmless = {"base_model_name_or_path": "elsewhere", "inference_mode": False, "lora_dropout": 0.1, "use_dora": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | harmless))
    parallel.load_adapter(tmp_path)


def test_adapter_of_another_base_of_the_same_shapes_is_refused(parallel, tmp_path):
    adapter: Adapter = parallel.adapter
    adapter.save(tmp_path, base_digest="0" * 64)
    with pytest.raises(ConfigError, match=r"trained on another base .*fingerprint 000000000000"):
        parallel.load_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")  # as peft writes it: the base is not known
    parallel.load_adapter(tmp_path)
