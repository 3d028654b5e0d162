"""Files and folders that are there whole or not at all, lines that wait for a disk, what somebody else wrote read with a bound."""

from __future__ import annotations

import json
import logging
import os
import pickletools
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from vla_rl.run.failures import one_line
from vla_rl.run.machine import available_memory
from vla_rl.run.settings import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
JSON_BYTES = 4_000_000  # the index of a 7B model has 100 kB, its config.json with the statistics of 27 data sets 130
JSON_DEPTH = 50  # of lists in objects in lists; none of ours has 10
# what torch.save names in a file of tensors and plain values
PICKLED = {
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *(
        f"torch {kind}Storage"
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
}
MAX_PICKLE_BYTES = 50_000_000  # of a trainer.pt's names and numbers; that of a 7B run has 0.5 MB
MAX_HEADER_BYTES = 10_000_000  # of a safetensors file; a shard of a 7B model has 40 kB
MAX_NAME = 200  # characters of a data set's or a tensor's
FLOATS = ("F64", "F32", "F16", "BF16")  # other safetensors types are quantized: their values alone mean nothing


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to; renamed to it at the end, removed where the writing failed."""
    unfinished = path.with_name(f".{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        with suppress(OSError):  # nothing torn stays
            unfinished.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` to fill; renamed to it, which must not be there, at the end, removed where that failed."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """The file has the old text or the new one, at any time."""
    with written_whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


class Outage:
    """What cannot be written for a while, a disk being full, read-only or gone, ends no run: it is said once, and once more when
    it is written again.

    Args:
        what: is written, in the plural.
        meanwhile: what becomes of it.

    Attributes:
        failing: whether the last attempt failed.
    """

    def __init__(self, what: str, meanwhile: str):
        self.what, self.meanwhile = what, meanwhile
        self.failing = False

    def survive(self, write: Callable[[], T]) -> T | None:
        """What `write` returns; None where it raised an OSError."""
        try:
            written = write()
        except OSError as error:
            if not self.failing:
                log.warning("%s cannot be written (%s): %s", self.what, error.strerror or error, self.meanwhile)
            self.failing = True
            return None
        if self.failing:
            log.warning("%s are written again", self.what)
        self.failing = False
        return written


class Lines:
    """Lines at the end of a file, on the disk as soon as they are written. Those that cannot be wait in memory, and are written in
    their order before the next one, none twice.

    Args:
        path: of the file, which the first line makes, in a folder that is there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []
        self._whole: int | None = None  # bytes of the file before an attempt that failed, which may have left a part

    def append(self, line: str) -> None:
        """Takes a line; `write` writes it."""
        self.waiting.append(line)

    def write(self) -> None:
        """Writes what waits.

        Raises:
            OSError: it cannot; it waits on.
        """
        if not self.waiting:
            return
        with self.path.open("ab") as file:
            if self._whole is not None and file.tell() > self._whole:
                file.truncate(self._whole)
                file.seek(0, os.SEEK_END)
            self._whole = file.tell()
            file.write("".join(f"{line}\n" for line in self.waiting).encode())
            file.flush()
            os.fsync(file.fileno())
        self.waiting.clear()
        self._whole = None


# ------------------------------------------------------------------------------------------------ what somebody else wrote


def read_bytes(path: Path, most: int, way_out: str = "download it again") -> bytes:
    """The content of a file that is told to be small.

    Args:
        most: bytes; no more are read.
        way_out: the end of an error's line.

    Raises:
        ConfigError: it is no file, a pointer, larger, or cannot be read.
    """
    refuse_lfs_pointer(path)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); it must be a file that you may read") from None
    if len(content) > most:
        raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, expected at most {most:,}; {way_out}")
    return content


def read_json(path: Path, way_out: str = "download it again") -> dict[str, Any]:
    """Raises ConfigError where the file cannot be read, is too large or too deep, or is no JSON object."""
    content = read_bytes(path, JSON_BYTES, way_out)
    try:
        value = json.loads(content.decode("utf-8"))
        refuse_depth(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({one_line(error)}); {way_out}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}; {way_out}")
    return value


