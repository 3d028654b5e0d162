"""TensorBoard files in RUN/tensorboard, which get what metrics.jsonl gets, and tables and videos of evaluations.

    pip install tensorboard; tensorboard --logdir runs

Written by tensorboardX, synchronously: what is logged is on the disk.
"""

from __future__ import annotations

import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_rl.reports.task_table import TASKS, TaskSuccess, as_markdown, video_names
from vla_rl.run.settings import Config, ConfigError
from vla_rl.run.sft_settings import SftConfig


class TensorBoard:
    """Event files of a run folder; each start adds one.

    Raises:
        ConfigError: tensorboardX is not installed.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, config: Config | SftConfig):
        try:
            import tensorboardX.event_file_writer  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"logging.tensorboard=true, but {error}; pip install -r requirements.txt, or set logging.tensorboard=false"
            ) from None
        self.folder = folder / "tensorboard"
        self.x_name = "timesteps" if isinstance(config, Config) else "step"
        self.open()

    def open(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        self.folder.mkdir(exist_ok=True)
        # TensorBoard reads the files in the order of their names: the second, the host, and how many were there
        number = len(list(self.folder.glob("events.*")))
        self.writer = EventsWriter(str(self.folder / "events"), filename_suffix=f".{number:04d}")

    def log(self, record: dict[str, Any]) -> None:
        from tensorboardX.summary import scalar

        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("iteration", self.x_name):
                self.write(record[self.x_name], summary=scalar(name, value))
        self.writer.flush()

    def log_evaluation(self, record: dict[str, Any], rows: Sequence[TaskSuccess], videos: Sequence[Path]) -> None:
        """The table of tasks as text, and the videos as pictures that move, since TensorBoard plays no others."""
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text

        self.write(record[self.x_name], summary=text(TASKS, as_markdown(rows)))
        for name, path in video_names(videos).items():
            gif = as_gif(path)
            width, height = struct.unpack("<HH", gif[6:10])
            picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=gif)
            self.write(record[self.x_name], summary=Summary(value=[Summary.Value(tag=name, image=picture)]))
        self.writer.flush()

    def supersede(self, earlier: list[dict[str, Any]], first_later: int) -> None:
        """From here on TensorBoard shows no older points at or after `first_later` but those of the lines that count."""
        from tensorboardX.proto.event_pb2 import SessionLog

        self.close()
        self.open()
        self.write(first_later, session_log=SessionLog(status=SessionLog.START))
        for record in earlier:
            if record[self.x_name] >= first_later:  # the training of an iteration whose evaluation is done again
                self.log(record)
        self.writer.flush()

    def write(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.writer.write_event(Event(wall_time=time.time(), step=step, **what))

    def close(self) -> None:
        self.writer.close()


def as_gif(video: Path) -> bytes:
    """A video at 5 frames a second and at most 192 pixels wide.

    Raises:
        RuntimeError: ffmpeg failed; the message is its own.
    """
    from imageio_ffmpeg import get_ffmpeg_exe

    small = "fps=5,scale='min(192,iw)':-1,split[a][b];[a]palettegen[p];[b][p]paletteuse"
    command = [get_ffmpeg_exe(), "-v", "error", "-i", f"file:{video.absolute()}", "-vf", small, "-f", "gif", "-"]
    # in a session of its own: Ctrl-C is for the run
    ffmpeg = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True)
    if ffmpeg.returncode != 0:
        raise RuntimeError(f"{video.name}: ffmpeg said {ffmpeg.stderr.decode(errors='replace').strip()[-200:]}")
    return ffmpeg.stdout
