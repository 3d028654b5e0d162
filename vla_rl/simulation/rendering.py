"""The cameras of one MuJoCo model: robosuite's images, bit for bit, without drawing what the camera cannot see.

The scenes have 240,000 to 400,000 mesh faces, and drawing costs by the face. A mesh whose bounding box lies outside the
camera's view pyramid gives no pixel, so it is not drawn. A mirror (MuJoCo reflects in one plane or box) may show a mesh
that is outside: its mirror image is then tested against the pyramid through the mirror.

G meshes. Camera frame: x to the right, y up, z forward (metres).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
from collections.abc import Iterator

import mujoco
import numpy as np
from robosuite.utils.binding_utils import GLContext

from vla_rl.simulation.opengl import rendering_errors

NOT_DRAWN = 5  # a geom group that MuJoCo does not show by default; LIBERO uses groups 0 (collision) and 1 (visual)
DRAWN = 1
MARGIN = 1e-3  # of the pyramid's slopes: float32 in OpenGL against float64 here


class Renderer:
    """Draws the cameras of a model with its own OpenGL context (robosuite 1.4.0, binding_utils.MjRenderContext).

    Args:
        fast: no reflections, no multi-sampling; changes the model's visual settings only.
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, image_size: int, fast: bool):
        self.model, self.data, self.image_size = model, data, image_size
        if fast:  # before the context is made, which reads these
            model.vis.quality.offsamples = 0
            model.vis.quality.shadowsize = 512
            model.mat_reflectance[:] = 0
        buffer = model.vis.global_
        buffer.offwidth, buffer.offheight = max(buffer.offwidth, image_size), max(buffer.offheight, image_size)
        with rendering_errors():
            self.gl = GLContext(max_width=buffer.offwidth, max_height=buffer.offheight, device_id=-1)
            self.gl.make_current()
            self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.scene = mujoco.MjvScene(model, maxgeom=1000)
        self.camera, self.options, self.perturbation = mujoco.MjvCamera(), mujoco.MjvOption(), mujoco.MjvPerturb()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.options.geomgroup[0] = 0
        self.viewport = mujoco.MjrRect(0, 0, image_size, image_size)
        self.culling = Culling(model)
        free_textures(model)

    def render(self, camera: str) -> np.ndarray:
        """uint8 [H, W, 3], upside down as OpenGL's images are, of the kinematics that data holds."""
        self.camera.fixedcamid = self.model.camera(camera).id
        image = np.empty((self.image_size, self.image_size, 3), np.uint8)
        self.gl.make_current()
        with self.culling.hide_unseen(self.data, self.camera.fixedcamid):
            mujoco.mjv_updateScene(
                self.model, self.data, self.options, self.perturbation, self.camera, mujoco.mjtCatBit.mjCAT_ALL, self.scene
            )  # fmt: skip
        mujoco.mjr_render(self.viewport, self.scene, self.context)
        mujoco.mjr_readPixels(image, None, self.viewport, self.context)
        return image

    def name(self) -> str:
        """Who draws: "llvmpipe (LLVM 15.0.7, 256 bits), OpenGL 4.5 ..." in software, the card's name on one."""
        from OpenGL import GL

        self.gl.make_current()
        renderer, version = (GL.glGetString(number).decode() for number in (GL.GL_RENDERER, GL.GL_VERSION))
        return f"{renderer}, OpenGL {version}"

    def close(self) -> None:
        self.gl.make_current()
        self.context.free()
        self.gl.free()


def free_textures(model: mujoco.MjModel) -> None:
    """Gives back 0.18 GB: OpenGL has its own copy of the textures now, and nothing else reads the model's."""
    page = mmap.PAGESIZE
    first = -(-model.tex_rgb.ctypes.data // page) * page
    end = (model.tex_rgb.ctypes.data + model.tex_rgb.nbytes) // page * page
    if end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)


