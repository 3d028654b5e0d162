"""vla_rl/model/lora_linear.py: peft's own numbers in float32, as near to them as bfloat16 can be, and its files."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners import lora
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.model.policies import DECODERS, make_obs, make_policy, move_adapters
from vla_rl.model.lora_linear import LoraLinear, add_adapters
from vla_rl.model.policy import OpenVLAPolicy

TWO_IMAGES = {"num_images": 2, "use_proprio": True}
NETWORKS = [pytest.param(d, s, id=f"{d}-{len(s)}") for d in DECODERS for s in ({}, TWO_IMAGES)]


def make_layers(bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> tuple[LoraLinear, lora.Linear]:
    """Ours and peft's, of the same weights: 24 -> 40, rank 8, scaled by 4 / 8."""
    torch.manual_seed(0)
    base = nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)
    config = peft.LoraConfig(r=8, lora_alpha=4)
    ours = LoraLinear(base, "default", config, r=8, lora_alpha=4)
    theirs = lora.Linear(base, "default", config, r=8, lora_alpha=4)
    for layer in (ours, theirs):
        layer.lora_A.float(), layer.lora_B.float()
        layer.lora_A.default.weight.data = torch.linspace(-1, 1, 8 * 24).sin().view(8, 24)
        layer.lora_B.default.weight.data = torch.linspace(0, 2, 40 * 8).cos().view(40, 8)
    return ours, theirs


def forward_and_gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """y, and the gradients to x, A and B of a weighted sum of it."""
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])]


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


