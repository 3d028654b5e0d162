"""OpenGL without a screen: which back-end draws, on which EGL device, and which errors are its own.

MuJoCo and robosuite read MUJOCO_GL, PYOPENGL_PLATFORM and MUJOCO_EGL_DEVICE_ID. robosuite 1.4.0 also takes the first number
in CUDA_VISIBLE_DEVICES for the index of an EGL device, which it is not: EGL has an order of its own, and in a container
often one device only. So the index is found here, by asking the driver, and handed to both as MUJOCO_EGL_DEVICE_ID.

Not here: drawing (vla_rl.simulation.rendering). No MuJoCo, robosuite or PyOpenGL: they are imported after this was called.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vla_rl.types import RenderingError

log = logging.getLogger(__name__)

GL_PACKAGES = "libegl1 libgl1 libgl1-mesa-dri libglib2.0-0"
# modules that do nothing but OpenGL: an error with one of them on its stack is OpenGL's
GL_MODULES = ("OpenGL", "glfw", "mujoco.gl_context", "mujoco.egl", "mujoco.osmesa", "mujoco.glfw")
GL_MODULES += ("robosuite.renderers.context",)
GL_LIBRARIES = (
    r"lib(EGL|GL|GLX|GLdispatch|OpenGL|OSMesa|gthread|glib)\b[\w.-]*\.so"  # of GL_PACKAGES; OpenCV needs some too
)
MAX_DEVICES = 10  # that mujoco.egl and robosuite ask for (egl_ext.py)
EGL_CUDA_DEVICE_NV, EGL_DEVICE_UUID_EXT = 0x323A, 0x335C  # of EGL_NV_device_cuda and EGL_EXT_device_persistent_id


def choose_backend() -> str:
    """Settles MUJOCO_GL, "egl" unless it is set, and PYOPENGL_PLATFORM, which must not contradict it."""
    backend = os.environ["MUJOCO_GL"] = (os.environ.get("MUJOCO_GL") or "egl").strip().lower()
    platform = backend if backend in ("osmesa", "glx") else "egl"  # robosuite takes EGL for every other name
    given = os.environ.get("PYOPENGL_PLATFORM")
    if given and given.lower() != platform:
        log.warning("PYOPENGL_PLATFORM=%s contradicts MUJOCO_GL=%s; %s is used", given, backend, platform)
        os.environ["PYOPENGL_PLATFORM"] = platform
    return platform


def prepare_opengl() -> None:
    """Settles what this process draws with; to be called before MuJoCo is imported.

    Raises:
        RenderingError: EGL is missing or shows no device, or MUJOCO_EGL_DEVICE_ID is none of them.
    """
    if choose_backend() != "egl":
        return
    with rendering_errors():
        devices = egl_devices()
    index = chosen_device(devices, os.environ.get("MUJOCO_EGL_DEVICE_ID"), os.environ.get("CUDA_VISIBLE_DEVICES"))
    os.environ["MUJOCO_EGL_DEVICE_ID"] = str(index)


# The device


@dataclass(frozen=True)
class EglDevice:
    """What the driver says of an EGL device."""

    cuda: int | None = None  # CUDA's number for it, which counts visible devices only; None: not CUDA's, or not visible
    uuid: str | None = None  # "1a2b3c4d-...", as in GPU-1a2b3c4d-...


def chosen_device(devices: Sequence[EglDevice], given: str | None, visible: str | None) -> int:
    """The index of the device to draw on: the given one, or that of the first visible CUDA device, or the first.

    Args:
        given: MUJOCO_EGL_DEVICE_ID.
        visible: CUDA_VISIBLE_DEVICES.

    Raises:
        RenderingError: there is none, or not the given one.
    """
    there = f"EGL shows {len(devices)} device{'' if len(devices) == 1 else 's'}"
    if not devices:
        raise missing_gl(there)
    if given:
        if not given.strip().isdecimal() or int(given) >= len(devices):
            raise RenderingError(
                f"MUJOCO_EGL_DEVICE_ID={given} is no EGL device; {there}, expected "
                f"{'0' if len(devices) == 1 else f'0 to {len(devices) - 1}'}; unset it to draw on the first visible CUDA device"
            )
        return int(given)
    index = device_of_cuda(devices, visible)
    if index is not None:
        log.info("drawing on EGL device %d of %d: it is the first visible CUDA device", index, len(devices))
        return index
    guessed = len(devices) > 1 and first_visible(visible) is not None and any(d.cuda is not None for d in devices)
    log.log(
        logging.WARNING if guessed else logging.INFO,
        "drawing on EGL device 0: %s, and none is known to be CUDA's first visible one (CUDA_VISIBLE_DEVICES=%s); "
        "MUJOCO_EGL_DEVICE_ID chooses another",
        *(there, visible),
    )
    return 0


def device_of_cuda(devices: Sequence[EglDevice], visible: str | None) -> int | None:
    """The index of the device that CUDA, and so torch, calls 0; None where no device says so."""
    name = first_visible(visible)
    if name is None:
        return None
    gpu = re.match(r"(?:MIG-)?GPU-([\da-f-]+)", name, re.IGNORECASE)  # MIG-1a2b... names a slice, not its GPU
    if gpu:
        uuid = gpu[1].lower()  # may be cut short, as CUDA allows
        same = [i for i, device in enumerate(devices) if device.uuid and device.uuid.lower().startswith(uuid)]
        if len(same) == 1:
            return same[0]
    numbers = [device.cuda for device in devices]
    numbered = len(numbers) - numbers.count(None)
    # CUDA numbers what is visible from 0; a driver that numbers more than that is counting all of its devices
    counts_all = visible is not None and numbered > len(visible.split(","))
    if counts_all and not name.isdecimal():
        return None
    wanted = int(name) if counts_all else 0
    return numbers.index(wanted) if wanted in numbers else None


def first_visible(visible: str | None) -> str | None:
    """CUDA's name for its first visible device: a number, GPU-... or MIG-...; None where CUDA sees none.

    CUDA takes no notice of what follows a name that is no device of its own: "-1" hides all of them.
    """
    if visible is None:
        return "0"
    name = visible.split(",")[0].strip()
    return name if name.isdecimal() or name.upper().startswith(("GPU-", "MIG-")) else None


def egl_devices() -> list[EglDevice]:
    """What the installed EGL drivers show, in EGL's order.

    Raises:
        OSError: libEGL is not installed.
        RuntimeError: it cannot list devices.
    """
    egl = ctypes.CDLL("libEGL.so.1")
    address = egl.eglGetProcAddress
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.c_char_p]

    def function(name: str, *arguments: type) -> ctypes._CFuncPtr | None:
        found = address(name.encode())
        return ctypes.CFUNCTYPE(ctypes.c_uint, *arguments)(found) if found else None

    device, number = ctypes.c_void_p, ctypes.c_int
    query_devices = function("eglQueryDevicesEXT", number, ctypes.POINTER(device), ctypes.POINTER(number))
    query_number = function("eglQueryDeviceAttribEXT", device, number, ctypes.POINTER(ctypes.c_ssize_t))
    query_binary = function("eglQueryDeviceBinaryEXT", device, number, number, ctypes.c_void_p, ctypes.POINTER(number))
    if query_devices is None:
        raise RuntimeError("eglQueryDevicesEXT is not available")
    handles, count = (device * MAX_DEVICES)(), number()
    if not query_devices(MAX_DEVICES, handles, ctypes.byref(count)):
        raise RuntimeError("eglQueryDevicesEXT failed")

    devices = []
    for handle in handles[: count.value]:
        cuda, uuid, size = ctypes.c_ssize_t(), (ctypes.c_ubyte * 16)(), number()
        known = query_number is not None and query_number(handle, EGL_CUDA_DEVICE_NV, ctypes.byref(cuda))
        named = query_binary is not None and query_binary(handle, EGL_DEVICE_UUID_EXT, 16, uuid, ctypes.byref(size))
        digits = bytes(uuid).hex()
        devices.append(
            EglDevice(
                cuda=cuda.value if known and cuda.value >= 0 else None,
                uuid="-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
                if named
                else None,
            )
        )
    return devices


# Errors


@contextlib.contextmanager
def rendering_errors() -> Iterator[None]:
    """Around calls of OpenGL and EGL, and of nothing else: what they raise becomes a RenderingError with the way out."""
    try:
        yield
    except (RenderingError, ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:
        raise missing_gl(error) from error


@contextlib.contextmanager
def imported_rendering_errors() -> Iterator[None]:
    """Around imports that import OpenGL among other things: its errors become RenderingErrors, others stay what they are."""
    try:
        yield
    except Exception as error:
        if is_of_opengl(error):
            raise missing_gl(error) from error
        raise


def is_of_opengl(error: Exception) -> bool:
    """Whether OpenGL's modules have raised it, or one of its libraries is what could not be loaded."""
    if isinstance(error, (RenderingError, ModuleNotFoundError, MemoryError)):
        return False
    if isinstance(error, (ImportError, OSError)) and re.search(GL_LIBRARIES, str(error)):
        return True
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(f"{module}.".startswith(f"{name}.") for module in modules for name in GL_MODULES)


def missing_gl(error: Exception | str) -> RenderingError:
    return RenderingError(
        f"cannot render with MUJOCO_GL={os.environ['MUJOCO_GL']}: {error}\n"
        f"  install the system libraries: apt-get install -y {GL_PACKAGES}\n"
        "  or render in software: apt-get install -y libosmesa6 and set MUJOCO_GL=osmesa"
    )
