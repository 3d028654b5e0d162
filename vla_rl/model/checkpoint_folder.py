"""A checkpoint on disk or on the hub, in the official OpenVLA layout: found, checked before anything heavy loads, read, written.

    config.json, dataset_statistics.json, preprocessor_config.json, tokenizer.json
    model.safetensors, or model-0000i-of-0000n.safetensors with model.safetensors.index.json
    proprio_projector--N_checkpoint.pt or proprio_projector.safetensors     where it was trained with proprio (OFT)
    action_head--N_checkpoint.pt or action_head.safetensors                 where it acts through an L1 head (OFT)
    trained_as.json     where vla_rl.sft made it (vla_rl.model.trained_as)

Not here: what config.json says (vla_rl.model.prismatic_config), the network that the weights fill (vla_rl.model.prismatic).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import huggingface_hub
import tokenizers
import torch
from torch import Tensor

from vla_rl.model.prismatic_config import is_list, read_config
from vla_rl.run.checkpoint import save_tensors, save_torch
from vla_rl.run.failures import one_line
from vla_rl.run.files import (
    FLOATS,
    all_tensors,
    load_torch,
    open_tensors,
    read_json,
    refuse_lfs_pointer,
    refuse_names,
    write_whole,
)
from vla_rl.run.settings import ConfigError
from vla_rl.types import ACTION_DIM, PROPRIO_DIM

log = logging.getLogger(__name__)

SPACE = "▁"  # token 29871 of Llama-2: the training prompts end in it, the tokenised text does not
MAX_SHARD_BYTES = 5 * 1024**3  # transformers' own default when these checkpoints were written
HUB_FILES = ["*.json", "*.safetensors", "*.py", "tokenizer.model", "proprio_projector--*", "action_head--*", "*.txt"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TRAINED_AS = "trained_as.json"
PLAIN_HEAD = "action_head.safetensors"
LISTING_TIMEOUT_S = 10.0  # as the hub client waits for one file's entity tag


# -------------------------------------------------------------------------------------------------------------- finding


def find_folder(path: str) -> tuple[Path, list[str]]:
    """A local folder, or the snapshot of a Hugging Face id, downloaded if it is not in the cache; and the names of all files
    beside the model. Only a part of a repository is downloaded (HUB_FILES), and the rest tells what kind of model it is.

    Raises:
        ConfigError: says where it looked and how to get the checkpoint; or the repository has what is not implemented.
    """
    if Path(path).is_dir():
        names = local_names(Path(path))
        refuse_film(names, path)
        return Path(path), names
    if not is_hub_id(path):
        raise ConfigError(
            f"no checkpoint folder {path}; give a folder, a Hugging Face id such as openvla/openvla-7b, or tiny-openvla"
        )
    try:
        listed, reason = list_repository(path), ""
    except Exception as error:  # the hub client raises its own, httpx's and OS errors; each means: not to be had
        listed, reason = None, f"{type(error).__name__}: {one_line(error)}"
    refuse_film(listed or [], path)  # before 15 GB are downloaded
    try:
        folder = Path(huggingface_hub.snapshot_download(path, allow_patterns=HUB_FILES))
    except Exception as error:  # as above
        cache = huggingface_hub.constants.HF_HUB_CACHE
        raise ConfigError(
            f"no checkpoint {path}: not a local folder, not in the Hugging Face cache ({cache}), and the download failed "
            f"({type(error).__name__}: {one_line(error)}); on a machine with network run `hf download {path}`, or give a local folder"
        ) from error
    names = local_names(folder) if listed is None else listed
    refuse_film(names, path)
    if listed is None:
        log.warning(
            "the files of %s could not be listed (%s); the copy in the cache is used, but whether the model has an L1 action "
            "head or a FiLM vision backbone, with which it fails here, cannot be known: look for action_head--* (policy.head=l1) and "
            "vision_backbone--* on its page",
            *(path, reason),
        )
    return folder, names


def is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) is not None


def list_repository(path: str) -> list[str]:
    """The files of a Hugging Face id, without those in sub-folders.

    In a thread, since the client's own call has no time limit and tries for half a minute where there is no network.
    """
    answer: Future[list[str]] = Future()

    def ask() -> None:
        try:
            answer.set_result(huggingface_hub.list_repo_files(path))
        except BaseException as error:  # raised again by result()
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return [name for name in answer.result(timeout=LISTING_TIMEOUT_S) if "/" not in name]


def local_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse_film(names: Iterable[str], path: str | Path) -> None:
    film = [name for name in names if name.startswith("vision_backbone--")]
    if film:
        raise ConfigError(
            f"{path} has a FiLM vision backbone ({film[0]}), which is not implemented; take one without FiLM, such as "
            "moojink/openvla-7b-oft-finetuned-libero-* for policy.head=l1"
        )


def find_l1_head(names: Iterable[str]) -> str | None:
    """The file of an L1 action head: then the token head, which policy.head=tokens samples from, was not trained."""
    return next((name for name in sorted(names) if name.startswith("action_head--") or name == PLAIN_HEAD), None)


def check_folder(folder: Path, use_proprio: bool = False) -> None:
    """Whether what the policy needs lies there and can be read; loads no weights.

    Raises:
        ConfigError: says which file is missing, torn or of another kind, and the way out.
    """
    config = read_config(folder)
    weight_files(folder)
    read_pixel_statistics(folder)
    statistics = load_statistics(folder)
    if len(statistics) == 1:  # else the setting tells which is used (read_statistics)
        read_statistics(folder, None, use_proprio)
    if (folder / "tokenizer.json").exists():
        tokenizer = read_tokenizer(folder)
        largest = max(tokenizer.get_vocab().values())
        if largest >= config.llama["vocab_size"]:
            raise ConfigError(
                f"{folder / 'tokenizer.json'} has token ids up to {largest}, the model {config.llama['vocab_size']} "
                "embeddings; take the tokenizer of this model"
            )
    if use_proprio and find_proprio_file(folder) is None and not has_proprio_weights(folder):
        raise ConfigError(f"use_proprio=true, but {folder} has no proprio projector; set use_proprio=false")


# ----------------------------------------------------------------------------------------- statistics, images, tokenizer


def load_statistics(folder: Path) -> dict[str, dict]:
    """dataset_statistics.json, which fine-tuning writes, else norm_stats of config.json (the pre-training data)."""
    path = folder / "dataset_statistics.json"
    statistics = read_json(path) if path.exists() else read_config(folder).raw.get("norm_stats")
    if not statistics or not isinstance(statistics, dict):
        raise ConfigError(
            f"no action statistics in {folder}: expected dataset_statistics.json or norm_stats in config.json"
        )
    refuse_names(statistics, statistics_file(folder))
    return statistics


def statistics_file(folder: Path) -> Path:
    path = folder / "dataset_statistics.json"
    return path if path.exists() else folder / "config.json"


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
            check_statistics(statistics[key], f"the statistics of {key} in {statistics_file(folder)}", use_proprio)
            return key, statistics[key]
    raise ConfigError(
        f"unnorm_key={unnorm_key}: the statistics of {statistics_file(folder)} have {', '.join(sorted(statistics)[:30])}; "
        "give a checkpoint that was fine-tuned on this task suite, or set policy.unnorm_key to one of these"
    )


def check_statistics(entry: Any, name: str, use_proprio: bool) -> None:
    if not isinstance(entry, dict) or "action" not in entry:
        raise ConfigError(f"{name} have no 'action'; download dataset_statistics.json again")
    if use_proprio and "proprio" not in entry:
        raise ConfigError(f"{name} have no 'proprio'; set use_proprio=false")
    for part, size in (("action", ACTION_DIM), *([("proprio", PROPRIO_DIM)] if use_proprio else [])):
        bounds = entry[part] if isinstance(entry[part], dict) else {}
        for key in ("q01", "q99"):
            values = bounds.get(key)
            if not is_numbers(values, size):
                got = f"{len(values)} values, {values!r:.60}" if isinstance(values, list) else f"{values!r:.60}"
                raise ConfigError(
                    f"{name}: expected {size} finite numbers as {part}'s {key}, got {got}; this is another robot's or a torn file"
                )
        mask = bounds.get("mask", [True] * size)
        if not isinstance(mask, list) or len(mask) != size or not all(type(flag) is bool for flag in mask):
            raise ConfigError(
                f"{name}: expected {size} times true or false as {part}'s mask, got {mask!r:.80}; download it again"
            )
        if any(low > high for low, high in zip(bounds["q01"], bounds["q99"], strict=True)):
            raise ConfigError(
                f"{name}: {part}'s q01 is above its q99 somewhere; download dataset_statistics.json again"
            )


def is_numbers(values: Any, count: int) -> bool:
    return is_list(values, int | float, count) and all(abs(v) < 1e30 for v in values)  # false of NaN, too


def read_pixel_statistics(folder: Path) -> tuple[list[list[float]], list[list[float]]]:
    """Means and deviations of DINO's and SigLIP's normalisation, each [2][3]."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        raise ConfigError(f"no preprocessor_config.json in {folder}, which has the images' means and deviations")
    config = read_json(path)
    for key in ("means", "stds"):
        values = config.get(key)
        if not is_list(values, list, 2) or not all(is_numbers(row, 3) for row in values):
            raise ConfigError(f"{path}: expected {key} of 2 backbones with 3 finite numbers each, got {values!r:.80}")
    if min(map(min, config["stds"])) < 1e-6:
        raise ConfigError(f"{path}: expected stds above 0, got {config['stds']}; download it again")
    return config["means"], config["stds"]


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Raises ConfigError where there is no tokenizer.json, or it is torn or not Llama's."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ConfigError(f"no tokenizer.json in {folder}, which a prompt needs; copy it from openvla/openvla-7b")
    refuse_lfs_pointer(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f"{path} cannot be read ({one_line(error)}); copy it from openvla/openvla-7b") from None
    tokenizer.no_truncation()  # the file keeps both settings of the last call before it was saved
    tokenizer.no_padding()
    if tokenizer.token_to_id(SPACE) is None:
        raise ConfigError(
            f"{path} has no token {SPACE!r}, which ends the prompt: it is not Llama's; copy it from openvla/openvla-7b"
        )
    return tokenizer


