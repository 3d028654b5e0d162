"""config.json of a checkpoint: what of it shapes the network, read and checked. Another model than ours is refused, not guessed.

Not here: whether the weights fit it (vla_rl.model.prismatic), the other files of a checkpoint (vla_rl.model.checkpoint_folder).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_rl.run.files import read_json
from vla_rl.run.settings import ConfigError

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
# what else of text_config would change the network; no OpenVLA model has another value
LLAMA_FIXED = {
    "model_type": "llama",
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    **dict.fromkeys(["sliding_window", "layer_types", "quantization_config", "pruned_heads"]),
    **dict.fromkeys(["attn_logit_softcapping", "final_logit_softcapping", "use_qk_norm", "qk_norm"]),
    **dict.fromkeys(["attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"]),
}
ROPE_FIXED = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
# timm's names: DINOv2, then SigLIP (openvla@c8f03f4 prismatic/extern/hf/configuration_prismatic.py, dinosiglip). timm takes others
# from the network ("hf-hub:...") or opens files that keywords name, so no other comes near it
BACKBONES = (
    {"vit_large_patch14_reg4_dinov2.lvd142m"},
    {"vit_so400m_patch14_siglip_224", "vit_so400m_patch14_siglip_384"},
)
ACT_LAYERS = (None, "gelu", "quick_gelu")  # of the official overrides, and timm's own
# of a layer, a vocabulary, an image: none is near, and a network larger than this would not end building
MAX_SIZE = 2**20
TINY_VIT = ("embed_dim", "depth", "num_heads", "mlp_ratio")  # what the tiny checkpoints change of timm's models


@dataclass(frozen=True)
class PrismaticConfig:
    """What of a checkpoint's config.json shapes the network."""

    raw: dict  # config.json as read
    timm_ids: tuple[str, ...]
    timm_kwargs: tuple[dict, ...]
    image_size: int  # S
    llama: dict[str, Any]  # the values of LLAMA_DEFAULTS' names
    vocab_size: int  # without the rows that pad it; the action ids are its last num_action_ids
    num_action_ids: int  # 256


