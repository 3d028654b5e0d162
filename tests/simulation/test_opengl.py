"""OpenGL without a screen: the device for made-up drivers and for this machine's, the back-end, whose error it is."""

import logging
import os
import subprocess
import sys

import pytest

from vla_rl.simulation import opengl
from vla_rl.simulation.opengl import EglDevice, chosen_device, egl_devices, first_visible, is_of_opengl, prepare_opengl
from vla_rl.types import RenderingError

UUIDS = ("11112222-3333-4444-5555-666677778888", "aaaabbbb-cccc-dddd-eeee-ffff00001111")
SOFTWARE = EglDevice()


def gpus(*numbers):
    return [EglDevice(cuda=number) for number in numbers]


@pytest.mark.parametrize(
    ("devices", "visible", "index"),
    [
        # the numbers count what is visible: torch's device 0 has number 0
        (gpus(0, 1, 2), None, 0),
        (gpus(2, 0, 1), None, 1),  # EGL in another order than CUDA
        (gpus(None, None, 0, None), "2", 2),
        (gpus(None, 1, None, 0), "3,1", 3),
        (gpus(1, 0), "1,0", 1),
        (gpus(None, 0), "GPU-aaaabbbb", 1),
        (gpus(None, 0), "MIG-1a2b3c4d-0000-0000-0000-000000000000", 1),
        ([SOFTWARE, *gpus(0)], "0", 1),
        # a driver that numbers more than is visible counts all
        (gpus(3, 2, 1, 0), "1", 2),
        (gpus(3, 2, 1, 0), " 3,5", 0),
        ([EglDevice(0, UUIDS[0]), EglDevice(1, UUIDS[1])], "GPU-AAAABBBB", 1),
        ([EglDevice(1, UUIDS[1]), EglDevice(0, UUIDS[0])], f"MIG-GPU-{UUIDS[0]}/3/0", 1),
        (gpus(1, 0), "GPU-aaaabbbb", 0),  # nobody knows which: the first
        # a container or a CPU: one device, whatever CUDA is told
        *(([SOFTWARE], visible, 0) for visible in (None, "", "0", "1", "3,5", "-1", "GPU-1a2b", "MIG-1a2b", "x")),
        *((gpus(0), visible, 0) for visible in ("", "-1", "1", "3,5", "GPU-1a2b")),
        # CUDA hides all: the first
        (gpus(None, None), "-1", 0),
        (gpus(1, 0), "", 0),
    ],
)
def test_the_device_is_the_first_visible_one_of_cuda(devices, visible, index):
    assert chosen_device(devices, None, visible) == index


def test_the_users_choice_of_a_device_wins_and_must_be_there():
    assert chosen_device(gpus(0, 1, 2), "2", "0") == 2
    for given in ("3", "-1", "GPU-1", "1,2"):
        with pytest.raises(
            RenderingError, match=rf"^MUJOCO_EGL_DEVICE_ID={given} is no.*shows 3 devices, expected 0 to 2"
        ):
            chosen_device(gpus(0, 1, 2), given, None)
    with pytest.raises(RenderingError, match=r"shows 1 device, expected 0;"):
        chosen_device([SOFTWARE], "1", None)


