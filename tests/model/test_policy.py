"""vla_rl/model/policy.py: one distribution for sampling and scoring, the official code's numbers, LoRA that touches no base weight."""

from __future__ import annotations

import shutil
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.policies import DATA, DECODERS, RECORDED, TASKS, make_obs, make_policy, move_adapters
from vla_rl.model.policy import OpenVLAPolicy
from vla_rl.model.prismatic import load_network
from vla_rl.model.tiny_openvla import ensure_tiny_openvla
from vla_rl.run.section import Mode
from vla_rl.run.settings import ConfigError, LoraConfig
from vla_rl.types import NonFiniteError, Observation, PolicyInputs


@pytest.fixture(scope="module")
def official():
    return np.load(DATA / "openvla.npz")


def official_inputs(policy, official, case: str):
    ids = torch.from_numpy(official[f"{case}/prompt_ids_with_29871"])[None]
    with np.load(DATA / "images.npz") as images:
        image = torch.from_numpy(images[str(official[f"{case}/image_key"])])
    return ids, torch.ones_like(ids), policy.processor.pixel_values(image[None, None])


# ---------------------------------------------------------------------- against the official code


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_greedy_decoding_gives_the_official_tokens_logprobs_and_action(recorded, official, case):
    tokens, logprobs, hidden = recorded.generate(*official_inputs(recorded, official, case), mode="greedy")
    assert tokens[0].tolist() == official[f"{case}/action_token_ids"].tolist()
    expected = official[f"{case}/logp_action256"]  # NaN where the token is no action token
    np.testing.assert_allclose(logprobs[0], expected, atol=2e-5, rtol=0)  # cached keys; teacher forcing holds 1e-5
    np.testing.assert_allclose(recorded.dataset_actions(tokens)[0, 0], official[f"{case}/action"], atol=1e-12)
    np.testing.assert_allclose(hidden[0], official[f"{case}/hidden_last_layer_at_7"][0], atol=2e-4)


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_forward_logits_are_the_official_ones(recorded, official, case):
    inputs = official_inputs(recorded, official, case)
    tokens = torch.from_numpy(official[f"{case}/sampled_token_ids"])[None]
    logits, hidden = recorded.forward_logits(*inputs, tokens)
    assert logits.shape == (1, 7, 256) and logits.dtype == torch.float32
    np.testing.assert_allclose(logits[0].detach(), official[f"{case}/sampled_logits_action256"], atol=2e-4)
    logprobs = logits.log_softmax(-1).gather(-1, (tokens - 31744)[..., None])[0, :, 0]
    np.testing.assert_allclose(logprobs.detach(), official[f"{case}/sampled_logp_action256"], atol=1e-5)
    first, first_hidden = recorded.forward_logits(*inputs)
    torch.testing.assert_close(first, logits[:, :1], atol=1e-5, rtol=0)
    torch.testing.assert_close(first_hidden, hidden, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- sampling and scoring


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.6])
def test_acting_and_scoring_are_the_same_distribution(policy, temperature):
    out = policy.act(make_obs(), temperature=temperature)
    scored = policy.evaluate_actions(out.inputs, out.action_tokens, temperature=temperature)
    ratio = (scored.logprobs - out.logprobs).exp()
    assert (ratio - 1).abs().max() < 1e-4
    torch.testing.assert_close(scored.hidden, out.hidden, atol=1e-4, rtol=0)
    torch.testing.assert_close(policy.compute_hidden(out.inputs), out.hidden, atol=1e-4, rtol=0)
    other = policy.evaluate_actions(out.inputs, out.action_tokens, temperature=temperature + 0.3)
    assert (other.logprobs - out.logprobs).abs().max() > 0.01  # the check above can tell


@pytest.mark.parametrize("decoder", DECODERS)
def test_in_bfloat16_a_row_scores_the_same_to_the_bit_beside_any_other_rows(decoder):
    """Of as many: what recompute_logprobs rests on."""
    policy = make_policy(decoder, dtype=torch.bfloat16)
    move_adapters(policy)
    out = policy.act(make_obs(6))
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    scores = {}
    for rows in (range(6), order.tolist()):
        parts = [list(rows)[:3], list(rows)[3:]]
        logprobs = [policy.logprobs(out.inputs.rows(part), out.action_tokens[part], temperature=1.0) for part in parts]
        scores |= dict(zip([i for part in parts for i in part], torch.cat(logprobs), strict=True))
        if rows == range(6):
            first = dict(scores)
    assert all(first[i].equal(scores[i]) for i in range(6))


