"""LoRA on a network (Hu et al. 2021): put in, saved and loaded in peft's format, merged. The rest of the network stays frozen.

    W x + (alpha / rank) B A x

Not here: which layers there are (vla_rl.model.prismatic), what one computes (lora_linear), how the adapter is trained.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from vla_rl.model.lora_linear import add_adapters
from vla_rl.model.prismatic import Prismatic
from vla_rl.model.prismatic_config import read_config
from vla_rl.model.quantization import dense_parameters, packed_layer, sample_of
from vla_rl.run.checkpoint import ADAPTER_FILES, save_tensors
from vla_rl.run.files import all_tensors, open_tensors, read_json, write_whole
from vla_rl.run.settings import ConfigError, LoraConfig

log = logging.getLogger(__name__)

BASE_DIGEST = "base_digest"  # in the metadata of adapter_model.safetensors, which peft passes over
# of adapter_config.json, what says nothing about what the adapter computes, or what the tensors' names and shapes tell already
HARMLESS = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config"),
    *("megatron_core", "ensure_weight_tying", "qalora_group_size"),
}
# how the adapter's weights began; others than the plain ones change the base weights too
STARTS = {"init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
MAX_RANK, MAX_ALPHA = 65_536, 1e6  # far above any that was trained
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


class Adapter:
    """The LoRA weights of a network, float32; only they require gradients."""

    def __init__(self, network: Prismatic, lora: LoraConfig):
        self.network, self.lora = network, lora
        names = network.adaptable_linears(lora.target_modules == "language-model", lora.last_layers)
        config = peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, bias="none", target_modules=names
        )
        self.peft_model = add_adapters(network, config)
        network.eval()
        wrong = [n for n, p in network.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        assert not wrong, f"adapters are not float32: {wrong[:3]}"

    def parameters(self) -> list[torch.nn.Parameter]:
        """Always in the same order."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def switched_off(self) -> AbstractContextManager:
        return self.peft_model.disable_adapter()

    def tensors(self, values: list[Tensor] | None = None) -> dict[str, Tensor]:
        """peft's names -> the adapter's own tensors (not copies), or these values of parameters()."""
        names = [name for name, parameter in self.peft_model.named_parameters() if parameter.requires_grad]
        state = dict(zip(names, self.parameters() if values is None else values, strict=True))
        return peft.get_peft_model_state_dict(self.peft_model, state_dict=state, save_embedding_layers=False)

    def save(self, folder: Path, base_digest: str, values: list[Tensor] | None = None) -> None:
        """Writes adapter_config.json and adapter_model.safetensors; PeftModel.from_pretrained(network, folder) reads them.

        Args:
            base_digest: of the weights that it adapts; `load` compares it.
            values: of parameters(), in their order, to be written instead of the present ones.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors(values).items()}
        save_tensors(tensors, folder / "adapter_model.safetensors", format="pt", **{BASE_DIGEST: base_digest})
        self.peft_model.peft_config["default"].save_pretrained(folder)

    def load(self, folder: Path, base_digest: str) -> None:
        """Reads what `save` or peft wrote, if it means here what it meant there.

        Raises:
            ConfigError: there is no adapter, or it is of other settings, of another model or of another base.
        """
        folder = Path(folder)
        for name in ADAPTER_FILES:
            if not (folder / name).exists():
                other = ", only adapter_model.bin" if (folder / "adapter_model.bin").exists() else ""
                raise ConfigError(
                    f"no {name} in {folder}{other}; give a folder that save_adapter or a present peft wrote"
                )
        self.check_settings(folder)
        ours = self.tensors()
        with open_tensors(folder / "adapter_model.safetensors") as file:
            made_for = (file.metadata() or {}).get(BASE_DIGEST, base_digest)
            tensors = all_tensors(folder / "adapter_model.safetensors", file)
        wrong = {n for n in ours.keys() | tensors.keys() if n not in ours or n not in tensors}
        wrong |= {n for n in ours.keys() & tensors.keys() if ours[n].shape != tensors[n].shape}
        if wrong:
            raise ConfigError(
                f"the adapter in {folder} is of another model or other target modules: {len(wrong)} tensors do not fit, "
                f"such as {min(wrong)}"
            )
        if made_for != base_digest:
            raise ConfigError(
                f"the adapter in {folder} was trained on another base than this one, though of the same shapes (fingerprint "
                f"{made_for[:12]}, here {base_digest[:12]}); give the checkpoint and the policy.quantization that it was trained on"
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                ours[name].copy_(tensor)

    def check_settings(self, folder: Path) -> None:
        """Whatever of adapter_config.json changes what an adapter computes must be as here."""
        saved = read_json(folder / "adapter_config.json")
        rank, alpha = rank_and_alpha(folder, saved)
        if (rank, alpha) != (self.lora.rank, self.lora.alpha):
            raise ConfigError(
                f"the adapter in {folder} has rank {rank} and alpha {alpha}, the settings have "
                f"rank {self.lora.rank} and alpha {self.lora.alpha}; set policy.lora to the adapter's"
            )
        refuse_other_maths(folder, saved)

    @torch.no_grad()
    def merged_tensors(
        self, dtype: torch.dtype | None = None, change: WeightChange | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The network's own names and weights, the adapter added in float32.

        Args:
            dtype: of adapted weights; None: as the network's.
            change: notes how much of the adapter is left in them.
        """
        adapted = {name: module for name, module in self.network.named_modules() if isinstance(module, LoraLayer)}
        for name, parameter in dense_parameters(self.network):
            if ".lora_" in name:
                continue
            module = adapted.get(name.removesuffix(".base_layer.weight"))
            if module is not None:
                delta = module.get_delta_weight("default").float()
                rounded = (parameter.float() + delta).to(dtype or parameter.dtype)
                if change is not None:
                    change.add(parameter, delta, rounded)
                parameter = rounded
            yield name.replace(".base_layer.", "."), parameter


