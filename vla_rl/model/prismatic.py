"""The network of OpenVLA and OpenVLA-OFT: two ViTs, a projector, Llama and its masks. Nothing of RL or robots.

What it computes was checked against the official code
(openvla/openvla@c8f03f4 prismatic/extern/hf/modeling_prismatic.py; moojink/openvla-oft@213c5ff, same file). Not here: the
files that it is filled from (vla_rl.model.checkpoint_folder).

B rows, K images, V patches of one image, L prompt tokens with BOS, A action tokens, D hidden size, S image side.

One row of a batch, in the order in which Llama reads it:

    [BOS] [K*V patches] [proprio?] [padding] [L-1 prompt tokens] [action tokens or slots ...] [</s> if parallel]

Padding is masked and takes no position, so each row equals its own unpadded run; as it stands before the prompt, the
last prompt token and the action slots are at the same place in every row, counted from the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vla_rl.model.checkpoint_folder import find_proprio_file, official_name, read_tensors, tensor_shapes
from vla_rl.model.prismatic_config import PrismaticConfig, read_config
from vla_rl.model.quantization import Linear4bit
from vla_rl.run.failures import one_line
from vla_rl.run.settings import ConfigError

PROPRIO_DIM = 8  # as vla_rl.types; the network must not import what is of robots


class VisionBackbone(nn.Module):
    """Patch features of DINOv2 and SigLIP side by side; of each, the output of the last block but one."""

    def __init__(self, config: PrismaticConfig):
        super().__init__()
        self.featurizer, self.fused_featurizer = (
            timm.create_model(timm_id, pretrained=False, num_classes=0, img_size=config.image_size, **kwargs)
            for timm_id, kwargs in zip(config.timm_ids, config.timm_kwargs, strict=True)
        )
        self.num_patches = self.featurizer.patch_embed.num_patches  # V

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Args: pixel_values [B, 6, S, S], DINO-normalised RGB then SigLIP-normalised RGB. Returns: [B, V, E]."""
        features = []
        for vit, pixels in zip((self.featurizer, self.fused_featurizer), pixel_values.split(3, dim=1), strict=True):
            features += vit.forward_intermediates(
                pixels, indices=[len(vit.blocks) - 2], stop_early=True, output_fmt="NLC", intermediates_only=True
            )  # no class or register tokens, no final norm
        return torch.cat(features, dim=2)


class Projector(nn.Module):
    """Patch features [B, V, E] -> token embeddings [B, V, D]."""

    def __init__(self, vision_size: int, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(vision_size, 4 * vision_size)
        self.fc2 = nn.Linear(4 * vision_size, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))