def test_rows_score_alike_alone_and_in_a_batch(policy):
    out = policy.act(make_obs())
    for i in range(3):  # three prompts of different lengths
        alone = policy.evaluate_actions(out.inputs.rows([i]), out.action_tokens[[i]], temperature=1.0)
        torch.testing.assert_close(alone.logprobs[0], out.logprobs[i], atol=5e-5, rtol=0)
        torch.testing.assert_close(alone.hidden[0], out.hidden[i], atol=5e-5, rtol=0)


def test_output_shapes_and_types(policy):
    out = policy.act(make_obs())
    chunk, tokens = policy.chunk_size, 7 * policy.chunk_size
    assert out.action_tokens.shape == out.logprobs.shape == (3, tokens)
    assert out.action_tokens.dtype == torch.int64 and out.logprobs.dtype == torch.float32
    assert out.actions.shape == (3, chunk, 7) and out.actions.dtype == np.float32
    assert np.abs(out.actions).max() <= 1 and set(np.unique(out.actions[..., 6])) <= {-1.0, 1.0}
    assert out.hidden.shape == (3, policy.hidden_size) and out.hidden.dtype == torch.float32
    assert not out.hidden.requires_grad and not out.hidden.is_inference()
    assert ((out.action_tokens >= 704) & (out.action_tokens < 960)).all()
    scored = policy.evaluate_actions(out.inputs, out.action_tokens, temperature=1.6)
    assert scored.logprobs.requires_grad and scored.entropy.shape == (3, tokens) and scored.hidden.requires_grad
    logits, _ = policy.forward_logits(*policy.tensors(out.inputs)[:3], out.action_tokens)
    expected = torch.distributions.Categorical(logits=logits / 1.6).entropy()
    torch.testing.assert_close(scored.entropy, expected, atol=1e-4, rtol=0)


def test_sampled_tokens_follow_the_probabilities(policy):
    obs = make_obs(1)
    inputs = policy.tensors(
        policy.prepare(Observation(*(np.repeat(a, 32, 0) for a in (obs.images, obs.proprio)), TASKS[:1] * 32))
    )
    generator = torch.Generator().manual_seed(0)
    tokens, logprobs, _ = policy.generate(*inputs, temperature=0.7, generator=generator)
    logits, _ = policy.forward_logits(*inputs[:3], tokens)
    probs = (logits.detach() / 0.7).softmax(dim=-1)  # [32, A, 256], given the tokens before
    counts = torch.bincount(tokens.flatten() - 704, minlength=256).float()
    expected = probs.sum(dim=(0, 1))
    order = expected.argsort()
    counts, expected = counts[order].view(16, 16).sum(1), expected[order].view(16, 16).sum(1)  # 16 groups
    assert expected.max() > 3 * expected.min()  # far from uniform, so that the next line means something
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 37.7  # 0.1 % point of chi-square with 15 degrees of freedom
    entropy = -(probs * probs.log()).sum(dim=-1)
    assert logprobs.mean().item() == pytest.approx(
        -entropy.mean().item(), abs=4 * logprobs.std().item() / len(tokens.flatten()) ** 0.5
    )


def test_sampling_repeats_with_its_generator(policy):
    obs = make_obs()
    first, second, other = (
        policy.act(obs, generator=torch.Generator().manual_seed(seed)).action_tokens for seed in (1, 1, 2)
    )
    assert first.equal(second) and not first.equal(other)


def test_greedy_takes_the_most_likely_token_of_the_whole_vocabulary(parallel):
    obs = make_obs()
    tokens = parallel.act(obs, mode="greedy").action_tokens
    prompt = parallel.embed(*parallel.tensors(parallel.prepare(obs)))
    logits = parallel.network.vocabulary_logits(parallel.network.forward_slots(prompt, 56))
    assert tokens.equal(logits.argmax(dim=-1))
    outside = (tokens < 704) | (tokens >= 960)
    assert outside.any()  # random weights: 768 of 1024 ids are no actions
    assert parallel.act(obs, mode="greedy").logprobs.isnan().equal(outside)