@dataclass
class WeightChange:
    """How much of an adapter's change D of the weights W is left in round(W + D), over all of its layers."""

    dtype: torch.dtype  # that is rounded to
    kept: float = 0.0  # <round(W + D) - round(W), D>
    total: float = 0.0  # <D, D>
    unchanged: int = 0  # weights with round(W + D) = round(W)
    weights: int = 0

    def add(self, weight: Tensor, delta: Tensor, rounded: Tensor) -> None:
        kept, total, unchanged = surviving_change(weight, delta, rounded)
        self.kept, self.total = self.kept + kept, self.total + total
        self.unchanged, self.weights = self.unchanged + unchanged, self.weights + delta.numel()

    @property
    def share(self) -> float:
        """1: all of it is there."""
        return self.kept / self.total if self.total else 1.0

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if not self.total:
            return f"saved in {name}; there is no adapter, or it changes nothing"
        return (
            f"saved in {name}: {self.share:.1%} of the adapter's change of the weights survives the rounding, "
            f"{self.unchanged / self.weights:.1%} of the adapted weights stay as they were"
        )


def surviving_change(weight: Tensor, delta: Tensor, rounded: Tensor) -> tuple[float, float, int]:
    """What of a change D of the weights W is left in round(W + D).

    Args:
        weight: W, any shape and precision.
        delta: D, of W's shape.
        rounded: round(W + D), in the precision that it is rounded to.

    Returns:
        <round(W + D) - round(W), D>, <D, D>, and the number of weights with round(W + D) = round(W).
    """
    before = weight.to(rounded.dtype)
    moved, delta = rounded.double() - before.double(), delta.double()
    return (moved * delta).sum().item(), (delta * delta).sum().item(), int((rounded == before).sum())


