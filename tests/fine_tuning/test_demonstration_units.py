"""Files whose numbers are in other units: refused where it is beyond doubt, read where it is not."""

import numpy as np
import pytest

from tests.fine_tuning.test_demonstration_file import arrays, read
from vla_rl.fine_tuning.demonstration_file import DemonstrationFile
from vla_rl.fine_tuning.demonstration_units import listed
from vla_rl.run.settings import ConfigError


def write(path, *changes):
    """A file with a demonstration of five steps for each dict of changed arrays."""
    with DemonstrationFile(path, {"problem_info": '{"language_instruction": "put it there"}'}) as file:
        for seed, change in enumerate(changes):
            file.add(arrays(seed=seed) | change, {})
    return path


def gripper(*values):
    actions = arrays()["actions"]
    actions[:, 6] = values
    return {"actions": actions}


OPEN_HAND, SHUT_HAND = (np.tile([[x, -x]], (5, 1)) for x in (0.04, 0.01))
OTHER_GRIPPERS = {
    "0 and 1": ([gripper(0, 0, 1, 1, 0)], "its gripper commands are 0 and 1, so none opens"),
    "one of them in each demonstration": (
        [gripper(*[1] * 5), gripper(*[0] * 5)],
        "its gripper commands are 0 and 1, so none opens",
    ),
    "0": ([gripper(*[0] * 5)], "its gripper commands are 0, so none opens"),
    "an openness": ([gripper(0, 0.2, 0.5, 1, 0.9)], "its gripper commands are 0 to 1, so none opens"),
    "noise": ([gripper(-1e-5, 0, 1, 1, 0)], "its gripper commands are -1e-05 to 1, so none opens"),
    "0 and 1 with a shut hand": (
        [gripper(*[1] * 5) | {"obs/gripper_states": SHUT_HAND}, gripper(*[0] * 5) | {"obs/gripper_states": SHUT_HAND}],
        "its gripper commands are 0 and 1, so none opens",
    ),
    "1 with an open hand": (
        [gripper(*[1] * 5) | {"obs/gripper_states": OPEN_HAND}],
        "its gripper commands are 1, so none opens",
    ),
    "0 and 1 beside -1 and 1": (
        [gripper(-1, 1, 1, 1, -1), gripper(0, 0, 1, 1, 1)],
        "demonstration demo_1: its gripper commands are 0 and 1 only",
    ),
    "0 beside -1 and 1": (
        [gripper(-1, 1, 1, 1, -1), gripper(*[0] * 5)],
        "demonstration demo_1: its gripper commands are 0 only",
    ),
}


@pytest.mark.parametrize("name", OTHER_GRIPPERS)
def test_gripper_commands_of_other_units_are_refused(tmp_path, name):
    changes, message = OTHER_GRIPPERS[name]
    with pytest.raises(ConfigError, match=rf"d\.hdf5: ({message}).*; write 1 - 2 g where 1 opens.*, 2 g - 1 where"):
        read(write(tmp_path / "d.hdf5", *changes))


@pytest.mark.parametrize(
    "changes",
    [
        [gripper(-1, -1, 1, 1, -1), gripper(*[1] * 5)],  # the second never opens; the first tells
        [gripper(*[-1] * 5)],
        [gripper(-1, 0, 1, 1, 0)],  # 0 holds
        [gripper(-0.4, 0.3, 0.9, 1, 0)],
        [gripper(*[1] * 5) | {"obs/gripper_states": SHUT_HAND}],  # never opens, and the hand is shut
    ],
)
def test_gripper_commands_that_the_file_explains_are_read_as_they_are(tmp_path, changes):
    expected = [change["actions"][:, 6].tolist() for change in changes]
    assert [d.actions[:, 6].tolist() for d in read(write(tmp_path / "d.hdf5", *changes))] == expected


def moved(name, columns, values):
    array = arrays()[name]
    array[:, columns] = values
    return {name: array}