def read_config(folder: Path) -> PrismaticConfig:
    """Reads and checks config.json.

    Raises:
        ConfigError: it is missing, not JSON, not of an OpenVLA model, or of a variant that is not implemented.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ConfigError(f"no config.json in {folder}; {what_it_may_be(Path(folder))}")
    raw = read_json(path)
    if raw.get("model_type") != "openvla":
        raise ConfigError(f"{path}: expected model_type 'openvla', got {raw.get('model_type')!r:.80}")
    if raw.get("quantization_config"):
        raise ConfigError(f"{path}: quantization_config is not implemented; give the weights that were not quantized")
    timm_ids = raw.get("timm_model_ids")
    if raw.get("use_fused_vision_backbone") is not True or not is_list(timm_ids, str, 2):
        raise ConfigError(f"{path}: expected the fused DINOv2 + SigLIP backbone, got {timm_ids!r:.80}")
    for timm_id, known in zip(timm_ids, BACKBONES, strict=True):
        if timm_id not in known:
            raise ConfigError(f"{path}: timm_model_ids has {timm_id!r:.80}, expected {' or '.join(sorted(known))}")
    sizes = raw.get("image_sizes", [224, 224])
    if not is_list(sizes, int, 2) or sizes[0] != sizes[1] or not 1 <= sizes[0] <= MAX_SIZE:
        raise ConfigError(f"{path}: expected one image size for both backbones, got {sizes!r:.80}")
    strategy = raw.get("image_resize_strategy", "resize-naive")
    if strategy != "resize-naive":
        raise ConfigError(f"{path}: image_resize_strategy {strategy!r:.80} is not implemented; no OpenVLA has it")
    llama = read_llama(raw.get("text_config", {}), path)
    padding, num_action_ids = raw.get("pad_to_multiple_of", 64), raw.get("n_action_bins", 256)
    check_number(path, "pad_to_multiple_of", padding, 0, llama["vocab_size"], int)
    check_number(path, "n_action_bins", num_action_ids, 2, llama["vocab_size"] - padding, int)
    return PrismaticConfig(
        raw=raw,
        timm_ids=tuple(timm_ids),
        timm_kwargs=read_timm_kwargs(raw, timm_ids, path),
        image_size=sizes[0],
        llama=llama,
        vocab_size=llama["vocab_size"] - padding,
        num_action_ids=num_action_ids,
    )


def what_it_may_be(folder: Path) -> str:
    """The way out of a folder that is no checkpoint: a run of ours, or LoRA weights, are taken for one."""
    if (folder / "model" / "config.json").exists():
        return f"it is a run whose fine-tuned model lies in {folder / 'model'}: give that"
    name = "it is LoRA weights" if (folder / "adapter_config.json").exists() else None
    if (folder / "checkpoints").is_dir() or ((folder / "adapter").is_dir() and (folder / "manifest.json").exists()):
        name = "it is a run of PPO or GRPO or one of its checkpoints"
    if name is None:
        return "give a checkpoint folder in the official OpenVLA layout"
    return (
        f"{name}, which is no model without its base: go on with --resume (a run), begin from it with policy.adapter={folder} beside "
        f"its base's --checkpoint, evaluate it with --run or --adapter, or make a model of it: python -m vla_rl.export {folder} OUT"
    )


def read_timm_kwargs(raw: dict, timm_ids: list[str], path: Path) -> tuple[dict, ...]:
    act_layers = raw.get("timm_override_act_layers") or [None, None]
    if not is_list(act_layers, str | None, 2) or not set(act_layers) <= set(ACT_LAYERS):
        raise ConfigError(
            f"{path}: expected timm_override_act_layers of 2, each null, gelu or quick_gelu, got {act_layers!r:.80}; download it again"
        )
    overrides = raw.get("_tiny_timm_overrides", {})
    vits = [overrides.get(timm_id, {}) for timm_id in timm_ids] if isinstance(overrides, dict) else [None]
    if not all(isinstance(vit, dict) and vit.keys() <= set(TINY_VIT) for vit in vits):
        raise ConfigError(f"{path}: expected _tiny_timm_overrides of {', '.join(TINY_VIT)}, got {overrides!r:.80}")
    for vit in vits:
        for key, value in vit.items():
            limit, kind = (1024, int) if key == "depth" else (MAX_SIZE, int | float if key == "mlp_ratio" else int)
            check_number(path, f"_tiny_timm_overrides' {key}", value, 1, limit, kind)
    return tuple(
        ({"act_layer": act_layer} if act_layer else {}) | vit for act_layer, vit in zip(act_layers, vits, strict=True)
    )


def read_llama(text: Any, path: Path) -> dict[str, Any]:
    """The language model's values of a config.json, whichever version of transformers spelled them."""
    if not isinstance(text, dict):
        raise ConfigError(f"{path}: text_config is {type(text).__name__}, expected the language model's settings")
    llama = {key: text.get(key, default) for key, default in LLAMA_DEFAULTS.items()}
    llama["rope_theta"] = read_rope_theta(text, path)
    if llama["num_key_value_heads"] is None:
        llama["num_key_value_heads"] = llama["num_attention_heads"]
    for key in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
        check_number(path, f"text_config {key}", llama[key], 1, MAX_SIZE, int)
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        check_number(path, f"text_config {key}", llama[key], 1, 1024, int)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        check_number(path, f"text_config {key}", llama[key], 0, llama["vocab_size"] - 1, int)
    check_number(path, "text_config rms_norm_eps", llama["rms_norm_eps"], 1e-12, 1)
    if type(llama["attention_bias"]) is not bool or not isinstance(llama["hidden_act"], str):
        got = f"{llama['attention_bias']!r:.40} and {llama['hidden_act']!r:.40}"
        raise ConfigError(f"{path}: text_config attention_bias and hidden_act: expected a bool and a name, got {got}")
    hidden, heads, shared = (llama[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if hidden % (2 * heads) or heads % shared:
        raise ConfigError(
            f"{path}: text_config hidden_size={hidden}, num_attention_heads={heads}, num_key_value_heads={shared} do not go "
            "together: expected an even head size, and heads that share keys evenly; download it again"
        )
    check_fixed(path, "text_config", text, LLAMA_FIXED | {"head_dim": hidden // heads})
    return llama


def read_rope_theta(text: dict, path: Path) -> float:
    """The base of the rotary frequencies. transformers 4 writes rope_theta and rope_scaling, 5 writes rope_parameters."""
    values = [text["rope_theta"]] if "rope_theta" in text else []
    for name in ("rope_scaling", "rope_parameters"):
        rope = text.get(name) or {}
        if not isinstance(rope, dict) or not rope.keys() <= {"rope_theta", *ROPE_FIXED}:
            raise ConfigError(
                f"{path}: text_config {name} {rope!r:.120} is not implemented; no OpenVLA model scales its rotary positions"
            )
        check_fixed(path, f"text_config {name}", rope, ROPE_FIXED)
        values += [rope["rope_theta"]] if "rope_theta" in rope else []
    for value in values:
        check_number(path, "text_config rope_theta", value, 1, 1e12)
    if len(set(values)) > 1:
        raise ConfigError(
            f"{path}: text_config has rope_theta {' and '.join(map(str, values))}; keep the one of the training"
        )
    return float(values[0]) if values else LLAMA_DEFAULTS["rope_theta"]


def check_fixed(path: Path, name: str, given: dict, fixed: dict[str, Any]) -> None:
    """Absent, null and empty all say: not used."""
    for key, expected in fixed.items():
        value = given.get(key)
        if value not in (None, {}, [], expected) and not (expected is None and value is False):
            raise ConfigError(f"{path}: {name} {key}={value!r:.80} is not implemented; no OpenVLA model has it")


def check_number(path: Path, name: str, value: Any, low: float, high: float, kind: Any = int | float) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{path}: {name}={value!r:.80}, expected {what} from {low} to {high}; download it again")


def is_list(value: Any, kind: Any, length: int) -> bool:
    if not isinstance(value, list) or len(value) != length:
        return False
    return all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
