"""vla_rl/model/quantization.py: 4-bit weights are the paper's, and whatever reads them reads the same numbers."""

from __future__ import annotations

import importlib.util
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import start_gae_ppo_training as start
from tests.model.policies import DECODERS, make_obs, make_policy, move_adapters
from vla_rl import sft
from vla_rl.model import policy as policy_module
from vla_rl.model import prismatic, quantization
from vla_rl.model.adapter import digest_base
from vla_rl.model.prismatic import load_network
from vla_rl.model.quantization import (
    Linear4bit,
    check_quantization,
    count_weights,
    dense_parameters,
    pack,
    sample_of,
    unpack,
)
from vla_rl.model.tiny_openvla import ensure_tiny_openvla
from vla_rl.preflight import needs
from vla_rl.run.interruption import Stop
from vla_rl.run.load_settings import load_config
from vla_rl.run.run_folder import changed_settings
from vla_rl.run.settings import ConfigError
from vla_rl.run.sft_settings import SftConfig

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="optional: pip install -r requirements-4bit.txt"
)
# QLoRA (arXiv:2305.14314), appendix E, rounded
NF4 = (
    *(-1.0, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0.0),
    *(0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1.0),
)


def weight_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def make_layer(out: int = 40, size: int = 24, bias: bool = True, dtype: torch.dtype = torch.float32) -> Linear4bit:
    torch.manual_seed(0)
    return Linear4bit(
        nn.Linear(size, out, bias=bias, dtype=dtype).requires_grad_(False), weight_of(out, size, dtype=dtype)
    )


# ---------------------------------------------------------------------- without bitsandbytes


@pytest.fixture
def missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "bitsandbytes" else find(name, *args)
    )


