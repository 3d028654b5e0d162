"""vla_rl/model/prismatic.py against the official code's recorded numbers (tests/data/openvla.npz) and its checkpoint layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from vla_rl.model.checkpoint_folder import official_name, save_checkpoint
from vla_rl.model.prismatic import Prismatic, load_network
from vla_rl.model.prismatic_config import read_config
from vla_rl.run.settings import ConfigError

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny_openvla"
MEAN = torch.tensor([0.485, 0.456, 0.406, 0.5, 0.5, 0.5])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225, 0.5, 0.5, 0.5])[:, None, None]
TOLERANCE = 2e-4  # a wrong rms_norm_eps shows as 4e-4


@pytest.fixture(scope="module")
def official():
    return np.load(DATA / "openvla.npz")


def official_inputs(official, case: str):
    """input_ids, attention_mask [1, L], pixel_values [1, 6, 224, 224] of a recorded case."""
    with np.load(DATA / "images.npz") as images:
        rgb = torch.from_numpy(images[str(official[f"{case}/image_key"])]).permute(2, 0, 1).float() / 255
    ids = torch.from_numpy(official[f"{case}/prompt_ids_with_29871"])[None]
    return ids, torch.ones_like(ids), ((torch.cat([rgb, rgb]) - MEAN) / STD)[None]


def close(ours, theirs, tolerance=TOLERANCE):
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=tolerance, rtol=0)


# ---------------------------------------------------------------------- against the official code


@pytest.mark.parametrize("case", ["a", "b", "c"])
@torch.no_grad()
def test_vision_features_and_projection_are_the_official_ones(network, official, case):
    pixel_values = official_inputs(official, case)[2]
    features, projected = network.vision_backbone(pixel_values)[0], network.embed_images(pixel_values)[0]
    recorded = official[f"{case}/vision_features"]
    every = 256 // len(recorded)  # case c recorded each 16th patch
    close(features[::every], recorded)
    close(projected[::every], official[f"{case}/projected"])


@pytest.mark.parametrize("case", ["a", "b", "c"])
@torch.no_grad()
def test_teacher_forced_logits_and_hidden_states_are_the_official_ones(network, official, case):
    prompt = network.embed_prompt(*official_inputs(official, case))
    for tokens, prefix in (("action_token_ids", ""), ("sampled_token_ids", "sampled_")):
        ids = torch.from_numpy(official[f"{case}/{tokens}"])[None]
        hidden = network.forward_tokens(prompt, ids[:, :-1])
        logits = network.action_logits(hidden)[0]
        close(logits, official[f"{case}/{prefix}logits_action256"])
        subset = network.vocabulary_logits(hidden)[0][:, torch.from_numpy(official["vocab_subset_ids"])]
        close(subset, official[f"{case}/{prefix}logits_subset"])
        logprobs = torch.log_softmax(logits, dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        close(entropy, official[f"{case}/{prefix}entropy_action256"], 2e-5)
        if prefix:  # greedy tokens may be no action tokens
            chosen = logprobs.gather(1, (ids[0] - 31744)[:, None])[:, 0]
            close(chosen, official[f"{case}/sampled_logp_action256"], 1e-5)
        else:
            close(hidden[0], official[f"{case}/hidden_last_layer_at_7"])


@pytest.mark.parametrize("case", ["a", "b", "c"])
@torch.no_grad()
def test_last_prompt_token_is_where_the_official_formula_says(network, official, case):
    inputs = official_inputs(official, case)
    prompt = network.embed_prompt(*inputs)
    # NUM_PATCHES + NUM_PROMPT_TOKENS, with NUM_PROMPT_TOKENS = len(prompt ids incl. BOS and 29871) - 1
    index = 256 + inputs[0].shape[1] - 1
    assert prompt.embeddings.shape[1] - 1 == index == official[f"{case}/last_prompt_index"]
    recorded = official[f"{case}/hidden_last_layer_all"]
    hidden = network.forward_tokens(prompt, torch.from_numpy(official[f"{case}/action_token_ids"])[None, :-1])
    close(hidden[0, 0], recorded[index])
    close(hidden[0, 0], official[f"{case}/hidden_last_prompt_all_layers"][-1])


@pytest.mark.parametrize("case", ["a", "b", "c"])
@torch.no_grad()
def test_cached_greedy_decoding_gives_the_official_tokens_and_teacher_forcing_agrees(network, official, case):
    prompt = network.embed_prompt(*official_inputs(official, case))
    ids, hidden = network.decode(prompt, 7, lambda _, hidden: network.vocabulary_logits(hidden).argmax(dim=-1))
    assert ids[0].tolist() == official[f"{case}/action_token_ids"].tolist()
    close(hidden, network.forward_tokens(prompt, ids[:, :-1]), 2e-5)


# ---------------------------------------------------------------------- batches of different prompts


def two_prompts(side: str):
    """Two prompts of 23 and 11 tokens, alone and as one batch padded on a side."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.cat([torch.tensor([1]), torch.randint(3, 29000, (n - 1,), generator=generator)]) for n in (23, 11)]
    pixels = torch.randn(2, 6, 224, 224, generator=generator)
    pad = torch.full((12,), 32000)
    short = [pad, rows[1]] if side == "left" else [rows[1], pad]
    ids = torch.stack([rows[0], torch.cat(short)])
    return rows, pixels, ids, ids != 32000


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_rows_equal_their_unpadded_runs(network, side):
    rows, pixels, ids, mask = two_prompts(side)
    actions = torch.randint(31744, 32000, (2, 7), generator=torch.Generator().manual_seed(1))

    def take(i):
        return lambda _, hidden: network.action_logits(hidden).argmax(dim=-1) + 31744

    batch = network.embed_prompt(ids, mask, pixels)
    forced, slots = network.forward_tokens(batch, actions), network.forward_slots(batch, 56)
    decoded, _ = network.decode(batch, 7, take(0))
    for i, row in enumerate(rows):
        alone = network.embed_prompt(row[None], torch.ones(1, len(row)), pixels[i : i + 1])
        assert alone.valid is None
        close(forced[i : i + 1], network.forward_tokens(alone, actions[i : i + 1]), 2e-5)
        close(slots[i : i + 1], network.forward_slots(alone, 56), 2e-5)
        assert decoded[i : i + 1].equal(network.decode(alone, 7, take(0))[0])