class ProprioProjector(nn.Module):
    """Normalised proprio [B, 8] -> one token embedding [B, D]."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(PROPRIO_DIM, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, proprio: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(proprio)))


@dataclass(frozen=True)
class Prompt:
    """What stands before the actions, embedded. Its last position is the last prompt token in every row."""

    embeddings: Tensor  # [B, P, D]
    valid: Tensor | None  # bool [B, P], False at padding; None where no row has any


class Prismatic(nn.Module):
    """The network; parameter names are the official ones (but for LayerScale's gamma, see official_name)."""

    def __init__(self, config: PrismaticConfig, use_proprio: bool = False):
        super().__init__()
        self.config = config
        self.vision_backbone = VisionBackbone(config)
        vision_size = self.vision_backbone.featurizer.embed_dim + self.vision_backbone.fused_featurizer.embed_dim
        self.projector = Projector(vision_size, config.llama["hidden_size"])
        # sdpa takes 4-D boolean masks as given; flash attention would ignore them
        self.llama = LlamaConfig(**config.llama, tie_word_embeddings=False, attn_implementation="sdpa")
        self.language_model = LlamaForCausalLM(self.llama)
        if use_proprio:
            self.proprio_projector = ProprioProjector(config.llama["hidden_size"])
        self.use_proprio = use_proprio
        self.proprio_file: str | None = None  # the file beside the model that the proprio projector came from

    # ------------------------------------------------------------------ prompt

    def embed_prompt(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, proprio: Tensor | None = None
    ) -> Prompt:
        """Embeds [BOS][patches][proprio?][padding][prompt].

        Args:
            input_ids: int64 [B, L], BOS first, padded on either side.
            attention_mask: [B, L], nonzero at tokens.
            pixel_values: [B, 6K, S, S], see VisionBackbone; images in order.
            proprio: [B, 8], normalised to -1..1; given if and only if the network has a proprio projector.
        """
        ids, valid = arrange_prompt(input_ids, attention_mask)
        device = pixel_values.device
        return self.embed(ids.to(device), None if valid is None else valid.to(device), pixel_values, proprio)

    def embed(self, ids: Tensor, valid: Tensor | None, pixel_values: Tensor, proprio: Tensor | None) -> Prompt:
        """As embed_prompt, of what arrange_prompt gives, all on the network's device."""
        embed = self.language_model.get_input_embeddings()
        parts = [embed(ids[:, :1]), self.embed_images(pixel_values)]
        if self.use_proprio:
            parts.append(self.proprio_projector(proprio.to(parts[0].dtype))[:, None])
        before_text = sum(part.shape[1] for part in parts)
        if valid is not None:
            valid = F.pad(valid[:, 1:], (before_text, 0), value=True)
        return Prompt(torch.cat([*parts, embed(ids[:, 1:])], dim=1), valid)

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """[B, 6K, S, S] -> [B, K*V, D]; all images go through the backbone as one batch."""
        batch, channels, height, width = pixel_values.shape
        patches = self.projector(self.vision_backbone(pixel_values.reshape(-1, 6, height, width)))
        return patches.reshape(batch, -1, patches.shape[-1]) if channels > 6 else patches

    # ------------------------------------------------------------------ three ways to read the actions
    # Each gives the hidden states, after the final norm, of the positions that predict the A action tokens: the one
    # before each token. So [:, 0] is the last prompt token.

    def forward_tokens(self, prompt: Prompt, action_ids: Tensor) -> Tensor:
        """OpenVLA, teacher-forced: hidden [B, n+1, D] that predicts n given tokens (int64 [B, n]) and one more."""
        embeddings = torch.cat([prompt.embeddings, self.language_model.get_input_embeddings()(action_ids)], dim=1)
        hidden = self.run_llama(embeddings, extend(prompt.valid, action_ids.shape[1]), causal=True)
        return hidden[:, prompt.embeddings.shape[1] - 1 :]

    def forward_slots(self, prompt: Prompt, num_tokens: int) -> Tensor:
        """OpenVLA-OFT: hidden [B, A, D] that predicts A tokens at once, each position attending to every other.

        The slots' embeddings are zero and the stop token after them keeps its own (openvla-oft
        modeling_prismatic.py, _process_action_masks and predict_action).
        """
        batch, length, size = prompt.embeddings.shape
        stop = torch.full((batch, 1), self.llama.eos_token_id, device=prompt.embeddings.device)
        slots = prompt.embeddings.new_zeros(batch, num_tokens, size)
        embeddings = torch.cat([prompt.embeddings, slots, self.language_model.get_input_embeddings()(stop)], dim=1)
        hidden = self.run_llama(embeddings, extend(prompt.valid, num_tokens + 1), causal=False)
        return hidden[:, length - 1 : -2]

    def decode(self, prompt: Prompt, num_tokens: int, choose: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """OpenVLA, one token after another; keys and values are kept, at fixed addresses.

        Args:
            choose: step 0..A-1, hidden [B, D] -> token ids int64 [B].

        Returns:
            The chosen ids int64 [B, A] and the hidden states [B, A, D] they were chosen from.
        """
        batch, length, _ = prompt.embeddings.shape
        device, last = prompt.embeddings.device, num_tokens - 1
        shape = (batch, self.llama.num_key_value_heads, length + last, self.llama.head_dim)
        caches = [KeyValues(shape, prompt.embeddings) for _ in self.language_model.model.layers]
        hidden = [self.run_llama(prompt.embeddings, prompt.valid, causal=True, caches=caches)[:, -1]]
        ids = [choose(0, hidden[-1])]
        known = torch.ones(batch, length, dtype=torch.bool, device=device) if prompt.valid is None else prompt.valid
        known = F.pad(known, (0, last), value=False)  # keys that are there
        position = known.sum(dim=1, keepdim=True)
        places = torch.arange(length, length + last, device=device)
        for k in range(last):
            for cache in caches:
                cache.place = places[k : k + 1]
            known = known.index_fill(1, places[k : k + 1], True)
            embeddings = self.language_model.get_input_embeddings()(ids[-1][:, None])
            hidden.append(self.run_layers(embeddings, known[:, None, None, :], position + k, False, caches)[:, -1])
            ids.append(choose(k + 1, hidden[-1]))
        return torch.stack(ids, dim=1), torch.stack(hidden, dim=1)

    def run_llama(
        self, embeddings: Tensor, valid: Tensor | None, causal: bool, caches: list[KeyValues] | None = None
    ) -> Tensor:
        """Hidden states [B, Q, D] after the final norm, of sequences from their beginning.

        Where nothing is padded there is no mask, which lets attention take its fastest kernels; the sums are the same.

        Args:
            valid: bool [B, Q], False at padding; None: no padding.
            causal: each position attends to itself and to what stands before it; False: to all that is not padding.
        """
        batch, size, _ = embeddings.shape
        if valid is None:
            position_ids = torch.arange(size, device=embeddings.device).expand(batch, -1)
            return self.run_layers(embeddings, None, position_ids, causal, caches)
        mask = causal_mask(valid) if causal else full_mask(valid)
        return self.run_layers(embeddings, mask, positions(valid), causal, caches)

    def run_layers(
        self,
        embeddings: Tensor,
        mask: Tensor | None,
        position_ids: Tensor,
        causal: bool,
        caches: list[KeyValues] | None,
    ) -> Tensor:
        """Llama's layers and final norm; mask is boolean [B, 1, Q, keys], True where attended, or None as causal says."""
        llama = self.language_model.model
        rotary, hidden = llama.rotary_emb(embeddings, position_ids=position_ids), embeddings
        for layer, cache in zip(llama.layers, caches or [None] * len(llama.layers), strict=True):
            hidden = layer(
                hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, is_causal=causal
            )
        return llama.norm(hidden)

    # ------------------------------------------------------------------ logits

    def action_logits(self, hidden: Tensor) -> Tensor:
        """float32 [..., 256] over the action ids, in float32 whatever the model runs in.

        A bfloat16 logit near 10 is known to 0.06 only, which would make the probability ratio noisy by 6 %.
        """
        weight = self.language_model.lm_head.weight[self.config.vocab_size - self.config.num_action_ids :]
        return F.linear(hidden.float(), weight[: self.config.num_action_ids].float())

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        """float32 [..., padded vocabulary], computed in the model's precision as the official code does."""
        return self.language_model.lm_head(hidden).float()

    # ------------------------------------------------------------------ what trains and how

    def adaptable_linears(self, language_model_only: bool = False, last_layers: int | None = None) -> list[str]:
        """Names of the linear layers that an action depends on, without the LM head.

        Args:
            last_layers: of the language model's, those of this many last ones; None for all.

        Raises:
            ConfigError: there are fewer.
        """
        depth = len(self.language_model.model.layers)
        if last_layers is not None and last_layers > depth:
            raise ConfigError(f"policy.lora.last_layers={last_layers}, but the language model has {depth} layers")
        unused = ["language_model.lm_head"]
        for name in ("featurizer", "fused_featurizer"):
            last = len(getattr(self.vision_backbone, name).blocks) - 1
            unused += [f"vision_backbone.{name}.blocks.{last}.", f"vision_backbone.{name}.attn_pool."]
        unused += [f"language_model.model.layers.{i}." for i in range(depth - (last_layers or depth))]
        wanted = "language_model." if language_model_only else ""
        return [
            name
            for name, module in self.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(wanted) and not name.startswith(tuple(unused))
        ]

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks of the language model and of both ViTs."""
        vision = self.vision_backbone
        return [*self.language_model.model.layers, *vision.featurizer.blocks, *vision.fused_featurizer.blocks]

    def check_no_dropout(self) -> None:
        """Raises ConfigError if train mode would compute anything else than eval mode."""
        for name, module in self.named_modules():
            for key in ("p", "drop_prob", "attention_dropout"):
                if isinstance(getattr(module, key, None), float) and getattr(module, key) != 0:
                    raise ConfigError(f"{name} has {key}={getattr(module, key)}; sampling and scoring need dropout 0")


class KeyValues:
    """Keys and values of one Llama layer at fixed addresses: the prompt's first, then those of the tokens after it."""

    def __init__(self, shape: tuple[int, ...], like: Tensor):
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)  # [B, heads, length, D / heads]
        self.place: Tensor | None = None  # int64 [1], where the next token's go; None: the prompt's, at the beginning

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keeps the new ones; returns those to attend to. transformers' attention calls this."""
        if self.place is None:
            self.keys[:, :, : keys.shape[2]] = keys
            self.values[:, :, : keys.shape[2]] = values
            return keys, values
        return self.keys.index_copy_(2, self.place, keys), self.values.index_copy_(2, self.place, values)


def arrange_prompt(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """[BOS][padding][text], however the rows were padded: int64 [B, L], and bool [B, L], False at padding.

    On the CPU this asks no GPU to wait. Without padding the second is None.
    """
    valid = attention_mask.bool()
    if valid.all():
        return input_ids, None
    order = valid.long().argsort(dim=1, stable=True)  # padding first, tokens in their own order
    ids = input_ids.gather(1, order)
    bos_at = (~valid).sum(dim=1, keepdim=True)  # [B, 1]
    ids = torch.cat([ids.gather(1, bos_at), ids[:, 1:]], dim=1)
    valid = torch.arange(ids.shape[1], device=ids.device) > bos_at
    valid[:, 0] = True
    return ids, valid


def extend(valid: Tensor | None, n: int) -> Tensor | None:
    return None if valid is None else F.pad(valid, (0, n), value=True)


def positions(valid: Tensor) -> Tensor:
    """Position ids that do not count padding; int64, as valid. (Before the first token there is none: BOS is first.)"""
    return valid.long().cumsum(dim=1) - 1


def causal_mask(valid: Tensor) -> Tensor:
    """bool [B, 1, Q, Q]: each position attends to itself and to what stands before it, but not to padding."""
    size = valid.shape[1]
    return torch.ones(size, size, dtype=torch.bool, device=valid.device).tril() & valid[:, None, None, :]


def full_mask(valid: Tensor) -> Tensor:
    """bool [B, 1, Q, Q]: each position attends to all that is not padding."""
    return valid[:, None, None, :].expand(-1, 1, valid.shape[1], -1)


# ---------------------------------------------------------------------- filling it


def load_network(
    folder: Path,
    use_proprio: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: str = "none",
) -> Prismatic:
    """The network of a checkpoint folder, in eval mode, no parameter requiring a gradient.

    It is built without memory and filled one tensor at a time, so that there is never a second copy.

    Args:
        quantization: "nf4" keeps the language model's linear layers, but for the LM head, in 4 bit.

    Raises:
        ConfigError: as `build_network`.
    """
    folder, device = Path(folder), torch.device(device)
    network = build_network(folder, use_proprio)
    proprio_file = find_proprio_file(folder) if use_proprio else None
    ours = {official_name(name): name for name, _ in network.named_parameters()}
    packed = set() if quantization == "none" else set(network.adaptable_linears(language_model_only=True))
    for name, tensor in read_tensors(folder, use_proprio, device):
        fill(network, ours[name], tensor.to(device, dtype), packed)
    network.proprio_file = proprio_file.name if proprio_file else None
    # the only tensors that no checkpoint holds: rotary frequencies, always float32
    network.language_model.model.rotary_emb = LlamaRotaryEmbedding(config=network.llama).to(device)
    return network.eval().requires_grad_(False)


def fill(network: Prismatic, name: str, tensor: Tensor, packed: set[str]) -> None:
    """Puts a frozen parameter in its place; of the layers named in `packed` the weight in 4 bit."""
    module_name, _, leaf = name.rpartition(".")
    module = network.get_submodule(module_name)
    if module_name in packed and leaf == "weight":
        network.set_submodule(module_name, Linear4bit(module, tensor))
    else:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def build_network(folder: Path, use_proprio: bool) -> Prismatic:
    """The network of a checkpoint folder without memory, after checking that the weights fit it: quick also at 7B.

    Raises:
        ConfigError: config.json describes none that can be built; a tensor is missing, unexpected or of another shape.
    """
    path = folder / "config.json"
    config = read_config(folder)
    try:
        with torch.device("meta"):
            network = Prismatic(config, use_proprio)
    except Exception as error:  # timm and transformers raise what they happen to meet
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"{path} describes no network that can be built ({reason}); download it again") from error
    vits = (network.vision_backbone.featurizer, network.vision_backbone.fused_featurizer)
    if len({vit.patch_embed.num_patches for vit in vits}) != 1 or not all(len(vit.blocks) > 1 for vit in vits):
        raise ConfigError(f"{path}: expected two ViTs with as many patches and 2 blocks or more; download it again")
    check_fit({official_name(name): list(p.shape) for name, p in network.named_parameters()}, folder, use_proprio)
    return network


def check_fit(expected: dict[str, list[int]], folder: Path, use_proprio: bool) -> None:
    missing, unexpected, misshaped = set(expected), [], []
    for name, shape in tensor_shapes(folder, use_proprio):
        if name not in missing:
            unexpected.append(name)
            continue
        missing.remove(name)
        if shape != expected[name]:
            misshaped.append(f"{name} is {shape}, expected {expected[name]}")
    problems = [
        f"{len(names)} tensors {what}, such as {'; '.join(sorted(names)[:3])}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if names
    ]
    if problems:
        raise ConfigError(
            f"the weights in {folder} do not fit its config.json: {', '.join(problems)}; download it again"
        )
