"""From what the environments show to what the network reads: images, prompt, proprioception. Nothing of weights.

N or B rows, K images, S image side, L prompt tokens with BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor

from vla_rl.model.action_tokenizer import normalize_proprio
from vla_rl.model.checkpoint_folder import SPACE, read_pixel_statistics, read_tokenizer
from vla_rl.model.image_transform import OpenVLAImageTransform
from vla_rl.types import PROPRIO_DIM, Observation, PolicyInputs, to_device

# openvla@c8f03f4 experiments/robot/openvla_utils.py#get_vla_action
PROMPT = "In: What action should the robot take to {task}?\nOut:"


def prompt_text(instruction: str) -> str:
    """The text that OpenVLA was trained on, the instruction in lower case."""
    return PROMPT.format(task=instruction.lower())


def append_space(ids: list[int], space_id: int) -> list[int]:
    """ids with the space token at the end, once (openvla modeling_prismatic.py#predict_action)."""
    return ids if ids[-1] == space_id else [*ids, space_id]


class Processor:
    """Prepares observations for the buffer, and prepared ones for the network.

    Args:
        folder: the checkpoint's.
        num_images: K.
        image_size: S.
        special_ids: (BOS, padding).
        room: the most tokens that a prompt may have.
        proprio_statistics: of dataset_statistics.json; None where the network reads no proprioception.
        device, dtype: of pixel_values.
        fixed_lengths: pad prompts to few lengths, for a network that is compiled for each.
    """

    def __init__(
        self,
        folder: Path,
        num_images: int,
        image_size: int,
        center_crop: bool,
        special_ids: tuple[int, int],
        room: int,
        proprio_statistics: dict | None,
        device: torch.device,
        dtype: torch.dtype,
        fixed_lengths: bool = False,
    ):
        self.folder = folder
        self.num_images, self.image_size = num_images, image_size
        self.image_transform = OpenVLAImageTransform(image_size, center_crop)  # for make_vector_env
        self.bos_id, self.pad_id = special_ids
        self.room = room
        self.proprio_statistics = proprio_statistics
        self.device, self.dtype = device, dtype
        self.fixed_lengths = fixed_lengths
        # DINO's and SigLIP's normalisation, float32 [1, 1, 2, 3, 1, 1]
        self.pixel_mean, self.pixel_std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, 1, 2, 3, 1, 1)
            for values in read_pixel_statistics(folder)
        )
        self.prompt_ids: dict[str, list[int]] = {}  # instruction -> tokens, BOS first
        self.least_length = 0  # of a batch's prompts

    def to(self, device: torch.device) -> None:
        """Where its tensors are from now on."""
        self.device = device
        self.pixel_mean, self.pixel_std = self.pixel_mean.to(device), self.pixel_std.to(device)

    def prepare(self, obs: Observation) -> PolicyInputs:
        """What the buffer keeps of an observation: preprocessed images, raw proprio, instructions.

        Images that the environments have put through `image_transform` pass as they are: the result is the same bit for bit.

        Raises:
            ValueError: images are not uint8 [N, K, H, W, 3], have been through another transform, or proprio is not [N, 8].
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
        if obs.image_transform is None:
            flat = images.reshape(-1, *images.shape[2:])
            prepared = np.stack([self.image_transform(image) for image in flat])  # JPEG: one at a time
        elif obs.image_transform == self.image_transform:
            prepared = np.array(images)
        else:
            raise ValueError(
                f"images: the environments put them through {obs.image_transform}, this policy reads {self.image_transform}; "
                "make them with image_transform=policy.processor.image_transform"
            )
        return PolicyInputs(
            torch.from_numpy(prepared.reshape(*images.shape[:2], self.image_size, self.image_size, 3)),
            torch.from_numpy(np.array(proprio, dtype=np.float32)),
            tuple(obs.instructions),
        )

    def tensors(self, inputs: PolicyInputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """input_ids, attention_mask [B, L] (left-padded), pixel_values [B, 6K, S, S], normalised proprio float32 [B, 8].

        Images may be on the model's device already; prompts are left on the CPU, where they are arranged.
        """
        expected = (len(inputs), self.num_images, self.image_size, self.image_size, 3)
        if inputs.images.dtype != torch.uint8 or inputs.images.shape != expected:
            got = f"{inputs.images.dtype} {list(inputs.images.shape)}"
            raise ValueError(f"inputs.images: expected uint8 {list(expected)} as prepare() gives, got {got}")
        proprio = None
        if self.proprio_statistics is not None:
            proprio = torch.from_numpy(normalize_proprio(inputs.proprio.numpy(), self.proprio_statistics))
            proprio = to_device(proprio, self.device)
        return *self.tokenize(inputs.instructions), self.pixel_values(inputs.images), proprio

    def pixel_values(self, images: Tensor) -> Tensor:
        """uint8 [B, K, S, S, 3] -> [B, 6K, S, S] in the model's precision, on its device."""
        images = to_device(images, self.device).permute(0, 1, 4, 2, 3).float() / 255  # [B, K, 3, S, S]
        # [B, K, 2, 3, S, S]: DINO's normalisation, then SigLIP's
        normalized = (images[:, :, None] - self.pixel_mean) / self.pixel_std
        return normalized.flatten(1, 3).to(self.dtype)

    def tokenize(self, instructions: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask, int64 [B, L], padded on the left to the longest prompt.

        With fixed_lengths, once two lengths have been met, to a multiple of 8; while there is but one, nothing is padded.
        """
        for text in instructions:
            if text not in self.prompt_ids:
                self.prompt_ids[text] = self.encode_prompt(text)
        rows = [self.prompt_ids[text] for text in instructions]
        length = max(self.least_length, *map(len, rows))
        if self.fixed_lengths and len({len(ids) for ids in self.prompt_ids.values()}) > 1:
            length = min(-(-length // 8) * 8, self.room)
        pad = self.pad_id
        input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return input_ids, attention_mask

    def pad_to(self, instructions: Sequence[str]) -> None:
        """From now on prompts are padded at least to the longest of these: a row's numbers then do not depend, by their rounding,
        on which of the instructions stand beside it."""
        self.least_length = 0
        self.least_length = self.tokenize(tuple(instructions))[0].shape[1]

    def encode_prompt(self, instruction: str) -> list[int]:
        """BOS, the prompt's tokens, the final space."""
        ids = self.tokenizer.encode(prompt_text(instruction), add_special_tokens=False).ids
        ids = append_space([self.bos_id, *ids], self.tokenizer.token_to_id(SPACE))
        if len(ids) > self.room:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the model has room for {self.room}: {instruction[:60]!r}..."
            )
        return ids

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return read_tokenizer(self.folder)
