"""Videos of episodes at the robot's own speed: 20 frames a second, one a simulator step, with what is to be known drawn in.

A rollout renders once a decision, so the chosen episodes are played again by their recorded actions: the physics is equal bit
for bit, which is checked by the outcome and the length.

Not here: which episodes are shown (vla_rl.evaluation.play, vla_rl.evaluate), the simulator (vla_rl.simulation).

H, W: image sides in pixels.
"""

from __future__ import annotations

import logging
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vla_rl.run.failures import one_line
from vla_rl.run.files import written_whole
from vla_rl.types import Episode

log = logging.getLogger(__name__)

CONTROL_HZ = 20  # LIBERO's control frequency: simulator steps per second of robot time
HOLD = 20  # frames that the end stays
WIDTH = 256  # px, the least: smaller images are enlarged
FONT_PX, LINE_PX = 12, 15
BACKGROUND, TEXT = (24, 24, 24), (235, 235, 235)
COLOURS = {True: (64, 200, 96), False: (235, 80, 72)}  # of success and of failure
GRID_WIDTH = 1280  # px, about


@dataclass(frozen=True)
class Recording:
    """An episode that is to be shown."""

    name: str  # of the file, without .mp4
    label: str  # written into it: who acts, and how
    episode: Episode
    actions: np.ndarray  # float32 [steps, 7]
    success: bool
    values: list[float] | None  # V(s) at each decision
    chunk_size: int  # C, steps of a decision


class Replays(Protocol):
    """What of vla_rl.simulation.vector_env.LiberoVectorEnv plays recordings again."""

    def replay(
        self, recordings: Sequence[tuple[Episode, np.ndarray]]
    ) -> Iterator[tuple[np.ndarray, bool, str]]: ...  # frames uint8 [steps + 1, H, W, 3], success, instruction


def write_replays(
    envs: Replays,
    recordings: Sequence[Recording],
    folder: Path,
    max_steps: int,
    before_each: Callable[[], None] = lambda: None,
) -> list[Path]:
    """An MP4 of each recording: folder/NAME.mp4.

    No failure of a picture ends a run: a video that cannot be written is a warning, and so is an episode that goes otherwise
    than it was recorded.

    Args:
        max_steps: the step limit, drawn in.
        before_each: called before each replay; may raise to stop.

    Returns:
        The files written, in order.
    """
    written = []
    played = envs.replay([(recording.episode, recording.actions) for recording in recordings])
    for recording in recordings:
        before_each()
        frames, success, instruction = next(played)
        path = folder / f"{recording.name}.mp4"
        if (success, len(frames) - 1) != (recording.success, len(recording.actions)):
            log.warning(
                "%s: played again, the episode ended with success=%s after %d steps, recorded was success=%s after %d",
                *(path, success, len(frames) - 1, recording.success, len(recording.actions)),
            )
        try:
            write_video(annotate(frames, recording, instruction, max_steps), path, fps=CONTROL_HZ)
            written.append(path)
        except Exception as error:
            log.warning("no video %s: %s", path, one_line(error))
    return written


# -------------------------------------------------------------------------------------------------------------- drawing


@cache
def font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT_PX)


def annotate(frames: np.ndarray, recording: Recording, instruction: str, max_steps: int) -> list[np.ndarray]:
    """Frames with a strip below: instruction, who acts, step, V(s), and at the end the outcome, which stays for a second.

    Args:
        frames: uint8 [steps + 1, H, W, 3].

    Returns:
        uint8 [H', W', 3] each, W' at least 256, both even.
    """
    last = len(frames) - 1
    texts = []
    for step in range(last + 1):
        decision = min(step, max(last - 1, 0)) // recording.chunk_size  # the end is no decision: the last value stays
        value = recording.values[decision] if recording.values and decision < len(recording.values) else None
        texts.append(f"step {step}/{max_steps}" + ("" if value is None else f"   V(s) {value:.2f}"))
    drawn = [
        draw(frame, instruction, recording.label, text, recording.success if step == last else None)
        for step, (frame, text) in enumerate(zip(frames, texts, strict=True))
    ]
    return drawn + drawn[-1:] * HOLD


