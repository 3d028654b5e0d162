"""Numbers of a demonstration that cannot be in the layout's units, whatever robot it was.

Only what is beyond doubt is refused, and nothing is converted: 0 and 1 of a gripper are used both ways. Not here: the layout
and its units (vla_rl.fine_tuning.demonstration_file).

T steps of a demonstration, R steps of a file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ACTION_EXCESS = 1e-3  # over 1 that is rounding: the float16 after 1 is 1.00098. robosuite clips what it executes
FARTHEST_M = 10.0  # no arm on a table reaches it; in centimetres or millimetres every arm does
FULL_TURN = 2 * np.pi * (1 + 1e-3)  # robosuite's quat2axisangle gives angles up to 2 pi
FINGER_M = 0.1  # a joint of LIBERO's hand (Panda) reaches 0.04
SHUT_M = 0.06  # between its fingers, which stand at 0.08 when they are open
NO_OP_NORM = 1e-4  # openvla c8f03f4, experiments/robot/libero/regenerate_libero_dataset.py, is_noop
GRIPPER_WAY_OUT = (
    "expected -1 (opens) and 1 (closes), and 0 and 1 are used both ways elsewhere; write 1 - 2 g where 1 opens, as in OpenVLA's "
    "units, 2 g - 1 where 1 closes"
)


class UnitsError(ValueError):
    """Numbers that are not damaged but meant in other units than the layout's; says how to convert them."""


def check_ranges(actions: np.ndarray, ee_states: np.ndarray, gripper_states: np.ndarray) -> None:
    """Raises for what cannot be meant in the layout's units, whatever robot it was; [T, 7], [T, 6] and [T, 2].

    Raises:
        ValueError: names the array, what came and what was expected.
    """
    actions, ee_states, gripper_states = (array.astype(np.float64) for array in (actions, ee_states, gripper_states))
    largest = np.abs(actions).max()
    if largest > 1 + ACTION_EXCESS:
        raise ValueError(f"actions reach {largest:.9g}; expected -1..1, as robosuite's OSC_POSE takes them")
    commands = actions[:, -1]
    zero_or_one = np.minimum(np.abs(commands), np.abs(commands - 1)) <= ACTION_EXCESS
    if zero_or_one.all() and commands.min() < 0.5:  # of 1 alone the whole file decides
        raise UnitsError(f"its gripper commands are {listed(commands)} only; {GRIPPER_WAY_OUT}")
    farthest = max(np.abs(ee_states[:, :3]).max(), np.abs(gripper_states).max())
    if farthest > FARTHEST_M:
        name = "obs/gripper_states" if farthest > np.abs(ee_states[:, :3]).max() else "the position in obs/ee_states"
        raise UnitsError(
            f"{name} reaches {farthest:.9g}, expected metres; convert it (centimetres, millimetres, counts?)"
        )
    angle = np.linalg.norm(ee_states[:, 3:], axis=1).max()
    if angle > FULL_TURN:
        raise UnitsError(
            f"the orientation in obs/ee_states has axis-angles of {angle:.9g}, expected at most 2 pi; convert degrees to radians"
        )


def check_image(camera: str, image: np.ndarray) -> None:
    """Raises UnitsError for a black one; uint8 [T, H, W, 3]."""
    if image.max() <= 1:
        raise UnitsError(
            f"obs/{camera} is black, no pixel is above {image.max()}; expected 0..255: multiply by 255 before uint8, or render it anew"
        )


def check_gripper(commands: Sequence[np.ndarray], fingers: Sequence[np.ndarray]) -> None:
    """Raises unless some command of a file opens, or the hand is seen to be shut by the only one, 1.

    Args:
        commands: [T] of each demonstration.
        fingers: gripper_states [T, 2] of each demonstration.

    Raises:
        UnitsError: the commands are 0 and 1, an openness, or 1 with an open hand.
    """
    values = np.concatenate(commands)
    opens = values.min() < -ACTION_EXCESS
    shut = all(np.abs(finger[-1]).sum() < SHUT_M for finger in fingers)
    if not opens and not (shut and values.min() >= 1 - ACTION_EXCESS):
        raise UnitsError(f"its gripper commands are {listed(values)}, so none opens; {GRIPPER_WAY_OUT}")


def check_fingers(fingers: np.ndarray) -> None:
    """An openness, 0 to 1, has one sign throughout, as finger joints have, but reaches farther than they can.

    Raises:
        UnitsError: gripper_states [R, 2] of a file are one.
    """
    one_sign = all((column >= 0).all() or (column <= 0).all() for column in fingers.T)
    if one_sign and np.abs(fingers).max() > FINGER_M:
        raise UnitsError(
            f"obs/gripper_states are {listed(fingers)}, which look like an openness; expected the two finger joints in metres "
            "(0..0.04 and -0.04..0 of LIBERO's hand); convert them"
        )


def listed(values: np.ndarray) -> str:
    """ "0 and 1", or "0 to 0.9" of more than two."""
    unique = np.unique(values)
    low, high = (f"{value:.9g}" for value in (unique[0], unique[-1]))
    return low if len(unique) == 1 else f"{low} {'and' if len(unique) == 2 else 'to'} {high}"


def no_ops(actions: np.ndarray) -> np.ndarray:
    """bool [T]: steps that leave the arm and the gripper as they are.

    |a[:6]| < 1e-4, and the gripper is commanded as in the last step that counts (openvla c8f03f4,
    regenerate_libero_dataset.py, is_noop).

    Args:
        actions: [T, 7].
    """
    still = np.linalg.norm(actions[:, :-1], axis=1) < NO_OP_NORM
    result = np.zeros(len(actions), dtype=bool)
    gripper = None  # of the last step that was kept
    for t, action in enumerate(actions):
        result[t] = still[t] and (gripper is None or action[-1] == gripper)
        if not result[t]:
            gripper = action[-1]
    return result