# ---------------------------------------------------------------------- OpenVLA-OFT


def oft_hidden(network, ids, pixels, proprio=None, mask=None):
    """Final hidden states of OFT for one unpadded row, put together by hand (design facts of OFT, "Sequence").

    [BOS][patches][proprio?][prompt[1:]][56 zero embeddings][embedding of </s>], positions 0, 1, 2, ..., no mask at all.
    """
    embed = network.language_model.model.embed_tokens.weight
    patches = [network.projector(network.vision_backbone(p)) for p in pixels.split(6, dim=1)]  # 6 channels an image
    parts = [embed[ids[:1]][None], *patches]
    if proprio is not None:
        first = F.gelu(F.linear(proprio, network.proprio_projector.fc1.weight, network.proprio_projector.fc1.bias))
        parts.append(F.linear(first, network.proprio_projector.fc2.weight, network.proprio_projector.fc2.bias)[None])
    parts += [embed[ids[1:]][None], torch.zeros(1, 56, 16), embed[2][None, None]]
    sequence = torch.cat(parts, dim=1)
    size = sequence.shape[1]
    mask = torch.ones(1, 1, size, size, dtype=torch.bool) if mask is None else mask(size)
    hidden = network.language_model.model(inputs_embeds=sequence, attention_mask=mask).last_hidden_state
    num_patches = 256 * len(patches) + (proprio is not None)
    start = num_patches + len(ids) - 1  # NUM_PATCHES + NUM_PROMPT_TOKENS
    return hidden[:, start : start + 56]


@pytest.mark.parametrize(("images", "with_proprio"), [(1, False), (2, False), (1, True), (2, True)])
@torch.no_grad()
def test_slots_equal_an_independent_construction(network, network_with_proprio, images, with_proprio):
    network = network_with_proprio if with_proprio else network
    generator = torch.Generator().manual_seed(2)
    ids = torch.cat([torch.tensor([1]), torch.randint(3, 29000, (19,), generator=generator)])
    pixels = torch.randn(1, 6 * images, 224, 224, generator=generator)
    proprio = torch.rand(1, 8, generator=generator) * 2 - 1 if with_proprio else None
    prompt = network.embed_prompt(ids[None], torch.ones(1, 20), pixels, proprio)
    assert prompt.embeddings.shape[1] == 1 + 256 * images + with_proprio + 19
    ours = network.forward_slots(prompt, 56)
    close(ours, oft_hidden(network, ids, pixels, proprio), 2e-5)
    causal = oft_hidden(network, ids, pixels, proprio, mask=lambda size: torch.ones(1, 1, size, size).bool().tril())
    assert (ours - causal).abs().max() > 0.1  # the check above can tell


@torch.no_grad()
def test_slots_do_not_depend_on_the_placeholder_but_on_the_stop_token(network):
    _, pixels, ids, mask = two_prompts("left")
    prompt = network.embed_prompt(ids, mask, pixels)
    before = network.forward_slots(prompt, 56)
    embeddings = network.language_model.model.embed_tokens.weight
    for token, matters in ((1, False), (2, True)):  # 1 is the official placeholder id, 2 is </s>
        kept = embeddings[token].clone()
        embeddings[token] += 1.0
        changed = (network.forward_slots(prompt, 56) - before).abs().max()  # the prompt is embedded already
        embeddings[token] = kept
        assert (changed > 1e-2) == matters


@torch.no_grad()
def test_every_position_of_the_slots_sees_the_last_one(network):
    _, pixels, ids, mask = two_prompts("left")
    prompt = network.embed_prompt(ids, mask, pixels)
    # one slot more moves only what stands after the first slots: a causal reader of them would see no change
    assert (network.forward_slots(prompt, 56)[:, :3] - network.forward_slots(prompt, 57)[:, :3]).abs().max() > 1e-3


