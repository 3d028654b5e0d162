"""LIBERO's HDF5 layout: what is written is read back, official files are read, damaged ones are refused by name."""

import errno
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from vla_rl.demonstrations import file_attributes, parse_args
from vla_rl.fine_tuning.demonstration_file import (
    DemonstrationFile,
    find_files,
    no_ops,
    read_demonstrations,
)
from vla_rl.run.settings import ConfigError
from vla_rl.simulation.suites import task_instructions


def arrays(steps=5, seed=0, size=16):
    rng = np.random.default_rng(seed)
    ends = np.zeros(steps, np.uint8)
    ends[-1] = 1
    states = rng.normal(size=(steps, 92))
    return {
        "actions": rng.uniform(-1, 1, (steps, 7)),
        "states": states,
        "robot_states": rng.normal(size=(steps, 9)),
        "rewards": ends,
        "dones": ends,
        "obs/agentview_rgb": rng.integers(0, 256, (steps, size, size, 3), dtype=np.uint8),
        "obs/eye_in_hand_rgb": rng.integers(0, 256, (steps, size, size, 3), dtype=np.uint8),
        "obs/ee_states": rng.normal(size=(steps, 6)),
        "obs/gripper_states": rng.normal(size=(steps, 2)),
        "obs/joint_states": states[:, 1:8].copy(),
    }


@pytest.fixture
def path(tmp_path):
    attributes = {
        "bddl_file_name": "my/put_it_there_v2.bddl",
        "problem_info": '{"language_instruction": "put it there"}',
    }
    with DemonstrationFile(tmp_path / "d.hdf5", attributes) as file:
        for seed in range(12):
            file.add(arrays(seed=seed), {})
    return tmp_path / "d.hdf5"


def read(path, num_images=1, filter_no_ops=False):
    return list(read_demonstrations(path, num_images, filter_no_ops, task_instructions()))


def test_what_was_written_is_read_in_the_order_of_the_numbers(path):
    read_back = read(path, num_images=2)
    assert [d.name for d in read_back] == [f"demo_{i}" for i in range(12)]  # not demo_1, demo_10, demo_11, demo_2
    expected = arrays(seed=11)
    np.testing.assert_array_equal(read_back[11].actions, expected["actions"])
    proprio = np.concatenate([expected["obs/ee_states"], expected["obs/gripper_states"]], axis=1)
    np.testing.assert_array_equal(read_back[11].proprio, proprio.astype(np.float32))
    assert read_back[0].instruction == "put it there"


def test_images_are_turned_the_right_way_up(path):
    images = read(path, num_images=2)[3].images
    assert images.shape == (5, 2, 16, 16, 3)
    np.testing.assert_array_equal(images[2, 1], arrays(seed=3)["obs/eye_in_hand_rgb"][2, ::-1, ::-1])


