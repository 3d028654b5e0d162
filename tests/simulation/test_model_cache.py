"""A compiled model from disk is the compiled model; what cannot be kept or read is no error."""

import logging
import os
import time
from pathlib import Path

import mujoco
import numpy as np
import pytest

from vla_rl.simulation import model_cache
from vla_rl.simulation.model_cache import load_model

MESH = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes its MUJOCO_LOG.TXT
    monkeypatch.setenv("VLA_RL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def xml(tmp_path):
    (tmp_path / "mesh.obj").write_text(MESH)
    return scene(tmp_path / "mesh.obj")


def scene(mesh, size=0.1):
    return (
        f'<mujoco><asset><mesh name="m" file="{mesh}"/></asset><worldbody><body><freejoint/>'
        f'<geom type="mesh" mesh="m"/><geom size="{size}"/></body></worldbody></mujoco>'
    )


@pytest.fixture
def compiled(monkeypatch):
    """The XMLs that were compiled."""
    xmls, real = [], model_cache.compile_model
    monkeypatch.setattr(model_cache, "compile_model", lambda xml: xmls.append(xml) or real(xml))
    return xmls


def assert_same(model, other):
    for name in dir(mujoco.MjModel):
        value = getattr(model, name, None)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(other, name), value, err_msg=name)
    data, other_data = mujoco.MjData(model), mujoco.MjData(other)
    for _ in range(50):
        mujoco.mj_step(model, data)
        mujoco.mj_step(other, other_data)
    np.testing.assert_array_equal(data.qpos, other_data.qpos)


def test_the_second_time_it_comes_from_disk_and_is_the_same(folder, xml, compiled):
    first, second = load_model(xml, 1), load_model(xml, 1)
    assert compiled == [xml] and len(list(folder.glob("*.mjb"))) == 1
    assert_same(first, second)


def test_without_a_limit_nothing_is_kept(folder, xml, compiled):
    load_model(xml, 0)
    load_model(xml, 0)
    assert len(compiled) == 2 and not folder.exists()


def test_another_xml_file_or_version_is_another_model(folder, xml, compiled, tmp_path, monkeypatch):
    load_model(xml, 1)
    load_model(scene(tmp_path / "mesh.obj", size=0.2), 1)
    (tmp_path / "mesh.obj").write_text(MESH.replace("v 1 0 0", "v 2 0 0 "))
    assert load_model(xml, 1).mesh_vert.max() > 1.2
    monkeypatch.setattr(mujoco, "__version__", "9.9.9")
    load_model(xml, 1)
    assert len(compiled) == 4 and len(list(folder.glob("*.mjb"))) == 4


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" + data[1:]]
)
def test_a_damaged_file_is_compiled_anew_and_replaced(folder, xml, compiled, damage, caplog):
    whole = load_model(xml, 1)
    path = next(folder.glob("*.mjb"))
    path.write_bytes(damage(path.read_bytes()))
    assert_same(load_model(xml, 1), whole)
    assert len(compiled) == 2 and "compiling the model again" in caplog.text
    load_model(xml, 1)
    assert len(compiled) == 2


def test_the_least_recently_used_go_when_it_is_too_much(folder, tmp_path, xml):
    load_model(xml, 1)
    size = next(folder.glob("*.mjb")).stat().st_size
    xmls = [scene(tmp_path / "mesh.obj", size=0.1 + i / 100) for i in range(4)]
    for age, text in enumerate(xmls[:3]):
        load_model(text, 1)
        os.utime(folder / f"{model_cache.digest(text)}.mjb", (age, age))
    load_model(xmls[0], 1)  # used: now the newest
    load_model(xmls[3], 2.5 * size / 1e9)
    kept = {path.stem for path in folder.iterdir()}
    assert kept == {model_cache.digest(xmls[0]), model_cache.digest(xmls[3])}


def test_an_abandoned_unfinished_file_goes_and_a_fresh_one_stays(folder, xml):
    folder.mkdir()
    for name, age in (("old.tmp", 7200), ("new.tmp", 60)):
        (folder / name).write_bytes(b"part")
        os.utime(folder / name, (time.time() - age,) * 2)
    load_model(xml, 1)
    assert {path.suffix for path in folder.iterdir()} == {".mjb", ".tmp"}
    assert [path.name for path in folder.glob("*.tmp")] == ["new.tmp"]


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), RuntimeError("no home directory")])
def test_a_folder_that_is_not_ours_costs_the_cache_only(xml, monkeypatch, caplog, error):
    def refuse():
        raise error

    monkeypatch.setattr(model_cache, "cache_folder", refuse)
    with caplog.at_level(logging.WARNING):
        assert load_model(xml, 1).nmesh == 1
    assert f"compiled models are not kept: {error}" in caplog.text


def test_a_folder_that_cannot_be_written_or_a_full_disk_costs_the_cache_only(folder, xml, monkeypatch, caplog):
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert load_model(xml, 1).nmesh == 1
    assert "was not kept" in caplog.text
    folder.unlink()
    monkeypatch.setattr(mujoco, "mj_saveModel", lambda model, path, buffer: Path(path).write_bytes(b"part"))
    caplog.clear()
    assert load_model(xml, 1).nmesh == 1
    assert "is the disk full" in caplog.text
    assert list(folder.iterdir()) == []  # no half-written file is left