def refuse_other_maths(folder: Path, saved: Mapping[str, Any]) -> None:
    """Raises ConfigError where adapter_config.json says something that changes what an adapter computes."""
    ours = peft.LoraConfig(bias="none").to_dict()
    plain_start = saved.get("init_lora_weights") in PLAIN_STARTS
    passed_over = {"lora_alpha"} | HARMLESS | (STARTS if plain_start else set())
    # absent, null, false and empty all say: not used
    changed = [
        f"{name}={value!s:.80}".encode("unicode_escape").decode()
        for name, value in saved.items()
        if name not in passed_over and (value or ours.get(name)) and value != ours.get(name)
    ]
    if changed:
        raise ConfigError(
            f"the adapter in {folder} was made with {', '.join(changed[:5])}, by which it computes something else than "
            "alpha / rank B A x, all that is implemented; merge it into its base with peft and give that as the checkpoint"
        )


def mean_adapter(adapters: Sequence[Mapping[str, Tensor]], scalings: Sequence[float]) -> dict[str, Tensor]:
    """LoRA weights whose change of every layer is the mean of several adapters' changes.

        1/k sum_i s_i B_i A_i = s_1 [B_1 / k, s_2/s_1 B_2 / k, ...] [A_1; A_2; ...]

    The A's lie below each other and the B's side by side, so the rank is the sum of the ranks; the scaling is s_1.

    Args:
        adapters: k times peft's names -> A [r_i, in] and B [out, r_i]; equal names.
        scalings: s_i = alpha_i / r_i.
    """
    factors = [scaling / scalings[0] / len(adapters) for scaling in scalings]
    mean = {}
    for name in adapters[0]:
        parts = [adapter[name] for adapter in adapters]
        if ".lora_A." in name:
            mean[name] = torch.cat(parts)
        else:
            mean[name] = torch.cat([factor * part for factor, part in zip(factors, parts, strict=True)], dim=1)
    return mean


@dataclass(frozen=True)
class SavedAdapter:
    """What lies in a folder in peft's format."""

    folder: Path
    settings: dict[str, Any]  # adapter_config.json
    tensors: dict[str, Tensor]  # peft's names -> A [r, in] and B [out, r]
    base: str | None  # digest of the weights that it adapts; None where peft wrote it

    @property
    def rank(self) -> int:
        return self.settings["r"]

    @property
    def scaling(self) -> float:
        return self.settings["lora_alpha"] / self.rank

    def layers(self) -> dict[str, int]:
        """Names and the sizes that are not the rank."""
        return {name: tensor.shape[1 if ".lora_A." in name else 0] for name, tensor in self.tensors.items()}


def read_adapter(folder: Path) -> SavedAdapter:
    """Raises ConfigError where it is torn, or computes something else than alpha / rank B A x."""
    settings = read_json(folder / ADAPTER_FILES[0])
    refuse_other_maths(folder, settings)
    with open_tensors(folder / ADAPTER_FILES[1]) as file:
        tensors = all_tensors(folder / ADAPTER_FILES[1], file)
        base = (file.metadata() or {}).get(BASE_DIGEST)
    rank, _ = rank_and_alpha(folder, settings)
    ranks = {t.shape[0 if ".lora_A." in name else 1] if t.dim() == 2 else None for name, t in tensors.items()}
    if ranks != {rank}:
        raise ConfigError(
            f"the adapter in {folder} is torn: {ADAPTER_FILES[0]} has rank {rank}, its tensors have {ranks!s:.40}"
        )
    return SavedAdapter(folder, settings, tensors, base)


def rank_and_alpha(folder: Path, settings: Mapping[str, Any]) -> tuple[int, float]:
    """Of adapter_config.json; raises ConfigError where they are none."""
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    known = type(rank) is int and 1 <= rank <= MAX_RANK and type(alpha) in (int, float) and 0 < alpha <= MAX_ALPHA
    if not known:
        raise ConfigError(
            f"the adapter in {folder} is torn: expected r from 1 to {MAX_RANK} and lora_alpha up to {MAX_ALPHA:g} in "
            f"{ADAPTER_FILES[0]}, got {rank!r:.40} and {alpha!r:.40}"
        )
    return rank, alpha


