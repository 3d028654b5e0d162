"""Videos can be watched in a browser, tell what is shown, and never end a run."""

import logging
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from vla_rl.evaluation.videos import (
    COLOURS,
    HOLD,
    Recording,
    annotate,
    draw,
    video_size,
    write_grid,
    write_replays,
    write_video,
)
from vla_rl.types import Episode

INSTRUCTION = "pick up the black bowl between the plate and the ramekin and place it on the plate"


def decode(path) -> tuple[list[np.ndarray], dict]:
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader], meta


def recorded(name="x", steps=3, success=True, values=None, state=0) -> Recording:
    return Recording(name, "tiny, greedy", Episode(0, state, 0), np.zeros((steps, 7), np.float32), success, values, 2)


class Replays:
    """Grey frames, brighter at each step; the outcome is told by the state."""

    def __init__(self, shape=(64, 64, 3), steps=None):
        self.shape, self.steps, self.asked = shape, steps, []

    def replay(self, recordings):
        for episode, actions in recordings:
            self.asked.append(episode)
            count = (len(actions) if self.steps is None else self.steps) + 1
            frames = np.stack([np.full(self.shape, 20 + 30 * step, np.uint8) for step in range(count)])
            yield frames, episode.initial_state % 2 == 0, INSTRUCTION


def test_a_video_has_a_frame_a_step_at_the_speed_of_the_robot_and_stays_at_its_end(tmp_path):
    (path,) = write_replays(Replays(), [recorded()], tmp_path / "videos", 220)
    frames, meta = decode(path)
    assert path == tmp_path / "videos/x.mp4" and [p.name for p in path.parent.iterdir()] == ["x.mp4"]
    assert meta["fps"] == 20 and len(frames) == 4 + HOLD
    assert meta["size"] == (256, 340)  # 64 px four times, and the strip
    for step, frame in enumerate(frames[:4]):  # colours go through YUV and compression
        np.testing.assert_allclose(frame[20:230, 20:230].mean(), 20 + 30 * step, atol=3)


def test_a_browser_can_play_it_while_it_loads(tmp_path):
    path = tmp_path / "v.mp4"
    write_video([np.full((64, 65, 3), 128, np.uint8)] * 3, path, 20)
    _, meta = decode(path)
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and meta["size"] == (64, 64)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # what it needs to begin comes first


def test_the_strip_tells_the_step_the_value_and_the_outcome(monkeypatch):
    texts = []
    monkeypatch.setattr("vla_rl.evaluation.videos.draw", lambda frame, *said: texts.append(said) or frame)
    shown = annotate(
        np.zeros((6, 8, 8, 3), np.uint8), recorded(steps=5, values=[0.1, 0.25, 0.9], success=False), "go", 9
    )
    assert len(shown) == 6 + HOLD and {said[:2] for said in texts} == {("go", "tiny, greedy")}
    # chunks of 2: decision 0 acts in steps 0 and 1, the last value stays at the end
    assert [said[2] for said in texts] == [
        f"step {step}/9   V(s) {value}" for step, value in enumerate(("0.10", "0.10", "0.25", "0.25", "0.90", "0.90"))
    ]
    assert [said[3] for said in texts] == [None] * 5 + [False]


def test_without_values_nothing_is_said_of_them(monkeypatch):
    texts = []
    monkeypatch.setattr("vla_rl.evaluation.videos.draw", lambda frame, *said: texts.append(said[2]) or frame)
    annotate(np.zeros((2, 8, 8, 3), np.uint8), recorded(steps=1), "go", 9)
    assert texts == ["step 0/9", "step 1/9"]


@pytest.mark.parametrize(("side", "size"), [(256, (256, 340)), (128, (256, 340)), (101, (202, 286)), (300, (300, 384))])
def test_every_frame_of_a_size_gets_the_same_strip_with_light_text(side, size):
    for text in (INSTRUCTION, "go", INSTRUCTION * 4):
        picture = draw(np.zeros((side, side, 3), np.uint8), text, "tiny, greedy", "step 3/220", None)
        assert picture.shape == (size[1], size[0], 3) and picture.dtype == np.uint8
        strip = picture[size[0] :]
        assert 0.005 < (strip > 150).mean() < 0.3  # text, on a dark ground
        assert not picture[: size[0]].any()  # and none on the picture


@pytest.mark.parametrize("outcome", [True, False])
def test_the_outcome_is_a_coloured_border(outcome):
    picture = draw(np.zeros((256, 256, 3), np.uint8), "go", "x", "step 3/220", outcome)
    assert (picture[0, 0] == COLOURS[outcome]).all() and (picture[255, 100] == COLOURS[outcome]).all()
    assert not picture[10:240, 10:240].any()


def test_an_episode_that_goes_otherwise_than_it_was_recorded_is_a_warning(tmp_path, caplog):
    assert (
        len(write_replays(Replays(), [recorded(state=1)], tmp_path, 220)) == 1
    )  # the replay fails, recorded was success
    assert "success=False after 3 steps, recorded was success=True after 3" in caplog.text
    caplog.clear()
    write_replays(Replays(steps=2), [recorded()], tmp_path, 220)
    assert "success=True after 2 steps, recorded was success=True after 3" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        write_replays(Replays(), [recorded()], tmp_path, 220)
    assert caplog.text == ""