def test_the_mean_action_is_the_bin_nearest_to_the_mean_of_the_tempered_distribution(parallel):
    obs = make_obs()
    output = parallel.act(obs, mode="mean_action", temperature=0.5)
    prompt = parallel.embed(*parallel.tensors(parallel.prepare(obs)))
    logits = parallel.network.action_logits(parallel.network.forward_slots(prompt, 56)).double()
    mean = torch.einsum("nab,b->na", (2 * logits).softmax(dim=-1), torch.arange(256.0, dtype=torch.float64))
    assert ((output.action_tokens - 704) - mean).abs().max() < 0.5001
    scored = parallel.evaluate_actions(output.inputs, output.action_tokens, temperature=0.5)
    torch.testing.assert_close(output.logprobs, scored.logprobs.detach())
    assert output.action_tokens.equal(parallel.act(obs, mode="mean_action", temperature=0.5).action_tokens)
    flat, sharp = (parallel.act(obs, mode="mean_action", temperature=t).action_tokens for t in (1e6, 1e-6))
    assert ((flat - 704) - 127.5).abs().max() < 1
    assert (sharp - 704).equal(logits.argmax(dim=-1))


@pytest.mark.parametrize("decoder", DECODERS)
def test_both_decoders_act_in_each_mode(decoder):
    policy, obs = make_policy(decoder=decoder), make_obs()
    tokens = {mode: policy.act(obs, mode=mode, temperature=1e-6).action_tokens for mode in ("mean_action", "sampled")}
    assert tokens["mean_action"].equal(tokens["sampled"])  # all of a distribution is in one bin


def test_proprio_and_the_second_image_are_read():
    policy = make_policy(num_images=2, use_proprio=True, lora=None)
    obs = make_obs(2, num_images=2)
    hidden = policy.compute_hidden(policy.prepare(obs))
    images = obs.images.copy()
    images[:, 1] = 255 - images[:, 1]
    for changed in (
        Observation(images, obs.proprio, obs.instructions),
        Observation(obs.images, obs.proprio + 0.1, obs.instructions),
    ):
        assert (policy.compute_hidden(policy.prepare(changed)) - hidden).abs().max() > 1e-2
    assert policy.tensors(policy.prepare(obs))[3].abs().max() <= 1


# ---------------------------------------------------------------------- LoRA


def test_update_moves_the_adapters_and_nothing_else(tmp_path):
    policy = make_policy()
    out = policy.act(make_obs())
    base = {n: p.clone() for n, p in policy.network.named_parameters() if not p.requires_grad}
    before = policy.reference_logprobs(out.inputs, out.action_tokens, temperature=1.0)
    torch.testing.assert_close(before, out.logprobs, atol=1e-5, rtol=0)  # B = 0: adapted is base
    optimizer = torch.optim.SGD(policy.trainable_parameters(), lr=10.0)
    for _ in range(2):
        scored = policy.evaluate_actions(out.inputs, out.action_tokens, temperature=1.0)
        (scored.logprobs.mean() + scored.hidden.pow(2).mean()).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.trainable_parameters())
    assert all(p.grad is None and p.equal(base[n]) for n, p in policy.network.named_parameters() if n in base)
    after = policy.evaluate_actions(out.inputs, out.action_tokens, temperature=1.0).logprobs
    assert (after - before).abs().max() > 0.01
    again = policy.reference_logprobs(out.inputs, out.action_tokens, temperature=1.0)
    torch.testing.assert_close(again, before, atol=1e-6, rtol=0)
    assert all(p.requires_grad for p in policy.trainable_parameters()) and len(policy.trainable_parameters()) > 0