# -------------------------------------------------------------------------------------------------------------- weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the index's order if there is an index."""
    single, index = folder / SINGLE, folder / INDEX
    if not index.exists():
        if not single.exists():
            raise ConfigError(f"no weights in {folder}: expected model.safetensors or {INDEX}")
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(is_file_name, weight_map.values())):
        raise ConfigError(
            f"{index}: expected weight_map with a file beside it for each tensor, got {weight_map!r:.80}; download it again"
        )
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise ConfigError(
            f"{len(absent)} of {len(names)} weight files are missing in {folder}, such as {absent[0]}; download them again"
        )
    return [folder / name for name in names]


def is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and re.fullmatch(r"[\w.-]+", value) is not None


def tensor_shapes(folder: Path, use_proprio: bool) -> Iterator[tuple[str, list[int]]]:
    """What `read_tensors` gives, without the values.

    Raises:
        ConfigError: a tensor is quantized.
    """
    for path in weight_files(folder):
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118  safe_open is not a dict
                if use_proprio or not name.startswith("proprio_projector."):
                    tensor = file.get_slice(name)
                    if tensor.get_dtype() not in FLOATS:
                        raise ConfigError(
                            f"{path}: {name} is {tensor.get_dtype()}, expected {' or '.join(FLOATS)}; give weights that were not "
                            "quantized"
                        )
                    yield name, tensor.get_shape()
    for name, tensor in (read_proprio_file(folder) if use_proprio else {}).items():
        yield "proprio_projector." + name.removeprefix("module."), list(tensor.shape)


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
    return {} if path is None else read_tensor_file(path)


