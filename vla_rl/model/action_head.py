"""The L1 regression head of OpenVLA-OFT: hidden states of the action slots -> continuous actions; its file beside the model.

    x = fc1(norm1(h_1 .. h_7)), relu;  x = x + relu(W norm(x)) twice;  a = fc2(norm2(x))        for each step of the chunk

Source: openvla-oft@213c5ff prismatic/models/action_heads.py (L1RegressionActionHead), experiments/robot/openvla_utils.py
(get_action_head: it runs in the precision of the model). Not here: where the hidden states come from (vla_rl.model.prismatic),
un-normalisation (vla_rl.model.action_tokenizer), the loss (vla_rl.fine_tuning).

B rows, C steps in a chunk, A = 7C action slots, D hidden size of the language model.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_rl.model.action_tokenizer import ActionTokenizer, to_environment, unnormalize
from vla_rl.model.checkpoint_folder import TRAINED_AS, find_action_head_file, read_tensor_file
from vla_rl.model.prismatic_config import read_config
from vla_rl.model.sampling import check_finite
from vla_rl.model.trained_as import l1_head_of, write_trained_as
from vla_rl.run.checkpoint import save_torch
from vla_rl.run.files import read_json, written_whole
from vla_rl.run.settings import ConfigError
from vla_rl.types import ACTION_DIM, PolicyInputs, PolicyOutput

ONE_ACTION = (
    "policy.head=l1 has one action for an observation, not a distribution to sample from or to score: act greedily, or teach the "
    "token head first: python -m vla_rl.warmstart --checkpoint ..."
)
BLOCKS = 2  # residual blocks (openvla-oft action_heads.py)


class Block(nn.Module):
    """x + relu(W norm(x) + b), [..., D] -> [..., D]."""

    def __init__(self, size: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, size), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class ActionHead(nn.Module):
    """Parameter names are the official ones, without the `module.` before them in a file."""

    def __init__(self, hidden_size: int):
        super().__init__()
        layers = {
            "layer_norm1": nn.LayerNorm(ACTION_DIM * hidden_size),
            "fc1": nn.Linear(ACTION_DIM * hidden_size, hidden_size),
            "mlp_resnet_blocks": nn.ModuleList(Block(hidden_size) for _ in range(BLOCKS)),
            "layer_norm2": nn.LayerNorm(hidden_size),
            "fc2": nn.Linear(hidden_size, ACTION_DIM),
        }
        self.model = nn.ModuleDict(layers)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, A, D] that predict the action tokens -> normalised actions [B, C, 7], not clipped.

        Computed in the head's own precision, to which the hidden states are cast.
        """
        layers = self.model
        x = hidden.to(layers["fc1"].weight.dtype).unflatten(1, (-1, ACTION_DIM)).flatten(2)  # [B, C, 7D]
        x = torch.relu(layers["fc1"](layers["layer_norm1"](x)))
        for block in layers["mlp_resnet_blocks"]:
            x = block(x)
        return layers["fc2"](layers["layer_norm2"](x))

    def digest(self) -> str:
        """Hex digits of all values."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def with_plain_gripper(normalized: np.ndarray) -> np.ndarray:
    """Normalised actions [..., 7] with the gripper that is carried out: 0 (closes) up to 0.5, 1 (opens) above."""
    normalized = np.array(normalized, dtype=np.float64)
    normalized[..., -1] = normalized[..., -1] > 0.5
    return normalized


def l1_output(
    normalized: Tensor, hidden: Tensor, inputs: PolicyInputs, tokenizer: ActionTokenizer, statistics: dict[str, Any]
) -> PolicyOutput:
    """A decision of the L1 head: its actions, the tokens that say the same, NaN as log-probabilities.

    Args:
        normalized: [N, C, 7], not clipped: what is outside -1..1 is carried out, as in the official code, and has the last token.
        hidden: float32 [N, D].
        statistics: "action" of dataset_statistics.json.

    Raises:
        NonFiniteError: an action is NaN or infinite.
    """
    check_finite(torch.isfinite(normalized).cpu())
    numbers = normalized.cpu().numpy()
    tokens = torch.from_numpy(tokenizer.encode(with_plain_gripper(numbers))).flatten(1)  # [N, A]
    actions = to_environment(unnormalize(numbers, statistics, oft=True))
    return PolicyOutput(tokens, torch.full(tokens.shape, torch.nan), actions, hidden, inputs)


# ---------------------------------------------------------------------------------------------------------------- files


def load_action_head(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ActionHead:
    """The head of a checkpoint folder, in eval mode, no parameter requiring a gradient.

    Raises:
        ConfigError: there is none or several, it is torn, of another kind or of another model.
    """
    path = find_action_head_file(folder)
    if path is None:
        raise ConfigError(
            f"{folder} has no L1 head (no action_head--N_checkpoint.pt); give a checkpoint with one, such as "
            "moojink/openvla-7b-oft-finetuned-libero-spatial, or use its token head (policy.head=tokens)"
        )
    tensors = {name.removeprefix("module."): tensor for name, tensor in read_tensor_file(path).items()}
    with torch.device("meta"):
        head = ActionHead(read_config(folder).llama["hidden_size"])
    expected = {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
    if any(name.startswith("noise_predictor.") for name in tensors):
        raise ConfigError(f"{path} is a diffusion head, which is not implemented; give a checkpoint with an L1 head")
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"{path} does not fit the model: {len(wrong)} tensors, such as {name}, expected {expected.get(name, 'none')}, got "
            f"{found.get(name, 'none')}; download it again"
        )
    head.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True)
    return head.eval().requires_grad_(False)


def save_action_head(head: ActionHead, folder: Path, steps: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes action_head--STEPS_checkpoint.pt as the official code does, which reads it too."""
    path = folder / f"action_head--{steps}_checkpoint.pt"
    tensors = {f"module.{name}": t.detach().to("cpu", dtype).contiguous() for name, t in head.state_dict().items()}
    with written_whole(path) as unfinished:
        save_torch(tensors, unfinished)
    return path


def keep_action_head(source: Path, folder: Path, fits: bool) -> None:
    """Beside the weights of a checkpoint that were saved in `folder`: its head's file, if there is one and it fits them; else
    trained_as.json, where there is one, tells that the token head is what was trained.

    Args:
        fits: the weights are the source's own, or were used through the L1 head.
    """
    path = find_action_head_file(source)
    if fits and path is not None:
        with written_whole(folder / path.name) as unfinished:
            shutil.copyfile(path, unfinished)
    if not fits and l1_head_of(folder, []) is not None:
        write_trained_as(folder, read_json(folder / TRAINED_AS) | {"head": "tokens"})