def test_few_steps_teach_it_given_tokens_for_each_observation():
    """The random base is no obstacle: LoRA alone learns arbitrary tokens, different ones for each observation."""
    policy = make_policy(lora=LoraConfig(rank=8, alpha=16), chunk_size=1)
    inputs = policy.prepare(make_obs(4))
    tokens = torch.randint(704, 960, (4, 7), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(policy.trainable_parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = -policy.evaluate_actions(inputs, tokens, temperature=1.0).logprobs.mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 5
    assert losses[-1] < 0.8  # a policy blind to the observation could not get below log 4 = 1.39


def test_nan_in_the_weights_is_named_when_acting():
    policy = OpenVLAPolicy.from_checkpoint("tiny-openvla-random", "parallel", unnorm_key="libero_spatial")
    with torch.no_grad():
        policy.network.language_model.model.norm.weight[0] = torch.nan
    obs = Observation(np.zeros((1, 1, 64, 64, 3), np.uint8), np.zeros((1, 8), np.float32), ("pick up the bowl",))
    for mode in get_args(Mode):
        with pytest.raises(NonFiniteError, match="action distribution is not finite"):
            policy.act(obs, mode=mode)


def test_fingerprint_tells_models_decoders_and_adapter_shapes_apart(tmp_path):
    first = make_policy().fingerprint()
    assert make_policy(seed=3).fingerprint() == first  # the adapters' values do not count
    others = [
        make_policy("autoregressive"),
        make_policy(chunk_size=4),
        make_policy(num_images=2),
        make_policy(use_proprio=True),
        make_policy(lora=LoraConfig(rank=8, alpha=8)),
        make_policy(lora=LoraConfig(rank=4, alpha=4)),
        make_policy(lora=None),
    ]
    shutil.copytree(ensure_tiny_openvla(), tmp_path / "copy")
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    assert make_policy(path=tmp_path / "copy").fingerprint() == first  # where it lies does not count
    weights["projector.fc2.weight"] += 0.1
    save_file(weights, tmp_path / "copy" / "model.safetensors")
    others.append(make_policy(path=tmp_path / "copy"))
    prints = [first, *(policy.fingerprint() for policy in others)]
    assert len(set(prints)) == len(prints)


# ---------------------------------------------------------------------- mistakes


def test_bad_inputs_are_named(policy):
    out = policy.act(make_obs())
    inputs, tokens = out.inputs, out.action_tokens
    with pytest.raises(ValueError, match=r"action_tokens: expected int64 \[3, "):
        policy.evaluate_actions(inputs, tokens[:, :-1], temperature=1.0)
    with pytest.raises(ValueError, match=r"action_tokens: expected int64 .*got torch.int32"):
        policy.evaluate_actions(inputs, tokens.int(), temperature=1.0)
    with pytest.raises(ValueError, match=r"outside the action ids 704\.\.959"):
        policy.evaluate_actions(inputs, tokens - 400, temperature=1.0)
    with pytest.raises(ValueError, match="temperature=0"):
        policy.act(make_obs(), temperature=0)
    with pytest.raises(ValueError, match="mode='best'; expected one of greedy, mean_action, sampled"):
        policy.act(make_obs(), mode="best")
    with pytest.raises(ValueError, match=r"temperature=-1"):
        policy.evaluate_actions(inputs, tokens, temperature=-1)
    with pytest.raises(ValueError, match=r"3 rows of 1 images, got \[3, 2\]"):
        policy.act(make_obs(num_images=2))
    obs = make_obs()
    with pytest.raises(ValueError, match=r"expected uint8 \[N, K, H, W, 3\], got float32"):
        policy.act(Observation(obs.images.astype(np.float32), obs.proprio, obs.instructions))
    with pytest.raises(ValueError, match=r"proprio: expected \[3, 8\], got \[3, 7\]"):
        policy.act(Observation(obs.images, obs.proprio[:, :7], obs.instructions))
    with pytest.raises(ValueError, match=r"inputs\.images: expected uint8 \[3, 1, 112, 112, 3\]"):
        policy.compute_hidden(PolicyInputs(inputs.images.float(), inputs.proprio, inputs.instructions))
    ids, mask, pixels, _ = policy.tensors(inputs)
    with pytest.raises(ValueError, match="pixel_values: expected float"):
        policy.forward_logits(ids, mask, pixels[:, :3])
    with pytest.raises(ValueError, match="attention_mask: expected"):
        policy.forward_logits(ids, mask[:, 1:], pixels)
    with pytest.raises(ValueError, match="proprio is given, but use_proprio=False"):
        policy.forward_logits(ids, mask, pixels, proprio=torch.zeros(3, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": "diffusion"}, "decoder='diffusion'; expected one of autoregressive, parallel"),
        ({"decoder": "autoregressive", "chunk_size": 8}, "chunk_size=8 with decoder=autoregressive"),
        ({"num_images": 3}, "num_images=3"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"unnorm_key": "bridge_orig"}, r"unnorm_key=bridge_orig: .* have libero_10_no_noops, libero_90_no_noops"),
        ({"unnorm_key": None}, r"unnorm_key=None: the statistics of .* have libero_10"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_loads(settings, message, monkeypatch):
    monkeypatch.setattr("vla_rl.model.policy.load_network", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        make_policy(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is about a machine without CUDA")
def test_missing_cuda_is_named():
    with pytest.raises(ConfigError, match="device=cuda, but torch sees no CUDA device"):
        make_policy(device="cuda")


def test_loading_needs_no_second_copy():
    """The network is filled tensor by tensor: nothing stays on the meta device and nothing is initialised first."""
    network = load_network(RECORDED, use_proprio=True)
    assert {t.device.type for t in [*network.parameters(), *network.buffers()]} == {"cpu"}