def test_a_file_that_was_not_finished_does_not_get_its_name(tmp_path):
    with pytest.raises(KeyboardInterrupt), DemonstrationFile(tmp_path / "d.hdf5", {}) as file:
        file.add(arrays(), {})
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_libero_s_official_layout_is_read(tmp_path):
    """Attributes as scripts/create_dataset.py writes them; the file's BDDL name tells the task."""
    with h5py.File(tmp_path / "KITCHEN_SCENE1_open_the_bottom_drawer_of_the_cabinet_demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["bddl_file_name"] = "bddl_files/libero_90/KITCHEN_SCENE1_open_the_bottom_drawer_of_the_cabinet.bddl"
        data.attrs["problem_info"] = json.dumps({"language_instruction": ["Open the Bottom drawer"]})
        demo = data.create_group("demo_0")
        demo.attrs["num_samples"] = 5
        for name, array in arrays().items():
            demo.create_dataset(name, data=array)
    (demonstration,) = read(next(tmp_path.iterdir()))
    assert demonstration.instruction == "open the bottom drawer of the cabinet" and len(demonstration) == 5


def test_a_demonstration_s_own_task_counts_before_the_file_s(path):
    name = b"bddl_files/libero_goal/turn_on_the_stove.bddl"
    damage(path, lambda demo: demo.attrs.update(bddl_file_name=np.bytes_(name)))
    assert [d.instruction for d in read(path)][6:9] == ["put it there", "turn on the stove", "put it there"]


def test_a_perturbed_suite_s_task_has_its_own_instruction_under_the_base_suite_s_name(path):
    name = b"libero_goal_task/turn_on_the_stove.bddl"
    damage(path, lambda demo: demo.attrs.update(bddl_file_name=np.bytes_(name)))
    assert [d.instruction for d in read(path)][6:9] == ["put it there", "turn off the stove", "put it there"]


@pytest.mark.parametrize("render", ["exact", "fast"])
def test_how_our_recorder_rendered_is_read(path, render):
    args = parse_args(["--out", "d.hdf5", "--render", render])
    with h5py.File(path, "a") as file:
        file["data"].attrs.update(file_attributes(args, [0]))
    assert {demonstration.render for demonstration in read(path)} == {render}


MADE_WITH = [
    None,
    "",
    "{",
    "[]",
    "5",
    '{"render": "other"}',
    '{"render": ["fast"]}',
    7,
    h5py.Empty("f8"),
    b"\xff",
    "[" * 9999,
]


@pytest.mark.parametrize("made_with", MADE_WITH)
def test_a_file_that_does_not_tell_how_it_was_rendered_is_read(path, made_with):
    with h5py.File(path, "a") as file:
        file["data"].attrs.update({} if made_with is None else {"made_with": made_with})
    assert [demonstration.render for demonstration in read(path)] == [None] * 12


def test_without_a_task_or_a_text_it_is_refused(path):
    with h5py.File(path, "a") as file:
        del file["data"].attrs["problem_info"]
    with pytest.raises(
        ConfigError, match="demo_0 is damaged: nothing tells its instruction: put_it_there_v2 is no task"
    ):
        read(path)


@pytest.mark.parametrize("filter_no_ops", [False, True])
def test_observations_from_after_the_action_are_paired_with_the_next_one(path, filter_no_ops):
    """LIBERO's create_dataset.py appends what env.step(action) returned to the row of that action."""
    before = read(path, 2, filter_no_ops)
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            for name in list(demo["obs"]):
                replace(demo, f"obs/{name}", np.roll(demo["obs"][name][()], -1, axis=0))
    after = read(path, 2, filter_no_ops)
    for one, other in zip(before, after, strict=True):
        assert len(other) == len(one) - 1
        for name in ("images", "proprio", "actions"):
            np.testing.assert_array_equal(getattr(other, name), getattr(one, name)[1:])


def damage(path, change):
    with h5py.File(path, "a") as file:
        change(file["data"]["demo_7"])


DAMAGES = {
    "a missing camera": (lambda d: d.pop("obs/agentview_rgb"), "obs/agentview_rgb is missing"),
    "actions of another length": (
        lambda d: replace(d, "actions", np.zeros((4, 7))),
        "num_samples is 5, but actions has 4",
    ),
    "actions of another kind": (
        lambda d: replace(d, "actions", np.zeros((5, 6))),
        r"shape \[5, 6\], expected \[T, 7\]",
    ),
    "images of another length": (
        lambda d: replace(d, "obs/agentview_rgb", np.zeros((3, 16, 16, 3), np.uint8)),
        r"shape \[3, 16, 16, 3\], expected \[5, \*, \*, 3\]",
    ),
    "float images": (lambda d: replace(d, "obs/agentview_rgb", np.zeros((5, 16, 16, 3))), "float64, expected uint8"),
    "a NaN": (lambda d: replace(d, "actions", np.full((5, 7), np.nan)), "actions has a NaN"),
    "actions out of range": (lambda d: replace(d, "actions", np.full((5, 7), 3.0)), "actions reach 3; expected -1..1"),
}


def replace(demo, name, value):
    del demo[name]
    demo[name] = value


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_demonstration_is_refused_by_name(path, name):
    change, message = DAMAGES[name]
    damage(path, change)
    with pytest.raises(ConfigError, match=rf"d\.hdf5: demonstration demo_7 is damaged: .*{message}"):
        read(path)


WRONG_VALUES = {
    "nothing": None,
    "a number": 5,
    "text": "text",
    "bytes that are no text": np.bytes_(b"\xff\xfe"),
    "an empty value": h5py.Empty("f8"),
    "an empty list": np.zeros(0),
    "too many dimensions": np.zeros((5, 1, 1, 1, 1)),
    "no steps": np.zeros((0, 7)),
    "no pixels": np.zeros((5, 0, 0, 3), np.uint8),
    "infinity": np.full((5, 7), np.inf),
    "complex numbers": np.ones((5, 7), complex),
    "a table": np.zeros(5, [("a", int), ("b", float)]),
    "truths": np.ones((5, 7), bool),
    "a list of texts": np.array([b"a", b"b"]),
    "more than there is memory for": "sparse",
    "JSON of another kind": "[[1, null], {}]",
    "JSON without the text": '{"language_instruction": {"a": 1}, "render": []}',
    "an empty instruction": '{"language_instruction": [""]}',
    "a group": "group",
}
MEMBERS = ["", "actions", "states", "obs", "obs/agentview_rgb", "obs/eye_in_hand_rgb", "obs/ee_states"]
MEMBERS += ["obs/gripper_states", "obs/joint_states"]
ATTRIBUTES = ["num_samples", "bddl_file_name", "problem_info", "made_with"]


def put(data, name, value):
    """In place of what has the name, or nothing."""
    if name in data:
        del data[name]
    if isinstance(value, str) and value == "group":
        data.create_group(name)
    elif isinstance(value, str) and value == "sparse":
        data.create_dataset(name, (2**40, 7), "f8", chunks=(1024, 7))
    elif value is not None:
        data[name] = value


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_whatever_stands_in_place_of_an_array_or_attribute_is_refused_in_one_line(path, wrong):
    """Or read as if it were not there, where that is allowed."""
    whole, value = path.read_bytes(), WRONG_VALUES[wrong]
    changes = [lambda data, name=name: put(data, f"demo_7/{name}".rstrip("/"), value) for name in MEMBERS]
    changes += [lambda data: put(data.parent, "data", value)]
    for name in ATTRIBUTES:
        for owner in (".", "demo_7"):
            attribute = 1.5 if value is None else value
            changes += [lambda data, name=name, owner=owner, value=attribute: data[owner].attrs.update({name: value})]
    refused = 0
    for change in changes:
        path.write_bytes(whole)
        with h5py.File(path, "a") as file:
            change(file["data"])
        try:
            assert all(demonstration.instruction for demonstration in read(path, num_images=2))
        except ConfigError as error:
            refused += 1
            assert str(error).startswith(f"{path}") and "\n" not in str(error) and len(str(error)) < 500
    assert refused >= 10


ATTRIBUTE_DAMAGES = [
    ("num_samples", "5", "attribute num_samples is '5', expected an integer"),
    ("num_samples", np.array([5]), r"attribute num_samples is array\(\[5\]\), expected an integer"),
    ("bddl_file_name", 5, r"attribute bddl_file_name is .*5.*, expected text"),
    ("bddl_file_name", np.bytes_(b"\xff"), "attribute bddl_file_name is .*, expected text"),
    ("problem_info", "{", "attribute problem_info is '{', expected JSON with the text language_instruction"),
    ("problem_info", '{"language_instruction": ""}', ".*, expected JSON with the text language_instruction"),
    ("problem_info", '{"language_instruction": "\\ud800"}', ".*, expected JSON with the text language_instruction"),
]


@pytest.mark.parametrize(("name", "value", "message"), ATTRIBUTE_DAMAGES)
def test_a_damaged_attribute_is_refused_by_name(path, name, value, message):
    damage(path, lambda demo: demo.attrs.update({name: value}))
    with pytest.raises(ConfigError, match=rf"d\.hdf5: demonstration demo_7 is damaged: {message}"):
        read(path)


def test_cameras_of_different_sizes_are_told(path):
    damage(path, lambda demo: replace(demo, "obs/eye_in_hand_rgb", np.zeros((5, 8, 8, 3), np.uint8)))
    with pytest.raises(ConfigError, match="demo_7 is damaged: images are 16 x 16 and 8 x 8 pixels, expected one size"):
        read(path, num_images=2)


def test_a_demonstration_whose_bytes_are_damaged_is_refused_by_name(path):
    with h5py.File(path) as file:
        chunk = file["data/demo_4/obs/agentview_rgb"].id.get_chunk_info(0)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\xff" * chunk.size)
    with pytest.raises(ConfigError, match="demo_4 is damaged"):
        read(path)


def test_damaged_tables_are_refused(path):
    """Whatever byte is wrong: the arrays are read as something, or refused; nothing escapes."""
    whole, refused = path.read_bytes(), 0
    rng = np.random.default_rng(0)
    for _ in range(60):
        start, size = rng.integers(len(whole)), rng.integers(1, 512)
        path.write_bytes(whole[:start] + rng.bytes(size) + whole[start + size :])
        try:
            read(path)
        except ConfigError:
            refused += 1
    assert refused > 10


def test_a_torn_file_is_refused(path):
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"d\.hdf5 cannot be read as HDF5"):
        read(path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NO_FILES = [
    (LFS, "is a pointer of Git LFS, not the file itself; run git lfs pull"),
    (b"", "cannot be read as HDF5: it is torn, it has 0 bytes"),
    (b"<!DOCTYPE html>" * 50, "is another kind of file, which begins with b'<!DOCTYPE html><'; name an HDF5 file"),
]


@pytest.mark.parametrize(("content", "message"), NO_FILES)
def test_what_is_no_hdf5_file_is_told(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"d\.hdf5 .*{message}"):
        read(path)


def test_a_half_copied_file_is_called_torn(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"cannot be read as HDF5: it is torn, \d+ bytes are there .*stored_eof"):
        read(path)


def test_a_missing_file_and_a_folder_are_told(path):
    with pytest.raises(ConfigError, match=r"nowhere\.hdf5 is missing"):
        read(path.with_name("nowhere.hdf5"))
    with pytest.raises(ConfigError, match="cannot be opened: Is a directory"):
        read(path.parent)


LOCKS = [
    (errno.EAGAIN, "unable to lock file", "is locked: another process .* wait for its end"),
    (errno.EACCES, "unable to lock file", "is locked: another process .* wait for its end"),
    (errno.ENOLCK, "unable to lock file", "its file system has no locks .* set .* HDF5_USE_FILE_LOCKING=FALSE"),
    (errno.EOPNOTSUPP, "unable to lock file", "its file system has no locks .* HDF5_USE_FILE_LOCKING=FALSE"),
    (errno.EACCES, "unable to open file", "may not be opened: Permission denied; change its permissions"),
    (errno.EROFS, "unable to open file", "may not be opened: Read-only file system"),
    (None, "file is already open for write (may use h5clear)", "was not closed .* run h5clear -s"),
]


@pytest.mark.parametrize(("number", "said", "message"), LOCKS)
def test_a_file_that_may_not_be_opened_now_is_not_called_torn(path, monkeypatch, number, said, message):
    def refuse(*_):
        raise OSError(number, said) if number else OSError(said)

    monkeypatch.setattr(h5py, "File", refuse)
    for use in (lambda: read(path), lambda: DemonstrationFile(path.with_name("new.hdf5"), {})):
        with pytest.raises(ConfigError, match=message) as error:
            use()
        assert "torn" not in str(error.value) and "\n" not in str(error.value)


WRITER = """
import sys, h5py
file = h5py.File(sys.argv[1], "w")
file["a"] = 1
file.flush()
print("open", flush=True)
sys.stdin.read()
"""


def test_a_file_that_another_process_writes_is_told_and_left_alone(tmp_path):
    unfinished = tmp_path / ".d.hdf5.tmp"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = {name: value for name, value in os.environ.items() if name != "HDF5_USE_FILE_LOCKING"}
    with subprocess.Popen([sys.executable, "-c", WRITER, unfinished], env=environment, **pipes) as writer:
        assert writer.stdout.readline() == b"open\n"
        for use in (lambda: read(unfinished), lambda: DemonstrationFile(tmp_path / "d.hdf5", {})):
            with pytest.raises(ConfigError, match="tmp is locked: another process has it open for writing"):
                use()
        writer.stdin.close()
    with h5py.File(unfinished) as file:
        assert file["a"][()] == 1


def test_what_a_killed_process_has_left_is_written_anew(tmp_path):
    (tmp_path / ".d.hdf5.tmp").write_bytes(b"torn")
    with DemonstrationFile(tmp_path / "d.hdf5", {}) as file:
        file.add(arrays(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["d.hdf5"]


def test_a_file_without_demonstrations_is_refused(tmp_path):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file.create_group("other")
    with pytest.raises(ConfigError, match="has no demonstrations"):
        read(tmp_path / "x.hdf5")


def test_files_and_folders_are_found_and_a_missing_one_is_named(path):
    assert find_files([str(path.parent), str(path)]) == [path, path]
    with pytest.raises(ConfigError, match="no file nowhere"):
        find_files(["nowhere"])
    (path.parent / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \.hdf5 or \.h5 file in the folder"):
        find_files([str(path.parent / "empty")])


def test_every_suffix_that_is_written_is_found_in_a_folder(tmp_path):
    for name in ("b.h5", "a.hdf5", "C.HDF5", "d.H5", ".d.hdf5.tmp", "._a.hdf5", "notes.txt", "folder.h5/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in find_files([str(tmp_path)])] == ["C.HDF5", "a.hdf5", "b.h5", "d.H5"]


def test_a_link_to_a_file_that_is_gone_is_not_passed_over(path):
    path.with_name("gone.hdf5").symlink_to("nowhere")
    assert find_files([str(path.parent)]) == [path, path.with_name("gone.hdf5")]
    with pytest.raises(ConfigError, match=r"gone\.hdf5 is missing, or a link to what is missing"):
        read(path.with_name("gone.hdf5"))


def test_files_in_sub_folders_are_not_read_but_told(tmp_path):
    for name in ("a/x.hdf5", "b/c/y.h5", "d/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="name its sub-folders that have some: ") as error:
        find_files([str(tmp_path)])
    assert all(f"{tmp_path / name}" in str(error.value) for name in ("a", "b/c"))
    assert str(tmp_path / "d") not in str(error.value)


def test_no_ops_are_still_steps_whose_gripper_stays():
    actions = np.zeros((6, 7))
    actions[:, 6] = [-1, -1, 1, 1, 1, -1]
    actions[1, 0] = 5e-5  # below 1e-4: still
    actions[4, 3] = 2e-4  # moves
    # nothing has been kept before 4: so the gripper of 2 is no change
    assert no_ops(actions).tolist() == [True, True, True, True, False, False]
    actions[0, 0] = 1.0  # is kept, gripper -1: now the change to 1 counts
    assert no_ops(actions).tolist() == [False, True, False, True, False, False]


def test_no_ops_are_left_out_of_everything(path):
    damage(path, lambda d: d["actions"].write_direct(np.zeros(7), dest_sel=np.s_[2]))
    damage(path, lambda d: d["actions"].__setitem__((2, 6), d["actions"][1, 6]))
    whole, filtered = read(path)[7], read(path, filter_no_ops=True)[7]
    assert len(whole) == 5 and len(filtered) == 4
    np.testing.assert_array_equal(filtered.images, whole.images[[0, 1, 3, 4]])
    np.testing.assert_array_equal(filtered.proprio, whole.proprio[[0, 1, 3, 4]])


def test_a_full_disk_is_noticed_before_hdf5_crashes_on_it(tmp_path, monkeypatch):
    """With a real one of 600 kB, h5py 3.16 dies of a segmentation fault."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**24 + 1000))
    with pytest.raises(OSError) as error, DemonstrationFile(tmp_path / "d.hdf5", {}) as file:
        file.add(arrays(10), {})
    assert error.value.errno == errno.ENOSPC and "d.hdf5" in str(error.value)
    assert "16,778,216 bytes free, 16," in str(error.value)
    assert not list(tmp_path.iterdir())


def elsewhere(path, how: str):
    """The file with an array, a group or all of it in another file, or an array that claims 4 TB."""
    other = path.with_name("other.hdf5")
    shutil.copyfile(path, other)
    with h5py.File(path, "a") as file:
        demo = file["data/demo_3"]
        if how == "all":
            del file["data"]
            file["data"] = h5py.ExternalLink(other, "data")
        if how == "a demonstration":
            del file["data/demo_3"]
            file["data/demo_3"] = h5py.ExternalLink(other, "data/demo_3")
        if how == "an array by a link to a link":
            del demo["actions"]
            file["other"] = h5py.ExternalLink(other, "data/demo_3/actions")
            demo["actions"] = h5py.SoftLink("/other")
        if how == "bytes of any file":
            del demo["actions"]
            demo.create_dataset("actions", (5, 7), "u1", external=[("/etc/passwd", 0, 35)])
        if how == "a virtual array":
            del demo["obs/ee_states"]
            layout = h5py.VirtualLayout((5, 6), "f8")
            layout[:] = h5py.VirtualSource(other, "data/demo_3/obs/ee_states", (5, 6))
            demo.create_virtual_dataset("obs/ee_states", layout)
        if how == "4 TB of zeros":
            del demo["actions"]
            demo.create_dataset("actions", (2**36, 7), "f8", chunks=(1024, 7), compression="gzip")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("all", "is damaged: 'data' is a link, perhaps into another file"),
        ("a demonstration", "is damaged: 'demo_3' is a link"),
        ("an array by a link to a link", "is damaged: 'other' is a link"),
        ("bytes of any file", "demonstration demo_3 is damaged: actions has its numbers in another file"),
        ("a virtual array", "demonstration demo_3 is damaged: obs/ee_states has its numbers in another file"),
        ("4 TB of zeros", "demonstration demo_3 is damaged: actions has shape .* 3848.3 GB, more than"),
    ],
)
def test_a_file_that_leads_into_another_or_claims_more_than_the_memory_is_refused(path, how, words):
    elsewhere(path, how)
    with pytest.raises(ConfigError, match=words) as error:
        read(path)
    assert "\n" not in str(error.value)
