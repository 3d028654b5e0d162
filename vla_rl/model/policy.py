"""OpenVLA as a policy: load it, add LoRA, make the prompt, act, score given actions.

Sampling and scoring are one distribution: softmax(logits / temperature) over the 256 action ids, in float32, with the
network in the same mode. Not here: the network itself (prismatic), the value head, losses.

N or B rows, K images, S image side, C steps in a chunk, A = 7C action tokens, D hidden size, L prompt tokens with BOS.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import huggingface_hub
import numpy as np
import peft
import tokenizers
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vla_rl.model.action_tokenizer import ActionTokenizer, normalize_proprio, to_environment, unnormalize
from vla_rl.model.image_transform import preprocess
from vla_rl.model.prismatic import (
    Prismatic,
    Prompt,
    find_proprio_file,
    load_network,
    read_config,
    save_checkpoint,
    weight_files,
)
from vla_rl.model.tiny_openvla import TRAINED, ensure_tiny_openvla
from vla_rl.run.checkpoint import save_tensors
from vla_rl.run.settings import ConfigError, LoraConfig
from vla_rl.types import (
    ACTION_DIM,
    PROPRIO_DIM,
    ActionEvaluation,
    NonFiniteError,
    Observation,
    PolicyInputs,
    PolicyOutput,
)

logger = logging.getLogger(__name__)

TINY = "tiny-openvla"  # the checkpoint in the repository, fine-tuned on libero_spatial
TINY_RANDOM = "tiny-openvla-random"  # what it was before: made on first use
# openvla@c8f03f4 experiments/robot/openvla_utils.py#get_vla_action
PROMPT = "In: What action should the robot take to {task}?\nOut:"
SPACE = "▁"  # token 29871 of Llama-2: the training prompts end in it, the tokenised text does not
DECODERS = {"autoregressive": 1, "parallel": 8}  # decoder -> actions a decision, as OpenVLA and OpenVLA-OFT train them
HUB_FILES = ["*.json", "*.safetensors", "*.py", "tokenizer.model", "proprio_projector--*", "*.txt"]


class OpenVLAPolicy:
    """The policy that OpenVLAPPO trains; implements vla_rl.types.Policy. Build it with `from_checkpoint`."""

    def __init__(
        self,
        network: Prismatic,
        folder: Path,
        decoder: str,
        num_images: int,
        lora: LoraConfig | None,
        chunk_size: int,
        center_crop: bool,
        unnorm_key: str | None,
        gradient_checkpointing: bool,
        statistics: dict | None = None,
    ):
        self.network = network
        self.folder = folder
        self.decoder = decoder
        self.num_images = num_images
        self.chunk_size = chunk_size
        self.num_tokens = ACTION_DIM * chunk_size  # A
        self.center_crop = center_crop
        self.gradient_checkpointing = gradient_checkpointing
        self.use_proprio = network.use_proprio
        self.hidden_size = network.config.llama.hidden_size
        self.image_size = network.config.image_size
        self.dtype = network.language_model.lm_head.weight.dtype
        self.device = network.language_model.lm_head.weight.device
        self.action_tokenizer = ActionTokenizer(network.config.vocab_size, network.config.num_action_ids)
        self.unnorm_key, self.statistics = (
            (unnorm_key, statistics) if statistics is not None else read_statistics(folder, unnorm_key)
        )
        if self.use_proprio and "proprio" not in self.statistics:
            raise ConfigError(
                f"the statistics of {self.unnorm_key} in {folder} have no 'proprio'; set use_proprio=false"
            )
        self.pixel_mean, self.pixel_std = read_pixel_statistics(folder, self.device)
        self.prompt_ids: dict[str, list[int]] = {}  # instruction -> tokens, BOS first

        network.check_no_dropout()
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.lora = lora
        self.adapted = None if lora is None else add_lora(network, lora)  # PeftModel around the same network

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        decoder: str = "autoregressive",
        num_images: int = 1,
        use_proprio: bool = False,
        lora: LoraConfig | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        chunk_size: int | None = None,
        center_crop: bool = True,
        unnorm_key: str | None = None,
        gradient_checkpointing: bool = False,
        statistics: dict | None = None,
    ) -> OpenVLAPolicy:
        """Loads a checkpoint.

        Args:
            path: a folder in the official layout, a Hugging Face id, "tiny-openvla" or "tiny-openvla-random".
            decoder: "autoregressive" (OpenVLA, C = 1) or "parallel" (OpenVLA-OFT).
            num_images: K, 1 or 2.
            use_proprio: feed the proprioception; the checkpoint must have a proprio projector.
            lora: adapters to add; None leaves nothing to train.
            dtype: of the frozen base; adapters are float32.
            chunk_size: C; None takes the decoder's usual one, 1 or 8.
            center_crop: crop 90 % of the image's area.
            unnorm_key: entry of the statistics, with or without `_no_noops`; None if there is only one.
            gradient_checkpointing: recompute activations in the backward pass.
            statistics: of new data, {"action": ..., "proprio": ...}, instead of an entry of the checkpoint's.

        Raises:
            ConfigError: the checkpoint is not there, not whole or not of OpenVLA, or does not go with the arguments.
        """
        if decoder not in DECODERS:
            raise ConfigError(f"decoder={decoder!r}; expected one of {', '.join(DECODERS)}")
        chunk_size = DECODERS[decoder] if chunk_size is None else chunk_size
        if chunk_size < 1 or (decoder == "autoregressive" and chunk_size != 1):
            raise ConfigError(
                f"chunk_size={chunk_size} with decoder={decoder}; autoregressive decodes 1, parallel 1 or more"
            )
        if num_images not in (1, 2):
            raise ConfigError(f"num_images={num_images}; expected 1 (agent view) or 2 (and wrist camera)")
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype}; expected torch.float32 or torch.bfloat16")
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "device=cuda, but torch sees no CUDA device; set device=cpu or install a CUDA build of torch"
            )
        folder = check_checkpoint(path, use_proprio)
        if statistics is None:
            read_statistics(folder, unnorm_key)  # before anything heavy loads
        if decoder == "parallel" and list(folder.glob("action_head--*")):
            logger.warning(
                "%s has an L1 action head (%s): its token head, which this policy samples from, was not trained and solves "
                "no task; start from a checkpoint with a trained token head, such as Haozhan72/Openvla-oft-SFT-libero-*",
                folder,
                next(folder.glob("action_head--*")).name,
            )
        network = load_network(folder, use_proprio, device, dtype)
        options = (chunk_size, center_crop, unnorm_key, gradient_checkpointing, statistics)
        return cls(network, folder, decoder, num_images, lora, *options)

    # ------------------------------------------------------------------ acting

    @torch.no_grad()
    def act(
        self,
        obs: Observation,
        *,
        temperature: float = 1.0,
        greedy: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> PolicyOutput:
        """One decision for each row.

        Args:
            temperature: of the sampling; the log-probabilities are of the same distribution.
            greedy: take the most likely token of the whole vocabulary, as the official evaluation does.
            generator: of the sampling, on any device; one a row makes what a row draws independent of the other rows;
                None takes torch's global one.
        """
        inputs = self.prepare(obs)
        tokens, logprobs, hidden = self.generate(
            *self.tensors(inputs), temperature=temperature, greedy=greedy, generator=generator
        )
        return PolicyOutput(tokens, logprobs, self.decode_actions(tokens), hidden, inputs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        proprio: Tensor | None = None,
        *,
        temperature: float = 1.0,
        greedy: bool = False,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`act` for preprocessed inputs (see forward_logits): tokens and log-probs [B, A] on the CPU, hidden [B, D]."""
        check_temperature(temperature)
        network = self.network
        prompt = self.embed(input_ids, attention_mask, pixel_values, proprio)

        def choose(hidden: Tensor) -> Tensor:  # [..., D] -> int64 [...]
            if greedy:
                return network.vocabulary_logits(hidden).argmax(dim=-1)
            probs = torch.softmax(network.action_logits(hidden) / temperature, dim=-1)
            check_finite(probs)
            return self.action_tokenizer.first_id + draw(probs, generator)

        if self.decoder == "parallel":
            hidden = network.forward_slots(prompt, self.num_tokens)  # [B, A, D]
            tokens = choose(hidden)
        else:
            tokens, hidden = network.decode(prompt, self.num_tokens, choose)
        all_logprobs = torch.log_softmax(network.action_logits(hidden) / temperature, dim=-1)  # [B, A, 256]
        check_finite(all_logprobs)
        index = tokens - self.action_tokenizer.first_id
        inside = (index >= 0) & (index < all_logprobs.shape[-1])
        logprobs = gather(all_logprobs, index.where(inside, 0)).where(inside, torch.nan)
        return tokens.cpu(), logprobs.cpu(), hidden[:, 0].float()

    def decode_actions(self, tokens: Tensor) -> np.ndarray:
        """Tokens int64 [N, A] -> actions float32 [N, C, 7] in environment units."""
        return to_environment(self.dataset_actions(tokens))

    def dataset_actions(self, tokens: Tensor) -> np.ndarray:
        """Tokens int64 [N, A] -> actions float64 [N, C, 7] in the data set's units: gripper 0 closes, 1 opens."""
        normalized = self.action_tokenizer.decode(tokens.numpy()).reshape(len(tokens), self.chunk_size, ACTION_DIM)
        return unnormalize(normalized, self.statistics["action"], oft=self.decoder == "parallel")

    # ------------------------------------------------------------------ scoring

    def evaluate_actions(self, inputs: PolicyInputs, action_tokens: Tensor, *, temperature: float) -> ActionEvaluation:
        """Log-probability and entropy of given tokens under the present weights, with gradients; one forward."""
        check_temperature(temperature)
        index = self.action_index(inputs, action_tokens)
        hidden = self.action_hidden(inputs, index + self.action_tokenizer.first_id)
        all_logprobs = torch.log_softmax(self.network.action_logits(hidden) / temperature, dim=-1)  # [B, A, 256]
        entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)  # [B, A]
        return ActionEvaluation(gather(all_logprobs, index), entropy, hidden[:, 0].float())

    def action_hidden(self, inputs: PolicyInputs, action_ids: Tensor) -> Tensor:
        """Hidden states [B, A, D] that predict the given action tokens int64 [B, A], with gradients; the first is of the
        last prompt token."""
        prompt_inputs = self.tensors(inputs)
        self.network.train(self.gradient_checkpointing)  # Llama's checkpointing needs it; there is no dropout
        try:
            return self.read_actions(self.embed(*prompt_inputs), action_ids)
        finally:
            self.network.eval()

    @torch.no_grad()
    def reference_logprobs(self, inputs: PolicyInputs, action_tokens: Tensor, *, temperature: float) -> Tensor:
        """Log-probabilities float32 [B, A] under the base model, that is with the adapters switched off."""
        with self.adapted.disable_adapter() if self.adapted is not None else nullcontext():
            return self.evaluate_actions(inputs, action_tokens, temperature=temperature).logprobs

    @torch.no_grad()
    def compute_hidden(self, inputs: PolicyInputs) -> Tensor:
        """Final hidden state of the last prompt token, float32 [N, D]; the same as act's for the same inputs."""
        return self.read_actions(self.embed(*self.tensors(inputs)), None)[:, 0].float()

    def forward_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        action_tokens: Tensor | None = None,
        proprio: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits over the 256 action ids and the last prompt token's hidden state, for preprocessed inputs.

        Args:
            input_ids: int64 [B, L], BOS first, the final 29871 in it, padded on either side.
            attention_mask: [B, L], 1 at tokens, 0 at padding.
            pixel_values: float [B, 6K, S, S]; per image DINO-normalised RGB, then SigLIP-normalised RGB.
            action_tokens: int64 [B, 7], autoregressive: token k is predicted from those before it. None gives the first
                token's logits only. The parallel decoder does not read them.
            proprio: float [B, 8], normalised to -1..1.

        Returns:
            float32 [B, A, 256] (A is 1 for the autoregressive decoder without action_tokens) and float32 [B, D].

        Raises:
            ValueError: a shape or dtype is wrong.
        """
        if action_tokens is not None and self.decoder == "autoregressive":
            check_tensor("action_tokens", action_tokens, (len(input_ids), self.num_tokens))
        hidden = self.read_actions(self.embed(input_ids, attention_mask, pixel_values, proprio), action_tokens)
        return self.network.action_logits(hidden), hidden[:, 0].float()

    def read_actions(self, prompt: Prompt, action_ids: Tensor | None) -> Tensor:
        """Hidden states that predict the action tokens: [B, A, D]; [B, 1, D] if autoregressive without ids."""
        if self.decoder == "parallel":
            return self.network.forward_slots(prompt, self.num_tokens)
        if action_ids is None:
            action_ids = torch.empty(len(prompt.embeddings), 1, dtype=torch.int64)
        return self.network.forward_tokens(prompt, action_ids[:, :-1].to(self.device))

    def action_index(self, inputs: PolicyInputs, action_tokens: Tensor) -> Tensor:
        """Tokens int64 [B, A] -> 0..255, on the model's device."""
        check_tensor("action_tokens", action_tokens, (len(inputs), self.num_tokens))
        index = action_tokens - self.action_tokenizer.first_id
        if ((index < 0) | (index >= self.action_tokenizer.n_bins)).any():
            first, end = self.action_tokenizer.first_id, self.action_tokenizer.vocab_size
            raise ValueError(f"action_tokens outside the action ids {first}..{end - 1}; greedy tokens cannot be scored")
        return index.to(self.device)

    # ------------------------------------------------------------------ inputs

    def prepare(self, obs: Observation) -> PolicyInputs:
        """What the buffer keeps of an observation: preprocessed images, raw proprio, instructions.

        Raises:
            ValueError: images are not uint8 [N, K, H, W, 3] or proprio is not [N, 8].
        """
        images, proprio = obs.images, obs.proprio
        if images.dtype != np.uint8 or images.ndim != 5 or images.shape[-1] != 3:
            raise ValueError(f"images: expected uint8 [N, K, H, W, 3], got {images.dtype} {list(images.shape)}")
        if images.shape[:2] != (len(obs), self.num_images):
            raise ValueError(
                f"images: expected {len(obs)} rows of {self.num_images} images, got {list(images.shape[:2])}; "
                "policy.num_images and the environment's cameras must agree"
            )
        if proprio.shape != (len(obs), PROPRIO_DIM):
            raise ValueError(f"proprio: expected [{len(obs)}, {PROPRIO_DIM}], got {list(proprio.shape)}")
        flat = images.reshape(-1, *images.shape[2:])
        flat = np.stack([preprocess(image, self.center_crop, self.image_size) for image in flat])  # JPEG: one at a time
        return PolicyInputs(
            torch.from_numpy(flat.reshape(*images.shape[:2], self.image_size, self.image_size, 3)),
            torch.from_numpy(np.array(proprio, dtype=np.float32)),
            tuple(obs.instructions),
        )

    def tensors(self, inputs: PolicyInputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """input_ids, attention_mask [B, L] (left-padded), pixel_values [B, 6K, S, S], normalised proprio [B, 8]."""
        expected = (len(inputs), self.num_images, self.image_size, self.image_size, 3)
        if inputs.images.dtype != torch.uint8 or inputs.images.shape != expected:
            got = f"{inputs.images.dtype} {list(inputs.images.shape)}"
            raise ValueError(f"inputs.images: expected uint8 {list(expected)} as prepare() gives, got {got}")
        proprio = None
        if self.use_proprio:
            proprio = torch.from_numpy(normalize_proprio(inputs.proprio.numpy(), self.statistics["proprio"]))
        return *self.tokenize(inputs.instructions), self.pixel_values(inputs.images), proprio

    def pixel_values(self, images: Tensor) -> Tensor:
        """uint8 [B, K, S, S, 3] -> [B, 6K, S, S] in the model's precision, on its device."""
        images = images.to(self.device).permute(0, 1, 4, 2, 3).float() / 255  # [B, K, 3, S, S]
        # [B, K, 2, 3, S, S]: DINO's normalisation, then SigLIP's
        normalized = (images[:, :, None] - self.pixel_mean) / self.pixel_std
        return normalized.flatten(1, 3).to(self.dtype)

    def tokenize(self, instructions: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask, int64 [B, L], padded on the left to the longest prompt."""
        for text in instructions:
            if text not in self.prompt_ids:
                self.prompt_ids[text] = self.encode_prompt(text)
        rows = [self.prompt_ids[text] for text in instructions]
        length = max(map(len, rows))
        pad = self.network.config.llama.pad_token_id
        input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return input_ids, attention_mask

    def encode_prompt(self, instruction: str) -> list[int]:
        """BOS, the prompt's tokens, the final space."""
        ids = self.tokenizer.encode(prompt_text(instruction), add_special_tokens=False).ids
        ids = append_space([self.network.config.llama.bos_token_id, *ids], self.tokenizer.token_to_id(SPACE))
        room = self.network.config.llama.max_position_embeddings - self.num_tokens - 1
        room -= self.num_images * self.network.vision_backbone.num_patches + int(self.use_proprio)
        if len(ids) > room:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the model has room for {room}: {instruction[:60]!r}..."
            )
        return ids

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"no tokenizer.json in {self.folder}, which a prompt needs; copy it from openvla/openvla-7b"
            )
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.no_truncation()  # the file keeps both settings of the last call before it was saved
        tokenizer.no_padding()
        if tokenizer.token_to_id(SPACE) is None:
            raise ConfigError(f"{path} has no token {SPACE!r}, which ends the prompt; it is not a Llama tokenizer")
        return tokenizer

    def embed(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, proprio: Tensor | None) -> Prompt:
        batch = len(input_ids)
        check_tensor("input_ids", input_ids, (batch, input_ids.shape[-1]))
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: expected {list(input_ids.shape)} as input_ids, got {list(attention_mask.shape)}"
            )
        expected = (batch, 6 * self.num_images, self.image_size, self.image_size)
        if pixel_values.shape != expected or not pixel_values.is_floating_point():
            got = f"{pixel_values.dtype} {list(pixel_values.shape)}"
            raise ValueError(f"pixel_values: expected float {list(expected)} (6 channels an image), got {got}")
        if (proprio is not None) != self.use_proprio:
            raise ValueError(
                f"proprio is {'given' if proprio is not None else 'missing'}, but use_proprio={self.use_proprio}"
            )
        if proprio is not None:
            if proprio.shape != (batch, PROPRIO_DIM):
                raise ValueError(f"proprio: expected [{batch}, {PROPRIO_DIM}], got {list(proprio.shape)}")
            proprio = proprio.to(self.device, self.dtype)
        return self.network.embed_prompt(
            input_ids.to(self.device), attention_mask.to(self.device), pixel_values.to(self.device, self.dtype), proprio
        )

    # ------------------------------------------------------------------ weights

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights, float32, always in the same order; empty without LoRA."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def save_adapter(self, folder: Path, values: list[Tensor] | None = None) -> None:
        """Writes adapter_config.json and adapter_model.safetensors; PeftModel.from_pretrained(network, folder) reads them.

        Args:
            values: of trainable_parameters(), in their order, to be written instead of the present ones.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.adapter_tensors(values).items()}
        save_tensors(tensors, folder / "adapter_model.safetensors", format="pt")
        self.adapted.peft_config["default"].save_pretrained(folder)

    def load_adapter(self, folder: Path) -> None:
        """Reads what save_adapter wrote for the same LoRA settings.

        Raises:
            ConfigError: there is no adapter, or it is of other settings or another model.
        """
        folder = Path(folder)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / name).is_file():
                raise ConfigError(f"no {name} in {folder}; give a folder that save_adapter or peft wrote")
        ours = self.adapter_tensors()
        saved = json.loads((folder / "adapter_config.json").read_text())
        if (saved.get("r"), saved.get("lora_alpha")) != (self.lora.rank, self.lora.alpha):
            raise ConfigError(
                f"the adapter in {folder} has rank {saved.get('r')} and alpha {saved.get('lora_alpha')}, the settings have "
                f"rank {self.lora.rank} and alpha {self.lora.alpha}; set policy.lora to the adapter's"
            )
        tensors = load_file(folder / "adapter_model.safetensors")
        wrong = {n for n in ours.keys() | tensors.keys() if n not in ours or n not in tensors}
        wrong |= {n for n in ours.keys() & tensors.keys() if ours[n].shape != tensors[n].shape}
        if wrong:
            raise ConfigError(
                f"the adapter in {folder} is of another model or other target modules: {len(wrong)} tensors do not fit, "
                f"such as {min(wrong)}"
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                ours[name].copy_(tensor)

    def adapter_tensors(self, values: list[Tensor] | None = None) -> dict[str, Tensor]:
        """peft's names -> the adapters' own tensors (not copies), or these values of trainable_parameters()."""
        if self.adapted is None:
            raise ConfigError("this policy has no adapter; give lora=LoraConfig(...) to from_checkpoint")
        names = [name for name, parameter in self.adapted.named_parameters() if parameter.requires_grad]
        state = dict(zip(names, self.trainable_parameters() if values is None else values, strict=True))
        return peft.get_peft_model_state_dict(self.adapted, state_dict=state, save_embedding_layers=False)

    def save_merged(self, folder: Path) -> None:
        """Writes a checkpoint in the official layout with the adapters merged into the weights."""
        save_checkpoint(folder, self.merged_tensors(), source=self.folder, proprio_file=self.network.proprio_file)

    @torch.no_grad()
    def merged_tensors(self) -> Iterator[tuple[str, Tensor]]:
        adapted = {name: module for name, module in self.network.named_modules() if isinstance(module, LoraLayer)}
        for name, parameter in self.network.named_parameters():
            if ".lora_" in name:
                continue
            module = adapted.get(name.removesuffix(".base_layer.weight"))
            if module is not None:
                parameter = (parameter.float() + module.get_delta_weight("default").float()).to(parameter.dtype)
            yield name.replace(".base_layer.", "."), parameter

    @cached_property
    def base_digest(self) -> str:
        """Of the base's names, shapes and up to 64 values of each tensor, rounded to bfloat16: quick also at 7B."""
        digest = hashlib.sha256()
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                values = parameter.detach().flatten()
                values = values[:: max(1, len(values) // 64)][:64].to(torch.bfloat16).float().cpu()
                digest.update(f"{name.replace('.base_layer.', '.')} {list(parameter.shape)}".encode())
                digest.update(values.numpy().tobytes())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Hex digits, equal for equal base models, inputs, decoders and adapter shapes; the adapters' values do not count."""
        parts = [self.base_digest, self.decoder, self.num_tokens, self.num_images, self.use_proprio]
        if self.adapted is not None:
            parts += [self.lora.alpha, *((name, list(t.shape)) for name, t in self.adapter_tensors().items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


# ---------------------------------------------------------------------- helpers


def prompt_text(instruction: str) -> str:
    """The text that OpenVLA was trained on, the instruction in lower case."""
    return PROMPT.format(task=instruction.lower())


def append_space(ids: list[int], space_id: int) -> list[int]:
    """ids with the space token at the end, once (openvla modeling_prismatic.py#predict_action)."""
    return ids if ids[-1] == space_id else [*ids, space_id]


def draw(probs: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """An index [B, ...] of each distribution [B, ..., 256]; see OpenVLAPolicy.act for the generator."""
    if generator is None or isinstance(generator, torch.Generator):
        at = probs.device if generator is None else generator.device
        drawn = torch.multinomial(probs.flatten(0, -2).to(at), 1, generator=generator)
        return drawn.to(probs.device).view(probs.shape[:-1])
    rows = probs.to(generator[0].device)
    return torch.stack([draw(row[None], g)[0] for row, g in zip(rows, generator, strict=True)]).to(probs.device)


def gather(logprobs: Tensor, index: Tensor) -> Tensor:
    """logprobs [B, A, 256] at index [B, A] -> [B, A]."""
    return logprobs.gather(-1, index[..., None]).squeeze(-1)


def check_finite(distribution: Tensor) -> None:
    if not torch.isfinite(distribution).all():
        raise NonFiniteError(
            "the policy's action distribution is not finite: its weights or inputs have a NaN or infinity"
        )


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; expected above 0 (for the most likely token use greedy=True)")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.int64 or tensor.shape != shape:
        raise ValueError(f"{name}: expected int64 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def add_lora(network: Prismatic, lora: LoraConfig) -> peft.PeftModel:
    """Puts adapters into the network, in place; only they require gradients."""
    names = network.adaptable_linears(lora.target_modules == "language-model", lora.last_layers)
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, bias="none", target_modules=names)
    adapted = peft.get_peft_model(network, config)  # casts the adapters to float32 (autocast_adapter_dtype)
    network.eval()
    wrong = [n for n, p in network.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    assert not wrong, f"adapters are not float32: {wrong[:3]}"
    return adapted


def check_checkpoint(path: str | Path, use_proprio: bool = False) -> Path:
    """The folder of a checkpoint, after checking that what the policy needs is in it; loads no weights.

    Args:
        path: a folder, a Hugging Face id (downloaded if it is not in the cache), "tiny-openvla", or "tiny-openvla-random"
            (made if needed).

    Raises:
        ConfigError: says where it looked and how to get the checkpoint, or what is missing in it.
    """
    folder = find_checkpoint_folder(str(path))
    read_config(folder)
    weight_files(folder)
    if not (folder / "preprocessor_config.json").is_file():
        raise ConfigError(f"no preprocessor_config.json in {folder}, which has the images' means and deviations")
    if list(folder.glob("vision_backbone--*")):
        raise ConfigError(f"{folder} has a FiLM vision backbone (vision_backbone--*), which is not implemented")
    load_statistics(folder)
    if use_proprio and find_proprio_file(folder) is None and not has_proprio_weights(folder):
        raise ConfigError(f"use_proprio=true, but {folder} has no proprio projector; set use_proprio=false")
    return folder


def find_checkpoint_folder(path: str) -> Path:
    if path == TINY:
        return TRAINED
    if path == TINY_RANDOM:
        return ensure_tiny_openvla()
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise ConfigError(
            f"no checkpoint folder {path}; give a folder, a Hugging Face id such as openvla/openvla-7b, or {TINY}"
        )
    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors; each means: not to be had
        cache = huggingface_hub.constants.HF_HUB_CACHE
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"no checkpoint {path}: not a local folder, not in the Hugging Face cache ({cache}), and the download failed "
            f"({type(error).__name__}: {reason}); on a machine with network run `hf download {path}`, or give a local folder"
        ) from error


def has_proprio_weights(folder: Path) -> bool:
    """Whether the main state dict has a proprio projector, as SimpleVLA-RL's checkpoints have."""
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            if any(name.startswith("proprio_projector.") for name in file.keys()):  # noqa: SIM118
                return True
    return False


def load_statistics(folder: Path) -> dict[str, dict]:
    """dataset_statistics.json, which fine-tuning writes, else norm_stats of config.json (the pre-training data)."""
    path = folder / "dataset_statistics.json"
    statistics = json.loads(path.read_text()) if path.is_file() else read_config(folder).raw.get("norm_stats")
    if not statistics:
        raise ConfigError(
            f"no action statistics in {folder}: expected dataset_statistics.json or norm_stats in config.json"
        )
    return statistics


def read_statistics(folder: Path, unnorm_key: str | None) -> tuple[str, dict]:
    """The key found and its entry, {"action": {...}, "proprio": {...}}."""
    statistics = load_statistics(folder)
    if unnorm_key is None and len(statistics) == 1:
        unnorm_key = next(iter(statistics))
    for key in (unnorm_key, f"{unnorm_key}_no_noops", str(unnorm_key).removesuffix("_no_noops")):
        if key in statistics:
            return key, statistics[key]
    raise ConfigError(
        f"unnorm_key={unnorm_key}: the statistics of {folder} have {', '.join(sorted(statistics))}; "
        "give a checkpoint that was fine-tuned on this task suite, or set policy.unnorm_key to one of these"
    )


def read_pixel_statistics(folder: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """Means and deviations of DINO's and SigLIP's normalisation, float32 [1, 1, 2, 3, 1, 1]."""
    config = json.loads((folder / "preprocessor_config.json").read_text())
    means, stds = (torch.tensor(config[key], dtype=torch.float32, device=device) for key in ("means", "stds"))
    if means.shape != (2, 3) or stds.shape != (2, 3):
        raise ConfigError(f"{folder}/preprocessor_config.json: expected means and stds of 2 backbones with 3 channels")
    return means.view(1, 1, 2, 3, 1, 1), stds.view(1, 1, 2, 3, 1, 1)