def read_tensor_file(path: Path) -> dict[str, Tensor]:
    """A part's own file, `.pt` or safetensors, on the CPU.

    Raises:
        ConfigError: it is a pointer, cut off or no file of named tensors.
    """
    if path.suffix == ".safetensors":
        with open_tensors(path) as file:
            return all_tensors(path, file)
    refuse_lfs_pointer(path)
    try:
        tensors = load_torch(path)
    except Exception as error:  # pickle's, zip's and torch's own: each means that it is not what it should be
        raise ConfigError(f"{path} is cut off or no file of tensors ({one_line(error)}); download it again") from None
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(t, Tensor) and t.is_floating_point() for t in tensors.values()):
        raise ConfigError(f"{path}: expected tensors by name; download it again")
    refuse_names(tensors, path)
    return tensors


def find_proprio_file(folder: Path) -> Path | None:
    """`proprio_projector--N_checkpoint.pt` or proprio_projector.safetensors beside the model; None if neither."""
    return find_part(folder, "proprio_projector", "proprio projectors")


def find_action_head_file(folder: Path) -> Path | None:
    """`action_head--N_checkpoint.pt` or action_head.safetensors beside the model; None if neither."""
    return find_part(folder, "action_head", "action heads")


def find_part(folder: Path, name: str, plural: str) -> Path | None:
    files = sorted(folder.glob(f"{name}--*_checkpoint.pt"))
    if len(files) > 1:
        raise ConfigError(f"{folder} has {len(files)} {plural} ({files[0].name}, ...); keep one")
    plain = folder / f"{name}.safetensors"
    return files[0] if files else plain if plain.exists() else None


