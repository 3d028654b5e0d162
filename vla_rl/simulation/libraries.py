"""What LIBERO, robosuite and numba find when they are imported: settings of the process, places to write, what is missing.

robosuite 1.4.0 opens /tmp/robosuite.log, one file for all users of a machine, and lets numba keep compiled functions beside
the sources or in the user's cache folder, which a process may have no right to. LIBERO looks for paths in the home folder.

Not here: OpenGL (vla_rl.simulation.opengl), compiled models (vla_rl.simulation.model_cache).
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vla_rl.simulation.opengl import choose_backend, imported_rendering_errors, prepare_opengl

if TYPE_CHECKING:
    from vla_rl.simulation.simulator import Simulator

log = logging.getLogger(__name__)


def import_simulator() -> type[Simulator]:
    """The Simulator class, with everything that its libraries need at hand; takes seconds the first time.

    Raises:
        RenderingError: OpenGL cannot be used.
        ModuleNotFoundError: a package is missing or not whole; says which and what to run.
        Exception: whatever else a library says when it is imported, in its own words.
    """
    prepare_simulator()
    with naming_missing_modules(), imported_rendering_errors():
        from vla_rl.simulation.simulator import Simulator
    return Simulator


def prepare_simulator() -> None:
    """For a process that will simulate, before MuJoCo or robosuite is imported; as prepare_environment, and what costs time.

    Raises:
        RenderingError: there is no device to draw on.
    """
    prepare_environment()
    prepare_opengl()
    give_numba_a_cache()
    give_matplotlib_a_folder()


def prepare_environment() -> None:
    """Settings of the process that LIBERO and robosuite read while they are imported. Imports nothing."""
    choose_backend()
    # Data come from the installed package, whatever another LIBERO has left in the home folder
    os.environ["LIBERO_CONFIG_PATH"] = os.devnull
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it recommends private macro files
    if not any(isinstance(finder, RobosuiteFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, RobosuiteFinder())


# robosuite


class RobosuiteFinder:
    """Finds two of robosuite's modules as Python does, and changes what they do while they are imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        change = {"robosuite.macros": log_to_no_file, "robosuite.utils.binding_utils": choose_no_device}.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if change else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: change(execute, module)
        return spec


def log_to_no_file(execute: Callable[[ModuleType], None], macros: ModuleType) -> None:
    """robosuite.macros: no /tmp/robosuite.log, and no cache of compiled functions where there is no place for one."""
    execute(macros)
    macros.FILE_LOGGING_LEVEL = None
    macros.CACHE_NUMBA = macros.CACHE_NUMBA and os.environ.get("NUMBA_CACHE_DIR") != NO_CACHE


def choose_no_device(execute: Callable[[ModuleType], None], binding_utils: ModuleType) -> None:
    """robosuite.utils.binding_utils: it wants MUJOCO_EGL_DEVICE_ID to be a part of CUDA_VISIBLE_DEVICES, of which it is none."""
    device = os.environ.pop("MUJOCO_EGL_DEVICE_ID", None)
    try:
        execute(binding_utils)
    finally:
        if device is not None:
            os.environ["MUJOCO_EGL_DEVICE_ID"] = device


# numba

NO_CACHE = os.devnull  # NUMBA_CACHE_DIR where nothing can be written


def give_numba_a_cache() -> None:
    """Sets NUMBA_CACHE_DIR to a folder of this user's where neither of numba's own places can be written.

    These are __pycache__ beside the functions that robosuite and arm_control compile, and the user's cache folder.
    """
    if os.environ.get("NUMBA_CACHE_DIR"):
        return
    robosuite = importlib.util.find_spec("robosuite")
    sources = [Path(__file__).parent]
    if robosuite is not None and robosuite.submodule_search_locations:
        sources.append(Path(robosuite.submodule_search_locations[0]) / "utils")
    if all(is_writable(folder / "__pycache__") for folder in sources):
        return
    if can_write_in_home("XDG_CACHE_HOME", ".cache", "numba"):
        return
    folder = private_folder("numba")
    if folder is None:
        log.warning(
            "nowhere to keep compiled functions: each process compiles them anew; NUMBA_CACHE_DIR names a place"
        )
    os.environ["NUMBA_CACHE_DIR"] = NO_CACHE if folder is None else str(folder)
    if "numba" in sys.modules:  # it has read the variable already
        sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]


def give_matplotlib_a_folder() -> None:
    """Sets MPLCONFIGDIR where its place in the home cannot be written: it would make a folder a process, and say so each time.

    robosuite imports it; nothing is drawn with it.
    """
    if os.environ.get("MPLCONFIGDIR") or can_write_in_home("XDG_CONFIG_HOME", ".config", "matplotlib"):
        return
    folder = private_folder("matplotlib")
    if folder is not None:
        os.environ["MPLCONFIGDIR"] = str(folder)


def can_write_in_home(variable: str, default: str, name: str) -> bool:
    """Whether files can be made in the folder `name` of the user's folder for configuration or caches."""
    parent = os.path.expanduser(os.environ.get(variable) or f"~/{default}")
    return os.path.isabs(parent) and is_writable(Path(parent) / name)  # the ~ of a user without a home stays


def private_folder(name: str) -> Path | None:
    """A folder for temporary files that this user alone can write, kept for the next process; None where there is no place."""
    try:
        name = f"vla_rl_{name}_{os.getuid()}"
        folder = Path(tempfile.gettempdir()) / name
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
        if ours and is_writable(folder):  # what is read from it is executed
            return folder
        folder = Path(tempfile.mkdtemp(prefix=f"{name}_"))
    except OSError:
        return None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_writable(folder: Path) -> bool:
    """Whether files can be made in it; as numba tries it, since access() is wrong on read-only mounts and for root."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


# What is missing


@contextlib.contextmanager
def naming_missing_modules() -> Iterator[None]:
    """A ModuleNotFoundError that is raised inside says what is missing of which package, and what to run."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None:
            raise
        raise ModuleNotFoundError(missing_module(error.name), name=error.name) from error


def missing_module(name: str) -> str:
    """What to do about a module that is not there: its package is not installed, or not all of it."""
    package = name.split(".")[0]
    try:
        there = package != name and importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        there = False
    if not there:
        return f"{name} is not installed; run: pip install -r requirements.txt"
    distribution = (importlib.metadata.packages_distributions().get(package) or [package])[0]
    return (
        f"the module {name} is missing: the installed package {distribution} is not whole; "
        f"run: pip install --force-reinstall --no-deps {distribution}, then pip install -r requirements.txt"
    )