def draw(frame: np.ndarray, instruction: str, label: str, text: str, outcome: bool | None) -> np.ndarray:
    """One frame, enlarged to at least 256 px, with the strip; outcome colours a border, None draws none."""
    scale = max(1, WIDTH // frame.shape[1])
    frame = frame.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = (side - side % 2 for side in frame.shape[:2])
    lines = textwrap.wrap(instruction, width=max(20, width // 6), max_lines=3)
    strip = (3 + 2) * LINE_PX + 8  # as high for every instruction, so that videos stand side by side
    strip += strip % 2
    picture = Image.new("RGB", (width, height + strip), BACKGROUND)
    picture.paste(Image.fromarray(frame[:height, :width]), (0, 0))
    pen = ImageDraw.Draw(picture)
    for row, line in enumerate([*lines, *[""] * (3 - len(lines)), label, text]):
        pen.text((6, height + 3 + row * LINE_PX), line, fill=TEXT, font=font())
    if outcome is not None:
        word = "SUCCESS" if outcome else "FAILURE"
        pen.rectangle((0, 0, width - 1, height - 1), outline=COLOURS[outcome], width=4)
        right = width - 6 - pen.textlength(word, font=font())
        pen.text((right, height + 3 + 4 * LINE_PX), word, fill=COLOURS[outcome], font=font())
    return np.asarray(picture)


# -------------------------------------------------------------------------------------------------------------- writing


def write_video(frames: Sequence[np.ndarray], path: Path, fps: float) -> None:
    """H.264 MP4 that browsers play as it loads, whole or not at all.

    Args:
        frames: uint8 [H, W, 3] each; odd sides lose a pixel.

    Raises:
        OSError: the folder cannot be made or written, or ffmpeg is not there.
        RuntimeError: ffmpeg failed; the message is its own.
    """
    height, width = (side - side % 2 for side in frames[0].shape[:2])
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    run_ffmpeg(source, path, b"".join(frame[:height, :width].tobytes() for frame in frames))


def write_grid(videos: Sequence[Path], path: Path) -> None:
    """Videos side by side in rows, as one; each stays at its end until the longest has ended.

    Args:
        videos: of equal size, or alike.

    Raises:
        as write_video.
    """
    columns = next(n for n in range(1, len(videos) + 1) if n * n >= len(videos))
    width, height, _ = video_size(videos[0])
    shrunk = min(1.0, GRID_WIDTH / columns / width)
    width, height = (int(side * shrunk) // 2 * 2 for side in (width, height))
    frames = max(video_size(video)[2] for video in videos)
    filters, names, places = [], "", []
    for i in range(len(videos)):
        filters.append(
            f"[{i}]scale={width}:{height},setsar=1,tpad=stop_mode=clone:stop=-1,trim=end_frame={frames},setpts=PTS-STARTPTS[v{i}]"
        )
        names += f"[v{i}]"
        places.append(f"{i % columns * width}_{i // columns * height}")
    stack = (
        f"{names}xstack=inputs={len(videos)}:layout={'|'.join(places)}:fill=black" if len(videos) > 1 else "[v0]null"
    )
    source = [word for video in videos for word in ("-i", f"file:{Path(video).absolute()}")]
    run_ffmpeg([*source, "-filter_complex", ";".join([*filters, stack])], path)


def video_size(path: Path) -> tuple[int, int, int]:
    """Width and height in pixels, and the number of frames, of a video of write_video.

    Raises:
        OSError, RuntimeError: it cannot be read.
    """
    from imageio_ffmpeg import count_frames_and_secs, read_frames

    reader = read_frames(str(Path(path).absolute()))
    width, height = next(reader)["size"]
    reader.close()
    return width, height, count_frames_and_secs(str(Path(path).absolute()))[0]


def run_ffmpeg(arguments: list[str], path: Path, pixels: bytes = b"") -> None:
    """What the arguments read, encoded into a file that is whole or not there."""
    from imageio_ffmpeg import get_ffmpeg_exe

    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "23", "-movflags", "+faststart", "-f", "mp4"]
    with written_whole(path) as unfinished:
        # file: and an absolute path, else a folder "a:b" is a protocol and "-x" an option
        command = [get_ffmpeg_exe(), "-y", "-v", "error", *arguments, *encoding, f"file:{unfinished.absolute()}"]
        # in a session of its own: Ctrl-C is for the run, which ends when it has saved
        ffmpeg = subprocess.run(command, input=pixels, capture_output=True, start_new_session=True)
        if ffmpeg.returncode != 0:
            said = ffmpeg.stderr.decode(errors="replace").strip()
            raise RuntimeError(f"ffmpeg ended with status {ffmpeg.returncode}: {said[-300:]}")
