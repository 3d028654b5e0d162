"""OpenVLA as a policy: act, score given actions.

Sampling and scoring are one distribution: softmax(logits / temperature) over the 256 action ids, in float32, with the
network in the same mode. Not here: the network itself (prismatic), what it reads (processor), how it runs (execution), LoRA
(adapter), files (checkpoint_folder), the value head, losses.

N or B rows, K images, S image side, C steps in a chunk, A = 7C action tokens, D hidden size, L prompt tokens with BOS.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vla_rl.model.action_head import ONE_ACTION, ActionHead, keep_action_head, l1_output, load_action_head
from vla_rl.model.action_tokenizer import ActionTokenizer, to_environment, unnormalize
from vla_rl.model.adapter import Adapter, WeightChange, digest_base
from vla_rl.model.checkpoint_folder import check_statistics, read_statistics, save_checkpoint
from vla_rl.model.execution import Blocks, CudaGraphs, fill_rows, row_size
from vla_rl.model.find_checkpoint import TINY_RANDOM, check_use, find_and_check
from vla_rl.model.prismatic import Prismatic, Prompt, arrange_prompt, load_network
from vla_rl.model.processor import Processor
from vla_rl.model.quantization import check_quantization, dense_parameters
from vla_rl.model.sampling import check_finite, check_sampling, check_tensor, draw_noise, gather, pick, tempered
from vla_rl.model.trained_as import warn_of_other_use
from vla_rl.run.section import Mode
from vla_rl.run.settings import ConfigError, LoraConfig
from vla_rl.types import (
    ACTION_DIM,
    PROPRIO_DIM,
    ActionEvaluation,
    Observation,
    PolicyInputs,
    PolicyOutput,
    to_device,
)

logger = logging.getLogger(__name__)


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
        gradient_checkpointing: str = "none",
        statistics: dict | None = None,
        compiled: bool = False,
        action_head: ActionHead | None = None,
    ):
        self.network = network
        self.action_head = action_head
        self.head = "tokens" if action_head is None else "l1"  # what act() acts through
        self.folder = folder
        self.decoder = decoder
        self.num_images = num_images
        self.chunk_size = chunk_size
        self.num_tokens = ACTION_DIM * chunk_size  # A
        self.center_crop = center_crop
        self.use_proprio = network.use_proprio
        self.hidden_size = network.llama.hidden_size
        self.image_size = network.config.image_size
        self.dtype = network.language_model.lm_head.weight.dtype
        self.device = network.language_model.lm_head.weight.device
        self.action_tokenizer = ActionTokenizer(network.config.vocab_size, network.config.num_action_ids)
        self.new_statistics = statistics is not None
        self.unnorm_key, self.statistics = (
            (unnorm_key, statistics)
            if statistics is not None
            else read_statistics(folder, unnorm_key, network.use_proprio)
        )
        llama = network.llama
        room = llama.max_position_embeddings - self.num_tokens - 1
        room -= num_images * network.vision_backbone.num_patches + int(network.use_proprio)
        self.processor = Processor(
            folder,
            num_images,
            self.image_size,
            center_crop,
            (llama.bos_token_id, llama.pad_token_id),
            room,
            self.statistics["proprio"] if network.use_proprio else None,
            self.device,
            self.dtype,
            fixed_lengths=compiled,
        )

        network.check_no_dropout()
        self.lora = lora
        self.adapter = None if lora is None else Adapter(network, lora)
        network.eval()
        self.before_forward: Callable[[], None] = lambda: (
            None
        )  # what several processes do together (vla_rl.learning.sharding)
        self.compiled = compiled
        self.execution = Blocks(network.blocks(), compiled)
        self.set_gradient_checkpointing(gradient_checkpointing)
        if compiled and self.device.type == "cuda":
            pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
            self.decide = CudaGraphs(self.decide, pool, stream)
            self.read_hidden = CudaGraphs(self.read_hidden, pool, stream)
            self.regress = CudaGraphs(self.regress, pool, stream)

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
        gradient_checkpointing: str = "none",
        statistics: dict | None = None,
        compiled: bool = False,
        quantization: str = "none",
        head: str = "tokens",
    ) -> OpenVLAPolicy:
        """Loads a checkpoint.

        Args:
            path: a folder in the official layout, a Hugging Face id, "tiny-openvla", "tiny-openvla-ppo" or "tiny-openvla-random".
            decoder: "autoregressive" (OpenVLA, C = 1) or "parallel" (OpenVLA-OFT).
            num_images: K, 1 or 2.
            use_proprio: feed the proprioception; the checkpoint must have a proprio projector.
            lora: adapters to add; None leaves nothing to train.
            dtype: of the frozen base; adapters are float32.
            chunk_size: C; None takes the decoder's usual one, 1 or 8.
            center_crop: crop 90 % of the image's area.
            unnorm_key: entry of the statistics, with or without `_no_noops`; None if there is only one.
            gradient_checkpointing: what is recomputed in the backward pass; none, selective (all but products and
                attention) or full. See set_gradient_checkpointing.
            statistics: of new data, {"action": ..., "proprio": ...}, instead of an entry of the checkpoint's; unnorm_key is
                their name.
            compiled: torch.compile the transformer blocks, and on CUDA replay forwards without gradients as CUDA graphs.
            quantization: "none", or "nf4": the language model's frozen linear layers in 4 bit, computed in dtype.
            head: "tokens", or "l1": act greedily through the checkpoint's L1 action head, in dtype (OpenVLA-OFT).

        Raises:
            ConfigError: the checkpoint is not there, not whole or not of OpenVLA, or does not go with the arguments.
        """
        chunk_size = check_use(decoder, head, chunk_size, num_images, device, dtype, compiled)
        check_quantization(quantization, device)
        folder, names = find_and_check(path, use_proprio)
        if statistics is None:
            read_statistics(folder, unnorm_key, use_proprio)  # before anything heavy loads
        else:
            check_statistics(statistics, f"the statistics given for {unnorm_key}", use_proprio)
        settings = {"policy.decoder": decoder, "policy.num_images": num_images, "policy.use_proprio": use_proprio}
        settings |= {"policy.chunk_size": chunk_size, "policy.center_crop": center_crop, "policy.head": head}
        if path != TINY_RANDOM:  # which was not trained
            warn_of_other_use(str(path), folder, names, settings)
        action_head = load_action_head(folder, device, dtype) if head == "l1" else None
        network = load_network(folder, use_proprio, device, dtype, quantization)
        options = (chunk_size, center_crop, unnorm_key, gradient_checkpointing, statistics, compiled, action_head)
        return cls(network, folder, decoder, num_images, lora, *options)

    # ------------------------------------------------------------------ acting

    @torch.no_grad()
    def act(
        self,
        obs: Observation,
        *,
        mode: Mode = "sampled",
        temperature: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> PolicyOutput:
        """One decision for each row.

        Args:
            mode: sampled, or the same each time: greedy takes the most likely token of the whole vocabulary, as the official
                evaluation does, mean_action the bin nearest to the distribution's mean. An L1 head (self.head) acts greedily
                only; its tokens are the bins of its actions, its log-probabilities NaN.
            temperature: of the distribution that is sampled or averaged; the log-probabilities are of the same.
            generator: of the sampling, on any device; one a row makes what a row draws independent of the other rows;
                None takes torch's global one.
        """
        self.before_forward()
        inputs = self.prepare(obs)
        if self.head == "l1":
            if mode != "greedy":
                raise ConfigError(ONE_ACTION)
            outputs = self.regress(*self.fill_rows(self.arrange(*self.tensors(inputs))))
            normalized, hidden = (output[: len(inputs)] for output in outputs)
            return l1_output(normalized, hidden, inputs, self.action_tokenizer, self.statistics["action"])
        tokens, logprobs, hidden = self.generate(
            *self.tensors(inputs), mode=mode, temperature=temperature, generator=generator
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
        mode: Mode = "sampled",
        temperature: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`act` for preprocessed inputs (see forward_logits): tokens and log-probs [B, A] on the CPU, hidden [B, D]."""
        check_sampling(temperature, mode)
        rows = len(input_ids)
        noise = None
        if mode == "sampled":
            shape = (self.num_tokens, self.action_tokenizer.n_bins)
            noise = draw_noise(shape, generator, rows).to(self.device, non_blocking=True)
        inputs = self.arrange(input_ids, attention_mask, pixel_values, proprio)
        temperatures = torch.full((rows,), temperature, device=self.device)  # no constant of a CUDA graph
        outputs = self.decide(mode, *self.fill_rows([*inputs, noise, temperatures]))
        tokens, logprobs, hidden, finite = (output[:rows] for output in outputs)
        check_finite(finite.cpu())
        return tokens.cpu(), logprobs.cpu(), hidden

    def decide(
        self,
        mode: Mode,
        ids: Tensor,
        valid: Tensor | None,
        pixel_values: Tensor,
        proprio: Tensor | None,
        noise: Tensor | None,
        temperatures: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of what `arrange` gives: tokens and log-probs [B, A], hidden [B, D], whether a row's distributions are finite [B].

        Everything is on the device and nothing waits for it, so it can be a CUDA graph.

        Args:
            noise: [B, A, 256] of draw_noise; None unless it is sampled.
            temperatures: float32 [B].
        """
        network, first_id = self.network, self.action_tokenizer.first_id

        def choose(noise: Tensor | None, hidden: Tensor) -> Tensor:  # [..., 256], [..., D] -> int64 [...]
            if mode == "greedy":
                return network.vocabulary_logits(hidden).argmax(dim=-1)
            probs = tempered(network.action_logits(hidden), temperatures).softmax(dim=-1)
            return first_id + pick(probs, noise)

        prompt = network.embed(ids, valid, pixel_values, proprio)
        if self.decoder == "parallel":
            hidden = network.forward_slots(prompt, self.num_tokens)  # [B, A, D]
            tokens = choose(noise, hidden)
        else:
            tokens, hidden = network.decode(
                prompt, self.num_tokens, lambda k, hidden: choose(None if noise is None else noise[:, k], hidden)
            )
        all_logprobs = tempered(network.action_logits(hidden), temperatures).log_softmax(dim=-1)  # [B, A, 256]
        index = tokens - first_id
        inside = (index >= 0) & (index < all_logprobs.shape[-1])
        logprobs = gather(all_logprobs, index.where(inside, 0)).where(inside, torch.nan)
        return tokens, logprobs, hidden[:, 0].float(), torch.isfinite(all_logprobs).all(dim=(1, 2))

    def regress(
        self, ids: Tensor, valid: Tensor | None, pixel_values: Tensor, proprio: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of what `arrange` gives: the L1 head's normalised actions float32 [B, C, 7], hidden [B, D]; all on the device."""
        hidden = self.network.forward_slots(self.network.embed(ids, valid, pixel_values, proprio), self.num_tokens)
        return self.action_head(hidden).float(), hidden[:, 0].float()

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
        if self.head == "l1":
            raise ConfigError(ONE_ACTION)
        check_sampling(temperature)
        index = self.action_index(inputs, action_tokens)
        hidden = self.action_hidden(inputs, index + self.action_tokenizer.first_id)
        temperatures = torch.full((1,), temperature, device=self.device)
        all_logprobs = tempered(self.network.action_logits(hidden), temperatures).log_softmax(dim=-1)  # [B, A, 256]
        entropy = -(all_logprobs.exp() * all_logprobs).sum(dim=-1)  # [B, A]
        return ActionEvaluation(gather(all_logprobs, index), entropy, hidden[:, 0].float())

    def action_hidden(self, inputs: PolicyInputs, action_ids: Tensor) -> Tensor:
        """Hidden states [B, A, D] that predict the given action tokens int64 [B, A], with gradients; the first is of the
        last prompt token."""
        *prompt, action_ids = self.fill_rows([*self.arrange(*self.tensors(inputs)), action_ids])
        return self.read_actions(self.network.embed(*prompt), action_ids)[: len(inputs)]

    @torch.no_grad()
    def logprobs(self, inputs: PolicyInputs, action_tokens: Tensor, *, temperature: float) -> Tensor:
        """Log-probabilities float32 [B, A] of given tokens under the present weights, without gradients."""
        return self.evaluate_actions(inputs, action_tokens, temperature=temperature).logprobs

    @torch.no_grad()
    def reference_logprobs(self, inputs: PolicyInputs, action_tokens: Tensor, *, temperature: float) -> Tensor:
        """Log-probabilities float32 [B, A] under the base model, that is with the adapters switched off."""
        with self.adapter.switched_off() if self.adapter is not None else nullcontext():
            return self.logprobs(inputs, action_tokens, temperature=temperature)

    @torch.no_grad()
    def compute_hidden(self, inputs: PolicyInputs) -> Tensor:
        """Final hidden state of the last prompt token, float32 [N, D]; the same as act's for the same inputs."""
        self.before_forward()
        prompt = self.fill_rows(self.arrange(*self.tensors(inputs)))
        return self.read_hidden(*prompt)[0][: len(inputs)]

    def read_hidden(
        self, ids: Tensor, valid: Tensor | None, pixel_values: Tensor, proprio: Tensor | None
    ) -> tuple[Tensor]:
        """`compute_hidden` of what `arrange` gives."""
        return (self.read_actions(self.network.embed(ids, valid, pixel_values, proprio), None)[:, 0].float(),)

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

    def forward_l1(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, proprio: Tensor | None = None
    ) -> Tensor:
        """Normalised actions float32 [B, C, 7] of the L1 head, not clipped, for preprocessed inputs as of forward_logits."""
        if self.action_head is None:
            raise ConfigError("this policy has no L1 head; give head='l1' to from_checkpoint")
        return self.regress(*self.arrange(input_ids, attention_mask, pixel_values, proprio))[0]

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
        return to_device(index, self.device)

    # ------------------------------------------------------------------ inputs

    def prepare(self, obs: Observation) -> PolicyInputs:
        return self.processor.prepare(obs)

    def tensors(self, inputs: PolicyInputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.processor.tensors(inputs)

    def embed(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, proprio: Tensor | None) -> Prompt:
        return self.network.embed(*self.arrange(input_ids, attention_mask, pixel_values, proprio))

    def arrange(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, proprio: Tensor | None
    ) -> list[Tensor | None]:
        """Checked inputs of forward_logits, on the device, as Prismatic.embed takes them: ids, valid, pixels, proprio."""
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
        ids, valid = arrange_prompt(input_ids, attention_mask)
        valid = None if valid is None else to_device(valid, self.device)
        return [to_device(ids, self.device), valid, pixel_values.to(self.device, self.dtype), proprio]

    def fill_rows(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        """Few shapes for what is compiled; as they are for what is not."""
        return fill_rows(tensors, row_size(len(tensors[0]))) if self.compiled else tensors

    # ------------------------------------------------------------------ how it runs

    @property
    def gradient_checkpointing(self) -> str:
        return self.execution.mode

    def set_gradient_checkpointing(self, mode: str) -> None:
        """none, selective or full: less and less memory, slower and slower; the gradients are the same."""
        self.execution.set_gradient_checkpointing(mode)

    # ------------------------------------------------------------------ weights

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The adapters' weights, float32, always in the same order; empty without LoRA."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def save_adapter(self, folder: Path, values: list[Tensor] | None = None) -> None:
        """Writes the adapter in peft's format; see vla_rl.model.adapter.Adapter.save."""
        self.require_adapter().save(folder, self.base_digest, values)

    def load_adapter(self, folder: Path) -> None:
        """Reads an adapter of the same LoRA settings and base.

        Raises:
            ConfigError: there is no adapter, or it is of other settings or another model.
        """
        self.require_adapter().load(folder, self.base_digest)

    def require_adapter(self) -> Adapter:
        if self.adapter is None:
            raise ConfigError("this policy has no adapter; give lora=LoraConfig(...) to from_checkpoint")
        return self.adapter

    def adapter_tensors(self) -> dict[str, Tensor]:
        """peft's names -> the adapter's own tensors (not copies)."""
        return self.require_adapter().tensors()

    def merged_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The network's names and weights, with the adapter merged into them if there is one."""
        return dense_parameters(self.network) if self.adapter is None else self.adapter.merged_tensors()

    def save_merged(self, folder: Path, dtype: torch.dtype = torch.float32) -> WeightChange:
        """Writes a checkpoint in the official layout with the adapters merged into the weights, 4-bit ones unpacked.

        Args:
            dtype: of all weights. bfloat16 takes half of the disk and rounds small changes away; the log says how much is left.
        """
        new, change = {self.unnorm_key: self.statistics} if self.new_statistics else None, WeightChange(dtype)
        merged = self.merged_tensors() if self.adapter is None else self.adapter.merged_tensors(dtype, change)
        tensors = ((name, tensor.to(dtype)) for name, tensor in merged)
        save_checkpoint(folder, tensors, self.folder, self.network.proprio_file, statistics=new)
        keep_action_head(self.folder, folder, fits=self.head == "l1" or self.adapter is None)
        logger.info("%s", change)
        return change

    @cached_property
    def base_digest(self) -> str:
        return digest_base(self.network)

    def fingerprint(self) -> str:
        """Hex digits, equal for equal base models, inputs, decoders and adapter shapes; the adapters' values do not count."""
        parts = [self.base_digest, self.decoder, self.num_tokens, self.num_images, self.use_proprio]
        parts += [] if self.action_head is None else [self.action_head.digest()]
        if self.adapter is not None:
            parts += [self.lora.alpha, *((name, list(t.shape)) for name, t in self.adapter_tensors().items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