def write_mean(folders: Sequence[Path], out: Path) -> int:
    """Writes `mean_adapter` of folders in peft's format to a new one; of one folder it is what that has. Returns the rank.

    Raises:
        ConfigError: one is torn or computes something else than LoRA, or they are of other layers or bases.
    """
    adapters = [read_adapter(folder) for folder in folders]
    first, bases = adapters[0], {adapter.base: adapter.folder for adapter in adapters if adapter.base is not None}
    for adapter in adapters:
        if adapter.layers() != first.layers():
            raise ConfigError(f"{first.folder} and {adapter.folder} adapt other layers, so their changes have no mean")
        if adapter.base is None and len(adapters) > 1:
            log.warning("%s does not tell its base; it is taken for that of the others", adapter.folder)
    if len(bases) > 1:
        one, other, *_ = bases.values()
        raise ConfigError(f"{one} and {other} were trained on different bases, so their changes have no mean")
    rank = sum(adapter.rank for adapter in adapters)
    mean = mean_adapter([adapter.tensors for adapter in adapters], [adapter.scaling for adapter in adapters])
    told = dict.fromkeys([BASE_DIGEST], next(iter(bases))) if bases else {}
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(mean, out / ADAPTER_FILES[1], format="pt", **told)
    write_whole(
        out / ADAPTER_FILES[0], json.dumps(first.settings | {"r": rank, "lora_alpha": first.scaling * rank}, indent=1)
    )
    return rank


def lora_of(folder: Path, model: Path) -> dict[str, Any]:
    """policy.lora of an adapter's folder: rank, alpha, and by its tensors' names the layers.

    Args:
        folder: in peft's format, see vla_rl.run.checkpoint.find_adapter.
        model: the checkpoint's folder that it is put on.

    Raises:
        ConfigError: it is torn.
    """
    config = read_json(folder / ADAPTER_FILES[0])
    with open_tensors(folder / ADAPTER_FILES[1]) as file:
        names = list(file.keys())
    rank, alpha = rank_and_alpha(folder, config)
    lora = {"rank": rank, "alpha": alpha, "target_modules": "all-linear"}
    if any("vision_backbone" in name for name in names):
        return lora | {"last_layers": None}
    layers = {int(m[1]) for name in names if (m := re.search(r"language_model\..*layers\.(\d+)\.", name))}
    count = read_config(model).llama.get("num_hidden_layers")
    return lora | {
        "target_modules": "language-model",
        "last_layers": None if len(layers) == count else len(layers) or None,
    }


def check_lora(folder: Path, model: Path, lora: LoraConfig) -> str:
    """Whether the adapter to begin with is of the settings' layers, told before the model loads.

    Raises:
        ConfigError: it is torn, or of other settings; the message has those to set.
    """
    theirs = lora_of(folder, model)
    other = [f"policy.lora.{n}={'null' if v is None else v}" for n, v in theirs.items() if v != getattr(lora, n)]
    if other:
        ours = ", ".join(f"{name}={getattr(lora, name)}" for name in theirs)
        raise ConfigError(
            f"policy.adapter={folder} was made with other policy.lora than the settings' {ours}; set {' '.join(other)}"
        )
    return f"{folder}, rank {lora.rank}, alpha {lora.alpha:g}"


def digest_base(network: Prismatic) -> str:
    """Of the frozen weights' names, shapes and up to 64 values of each, rounded to bfloat16: quick also at 7B.

    Of a 4-bit weight: the values before it was packed, and that it was, so that it is the same on every machine.
    """
    digest = hashlib.sha256()
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            layer = packed_layer(network, name)
            shape = list(parameter.shape) if layer is None else f"nf4 {[layer.out_features, layer.in_features]}"
            digest.update(f"{name.replace('.base_layer.', '.')} {shape}".encode())
            digest.update((sample_of(parameter) if layer is None else layer.sample).numpy().tobytes())
    return digest.hexdigest()