def has_proprio_weights(folder: Path) -> bool:
    """Whether the main state dict has a proprio projector, as SimpleVLA-RL's checkpoints have."""
    return any(name.startswith("proprio_projector.") for name, _ in tensor_shapes(folder, use_proprio=True))


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
    """Writes a checkpoint in the official layout, a shard as soon as it is full: never a second copy of the model in memory.

    config.json comes last: whatever ends the writing, a folder without it is no checkpoint.

    Args:
        folder: made if it is not there.
        tensors: the network's parameter names and values, for instance network.named_parameters(); one at a time.
        source: the checkpoint whose config, statistics, tokenizer and processor files go along; None leaves them out.
        proprio_file: the file for the proprio projector; None puts it into the main state dict.
        max_shard_bytes: weights above this are split, with an index.
        statistics: of new data, instead of the source's; then it was trained anew, and the source's trained_as.json is
            left out.

    Raises:
        ConfigError: the folder is the source itself.
    """
    folder = Path(folder)
    if source is not None and folder.resolve() == Path(source).resolve():
        raise ConfigError(f"{folder} is the checkpoint that the weights come from; give another folder to save in")
    folder.mkdir(parents=True, exist_ok=True)
    proprio: dict[str, Tensor] = {}
    shards = Shards(folder, max_shard_bytes)
    try:
        for name, tensor in tensors:
            name = official_name(name)
            if proprio_file and name.startswith("proprio_projector."):
                proprio[name.removeprefix("proprio_projector.")] = tensor.detach().cpu().contiguous()
            else:
                shards.add(name, tensor)
            del tensor  # a shard is written without the next one's first beside it
        if source is not None:
            (folder / "config.json").unlink(missing_ok=True)  # of an older checkpoint: half of it is no checkpoint
        shards.close()
    finally:
        for path in folder.glob(".model-*.safetensors"):
            path.unlink()
    if proprio:
        if proprio_file.endswith(".pt"):
            save_torch({"module." + name: tensor for name, tensor in proprio.items()}, folder / proprio_file)
        else:
            save_tensors(proprio, folder / proprio_file)
    if source is not None:
        for path in Path(source).iterdir():
            left_out = (INDEX,) if statistics is None else (INDEX, TRAINED_AS)
            if path.suffix in (".json", ".py", ".model", ".txt") and path.name not in (*left_out, "config.json"):
                shutil.copyfile(path, folder / path.name)
        # into both places: config.json is what other OpenVLA code reads
        statistics = load_statistics(Path(source)) if statistics is None else statistics
        write_whole(folder / "dataset_statistics.json", json.dumps(statistics, indent=1))
        config = read_json(Path(source) / "config.json") | {"norm_stats": statistics} | shards.torch_dtype()
        write_whole(folder / "config.json", json.dumps(config, indent=1))


class Shards:
    """Weight files of a folder, of which one at a time is in memory. Until all are there they have hidden names."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self.tensors: dict[str, Tensor] = {}  # of the next shard
        self.size, self.total = 0, 0  # bytes of it, and of all
        self.names: list[list[str]] = []  # of the tensors in each shard that is written
        self.dtypes: set[torch.dtype] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        if self.tensors and self.size + tensor.nbytes > self.max_bytes:
            self.write()
        self.tensors[name] = tensor.detach().cpu()
        self.size += tensor.nbytes
        self.dtypes.add(tensor.dtype)

    def path(self, number: int) -> Path:
        return self.folder / f".model-{number:05d}.safetensors"

    def write(self) -> None:
        # the format needs tensors of their own, not views
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_tensors(tensors, self.path(len(self.names)), format="pt")
        self.names.append(list(self.tensors))
        self.total += self.size
        self.tensors, self.size = {}, 0

    def close(self) -> None:
        """Writes the rest and the index, and gives all files their names."""
        self.write()
        count = len(self.names)
        files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
        if count > 1:
            weight_map = {name: file for file, names in zip(files, self.names, strict=True) for name in names}
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            write_whole(self.folder / INDEX, json.dumps(index, indent=2))
        else:
            (self.folder / INDEX).unlink(missing_ok=True)  # of an older checkpoint: it would be read instead
        for number, file in enumerate(files):
            os.replace(self.path(number), self.folder / file)

    def torch_dtype(self) -> dict[str, str]:
        """config.json's entry of the precision in which others load the weights."""
        return {"torch_dtype": str(next(iter(self.dtypes))).removeprefix("torch.")} if len(self.dtypes) == 1 else {}