class Culling:
    """Which meshes of a model a camera can see, directly or in a mirror."""

    def __init__(self, model: mujoco.MjModel):
        self.model = model
        drawn = model.geom_group == DRAWN
        kind, material = model.geom_type, model.geom_matid
        self.meshes = np.flatnonzero(drawn & (kind == mujoco.mjtGeom.mjGEOM_MESH))  # [G]
        self.boxes = np.stack([mesh_box(model, model.geom_dataid[geom]) for geom in self.meshes])  # [G, 8, 3]
        # MuJoCo takes the first of these (render_gl3.c, isReflective); to test them all is to draw too much, not too little
        flat = np.isin(kind, (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_BOX))
        self.mirrors = np.flatnonzero(drawn & flat & (material >= 0) & (model.mat_reflectance[material] > 0))
        self.possible = not model.light_castshadow.any()  # what is out of sight may cast a shadow into it

    @contextlib.contextmanager
    def hide_unseen(self, data: mujoco.MjData, camera: int) -> Iterator[None]:
        """The model's unseen meshes are in a group that is not drawn. Geom groups have no part in the physics."""
        hidden = self.unseen(data, camera) if self.possible else []
        self.model.geom_group[hidden] = NOT_DRAWN
        try:
            yield
        finally:
            self.model.geom_group[hidden] = DRAWN

    def unseen(self, data: mujoco.MjData, camera: int) -> np.ndarray:
        """Ids of the meshes that give no pixel; int [<= G]."""
        rotation = data.geom_xmat[self.meshes].reshape(-1, 3, 3)
        corners = np.matmul(self.boxes, rotation.transpose(0, 2, 1)) + data.geom_xpos[self.meshes, None]  # [G, 8, 3]
        eye, axes = data.cam_xpos[camera], data.cam_xmat[camera].reshape(3, 3) * [1, 1, -1]  # MuJoCo looks along -z
        slope = np.tan(np.radians(self.model.cam_fovy[camera]) / 2)
        view = (-slope, slope, -slope, slope)
        outside = is_outside((corners - eye) @ axes, view)
        for mirror in self.mirrors:
            centre, normal, edges = self.mirror_plane(data, mirror)
            if (eye - centre) @ normal < -MARGIN:
                continue  # seen from behind, it reflects nothing
            through = pyramid((edges - eye) @ axes, view)
            if through is not None:
                reflected = corners - 2 * ((corners - centre) @ normal)[..., None] * normal
                outside &= is_outside((reflected - eye) @ axes, through)
        return self.meshes[outside]

    def mirror_plane(self, data: mujoco.MjData, geom: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centre [3] and normal [3] of the side of a plane or box that reflects (+z), and its corners [4, 3]."""
        size, axes = self.model.geom_size[geom], data.geom_xmat[geom].reshape(3, 3)
        is_box = self.model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_BOX
        centre = data.geom_xpos[geom] + (size[2] * axes[:, 2] if is_box else 0)
        half = np.where(size[:2] > 0, size[:2], 1e3)  # a plane of size 0 has no end
        signs = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
        return centre, axes[:, 2], centre + (signs * half) @ axes[:, :2].T


def is_outside(corners: np.ndarray, view: tuple[float, float, float, float]) -> np.ndarray:
    """Whether all corners [G, 8, 3] in the camera's frame lie beyond one and the same side of the pyramid, or behind it.

    Args:
        view: left, right, bottom and top slope: x / z and y / z.
    """
    x, y, z = np.moveaxis(corners, -1, 0)
    left, right, bottom, top = view
    beyond = [
        x < (left - MARGIN) * z,
        x > (right + MARGIN) * z,
        y < (bottom - MARGIN) * z,
        y > (top + MARGIN) * z,
        z < 0,
    ]
    return np.any([side.all(axis=-1) for side in beyond], axis=0)


def pyramid(corners: np.ndarray, view: tuple[float, float, float, float]) -> tuple[float, float, float, float] | None:
    """The part of the view in which points [P, 3] lie, as slopes; None if it is empty."""
    x, y, z = corners.T
    if (z < 0).all():
        return None
    if (z < MARGIN).any():
        return view  # partly behind the camera: anywhere
    left, right, bottom, top = view
    part = max(left, (x / z).min()), min(right, (x / z).max()), max(bottom, (y / z).min()), min(top, (y / z).max())
    return part if part[0] <= part[1] and part[2] <= part[3] else None


def mesh_box(model: mujoco.MjModel, mesh: int) -> np.ndarray:
    """Corners [8, 3] of the mesh's bounding box in its geom's frame."""
    first = model.mesh_vertadr[mesh]
    vertices = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    return np.array(list(itertools.product(*zip(low, high, strict=True))), dtype=np.float64)