FULL = np.linspace(0, 1, 5)
OTHER_UNITS = {
    "degrees": (moved("obs/ee_states", slice(3, 6), [180, 0, 0]), "has axis-angles of 180, expected at most 2 pi"),
    "millimetres": (moved("obs/ee_states", 2, 1100), "the position in obs/ee_states reaches 1100, expected metres"),
    "a quaternion": ({"obs/ee_states": np.zeros((5, 7))}, "has 7 columns, which look like position and quaternion"),
    "an openness of 0 and 1": (
        {"obs/gripper_states": np.tile([[0], [0], [1], [1], [1]], 2)},
        "obs/gripper_states are 0 and 1, which look like an openness",
    ),
    "an openness, mirrored": (
        {"obs/gripper_states": np.stack([FULL, -FULL], axis=1)},
        "obs/gripper_states are -1 to 1, which look like an openness",
    ),
    "counts": ({"obs/gripper_states": np.tile([[0], [255], [255], [9], [0]], 2)}, "are 0 to 255, which look like"),
    "black images": (
        {"obs/agentview_rgb": np.zeros((5, 16, 16, 3), np.uint8)},
        "demo_0: obs/agentview_rgb is black, no pixel is above 0",
    ),
    "images of 0..1": (
        {"obs/agentview_rgb": arrays()["obs/agentview_rgb"] // 128},
        "is black, no pixel is above 1; expected 0..255: multiply by 255",
    ),
    "one colour": (
        {"obs/agentview_rgb": np.full((5, 16, 16, 3), 77, np.uint8)},
        "every pixel of obs/agentview_rgb is 77, it has no picture",
    ),
}


@pytest.mark.parametrize("name", OTHER_UNITS)
def test_numbers_that_cannot_be_of_the_layout_are_refused(tmp_path, name):
    change, message = OTHER_UNITS[name]
    with pytest.raises(ConfigError, match=rf"d\.hdf5: .*{message}"):
        read(write(tmp_path / "d.hdf5", change))


def test_fingers_axis_angles_and_positions_at_their_limits_are_read(tmp_path):
    change = {"obs/gripper_states": OPEN_HAND} | moved("obs/ee_states", slice(3, 6), [2 * np.pi, 0, 0])
    change["obs/ee_states"][:, :3] = [-2, 2, 3]
    (demonstration,) = read(write(tmp_path / "d.hdf5", change))
    expected = np.float32([-2, 2, 3, 2 * np.pi, 0, 0, 0.04, -0.04])
    np.testing.assert_array_equal(demonstration.proprio, np.tile(expected, (5, 1)))


def test_actions_that_exceed_1_by_rounding_are_clipped_and_this_is_told(tmp_path, caplog):
    actions = arrays()["actions"]
    actions[1, 0], actions[2, 3] = 1.0001, -1.0009765625  # the second is float16's next to -1
    (demonstration,) = read(write(tmp_path / "d.hdf5", {"actions": actions}))
    assert demonstration.actions[1, 0] == 1 and demonstration.actions[2, 3] == -1
    np.testing.assert_array_equal(np.delete(demonstration.actions, [1, 2], 0), np.delete(actions, [1, 2], 0))
    assert "actions reach 1.00097656; clipped to -1..1, as robosuite does" in caplog.text


@pytest.mark.parametrize(("value", "told"), [(1.0011, "1.0011"), (-1.001000125, "1.00100013"), (3, "3")])
def test_actions_that_exceed_1_are_refused_in_digits_that_show_it(tmp_path, caplog, value, told):
    with pytest.raises(ConfigError, match=rf"demo_0 is damaged: actions reach {told}; expected -1\.\.1"):
        read(write(tmp_path / "d.hdf5", moved("actions", 0, value)))
    assert not caplog.text


def test_values_are_listed_as_a_person_would():
    assert listed(np.array([1.0, 1.0])) == "1"
    assert listed(np.array([[1, 0], [0, 1]])) == "0 and 1"
    assert listed(np.array([0.5, 0, 0.25])) == "0 to 0.5"