# ---------------------------------------------------------------------- training


def test_adaptable_linears_are_all_that_an_action_depends_on(network):
    names = set(network.adaptable_linears())
    every = {name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    left_out = every - names
    assert all("lm_head" in n or "blocks.3." in n or "attn_pool" in n for n in left_out)
    assert len(names) == 3 * 7 + 3 + 2 * 3 * 4  # Llama layers, projector, 3 used blocks of each ViT
    assert set(network.adaptable_linears(language_model_only=True)) == {
        n for n in names if n.startswith("language_model.")
    }
    last_two = ("language_model.model.layers.1.", "language_model.model.layers.2.")
    assert set(network.adaptable_linears(True, last_layers=2)) == {n for n in names if n.startswith(last_two)}
    assert network.adaptable_linears(True, last_layers=3) == network.adaptable_linears(True)
    with pytest.raises(ConfigError, match="last_layers=4, but the language model has 3 layers"):
        network.adaptable_linears(True, last_layers=4)


def test_dropout_is_refused():
    network = Prismatic(read_config(TINY))
    network.check_no_dropout()
    network.vision_backbone.featurizer.blocks[0].mlp.drop1.p = 0.1
    with pytest.raises(ConfigError, match=r"drop1 has p=0\.1"):
        network.check_no_dropout()


# ---------------------------------------------------------------------- checkpoints


def test_7b_names_and_shapes_are_the_official_ones(tmp_path):
    expected = json.loads((DATA / "state_dict_keys_7b.json").read_text())
    raw = json.loads((TINY / "config.json").read_text())
    del raw["_tiny_timm_overrides"]
    # the hub's config.json of openvla-7b says no more than this of Llama: the rest are defaults
    raw["text_config"] = {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_config(tmp_path)
    for key in ("rms_norm_eps", "max_position_embeddings"):
        assert config.llama[key] == expected["_meta"]["text_config"][key]
    with torch.device("meta"):
        network = Prismatic(config, use_proprio=True)
    ours = {official_name(name): list(p.shape) for name, p in network.named_parameters()}
    assert ours == expected["openvla"] | expected["simplevla_rl_with_proprio_extra"]
    assert len(expected["openvla"]) == 982
    assert not {name for name, _ in network.named_buffers()} - {
        f"language_model.model.rotary_emb.{name}" for name in ("inv_freq", "original_inv_freq")
    }  # load_network makes these again; no other tensor may be left out of a checkpoint


def test_proprio_projector_is_found_in_all_three_places(checkpoint, network_with_proprio):
    expected = network_with_proprio.proprio_projector.state_dict()

    def found():
        ours = load_network(checkpoint, use_proprio=True).proprio_projector.state_dict()
        return all(ours[name].equal(expected[name]) for name in expected)

    (checkpoint / "proprio_projector--150000_checkpoint.pt").unlink()
    assert found()  # proprio_projector.safetensors
    inside = load_file(checkpoint / "proprio_projector.safetensors")
    (checkpoint / "proprio_projector.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"4 tensors missing, such as proprio_projector\.fc1\.bias"):
        load_network(checkpoint, use_proprio=True)
    weights = load_file(checkpoint / "model.safetensors")
    save_file(weights | {f"proprio_projector.{n}": t for n, t in inside.items()}, checkpoint / "model.safetensors")
    assert found()  # in the main state dict, as SimpleVLA-RL's checkpoints have it
    load_network(checkpoint)  # not wanted: passed over


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("projector.fc1.bias"), r"1 tensors missing, such as projector\.fc1\.bias"),
        (lambda w: w.update({"extra.weight": torch.zeros(1)}), r"1 tensors unexpected, such as extra\.weight"),
        (
            lambda w: w.update({"projector.fc1.bias": torch.zeros(3)}),
            r"of another shape, such as projector\.fc1\.bias is \[3\], expected \[176\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(checkpoint, damage, message):
    weights = load_file(checkpoint / "model.safetensors")
    damage(weights)
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        load_network(checkpoint)


def test_missing_files_are_named(checkpoint, network):
    save_checkpoint(checkpoint, network.named_parameters(), max_shard_bytes=300_000)
    next(checkpoint.glob("model-00002*")).unlink()
    with pytest.raises(ConfigError, match=r"1 of .* weight files are missing .* such as model-00002"):
        load_network(checkpoint)
    (checkpoint / "model.safetensors.index.json").unlink()
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weights in"):
        load_network(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json in"):
        load_network(checkpoint)


def test_bfloat16_load_keeps_the_rotary_frequencies_in_float32():
    network = load_network(TINY, dtype=torch.bfloat16)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    rotary = network.language_model.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32 and rotary[1] == pytest.approx(10000 ** (-2 / 8))  # head size 8
    assert not any(p.requires_grad for p in network.parameters())
