"""The network of OpenVLA and OpenVLA-OFT: two ViTs, a projector, Llama and its masks. Nothing of RL or robots.

It also reads and writes the official checkpoint layout. What it computes was checked against the official code
(openvla/openvla@c8f03f4 prismatic/extern/hf/modeling_prismatic.py; moojink/openvla-oft@213c5ff, same file).

B rows, K images, V patches of one image, L prompt tokens with BOS, A action tokens, D hidden size, S image side.

One row of a batch, in the order in which Llama reads it:

    [BOS] [K*V patches] [proprio?] [padding] [L-1 prompt tokens] [action tokens or slots ...] [</s> if parallel]

Padding is masked and takes no position, so each row equals its own unpadded run; as it stands before the prompt, the
last prompt token and the action slots are at the same place in every row, counted from the end.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vla_rl.run.checkpoint import save_tensors, save_torch
from vla_rl.run.settings import ConfigError

PROPRIO_DIM = 8  # as vla_rl.types; the network must not import what is of robots
MAX_SHARD_BYTES = 5 * 1024**3  # transformers' own default when these checkpoints were written
# Llama-2 7B, which the official config class fills in where a checkpoint's text_config leaves a value out
# (transformers LlamaConfig). rms_norm_eps is 1e-6 there, not Llama-2's own 1e-5.
LLAMA_DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 32000,
}


@dataclass(frozen=True)
class PrismaticConfig:
    """What of a checkpoint's config.json shapes the network."""

    raw: dict  # config.json as read
    timm_ids: tuple[str, ...]
    timm_kwargs: tuple[dict, ...]
    image_size: int  # S
    llama: LlamaConfig
    vocab_size: int  # without the rows that pad it; the action ids are its last num_action_ids
    num_action_ids: int  # 256