def test_a_stop_comes_before_a_replay(tmp_path):
    replays, calls = Replays(), []

    def stop():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_replays(replays, [recorded("a"), recorded("b")], tmp_path, 220, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"] and len(replays.asked) == 1


# grids


def grey(path: Path, level: int, count: int, shape=(64, 64, 3)) -> Path:
    write_video([np.full(shape, level, np.uint8)] * count, path, 20)
    return path


def test_a_grid_lasts_as_long_as_its_longest_video_whose_others_stay_at_their_end(tmp_path):
    levels, counts = (40, 90, 140, 190, 240), (3, 7, 2, 5, 4)
    videos = [
        grey(tmp_path / f"{n}.mp4", level, count) for n, (level, count) in enumerate(zip(levels, counts, strict=True))
    ]
    write_grid(videos, tmp_path / "grid.mp4")
    frames, meta = decode(tmp_path / "grid.mp4")
    assert len(frames) == 7 and meta["fps"] == 20 and meta["size"] == (3 * 64, 2 * 64)
    assert video_size(tmp_path / "grid.mp4") == (192, 128, 7)
    for frame in (frames[0], frames[-1]):
        tiles = [frame[y + 8 : y + 56, x + 8 : x + 56].mean() for y in (0, 64) for x in (0, 64, 128)]
        np.testing.assert_allclose(tiles, [*levels, 0], atol=4)


def test_two_stand_side_by_side_and_many_are_made_smaller(tmp_path):
    videos = [grey(tmp_path / f"{n}.mp4", 60 * n, 2, (40, 800, 3)) for n in range(3)]
    write_grid(videos[:1], tmp_path / "one.mp4")
    write_grid(videos, tmp_path / "three.mp4")
    assert video_size(tmp_path / "one.mp4") == (800, 40, 2)
    assert video_size(tmp_path / "three.mp4") == (1280, 64, 2)  # two columns of 640 px, two rows


# failures


@pytest.mark.parametrize("name", ["a:b", "http:x", "-x", "a b", "100%d", "file:", "'q'", "ä"])
def test_a_relative_folder_of_any_name_gets_its_videos(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (path,) = write_replays(Replays(), [recorded()], Path(name), 220)
    assert len(decode(tmp_path / path)[0]) == 4 + HOLD and [file.name for file in Path(name).iterdir()] == ["x.mp4"]


def test_a_grid_reads_files_of_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b", "-x", "100%d'q'"):
        path = grey(Path(f"{name}.mp4"), 50, 2)
        write_grid([path, path], Path(f"{name}_grid.mp4"))
        assert video_size(Path(f"{name}_grid.mp4")) == (128, 64, 2)


def fake_ffmpeg(script: str):
    def install(folder, monkeypatch):
        (folder / "ffmpeg").write_text(f"#!/bin/sh\nfor last; do :; done\n{script}\n")
        (folder / "ffmpeg").chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(folder / "ffmpeg"))

    return install


def raises(error: Exception):
    def replace(*_):
        raise error

    return lambda folder, monkeypatch: monkeypatch.setattr("vla_rl.run.files.os.replace", replace)


FAILURES = {
    "ffmpeg is not there": (lambda _, patch: patch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg"), "/nowhere/ffmpeg"),
    "ffmpeg cannot be executed": (
        lambda _, patch: patch.setenv("IMAGEIO_FFMPEG_EXE", "/dev/null"),
        "Permission denied",
    ),
    "the package is missing": (lambda _, patch: patch.setitem(sys.modules, "imageio_ffmpeg", None), "imageio_ffmpeg"),
    "it reads nothing": (fake_ffmpeg("echo No such filter >&2; exit 3"), "status 3: No such filter"),
    "the disk is full at the end": (
        fake_ffmpeg('cat >"${last#file:}"; printf "trailer:\nNo space left" >&2; exit 1'),
        "status 1: trailer: No space left",
    ),
    "it is killed": (fake_ffmpeg('echo torn >"${last#file:}"; kill -9 $$'), "status -9"),
    "it writes nothing": (fake_ffmpeg("cat >/dev/null"), "No such file"),
    "no permission": (raises(PermissionError(13, "Permission denied")), "Permission denied"),
    "the folder is a file": (lambda folder, _: (folder / "videos").write_text(""), "videos"),
    "an error without words": (raises(ValueError()), "ValueError"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_video_that_fails_is_one_warning_that_names_it_and_leaves_nothing_torn(
    tmp_path, monkeypatch, caplog, capfd, failure
):
    fail, words = FAILURES[failure]
    fail(tmp_path, monkeypatch)
    assert write_replays(Replays(), [recorded("a"), recorded("b")], tmp_path / "videos", 220) == []
    for record, name in zip(caplog.records, ("a", "b"), strict=True):
        message = record.getMessage()
        assert record.levelname == "WARNING" and "\n" not in message
        assert f"{tmp_path}/videos/{name}.mp4: " in message and words in message
    assert not list(tmp_path.glob("videos/*")) and not list(tmp_path.glob("videos/.*"))
    assert capfd.readouterr().err == ""  # ffmpeg itself says nothing on the terminal


def test_a_failed_video_does_not_keep_the_next_from_being_written(tmp_path):
    (tmp_path / "a.mp4").mkdir()  # in the way
    (path,) = write_replays(Replays(), [recorded("a"), recorded("b")], tmp_path, 220)
    assert path.name == "b.mp4" and len(decode(path)[0]) == 4 + HOLD
    assert len(list(tmp_path.iterdir())) == 2


def test_a_stop_while_a_video_is_written_still_stops(tmp_path, monkeypatch):
    raises(KeyboardInterrupt())(tmp_path, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        write_replays(Replays(), [recorded()], tmp_path / "videos", 220)
    assert not list((tmp_path / "videos").iterdir())
