"""The text that OpenVLA reads, and how its tokens end."""

from __future__ import annotations

# openvla@c8f03f4 experiments/robot/openvla_utils.py#get_vla_action
PROMPT = "In: What action should the robot take to {task}?\nOut:"


def prompt_text(instruction: str) -> str:
    """The text that OpenVLA was trained on, the instruction in lower case."""
    return PROMPT.format(task=instruction.lower())


def append_space(ids: list[int], space_id: int) -> list[int]:
    """ids with the space token at the end, once (openvla modeling_prismatic.py#predict_action)."""
    return ids if ids[-1] == space_id else [*ids, space_id]