def refuse_depth(value: Any) -> None:
    """Raises ValueError for lists in lists in lists, over which whatever looks at them later would stumble."""
    level = [value]
    for _ in range(JSON_DEPTH):
        containers = [v for v in level if isinstance(v, dict | list)]
        level = [inner for v in containers for inner in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return
    raise ValueError(f"it is nested more than {JSON_DEPTH} deep")


def refuse_lfs_pointer(path: Path) -> None:
    """The first look into each file of a checkpoint: raises ConfigError where it is none, cannot be opened or is a pointer."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # opening a pipe would wait for ever
            raise ConfigError(f"{path} is a device or pipe, expected a file")
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, ConfigError):
            raise
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read ({said}); it must be a file that you may read") from None
    if start == LFS_POINTER:
        raise ConfigError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


# values


Count = Annotated[int, Field(ge=0, lt=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """Values of these types and no others."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


S = TypeVar("S", bound=Strict)


def checked(kind: type[S], value: Any) -> S:
    """Raises ValueError, with the first thing that is wrong, where a value is not of a kind. Names that the kind has not may be there."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(f"{name}: {first['msg']}, got {first['input']!r:.60}") from None


# tensors


def open_tensors(path: Path, device: str = "cpu") -> safe_open:
    """Maps the file; nothing of its values is read.

    Raises:
        ConfigError: it is a pointer, cut off or no safetensors, or claims more than it has.
    """
    refuse_lfs_pointer(path)
    try:
        with path.open("rb") as plain:
            header = int.from_bytes(plain.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise ValueError(f"its header claims {header:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
        file = safe_open(path, framework="pt", device=device)
    except (
        SafetensorError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # RuntimeError: torch's, of what cannot be mapped
        raise ConfigError(f"{path} is cut off or no safetensors file ({one_line(error)}); download it again") from None
    refuse_names(file.keys(), path)
    return file


def all_tensors(path: Path, file: safe_open) -> dict[str, Tensor]:
    """The tensors of a file that is not a model's, on the CPU.

    Raises:
        ConfigError: it is larger than the memory, or a tensor is not of a floating type.
    """
    try:
        refuse_too_large(path)
        for name in file.keys():  # noqa: SIM118  safe_open is not a dict
            if file.get_slice(name).get_dtype() not in FLOATS:
                raise ValueError(f"{name} is {file.get_slice(name).get_dtype()}, expected {' or '.join(FLOATS)}")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ValueError as error:
        raise ConfigError(f"{path} cannot be used ({error}); download it again") from None


def refuse_names(names: Iterable[str], path: Path) -> None:
    """Raises ConfigError for a name that would break a message's line."""
    for name in names:
        if not name.isprintable() or len(name) > MAX_NAME:
            raise ConfigError(f"{path} has the name {name!r:.60}, expected printable ones; download it again")


def load_torch(path: Path) -> Any:
    """Tensors and plain values that torch.save wrote, on the CPU. No code is executed, and no more is made than the file has.

    torch's own weights_only executes nothing either, but lets a small file ask for as much memory as it likes.

    Raises:
        Exception: of the file system, pickle, zip files and torch, and ValueError: it is torn, too large or another program's.
    """
    refuse_too_large(path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, as torch.save never does")
        if len({entry.filename.lower() for entry in entries}) != len(entries):
            raise ValueError("it has a part twice")
        for entry in entries:
            if entry.filename.rpartition("/")[2] == "data.pkl":
                refuse_pickle(archive, entry)
    import torch  # here: settings are read from files, too, before anything heavy is imported

    value = torch.load(path, map_location="cpu", weights_only=True)
    refuse_repeats(value)
    return value


def refuse_pickle(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    if entry.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"its list of tensors has {entry.file_size:,} bytes, expected at most {MAX_PICKLE_BYTES:,}")
    for operation, name, _ in pickletools.genops(archive.read(entry)):
        if "GLOBAL" in operation.name and name not in PICKLED:
            raise ValueError(
                f"it asks for {name!r:.80}: expected tensors and plain values, and loads with weights_only"
            )


def refuse_repeats(value: Any) -> None:
    """Raises ValueError for a container within itself or in two places: what walks through it would not end, or not soon; and for
    a tensor that claims more numbers than it has bytes for."""
    from torch import Tensor

    seen, level = set(), [value]
    while level:
        values, level = level, []
        for item in values:
            if isinstance(item, Tensor) and item.nbytes > item.untyped_storage().nbytes():
                raise ValueError(
                    f"a tensor claims the shape {list(item.shape)} with {item.untyped_storage().nbytes()} bytes"
                )
            if isinstance(item, dict | list | tuple) and item:
                if id(item) in seen:
                    raise ValueError("a list or dict is in it twice")
                seen.add(id(item))
                level += item.values() if isinstance(item, dict) else item


def refuse_too_large(path: Path) -> None:
    """Before a file is read whole: raises ValueError where it is none, or has more bytes than there is free memory."""
    size, free = path.stat().st_size, available_memory()
    if not path.is_file():
        raise ValueError("it is a folder, device or pipe")
    if size > free:
        raise ValueError(f"it has {size / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB of memory that are free")