# ---------------------------------------------------------------------- one layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_float32_layer_is_pefts_bit_for_bit(bias, shape):
    x = inputs(*shape, dtype=torch.float32)
    ours, theirs = (forward_and_gradients(layer, x) for layer in make_layers(bias, torch.float32))
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_bfloat16_layer_is_pefts_but_for_rounding_and_has_float32_gradients(bias, shape):
    x = inputs(*shape)
    layer, theirs = make_layers(bias)
    y, *gradients = forward_and_gradients(layer, x)
    assert y.shape == (*shape, 40) and y.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    # the same in float64: what is left is the rounding of A, B, W x, A x and y, each by up to 2^-9
    a, b = layer.lora_A.default.weight.double(), layer.lora_B.default.weight.double()
    exact = x.double() @ layer.weight.double().T + 0.5 * x.double() @ a.T @ b.T
    exact = exact + layer.bias.double() if bias else exact
    assert (y - exact).abs().max() < 5 * 2**-9 * exact.abs().max()
    for mine, his in zip(gradients, forward_and_gradients(theirs, x)[1:], strict=True):
        assert cosine(mine, his) > 0.9999 and (mine.norm() / his.norm()).item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_recorded_and_what_is_not_give_the_same_numbers(bias):
    layer, _ = make_layers(bias)
    x = inputs(3, 5)
    recorded = layer(x)
    with torch.no_grad():
        assert layer(x).equal(recorded) and layer(x[0]).equal(recorded[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switched_off_layer_is_its_base(dtype):
    layer, _ = make_layers(dtype=dtype)
    x, on = inputs(3, 5, dtype=dtype), layer(inputs(3, 5, dtype=dtype))
    layer.enable_adapters(False)
    assert layer(x).equal(layer.base_layer(x)) and not layer(x).equal(on)
    layer.enable_adapters(True)
    assert layer(x).equal(on)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_merged_by_peft_is_not_adapted_twice(dtype):
    layer, _ = make_layers(dtype=dtype)
    x, adapted = inputs(3, 5, dtype=dtype), layer(inputs(3, 5, dtype=dtype))
    layer.merge()
    assert (layer(x) - adapted).abs().max() < (1e-5 if dtype == torch.float32 else 0.02) * adapted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_compiles_into_one_graph_in_every_state(dtype):
    """With gradients and without, 2-D and 3-D, switched off; the graph's own numbers, so a backend without a compiler."""
    layer, _ = make_layers(dtype=dtype)
    x, plain = inputs(3, 5, dtype=dtype), forward_and_gradients(layer, inputs(3, 5, dtype=dtype))
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert all(a.equal(b) for a, b in zip(forward_and_gradients(compiled, x), plain, strict=True))
    with torch.no_grad():
        assert compiled(x).equal(plain[0]) and compiled(x[0]).equal(plain[0][0])
        layer.enable_adapters(False)
        assert compiled(x).equal(layer.base_layer(x))


@pytest.mark.parametrize(
    "keep", [(), (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)], ids=["none", "products"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_checkpointed_layer_has_the_same_gradients(bias, keep):
    """Recomputing all of it, or keeping matrix products: what is kept must not change afterwards."""
    layer, _ = make_layers(bias)
    plain = forward_and_gradients(layer, inputs(3, 5))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return checkpoint(
                self.layer,
                x,
                use_reentrant=False,
                context_fn=lambda: create_selective_checkpoint_contexts(list(keep)),
            )

    assert all(a.equal(b) for a, b in zip(forward_and_gradients(Checkpointed(), inputs(3, 5)), plain, strict=True))


def test_compiled_layers_of_one_shape_share_a_graph_and_keep_it_after_a_step():
    """torch gives up compiling a function after 8 graphs of it; the language model has 32 layers."""
    net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.Tanh()) for _ in range(10)))
    add_adapters(net, peft.LoraConfig(r=2, target_modules=[f"{i}.0" for i in range(10)]))
    torch._dynamo.reset()
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    for layer in net:
        layer.compile(backend=count, fullgraph=True)
    x = torch.randn(3, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        net(x).sum().backward()
        with torch.no_grad():
            net(x.detach())
            for parameter in net.parameters():
                parameter.add_(0.01)
    assert len(graphs) == 2  # with gradients and without


def test_nothing_of_the_base_product_is_kept_for_the_backward_pass():
    """x, A, B, A x and the frozen W are; the outputs, 40 wide, are not."""
    layer, _ = make_layers()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(inputs(3, 5).requires_grad_())
    shapes = {tuple(t.shape) for t in kept}
    assert shapes and not [shape for shape in shapes if 15 in shape and 40 in shape]
    assert {t.dtype for t in kept} == {torch.bfloat16}


def test_only_plain_lora_is_taken():
    with pytest.raises(AssertionError, match="only plain LoRA"):
        add_adapters(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["0"]))


# ---------------------------------------------------------------------- the whole network


def with_pefts_layers(policy: OpenVLAPolicy, **settings) -> OpenVLAPolicy:
    """The same policy with the same adapters, computed by peft's own layers."""
    other = make_policy(policy.decoder, lora=None, **settings)
    names = other.network.adaptable_linears()
    peft.get_peft_model(other.network, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)).eval()
    assert LoraLinear not in {type(module) for module in other.network.modules()}
    with torch.no_grad():
        for mine, his in zip(policy.trainable_parameters(), other.trainable_parameters(), strict=True):
            his.copy_(mine)
    return other


def score(policy: OpenVLAPolicy, obs, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and all adapters' gradients of their mean in one vector."""
    logprobs = policy.evaluate_actions(policy.prepare(obs), tokens, temperature=1.0).logprobs
    gradients = torch.autograd.grad(logprobs.mean(), policy.trainable_parameters())
    assert {g.dtype for g in gradients} == {torch.float32}
    return logprobs.detach(), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize(("decoder", "settings"), NETWORKS)
def test_float32_network_is_that_of_peft_bit_for_bit(decoder, settings):
    policy = make_policy(decoder, **settings)
    move_adapters(policy)
    obs = make_obs(2, settings.get("num_images", 1))
    tokens = policy.act(obs).action_tokens
    ours, theirs = (score(p, obs, tokens) for p in (policy, with_pefts_layers(policy, **settings)))
    assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1])


