"""Token id <-> bin <-> normalised action <-> environment units.

Not here: sampling and log-probabilities (policy), which model reads which statistics (policy).
Source: openvla@c8f03f4 prismatic/vla/action_tokenizer.py, prismatic/extern/hf/modeling_prismatic.py#predict_action
and experiments/robot/robot_utils.py; openvla-oft@213c5ff for the variants named below.

`...` stands for any leading shape, as [N, C]; the 7 numbers of an action are translation (3), rotation (3), gripper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

OFT_EPSILON = 1e-8  # keeps a constant dimension from dividing by zero (openvla-oft modeling_prismatic.py)


class ActionTokenizer:
    """Uniform bins over -1..1, named by the last `n_bins` ids of the vocabulary, largest action first."""

    def __init__(self, vocab_size: int, n_bins: int = 256):
        """
        Args:
            vocab_size: ids of the language model before its padding; 32000 in LLaMA-2 (its embedding has 32064).
            n_bins: action ids; 256 in every published checkpoint. The bins are the n_bins - 1 intervals between
                as many edges, so the two lowest ids decode alike.

        Raises:
            ValueError: n_bins is below 2 or does not fit into the vocabulary.
        """
        if not 2 <= n_bins <= vocab_size:
            raise ValueError(f"n_bins={n_bins}: expected 2 to vocab_size={vocab_size}")
        self.vocab_size = vocab_size
        self.n_bins = n_bins
        self.first_id = vocab_size - n_bins  # 31744; action ids are first_id .. vocab_size - 1
        self.edges = np.linspace(-1, 1, n_bins)  # float64 [n_bins]
        self.centres = (self.edges[:-1] + self.edges[1:]) / 2  # float64 [n_bins - 1]

    def encode(self, normalized: np.ndarray) -> np.ndarray:
        """Token ids, int64 [...], of normalised actions [...]; values outside -1..1 are clipped.

        id = vocab_size - digitize(clip(a, -1, 1), edges)

        Raises:
            ValueError: a value is NaN.
        """
        normalized = np.asarray(normalized)
        if np.isnan(normalized).any():
            raise ValueError("normalized actions contain NaN, which has no token; expected numbers in -1..1")
        return self.vocab_size - np.digitize(np.clip(normalized, -1.0, 1.0), self.edges)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Normalised actions, float64 [...], of token ids, an integer array or CPU tensor [...].

        a = centres[clip(vocab_size - id - 1, 0, n_bins - 2)]: an id outside the action ids, which greedy decoding over
        the full vocabulary can give, becomes the nearest action, as in the official code.

        Raises:
            ValueError: the ids are not integers.
        """
        ids = np.asarray(ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"token ids: expected integers, got {ids.dtype}; give ids, not logits or actions")
        return self.centres[np.clip(self.vocab_size - ids.astype(np.int64) - 1, 0, self.n_bins - 2)]


def unnormalize(normalized: np.ndarray, stats: Mapping[str, Any], oft: bool) -> np.ndarray:
    """Actions in the data set's units.

    a -> (a + 1) / 2 (q99 - q01) + q01 where the mask is true, else a (the gripper: 0 closes, 1 opens).

    Args:
        normalized: [..., 7], in -1..1.
        stats: one "action" entry of dataset_statistics.json: q01, q99 and, if not all true, mask, 7 values each.
        oft: True adds OFT_EPSILON to the range, as OpenVLA-OFT does.

    Returns:
        float64 [..., 7].

    Raises:
        ValueError: the statistics lack q01 or q99, or their length is not the actions' last dimension.
    """
    normalized = np.asarray(normalized)
    low, high, mask = read_bounds(stats, normalized, "actions")
    extent = high - low + OFT_EPSILON if oft else high - low
    return np.where(mask, 0.5 * (normalized + 1) * extent + low, normalized)


def normalize(values: np.ndarray, stats: Mapping[str, Any], name: str = "actions") -> np.ndarray:
    """Actions as they are learned: the inverse of OpenVLA-OFT's `unnormalize`, not clipped.

    a -> 2 (a - q01) / (q99 - q01 + 1e-8) - 1 where the mask is true, else a (openvla c8f03f4,
    prismatic/vla/datasets/rlds/utils/data_utils.py, normalize_action_and_proprio, which also clips to -1..1).

    Args:
        values: [..., K] in the data set's units.
        stats: as `unnormalize`.
        name: of the values, for the error.

    Returns:
        float64 [..., K].

    Raises:
        ValueError: as `unnormalize`.
    """
    values = np.asarray(values, dtype=np.float64)
    low, high, mask = read_bounds(stats, values, name)
    return np.where(mask, 2 * (values - low) / (high - low + OFT_EPSILON) - 1, values)


def to_environment(actions: np.ndarray) -> np.ndarray:
    """Actions for robosuite's OSC_POSE: the gripper becomes -1 (opens) or +1 (closes), all is clipped to -1..1.

    gripper = -sign(2a - 1). A gripper of exactly 0.5 gives 0, as officially; robosuite then holds the fingers.
    The clip changes nothing, since robosuite's controller clips as well; it keeps actions inside the action space.

    Args:
        actions: [..., 7] in the data set's units, as `unnormalize` gives.

    Returns:
        float32 [..., 7], a new array.
    """
    actions = np.array(actions, dtype=np.float64)
    actions[..., -1] = np.sign(1 - 2 * actions[..., -1])  # not -sign(2a - 1): no -0.0
    return np.clip(actions, -1.0, 1.0).astype(np.float32)


def normalize_proprio(proprio: np.ndarray, stats: Mapping[str, Any]) -> np.ndarray:
    """Proprioception as OpenVLA-OFT reads it: 2 (x - q01) / (q99 - q01 + 1e-8) - 1, clipped to -1..1.

    Args:
        proprio: [..., 8]: end-effector position (3, metres), axis-angle (3, radians), gripper joints (2, metres).
        stats: one "proprio" entry of dataset_statistics.json: q01, q99 and, if not all true, mask, 8 values each.

    Returns:
        float32 [..., 8].

    Raises:
        ValueError: as `unnormalize`.
    """
    return np.clip(normalize(proprio, stats, "proprio"), -1.0, 1.0).astype(np.float32)


def read_bounds(
    stats: Mapping[str, Any], values: np.ndarray, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # q01, q99 float64 [K], mask bool [K]
    missing = [key for key in ("q01", "q99") if key not in stats]
    if missing:
        raise ValueError(
            f"statistics of the {name} lack {' and '.join(missing)}, they have {sorted(stats)}; "
            "give one entry such as dataset_statistics['libero_spatial_no_noops']['action']"
        )
    low, high = np.asarray(stats["q01"], np.float64), np.asarray(stats["q99"], np.float64)
    mask = np.asarray(stats.get("mask", np.ones(low.shape)), bool)
    if values.ndim == 0 or not low.shape == high.shape == mask.shape == values.shape[-1:]:
        raise ValueError(
            f"{name} of shape {values.shape} with statistics of shapes "
            f"q01 {low.shape}, q99 {high.shape}, mask {mask.shape}; the last dimension must be the statistics' length"
        )
    return low, high, mask