def test_missing_bitsandbytes_is_told_before_anything_heavy(missing, monkeypatch, tmp_path):
    message = (
        r"policy\.quantization=nf4 needs bitsandbytes, .*pip install -r requirements-4bit\.txt .*quantization=none"
    )
    for module, name in ((policy_module, "load_network"), (needs, "find_and_check"), (sft, "read_data")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("too late"))
    with pytest.raises(ConfigError, match=message):
        make_policy(quantization="nf4")
    config = load_config("configs/tiny_gae_ppo.yaml", ["policy.quantization=nf4", f"run.output_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=message) as error:
        needs.check_start(config, resumed=False)
    assert "\n" not in str(error.value)
    overrides = ["data.files=[x.hdf5]", "policy.quantization=nf4", f"run.output_dir={tmp_path}"]
    with pytest.raises(ConfigError, match=message):
        sft.fine_tune(
            load_config("configs/tiny_sft.yaml", [*overrides, "training.method=lora"], kind=SftConfig), None, Stop()
        )
    assert list(tmp_path.iterdir()) == []


def test_without_quantization_nothing_is_needed(missing):
    check_quantization("none", "cpu")


def test_another_quantization_is_refused():
    with pytest.raises(ConfigError, match="'int3'; expected none or nf4"):
        check_quantization("int3")
    with pytest.raises(ConfigError, match=r"policy\.quantization"):
        load_config("configs/tiny_gae_ppo.yaml", ["policy.quantization=int8"])


def test_bitsandbytes_that_does_not_work_here_is_told_in_one_line(monkeypatch):
    def fail(weight):
        raise RuntimeError("no CUDA library\nfor 99.9")

    monkeypatch.setattr(quantization, "pack", fail)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match=r"does not work on cpu \(RuntimeError: no CUDA library for 99\.9\)"):
        check_quantization("nf4", "cpu")


def test_weights_that_are_trained_are_not_packed():
    overrides = ["data.files=[x.hdf5]", "policy.quantization=nf4", "training.method=full"]
    with pytest.raises(ConfigError, match=r"training\.method=full with policy\.quantization=nf4"):
        load_config("configs/tiny_sft.yaml", overrides, kind=SftConfig)


@pytest.mark.parametrize("program", [start, sft])
def test_a_run_keeps_its_quantization(program):
    before = load_config("configs/tiny_gae_ppo.yaml", [])
    after = load_config("configs/tiny_gae_ppo.yaml", ["policy.quantization=nf4"])
    changed = changed_settings(before, after, program.FIXED_ON_RESUME, program.FREE_ON_RESUME)
    assert any("policy.quantization" in text for text in changed)


def test_a_network_without_4_bit_layers_is_read_as_it_is(network):
    pairs = zip(dense_parameters(network), network.named_parameters(), strict=True)
    assert all(name == other and tensor is parameter for (name, tensor), (other, parameter) in pairs)
    assert count_weights(network) == sum(p.numel() for p in network.parameters())


def test_a_sample_is_spread_over_the_weights():
    assert sample_of(torch.arange(3.0)).tolist() == [0, 1, 2]
    values = sample_of(torch.arange(256.0, dtype=torch.float64).view(16, 16))
    assert values.tolist() == [4 * i for i in range(64)] and values.dtype == torch.float32


# ---------------------------------------------------------------------- one layer


@needs_bitsandbytes
@pytest.mark.parametrize("shape", [(40, 64), (16, 352), (3, 24)])  # rows of 1, 5.5 and 0.375 blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_become_the_nearest_of_the_papers_16_values_times_the_largest_of_the_block(shape, dtype):
    weight = weight_of(*shape, dtype=dtype)
    packed, state = pack(weight)
    assert packed.dtype == torch.uint8 and packed.numel() == weight.numel() // 2
    flat = F.pad(weight.double().flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = flat.abs().amax(dim=1, keepdim=True)
    table = torch.tensor(NF4, dtype=torch.float64)
    nearest = (flat[:, :, None] / largest[:, :, None] - table).abs().amin(dim=2) * largest
    found = F.pad(unpack(packed, state).double().flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    # the largest of a block is itself in 8 bit, and of a bfloat16 weight the result is rounded
    assert ((found - flat).abs() <= nearest + 0.02 * largest).all()
    # a normal distribution is known to 9 % of its size
    assert 0.08 < ((found - flat).norm() / flat.norm()).item() < 0.1


@needs_bitsandbytes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_multiplies_by_its_unpacked_weights_bit_for_bit(bias, dtype):
    layer = make_layer(bias=bias, dtype=dtype)
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    weight = layer.dequantize()
    assert weight.shape == (40, 24) and weight.dtype == dtype
    expected = F.linear(x, weight, layer.bias)
    grad = torch.randn_like(expected)
    assert layer(x).equal(expected)
    assert torch.autograd.grad(layer(x), x, grad)[0].equal(torch.autograd.grad(expected, x, grad)[0])
    with torch.no_grad():  # the same again where nothing is recorded, for one row, after training
        assert layer(x).equal(expected) and layer.eval()(x).equal(expected)
        torch.testing.assert_close(layer(x[0, :1]), expected[0, :1])
    assert layer.train()(x).requires_grad


@needs_bitsandbytes
def test_backward_pass_keeps_packed_weights_only():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        make_layer()(torch.randn(5, 24, requires_grad=True))
    assert [t.dtype for t in kept] == [torch.uint8]


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_compiles_into_one_graph(dtype):
    layer = make_layer(dtype=dtype)
    x = torch.randn(3, 5, 24, dtype=dtype, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    grad = torch.randn(3, 5, 40, dtype=dtype)
    assert torch.autograd.grad(compiled(x), x, grad)[0].equal(torch.autograd.grad(layer(x), x, grad)[0])
    with torch.no_grad():
        assert compiled(x).equal(layer(x))


# ---------------------------------------------------------------------- the whole network


@needs_bitsandbytes
def test_the_language_models_linear_layers_are_packed_and_nothing_else():
    dense, packed = (load_network(ensure_tiny_openvla(), dtype=torch.bfloat16, quantization=q) for q in ("none", "nf4"))
    names = {name for name, module in packed.named_modules() if isinstance(module, Linear4bit)}
    assert names == set(dense.adaptable_linears(language_model_only=True)) == set(packed.adaptable_linears(True))
    assert "language_model.lm_head" not in names and len(names) == 7 * len(dense.language_model.model.layers)
    found, original = dict(dense_parameters(packed)), dict(dense.named_parameters())
    assert list(found) == list(original) and count_weights(packed) == count_weights(dense)
    for name, tensor in found.items():
        assert tensor.shape == original[name].shape and tensor.dtype == torch.bfloat16
        if name.removesuffix(".weight") in names:
            assert 0.05 < ((tensor - original[name]).norm() / original[name].norm()).item() < 0.12
        else:
            assert tensor.equal(original[name])


@needs_bitsandbytes
def test_a_weight_is_gone_when_the_next_one_is_packed(monkeypatch):
    seen = []

    def watched(layer, weight):
        assert not [ref for ref in seen if ref() is not None]
        seen.append(weakref.ref(weight))
        return Linear4bit(layer, weight)

    monkeypatch.setattr(prismatic, "Linear4bit", watched)
    load_network(ensure_tiny_openvla(), dtype=torch.bfloat16, quantization="nf4")
    assert len(seen) >= 7


@needs_bitsandbytes
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_acts_is_what_is_scored_and_trained(decoder, dtype):
    policy = make_policy(decoder, dtype=dtype, quantization="nf4")
    move_adapters(policy)
    assert policy.dtype == dtype and {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    out = policy.act(make_obs())
    scored = policy.evaluate_actions(out.inputs, out.action_tokens, temperature=1.0)
    if decoder == "parallel":
        assert scored.logprobs.equal(out.logprobs)
    else:  # one token after another, as without quantisation
        assert (scored.logprobs - out.logprobs).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)
    scored.logprobs.mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.trainable_parameters())
    assert sum(p.grad.abs().sum() for p in policy.trainable_parameters()) > 0
    base = make_policy(decoder, dtype=dtype, quantization="nf4", lora=None)
    expected = base.evaluate_actions(base.prepare(make_obs()), out.action_tokens, temperature=1.0).logprobs
    assert policy.reference_logprobs(out.inputs, out.action_tokens, temperature=1.0).equal(expected)


@needs_bitsandbytes
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("decoder", DECODERS)
def test_merged_checkpoint_is_plain_and_acts_as_what_was_trained(decoder, adapted, tmp_path):
    settings = {} if adapted else {"lora": None}
    policy = make_policy(decoder, quantization="nf4", **settings)
    move_adapters(policy)
    policy.save_merged(tmp_path)
    merged, dense = make_policy(decoder, path=tmp_path, lora=None), make_policy(decoder, lora=None)
    shapes = [[(n, p.shape, p.dtype) for n, p in other.network.named_parameters()] for other in (merged, dense)]
    assert shapes[0] == shapes[1]
    obs = make_obs()
    tokens = policy.act(obs).action_tokens
    ours, theirs, unquantized = (
        p.evaluate_actions(p.prepare(obs), tokens, temperature=1.0).logprobs for p in (policy, merged, dense)
    )
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert (ours - unquantized).abs().max() > 0.01


@needs_bitsandbytes
def test_a_packed_base_is_another_base_the_same_on_every_machine(monkeypatch, tmp_path):
    policy, dense = make_policy(quantization="nf4"), make_policy()
    assert policy.fingerprint() != dense.fingerprint()
    policy.save_adapter(tmp_path)
    make_policy(quantization="nf4", seed=5).load_adapter(tmp_path)
    with pytest.raises(ConfigError, match=r"another base .*give the checkpoint and the policy\.quantization that"):
        dense.load_adapter(tmp_path)
    monkeypatch.setattr(quantization, "pack", lambda weight: pack(weight.flip(0)))  # as if kernels rounded otherwise
    assert make_policy(quantization="nf4").fingerprint() == policy.fingerprint()


def test_digest_of_a_plain_base_is_that_of_runs_before_there_was_quantisation(network):
    assert digest_base(network)[:16] == "ed621f547de40c99"