def test_no_device_at_all_is_a_rendering_error(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(RenderingError, match=r"EGL shows 0 devices\n.*apt-get install"):
        chosen_device([], None, None)


def test_it_is_logged_which_device_was_taken(caplog):
    with caplog.at_level(logging.INFO):
        chosen_device(gpus(1, 0), None, None)
        chosen_device([SOFTWARE], None, "3")
        chosen_device(gpus(1, 0), None, "GPU-1a2b")
    assert "drawing on EGL device 1 of 2: it is the first visible CUDA device" in caplog.messages[0]
    assert "drawing on EGL device 0: EGL shows 1 device," in caplog.messages[1]
    assert [record.levelname for record in caplog.records] == [
        "INFO",
        "INFO",
        "WARNING",
    ]  # the last may be the wrong GPU


def test_cudas_first_device_is_what_stands_before_the_first_comma():
    names = {None: "0", "": None, "-1": None, "3,5": "3", " 2": "2", "-1,0": None, "GPU-1a,0": "GPU-1a", "none": None}
    assert {visible: first_visible(visible) for visible in names} == names


@pytest.mark.libero
@pytest.mark.parametrize("visible", [None, "", "1", "3,5", "-1", "GPU-1a2b3c4d", "MIG-1a2b3c4d"])
def test_a_simulator_is_built_whatever_cuda_may_see(visible):
    """In a process of its own, as a worker, the recorder or a benchmark: EGL is chosen once a process."""
    code = (
        "from vla_rl.simulation.libero_env import build_simulator as b; import os;"
        "s = b('libero_spatial', 0, ('agentview',), 16, fast=True, cache_gb=3); s.reset(0, None, render=True);"
        "print(s.images.any(), os.environ['MUJOCO_EGL_DEVICE_ID'], os.environ.get('CUDA_VISIBLE_DEVICES')); s.close()"
    )
    environment = {name: value for name, value in os.environ.items() if "DEVICE" not in name}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    index = chosen_device(egl_devices(), None, visible)
    assert done.stdout == f"True {index} {visible}\n", done.stderr


def test_missing_egl_names_the_packages(monkeypatch):
    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(opengl.ctypes, "CDLL", no_library)
    with pytest.raises(RenderingError, match=r"libEGL\.so\.1.*\n.*apt-get install -y libegl1 libgl1 libgl1-mesa-dri"):
        prepare_opengl()


@pytest.mark.parametrize(
    ("backend", "platform", "used", "warned"),
    [
        ("egl", "osmesa", "egl", True),
        (None, "osmesa", "egl", True),
        ("osmesa", "egl", "osmesa", True),
        ("egl", "EGL", "EGL", False),
        ("egl", None, None, False),
    ],
)
def test_a_pyopengl_platform_that_contradicts_is_set_right_and_said(
    monkeypatch, caplog, backend, platform, used, warned
):
    for name, value in (("MUJOCO_GL", backend), ("PYOPENGL_PLATFORM", platform)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    opengl.choose_backend()
    assert os.environ.get("PYOPENGL_PLATFORM") == used and os.environ["MUJOCO_GL"] == (backend or "egl")
    assert ("PYOPENGL_PLATFORM=" in caplog.text and "contradicts MUJOCO_GL=" in caplog.text) == warned


def raised(code, module):
    try:
        exec(code, {"__name__": module})
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("code", "module", "expected"),
    [
        ("raise AttributeError('NoneType has no glGetError')", "OpenGL.platform.baseplatform", True),
        ("raise RuntimeError('invalid value for environment variable MUJOCO_GL')", "mujoco.gl_context", True),
        ("raise ImportError('Cannot initialize a device display')", "robosuite.renderers.context.egl_context", True),
        ("raise ImportError('libGL.so.1: cannot open shared object file')", "cv2", True),
        ("raise PermissionError(13, 'Permission denied', '/tmp/OpenGL.log')", "robosuite.utils.log_utils", False),
        ("raise RuntimeError('cannot cache function: no locator available')", "numba.core.caching", False),
        ("raise ImportError('All five packages of the EGL must be installed')", "libero.libero", False),
        ("raise ModuleNotFoundError('No module named OpenGL', name='OpenGL')", "OpenGL", False),
        ("raise AttributeError('x')", "OpenGLike", False),
    ],
)
def test_an_error_is_opengls_where_opengl_raised_it(code, module, expected):
    assert is_of_opengl(raised(code, module)) == expected


def test_a_back_end_that_is_none_is_a_rendering_error():
    code = "from vla_rl.simulation.libero_env import build_simulator as b; b('libero_spatial', 0, ('agentview',), 16, fast=True)"
    environment = os.environ | {"MUJOCO_GL": "nonsense"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "RenderingError: cannot render with MUJOCO_GL=nonsense: invalid value" in done.stderr