@pytest.mark.parametrize(("decoder", "settings"), NETWORKS)
def test_bfloat16_network_is_as_near_to_float32_as_that_of_peft(decoder, settings):
    """Over 24 observations the two errors differ by 25 % at most on two kinds of CPU; over 12 by 40 %."""
    policy = make_policy(decoder, dtype=torch.bfloat16, **settings)
    move_adapters(policy, 0.02)
    obs = make_obs(24, settings.get("num_images", 1))
    tokens = policy.act(obs).action_tokens
    logprobs, gradient = score(policy, obs, tokens)
    theirs = score(with_pefts_layers(policy, dtype=torch.bfloat16, **settings), obs, tokens)
    exact = score(with_pefts_layers(policy, **settings), obs, tokens)
    assert (gradient.norm() / exact[1].norm()).item() == pytest.approx(1, abs=0.05)
    assert 1 - cosine(gradient, exact[1]) < 1.5 * (1 - cosine(theirs[1], exact[1])) < 0.02
    assert (logprobs - exact[0]).abs().mean() < 1.5 * (theirs[0] - exact[0]).abs().mean() < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_act_and_score_agree_exactly_in_the_parallel_decoder(dtype):
    """The ratio of an update's first minibatch is 1 to the last bit: one path for both, whether gradients are recorded or not."""
    policy = make_policy("parallel", dtype=dtype, **TWO_IMAGES)
    move_adapters(policy)
    out = policy.act(make_obs(4, 2))
    assert policy.evaluate_actions(out.inputs, out.action_tokens, temperature=1.0).logprobs.equal(out.logprobs)


@pytest.mark.parametrize(("decoder", "settings"), NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 0.06)])
def test_merged_network_acts_as_the_adapted_one(decoder, settings, dtype, tolerance, tmp_path):
    policy = make_policy(decoder, dtype=dtype, **settings)
    move_adapters(policy, 0.02)
    policy.save_merged(tmp_path)
    merged = make_policy(decoder, path=tmp_path, lora=None, dtype=dtype, **settings)
    obs = make_obs(3, settings.get("num_images", 1))
    tokens = policy.act(obs).action_tokens
    ours, theirs = (
        p.evaluate_actions(p.prepare(obs), tokens, temperature=1.0).logprobs.detach() for p in (policy, merged)
    )
    base = policy.reference_logprobs(policy.prepare(obs), tokens, temperature=1.0)
    assert (ours - theirs).abs().mean() < tolerance < 0.5 * (ours - base).abs().mean()


def test_reference_is_the_base_to_the_last_bit():
    policy, base = make_policy(dtype=torch.bfloat16), make_policy(dtype=torch.bfloat16, lora=None)
    move_adapters(policy)
    out = policy.act(make_obs())
    expected = base.evaluate_actions(base.prepare(make_obs()), out.action_tokens, temperature=1.0).logprobs
    assert policy.reference_logprobs(out.inputs, out.action_tokens, temperature=1.0).equal(expected)


def test_training_step_on_a_bfloat16_base_is_finer_than_bfloat16_holds():
    policy = make_policy(dtype=torch.bfloat16)
    move_adapters(policy)
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-5, weight_decay=0.0)
    out = policy.act(make_obs())
    (-policy.evaluate_actions(out.inputs, out.action_tokens, temperature=1.0).logprobs.mean()).backward()
    optimizer.step()
    assert {s.dtype for state in optimizer.state.values() for s in state.values()} == {torch.float32}
    old, new = (torch.cat([p.flatten() for p in side]) for side in (before, policy.trainable_parameters()))
    # AdamW's first step is the learning rate, 1e-5; a bfloat16 near 0.05 comes in steps of 2e-4, 3e-5 at the finest here
    large = old.abs() > 0.01
    assert ((new - old)[large].abs() > 5e-6).float().mean() > 0.99
    assert (new.bfloat16() == old.bfloat16())[large].float().mean() > 0.8


def test_files_are_those_that_pefts_own_layers_write(tmp_path):
    policy = make_policy()
    move_adapters(policy)
    policy.save_adapter(tmp_path / "ours")
    plain = make_policy(lora=None)
    names = plain.network.adaptable_linears()
    model = peft.get_peft_model(plain.network, peft.LoraConfig(r=4, lora_alpha=8.0, target_modules=names))
    model.peft_config["default"].save_pretrained(tmp_path / "theirs")
    ours, theirs = (peft.PeftConfig.from_pretrained(tmp_path / name).to_dict() for name in ("ours", "theirs"))
    assert ours == theirs
    assert set(policy.adapter_tensors()) == set(peft.get_peft_model_state_dict(model))