def read_config(folder: Path) -> PrismaticConfig:
    """Reads and checks config.json.

    Raises:
        ConfigError: it is missing, not JSON, not of an OpenVLA model, or of a variant that is not implemented.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"no config.json in {folder}; give a checkpoint folder in the official OpenVLA layout")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if raw.get("model_type") != "openvla":
        raise ConfigError(f"{path}: expected model_type 'openvla', got {raw.get('model_type')!r}")
    if not raw.get("use_fused_vision_backbone") or len(raw.get("timm_model_ids", [])) != 2:
        raise ConfigError(f"{path}: expected the fused DINOv2 + SigLIP backbone, got {raw.get('timm_model_ids')}")
    sizes = raw.get("image_sizes", [224, 224])
    if len(set(sizes)) != 1:
        raise ConfigError(f"{path}: expected one image size for both backbones, got {sizes}")
    text = raw.get("text_config", {})
    if text.get("rope_scaling") or text.get("tie_word_embeddings"):
        raise ConfigError(
            f"{path}: rope_scaling and tied word embeddings are not implemented; no OpenVLA model has them"
        )
    llama = LlamaConfig(
        **{key: text.get(key, default) for key, default in LLAMA_DEFAULTS.items()},
        tie_word_embeddings=False,
        attn_implementation="sdpa",  # takes 4-D boolean masks as given; flash attention would ignore them
    )
    overrides = raw.get("_tiny_timm_overrides", {})
    kwargs = []
    for timm_id, act_layer in zip(
        raw["timm_model_ids"], raw.get("timm_override_act_layers", [None, None]), strict=True
    ):
        kwargs.append(({"act_layer": act_layer} if act_layer else {}) | overrides.get(timm_id, {}))
    return PrismaticConfig(
        raw=raw,
        timm_ids=tuple(raw["timm_model_ids"]),
        timm_kwargs=tuple(kwargs),
        image_size=sizes[0],
        llama=llama,
        vocab_size=llama.vocab_size - raw.get("pad_to_multiple_of", 64),
        num_action_ids=raw.get("n_action_bins", 256),
    )


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
    valid: Tensor  # bool [B, P], False at padding


class Prismatic(nn.Module):
    """The network; parameter names are the official ones (but for LayerScale's gamma, see official_name)."""

    def __init__(self, config: PrismaticConfig, use_proprio: bool = False):
        super().__init__()
        self.config = config
        self.vision_backbone = VisionBackbone(config)
        vision_size = self.vision_backbone.featurizer.embed_dim + self.vision_backbone.fused_featurizer.embed_dim
        self.projector = Projector(vision_size, config.llama.hidden_size)
        self.language_model = LlamaForCausalLM(config.llama)
        if use_proprio:
            self.proprio_projector = ProprioProjector(config.llama.hidden_size)
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
        bos, text, text_valid = split_bos_and_left_pad(input_ids, attention_mask.bool())
        embed = self.language_model.get_input_embeddings()
        parts = [embed(bos), self.embed_images(pixel_values)]
        if self.use_proprio:
            parts.append(self.proprio_projector(proprio.to(parts[0].dtype))[:, None])
        parts.append(embed(text))
        prefix_valid = text_valid.new_ones(len(text), sum(part.shape[1] for part in parts[:-1]))
        return Prompt(torch.cat(parts, dim=1), torch.cat([prefix_valid, text_valid], dim=1))

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
        valid = extend(prompt.valid, action_ids.shape[1])
        hidden = self.run_llama(embeddings, causal_mask(valid), positions(valid))
        return hidden[:, prompt.valid.shape[1] - 1 :]

    def forward_slots(self, prompt: Prompt, num_tokens: int) -> Tensor:
        """OpenVLA-OFT: hidden [B, A, D] that predicts A tokens at once, each position attending to every other.

        The slots' embeddings are zero and the stop token after them keeps its own (openvla-oft
        modeling_prismatic.py, _process_action_masks and predict_action).
        """
        batch, _, size = prompt.embeddings.shape
        stop = torch.full((batch, 1), self.config.llama.eos_token_id, device=prompt.valid.device)
        slots = prompt.embeddings.new_zeros(batch, num_tokens, size)
        embeddings = torch.cat([prompt.embeddings, slots, self.language_model.get_input_embeddings()(stop)], dim=1)
        valid = extend(prompt.valid, num_tokens + 1)
        hidden = self.run_llama(embeddings, full_mask(valid), positions(valid))
        return hidden[:, prompt.valid.shape[1] - 1 : -2]

    def decode(self, prompt: Prompt, num_tokens: int, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """OpenVLA, one token after another with cached keys and values.

        Args:
            choose: hidden [B, D] -> token ids int64 [B].

        Returns:
            The chosen ids int64 [B, A] and the hidden states [B, A, D] they were chosen from.
        """
        valid, cache = prompt.valid, DynamicCache(config=self.config.llama)
        hidden = [self.run_llama(prompt.embeddings, causal_mask(valid), positions(valid), cache)[:, -1]]
        ids = [choose(hidden[-1])]
        for _ in range(num_tokens - 1):
            valid = extend(valid, 1)
            embeddings = self.language_model.get_input_embeddings()(ids[-1][:, None])
            hidden.append(self.run_llama(embeddings, valid[:, None, None, :], positions(valid)[:, -1:], cache)[:, -1])
            ids.append(choose(hidden[-1]))
        return torch.stack(ids, dim=1), torch.stack(hidden, dim=1)

    def run_llama(
        self, embeddings: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache | None = None
    ) -> Tensor:
        """Hidden states [B, Q, D] after the final norm; mask is boolean [B, 1, Q, keys], True where attended."""
        return self.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

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

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass. Llama's layers do so in train mode only."""
        self.language_model.model.activation_checkpointing_enable({"use_reentrant": False})
        for vit in (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer):
            vit.set_grad_checkpointing(True)

    def check_no_dropout(self) -> None:
        """Raises ConfigError if train mode would compute anything else than eval mode."""
        for name, module in self.named_modules():
            for key in ("p", "drop_prob", "attention_dropout"):
                if isinstance(getattr(module, key, None), float) and getattr(module, key) != 0:
                    raise ConfigError(f"{name} has {key}={getattr(module, key)}; sampling and scoring need dropout 0")


def split_bos_and_left_pad(input_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """BOS [B, 1], the other tokens [B, L-1] moved to the right end, and where those are (bool [B, L-1])."""
    order = valid.long().argsort(dim=1, stable=True)  # padding first, tokens in their own order
    ids = input_ids.gather(1, order)
    bos_at = (~valid).sum(dim=1, keepdim=True)  # [B, 1]
    text_valid = torch.arange(1, ids.shape[1], device=ids.device) > bos_at
    return ids.gather(1, bos_at), ids[:, 1:], text_valid


def extend(valid: Tensor, n: int) -> Tensor:
    return F.pad(valid, (0, n), value=True)


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


# ---------------------------------------------------------------------- checkpoints


def load_network(
    folder: Path, use_proprio: bool = False, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Prismatic:
    """The network of a checkpoint folder, in eval mode, no parameter requiring a gradient.

    It is built without memory and filled one tensor at a time, so that there is never a second copy.

    Raises:
        ConfigError: a tensor is missing, unexpected or of another shape, or there is no proprio projector.
    """
    folder, device = Path(folder), torch.device(device)
    config = read_config(folder)
    with torch.device("meta"):
        network = Prismatic(config, use_proprio)
    files = weight_files(folder)
    proprio_file = find_proprio_file(folder) if use_proprio else None
    fill(network, read_tensors(files, proprio_file, use_proprio, device), device, dtype, folder)
    network.proprio_file = proprio_file.name if proprio_file else None
    # the only tensors that no checkpoint holds: rotary frequencies, always float32
    network.language_model.model.rotary_emb = LlamaRotaryEmbedding(config=config.llama).to(device)
    return network.eval().requires_grad_(False)


def fill(
    network: Prismatic, tensors: Iterable[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype, folder: Path
) -> None:
    ours = {official_name(name): name for name, _ in network.named_parameters()}
    missing, unexpected, misshaped = set(ours), [], []
    for name, tensor in tensors:
        if name not in missing:
            unexpected.append(name)
            continue
        missing.remove(name)
        module_name, _, leaf = ours[name].rpartition(".")
        module = network.get_submodule(module_name)
        expected = getattr(module, leaf).shape
        if tensor.shape != expected:
            misshaped.append(f"{name} is {list(tensor.shape)}, expected {list(expected)}")
        else:
            setattr(module, leaf, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
    problems = [
        f"{len(names)} tensors {what}, such as {'; '.join(sorted(names)[:3])}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if names
    ]
    if problems:
        raise ConfigError(f"the weights in {folder} do not fit its config.json: " + ", ".join(problems))


def read_tensors(
    files: list[Path], proprio_file: Path | None, use_proprio: bool, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Official names and tensors, one at a time. A proprio projector that is not wanted is passed over."""
    for path in files:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118  safe_open is not a dict
                if use_proprio or not name.startswith("proprio_projector."):
                    yield name, file.get_tensor(name)
    if proprio_file is None:
        return
    if proprio_file.suffix == ".pt":
        tensors = torch.load(proprio_file, map_location="cpu", weights_only=True)
    else:
        with safe_open(proprio_file, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        yield "proprio_projector." + name.removeprefix("module."), tensor


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the index's order if there is an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.is_file():
        if not single.is_file():
            raise ConfigError(f"no weights in {folder}: expected model.safetensors or model.safetensors.index.json")
        return [single]
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ConfigError(f"{len(absent)} of {len(names)} weight files are missing in {folder}, such as {absent[0]}")
    return [folder / name for name in names]


def find_proprio_file(folder: Path) -> Path | None:
    """`proprio_projector--N_checkpoint.pt` or proprio_projector.safetensors beside the model; None if neither."""
    files = sorted(folder.glob("proprio_projector--*_checkpoint.pt"))
    if len(files) > 1:
        raise ConfigError(f"{folder} has {len(files)} proprio projectors ({files[0].name}, ...); keep one")
    plain = folder / "proprio_projector.safetensors"
    return files[0] if files else plain if plain.is_file() else None


def official_name(name: str) -> str:
    """timm calls LayerScale's weight gamma; the official checkpoints call it scale_factor."""
    return re.sub(r"(^vision_backbone\..*\.ls[12])\.gamma$", r"\1.scale_factor", name)


def save_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    source: Path | None = None,
    proprio_file: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a checkpoint in the official layout.

    Args:
        folder: made if it is not there.
        tensors: this module's parameter names and values, for instance network.named_parameters().
        source: the checkpoint whose config, statistics, tokenizer and processor files go along; None leaves them out.
        proprio_file: the file for the proprio projector; None puts it into the main state dict.
        max_shard_bytes: weights above this are split, with an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    proprio: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        name = official_name(name)
        if proprio_file and name.startswith("proprio_projector."):
            proprio[name.removeprefix("proprio_projector.")] = tensor
            continue
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    write_shards(folder, shards)
    if proprio:
        proprio = {name: tensor.detach().cpu().contiguous() for name, tensor in proprio.items()}
        if proprio_file.endswith(".pt"):
            save_torch({"module." + name: tensor for name, tensor in proprio.items()}, folder / proprio_file)
        else:
            save_tensors(proprio, folder / proprio_file)
    for path in Path(source).iterdir() if source else ():
        if path.suffix in (".json", ".py", ".model", ".txt") and path.name != "model.safetensors.index.json":
            shutil.copyfile(path, folder / path.name)


def write_shards(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file_name, shard in zip(names, shards, strict=True):
        # one shard on the CPU at a time; the format needs tensors of their own, not views
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
        save_tensors(tensors, folder / file_name, format="pt")
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
