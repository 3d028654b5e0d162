"""A checkpoint on disk or on the hub, in the official OpenVLA layout: found, checked before anything heavy loads, read, written.

    config.json, dataset_statistics.json, preprocessor_config.json, tokenizer.json
    model.safetensors, or model-0000i-of-0000n.safetensors with model.safetensors.index.json
    proprio_projector--N_checkpoint.pt or proprio_projector.safetensors     where it was trained with proprio (OFT)
    trained_as.json     where vla_rl.sft made it (vla_rl.model.trained_as)

Not here: the network that the weights fill (vla_rl.model.prismatic).
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vla_rl.run.checkpoint import save_tensors, save_torch
from vla_rl.run.settings import ConfigError
from vla_rl.types import ACTION_DIM, PROPRIO_DIM

log = logging.getLogger(__name__)

SPACE = "▁"  # token 29871 of Llama-2: the training prompts end in it, the tokenised text does not
MAX_SHARD_BYTES = 5 * 1024**3  # transformers' own default when these checkpoints were written
HUB_FILES = ["*.json", "*.safetensors", "*.py", "tokenizer.model", "proprio_projector--*", "*.txt"]
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
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
LLAMA_FIXED = {"rope_scaling": None, "tie_word_embeddings": False, "mlp_bias": False, "partial_rotary_factor": 1.0}


# -------------------------------------------------------------------------------------------------------------- finding


def find_folder(path: str) -> Path:
    """A local folder, or the snapshot of a Hugging Face id, downloaded if it is not in the cache.

    Raises:
        ConfigError: says where it looked and how to get the checkpoint; or the repository has what is not implemented.
    """
    if Path(path).is_dir():
        return Path(path)
    if not is_hub_id(path):
        raise ConfigError(
            f"no checkpoint folder {path}; give a folder, a Hugging Face id such as openvla/openvla-7b, or tiny-openvla"
        )
    refuse_film(file_names(path), path)  # before 15 GB are downloaded
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors; each means: not to be had
        cache = huggingface_hub.constants.HF_HUB_CACHE
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"no checkpoint {path}: not a local folder, not in the Hugging Face cache ({cache}), and the download failed "
            f"({type(error).__name__}: {reason}); on a machine with network run `hf download {path}`, or give a local folder"
        ) from error


def is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) is not None


def file_names(path: str | Path) -> list[str]:
    """What lies in a checkpoint: in a local folder, or in the repository of a Hugging Face id, all of it.

    Only a part of a repository is downloaded (HUB_FILES), so the snapshot does not tell what kind of model it is. Without a
    network the snapshot is all there is; then that is said.
    """
    if Path(path).is_dir() or not is_hub_id(str(path)):
        return sorted(p.name for p in Path(path).glob("*"))
    try:
        return huggingface_hub.list_repo_files(str(path))
    except Exception as error:  # as in find_folder
        reason = (str(error).strip().splitlines() or [""])[0]
        log.warning(
            "the files of %s could not be listed (%s: %s): if it has an L1 action head or a FiLM vision backbone, which this "
            "policy does not run, nothing here tells",
            *(path, type(error).__name__, reason),
        )
        return []


def refuse_film(names: Iterable[str], path: str | Path) -> None:
    film = [name for name in names if name.startswith("vision_backbone--")]
    if film:
        raise ConfigError(
            f"{path} has a FiLM vision backbone ({film[0]}), which is not implemented; take one without FiLM"
        )


def find_l1_head(names: Iterable[str]) -> str | None:
    """The file of an L1 action head: then the token head, which this policy samples from, was not trained."""
    return next((name for name in names if name.startswith("action_head--")), None)


def check_folder(folder: Path, use_proprio: bool = False) -> None:
    """Whether what the policy needs lies there and can be read; loads no weights.

    Raises:
        ConfigError: says which file is missing, torn or of another kind, and the way out.
    """
    refuse_film(file_names(folder), folder)
    read_config(folder)
    for path in weight_files(folder):
        tensor_names(path)
    read_pixel_statistics(folder)
    load_statistics(folder)
    if (folder / "tokenizer.json").exists():
        read_tokenizer(folder)
    if use_proprio:
        if find_proprio_file(folder) is None and not has_proprio_weights(folder):
            raise ConfigError(f"use_proprio=true, but {folder} has no proprio projector; set use_proprio=false")
        read_proprio_file(folder)


# --------------------------------------------------------------------------------------------------------------- config


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
    if not path.is_file():
        raise ConfigError(f"no config.json in {folder}; give a checkpoint folder in the official OpenVLA layout")
    raw = read_json(path)
    if raw.get("model_type") != "openvla":
        raise ConfigError(f"{path}: expected model_type 'openvla', got {raw.get('model_type')!r}")
    timm_ids = raw.get("timm_model_ids", [])
    if not raw.get("use_fused_vision_backbone") or not isinstance(timm_ids, list) or len(timm_ids) != 2:
        raise ConfigError(f"{path}: expected the fused DINOv2 + SigLIP backbone, got {timm_ids}")
    sizes = raw.get("image_sizes", [224, 224])
    if not isinstance(sizes, list) or len(set(map(str, sizes))) != 1 or type(sizes[0]) is not int or sizes[0] < 1:
        raise ConfigError(f"{path}: expected one image size for both backbones, got {sizes}")
    if raw.get("image_resize_strategy", "resize-naive") != "resize-naive":
        raise ConfigError(
            f"{path}: image_resize_strategy {raw['image_resize_strategy']!r} is not implemented; no OpenVLA has it"
        )
    llama = read_llama(raw.get("text_config", {}), path)
    act_layers = raw.get("timm_override_act_layers") or [None, None]
    overrides = raw.get("_tiny_timm_overrides", {})
    kwargs = [
        ({"act_layer": act_layer} if act_layer else {}) | overrides.get(timm_id, {})
        for timm_id, act_layer in zip(timm_ids, act_layers, strict=True)
    ]
    return PrismaticConfig(
        raw=raw,
        timm_ids=tuple(timm_ids),
        timm_kwargs=tuple(kwargs),
        image_size=sizes[0],
        llama=llama,
        vocab_size=llama["vocab_size"] - raw.get("pad_to_multiple_of", 64),
        num_action_ids=raw.get("n_action_bins", 256),
    )


def read_llama(text: Any, path: Path) -> dict[str, Any]:
    """The language model's values of a config.json, whichever version of transformers spelled them."""
    if not isinstance(text, dict):
        raise ConfigError(f"{path}: text_config is {type(text).__name__}, expected the language model's settings")
    llama = {key: text.get(key, default) for key, default in LLAMA_DEFAULTS.items()}
    rope = text.get("rope_parameters") or {}  # transformers 5 writes this instead of rope_theta and rope_scaling
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"{path}: rope_parameters {rope} are not implemented; no OpenVLA model scales its rotary positions"
        )
    llama["rope_theta"] = rope.get("rope_theta", llama["rope_theta"])
    fixed = LLAMA_FIXED | {"head_dim": llama["hidden_size"] // llama["num_attention_heads"]}
    rope_fixed = {"partial_rotary_factor": rope.get("partial_rotary_factor")}
    for key, expected in fixed.items():
        for value in (text.get(key), rope_fixed.get(key)):
            if value not in (None, expected):
                raise ConfigError(f"{path}: text_config {key}={value} is not implemented; no OpenVLA model has it")
    return llama


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError where the file is no JSON object."""
    refuse_lfs_pointer(path)
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}; download it again")
    return value


def refuse_lfs_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ConfigError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


# ----------------------------------------------------------------------------------------- statistics, images, tokenizer


def load_statistics(folder: Path) -> dict[str, dict]:
    """dataset_statistics.json, which fine-tuning writes, else norm_stats of config.json (the pre-training data)."""
    path = folder / "dataset_statistics.json"
    statistics = read_json(path) if path.is_file() else read_config(folder).raw.get("norm_stats")
    if not statistics or not isinstance(statistics, dict):
        raise ConfigError(
            f"no action statistics in {folder}: expected dataset_statistics.json or norm_stats in config.json"
        )
    return statistics


def read_statistics(folder: Path, unnorm_key: str | None, use_proprio: bool = False) -> tuple[str, dict]:
    """The key found and its entry, {"action": {...}, "proprio": {...}}.

    Raises:
        ConfigError: there is no such entry, or it is not of 7 action (with use_proprio: and 8 proprio) dimensions.
    """
    statistics = load_statistics(folder)
    if unnorm_key is None and len(statistics) == 1:
        unnorm_key = next(iter(statistics))
    for key in (unnorm_key, f"{unnorm_key}_no_noops", str(unnorm_key).removesuffix("_no_noops")):
        if key in statistics:
            check_statistics(statistics[key], f"the statistics of {key} in {folder}", use_proprio)
            return key, statistics[key]
    raise ConfigError(
        f"unnorm_key={unnorm_key}: the statistics of {folder} have {', '.join(sorted(statistics))}; "
        "give a checkpoint that was fine-tuned on this task suite, or set policy.unnorm_key to one of these"
    )


def check_statistics(entry: Any, name: str, use_proprio: bool) -> None:
    if not isinstance(entry, dict) or "action" not in entry:
        raise ConfigError(f"{name} have no 'action'; download dataset_statistics.json again")
    if use_proprio and "proprio" not in entry:
        raise ConfigError(f"{name} have no 'proprio'; set use_proprio=false")
    for part, size in (("action", ACTION_DIM), *([("proprio", PROPRIO_DIM)] if use_proprio else [])):
        bounds = entry[part]
        for key in ("q01", "q99"):
            values = bounds.get(key) if isinstance(bounds, dict) else None
            if not is_numbers(values, size):
                got = "none" if values is None else f"{len(values)}" if isinstance(values, list) else repr(values)[:40]
                raise ConfigError(
                    f"{name}: expected {size} finite numbers as {part}'s {key}, got {got}; this is another robot's or a torn file"
                )
        mask = bounds.get("mask", [True] * size)
        if not isinstance(mask, list) or len(mask) != size or not all(type(flag) is bool for flag in mask):
            raise ConfigError(f"{name}: expected {size} times true or false as {part}'s mask, got {mask!r}")
        if any(low > high for low, high in zip(bounds["q01"], bounds["q99"], strict=True)):
            raise ConfigError(
                f"{name}: {part}'s q01 is above its q99 somewhere; download dataset_statistics.json again"
            )


def is_numbers(values: Any, count: int) -> bool:
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def read_pixel_statistics(folder: Path) -> tuple[list[list[float]], list[list[float]]]:
    """Means and deviations of DINO's and SigLIP's normalisation, each [2][3]."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise ConfigError(f"no preprocessor_config.json in {folder}, which has the images' means and deviations")
    config = read_json(path)
    for key in ("means", "stds"):
        values = config.get(key)
        if not isinstance(values, list) or len(values) != 2 or not all(is_numbers(row, 3) for row in values):
            raise ConfigError(f"{path}: expected {key} of 2 backbones with 3 finite numbers each, got {values!r:.80}")
    if min(map(min, config["stds"])) <= 0:
        raise ConfigError(f"{path}: expected stds above 0, got {config['stds']}")
    return config["means"], config["stds"]


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Raises ConfigError where there is no tokenizer.json, or it is torn or not Llama's."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"no tokenizer.json in {folder}, which a prompt needs; copy it from openvla/openvla-7b")
    refuse_lfs_pointer(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"{path} cannot be read: {error}; copy it from openvla/openvla-7b") from None
    tokenizer.no_truncation()  # the file keeps both settings of the last call before it was saved
    tokenizer.no_padding()
    if tokenizer.token_to_id(SPACE) is None:
        raise ConfigError(f"{path} has no token {SPACE!r}, which ends the prompt; it is not a Llama tokenizer")
    return tokenizer


# -------------------------------------------------------------------------------------------------------------- weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the index's order if there is an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.is_file():
        if not single.is_file():
            raise ConfigError(f"no weights in {folder}: expected model.safetensors or model.safetensors.index.json")
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConfigError(f"{index}: expected weight_map, a file for each tensor; download it again")
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ConfigError(f"{len(absent)} of {len(names)} weight files are missing in {folder}, such as {absent[0]}")
    return [folder / name for name in names]


def open_tensors(path: Path, device: str = "cpu") -> safe_open:
    """Raises ConfigError where the file is a pointer, cut off or no safetensors."""
    refuse_lfs_pointer(path)
    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is cut off or no safetensors file ({error}); download it again") from None


def tensor_names(path: Path) -> list[str]:
    with open_tensors(path) as file:
        return list(file.keys())


def read_tensors(folder: Path, use_proprio: bool, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Official names and tensors, one at a time. A proprio projector that is not wanted is passed over."""
    for path in weight_files(folder):
        with open_tensors(path, str(device)) as file:
            for name in file.keys():  # noqa: SIM118  safe_open is not a dict
                if use_proprio or not name.startswith("proprio_projector."):
                    yield name, file.get_tensor(name)
    for name, tensor in (read_proprio_file(folder) if use_proprio else {}).items():
        yield "proprio_projector." + name.removeprefix("module."), tensor


def read_proprio_file(folder: Path) -> dict[str, Tensor]:
    """The tensors of the proprio projector's own file, on the CPU; empty without one."""
    path = find_proprio_file(folder)
    if path is None:
        return {}
    if path.suffix == ".safetensors":
        with open_tensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    refuse_lfs_pointer(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zip's and torch's own: each means that it is not what it should be
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"{path} is cut off or no file of tensors ({reason}); download it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ConfigError(f"{path}: expected the projector's tensors by name; download it again")
    return tensors


def find_proprio_file(folder: Path) -> Path | None:
    """`proprio_projector--N_checkpoint.pt` or proprio_projector.safetensors beside the model; None if neither."""
    files = sorted(folder.glob("proprio_projector--*_checkpoint.pt"))
    if len(files) > 1:
        raise ConfigError(f"{folder} has {len(files)} proprio projectors ({files[0].name}, ...); keep one")
    plain = folder / "proprio_projector.safetensors"
    return files[0] if files else plain if plain.is_file() else None


def has_proprio_weights(folder: Path) -> bool:
    """Whether the main state dict has a proprio projector, as SimpleVLA-RL's checkpoints have."""
    return any(name.startswith("proprio_projector.") for path in weight_files(folder) for name in tensor_names(path))


def official_name(name: str) -> str:
    """timm calls LayerScale's weight gamma; the official checkpoints call it scale_factor."""
    return re.sub(r"(^vision_backbone\..*\.ls[12])\.gamma$", r"\1.scale_factor", name)


# -------------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    source: Path | None = None,
    proprio_file: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    statistics: dict[str, dict] | None = None,
) -> None:
    """Writes a checkpoint in the official layout.

    Args:
        folder: made if it is not there.
        tensors: the network's parameter names and values, for instance network.named_parameters().
        source: the checkpoint whose config, statistics, tokenizer and processor files go along; None leaves them out.
        proprio_file: the file for the proprio projector; None puts it into the main state dict.
        max_shard_bytes: weights above this are split, with an index.
        statistics: instead of the source's.
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
    if source is not None:
        for path in Path(source).iterdir():
            if path.suffix in (".json", ".py", ".model", ".txt") and path.name != "model.safetensors.index.json":
                shutil.copyfile(path, folder / path.name)
        write_statistics(folder, load_statistics(Path(source)) if statistics is None else statistics)


def write_statistics(folder: Path, statistics: dict[str, dict]) -> None:
    """Into both places: dataset_statistics.json, and norm_stats of config.json, which is what other OpenVLA code reads."""
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics, indent=1))
    config = read_json(folder / "config.json") | {"norm_stats": statistics}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


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
